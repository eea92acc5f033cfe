import click
import pytest
from command_line import called

from kedit_daemon.cli.usage import explained


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["stauts"], "there is no command stauts", "did you mean status? see kedit-daemon --help"),
        (["xyzzy"], "there is no command xyzzy", "see kedit-daemon --help"),
        (
            ["log", "verfy"],
            "there is no command verfy",
            "did you mean verify? see kedit-daemon log --help",
        ),
        (
            ["log", "--sinse", "2h"],
            "there is no option --sinse",
            "did you mean --since? see kedit-daemon log --help",
        ),
        (
            ["--hom", "x"],
            "there is no option --hom",
            "did you mean --home? see kedit-daemon --help",
        ),
        (["show"], "missing argument 'ID'.", "see kedit-daemon show --help"),
    ],
)
def test_what_is_mistyped_is_told_in_two_lines(words: list[str], error: str, hint: str) -> None:
    result = called(None, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error[usage]: {error}\nhint: {hint}\n"


def test_an_error_without_a_command() -> None:
    assert explained(click.UsageError("No.")) == ("no.", "see kedit-daemon --help")
