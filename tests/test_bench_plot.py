from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.plot import draw
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
    draw(result("auto"), alone)
    draw(result("auto") | {"baseline": result("none")}, both)
    for path in (alone, both):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert alone.read_bytes() != both.read_bytes()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="cannot be written"):
        draw(result("auto"), tmp_path / "none" / "out.png")
