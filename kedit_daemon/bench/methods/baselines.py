"""Baselines without an edit: the model as it is, and the fact in the prompt."""

from collections.abc import Sequence

from kedit_daemon.bench.methods.method import Method, MethodSetup
from memory.facts import Fact


class Unedited(Method):
    """The unedited model."""

    def edit(self, facts: Sequence[Fact]) -> None:
        """Count the facts as not edited."""
        self.not_edited += len(facts)


class InContext(Method):
    """Upper bound without routing: each fact precedes the questions about it in the prompt."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self._stored_bytes = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Count the bytes of the facts' sentences."""
        self._stored_bytes += sum(len(_format_sentence(fact).encode()) for fact in facts)

    def frame_prompt(self, fact: Fact, prompt: str) -> str:
        """Put the fact before the prompt, also a neighbour's, whose answer should not change."""
        return f"{_format_sentence(fact)} {prompt}"

    def count_stored_bytes(self) -> int:
        return self._stored_bytes


def _format_sentence(fact: Fact) -> str:
    return f"{fact.statement}."
