import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from study_tools import given

from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies.routing_accuracy import GATES, RoutingStudy, _score_gate, find_fired
from kedit_daemon.bench.studies.routing_prompts import (
    CHAT_TEMPLATES,
    PROMPT_GROUPS,
    RoutedPrompt,
    build_groups,
    read_lines,
    truncate_text,
)
from kedit_daemon.editing.live_model import make_empty_side
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.side.row_overlay import RowOverlay


def test_prompts_of_each_group_are_routed_by_keys_and_names(
    load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    study, work = RoutingStudy(max_texts=20, prefix_tokens=40), given(load("llama"), 6, 100)
    result = study.run(work)
    about = {"prompts": 6, "paraphrases": 6, "two facts": 6, "chat": 18, "long": 12}
    assert result["asked"] == {**about, "neighbours": 12, "text": 20}
    first, last = result["rows"][0], result["rows"][-1]
    # At any gate a fact's own prompt has a cosine of 1, and nothing else names its subject.
    assert [row["prompts"] for row in result["rows"]] == [1.0] * len(GATES)
    assert first["paraphrases"] >= last["paraphrases"]
    assert {row[name] for row in result["rows"] for name in ("neighbours", "text")} == {0.0}
    assert result["unrouted"] == {"prompts": 32, "other": 0}
    served = result["served"]
    assert served["facts"] == 6
    assert (served["prompts"], served["neighbours"], served["text"]) == (1.0, 0.0, 0.0)
    assert served["paraphrases"] <= result["at_gate"]["paraphrases"]
    assert result["at_gate"]["gate"] == work.loaded_model.site.end_gate
    lines = list(study.format_lines(result))
    assert [line.split()[0] for line in lines[1:3]] == ["0.00", "0.05"]
    assert lines[-2].startswith("asked: 6 prompts, 6 paraphrases")
    assert lines[-1] == "unrouted: 32, of which 0 have other logits"
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png") as (left, right):
        study.draw_curves(result, left, right)
    assert len(left.lines) == 5 and len(right.lines) == 8


def test_a_question_is_also_asked_late_in_a_prompt(
    load: Callable[[str], LoadedModel],
) -> None:
    build = partial(build_groups, max_texts=20, prefix_tokens=40)
    work = given(load("llama"), 6, 100)
    groups, facts = build(work), {r.fact.id: r.fact for r in work.records}
    assert tuple(groups) == PROMPT_GROUPS
    for name in ("two facts", "chat", "long"):
        for one in groups[name]:
            assert one.fact_id is not None
            assert one.prompt.endswith(facts[one.fact_id].question)
            assert len(one.prompt) > 2 * len(facts[one.fact_id].question)
    pairs = groups["two facts"]
    assert {one.fact_id for one in pairs} == set(facts)
    for one in pairs:
        before = one.prompt.removesuffix(facts[str(one.fact_id)].question)
        assert before in {
            f"{f.question} {f.target}. " for n, f in facts.items() if n != one.fact_id
        }
    assert build(work)["two facts"] == pairs
    assert build(replace(work, seed=1))["two facts"] != pairs
    named = [one.prompt.count(facts[str(one.fact_id)].subject) for one in groups["long"]]
    assert named == [1, 2] * 6
    starts = {one.prompt[:20] for one in groups["long"][::2]}
    assert len(starts) == 6
    assert all(one.prompt.startswith("User: ") for one in groups["chat"])
    alone = build(given(work.loaded_model, 1, 100))
    assert (alone["two facts"], len(alone["chat"])) == ([], len(CHAT_TEMPLATES))


def test_prompts_that_are_too_long_are_left_out(load: Callable[[str], LoadedModel]) -> None:
    work = given(load("llama"), 2, 100)
    work.loaded_model.model.max_positions = 60
    groups = build_groups(work, max_texts=20)
    assert (len(groups["prompts"]), groups["long"]) == (2, [])
    asked = [one.prompt for group in groups.values() for one in group]
    assert max(len(work.loaded_model.model.encode(prompt)) for prompt in asked) <= 60


@pytest.mark.parametrize("name", ["given.txt", "given.xz"])
def test_lines_of_a_file_are_asked_in_the_place_of_the_shipped_ones(
    load: Callable[[str], LoadedModel], tmp_path: Path, name: str
) -> None:
    data = "\n".join(["", *(f" line {n} of it \n" for n in range(7)), "word " * 300]).encode()
    path = tmp_path / name
    path.write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    assert read_lines(path) == [*(f"line {n} of it" for n in range(7)), ("word " * 300).strip()]
    work = replace(given(load("llama"), 2, 100), texts_path=path)
    asked = [one.prompt for one in build_groups(work, max_texts=4)["text"]]
    assert asked == [f"line {n} of it" for n in (0, 2, 4, 6)]
    *_, last = build_groups(work, max_texts=8)["text"]
    model = work.loaded_model.model
    assert last.prompt == truncate_text(model, "word " * 300) and ("word " * 300).startswith(
        last.prompt
    )
    assert model.max_positions - 2 <= len(model.encode(last.prompt)) <= model.max_positions
    study = RoutingStudy(max_texts=8, prefix_tokens=20)
    result = study.run(work)
    assert (result["texts"], result["asked"]["text"]) == (name, 8)
    assert f"text: lines of {name}" in list(study.format_lines(result))


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", b"\xff\xfe"), ("a.xz", b"no xz"), ("a.txt", b" \n\n")]
)
def test_a_file_without_text_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(KeditError) as caught:
        read_lines(path)
    assert caught.value.code == "unreadable"


def test_logits_that_a_bit_has_moved_are_counted(
    load: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make_empty_side(load("llama"))
    asked = [RoutedPrompt(f"The seat of country {n} is", None) for n in (30, 31)]
    assert [one.moved for one in find_fired(side, asked)] == [False, False]
    follow, model = RowOverlay.follow_passes, side.model

    @contextmanager
    def leaking(rows: RowOverlay) -> Iterator[None]:
        with follow(rows), model.tap_layers({0: lambda _k, y: y * (1 + 1e-6)}):
            yield

    monkeypatch.setattr(RowOverlay, "follow_passes", leaking)
    assert [one.moved for one in find_fired(side, asked)] == [True, True]


def test_the_wrong_fact_is_no_recall_and_takes_from_precision() -> None:
    groups = {
        "prompts": [RoutedPrompt("a", "1", "1", 0.9), RoutedPrompt("b", "2", "1", 0.6)],
        "paraphrases": [RoutedPrompt("c", "1", "1", 0.5), RoutedPrompt("d", "2")],
        "neighbours": [RoutedPrompt("e", None, "2", 0.7), *[RoutedPrompt("f", None)] * 3],
        **{name: [] for name in ("two facts", "chat", "long", "text")},
    }
    at = _score_gate(groups, 0.5)
    assert at == {
        "prompts": 0.5,
        "paraphrases": 0.5,
        **dict.fromkeys(("two facts", "chat", "long")),
        "neighbours": 0.25,
        "text": None,
        "precision": 0.5,
    }
    assert _score_gate(groups, 0.65)["precision"] == 0.5
    assert _score_gate(groups, 0.95)["precision"] is None
