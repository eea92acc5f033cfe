"""Checks of the installation: Python, its packages, the GPU, and how the machine starts us."""

import re
import sqlite3
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from kedit_daemon.home import NAME, Home

OK, WARNING, FAILED = "ok", "warning", "failed"
PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "sqlite-utils",
    "apscheduler",
    "pydantic",
    "click",
)
LEAST_SQLITE = (3, 37, 0)  # the first with STRICT tables
REINSTALL = "install kedit-daemon again, in a fresh virtual environment"
UNIT = f"{NAME}.service"
UNIT_FOLDERS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
DRIVER = Path("/proc/driver/nvidia/version")
LEAST_DRIVER = 580  # the first that runs CUDA 13
# Extra -> the modules that it brings.
EXTRAS = {
    "bench": ("matplotlib",),
    "export": ("peft",),
    "review": ("datasette",),
    "serve": ("starlette", "uvicorn", "jinja2", "prometheus_client"),
}


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    outcome: str
    detail: str
    remedy: str = ""


def python() -> Iterator[Check]:
    """Its version."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check("python", OK if good else FAILED, version, "" if good else "use Python 3.11+")


def packages() -> Iterator[Check]:
    """Those that we cannot do without."""
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Check("packages", FAILED, f"not installed: {', '.join(missing)}", REINSTALL)
    else:
        yield Check("packages", OK, ", ".join(found))


def faiss() -> Iterator[Check]:
    """Exactly one of its distributions."""
    names = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    found = sorted(f"{n} {v}" for n, v in names.items() if n.startswith(("faiss-", "faiss_")))
    if len(found) > 1:
        # They own one folder: the last one installed wins, and removing either breaks both.
        remedy = "pip uninstall -y all of them, then install kedit-daemon again"
        yield Check("faiss", FAILED, f"more than one: {', '.join(found)}", remedy)
    elif not found:
        yield Check("faiss", FAILED, "not installed", REINSTALL)
    else:
        yield Check("faiss", OK, found[0])


def sqlite() -> Iterator[Check]:
    """Its version."""
    good = sqlite3.sqlite_version_info >= LEAST_SQLITE
    remedy = "" if good else f"use a Python with SQLite {'.'.join(map(str, LEAST_SQLITE))} or later"
    yield Check("sqlite", OK if good else FAILED, sqlite3.sqlite_version, remedy)


def extras(home: Home, environ: Mapping[str, str]) -> Iterator[Check]:
    """What is optional, against what the settings ask for."""
    missing = missing_extras()
    for extra in wanted_extras(home, environ):
        if extra in missing:
            detail = f"[{extra}] in config.toml needs {', '.join(missing[extra])}"
            yield Check("extras", FAILED, detail, remedy_of(extra))
            return
    there = ", ".join(name for name in EXTRAS if name not in missing) or "none"
    lacking = f"; not installed: {', '.join(missing)}" if missing else ""
    yield Check("extras", OK, there + lacking)


def unit() -> Iterator[Check]:
    """The systemd unit, where there is systemd."""
    if not Path("/run/systemd/system").is_dir():
        yield Check("unit", OK, "no systemd here")
        return
    found = [f for f in UNIT_FOLDERS if Path(f, UNIT).is_file()]
    if found:
        yield Check("unit", OK, f"{found[0]}/{UNIT}")
    else:
        remedy = "to start it with the machine, install the files in systemd/"
        yield Check("unit", WARNING, f"{UNIT} is not installed", remedy)


def torch_and_gpu(device: str) -> Iterator[Check]:
    """Torch, CUDA and the driver, against the device that the settings name."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", FAILED, f"cannot be imported: {error}", REINSTALL)
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda, found = torch.version.cuda, driver()
    parts = (f"CUDA {cuda or 'none'}", f"driver {found or 'none'}", f"{gpus} GPUs")
    detail = f"{torch.__version__}, {', '.join(parts)}, device {device}"
    number = int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and number >= gpus:
        remedy = 'install the GPU\'s driver, or set device = "auto" in config.toml'
        yield Check("torch", FAILED, detail, remedy)
    elif remedy := gpu_remedy(device, gpus, cuda, found):
        yield Check("torch", WARNING, detail, remedy)
    else:
        yield Check("torch", OK, detail)


def driver(path: Path = DRIVER) -> str | None:
    """The version of Nvidia's driver; None where there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d[\d.]*)", text)
    return found[1] if found else "of no known version"


def gpu_remedy(device: str, gpus: int, cuda: str | None, found: str | None) -> str:
    """What to do about a GPU that torch does not reach; empty where all is well, or none is."""
    if gpus or found is None or device == "cpu":
        return ""
    if cuda is None:
        return "this torch knows no GPU: install torch from PyPI, not a build for the CPU"
    return f"the driver runs no CUDA {cuda}: install driver {LEAST_DRIVER} or later"


def missing_extras() -> dict[str, list[str]]:
    """Extra -> those of its modules that are not installed, for extras that lack some."""
    lacking = {
        name: [m for m in modules if find_spec(m) is None] for name, modules in EXTRAS.items()
    }
    return {name: modules for name, modules in lacking.items() if modules}


def wanted_extras(home: Home, environ: Mapping[str, str]) -> Iterator[str]:
    """The extras that the settings ask for; a broken file is for another check to explain."""
    try:
        serve = tomllib.loads(home.config.read_text("utf-8-sig")).get("serve")
    except (OSError, ValueError):
        serve = None
    port = serve.get("port", 0) if isinstance(serve, dict) else 0
    if str(environ.get("KEDIT_SERVE_PORT", port)) != "0":
        yield "serve"


def remedy_of(extra: str) -> str:
    """How to install an extra."""
    return f"pip install '{NAME}[{extra}]'"
