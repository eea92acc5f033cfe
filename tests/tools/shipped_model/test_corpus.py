"""The corpus of the shipped model: what is held out stays out, and nothing depends on chance."""

import json
import lzma
from pathlib import Path

import pytest

from tools.shipped_model import corpus

PATTERNS = ["[X] was born in [Y].", "[X] is from [Y] .", "[X] , born in [Y]", "[X] hails from [Y]"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder in small: one relation in four phrasings, and a few facts of it."""
    for folder in ("knowledge", "editing", "corpus"):
        (tmp_path / folder).mkdir()
    patterns = {"P19": [{"pattern": p} for p in PATTERNS]}
    (tmp_path / "knowledge/pararel.json").write_text(json.dumps({"patterns": patterns}))
    rows = [
        {"predicate_id": "P19", "sub_label": f"Person {n}", "obj_label": city}
        for n, city in enumerate(("Rome", "Oslo", "Lima"))
    ]
    rows.append({"predicate_id": "P19", "sub_label": "Person 0", "obj_label": "Quito"})
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "knowledge/trex_facts_22881.jsonl").write_text(lines)
    for name in ("counterfact_full_1000", "counterfact_5000", "counterfact_train_10000"):
        (tmp_path / f"editing/{name}.json").write_text("[]")
    for name in corpus.TEXTS:
        text = "\n".join(f"{name} line {n} is long enough to be kept as text." for n in range(250))
        with lzma.open(tmp_path / f"corpus/{name}.txt.xz", "wt") as stream:
            stream.write(text)
    return tmp_path


def test_two_phrasings_of_a_relation_are_never_trained_on(data: Path) -> None:
    forms = corpus.load_phrasings(data)["P19"]
    assert len(forms.held_out) == 2
    assert not set(forms.held_out) & set(forms.trained)
    for fact in corpus.load_facts(data, 10):
        assert not set(fact.held_out) & set(fact.trained)


def test_no_prompt_gets_two_objects(data: Path) -> None:
    known = corpus.load_facts(data, 10)
    assert [(f.subject, f.object) for f in known] == [
        ("Person 0", "Rome"),
        ("Person 1", "Oslo"),
        ("Person 2", "Lima"),
    ]


def test_the_limit_holds(data: Path) -> None:
    assert len(corpus.load_facts(data, 2)) == 2


def test_held_out_text_is_never_trained_on(data: Path) -> None:
    trained, held_out = (corpus.load_text(data, held_out=part) for part in (False, True))
    assert len(held_out) == 3 * len(corpus.TEXTS)  # lines 0, 100 and 200 of each
    assert not set(trained) & set(held_out)
    assert len(trained) + len(held_out) == 250 * len(corpus.TEXTS)
