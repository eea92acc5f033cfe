import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import CITIES

from kedit_daemon.editing.model_loading import LoadedModel
from tools.train_hypernetworks import MAX_TOKENS, NetworkTraining, read_lessons


def write_records(file: Path, count: int) -> Path:
    records = [
        {
            "src": f"Where is the seat of country {n}?",
            "rephrase": f"Which city is the seat of country {n}?",
            "alt": CITIES[n % len(CITIES)],
            "loc": "nq question: who sang it?",
            "loc_ans": "Nobody",
        }
        for n in range(count)
    ]
    long = {**records[0], "src": "where " * (MAX_TOKENS + 1)}
    file.write_text(json.dumps([long, *records]))
    return file


@pytest.mark.parametrize("kind", ["mend", "malmen"])
def test_a_network_learns_to_edit(
    kind: str, load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    model = load("llama").model
    lessons = read_lessons(model, write_records(tmp_path / "records.json", 8))
    assert len(lessons) == 8  # without the long one
    training = NetworkTraining(model, lessons, kind)
    losses = [training.learn_batch(lessons)[0] for _ in range(12)]
    assert losses[-1] < losses[0]
    blocks = training.network.blocks
    assert all(bool(block.up.any()) for block in blocks)  # not by its rates alone
    assert all(model.weight(n).equal(model.base_weight(n)) for n in training.network.layers)
