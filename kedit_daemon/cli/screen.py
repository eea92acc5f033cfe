"""A terminal's screen, drawn again in place: nothing flickers, nothing of the old one stays."""

from collections.abc import Iterable

import click

CLEAR = "\x1b[2J"
_TOP, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def redrawn(lines: Iterable[str], columns: int, rows: int, coloured: bool) -> str:
    """What writes the lines over those that are there, to be written in one piece.

    Lines that have no room below are left out: the screen must not roll.
    """
    text, used = [_TOP], 0
    for line in lines:
        plain = click.unstyle(line)
        used += max(1, -(-len(plain) // columns))
        if used >= rows:  # the last row is the cursor's
            break
        # At the very end of a row there is nothing to wipe, and the last character would go.
        wipe = "" if plain and len(plain) % columns == 0 else _REST_OF_LINE
        text.append(f"{line if coloured else plain}{wipe}\n")
    return "".join([*text, _REST_OF_SCREEN])
