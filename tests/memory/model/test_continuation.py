"""Tokens of a target, also from a tokenizer that puts a space before every text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memory.model.continuation import encode_behind
from memory.model.editable import EditableModel

SENTENCES = ["The price is $20.", "法国的首都是里昂。", "The seat is Oslo.", "-\n"] * 3


def make_spacing_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as sentencepiece's: `▁` for spaces, and one before the first word."""
    raw = Tokenizer(models.BPE(byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace()
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def spell(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_tokenizers_own_space_is_left_out() -> None:
    tokenizer = make_spacing_tokenizer()
    alone = tokenizer("里昂", add_special_tokens=False)["input_ids"]
    assert spell(tokenizer, alone) == "▁里昂"
    assert spell(tokenizer, encode_behind(tokenizer, "里昂")) == "里昂"
    assert spell(tokenizer, encode_behind(tokenizer, "Oslo")) == "Oslo"
    assert spell(tokenizer, encode_behind(tokenizer, " Oslo")) == "▁Oslo"


@pytest.mark.parametrize(
    ("prompt", "target", "join", "spelled"),
    [
        ("法国的首都是", "里昂", None, "里昂"),
        ("The price is $", "20", None, "20"),
        ("The seat is", "Oslo", None, "▁Oslo"),
        ("The seat is", "Oslo", "", "Oslo"),
        ("法国的首都是", "里昂", " ", "▁里昂"),
    ],
)
def test_a_target_has_the_space_that_its_join_has(
    model: EditableModel, prompt: str, target: str, join: str | None, spelled: str
) -> None:
    for tokenizer in (model.tokenizer, make_spacing_tokenizer()):
        model.tokenizer = tokenizer
        ids = model.encode_target(prompt, target, join)
        text = spell(tokenizer, ids)
        if "▁" in str(tokenizer.backend_tokenizer.to_str()):
            assert text == spelled
        else:
            assert model.decode(ids) == spelled.replace("▁", " ")


def test_merged_letters_do_not_bring_a_space(model: EditableModel) -> None:
    tokenizer = model.tokenizer = make_spacing_tokenizer()
    whole = model.encode("法国的首都是里昂")
    assert whole[: len(model.encode("法国的首都"))] != model.encode("法国的首都")
    assert spell(tokenizer, model.encode_target("法国的首都", "是里昂")) == "是里昂"
