"""Measures of code style: one-word function names, docstring openings, lines.

    python -m tools.count_style [ROOM ...]

A function is any `def` outside of `__dunder__` names; one word is a name without an underscore
inside it. Of docstrings the first word counts. Lines are those of the files, as `wc -l` has them.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOMS = ("kedit_daemon", "memory", "policies")
VAGUE_OPENINGS = ("What", "Where", "Whether")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


@dataclass
class Counts:
    """Totals over some files."""

    lines: int = 0
    names: list[str] = field(default_factory=list)
    docstrings: list[str] = field(default_factory=list)

    def add_file(self, path: Path) -> None:
        """Count one Python file."""
        text = path.read_text(encoding="utf-8")
        self.lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, DEFINITIONS) and (docstring := ast.get_docstring(node)):
                self.docstrings.append(docstring)
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and not node.name.startswith("__"):
                self.names.append(node.name)

    def format_report(self) -> Iterator[str]:
        """Yield the figures, a line each."""
        one_word = [name for name in self.names if "_" not in name.strip("_")]
        vague = [text for text in self.docstrings if text.split()[0] in VAGUE_OPENINGS]
        yield f"lines of code: {self.lines:,}"
        yield f"functions of one-word names: {_format_share(one_word, self.names)}"
        openings = ", ".join(VAGUE_OPENINGS)
        yield f"docstrings that open with {openings}: {_format_share(vague, self.docstrings)}"


def _format_share(part: list[str], whole: list[str]) -> str:
    return f"{len(part):,} of {len(whole):,} ({len(part) / max(len(whole), 1):.1%})"


def main(rooms: list[str]) -> None:
    """Print the figures of all files below the rooms."""
    counts = Counts()
    for room in rooms:
        for path in sorted(Path(room).rglob("*.py")):
            counts.add_file(path)
    print("\n".join(counts.format_report()))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ROOMS))
