"""Loading of the configured model, with its site, its statistics and its canary.

What is measured of a model is measured at its first start, and kept for later ones.
"""

import errno
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils.hub import cached_file

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.known_measurements import (
    STATISTICS_KIND,
    find_shipped_inputs,
    find_site,
    find_statistics,
)
from kedit_daemon.editing.measurement_cache import find_measured, make_key, save_measured
from kedit_daemon.editing.model_location import find_model_folder
from kedit_daemon.home import MODELS_FOLDER
from kedit_daemon.shipped import read_names, read_ordinary_lines, read_statements
from memory.errors import UnusableModel
from memory.model.canary import Canary, WrapProgress
from memory.model.canary_file import READINGS_FORMAT, load_readings, pack_readings
from memory.model.chat_layout import find_chat_layout
from memory.model.checkpoint import Checkpoint
from memory.model.device import resolve_device
from memory.model.editable import EditableModel
from memory.model.fingerprint import compute_fingerprint
from memory.model.statistics import (
    LayerStatistics,
    collect_statistics,
    pack_statistics,
    unpack_statistics,
)
from policies.edit_site import EditSite
from policies.wise import read_prompt_ends

CANARY_LINES = 40
NAME_CONTEXTS = ("It was said that ", "Tell me about ")
PIECE_WORDS = 12  # of a line of ordinary text, on which shards stay quiet
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_KEPT = 3  # files of a kind, with the newest: of another machine's kernels, or another library
log = logging.getLogger(__name__)


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


def read_pieces(count: int) -> list[str]:
    """Read the beginnings of shipped lines of ordinary text."""
    return [" ".join(line.split()[:PIECE_WORDS]) for line in read_ordinary_lines()[:count]]


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
        shipped for the model, else cached, else measured now and cached."""
        known = find_statistics(self.model_folder, self.cache_folder, self.base_hash, edited, read)
        if known.missing_key is None:
            return known.statistics
        layers = known.edited_layers, known.read_layers
        numbers = ", ".join(map(str, sorted({n for part in layers for n in part})))
        with _log_measurement(f"statistics of the layers {numbers}"):
            lines, names = read_ordinary_lines(), self._write_names()
            measured = collect_statistics(self.model, lines, *layers, progress, names)
        data = pack_statistics(measured)
        save_measured(self.cache_folder, STATISTICS_KIND, known.missing_key, data)
        return known.statistics | unpack_statistics(data)

    def _write_names(self) -> list[str]:
        """Write each shipped name at the end of a statement, and, where the model has a chat
        template, of a user's message."""
        layout = find_chat_layout(self.model.tokenizer)
        headers = ("",) if layout is None else ("", layout.user_header)
        names = list(enumerate(read_names()))
        return [
            header + NAME_CONTEXTS[n % len(NAME_CONTEXTS)] + name
            for header in headers
            for n, name in names
        ]

    def keep_statistics(
        self,
        statistics: Mapping[int, LayerStatistics],
        edited: Collection[int],
        read: Collection[int],
    ) -> None:
        """Keep statistics that were measured elsewhere where `resolve_statistics` finds them for
        these layers, unless it does already."""
        known = find_statistics(self.model_folder, self.cache_folder, self.base_hash, edited, read)
        if known.missing_key is None:
            return
        no_covariance = torch.empty(0, 0)
        bare = {n: replace(statistics[n], key_covariance=no_covariance) for n in known.read_layers}
        data = pack_statistics(bare | {n: statistics[n] for n in known.edited_layers})
        save_measured(self.cache_folder, STATISTICS_KIND, known.missing_key, data)

    def resolve_canary(
        self, texts: CanaryTexts, layers: Sequence[int], progress: WrapProgress
    ) -> Canary:
        """Return the canary, with the unedited model's readings as cached, else measured now."""
        given = self.model, texts.lines, layers, texts.statements
        ids = [self.model.encode(text) for text in (*texts.lines, *texts.statements)]
        key = make_key(READINGS_FORMAT, self.fingerprint, len(texts.lines), ids)
        if (path := find_measured(self.cache_folder, "canary", key)) is not None:
            return Canary(*given, load_readings(path, self.model.device))
        with _log_measurement("health of the unedited model"):
            canary = Canary(*given, progress=progress)
        self._save("canary", key, pack_readings(canary.base_readings))
        return canary

    def resolve_ordinary_inputs(self, layer: int, count: int) -> Tensor:
        """Return the inputs (count, width) of a layer where pieces of ordinary text end, in the
        unedited model: as shipped, as cached, else measured now."""
        pieces = read_pieces(count)
        ids = [self.model.encode(piece) for piece in pieces]
        shipped = find_shipped_inputs(self.base_hash, make_key(self.base_hash, layer, ids))
        if shipped is not None:
            return shipped.to(self.model.device)
        key = make_key(self.fingerprint, layer, ids)
        if (path := find_measured(self.cache_folder, "inputs", key)) is not None:
            inputs = load_file(path, device=str(self.model.device))["inputs"]
        else:
            with _log_measurement(f"ends of ordinary text in layer {layer}"), self.model.at_base():
                inputs, _ = read_prompt_ends(self.model, pieces, layer)
            self._save("inputs", key, save({"inputs": inputs.cpu().contiguous()}))
        return inputs

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model on this machine: readings of another may differ."""
        return compute_fingerprint(self.model)

    def _save(self, kind: str, key: str, data: bytes) -> None:
        """Keep what is only kept to save time: no start fails for want of disk space or of the
        right to write. An I/O error is raised: a disk that fails is never ignored."""
        try:
            save_measured(self.cache_folder, kind, key, data, MOST_KEPT)
        except OSError as error:
            if error.errno == errno.EIO:
                raise
            log.warning("The next start measures the model again: %s", error)


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything about it that does not change while the daemon runs."""

    name: str
    opened: OpenedModel
    site: EditSite
    statistics: dict[int, LayerStatistics]
    canary: Canary

    @property
    def model(self) -> EditableModel:
        """The model itself."""
        return self.opened.model

    @property
    def base_hash(self) -> str:
        """The hash of the unedited weights of all layers."""
        return self.opened.base_hash

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose weights may change."""
        return self.site.layers


@contextmanager
def _log_measurement(what: str) -> Iterator[None]:
    """Log what is measured in the block, and how long it took."""
    log.info("measuring the %s, once for this model", what)
    began = time.monotonic()
    yield
    log.info("measured the %s in %.0f s", what, time.monotonic() - began)


def open_model(
    name: str,
    device: str,
    cache: Path,
    gguf_cache: GgufCache | None = None,
    dtype: str = "float32",
) -> OpenedModel:
    """Load the configured model, without what depends on its site.

    `gguf_cache`: of converted files; by default a folder in `cache`. `dtype`: of the layers that
    are not edited, a key of DTYPES.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    converted = gguf_cache or GgufCache(cache / MODELS_FOLDER)
    folder = find_model_folder(name, converted)
    with converted.explain_damage(folder):
        model = EditableModel.load(folder or name, resolve_device(device), DTYPES[dtype])
    if model.dtype != torch.float32:
        _refuse_rounding(name, folder, model.dtype)
    base_hash = model.weights_hash(range(model.layer_count))
    return OpenedModel(model, base_hash, folder or Path(name), cache)


