"""What the documents show is what happens, and what they point to is there."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from docs_tools import DOCUMENTS, ROOT, Block, Shell, agrees, blocks, prose, steps

from kedit_daemon.cli import COMMANDS, cli

README, TOUR, POLICIES = (ROOT / name for name in ("README.md", "docs/tour.md", "docs/policies.md"))
PLAYED = [path for path in DOCUMENTS if any(steps(path.read_text("utf-8")))]
LANGUAGES = ("console", "sh", "text", "json", "toml", "diff", "python")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Where README has been played: its daemon runs, for the documents that need one."""
    opened = Shell(tmp_path_factory.mktemp("docs") / "readme")
    try:
        yield opened
    finally:
        opened.close()


def play(shell: Shell, path: Path) -> None:
    for step in steps(path.read_text("utf-8")):
        where = f"{path.name}, line {step.line}: $ {step.command}"
        code, seen = shell.play(step)
        if code != step.code:
            pytest.fail(f"{where}\nexits with {code}:\n{seen}", pytrace=False)
        if step.shown and not agrees(step.shown, seen):
            shown = "\n".join(step.shown)
            pytest.fail(f"{where}\nshows:\n{shown}\nand prints:\n{seen}", pytrace=False)


@pytest.mark.parametrize(
    "path",
    sorted((p for p in PLAYED if p != TOUR), key=lambda path: path != README),
    ids=lambda path: path.name,
)
def test_what_a_document_shows_happens(shell: Shell, path: Path) -> None:
    play(shell, path)


def test_what_the_tour_shows_happens(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "tour")
    try:
        play(shell, TOUR)
    finally:
        shell.close()
