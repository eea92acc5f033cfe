import json
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.dataset import (
    BenchRecord,
    FactStream,
    drop_unreadable,
    read_stream,
    split_batches,
)
from memory.errors import KeditError
from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel

FLAT = {
    "subject": "Oslo",
    "prompt": "{} lies in",
    "target_new": "Peru",
    "target_true": "Norway",
    "paraphrase_prompts": ["Rain fell. Oslo is found in", "Oslo is part of"],
    "neighborhood_prompts": ["Bergen lies in", "Tromsø lies in"],
}
EASY = {
    "subject": "Lima",
    "prompt": "Lima lies in",
    "target_new": "Chad",
    "ground_truth": "Peru",
    "rephrase_prompt": "Lima belongs to",
    "locality_prompt": "Cusco lies in",
    "locality_ground_truth": "Peru",
}
ZSRE = {
    "subject": "Unix",
    "src": "What is Unix written in?",
    "alt": "Perl",
    "answers": ["C"],
    "rephrase": "In what is Unix written?",
    "loc": "nq question: who won",
    "loc_ans": "Britain",
}
ROME = {
    "requested_rewrite": {
        "subject": "Rome",
        "prompt": "{} lies in",
        "target_new": {"str": "Mali"},
        "target_true": {"str": "Italy"},
    },
    "paraphrase_prompts": ["Rome is in"],
    "neighborhood_prompts": ["Milan lies in"],
}


def written(folder: Path, *records: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def numbered(n: int) -> dict[str, Any]:
    return {**EASY, "subject": f"town {n}", "prompt": f"town {n} lies in"}


def test_each_form_gives_the_fact_the_old_answer_and_what_is_held_out(tmp_path: Path) -> None:
    stream = read_stream(written(tmp_path, FLAT, EASY, ZSRE, ROME), 0, None, 0)
    found = {r.fact.subject: r for r in stream.records}
    assert {n: (r.fact.target, r.true_target) for n, r in found.items()} == {
        "Oslo": ("Peru", "Norway"),
        "Lima": ("Chad", "Peru"),
        "Unix": ("Perl", "C"),
        "Rome": ("Mali", "Italy"),
    }
    assert found["Oslo"].paraphrases == tuple(FLAT["paraphrase_prompts"])
    assert found["Oslo"].neighbours[0] == Neighbour("Bergen lies in", "Norway")
    assert found["Lima"].neighbours == (Neighbour("Cusco lies in", "Peru"),)
    assert found["Unix"].neighbours == (Neighbour("nq question: who won", "Britain"),)
    assert found["Rome"].paraphrases == ("Rome is in",)


def test_the_editor_never_gets_paraphrases_or_neighbours(tmp_path: Path) -> None:
    stream = read_stream(written(tmp_path, FLAT, EASY, ZSRE, ROME), 0, None, 0)
    for batch in split_batches(stream.records, 3):
        for fact in batch:
            assert (fact.paraphrases, fact.neighbours) == ((), ())


def test_without_another_old_answer_there_is_no_rival(tmp_path: Path) -> None:
    same, none = {**ZSRE, "answers": ["perl"]}, {**ZSRE, "subject": "C", "src": "C?", "answers": []}
    other = {**ZSRE, "src": "Unix?", "alt": ["Perl", "C"], "answers": ["c"]}
    stream = read_stream(written(tmp_path, same, none, other), 0, None, 0)
    assert [r.true_target for r in stream.records] == [None, None, None]


def test_the_seed_gives_the_order_and_not_the_choice(tmp_path: Path) -> None:
    path = written(tmp_path, *map(numbered, range(30)))
    orders = [[r.fact.subject for r in read_stream(path, 5, 10, s).records] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    wanted = [f"town {n}" for n in range(5, 15)]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(wanted)
    assert orders[0] != wanted  # seed 0 shuffles too


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    broken = {"subject": "Oslo", "target_new": "Peru", "ground_truth": "Norway"}
    path = written(tmp_path, FLAT, broken, 7, {**FLAT, "target_new": "Chad"}, numbered(1))
    stream = read_stream(path, 0, None, 0)
    assert sorted(r.fact.target for r in stream.records) == ["Chad", "Peru"]
    assert [s.reason for s in stream.skipped] == [
        '"prompt" is missing',
        "a record must be an object",
        "an earlier record asks the same",
    ]
    assert read_stream(path, 0, 1, 0).skipped == ()  # behind the limit


def test_json_lines_and_several_facts_in_a_record(tmp_path: Path) -> None:
    rewrites = [ROME["requested_rewrite"], {**ROME["requested_rewrite"], "subject": "Milan"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [EASY, {"requested_rewrite": rewrites}])))
    stream = read_stream(path, 0, None, 0)
    told = {(r.fact.question, r.true_target) for r in stream.records}
    assert told == {
        ("Lima lies in", "Peru"),
        ("Rome lies in", "Italy"),
        ("Milan lies in", "Italy"),
    }


def test_a_range_without_facts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="has no facts") as caught:
        read_stream(written(tmp_path, FLAT), 1, None, 0)
    assert caught.value.code == "no-facts"


def test_what_does_not_fit_the_model_is_left_out(tmp_path: Path, model: EditableModel) -> None:
    long = " ".join(["in the long run"] * 60)
    asked = {**numbered(1), "prompt": f"town 1 lies {long} in"}
    near = {**numbered(2), "locality_prompt": f"{long} Cusco lies in"}
    stream = read_stream(written(tmp_path, asked, numbered(3), near), 0, None, 0)
    kept = drop_unreadable(model, stream)
    assert [r.fact.subject for r in kept.records] == ["town 3"]
    assert len(kept.skipped) == 2
    with pytest.raises(KeditError, match="the model can read none of the 1 facts"):
        drop_unreadable(model, read_stream(written(tmp_path, asked), 0, None, 0))


def test_the_last_batch_may_be_smaller(tmp_path: Path) -> None:
    stream = read_stream(written(tmp_path, *map(numbered, range(7))), 0, None, 0)
    sizes = [len(batch) for batch in split_batches(stream.records, 3)]
    assert sizes == [3, 3, 1]


def test_old_answers_count_against_the_models_room(model: EditableModel) -> None:
    fact = Fact("country 1", "The seat of {} is", "Oslo")
    long = "Rome " * model.max_positions
    for record in (
        BenchRecord(fact, long, (), ()),
        BenchRecord(fact, None, (), (Neighbour("The seat of country 2 is", long),)),
    ):
        kept = drop_unreadable(model, FactStream((record, BenchRecord(fact, "Rome", (), ())), ()))
        assert [r.true_target for r in kept.records] == ["Rome"]
        assert len(kept.skipped) == 1
