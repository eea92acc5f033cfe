"""Interface of the methods that the bench measures: each takes a stream of facts in batches."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import Fact
from memory.model.generate import Overlay


@dataclass(frozen=True)
class MethodSetup:
    """Inputs of a method: the unedited model and a folder that lasts as long as the run.

    The folder is empty, unless the method is resumable and continues an interrupted run.
    has_policy: whether the stability policy may refuse a batch, for methods that have one.
    policy_limits: limits of that policy, by their configuration keys, that replace the defaults.
    """

    loaded_model: LoadedModel
    folder: Path
    batch_size: int
    seed: int
    has_policy: bool = True
    policy_limits: Mapping[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by the part of the work that they were spent on."""

    def __init__(self) -> None:
        self.seconds_by_part: dict[str, float] = {}

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add seconds to a part."""
        self.seconds_by_part[part] = self.seconds_by_part.get(part, 0.0) + seconds

    @contextmanager
    def time_part(self, part: str) -> Iterator[None]:
        """Add the block's time to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(part, time.perf_counter() - began)


class Method:
    """Base of all methods. The caller restores the model's weights when a run is over."""

    needs_single_facts = False  # whether it takes one fact at a time, whatever the batch size
    is_resumable = False  # whether its folder holds all it has done, so that a run can continue

    def __init__(self, setup: MethodSetup) -> None:
        self.setup, self.loaded_model = setup, setup.loaded_model
        self.model = setup.loaded_model.model
        self.stopwatch = Stopwatch()
        self.not_edited = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Edit the next batch of the stream into the model."""
        raise NotImplementedError

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose weights it may change."""
        return self.loaded_model.layers

    @property
    def overlay(self) -> Overlay | None:
        """The overlay on the weights under which the model answers, if there is one."""
        return None

    def frame_prompt(self, fact: Fact, prompt: str) -> str:
        """Return the text that the model reads when a question about this fact is asked."""
        return prompt

    def count_stored_bytes(self) -> int:
        """Count the bytes kept for the facts, not counting the weights themselves."""
        return 0

    def close(self) -> None:
        """Release files and databases."""


M = TypeVar("M", bound=Method)


@contextmanager
def open_method(
    method: type[M], loaded: LoadedModel, batch_size: int, seed: int, **options: Any
) -> Iterator[M]:
    """Yield the method in a temporary folder; `options` are further fields of MethodSetup."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = MethodSetup(loaded, Path(folder), batch_size, seed, **options)
        with closing(method(setup)) as opened:
            yield opened
