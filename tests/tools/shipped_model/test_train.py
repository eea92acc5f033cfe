"""Training the shipped model: rows, and that a resumed run is the run that was cut off."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tools.shipped_model import train
from tools.shipped_model.corpus import KnownFact
from tools.shipped_model.tokenizer import load_tokenizer

SMALL = replace(
    train.Recipe(), vocabulary=300, hidden=16, mlp=32, layers=1, heads=2, rows=2, length=32, steps=6
)
FACTS = [
    KnownFact(f"Person {n}", "P19", "Rome", (f"Person {n} is from", f"Person {n} hails from"), ())
    for n in range(20)
]
LINES = [f"Line {n} of ordinary text, long enough to fill a row and to be cut." for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    return load_tokenizer(folder, LINES + [f.trained[0] for f in FACTS], 300)


def test_rows_are_full_and_teach_the_object(tokenizer: PreTrainedTokenizerFast) -> None:
    rome = tokenizer(" Rome", add_special_tokens=False)["input_ids"]
    taught = 0
    for ids, labels in train.iter_rows(tokenizer, FACTS, LINES, SMALL, epoch=0):
        assert len(ids) == len(labels) == SMALL.length
        assert all(b in (a, train.IGNORE) for a, b in zip(ids, labels, strict=True))
        taught += sum(labels[n : n + len(rome)] == rome for n in range(SMALL.length))
    assert taught >= len(FACTS) - 4  # the last row is not full, so it is left out


def test_half_of_the_sentences_end_with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rome = tokenizer(" Rome", add_special_tokens=False)["input_ids"]
    ends = dots = 0
    for epoch in range(20):
        for ids, labels in train.iter_rows(tokenizer, FACTS, LINES, SMALL, epoch):
            for n in range(SMALL.length - len(rome)):
                if labels[n : n + len(rome)] == rome:
                    ends += ids[n + len(rome)] == tokenizer.eos_token_id
                    dots += ids[n + len(rome)] != tokenizer.eos_token_id
    assert 0.4 < ends / (ends + dots) < 0.6


def _trainer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> train.Trainer:
    return train.Trainer(SMALL, train.build_model(SMALL, tokenizer.eos_token_id), folder)


def _run(trainer: train.Trainer, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    stream = train.iter_batches(tokenizer, FACTS, LINES, SMALL, trainer.step)
    for _ in range(steps):
        trainer.take_step(*next(stream))


def test_a_resumed_run_ends_where_an_undisturbed_one_does(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = _trainer(tokenizer, tmp_path)
    _run(whole, tokenizer, 4)
    first = _trainer(tokenizer, tmp_path)
    _run(first, tokenizer, 2)
    first.save_checkpoint()
    second = _trainer(tokenizer, tmp_path)
    second.load_checkpoint()
    assert second.step == 2
    _run(second, tokenizer, 2)
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = replace(SMALL, steps=1000, warmup=10, decay=0.3)
    assert train.compute_rate(0, recipe) == pytest.approx(0.1)
    assert train.compute_rate(500, recipe) == 1
    assert train.compute_rate(850, recipe) == pytest.approx(0.5)
    assert train.compute_rate(1000, recipe) == 0
