import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import EYRE, called, make_home


@pytest.mark.parametrize(("shell", "part"), [("bash", "complete -o"), ("fish", "complete --no")])
def test_the_script_for_a_shell(shell: str, part: str) -> None:
    result = called(None, "completion", shell)
    assert result.exit_code == 0
    assert part in result.stdout
    assert "_KEDIT_DAEMON_COMPLETE" in result.stdout


def test_the_script_for_zsh() -> None:
    assert called(None, "completion", "zsh").stdout.startswith("#compdef kedit-daemon\n")
    assert called(None, "completion", "tcsh").exit_code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_an_id(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    (tmp_path / "kedit-daemon").write_text(f'#!/bin/sh\nexec {_python()} -m kedit_daemon "$@"\n')
    (tmp_path / "kedit-daemon").chmod(0o755)
    script = (
        f"export PATH={tmp_path}:$PATH KEDIT_HOME={home.root}\n"
        "source <(kedit-daemon completion bash)\n"
        f"COMP_WORDS=(kedit-daemon show {EYRE.id[:3]}) COMP_CWORD=2\n"
        "_kedit_daemon_completion kedit-daemon\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{EYRE.id}\n"


def test_the_manual_page_is_source_off_a_terminal() -> None:
    result = called(None, "man")
    assert result.exit_code == 0
    assert result.stdout.startswith(".TH KEDIT-DAEMON 1 ")


def _python() -> str:
    import sys

    return sys.executable
