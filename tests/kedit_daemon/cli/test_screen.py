import click

from kedit_daemon.cli.screen import redrawn


def test_lines_are_written_over_the_old_ones_and_the_rest_is_wiped() -> None:
    red = click.style("b", fg="red")
    assert redrawn(["a", red], 80, 24, True) == f"\x1b[Ha\x1b[K\n{red}\x1b[K\n\x1b[J"
    assert redrawn(["a", red], 80, 24, False) == "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J"
    assert redrawn([], 80, 24, True) == "\x1b[H\x1b[J"


def test_what_has_no_room_is_left_out() -> None:
    lines = [str(n) for n in range(10)]
    assert redrawn(lines, 80, 4, True).count("\n") == 3
    # Long lines take several rows; colours take none.
    assert redrawn(["x" * 81, "y", "z"], 80, 4, True).count("\n") == 2
    assert redrawn([click.style("x" * 80, fg="red"), "y", "z"], 80, 4, True).count("\n") == 3


def test_the_last_character_of_a_full_row_stays() -> None:
    assert redrawn(["x" * 10], 10, 5, True) == f"\x1b[H{'x' * 10}\n\x1b[J"
