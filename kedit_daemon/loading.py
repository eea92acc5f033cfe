"""From a name in the configuration to a model with its site, statistics and canary."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kedit_daemon import demo
from memory.errors import KeditError
from memory.files import write_atomic
from memory.health import Canary
from memory.model import EditableModel, resolve_device
from memory.statistics import LayerStatistics, collect, pack, unpack
from policies.site import EditSite, load_site

SHIPPED = "shipped"
STATISTICS = "statistics.safetensors"
CANARY_LINES = 40

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class Loaded:
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


def model_path(name: str) -> Path:
    """Where a configured model lies; a hub id stays what it is."""
    return Path(demo.__file__).parent / "model" if name == SHIPPED else Path(name)


def ordinary_text() -> list[str]:
    """The shipped lines of ordinary text: for the canary, and for statistics of other models."""
    path = Path(demo.__file__).parent / "ordinary.txt"
    return path.read_text(encoding="utf-8").splitlines()


def _statistics(
    path: Path, cache: Path, model: EditableModel, base: str, site: EditSite, progress: Progress
) -> dict[int, LayerStatistics]:
    """Shipped with the model, else cached in the home, else measured now and cached."""
    read = {site.key_layer, site.side_layer}
    shipped = path / STATISTICS
    if shipped.is_file():
        return unpack(shipped.read_bytes())
    key = hashlib.sha256(json.dumps([base, site.layers, sorted(read)]).encode()).hexdigest()[:16]
    cached = cache / f"statistics-{key}.safetensors"
    if not cached.is_file():
        measured = collect(model, ordinary_text(), site.layers, read, progress)
        write_atomic(cached, pack(measured))
    return unpack(cached.read_bytes())


def load_model(name: str, device: str, cache: Path, progress: Progress) -> Loaded:
    """Load the configured model; what is measured on first use is kept in `cache`.

    Raises KeditError with exit code 78 when there is no such model, or none that can be edited.
    """
    path = model_path(name)
    if name == SHIPPED and not path.is_dir():
        raise KeditError(f"{path} is missing", code="model", hint="install again", exit_code=78)
    # An id on the hub is no path, and its name alone may not be looked up as one.
    model = EditableModel.load(path if path.is_dir() else name, resolve_device(device))
    site = load_site(path, model.layers)
    base = model.weights_hash(range(model.layers))
    statistics = _statistics(path, cache, model, base, site, progress)
    canary = Canary(model, ordinary_text()[:CANARY_LINES], site.layers)
    return Loaded(name, model, site, statistics, canary, base)
