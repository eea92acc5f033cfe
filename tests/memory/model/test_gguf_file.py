"""Copies of GGUF files with other tensors in them: all else is the file's own, byte for byte."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, QuantError
from tiny_gguf import write_gguf

from memory.errors import KeditError
from memory.model.gguf_file import GgufFile, PackedTensor

NAME, ODD, LAST = "blk.1.ffn_down.weight", "yy.weight", "zz.weight"
NUMBERS = np.linspace(-1, 1, 32 * 96, dtype=np.float32).reshape(32, 96)
OFF = {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 1e-2, Kind.Q8_0: 1e-2, Kind.Q4_0: 0.1}


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    odd = {ODD: torch.arange(7.0), LAST: torch.arange(5.0)}  # whose ends are not aligned
    return GgufFile(write_gguf(model_folder("llama"), path, Kind.Q8_0, odd))


@pytest.mark.parametrize("kind", OFF)
def test_only_what_is_changed_differs(base: GgufFile, tmp_path: Path, kind: Kind) -> None:
    changed = {NAME: PackedTensor.pack(NUMBERS, kind)}
    changed[ODD] = PackedTensor.pack(base.get_tensor(ODD).unpack(), Kind.F16)
    base.copy(tmp_path / "new.gguf", changed)
    old, new = GGUFReader(base.path), GGUFReader(tmp_path / "new.gguf")
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    before = old.tensors[0].field.offset
    assert bytes(new.data[:before]) == bytes(old.data[:before])
    expected = old.data_offset
    for one, other in zip(old.tensors, new.tensors, strict=True):
        assert other.data_offset == expected  # llama.cpp refuses any other
        expected += -(-other.n_bytes // 32) * 32
        assert list(one.shape) == list(other.shape)
        if one.name not in changed:
            assert one.tensor_type == other.tensor_type
            assert one.data.tobytes() == other.data.tobytes()
    found = GgufFile(tmp_path / "new.gguf").get_tensor(NAME)
    assert found.kind == kind
    off = np.linalg.norm(found.unpack() - NUMBERS)
    assert off <= OFF[kind] * np.linalg.norm(NUMBERS)
    assert base.find_difference(GgufFile(tmp_path / "new.gguf"), changed) == ""


def test_a_copy_without_changes_is_the_file_itself(base: GgufFile, tmp_path: Path) -> None:
    base.copy(tmp_path / "new.gguf", {})
    assert (tmp_path / "new.gguf").read_bytes() == base.path.read_bytes()


def test_a_copy_that_is_damaged_is_found(base: GgufFile, tmp_path: Path) -> None:
    path, changed = tmp_path / "new.gguf", {NAME: PackedTensor.pack(NUMBERS, Kind.F16)}
    base.copy(path, changed)
    places = {t.name: t.data_offset for t in GGUFReader(path).tensors}
    whole = path.read_bytes()
    entry = whole.index(NAME.encode())
    wrong = {places[NAME]: NAME, places["token_embd.weight"] + 5: "token_embd.weight"}
    wrong |= {whole.index(b"context_length"): "the metadata", entry: "the list of tensors"}
    for at, part in wrong.items():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert base.find_difference(GgufFile(path), changed) == part
    path.write_bytes(whole)
    assert base.find_difference(GgufFile(path), {}) == NAME
    kind = entry + len(NAME) + 4 + 2 * 8  # after the count of dimensions, and two of them
    path.write_bytes(whole[:kind] + bytes([Kind.BF16]) + whole[kind + 1 :])
    assert base.find_difference(GgufFile(path), changed) == NAME


def test_what_cannot_be_packed_or_found(base: GgufFile) -> None:
    with pytest.raises(NotImplementedError):
        PackedTensor.pack(np.zeros((2, 256), np.float32), Kind.Q6_K)
    with pytest.raises(QuantError):
        PackedTensor.pack(np.zeros((2, 33), np.float32), Kind.Q8_0)
    large = PackedTensor.pack(np.array([[1e6]], np.float32), Kind.F16)
    assert np.isinf(large.unpack()).all()
    with pytest.raises(KeditError, match=r"tiny\.gguf has no blk\.9") as caught:
        base.get_tensor("blk.9.ffn_down.weight")
    assert caught.value.code == "unsupported"
    assert base.architecture == "llama"
