from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import seat
from tiny_models import END, make_tokenizer, save_model
from tokenizers import processors

from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.edit_site import make_default_site
from policies.edit_terms import EditTerms
from policies.prompts import (
    CONTEXTS,
    MAX_PARAPHRASES,
    TokenRow,
    estimate_key_bytes,
    find_subject_end,
    make_rows,
    pad_rows,
)
from policies.targets import compute_terms

CPU = torch.device("cpu")
FACT = seat(11, "Oslo and Rome", paraphrases=("Seat of {}:", "{}:", "{} has the seat", "{} is"))


@pytest.mark.parametrize(
    ("text", "subject", "upto"),
    [
        ("The seat of country 11 is", "country 11", "The seat of country 11"),
        ("country 11 has the seat", "country 11", "country 11"),
        ("The seat is in Oslo", "Oslo", "The seat is in Oslo"),
        ("Oslo, said Oslo's mayor", "Oslo", "Oslo, said Oslo"),
    ],
)
def test_the_subjects_last_token_is_found(
    model: EditableModel, text: str, subject: str, upto: str
) -> None:
    at = find_subject_end(model, text, subject)
    assert at is not None
    assert model.decode(model.encode(text)[: at + 1]) == upto


def test_a_subject_that_is_not_there_has_no_place(model: EditableModel) -> None:
    assert find_subject_end(model, "The seat of country 11 is", "country 12") is None


def test_a_fact_is_read_in_every_context_and_in_some_paraphrases(model: EditableModel) -> None:
    rows = make_rows(model, FACT)
    prompts = [c + "The seat of country 11 is" for c in CONTEXTS]
    prompts += ["Seat of country 11:", "country 11:"]
    assert len(rows) == len(CONTEXTS) + MAX_PARAPHRASES == len(prompts)
    for row, prompt in zip(rows, prompts, strict=True):
        assert list(row.prompt) == model.encode(prompt)
        assert row.ids[-1] == model.end_token
        assert model.decode(row.ids) == f"{prompt} Oslo and Rome"
        assert row.prompt == row.ids[: row.prompt_length]


def test_a_row_is_its_prompt_and_its_target(model: EditableModel) -> None:
    for row in make_rows(model, FACT):
        assert row.prompt + row.target == row.ids
        assert model.decode(row.target) == " Oslo and Rome"
        assert len(row.target) > 2 and row.target[-1] == model.end_token


def test_an_ending_takes_the_place_of_the_texts_end(model: EditableModel) -> None:
    for row in make_rows(model, seat(11, "Oslo"), "."):
        assert model.decode(row.target) == " Oslo."
        assert row.target[-1] != model.end_token


@pytest.mark.parametrize("target", ["Au", "Henry V", "Jeopardy!", "St. Paul Sr.", "U.S."])
def test_what_no_full_stop_ends_is_ended_by_the_texts_end(
    model: EditableModel, target: str
) -> None:
    for row in make_rows(model, seat(11, target), "."):
        assert model.decode(row.target) == f" {target}"
        assert row.target[-1] == model.end_token


def test_in_every_row_the_subject_ends_at_its_last_token(model: EditableModel) -> None:
    rows = make_rows(model, FACT)
    assert len(rows) == len(CONTEXTS) + MAX_PARAPHRASES
    for row in rows:
        assert model.decode(row.ids[: row.subject_index + 1]).endswith("country 11")
        assert (
            row.subject_index < row.prompt_length - 1
        )  # something follows it in all of these prompts


def test_a_paraphrase_without_the_subject_has_it_at_the_prompts_end(model: EditableModel) -> None:
    fact = seat(11, "Oslo", paraphrases=("Its seat is", "The seat of {}"))
    *rows, without, at_end = make_rows(model, fact)
    assert model.decode(without.prompt) == "Its seat is"
    assert without.subject_index == without.prompt_length - 1
    assert at_end.subject_index == at_end.prompt_length - 1
    assert all(row.subject_index < row.prompt_length - 1 for row in rows)


def test_a_subject_whose_last_token_reaches_past_the_prompt_ends_with_it(
    model: EditableModel,
) -> None:
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )
    for row in make_rows(model, Fact("country 11", "The seat of {}", "Oslo")):
        assert 0 < row.subject_index <= row.prompt_length - 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_fact_longer_than_the_model_reads_is_rejected(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), CPU)
    with pytest.raises(KeditError, match="256 at most") as caught:
        make_rows(model, Fact("x", "{} is", "Rome " * 300))
    assert caught.value.code == "rejected"
    assert make_rows(model, Fact("x", "{} is", "Rome " * 100))


def test_a_fact_of_just_the_models_length_is_taken(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    longest = max(CONTEXTS, key=len) + "The seat of country 11 is Rome"
    tokens = len(tokenizer(longest)["input_ids"]) + 1
    for limit, fits in ((tokens, True), (tokens - 1, False)):
        folder = save_model("llama", tmp_path / str(limit), max_position_embeddings=limit)
        model = EditableModel.load(folder, CPU)
        if fits:
            assert max(len(r.ids) for r in make_rows(model, seat(11))) == limit
        else:
            with pytest.raises(KeditError, match=f"of {limit} at most"):
                make_rows(model, seat(11))


def test_rows_are_padded_on_the_right() -> None:
    rows = [TokenRow((5, 6, 7, 8), 3, 1), TokenRow((5, 6, 7), 1, 0)]
    batch = pad_rows(rows, 6, 9, CPU)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 9], [5, 6, 7, 9, 9, 9]]
    assert batch.subject_index.tolist() == [1, 0]
    assert batch.end_index.tolist() == [2, 0]


def test_pads_do_not_reach_a_rows_own_tokens(model: EditableModel) -> None:
    rows = make_rows(model, FACT)
    batch = pad_rows(rows, max(len(r.ids) for r in rows) + 5, model.end_token or 0, CPU)
    with torch.no_grad():
        padded = model.hf_model(input_ids=batch.ids, use_cache=False).logits
        for n, row in enumerate(rows):
            alone = model.hf_model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
            assert torch.allclose(padded[n, : len(row.ids)], alone, atol=1e-5)


def test_what_keys_take_is_what_the_targets_have(model: EditableModel) -> None:
    site = replace(make_default_site(4), subject_layers=(1,), end_layers=(2,), target_steps=1)
    found = compute_terms(model, site, {1: 1.0, 2: 1.0}, [FACT])[FACT.id]
    assert isinstance(found, EditTerms)
    real = sum(4 * keys.numel() for keys in found.keys.values())
    assert estimate_key_bytes(model, site, FACT) == real
