"""Memory that runs out, told as our error."""

import weakref

import pytest
import torch

from memory.errors import KeditError
from memory.oom import as_out_of_memory, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_it_is_known_by_its_type_or_its_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(KeditError, match="no memory left") as caught, as_out_of_memory():
        raise error
    assert caught.value.code == "out-of-memory" and caught.value.hint


@pytest.mark.parametrize("error", [RuntimeError("a shape is wrong"), KeditError("x", code="busy")])
def test_other_errors_go_through(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, as_out_of_memory():
        raise error
    assert caught.value is error


def test_what_the_failed_work_held_is_given_back() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        held = torch.zeros(10)
        seen.append(weakref.ref(held))
        raise MemoryError

    with pytest.raises(KeditError), as_out_of_memory():
        work()
    assert seen[0]() is None
