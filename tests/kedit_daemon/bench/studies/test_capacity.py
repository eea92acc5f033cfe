from collections.abc import Callable
from typing import Any

from study_tools import given

from kedit_daemon.bench.studies import capacity
from kedit_daemon.editing.model_loading import LoadedModel


def test_every_size_is_a_joint_solve_of_its_own(
    load: Callable[[str], LoadedModel],
) -> None:
    study = capacity.CapacityStudy((2, 4, 6, 9), max_asked=3)
    result = study.run(given(load("llama"), 6, 100))
    assert [(row["size"], row["asked"]) for row in result["rows"]] == [(2, 2), (4, 3), (6, 3)]
    assert [row["per_width"] for row in result["rows"]] == [2 / 96, 4 / 96, 6 / 96]
    assert all(row["reliability"]["strict"] == 1.0 for row in result["rows"])
    norms = [max(row["norm_ratio"].values()) for row in result["rows"]]
    assert norms == sorted(norms) and norms[0] < norms[-1]
    assert all(row["solve_seconds"] > 0 for row in result["rows"])
    lines = list(study.format_lines(result))
    assert [line.split()[0] for line in lines[1:4]] == ["2", "4", "6"]


def row(size: int, reliability: float, locality: float | None) -> dict[str, Any]:
    return {"size": size, "reliability": {"strict": reliability}, "locality": {"strict": locality}}


def test_the_knee_is_the_largest_size_that_is_near_the_best_in_both() -> None:
    rows = [row(1, 0.9, 0.9), row(2, 1.0, 0.9), row(3, 0.96, 0.86), row(4, 0.94, 0.9)]
    assert capacity.find_knee(rows) == 3
    assert capacity.find_knee([*rows, row(5, 1.0, 0.8)]) == 3
    assert capacity.find_knee([row(1, 1.0, 0.5), row(2, 0.5, 1.0)]) is None
    assert capacity.find_knee([row(1, 1.0, None), row(2, 0.99, None)]) == 2
