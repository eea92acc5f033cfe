from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from editing_home import Bench, seat

from kedit_daemon.bench.scoring import compute_target_losses, continue_greedily
from memory.model.editable import EditableModel
from memory.model.scoring import PromptAnswer, score_answers
from memory.side.row_overlay import RowOverlay
from policies.prompts import make_rows, pad_rows

PROMPTS = ("The seat of country 3 is", "Rome", "The seat of the old country 17 is in")


def test_the_greedy_answer_is_right_in_every_token(model: EditableModel) -> None:
    prompts = [tuple(model.encode(p)) for p in PROMPTS]
    said = continue_greedily(model, prompts, 5)
    rows = [PromptAnswer(p, a) for p, a in zip(prompts, said, strict=True)]
    for row, found in zip(rows, score_answers(model, rows), strict=True):
        assert found.token_hits == (True,) * len(row.answer)
    other = PromptAnswer(prompts[0], (*said[0][:2], said[0][2] ^ 1, *said[0][3:]))
    assert score_answers(model, [other])[0].token_hits[:3] == (True, True, False)


def test_nothing_follows_an_end_of_text(model: EditableModel) -> None:
    prompt = tuple(model.encode(PROMPTS[0]))
    first = continue_greedily(model, [prompt], 1)[0]
    model.tokenizer.eos_token_id = first[0]
    assert continue_greedily(model, [prompt], 4) == [first]


def test_the_overlay_is_told_which_rows_run_and_routes_them(bench: Callable[..., Bench]) -> None:
    at, one = bench(side={"steps": 300}), seat(1, "Oslo")
    at.receive(one)
    at.settle()
    model = at.loaded.model
    asked = [one.question, "The weather of today was", one.question]
    ids = tuple(model.encode_target(one.question, "Oslo"))
    rows = [PromptAnswer(tuple(model.encode(p)), ids) for p in asked]
    seen: list[list[int]] = []

    def overlay(places: list[int]) -> AbstractContextManager[None]:
        seen.append(places)
        return RowOverlay(at.served.side).follow_passes()

    bare, routed = score_answers(model, rows), score_answers(model, rows, overlay)
    assert all(routed[0].token_hits) and all(routed[2].token_hits)
    assert routed[0].loss < bare[0].loss / 2
    assert routed[1].loss == pytest.approx(bare[1].loss, rel=1e-5)
    assert sorted(n for places in seen for n in places) == [0, 1, 2]


def test_the_loss_that_training_uses_is_the_loss_that_is_measured(model: EditableModel) -> None:
    rows = [make_rows(model, seat(n, city))[0] for n, city in ((1, "Oslo"), (12, "Rome"))]
    batch = pad_rows(rows, max(len(r.ids) for r in rows), 0, model.device)
    losses = compute_target_losses(model.hf_model(input_ids=batch.ids).logits, rows)
    measured = score_answers(model, [PromptAnswer(r.prompt, r.target) for r in rows])
    assert losses.tolist() == pytest.approx([m.loss for m in measured], rel=1e-4)
