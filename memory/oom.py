"""Memory that runs out, of the machine or of the device: how it is known, and told as our error."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch

from memory.errors import KeditError

SHORT = "out-of-memory"  # the error's code
# What torch and its libraries say in an error that has no type of its own.
_SAID = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def shortage_told() -> Iterator[None]:
    """Let memory that runs out within be a KeditError (code "out-of-memory"); what the work held
    is given back, so that smaller work may find room."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        clear_frames(error.__traceback__)  # what failed is still held by where it failed
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise KeditError(
        f"there was no memory left: {why}",
        code=SHORT,
        hint="give it more memory, or let it do less at once: [flush] and [side] batch_facts",
    )