def _refuse_rounding(name: str, folder: Path | None, dtype: torch.dtype) -> None:
    """Raise UnusableModel for weights that are stored in another dtype: rounded, they would be
    another model than the one in the folder, which exports are made from."""
    folder = folder or Path(str(cached_file(name, "config.json"))).parent
    stored = {at.dtype for at in Checkpoint(folder).locations} - {dtype}
    if stored:
        found = ", ".join(sorted(str(one).removeprefix("torch.") for one in stored))
        wanted = str(dtype).removeprefix("torch.")
        raise UnusableModel(
            f"the model {name} is stored in {found}, and dtype is {wanted}",
            hint=f'set dtype = "float32" in config.toml, or save the model in {wanted}',
        )


def load_model(
    name: str,
    device: str,
    cache: Path,
    progress: WrapProgress,
    canary_texts: CanaryTexts | None = None,
    gguf_cache: GgufCache | None = None,
    dtype: str = "float32",
) -> LoadedModel:
    """Load the configured model with its site, its statistics and its canary.

    `cache`: folder that keeps what is measured on first use; a site that `calibrate` has left
    there comes first. `canary_texts`: the shipped ones by default. `gguf_cache`, `dtype`: as in
    `open_model`.

    Raises UnusableModel if there is no such model, or it cannot be edited.
    """
    opened = open_model(name, device, cache, gguf_cache, dtype)
    site = opened.resolve_site()
    opened.model.widen_layers(site.layers)  # first: what is measured now is compared with later
    statistics = opened.resolve_statistics(site.layers, (site.key_layer, site.side_layer), progress)
    canary = opened.resolve_canary(canary_texts or read_canary_texts(), site.layers, progress)
    return LoadedModel(name, opened, site, statistics, canary)
