"""Modules that take the place of a model's own while it runs."""

from typing import Any

from torch import Tensor, nn


class SkippedBlock(nn.Module):
    """Replacement of a block that is not run: returns a given hidden state, or its input."""

    def __init__(self, block: nn.Module, hidden: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: only its attributes are read
        self._hidden, self._as_tuple = hidden, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if self._hidden is None else self._hidden
        return (out, None) if self._as_tuple else out


class Float32Projection(nn.Module):
    """A down projection that runs in float32 inside a model of 16 bits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.inner(inputs.float())
        return output.to(inputs.dtype)
