"""From a name in the configuration to a model with its site, statistics and canary."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
from policies.edit_site import SITE_FILE, EditSite, load_site, read_site, read_weights_hash

SHIPPED_MODEL = "shipped"
# Not *.safetensors, though it is: servers take every such file in a folder for weights.
STATISTICS_FILE = "statistics.kedit"
CANARY_LINES = 40
log = logging.getLogger(__name__)

WrapProgress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class LoadedModel:
    """Everything about a model that does not change while the daemon runs."""

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
    """Where a configured model lies; a hub id stays what it is."""
    return shipped.MODEL if name == SHIPPED_MODEL else Path(name)


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
    """A model that has been loaded, and where what was measured of it lies."""

    model: EditableModel
    base_hash: str
    model_folder: Path  # the model's own
    cache_folder: Path  # for what is measured here; a home's `state`

    @property
    def site_path(self) -> Path:
        """Where `calibrate` keeps the site that it measured."""
        return self.cache_folder / SITE_FILE

    def resolve_site(self) -> EditSite:
        """The site measured in the home, else the one with the model, else a start for its type."""
        kind = str(self.model.hf_model.config.model_type)
        return find_site(
            self.model_folder, self.cache_folder, self.base_hash, self.model.layer_count, kind
        )

    def resolve_statistics(
        self, edited: Collection[int], read: Collection[int], progress: WrapProgress
    ) -> dict[int, LayerStatistics]:
        """Of the layers to edit (with covariance) and those only read: shipped with the model,
        else cached, else measured now and cached."""
        kept = find_statistics(self.model_folder, self.cache_folder, self.base_hash, edited, read)
        if kept.missing_path is not None:
            texts = read_ordinary_lines()
            found = collect_statistics(
                self.model, texts, kept.edited_layers, kept.read_layers, progress
            )
            data = pack_statistics(found)
            # Named by what is in it, too: by that a later start sees that it is whole.
            name = f"{kept.missing_path.stem}-{hashlib.sha256(data).hexdigest()}"
            write_atomic(kept.missing_path.with_stem(name), data)
            for path in {kept.missing_path, *_list_cached(kept.missing_path)} - {
                kept.missing_path.with_stem(name)
            }:
                path.unlink(missing_ok=True)  # it was damaged
            return kept.statistics | unpack_statistics(data)
        return kept.statistics


def find_site(folder: Path, cache: Path, base_hash: str, layers: int, kind: str) -> EditSite:
    """The site measured in the home, else the one with the model, else a start for its type.

    A file in the home that was measured on other weights is not for this model.
    """
    path = cache / SITE_FILE
    if path.is_file() and read_weights_hash(path) in (None, base_hash):
        return read_site(path, layers)
    return load_site(folder, layers, kind)


@dataclass(frozen=True)
class KnownStatistics:
    """Statistics that were measured before, and what is to be measured still."""

    statistics: dict[int, LayerStatistics]
    missing_path: Path | None = None  # where the rest belongs, but for its sha256, of these layers
    edited_layers: tuple[int, ...] = ()
    read_layers: tuple[int, ...] = ()


def find_statistics(
    folder: Path, cache: Path, base_hash: str, edited: Collection[int], read: Collection[int]
) -> KnownStatistics:
    """The statistics of a model's layers as far as they are shipped with it or cached whole.

    Raises KeditError with exit code 78 when those with the model cannot be read.
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
        log.warning("%s is damaged: its sha256 differs; the model is measured again", path)
    if older := _load_unhashed(cached, {*wide, *narrow}):
        return KnownStatistics(shipped | older)
    return KnownStatistics(shipped, cached, tuple(wide), tuple(narrow))


def _load_unhashed(path: Path, layers: set[int]) -> dict[int, LayerStatistics]:
    """What an older version has measured, which put no sha256 into a file's name: it gets one.
    Nothing where there is no such file, or a damaged one."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    try:
        found = unpack_statistics(data)
    except (SafetensorError, KeyError, ValueError):
        found = {}
    if found.keys() != layers:
        log.warning("%s is damaged; the model is measured again", path)
        return {}
    with suppress(OSError):  # a home may be read only, and somebody else may have been quicker
        path.rename(path.with_stem(f"{path.stem}-{hashlib.sha256(data).hexdigest()}"))
    return found


def _list_cached(path: Path) -> list[Path]:
    """The files that were made for this path, each with a sha256 in its name."""
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def open_model(name: str, device: str, cache: Path) -> OpenedModel:
    """Load the configured model, without what depends on where it is edited.

    Raises KeditError with exit code 78 when there is no such model, or none that can be edited.
    """
    path = locate_model(name)
    if name == SHIPPED_MODEL and not path.is_dir():
        raise UnusableModel(f"{path} is missing", hint="install again")
    # An id on the hub is no path, and its name alone may not be looked up as one.
    model = EditableModel.load(path if path.is_dir() else name, resolve_device(device))
    return OpenedModel(model, model.weights_hash(range(model.layer_count)), path, cache)


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

    Raises KeditError with exit code 78 when there is no such model, or none that can be edited.
    """
    opened = open_model(name, device, cache)
    model, site = opened.model, opened.resolve_site()
    statistics = opened.resolve_statistics(site.layers, (site.key_layer, site.side_layer), progress)
    texts = canary_texts or read_canary_texts()
    canary = Canary(model, texts.lines, site.layers, texts.statements)
    return LoadedModel(name, model, site, statistics, canary, opened.base_hash)
