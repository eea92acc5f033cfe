from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.plot import draw_result, open_figure
from memory.errors import KeditError

pytest.importorskip("matplotlib")


def result(method: str) -> dict[str, Any]:
    share = {"prob": None, "tokens": 0.9, "strict": 0.5, "generation": 0.4}
    return {
        **{column: share for column in ("reliability", "generality", "locality")},
        "retention": [{"first": n, "facts": 100, "strict": 0.5, "generation": 0.4} for n in (0, 9)],
        "method": method,
    }


def test_the_picture_is_a_png_and_shows_the_baseline(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    draw_result(result("auto"), alone)
    draw_result(result("auto") | {"baseline": result("none")}, both)
    for path in (alone, both):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert alone.read_bytes() != both.read_bytes()


@pytest.mark.parametrize(("panels", "rows"), [(1, 1), (2, 1), (3, 1), (6, 2)])
def test_a_picture_has_its_panels_in_rows(tmp_path: Path, panels: int, rows: int) -> None:
    with open_figure(tmp_path / "out.png", panels) as axes:
        places = [each.get_subplotspec() for each in axes]
    assert len(places) == panels
    assert [place.rowspan.start for place in places] == sorted(
        n * rows // panels for n in range(panels)
    )


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="cannot be written"):
        draw_result(result("auto"), tmp_path / "none" / "out.png")


def test_a_sweep_is_drawn_against_its_sizes(tmp_path: Path) -> None:
    def sweep(chosen: int) -> dict[str, Any]:
        seconds = {"mean": 1.0, "median": 0.9}
        rows = [result("ft") | {"batch_size": n, "seconds_per_fact": seconds} for n in (1, 5)]
        curve = {"per_fact": 0.5, "per_batch": 1.5}
        return {"method": "ft", "facts": 7, "sweep": rows, "curve": curve, "chosen": chosen}

    one, five = tmp_path / "one.png", tmp_path / "five.png"
    draw_result(sweep(1), one)
    draw_result(sweep(5), five)
    assert one.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert one.read_bytes() != five.read_bytes()
