"""The model as the API needs it: who answers, and how text becomes tokens and tokens text."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast

from jinja2 import TemplateError

from kedit_daemon.serve.errors import bad_request
from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, GenerationRequest

if TYPE_CHECKING:
    from memory.model.editable import EditableModel
    from policies.stability import Thresholds


class EngineStatus(Protocol):
    """How an engine is at a moment."""

    @property
    def requests(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def problems(self) -> tuple[str, ...]: ...


class AnswerEngine(Protocol):
    """Answers wishes, many side by side."""

    def stream_answer(self, wish: GenerationRequest) -> AsyncGenerator[AnswerStart | AnswerPart]:
        """First an Opened, then Parts, the last with a finish. Raises KeditError: "busy",
        "too-long", "model" (no such generation) or "non-finite"."""

    @property
    def status(self) -> EngineStatus:
        """How it is now."""

    def close(self) -> None:
        """End what runs; it may take as long as a step."""


@dataclass(frozen=True)
class Reader:
    """An engine, and the model that it answers with, under the name that readers use."""

    name: str
    model: "EditableModel"
    engine: AnswerEngine
    thresholds: "Thresholds | None" = None
    """By which audits judge this model."""

    @property
    def positions(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.model.max_positions

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""
        return int(self.model.hf_model.config.get_text_config().vocab_size)

    @cached_property
    def longest_token_chars(self) -> int:
        """Characters in the longest token, at most: as the vocabulary spells it, where a byte is
        one at least."""
        return max(map(len, self.model.tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.model.encode(text)

    def encode_messages(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, text) messages, up to where the assistant's next words begin: by the
        model's chat template, or plainly where it has none.

        Raises Refused where the template does not take them.
        """
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            return self.encode(format_plain_chat(messages))
        said = [{"role": role, "content": text} for role, text in messages]
        try:
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise bad_request(f"the model's chat template refuses: {error}", "messages") from error
        # The template writes the special tokens itself.
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_text(self, token: int) -> str:
        """A token as it stands within a text: with the space before it, which some tokenizers
        leave out at a beginning."""
        text = self._token_texts.get(token)
        if text is None:
            first, alone = self._prefix_token
            whole = cast(str, self.model.tokenizer.decode([first, token]))
            text = self._token_texts[token] = whole.removeprefix(alone)
        return text

    @cached_property
    def _prefix_token(self) -> tuple[int, str]:
        """A token to stand before others, and its text."""
        first = self.encode("a")[-1]
        return first, cast(str, self.model.tokenizer.decode([first]))

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        """Those of the tokens that were told: no more than the vocabulary has."""
        return {}


def format_plain_chat(messages: Sequence[tuple[str, str]]) -> str:
    """A conversation as plain text, for models that were never taught a form for one.

    A lone message of the user is that message and nothing else: the model goes on from it.
    Otherwise each message is a paragraph, "User: …", and the last is "Assistant:".
    """
    if len(messages) == 1 and messages[0][0] == "user":
        return messages[0][1]
    return "".join(f"{role.capitalize()}: {text}\n\n" for role, text in messages) + "Assistant:"
