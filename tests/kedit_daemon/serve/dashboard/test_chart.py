import math
from dataclasses import replace

import pytest

from kedit_daemon.serve.dashboard.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    draw_chart,
)

LIMITS = {"warn": 1.2, "consolidate": 1.4, "revert": 2.0}
CHART = Chart("norm", "Norm", "", {"layer 1": (1.0, 1.1, None, 1.05)}, LIMITS, 1.0)


def test_points_lie_where_they_belong() -> None:
    drawing = draw_chart(CHART, close=False)
    (run,) = drawing.curves[0].runs
    assert [dot.index for dot in run] == [0, 1, 3]
    assert (run[0].x, run[-1].x) == (LEFT, WIDTH - RIGHT)
    assert run[1].y < run[2].y < run[0].y  # upwards is more
    assert run[0].y == drawing.base_y
    for dot in run:
        assert TOP <= dot.y <= HEIGHT - BOTTOM


def test_the_next_limit_is_in_view() -> None:
    drawing = draw_chart(CHART, close=False)
    assert [limit.name for limit in drawing.limits] == ["warn 1.2"]
    assert drawing.beyond == ("consolidate 1.4", "revert 2")
    sick = replace(CHART, lines={"layer 1": (1.5,)})
    assert [limit.name for limit in draw_chart(sick, close=False).limits] == [
        "warn 1.2",
        "consolidate 1.4",
        "revert 2",
    ]
    assert draw_chart(CHART, close=True).limits == ()


def test_a_falling_figure() -> None:
    falling = Chart("a", "A", "", {"a": (1.0, 0.9)}, {"warn": 0.95, "revert": 0.8}, 1.0, True)
    drawing = draw_chart(falling, close=False)
    assert [limit.name for limit in drawing.limits] == ["warn 0.95", "revert 0.8"]
    assert drawing.limits[0].y < drawing.limits[1].y
    assert falling.worst == ("a", 0.9)


def test_what_is_no_number_leaves_a_gap() -> None:
    drawing = draw_chart(replace(CHART, lines={"a": (1.0, math.nan, 1.1, math.inf)}), close=False)
    assert [[dot.index for dot in run] for run in drawing.curves[0].runs] == [[0], [2]]


def test_nan_is_worst() -> None:
    sick = replace(CHART, lines={"a": (9.0,), "b": (1.0, math.nan), "c": ()})
    assert sick.worst is not None
    assert sick.worst[0] == "b"
    assert replace(CHART, lines={}).worst is None


@pytest.mark.parametrize("values", [(), (1.0,), (0.0, 0.0), (math.nan,), (1e-9, 2e-9), (1e9,)])
@pytest.mark.parametrize("close", [True, False])
def test_every_range_has_ticks(values: tuple[float, ...], close: bool) -> None:
    drawing = draw_chart(replace(CHART, lines={"a": values}), close)
    assert 2 <= len(drawing.ticks) <= 9
    assert len({tick.name for tick in drawing.ticks}) == len(drawing.ticks)
    assert [tick.y for tick in drawing.ticks] == sorted((t.y for t in drawing.ticks), reverse=True)
