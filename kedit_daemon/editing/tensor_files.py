"""Tensors that a daemon publishes: generations and shards as files, retrieval keys as blobs."""

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from memory.db.rows import GenerationRow
from memory.errors import KeditError
from memory.files import load_tensors, save_tensors
from memory.side.shards import Delta, RetrievalKeys, Shard

ASKED = "asked"  # a tensor that is in the file of a shard which has learned questions


def load_deltas(folder: Path, row: GenerationRow) -> dict[int, Tensor]:
    """Load ΔW (hidden, width) by layer of a generation; empty for the base.

    Raises KeditError if the file is missing or damaged.
    """
    tensors = load_tensors(folder, row.sha256) if row.sha256 else {}
    return {int(name): tensor for name, tensor in tensors.items()}


def save_shard(folder: Path, shard: Shard) -> str:
    """Write a shard's ΔW into the folder and return the file's sha256."""
    tensors = {"up": shard.delta.up, "down": shard.delta.down}
    if shard.is_asked:  # older shards have not learned questions
        tensors[ASKED] = torch.ones(1, dtype=torch.uint8)
    return save_tensors(folder, tensors)


def load_shard(folder: Path, sha: str, threshold: float, device: torch.device) -> Shard:
    """Load a shard. Raises KeditError if the file is missing or damaged."""
    tensors = load_tensors(folder, sha)
    is_asked = tensors.pop(ASKED, None) is not None
    if set(tensors) != {"up", "down"}:
        raise KeditError(f"shard {sha} is of a form that is no longer used", code="corrupt")
    delta = Delta(tensors["up"].to(device), tensors["down"].to(device))
    return Shard(delta, threshold, is_asked)


def pack_keys(keys: RetrievalKeys) -> bytes:
    """Pack retrieval keys for the store."""
    return save({"subject": keys.subject.contiguous(), "end": keys.end.contiguous()})


def unpack_keys(blob: bytes) -> RetrievalKeys:
    """Unpack what `pack_keys` returned."""
    return RetrievalKeys(**load(blob))
