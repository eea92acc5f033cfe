"""The writers of merged checkpoints, deltas and LoRA adapters: each fills an export's folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils.hub import cached_file

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.known_measurements import find_site, find_statistics
from kedit_daemon.editing.model_location import find_model_folder
from kedit_daemon.publish.export.source import ExportSource, WrittenExport, read_edit_terms
from memory.errors import KeditError
from memory.files import load_tensors
from memory.model.checkpoint import SINGLE_FILE, Checkpoint
from policies.memit_mass import WeightsTier

MAX_RANK = 512  # vLLM's largest max_lora_rank
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


def write_merged(source: ExportSource, to: Path) -> WrittenExport:
    """Write the whole model in the layout of transformers."""
    edited = open_edited_model(source)
    weights = _build_weights(edited, tuple(sorted(edited.deltas)))
    edited.checkpoint.copy_companions(to)
    edited.checkpoint.copy_weights(to, weights)
    return _measure_rounding(edited, weights)


def write_delta(source: ExportSource, to: Path) -> WrittenExport:
    """Write only the edited tensors, whole.

    Also when no fact is left in them, so that a server of an earlier generation gets to this one.
    """
    edited = open_edited_model(source)
    weights = _build_weights(edited, edited.layers)
    places = edited.checkpoint.locations
    (to / "config.json").write_bytes((edited.checkpoint.folder / "config.json").read_bytes())
    named = {places[n].tensor_name: weight for n, weight in weights.items()}
    save_file(named, to / SINGLE_FILE, metadata={"format": "pt"})
    return _measure_rounding(edited, weights)


def _build_weights(edited: EditedCheckpoint, layers: tuple[int, ...]) -> dict[int, Tensor]:
    checkpoint = edited.checkpoint
    return {
        n: checkpoint.to_stored_layout(n, checkpoint.read_edited_weight(n, edited.deltas))
        for n in layers
    }


def _measure_rounding(edited: EditedCheckpoint, weights: dict[int, Tensor]) -> WrittenExport:
    """Measure the share of each ΔW that is lost when the model's own dtype is loaded."""
    checkpoint, dtypes, lost = edited.checkpoint, {}, {}
    for n, weight in weights.items():
        at = checkpoint.locations[n]
        dtypes[at.tensor_name] = str(weight.dtype).removeprefix("torch.")
        size = edited.deltas[n].double().norm() if n in edited.deltas else 0.0
        if size and weight.dtype != at.dtype:
            off = (weight.to(at.dtype).double() - weight.double()).norm()
            lost[at.tensor_name] = float(off / size)
    notes: tuple[str, ...] = ()
    if worst := max(lost.values(), default=0.0):
        kept = {str(checkpoint.locations[n].dtype).removeprefix("torch.") for n in weights}
        notes = (
            f"the edited weights are float32; loaded as {'/'.join(sorted(kept))}, the dtype of the"
            f" rest of the model, they lose up to {worst:.2g} of the change",
        )
    return WrittenExport({"dtypes": dtypes, "rounding": lost}, notes)


def write_lora(source: ExportSource, to: Path) -> WrittenExport:
    """Write a PEFT adapter from the factors of the solve: exact, nothing is fitted or truncated."""
    if not source.generation.fact_ids:
        raise KeditError(
            "no fact is in the weights, so there is nothing to export",
            code="empty",
            hint="serve the base model, or flush first",
        )
    edited = open_edited_model(source)
    factors = _compute_factors(source, edited)
    places = edited.checkpoint.locations
    rank = max(len(up) for _, up in factors.values())
    if rank > MAX_RANK:
        raise KeditError(
            f"the adapter would have the rank {rank}, and vLLM takes {MAX_RANK}",
            code="rank",
            hint="export merged or delta, which hold any number of facts at the same cost",
        )
    tensors: dict[str, Tensor] = {}
    for n, (down, up) in factors.items():
        name = f"base_model.model.{places[n].module_name}"
        # Not every server takes a rank per matrix: zeros up to the largest rank change nothing.
        more = rank - len(up)
        tensors[f"{name}.lora_A.weight"] = pad(up, (0, 0, 0, more))
        tensors[f"{name}.lora_B.weight"] = pad(down, (0, more))
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    transposed = {places[n].transposed for n in factors} == {True}
    modules = [places[n].module_name for n in factors]
    settings = _build_adapter_config(source, rank, modules, transposed)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (to / "adapter_config.json").write_text(text, encoding="utf-8")
    return WrittenExport({"rank": rank}, ())


def _compute_factors(
    source: ExportSource, edited: EditedCheckpoint
) -> dict[int, tuple[Tensor, Tensor]]:
    """Compute the factors of each ΔW, checked against the ΔW that is served."""
    checkpoint = edited.checkpoint
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
    factors = tier.solve_factors(read_edit_terms(source.home, source.generation.fact_ids))
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
    return factors


def _build_adapter_config(
    source: ExportSource, rank: int, modules: list[str], transposed: bool
) -> dict[str, Any]:
    """Build PEFT's settings. Alpha is the rank, so that the product is not scaled."""
    folder = find_model_folder(source.model, GgufCache(source.home.models_folder))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.model if folder is None else str(folder),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules,
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


WRITERS: dict[str, Callable[[ExportSource, Path], WrittenExport]] = {
    "merged": write_merged,
    "delta": write_delta,
    "lora": write_lora,
}
