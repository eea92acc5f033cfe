import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from kedit_daemon.home import Home
from kedit_daemon.maintenance import doctor_install as install
from kedit_daemon.maintenance.doctor_install import (
    CheckResult,
    read_driver_version,
    suggest_gpu_remedy,
)


def only(checks: Iterator[CheckResult]) -> CheckResult:
    (check,) = checks
    assert bool(check.remedy) == (check.outcome != "ok"), check
    return check


def installed(folder: Path, *names: str) -> None:
    for name in names:
        info = folder / f"{name.replace('-', '_')}-1.15.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.15.1\n")


@pytest.mark.parametrize(
    ("names", "outcome"),
    [(("faiss-gpu",), "ok"), (("faiss-cpu", "faiss-gpu"), "failed"), ((), "failed")],
)
def test_exactly_one_faiss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], outcome: str
) -> None:
    installed(tmp_path, *names)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert only(install.check_faiss()).outcome == outcome


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(install.check_packages()).outcome == "ok"
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    check = only(install.check_packages())
    assert (check.outcome, "torch" in check.detail) == ("failed", True)


def test_what_python_and_sqlite_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(install.check_python()).outcome == only(install.check_sqlite()).outcome == "ok"
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 36, 0))
    assert only(install.check_sqlite()).outcome == "failed"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "535.129.03"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
            "580.65.06",
        ),
        ("something else", "of no known version"),
    ],
)
def test_the_driver(tmp_path: Path, text: str, version: str) -> None:
    path = tmp_path / "version"
    assert read_driver_version(path) is None
    path.write_text(text)
    assert read_driver_version(path) == version


def test_a_gpu_that_torch_does_not_reach() -> None:
    assert "driver 580 or later" in suggest_gpu_remedy("auto", 0, "13.0", "535.129.03")
    assert "built for the CPU" in suggest_gpu_remedy("auto", 0, None, "580.65.06")
    assert suggest_gpu_remedy("auto", 1, "13.0", "580.65.06") == ""
    assert suggest_gpu_remedy("cpu", 0, None, "580.65.06") == ""
    assert suggest_gpu_remedy("auto", 0, None, None) == ""
    detail = only(install.check_torch("cpu")).detail
    assert {"CUDA", "driver", "GPUs"} <= set(detail.replace(",", "").split())


def test_extras_that_the_settings_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    assert "serve" in only(install.check_extras(home, {})).detail
    monkeypatch.setitem(install.EXTRA_MODULES, "serve", ("starlette", "not_there_at_all"))
    for text in ("", "broken = ", "serve = 1\n", "[serve]\nport = 0\n"):
        home.config_file.write_text(text)
        check = only(install.check_extras(home, {}))
        assert (check.outcome, "not installed: serve" in check.detail) == ("ok", True)
    assert only(install.check_extras(home, {"KEDIT_SERVE_PORT": "8000"})).outcome == "failed"
    home.config_file.write_text("[serve]\nport = 8000\n")
    check = only(install.check_extras(home, {}))
    assert check == CheckResult(
        "extras",
        "failed",
        "[serve] in config.toml needs not_there_at_all",
        "pip install 'kedit-daemon[serve]'",
    )


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) - {"dev"} == set(install.EXTRA_MODULES)
