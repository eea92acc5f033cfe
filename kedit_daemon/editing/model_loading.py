"""Loading of the configured model, with its site, its statistics and its canary."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from kedit_daemon import shipped
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
from memory.model.strict_loading import check_model_folder
from policies.edit_site import SITE_FILE, EditSite, load_site, read_site, read_weights_hash

SHIPPED_MODEL = "shipped"
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


def locate_model(name: str) -> Path:
    """Return the path of a configured model; a hub id stays as it is."""
    return shipped.MODEL if name == SHIPPED_MODEL else Path(name)


def find_model_folder(name: str) -> Path | None:
    """Find the folder of a configured model; None where the name is an id on the hub.

    Raises UnusableModel when it names a folder that is not there.
    """
    path = locate_model(name)
    if path.is_dir():
        return path
    if name == SHIPPED_MODEL:
        raise UnusableModel(f"{path} is missing", hint="install again")
    if name.startswith(("/", ".", "~")):
        hint = "set `model` to a folder with a model, or to an id on the hub"
        raise UnusableModel(f"there is no folder {name}", hint=hint)
    return None


def check_model(name: str) -> Path | None:
    """Check that the configured model is whole and can be edited, and return its folder; None for
    an id on the hub, which is looked up when the daemon starts.

    Raises UnusableModel.
    """
    folder = find_model_folder(name)
    if folder is not None:
        check_model_folder(folder)
    return folder


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
        _write_cached(known.missing_path, data)
        return known.statistics | unpack_statistics(data)

    def keep_statistics(
        self,
        statistics: Mapping[int, LayerStatistics],
        edited: Collection[int],
        read: Collection[int],
    ) -> None:
        """Write statistics that were measured elsewhere to where `resolve_statistics` finds them
        for these layers, unless it does already."""
        known = find_statistics(self.model_folder, self.cache_folder, self.base_hash, edited, read)
        if known.missing_path is None:
            return
        bare = {n: replace(statistics[n], covariance=torch.empty(0, 0)) for n in known.read_layers}
        wide = {n: statistics[n] for n in known.edited_layers}
        _write_cached(known.missing_path, pack_statistics(bare | wide))


def _write_cached(path: Path, data: bytes) -> None:
    """Write statistics beside `path`, and remove what was there for the same layers."""
    # The sha256 in its name shows a later start that the file is whole.
    whole = path.with_stem(f"{path.stem}-{hashlib.sha256(data).hexdigest()}")
    write_atomic(whole, data)
    for damaged in {path, *_list_cached(path)} - {whole}:
        damaged.unlink(missing_ok=True)


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


def open_model(name: str, device: str, cache: Path) -> OpenedModel:
    """Load the configured model, without what depends on its site.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    folder = find_model_folder(name)
    model = EditableModel.load(folder or name, resolve_device(device))
    base_hash = model.weights_hash(range(model.layer_count))
    return OpenedModel(model, base_hash, folder or Path(name), cache)


def load_model(
    name: str,
    device: str,
    cache: Path,
    progress: WrapProgress,
    canary_texts: CanaryTexts | None = None,
) -> LoadedModel:
    """Load the configured model with its site, its statistics and its canary.

    `cache`: folder that keeps what is measured on first use; a site that `calibrate` has left
    there comes first. `canary_texts`: the shipped ones by default.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    opened = open_model(name, device, cache)
    model, site = opened.model, opened.resolve_site()
    statistics = opened.resolve_statistics(site.layers, (site.key_layer, site.side_layer), progress)
    texts = canary_texts or read_canary_texts()
    canary = Canary(model, texts.lines, site.layers, texts.statements)
    return LoadedModel(name, model, site, statistics, canary, opened.base_hash)
