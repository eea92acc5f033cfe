"""A model's GGUF file: single tensors of it, and copies with some of them replaced.

A tensor's entry in the header has the same length whatever its type. So a copy is the file itself,
byte for byte, with new types and offsets written into the header, and new bytes between the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize, quantize

from memory.errors import KeditError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackedTensor:
    """Numbers in a type of GGUF, as they are stored."""

    kind: GGMLQuantizationType
    data: npt.NDArray[np.generic]

    @classmethod
    def pack(cls, numbers: Floats, kind: GGMLQuantizationType) -> "PackedTensor":
        """Round numbers to a type. Raises NotImplementedError where only reading is possible, as of
        K-quants, and QuantError where the rows are no whole number of blocks."""
        with np.errstate(over="ignore"):  # too large for 16 bits: infinity shows it
            return cls(kind, quantize(numbers, kind))

    def unpack(self) -> Floats:
        """Return the numbers that are stored."""
        return np.asarray(dequantize(self.data, self.kind), dtype=np.float32)


class GgufFile:
    """A whole GGUF file, which is mapped into memory and read where it is used."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError when it cannot be read."""
        self.path, self._reader = path, GGUFReader(path)

    @property
    def architecture(self) -> str:
        """The name of the architecture, as llama.cpp calls it."""
        return str(self._reader.fields["general.architecture"].contents())

    @cached_property
    def _tensors(self) -> dict[str, ReaderTensor]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def get_tensor(self, name: str) -> PackedTensor:
        """Return a tensor by its name. Raises KeditError (code "unsupported") if there is none."""
        tensor = self._tensors.get(name)
        if tensor is None:
            problem = f"the GGUF file {self.path} has no {name}"
            raise KeditError(problem, code="unsupported", hint="export merged, and convert it")
        return PackedTensor(tensor.tensor_type, tensor.data)

    def copy(self, to: Path, changed: Mapping[str, PackedTensor]) -> None:
        """Write a copy in which some tensors are replaced by others of the same shapes."""
        whole, start = self._reader.data, self._reader.data_offset
        header = bytearray(whole[:start])
        stored = sorted(self._reader.tensors, key=lambda tensor: tensor.data_offset)
        ends = [after.data_offset for _, after in pairwise(stored)] + [len(whole)]
        with to.open("wb") as out:
            out.seek(start)
            for tensor, end in zip(stored, ends, strict=True):
                new = changed.get(tensor.name)
                kind = tensor.tensor_type if new is None else new.kind
                _set_entry(header, tensor, kind, out.tell() - start)
                if new is None:
                    out.write(whole[tensor.data_offset : end].data)
                    continue
                out.write(np.ascontiguousarray(new.data).data)
                out.write(bytes(-out.tell() % int(self._reader.alignment)))
            out.seek(0)
            out.write(header)

    def find_difference(self, other: "GgufFile", changed: Mapping[str, PackedTensor]) -> str:
        """Name the first part of another file that is not as `copy` writes it; empty if all is."""
        if _read_metadata(self._reader) != _read_metadata(other._reader):
            return "the metadata"
        if list(self._tensors) != list(other._tensors):
            return "the list of tensors"
        for name, tensor in self._tensors.items():
            found = other._tensors[name]
            wanted = changed.get(name) or PackedTensor(tensor.tensor_type, tensor.data)
            same = found.tensor_type == wanted.kind and np.array_equal(found.shape, tensor.shape)
            if not same or not np.array_equal(_to_bytes(found.data), _to_bytes(wanted.data)):
                return name
        return ""


def _set_entry(
    header: bytearray, tensor: ReaderTensor, kind: GGMLQuantizationType, offset: int
) -> None:
    """Write a tensor's type and offset, the last two parts of its entry in the header."""
    *before, old_kind, old_offset = tensor.field.parts
    new = (
        np.array([kind], old_kind.dtype).tobytes() + np.array([offset], old_offset.dtype).tobytes()
    )
    at = tensor.field.offset + sum(part.nbytes for part in before)
    header[at : at + len(new)] = new


def _read_metadata(reader: GGUFReader) -> bytes:
    """Read all that comes before the entries of the tensors: version, counts, keys and values."""
    return bytes(reader.data[: min(tensor.field.offset for tensor in reader.tensors)])


def _to_bytes(data: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(data).view(np.uint8)
