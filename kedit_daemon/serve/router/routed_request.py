"""A client's request as a router reads it: what it asks, and how facts are put into it.

Only what decides about facts is read. The engine judges the rest, so that it may have any field
that the engine knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from kedit_daemon.serve.openai.request_parser import BASE_SUFFIX
from memory.facts import Fact

if TYPE_CHECKING:  # it imports torch
    from kedit_daemon.serve.router.routed_facts import RoutedFact, RoutedFacts

ADAPTER_PREFIX = "kedit-"  # of adapters' names, which no client may ask for
FindFacts = Callable[["RoutedFacts", dict[str, Any]], "list[list[RoutedFact]]"]
"""Finds the facts of each prompt of a request."""


@dataclass(frozen=True)
class RoutedRequest:
    """The body of a request as it came, and its fields; none where it is not a JSON object."""

    body: bytes
    fields: dict[str, Any]

    @property
    def is_for_base(self) -> bool:
        """Check that the model is asked for without any fact."""
        return self.model.endswith(BASE_SUFFIX)

    @property
    def plain_body(self) -> bytes:
        """The body without facts, and with the engine's own name of the model."""
        if not self.is_for_base:
            return self.body
        return to_json({**self.fields, "model": self.model.removesuffix(BASE_SUFFIX)})

    @property
    def choices(self) -> int:
        """The number of answers to each prompt."""
        number = self.fields.get("n")
        return number if isinstance(number, int) and number > 0 else 1

    @property
    def conversation(self) -> str:
        """What all requests of one conversation begin with, up to the user's first turn."""
        turns = _read_turns(self.fields)
        first = next((n for n, (role, _) in enumerate(turns) if role == "user"), 0)
        return str(turns[: first + 1] or self.fields.get("prompt"))

    @property
    def model(self) -> str:
        """The model that is asked for; an empty text if none is."""
        model = self.fields.get("model")
        return model if isinstance(model, str) else ""


def read_request(body: bytes) -> RoutedRequest:
    """Read the body of a request."""
    try:
        fields = from_json(body)
    except ValueError:  # the engine says what is wrong with it
        fields = {}
    return RoutedRequest(body, fields if isinstance(fields, dict) else {})


# Conversations ------------------------------------------------------------------------------------


def find_chat_facts(facts: "RoutedFacts", fields: dict[str, Any]) -> "list[list[RoutedFact]]":
    """Find the facts that the last turn of a conversation asks for, if it is the user's."""
    turns = _read_turns(fields)
    if not turns or turns[-1][0] != "user":
        return [[]]
    history = "\n".join(text for _, text in turns[:-1])
    return [facts.find_in_chat(turns[-1][1], history)]


def add_chat_facts(
    fields: dict[str, Any], found: "Sequence[Sequence[RoutedFact]]"
) -> dict[str, Any]:
    """Return the fields of a conversation with facts before the words of its last turn."""
    *before, last = fields["messages"]
    lines = _write_lines([one.fact for one in found[0]])
    content = last["content"]
    if isinstance(content, str):
        content = f"{lines}{content}"
    else:
        content = [{"type": "text", "text": lines}, *content]
    return {**fields, "messages": [*before, {**last, "content": content}]}


def _read_turns(fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the (role, text) of each message; none where they are of another form."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return []
    return [(str(m.get("role")), _read_text(m.get("content"))) for m in messages]


def _read_text(content: Any) -> str:
    """Return the text of a message's content: a text, or parts of which some are text."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


# Texts to continue --------------------------------------------------------------------------------


def find_text_facts(facts: "RoutedFacts", fields: dict[str, Any]) -> "list[list[RoutedFact]]":
    """Find the fact of each text that is to be continued. Tokens are not read."""
    return [
        facts.find_in_text(prompt) if isinstance(prompt, str) else []
        for prompt in _list_prompts(fields)
    ]


def add_text_facts(
    fields: dict[str, Any], found: "Sequence[Sequence[RoutedFact]]"
) -> dict[str, Any]:
    """Return the fields of a completion with each text's fact in a line before it."""
    prompts = [
        f"{_write_lines([one.fact for one in facts])}{prompt}" if facts else prompt
        for prompt, facts in zip(_list_prompts(fields), found, strict=True)
    ]
    return {**fields, "prompt": prompts if isinstance(fields["prompt"], list) else prompts[0]}


def _list_prompts(fields: dict[str, Any]) -> list[Any]:
    prompt = fields.get("prompt")
    return prompt if isinstance(prompt, list) else [prompt]


def _write_lines(facts: Sequence[Fact]) -> str:
    """Write facts as lines of context."""
    return "".join(f"{write_statement(fact)}\n" for fact in facts)


def write_statement(fact: Fact) -> str:
    """Write a fact as a sentence."""
    statement = fact.statement.strip()
    return statement if statement.endswith((".", "!", "?")) else f"{statement}."
