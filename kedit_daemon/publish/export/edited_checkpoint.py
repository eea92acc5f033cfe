"""The weights that exports are made from: the model's files, ΔW and its factors, each checked."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad
from transformers.utils.hub import cached_file

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.known_measurements import find_site, find_statistics
from kedit_daemon.editing.model_location import find_model_folder
from kedit_daemon.publish.export.source import ExportSource, read_edit_terms
from memory.errors import KeditError
from memory.files import load_tensors
from memory.model.checkpoint import Checkpoint
from policies.memit_mass import WeightsTier

DELTA_TOLERANCE = 1e-4  # of ‖ΔW‖, by which the factors may differ from the generation's own


@dataclass(frozen=True)
class EditedCheckpoint:
    """The model's files, and the ΔW of the active generation by layer."""

    checkpoint: Checkpoint
    layers: tuple[int, ...]
    deltas: dict[int, Tensor]


def find_base_folder(source: ExportSource) -> Path:
    """Find the folder of the unedited model's files; nothing is downloaded from the hub."""
    name = source.model
    folder = find_model_folder(name, GgufCache(source.home.models_folder))
    if folder is not None:
        return folder
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        raise KeditError(
            f"the model {name} is not on this machine: {str(error).splitlines()[0]}",
            code="model",
            hint="export as the user that the daemon runs as, with its HF_HOME",
        ) from error
    return Path(str(found)).parent


def open_edited_model(source: ExportSource) -> EditedCheckpoint:
    """Open the weights of the active generation, checked against the ledger."""
    checkpoint, generation = Checkpoint(find_base_folder(source)), source.generation
    if checkpoint.weights_hash(range(checkpoint.layer_count), {}) != source.base_hash:
        raise KeditError(
            f"{checkpoint.folder} is not the model that this home was made for",
            code="model",
            hint="restore the model's files",
        )
    at = (checkpoint.folder, source.home.state_folder, source.base_hash)
    layers = find_site(*at, checkpoint.layer_count, checkpoint.model_type).layers
    found = {}
    if generation.sha256:
        found = load_tensors(source.home.generations_folder, generation.sha256)
    deltas = {int(name): delta for name, delta in found.items()}
    served = generation.weights_hash  # none of the base, before the first flush
    if served and served != checkpoint.weights_hash(layers, deltas):
        raise KeditError(
            f"the weights of generation {generation.id} are not those of the ledger",
            code="corrupt",
            hint="restart the daemon, or run kedit-daemon audit, and export again",
        )
    return EditedCheckpoint(checkpoint, layers, deltas)


def compute_factors(
    source: ExportSource, edited: EditedCheckpoint
) -> tuple[dict[int, tuple[Tensor, Tensor]], int]:
    """Compute the factors of each ΔW, B (hidden, rank) and A (rank, width), and their rank, checked
    against the ΔW that is served.

    Raises KeditError (code "empty") when no fact is in the weights.
    """
    if not source.generation.fact_ids:
        raise KeditError(
            "no fact is in the weights, so there is nothing to export",
            code="empty",
            hint="serve the base model, or flush first",
        )
    factors = _solve_factors(source, edited.checkpoint)
    for n, (down, up) in factors.items():
        delta = edited.deltas[n].double()
        off, size = float((down.double() @ up.double() - delta).norm()), float(delta.norm())
        if not off <= DELTA_TOLERANCE * size:  # ΔW may be zero: no division
            raise KeditError(
                f"the stored terms give other weights than generation {source.generation.id} has:"
                f" they are {off:.2g} off where the change in layer {n} is {size:.2g}",
                code="corrupt",
                hint="run kedit-daemon consolidate and export again, or export merged",
            )
    rank = max(len(up) for _, up in factors.values())
    # Not every server takes a rank per matrix: zeros up to the largest rank change nothing.
    missing = {n: rank - len(up) for n, (_, up) in factors.items()}
    padded = {
        n: (pad(down, (0, missing[n])), pad(up, (0, 0, 0, missing[n])))
        for n, (down, up) in factors.items()
    }
    return padded, rank


def _solve_factors(
    source: ExportSource, checkpoint: Checkpoint
) -> dict[int, tuple[Tensor, Tensor]]:
    at = (checkpoint.folder, source.home.state_folder, source.base_hash)
    site = find_site(*at, checkpoint.layer_count, checkpoint.model_type)
    kept = find_statistics(*at, site.layers, (site.key_layer, site.side_layer))
    if kept.missing_key is not None:
        raise KeditError(
            f"the key statistics of the model are missing in {source.home.state_folder}",
            code="statistics",
            hint="restart the daemon, which measures it again",
        )
    tier = WeightsTier(site, kept.statistics)
    return tier.solve_factors(read_edit_terms(source.home, source.generation.fact_ids))
