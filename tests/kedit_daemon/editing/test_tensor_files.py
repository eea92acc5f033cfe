from pathlib import Path

import pytest
import torch

from kedit_daemon.editing.tensor_files import (
    load_deltas,
    load_shard,
    pack_keys,
    save_shard,
    unpack_keys,
)
from memory.db.rows import GenerationRow
from memory.errors import KeditError
from memory.files import save_tensors
from memory.side.shards import Delta, RetrievalKeys, Shard

CPU = torch.device("cpu")


def row_of(sha: str | None) -> GenerationRow:
    return GenerationRow(1, sha, "", 0, "", (), {}, "")


def test_a_shard_comes_back_as_it_was(tmp_path: Path) -> None:
    shard = Shard(Delta(torch.randn(8, 2), torch.randn(2, 24)), 0.5)
    found = load_shard(tmp_path, save_shard(tmp_path, shard), 0.5, CPU)
    assert torch.equal(found.delta.up, shard.delta.up) and found.threshold == 0.5
    assert torch.equal(found.delta.down, shard.delta.down)


def test_a_shard_of_an_older_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="no longer used") as caught:
        load_shard(tmp_path, save_tensors(tmp_path, {"delta": torch.zeros(2)}), 0.5, CPU)
    assert caught.value.code == "corrupt"


def test_the_deltas_of_a_generation_are_found_by_layer(tmp_path: Path) -> None:
    sha = save_tensors(tmp_path, {"2": torch.ones(2, 3), "10": torch.zeros(2, 3)})
    found = load_deltas(tmp_path, row_of(sha))
    assert list(sorted(found)) == [2, 10] and torch.equal(found[2], torch.ones(2, 3))
    assert load_deltas(tmp_path, row_of(None)) == {}


def test_a_generation_without_its_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="missing") as caught:
        load_deltas(tmp_path, row_of("0" * 64))
    assert caught.value.code == "corrupt"


def test_keys_come_back_as_they_were() -> None:
    keys = RetrievalKeys(torch.randn(3, 8), torch.randn(5, 8))
    found = unpack_keys(pack_keys(keys))
    assert torch.equal(found.subject, keys.subject) and torch.equal(found.end, keys.end)
