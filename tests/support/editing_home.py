"""A home with an editor on it, without a process around; and facts for it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.home import Home
from memory.db.store import Store
from memory.facts import Fact, Neighbour

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
OUTSIDE_LINES = 16  # of ordinary text, on which shards stay quiet


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_time(self, **by: float) -> None:
        self.now += timedelta(**by)


class Bench:
    """A home with an editor on it, without a process around."""

    def __init__(
        self,
        root: Path,
        loaded: LoadedModel,
        clock: Clock,
        config: Config,
        outside_lines: int = OUTSIDE_LINES,
    ) -> None:
        self.home, self.loaded, self.clock, self.config = Home(root), loaded, clock, config
        self.outside_lines = outside_lines
        self.home.create_folders()
        self.pulses = 0
        self.open()

    def open(self) -> None:
        self.store = Store(self.home.database_file, self.clock)
        self.served = LiveModel(self.loaded, self.store, self.home)
        self.served.restore()
        self.editor = Editor(self.served, self.config, self._pulse, self.outside_lines)

    def _pulse(self) -> None:
        self.pulses += 1

    def restart(self) -> None:
        """As after a crash: what was only in memory is gone."""
        self.store.close()
        self.loaded.model.set_deltas({})
        self.open()

    def receive(self, *facts: Fact, direct: bool = False) -> None:
        with self.store.db.transaction():
            for fact in facts:
                self.store.receive_fact(fact, "test.jsonl", direct)

    def settle(self) -> None:
        """Work until nothing waits."""
        for _ in range(100):
            if not self.editor.step():
                return
        raise AssertionError("the editor never comes to rest")

    def says(self, prompt: str) -> str:
        return self.served.answer_prompts([prompt], 12)[0].text

    def weights_hash(self) -> str:
        return self.loaded.model.weights_hash(self.loaded.layers)


LOOSE = {
    "stability": {
        f"{figure}_{verdict}": limit
        for figure in ("norm", "perplexity", "activation", "agreement", "retention")
        for verdict, limit in (("warn", 1e6), ("consolidate", 2e6), ("revert", 3e6))
    }
}


def seat(number: int, city: str = "Rome", **more: Any) -> Fact:
    """A fact for tests: the seat of a numbered country."""
    neighbours = (Neighbour(f"The seat of country {number + 20} is"),)
    return Fact(f"country {number}", "The seat of {} is", city, neighbours=neighbours, **more)
