from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES

from memory.model.editable import EditableModel
from memory.model.generate import decode_steps
from memory.model.scoring import PromptAnswer, score_answers

PROMPTS = ("The seat of country 3 is", "Rome", "The seat of the old country 17 is in")


def make_rows(model: EditableModel) -> list[PromptAnswer]:
    answers = ("Oslo", "Cairo and more", "Lima.")
    return [
        PromptAnswer(tuple(model.encode(p)), tuple(model.encode_target(p, a)))
        for p in PROMPTS
        for a in answers
    ]


def score_alone(model: EditableModel, row: PromptAnswer) -> tuple[float, tuple[int, ...]]:
    """Mean NLL and the likeliest tokens of one row, without a pad or a cache."""
    ids = torch.tensor([[*row.prompt, *row.answer]])
    with torch.no_grad():
        logits = model.hf_model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].double()
    answer = torch.tensor(row.answer)
    loss = -logits.log_softmax(-1)[torch.arange(len(answer)), answer].mean()
    return float(loss), tuple(logits.argmax(-1).tolist())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_together_score_as_they_do_alone(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    rows, opened = make_rows(model), list[int]()

    @contextmanager
    def overlay(places: list[int]) -> Iterator[None]:
        opened.extend(places)
        yield

    for over, rows_per_pass in ((None, 64), (None, 2), (overlay, 2)):
        scored = score_answers(model, rows, over, rows_per_pass=rows_per_pass)
        for row, score in zip(rows, scored, strict=True):
            loss, tokens = score_alone(model, row)
            assert score.loss == pytest.approx(loss, rel=1e-4)
            assert score.tokens == tokens
            assert score.token_hits == tuple(
                a == b for a, b in zip(tokens, row.answer, strict=True)
            )
    assert sorted(opened) == list(range(len(rows)))


@torch.no_grad()
def test_the_greedy_answer_is_right_in_every_token(model: EditableModel) -> None:
    prompt = tuple(model.encode(PROMPTS[0]))
    steps = decode_steps(model, torch.tensor([prompt]), 5)
    answer = tuple(int(logits.argmax()) for logits in steps)
    assert score_answers(model, [PromptAnswer(prompt, answer)])[0].token_hits == (True,) * 5
    other = PromptAnswer(prompt, (*answer[:2], answer[2] ^ 1, *answer[3:]))
    assert score_answers(model, [other])[0].token_hits[:3] == (True, True, False)
    assert score_answers(model, [other])[0].tokens[:3] == answer[:3]
