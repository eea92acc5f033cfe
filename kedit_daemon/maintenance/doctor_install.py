"""Checks of the installation: Python, its packages, the GPU and the systemd unit."""

import re
import sqlite3
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from kedit_daemon.home import PROGRAM_NAME, Home

OK, WARNING, FAILED = "ok", "warning", "failed"
REQUIRED_PACKAGES = (
    *("torch", "transformers", "safetensors", "accelerate", "gguf", "sqlite-utils"),
    *("apscheduler", "pydantic", "click", "httpx"),
)
MIN_SQLITE = (3, 37, 0)  # the first with STRICT tables
REINSTALL = "install kedit-daemon again, in a fresh virtual environment"
UNIT_NAME = f"{PROGRAM_NAME}.service"
UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
MIN_DRIVER = 580  # the first that runs CUDA 13
# Extra -> the modules that it installs.
EXTRA_MODULES = {
    "bench": ("matplotlib",),
    "export": ("peft",),
    "review": ("datasette",),
    "serve": ("starlette", "uvicorn", "jinja2", "prometheus_client"),
}


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, with its detail and the remedy."""

    name: str
    outcome: str
    detail: str
    remedy: str = ""


def check_python() -> Iterator[CheckResult]:
    """Check the version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield CheckResult("python", OK if good else FAILED, version, "" if good else "use Python 3.11+")


def check_packages() -> Iterator[CheckResult]:
    """Check that the required packages are installed."""
    found, missing = [], []
    for package in REQUIRED_PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield CheckResult("packages", FAILED, f"not installed: {', '.join(missing)}", REINSTALL)
    else:
        yield CheckResult("packages", OK, ", ".join(found))


def check_faiss() -> Iterator[CheckResult]:
    """Check that exactly one distribution of FAISS is installed."""
    names = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    found = sorted(f"{n} {v}" for n, v in names.items() if n.startswith(("faiss-", "faiss_")))
    if len(found) > 1:
        # They own one folder: the last one installed wins, and removing either breaks both.
        remedy = "pip uninstall -y all of them, then install kedit-daemon again"
        yield CheckResult("faiss", FAILED, f"more than one: {', '.join(found)}", remedy)
    elif not found:
        yield CheckResult("faiss", FAILED, "not installed", REINSTALL)
    else:
        yield CheckResult("faiss", OK, found[0])


def check_sqlite() -> Iterator[CheckResult]:
    """Check the version of SQLite."""
    good = sqlite3.sqlite_version_info >= MIN_SQLITE
    remedy = "" if good else f"use a Python with SQLite {'.'.join(map(str, MIN_SQLITE))} or later"
    yield CheckResult("sqlite", OK if good else FAILED, sqlite3.sqlite_version, remedy)


def check_extras(home: Home, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Check that the extras that the settings ask for are installed."""
    missing = find_missing_extras()
    for extra in find_wanted_extras(home, environ):
        if extra in missing:
            detail = f"[{extra}] in config.toml needs {', '.join(missing[extra])}"
            yield CheckResult("extras", FAILED, detail, suggest_install(extra))
            return
    installed = ", ".join(name for name in EXTRA_MODULES if name not in missing) or "none"
    others = f"; not installed: {', '.join(missing)}" if missing else ""
    yield CheckResult("extras", OK, installed + others)


def check_unit() -> Iterator[CheckResult]:
    """Check that the systemd unit is installed, if there is systemd."""
    if not Path("/run/systemd/system").is_dir():
        yield CheckResult("unit", OK, "no systemd here")
        return
    found = [f for f in UNIT_FOLDERS if Path(f, UNIT_NAME).is_file()]
    if found:
        yield CheckResult("unit", OK, f"{found[0]}/{UNIT_NAME}")
    else:
        remedy = "to start it with the machine, install the files in systemd/"
        yield CheckResult("unit", WARNING, f"{UNIT_NAME} is not installed", remedy)


def check_torch(device: str) -> Iterator[CheckResult]:
    """Check torch, CUDA and the driver against the device that the settings name."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield CheckResult("torch", FAILED, f"cannot be imported: {error}", REINSTALL)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda, found = torch.version.cuda, read_driver_version()
    parts = (f"CUDA {cuda or 'none'}", f"driver {found or 'none'}", f"{gpus} GPUs")
    detail = f"{torch.__version__}, {', '.join(parts)}, device {device}"
    number = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and number >= gpus:
        remedy = 'install the GPU\'s driver, or set device = "auto" in config.toml'
        yield CheckResult("torch", FAILED, detail, remedy)
    elif remedy := suggest_gpu_remedy(device, gpus, cuda, found):
        yield CheckResult("torch", WARNING, detail, remedy)
    else:
        yield CheckResult("torch", OK, detail)


def read_driver_version(path: Path = DRIVER_FILE) -> str | None:
    """Read the version of Nvidia's driver; None without a driver."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d[\d.]*)", text)
    return found[1] if found else "of no known version"


def suggest_gpu_remedy(device: str, gpus: int, cuda: str | None, found: str | None) -> str:
    """Suggest a remedy for a GPU that torch cannot use; empty if all is well or there is none."""
    if gpus or found is None or device == "cpu":
        return ""
    if cuda is None:
        return "this torch is built for the CPU alone: install torch from PyPI"
    return f"the driver does not run CUDA {cuda}: install driver {MIN_DRIVER} or later"


def find_missing_extras() -> dict[str, list[str]]:
    """Find the modules that are not installed, by extra."""
    missing = {
        name: [m for m in modules if find_spec(m) is None]
        for name, modules in EXTRA_MODULES.items()
    }
    return {name: modules for name, modules in missing.items() if modules}


def find_wanted_extras(home: Home, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the extras that the settings ask for; another check explains a broken file."""
    try:
        serve = tomllib.loads(home.config_file.read_text("utf-8-sig")).get("serve")
    except (OSError, ValueError):
        serve = None
    port = serve.get("port", 0) if isinstance(serve, dict) else 0
    if str(environ.get("KEDIT_SERVE_PORT", port)) != "0":
        yield "serve"


def suggest_install(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install '{PROGRAM_NAME}[{extra}]'"
