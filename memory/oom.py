"""Detection of out-of-memory errors, of the machine or the device, and their conversion."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch

from memory.errors import OutOfMemory

# In the message of errors of torch and its libraries that have no type of their own.
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Check that an error reports that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY_TEXTS)


@contextmanager
def as_out_of_memory() -> Iterator[None]:
    """Convert out-of-memory errors of the block to OutOfMemory, and free the block's memory, so
    that smaller work may fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        clear_frames(error.__traceback__)  # the frames still hold the tensors of the block
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(f"there was no memory left: {why}")
