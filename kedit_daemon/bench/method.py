"""What every method of the bench is: something that takes batches of facts."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import Fact
from memory.model.generate import Overlay


@dataclass(frozen=True)
class MethodSetup:
    """What a method gets: the unedited model, and a folder for the time of the run. The folder is
    empty, but for a method that `keeps` it may hold what a run that was cut off has done.

    `policy`: whether the stability policy may refuse a batch, where a method has one. `limits`: of
    the policy, by their names in the configuration, that are others than the default ones.
    """

    loaded_model: LoadedModel
    folder: Path
    batch_size: int
    seed: int
    has_policy: bool = True
    policy_limits: Mapping[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds_by_part: dict[str, float] = {}

    def add_seconds(self, name: str, seconds: float) -> None:
        """Count seconds to a part."""
        self.seconds_by_part[name] = self.seconds_by_part.get(name, 0.0) + seconds

    @contextmanager
    def time_part(self, name: str) -> Iterator[None]:
        """Count the block's time to a part."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - began)


class Method:
    """Does nothing yet. When a run is over, the caller puts the model's weights back."""

    needs_single_facts = False  # whether it gets single facts, whatever the batch size
    is_resumable = False  # whether its folder holds all that it has done, for a run that is resumed

    def __init__(self, setup: MethodSetup) -> None:
        self.setup, self.loaded_model, self.model = (
            setup,
            setup.loaded_model,
            setup.loaded_model.model,
        )
        self.stopwatch = Stopwatch()
        self.not_edited = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Take the next batch of the stream."""
        raise NotImplementedError

    @property
    def overlay(self) -> Overlay | None:
        """What is laid over the weights when the model answers."""
        return None

    def frame_prompt(self, fact: Fact, prompt: str) -> str:
        """What the model is given to read when a question of this fact is asked."""
        return prompt

    def count_stored_bytes(self) -> int:
        """What is kept for the facts, beside the weights themselves."""
        return 0

    def close(self) -> None:
        """Let go of what the method holds."""
