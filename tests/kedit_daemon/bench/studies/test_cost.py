import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import pytest
import torch
from study_tools import given

from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies.cost import PARTS, CostStudy, build_side_memory, collect_subjects
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.facts import Neighbour
from memory.side.row_overlay import RowOverlay
from memory.side.side_memory import SideMemory

FACTS = 6


KEY_COUNT = 60
SMALL = CostStudy(KEY_COUNT, (24, 48), 3, 6, rounds=2, decoded_tokens=2)


def test_every_group_and_length_is_timed(
    load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    work = given(load("llama"), FACTS, 100)
    naming = Neighbour("Country 1 and country 2 and country 3 met, or so people say")
    work.records[0] = replace(work.records[0], neighbours=(naming, *work.records[0].neighbours))
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    result = SMALL.run(work)
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == threads
    assert (result["keys"], result["facts_live"], result["unnamed"]) == (60, 30, 1)
    found = {(row["group"], row["tokens"]) for row in result["rows"]}
    assert {(name, n) for name in ("text", "neighbours", "unnamed") for n in (24, 48)} <= found
    for row in result["rows"]:
        assert 1 <= row["prompts"] <= 3
        for part in PARTS:
            assert row[part]["ms"] > 0 and min(row[part]["cost"], row[part]["again"]) > -1
    lines = list(SMALL.format_lines(result))
    assert lines[1].split()[:3] == ["text", "24", "3"]
    assert "30 facts live beside the weights, 60 keys not in lists" in lines
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png") as (left, right):
        SMALL.draw_curves(result, left, right)
    assert len(left.lines) == len(right.lines) == len({name for name, _ in found})


def test_prompts_are_of_their_group_and_are_not_routed(load: Callable[[str], LoadedModel]) -> None:
    work = given(load("llama"), FACTS, 100)
    naming = tuple(Neighbour(f"Country {n} and the seat of a bishop") for n in range(FACTS))
    work.records[0] = replace(work.records[0], neighbours=naming)
    side = build_side_memory(work, collect_subjects(work, random.Random(0), KEY_COUNT))
    side.gates = replace(side.gates, min_end_cosine=0.9999)
    groups = SMALL.collect_prompts(work, side)
    assert {name for name, _ in groups} == {"text", "neighbours", "named"}
    for (name, tokens), prompts in groups.items():
        assert 1 <= len(prompts) <= 3
        for ids in prompts:
            rows = RowOverlay(side)
            with torch.no_grad(), rows.follow_passes():
                side.model.hf_model(input_ids=ids)
            assert rows.matches == [None]
            assert abs(ids.shape[1] - tokens) <= 8 or name != "text"
            said = side.model.decode(ids[0].tolist())
            assert bool(side.subject_matcher.find_named_facts(said)) == (name == "named")
    side.gates = replace(side.gates, min_subject_cosine=-1.0, min_end_cosine=-1.0)
    assert not any(
        groups for (name, _), groups in SMALL.collect_prompts(work, side).items() if name == "named"
    )


def test_what_the_side_memory_adds_is_told_and_chance_beside_it(
    load: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = given(load("llama"), FACTS, 100)
    side = build_side_memory(work, collect_subjects(work, random.Random(0), KEY_COUNT))
    prompts = [torch.tensor([side.model.encode(f"It rained {n} times")]) for n in range(5)]
    spin = torch.randn(600, 600)

    @contextmanager
    def slow(_rows: RowOverlay) -> Iterator[None]:
        taps = {0: lambda _k, _y: (spin @ spin @ spin, None)[1]}
        with side.model.tap_layers(taps):
            yield

    monkeypatch.setattr(RowOverlay, "follow_passes", slow)
    found = SMALL.time_prompts(side, prompts)
    assert found["prompts"] == 5
    for part in PARTS:
        assert found[part]["cost"] > 0.5 > abs(found[part]["again"])


def test_made_up_facts_have_subjects_of_the_words_of_real_ones(
    load: Callable[[str], LoadedModel],
) -> None:
    work = given(load("llama"), FACTS, 100)
    named = [
        replace(r, fact=replace(r.fact, subject=f"Lake N{n} of it"))
        for n, r in enumerate(work.records)
    ]
    work = replace(work, records=named)
    facts = collect_subjects(work, random.Random(0), KEY_COUNT)
    real = {record.fact.id for record in named}
    assert len(facts) == 30 and real < set(facts)
    words = {word for n in range(FACTS) for word in ("Lake", f"N{n}")}
    for fact_id in set(facts) - real:
        assert set(facts[fact_id][1].split()) <= words and len(facts[fact_id][1].split()) == 4
    side: SideMemory = build_side_memory(work, facts)
    assert len(side.key_index) == 60
    again = collect_subjects(work, random.Random(0), KEY_COUNT)
    assert [name for _, name in again.values()] == [name for _, name in facts.values()]
    with pytest.raises(KeditError, match="no two facts"):
        collect_subjects(given(work.loaded_model, 1, 100), random.Random(0), KEY_COUNT)
