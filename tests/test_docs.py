"""The documents: their commands run as shown, and what they refer to exists."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from docs_tools import DOCUMENTS, ROOT, Shell, Step, agrees, blocks, prose, steps

from kedit_daemon.cli.main import COMMAND_PATHS, cli

README, TOUR, POLICIES = (ROOT / name for name in ("README.md", "docs/tour.md", "docs/policies.md"))
AFTER = [p for p in DOCUMENTS if p not in (README, TOUR) and any(steps(p.read_text("utf-8")))]
FOLDERS = ("kedit_daemon", "policies", "memory", "tests", "tools", "systemd", "docs", "benchmarks")
LANGUAGES = ("console", "sh", "text", "json", "toml", "ini", "yaml", "diff", "python")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def check(path: Path, step: Step, code: int, seen: str) -> None:
    where = f"{path.name}, line {step.line}: $ {step.command}"
    if code != step.code:
        pytest.fail(f"{where}\nexits with {code}:\n{seen}", pytrace=False)
    if step.shown and not agrees(step.shown, seen):
        shown = "\n".join(step.shown)
        pytest.fail(f"{where}\nshows:\n{shown}\nand prints:\n{seen}", pytrace=False)


def test_documents_run_as_shown(tmp_path: Path) -> None:
    """Play the tour, and on with its daemon the other documents. The README's commands are part of
    the tour, in the same order."""
    shell = Shell(tmp_path / "tour")
    played: list[tuple[str, int, str]] = []
    try:
        for step in steps(TOUR.read_text("utf-8")):
            code, seen = shell.play(step)
            check(TOUR, step, code, seen)
            played.append((step.command, code, seen))
        happened = iter(played)
        for step in steps(README.read_text("utf-8")):
            found = next((one for one in happened if one[0] == step.command), None)
            assert found is not None, f"not on the tour: {step.command}"
            check(README, step, *found[1:])
        for path in AFTER:
            for step in steps(path.read_text("utf-8")):
                check(path, step, *shell.play(step))
    finally:
        shell.close()


def test_the_worked_example_fails_before_the_change_and_passes_after(tmp_path: Path) -> None:
    shown = {block.language: block.text for block in blocks(POLICIES.read_text("utf-8"))}
    for package in ("memory", "policies"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "test_example.py").write_text(shown["python"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_example.py"]
    before = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 failed, 1 passed" in before.stdout, before.stdout
    apply = ["git", "apply", "--unidiff-zero", "-"]
    subprocess.run(apply, cwd=tmp_path, input=shown["diff"], text=True, check=True)
    after = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in after.stdout, after.stdout


@each_document
def test_every_block_has_a_known_language(path: Path) -> None:
    text = path.read_text("utf-8")
    strange = [b.line for b in blocks(text) if b.language not in LANGUAGES]
    assert not strange, f"blocks of no known language begin in lines {strange}"
    assert "```" not in prose(text)


@each_document
def test_every_link_has_a_target(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text("utf-8"))):
        if re.match(r"https?://", target):
            continue
        name, _, heading = target.partition("#")
        where = (path.parent / name).resolve() if name else path
        if not where.is_file() or (heading and heading not in headings(where)):
            lost.append(target)
    assert not lost


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings, in GitHub's spelling."""
    titles = re.findall(r"^#+ (.+)$", prose(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_every_command_shown_parses(path: Path) -> None:
    wrong = []
    for line, words in commands(path.read_text("utf-8")):
        try:
            parse(words)
        except click.UsageError as error:
            wrong.append(f"line {line}: kedit-daemon {shlex.join(words)}: {error.format_message()}")
    assert not wrong, "\n".join(wrong)


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, words) of each call of kedit-daemon in the text and in blocks that are not run,
    without "…" and "[--options]"."""
    lines: list[tuple[int, str]] = []
    for block in blocks(text):
        if block.language in ("sh", "text"):
            lines += enumerate(block.text.splitlines(), block.line + 1)
    for found in re.finditer(r"`([^`\n]*kedit-daemon [^`\n]*)`", prose(text)):
        lines.append((0, found[1]))
    for number, line in lines:
        for call in re.findall(r"(?:^|[/\s])kedit-daemon\s+([^|;&)]*)", line.partition(" #")[0]):
            words = [w for w in shlex.split(call) if w != "…" and not w.startswith("[")]
            if line.strip().startswith(("cp ", "systemctl ", "ExecStart", "apt")) or not words:
                continue
            yield number, words


def parse(words: list[str]) -> None:
    """Parse the words as the command line would, without running anything or looking for files."""
    command: click.Command = cli
    ctx = click.Context(cli, info_name="kedit-daemon", **cli.context_settings)
    rest = words
    while True:
        given, rest, _ = command.make_parser(ctx).parse_args(args=list(rest))
        for parameter in command.params:
            value = given.get(parameter.name or "")
            stands_for_more = isinstance(value, str) and value.isupper()  # as in --generation N
            if isinstance(parameter.type, click.Path) or stands_for_more:
                continue
            if isinstance(value, str):
                parameter.type_cast_value(ctx, value)
            elif parameter.required and not (isinstance(value, tuple) and value):
                raise click.MissingParameter(ctx=ctx, param=parameter)
        if not isinstance(command, click.Group) or not rest:
            break
        _, found, rest = command.resolve_command(ctx, list(rest))
        assert found is not None
        command, ctx = found, click.Context(found, parent=ctx, info_name=found.name)
    if rest:
        raise click.UsageError(f"{rest[0]!r} is too much", ctx)


@each_document
def test_every_file_named_exists(path: Path) -> None:
    named = re.findall(rf"[`(/]((?:{'|'.join(FOLDERS)})/[\w./-]+)", prose(path.read_text("utf-8")))
    assert not [name for name in named if not (ROOT / name.rstrip(".")).exists()]


@each_document
def test_every_make_target_exists(path: Path) -> None:
    targets = re.findall(r"^([\w.-]+)(?= *:)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([\w.-]+)", path.read_text("utf-8"), re.MULTILINE)) <= {
        *targets,
        ".venv",
    }


def test_every_policy_named_exists() -> None:
    rows = re.findall(r"^\| [^|]+\? \| ([^|]+) \|", POLICIES.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for module, name in re.findall(r"`(\w+)\.(\w+)`", " ".join(rows)):
        assert hasattr(importlib.import_module(f"policies.{module}"), name)


def test_the_map_of_the_code_names_every_package() -> None:
    text = (ROOT / "docs/concepts.md").read_text("utf-8")
    packages = [
        file.parent.relative_to(ROOT)
        for top in ("kedit_daemon", "policies", "memory")
        for file in [ROOT / top / "__init__.py", *(ROOT / top).glob("*/__init__.py")]
    ]
    assert not [str(package) for package in packages if f"| `{package}/` |" not in text]


@pytest.mark.parametrize("words", [["revertt"], ["status", "--wach"], ["show"], ["facts", "x"]])
def test_wrong_commands_are_found(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse(words)


def test_the_readme_names_every_command() -> None:
    table = re.findall(r"^\| (`.+?) \| ", README.read_text("utf-8"), re.MULTILINE)
    named = {word for cell in table for word in re.findall(r"`(\w+)", cell)}
    assert not COMMAND_PATHS.keys() - named


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        (["a 1.25 b"], "a  3 b\n"),
        (["#… kept"], "#12  kept\n"),
        (["a", "…", "z"], "a\nb\nc\nz\n"),
        (["a", "…"], "a\n"),
        (["at 21:10"], "at 03:59\n"),
        (["5e" * 32], "0a" * 32 + "\n"),
    ],
)
def test_volatile_output_agrees(shown: list[str], seen: str) -> None:
    assert agrees(shown, seen)


@pytest.mark.parametrize(
    ("shown", "seen"),
    [
        (["a"], "a\nb\n"),
        (["2 facts"], "3 facts\n"),
        (["ecc93eae2aa6"], "ecc93eae2aa7\n"),
        (["a", "…", "z"], "a\nz\ny\n"),
        (["is 1.5 long"], "is … long\n"),
        (["…: yes"], "agreed: no\n"),
    ],
)
def test_other_output_differs(shown: list[str], seen: str) -> None:
    assert not agrees(shown, seen)
