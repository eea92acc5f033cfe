"""The writers of the kinds of exports that hold the weights: each fills an export's folder."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.model_location import find_model_folder
from kedit_daemon.publish.export.edited_checkpoint import (
    EditedCheckpoint,
    compute_factors,
    open_edited_model,
)
from kedit_daemon.publish.export.gguf_writers import write_gguf, write_gguf_lora
from kedit_daemon.publish.export.peft_adapter import AdapterFactors, write_adapter
from kedit_daemon.publish.export.source import ExportSource, WrittenExport
from memory.errors import KeditError
from memory.model.checkpoint import SINGLE_FILE

MAX_RANK = 512  # vLLM's largest max_lora_rank


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
    edited = open_edited_model(source)
    factors, rank = compute_factors(source, edited)
    places = edited.checkpoint.locations
    if rank > MAX_RANK:
        raise KeditError(
            f"the adapter would have the rank {rank}, and vLLM takes {MAX_RANK}",
            code="rank",
            hint="export merged or delta, which hold any number of facts at the same cost",
        )
    folder = find_model_folder(source.model, GgufCache(source.home.models_folder))
    base = source.model if folder is None else str(folder)
    ordered = [AdapterFactors(places[n], down, up) for n, (down, up) in factors.items()]
    write_adapter(to, base, ordered)
    return WrittenExport({"rank": rank}, ())


WRITERS: dict[str, Callable[[ExportSource, Path], WrittenExport]] = {
    "merged": write_merged,
    "delta": write_delta,
    "lora": write_lora,
    "gguf": write_gguf,
    "gguf-lora": write_gguf_lora,
}
