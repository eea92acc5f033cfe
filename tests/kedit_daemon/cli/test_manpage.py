import re
import shutil
import subprocess

import click
import pytest
from command_line import called

from kedit_daemon.cli.main import cli
from kedit_daemon.cli.manpage import render_page


@pytest.fixture(scope="module")
def source() -> str:
    return render_page(click.Context(cli, info_name="kedit-daemon", **cli.context_settings))


def test_every_command_and_option_is_on_the_page(source: str) -> None:
    for name in ("init", "submit", "log", "log verify", "log export", "completion", "man"):
        assert f"\n.SS {name} " in source
    for option in ("since", "watch", "dry\\-run", "home"):
        assert f"\\-\\-{option}" in source
    assert source.count("Show this message and exit.") == 1
    assert called(None, "man").stdout == source


def test_examples_keep_their_lines(source: str) -> None:
    assert "\n.nf\nExample:\n  kedit\\-daemon log \\-\\-since 2h\n" in source
    assert source.count("\n.nf\n") == source.count("\n.fi\n") > 10
    assert "\b" not in source


def test_no_text_is_taken_for_a_request() -> None:
    @click.command(help=".SH evil\n\n'br \\fB\n\n\b\n.so /etc/passwd")
    def evil() -> None: ...

    source = render_page(click.Context(evil, info_name="evil"))
    assert not re.search(r"^(\.SH evil|'br|\.so)", source, re.MULTILINE)
    assert "\\&'br \\efB" in source


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_complain_about(source: str) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8"], input=source.encode(), capture_output=True, check=True
    )
    assert done.stderr == b""
    shown = done.stdout.decode()
    assert "EXIT STATUS" in re.sub(r"\x1b\[\d*m|.\x08", "", shown)
