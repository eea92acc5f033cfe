"""Memory that runs out, of the machine or of the device: how it is known, and told as our error."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch

from memory.errors import OutOfMemory

# What torch and its libraries say in an error that has no type of its own.
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error) for said in _OUT_OF_MEMORY_TEXTS
    )


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Let memory that runs out within be a OutOfMemory; what the work held
    is given back, so that smaller work may find room."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        clear_frames(error.__traceback__)  # what failed is still held by where it failed
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(f"there was no memory left: {why}")
