"""A model's safetensors files: reading and replacing the weights that may change.

The rest of the model is never loaded. A copy is made tensor by tensor, with the changed weights in
place of the old ones: everything that is not edited stays bit for bit the same.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memory.errors import KeditError
from memory.model.layout import find_down_projections

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT_BYTES = 8  # of the start of tensors
COPY_CHUNK_BYTES = 1 << 24
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Files that a model needs apart from its weights, and those that its licence may require.
COMPANION_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*"),
    *("LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class WeightLocation:
    """Location of one down projection."""

    module_name: str  # the module's name in the model
    tensor_name: str  # the weight's name in the file
    file: Path
    dtype: torch.dtype
    transposed: bool  # stored (width, hidden), as GPT-2's Conv1D are


class Checkpoint:
    """The safetensors files of a model, and the down projection of each layer in them."""

    def __init__(self, folder: Path) -> None:
        """Raises KeditError (code "model") when the folder has no model that can be edited."""
        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
            self.model_type = str(config.model_type)
            self.weight_files = list_weight_files(folder)
            self.locations = _locate_weights(model, self.weight_files)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise KeditError(
                f"the model in {folder} cannot be read: {str(error).splitlines()[0]}",
                code="model",
                hint="the model has to lie where the daemon took it from, as safetensors",
            ) from error

    @property
    def layer_count(self) -> int:
        """Count of layers."""
        return len(self.locations)

    def read_weight(self, layer: int) -> Tensor:
        """Read W0 (hidden, width) of a layer, in float32."""
        at = self.locations[layer]
        with safe_open(at.file, framework="pt") as file:
            weight: Tensor = file.get_tensor(at.tensor_name).float()
        return weight.T if at.transposed else weight

    def weights_hash(self, layers: Sequence[int], deltas: Mapping[int, Tensor]) -> str:
        """Compute EditableModel.weights_hash with deltas (hidden, width) added to these layers."""
        digest = hashlib.sha256()
        for layer in layers:
            digest.update(self.read_edited_weight(layer, deltas).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def read_edited_weight(self, layer: int, deltas: Mapping[int, Tensor]) -> Tensor:
        """Read W (hidden, width) of a layer, in float32, plus its delta, if it has one."""
        weight = self.read_weight(layer)
        return weight + deltas[layer] if layer in deltas else weight

    def to_stored_layout(self, layer: int, weight: Tensor) -> Tensor:
        """Convert a weight (hidden, width) to the file's layout, in float32 or wider: a change is
        small against the weight, and 16 bits would round much of it away."""
        at = self.locations[layer]
        dtype = torch.promote_types(at.dtype, torch.float32)
        return (weight.T if at.transposed else weight).to(dtype).contiguous()

    def copy_companions(self, to: Path) -> None:
        """Copy the other files of the model: configuration, tokenizer, licence."""
        for pattern in COMPANION_FILES:
            for path in sorted(self.folder.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, to / path.name)

    def copy_weights(self, to: Path, weights: Mapping[int, Tensor]) -> None:
        """Copy the weight files with some weights, of `to_stored_layout`, replaced.

        Raises KeditError (code "corrupt") when a file is truncated.
        """
        changed = {self.locations[layer].tensor_name: weight for layer, weight in weights.items()}
        grown = sum(_copy_tensors(path, to / path.name, changed) for path in self.weight_files)
        if self.weight_files[0].name != SINGLE_FILE:
            index = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] += grown
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (to / INDEX_FILE).write_text(text, encoding="utf-8")


def list_weight_files(folder: Path) -> list[Path]:
    """Return the model's safetensors files, in the order in which transformers looks for them.

    Raises OSError, KeyError or ValueError where there are none, or their index is broken.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    parts = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(parts))]


def _locate_weights(model: PreTrainedModel, files: Sequence[Path]) -> list[WeightLocation]:
    names = {module: name for name, module in model.named_modules()}
    headers = {path: _read_header(path) for path in files}
    return [
        _locate_weight(names[down], isinstance(down, Conv1D), headers, model.base_model_prefix)
        for down in find_down_projections(model)[1]
    ]


def _read_header(path: Path) -> tuple[int, dict[str, dict[str, object]]]:
    """Return the offset of the tensors' bytes, and the header's entry of each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def _copy_tensors(path: Path, to: Path, changed: Mapping[str, Tensor]) -> int:
    """Copy a file tensor by tensor, in their order, some of them changed, and return by how many
    bytes it has grown."""
    start, header = _read_header(path)
    new_header = {name: header.pop(name) for name in ("__metadata__",) if name in header}
    order, at = sorted(header, key=lambda name: _data_offsets(header[name])), 0
    for name in order:
        begin, end = _data_offsets(header[name])
        size = changed[name].nbytes if name in changed else end - begin
        new_header[name] = header[name] | {"data_offsets": [at, at + size]}
        if name in changed:
            new_header[name]["dtype"] = DTYPE_NAMES[changed[name].dtype]
        at += size
    head = json.dumps(new_header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % ALIGNMENT_BYTES)
    with path.open("rb") as file, to.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            begin, end = _data_offsets(header[name])
            if name in changed:
                out.write(changed[name].view(torch.uint8).numpy().tobytes())
                continue
            file.seek(start + begin)
            for left in range(end - begin, 0, -COPY_CHUNK_BYTES):
                out.write(_read_exactly(file, path, min(COPY_CHUNK_BYTES, left)))
    return at - max((_data_offsets(entry)[1] for entry in header.values()), default=0)


def _read_exactly(file: BinaryIO, path: Path, size: int) -> bytes:
    """Read exactly `size` bytes. Raises KeditError when the file ends before."""
    data = file.read(size)
    if len(data) < size:
        raise KeditError(
            f"{path} is cut off: it ends within a tensor",
            code="corrupt",
            hint="put the model's file back as it was",
        )
    return data


def _data_offsets(entry: Mapping[str, object]) -> tuple[int, int]:
    begin, end = cast("list[int]", entry["data_offsets"])
    return begin, end


def _locate_weight(
    module: str,
    transposed: bool,
    headers: Mapping[Path, tuple[int, Mapping[str, Mapping[str, object]]]],
    prefix: str,
) -> WeightLocation:
    # Some checkpoints, such as GPT-2's first ones, leave out the name of the body.
    for tensor in (f"{module}.weight", f"{module.removeprefix(prefix + '.')}.weight"):
        for path, (_, header) in headers.items():
            if (entry := header.get(tensor)) is None:
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{tensor} is stored as {entry['dtype']}")
            return WeightLocation(module, tensor, path, DTYPES[str(entry["dtype"])], transposed)
    raise ValueError(f"no file holds {module}.weight")
