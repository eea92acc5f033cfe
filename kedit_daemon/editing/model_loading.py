"""Loading of the configured model, with its site, its statistics and its canary."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.model_location import find_model_folder
from kedit_daemon.home import MODELS_FOLDER
from kedit_daemon.shipped import read_ordinary_lines, read_statements
from memory.errors import UnusableModel
from memory.files import write_atomic
from memory.model.canary import Canary
from memory.model.device import resolve_device
from memory.model.editable import EditableModel
from memory.model.statistics import (
    PACK_FORMAT,
    LayerStatistics,
    collect_statistics,
    pack_statistics,
    unpack_statistics,
)
from policies.edit_site import SITE_FILE, EditSite, load_site, read_site, read_weights_hash

# Not *.safetensors, though it is: servers take every such file in a folder for weights.
STATISTICS_FILE = "statistics.kedit"
CANARY_LINES = 40
log = logging.getLogger(__name__)

WrapProgress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything about it that does not change while the daemon runs."""

    name: str
    model: EditableModel
    site: EditSite
    statistics: dict[int, LayerStatistics]
    canary: Canary
    base_hash: str

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose weights may change."""
        return self.site.layers


@dataclass(frozen=True)
class CanaryTexts:
    """Texts on which the health of the weights is measured."""

    lines: list[str]  # ordinary text
    statements: list[str]  # without their last word


def read_canary_lines() -> list[str]:
    """Read the shipped lines on which the health of the weights is measured."""
    return read_ordinary_lines()[:CANARY_LINES]


def read_canary_texts() -> CanaryTexts:
    """Read the shipped lines and statements."""
    return CanaryTexts(read_canary_lines(), read_statements())


@dataclass(frozen=True)
class OpenedModel:
    """A model that has been loaded, and the folders with its measurements."""

    model: EditableModel
    base_hash: str
    model_folder: Path
    cache_folder: Path  # for what is measured here; a home's `state`

    def resolve_site(self) -> EditSite:
        """Find the site, as `find_site` does."""
        kind, layers = str(self.model.hf_model.config.model_type), self.model.layer_count
        return find_site(self.model_folder, self.cache_folder, self.base_hash, layers, kind)

    def resolve_statistics(
        self, edited: Collection[int], read: Collection[int], progress: WrapProgress
    ) -> dict[int, LayerStatistics]:
        """Return the statistics of the layers to edit (with covariance) and of those only read:
        shipped with the model, else cached, else measured now and cached."""
        known = find_statistics(self.model_folder, self.cache_folder, self.base_hash, edited, read)
        if known.missing_path is None:
            return known.statistics
        layers = known.edited_layers, known.read_layers
        measured = collect_statistics(self.model, read_ordinary_lines(), *layers, progress)
        data = pack_statistics(measured)
        # The sha256 in its name shows a later start that the file is whole.
        digest = hashlib.sha256(data).hexdigest()
        path = known.missing_path.with_stem(f"{known.missing_path.stem}-{digest}")
        write_atomic(path, data)
        for damaged in {known.missing_path, *_list_cached(known.missing_path)} - {path}:
            damaged.unlink(missing_ok=True)
        return known.statistics | unpack_statistics(data)


def find_site(folder: Path, cache: Path, base_hash: str, layers: int, kind: str) -> EditSite:
    """Find the site measured in the home, else the model's own, else a start for its type.

    A file in the home that was measured on other weights is not for this model.
    """
    path = cache / SITE_FILE
    if path.is_file() and read_weights_hash(path) in (None, base_hash):
        return read_site(path, layers)
    return load_site(folder, layers, kind)


@dataclass(frozen=True)
class KnownStatistics:
    """Statistics that were measured before, and those still missing."""

    statistics: dict[int, LayerStatistics]
    missing_path: Path | None = None  # of the file for these layers, but for its sha256
    edited_layers: tuple[int, ...] = ()
    read_layers: tuple[int, ...] = ()


def find_statistics(
    folder: Path, cache: Path, base_hash: str, edited: Collection[int], read: Collection[int]
) -> KnownStatistics:
    """Find the statistics of a model's layers that are shipped with it or cached whole.

    Raises UnusableModel if those with the model cannot be read.
    """
    path = folder / STATISTICS_FILE
    try:
        shipped = unpack_statistics(path.read_bytes()) if path.is_file() else {}
    except SafetensorError as error:
        hint = "put the model's file back, or remove it: it is measured again"
        raise UnusableModel(f"{path} is damaged: {error}", hint=hint) from error
    wide = sorted(n for n in edited if n not in shipped or not len(shipped[n].covariance))
    narrow = sorted(n for n in set(read) if n not in shipped)
    if not wide and not narrow:
        return KnownStatistics(shipped)
    key = json.dumps([PACK_FORMAT, base_hash, wide, narrow]).encode()
    cached = cache / f"statistics-{hashlib.sha256(key).hexdigest()[:16]}.safetensors"
    for path in _list_cached(cached):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == path.stem.rpartition("-")[2]:
            return KnownStatistics(shipped | unpack_statistics(data))
        log.warning("%s is damaged: its sha256 differs. Measuring the model again.", path)
    if older := _load_unhashed(cached, {*wide, *narrow}):
        return KnownStatistics(shipped | older)
    return KnownStatistics(shipped, cached, tuple(wide), tuple(narrow))


def _load_unhashed(path: Path, layers: set[int]) -> dict[int, LayerStatistics]:
    """Load a file of an older version, which put no sha256 into its name, and rename it. Return
    nothing if it is missing or damaged."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    try:
        found = unpack_statistics(data)
    except (SafetensorError, KeyError, ValueError):
        found = {}
    if found.keys() != layers:
        log.warning("%s is damaged. Measuring the model again.", path)
        return {}
    with suppress(OSError):  # the home may be read-only, or another process quicker
        path.rename(path.with_stem(f"{path.stem}-{hashlib.sha256(data).hexdigest()}"))
    return found


def _list_cached(path: Path) -> list[Path]:
    """List the files that were made for this path, each with a sha256 in its name."""
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def open_model(
    name: str, device: str, cache: Path, gguf_cache: GgufCache | None = None
) -> OpenedModel:
    """Load the configured model, without what depends on its site.

    `gguf_cache`: of converted files; by default a folder in `cache`.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    converted = gguf_cache or GgufCache(cache / MODELS_FOLDER)
    folder = find_model_folder(name, converted)
    with converted.explain_damage(folder):
        model = EditableModel.load(folder or name, resolve_device(device))
    base_hash = model.weights_hash(range(model.layer_count))
    return OpenedModel(model, base_hash, folder or Path(name), cache)


def load_model(
    name: str,
    device: str,
    cache: Path,
    progress: WrapProgress,
    canary_texts: CanaryTexts | None = None,
    gguf_cache: GgufCache | None = None,
) -> LoadedModel:
    """Load the configured model with its site, its statistics and its canary.

    `cache`: folder that keeps what is measured on first use; a site that `calibrate` has left
    there comes first. `canary_texts`: the shipped ones by default. `gguf_cache`: as in
    `open_model`.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    opened = open_model(name, device, cache, gguf_cache)
    model, site = opened.model, opened.resolve_site()
    statistics = opened.resolve_statistics(site.layers, (site.key_layer, site.side_layer), progress)
    texts = canary_texts or read_canary_texts()
    canary = Canary(model, texts.lines, site.layers, texts.statements)
    return LoadedModel(name, model, site, statistics, canary, opened.base_hash)
