"""What a daemon publishes beside its database, as tensors: generations, shards, retrieval keys."""

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from memory.db.rows import GenerationRow
from memory.errors import KeditError
from memory.files import load_tensors, save_tensors
from memory.side.side_memory import Delta, RetrievalKeys, Shard


def load_deltas(folder: Path, row: GenerationRow) -> dict[int, Tensor]:
    """ΔW (hidden, width) by layer of a generation; nothing of the base. Raises KeditError: the
    file is missing or damaged."""
    tensors = load_tensors(folder, row.sha256) if row.sha256 else {}
    return {int(name): tensor for name, tensor in tensors.items()}


def save_shard(folder: Path, shard: Shard) -> str:
    """Write a shard's ΔW into the folder and return the file's sha256."""
    return save_tensors(folder, {"up": shard.delta.up, "down": shard.delta.down})


def load_delta(folder: Path, sha: str, device: torch.device) -> Delta:
    """A shard's ΔW, as `save_shard` wrote it. Raises KeditError: missing or damaged."""
    tensors = load_tensors(folder, sha)
    if set(tensors) != {"up", "down"}:
        raise KeditError(f"shard {sha} is of a form that is no longer used", code="corrupt")
    return Delta(tensors["up"].to(device), tensors["down"].to(device))


def pack_keys(keys: RetrievalKeys) -> bytes:
    """Retrieval keys as the store keeps them."""
    return save({"subject": keys.subject.contiguous(), "end": keys.end.contiguous()})


def unpack_keys(blob: bytes) -> RetrievalKeys:
    """The reverse of `pack_keys`."""
    return RetrievalKeys(**load(blob))
