"""The systemd units: consistent with the code, the documents and one another; low exposure."""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from paths import ROOT

from memory.errors import EXIT_BAD_CONFIG

UNITS = ROOT / "systemd"
SERVICE = UNITS / "kedit-daemon.service"
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def settings(path: Path) -> dict[str, list[str]]:
    """Return the values of each key, in order; a key can occur several times."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)


def test_bad_configuration_is_not_restarted() -> None:
    assert settings(SERVICE)["RestartPreventExitStatus"] == [str(EXIT_BAD_CONFIG)]


def test_home_state_folder_and_inbox_agree() -> None:
    service = settings(SERVICE)
    home = f"/var/lib/{service['StateDirectory'][0]}"
    program, *arguments = service["ExecStart"][0].split()
    assert Path(program).name == "kedit-daemon"
    assert arguments == ["--home", home, "run"]
    folders = [line.split() for line in (UNITS / "tmpfiles.conf").read_text().splitlines()[1:]]
    assert folders == [
        ["d", home, service["StateDirectoryMode"][0], "kedit", "kedit", "-"],
        ["d", f"{home}/inbox", "2770", "kedit", "kedit", "-"],
    ]
    user = (UNITS / "sysusers.conf").read_text().splitlines()[1]
    assert re.fullmatch(rf'u kedit - ".+" {home}', user)


def test_the_example_of_an_export_folder_is_that_of_the_docs() -> None:
    (line,) = re.findall("(?m)^#(ReadWritePaths=.*)$", SERVICE.read_text())
    folder = line.partition("=")[2]
    assert "ReadWritePaths" not in settings(SERVICE)
    docs = (UNITS.parent / "docs/operating.md").read_text()
    assert line in docs
    assert f"install -d -o kedit -g kedit -m 2750 {folder}\n" in docs
    assert f'folder = "{folder}"' in docs


@needs_analyze
@pytest.mark.parametrize("gpu", [False, True])
def test_exposure_stays_low(tmp_path: Path, gpu: bool) -> None:
    shutil.copy(SERVICE, tmp_path)
    if gpu:
        shutil.copytree(UNITS / "kedit-daemon.service.d", tmp_path / "kedit-daemon.service.d")
    unit = str(tmp_path / SERVICE.name)
    done = analyze("security", "--offline=true", "--threshold=20", "--no-pager", unit)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_analyze
def test_systemd_knows_every_setting(tmp_path: Path) -> None:
    shutil.copytree(UNITS / "kedit-daemon.service.d", tmp_path / "kedit-daemon.service.d")
    unit = tmp_path / SERVICE.name
    # The program is not installed on test machines.
    unit.write_text(re.sub("(?m)^ExecStart=.*", "ExecStart=/bin/true", SERVICE.read_text()))
    done = analyze("verify", "--man=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")
