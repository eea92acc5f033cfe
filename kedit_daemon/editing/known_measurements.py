"""What is known of a model before anything is measured: its site and the statistics of its layers.

They come from the home, from the model's own folder, or from the package, which ships them for some
models, found by the hash of their weights.
"""

import errno
import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kedit_daemon.editing.measurement_cache import find_measured, make_key
from kedit_daemon.shipped import KNOWN_MODELS
from memory.errors import UnusableModel
from memory.model.statistics import PACK_FORMAT, LayerStatistics, unpack_statistics
from policies.edit_site import SITE_FILE, EditSite, load_site, read_site, read_weights_hash

# Not *.safetensors, though it is: servers take every such file in a folder for weights.
STATISTICS_FILE = "statistics.kedit"
INPUTS_FILE = "inputs.kedit"
STATISTICS_KIND = "statistics"
log = logging.getLogger(__name__)


def locate_known(base_hash: str) -> Path:
    """Return the package's folder for a model of these weights, whether there is one or not."""
    return KNOWN_MODELS / base_hash[:16]


def find_site(folder: Path, cache: Path, base_hash: str, layers: int, kind: str) -> EditSite:
    """Find the site measured in the home, else the model's own, else the package's for these
    weights, else a start for its type.

    A file in the home that was measured on other weights is not for this model.
    """
    path = cache / SITE_FILE
    if path.is_file() and read_weights_hash(path) in (None, base_hash):
        return read_site(path, layers)
    is_measured = (folder / SITE_FILE).is_file()
    return load_site(folder if is_measured else locate_known(base_hash), layers, kind)


@dataclass(frozen=True)
class KnownStatistics:
    """Statistics that were measured before, and the layers of which some are still missing."""

    statistics: dict[int, LayerStatistics]
    missing_key: str | None = None  # of the file for these layers
    edited_layers: tuple[int, ...] = ()
    read_layers: tuple[int, ...] = ()


def find_statistics(
    folder: Path, cache: Path, base_hash: str, edited: Collection[int], read: Collection[int]
) -> KnownStatistics:
    """Find the statistics of a model's layers that are shipped with it or cached whole.

    Raises UnusableModel if those with the model cannot be read.
    """
    shipped = _read_shipped(locate_known(base_hash)) | _read_shipped(folder)
    wide = sorted(n for n in edited if n not in shipped or not shipped[n].has_covariance)
    narrow = sorted(n for n in set(read) if n not in shipped)
    if not wide and not narrow:
        return KnownStatistics(shipped)
    key = make_key(PACK_FORMAT, base_hash, wide, narrow)
    if (path := find_measured(cache, STATISTICS_KIND, key)) is not None:
        return KnownStatistics(shipped | unpack_statistics(path.read_bytes()))
    unhashed = cache / f"{STATISTICS_KIND}-{key}.safetensors"
    if older := _load_unhashed(unhashed, {*wide, *narrow}):
        return KnownStatistics(shipped | older)
    return KnownStatistics(shipped, key, tuple(wide), tuple(narrow))


def find_shipped_inputs(base_hash: str, key: str) -> Tensor | None:
    """Find the inputs of a layer that the package ships for these weights, by a key of the weights,
    the layer and the texts' token ids."""
    path = locate_known(base_hash) / INPUTS_FILE
    return load(path.read_bytes()).get(key) if path.is_file() else None


def _read_shipped(folder: Path) -> dict[int, LayerStatistics]:
    path = folder / STATISTICS_FILE
    try:
        return unpack_statistics(path.read_bytes()) if path.is_file() else {}
    except SafetensorError as error:
        hint = "put the model's file back, or remove it: it is measured again"
        raise UnusableModel(f"{path} is damaged: {error}", hint=hint) from error


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
        path.unlink(missing_ok=True)
        return {}
    try:
        path.rename(path.with_stem(f"{path.stem}-{hashlib.sha256(data).hexdigest()}"))
    except OSError as error:  # the home may be read-only, or another process quicker
        if error.errno == errno.EIO:
            raise
    return found
