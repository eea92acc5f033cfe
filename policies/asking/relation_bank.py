"""The bank of relations: how people ask about a subject, and how the answers are stated.

A relation has several wordings, which all its facts share. `{subject}` and `{target}` stand for
what varies.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

PRONOUN, POSSESSIVE = "it", "its"  # written where the subject was


@dataclass(frozen=True)
class Relation:
    """A relation with its wordings: questions, statements that end in the target, and answers that
    are typical of it."""

    relation: str
    kind: str = ""
    questions: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def extend(self, other: "Relation") -> "Relation":
        """Add the wordings of another entry for this relation."""
        return replace(
            self,
            questions=self.questions + other.questions,
            statements=self.statements + other.statements,
            answers=self.answers + other.answers,
        )


def read_bank(paths: Sequence[Path]) -> list[Relation]:
    """Read the relations of JSON Lines files. Entries of one name are one relation."""
    adapter, bank = TypeAdapter(Relation), dict[str, Relation]()
    for line in (line for path in paths for line in path.read_text("utf-8").splitlines()):
        entry = adapter.validate_json(line)
        known = bank.get(entry.relation)
        bank[entry.relation] = known.extend(entry) if known is not None else entry
    return list(bank.values())


def mask_subject(template: str, placeholder: str = "{subject}") -> str:
    """Write a pronoun where a wording names its subject."""
    return template.replace(f"{placeholder}'s", POSSESSIVE).replace(placeholder, PRONOUN)


def mask_statement(statement: str) -> str:
    """Write a statement up to its target, with a pronoun for the subject."""
    head, _, _ = statement.partition("{target}")
    return mask_subject(head).strip()


def mask_prompt(prompt: str, subject: str) -> str:
    """Write a fact's prompt or question with a pronoun for the subject, or for the `{}` that stands
    for it."""
    placeholder = "{}" if "{}" in prompt else subject
    return mask_subject(prompt, placeholder).strip(" ,")


def mask_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Write a pronoun for each span (start, end) of a text, which lie apart and in order."""
    parts, at = list[str](), 0
    for start, end in spans:
        parts += [text[at:start], PRONOUN]
        at = end
    masked = "".join([*parts, text[at:]])
    return re.sub(rf"\b{PRONOUN}['\u2019]s?(?!\w)", POSSESSIVE, masked)
