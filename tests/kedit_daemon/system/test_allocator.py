"""Freed memory goes back to the system."""

import sys
from pathlib import Path

import pytest

from kedit_daemon.system.allocator import release_free_memory


def measure_anonymous_kilobytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_lies_between_pieces_in_use_is_given_back() -> None:
    pieces = [bytes(60_000) for _ in range(2000)]
    kept = pieces[::100]
    full = measure_anonymous_kilobytes()
    del pieces
    release_free_memory()
    assert measure_anonymous_kilobytes() < full - 80_000
    assert kept
