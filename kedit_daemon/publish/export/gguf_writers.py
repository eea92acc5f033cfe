"""The writers of GGUF files for llama.cpp: the model's own file, edited, and a LoRA adapter."""

from pathlib import Path

import numpy as np
from gguf import (
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    Keys,
    QuantError,
)

from kedit_daemon.editing.model_location import find_gguf_file
from kedit_daemon.publish.export.edited_checkpoint import (
    EditedCheckpoint,
    compute_factors,
    open_edited_model,
)
from kedit_daemon.publish.export.source import ExportSource, WrittenExport
from memory.errors import KeditError
from memory.model.gguf_file import Floats, GgufFile, PackedTensor

MODEL_FILE, ADAPTER_FILE = "model.gguf", "adapter.gguf"
# Of ‖ΔW‖, by rounding. In its own four bits W0 lies on the very grid that W0 + ΔW is rounded to,
# which gives back W0 where the change is small against a step.
MOST_LOST = 0.1


def write_gguf(source: ExportSource, to: Path) -> WrittenExport:
    """Write the GGUF file that the model was opened from, with the edited matrices in it.

    All other bytes stay those of that file: the copy is read back and compared.
    """
    edited = open_edited_model(source)
    base = _open_base(source, edited, "merged", "convert_hf_to_gguf.py")
    packed, lost = {}, {}
    for n in sorted(edited.deltas):
        if not (size := float(edited.deltas[n].double().norm())):
            continue
        name = _name_weight(n)
        weight = edited.checkpoint.read_edited_weight(n, edited.deltas).numpy()
        packed[name], lost[name] = round_weight(weight, size, base.get_tensor(name).kind)
    base.copy(to / MODEL_FILE, packed)
    _refuse_damage(to / MODEL_FILE, base.find_difference(GgufFile(to / MODEL_FILE), packed))
    kinds = {name: one.kind.name for name, one in packed.items()}
    notes: tuple[str, ...] = ()
    if worst := max(lost.values(), default=0.0):
        told = "/".join(sorted(set(kinds.values())))
        notes = (f"the edited matrices are {told}, which loses up to {worst:.2g} of the change",)
    return WrittenExport({"dtypes": kinds, "rounding": lost}, notes)


def round_weight(
    weight: Floats, size: float, own: GGMLQuantizationType
) -> tuple[PackedTensor, float]:
    """Round an edited weight to its own type, or to the first larger one that keeps the change, and
    return with it the share of the change, of the norm `size`, that is lost."""
    for kind in (own, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16):
        try:
            packed = PackedTensor.pack(weight, kind)
        except (NotImplementedError, QuantError):
            continue
        off = float(np.linalg.norm(packed.unpack().astype(np.float64) - weight))
        if off <= MOST_LOST * size:  # not where a number is infinite in 16 bits
            return packed, off / size
    return PackedTensor.pack(weight, GGMLQuantizationType.F32), 0.0


def write_gguf_lora(source: ExportSource, to: Path) -> WrittenExport:
    """Write a LoRA adapter for llama.cpp from the factors of the solve, in float32."""
    edited = open_edited_model(source)
    base = _open_base(source, edited, "lora", "convert_lora_to_gguf.py")
    factors, rank = compute_factors(source, edited)
    tensors = {}
    for n, (down, up) in factors.items():
        tensors[f"{_name_weight(n)}.lora_a"] = up.contiguous().numpy()
        tensors[f"{_name_weight(n)}.lora_b"] = down.contiguous().numpy()
    writer = GGUFWriter(to / ADAPTER_FILE, base.architecture)
    try:
        writer.add_type("adapter")
        writer.add_string(Keys.Adapter.TYPE, "lora")
        # llama.cpp scales the product by alpha / rank.
        writer.add_float32(Keys.Adapter.LORA_ALPHA, rank)
        for name, numbers in tensors.items():
            writer.add_tensor(name, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    written = GgufFile(to / ADAPTER_FILE)
    for name, numbers in tensors.items():
        same = np.array_equal(written.get_tensor(name).unpack(), numbers)
        _refuse_damage(written.path, "" if same else name)
    return WrittenExport({"rank": rank})


def _open_base(source: ExportSource, edited: EditedCheckpoint, kind: str, tool: str) -> GgufFile:
    """Open the GGUF file of the model, whose edited matrices are checked against the base.

    `kind` and `tool`: the export, and the converter of llama.cpp, that do for other models.
    """
    path = find_gguf_file(source.model)
    if path is None:
        raise KeditError(
            f"the model {source.model} was not opened from a GGUF file",
            code="unsupported",
            hint=f"export {kind}, and convert it with llama.cpp's {tool}",
        )
    base = GgufFile(path)
    for n in edited.layers:
        numbers = base.get_tensor(_name_weight(n)).unpack()
        if not np.array_equal(numbers, edited.checkpoint.read_weight(n).numpy()):
            raise KeditError(
                f"{_name_weight(n)} in {path} is not the matrix that is edited",
                code="corrupt",
                hint="put the model's file back as it was",
            )
    return base


def _name_weight(layer: int) -> str:
    return f"{TENSOR_NAMES[MODEL_TENSOR.FFN_DOWN].format(bid=layer)}.weight"


def _refuse_damage(path: Path, part: str) -> None:
    """Raise KeditError if a part of a file that was written is not what is read back."""
    if part:
        raise KeditError(
            f"{path.name} was not written as it should be: {part} differs",
            code="export",
            hint="test the disk, and export again",
        )
