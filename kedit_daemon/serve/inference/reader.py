"""The model as the API needs it: its engine, and how text becomes tokens and tokens text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from kedit_daemon.serve.errors import RequestError, bad_request
from memory.errors import BadPicture
from memory.model.chat_layout import encode_chat
from memory.picture_files import read_data_url
from memory.picture_marks import FIRST_PICTURE_ID, make_mark

if TYPE_CHECKING:  # they import torch, and the server answers before that is loaded
    from kedit_daemon.serve.inference.engine import BatchEngine
    from memory.model.editable import EditableModel
    from policies.health_limits import Thresholds


@dataclass(frozen=True)
class Reader:
    """An engine and its model, under the name that clients use."""

    name: str
    model: "EditableModel"
    engine: "BatchEngine"
    thresholds: "Thresholds | None" = None
    """The thresholds by which audits judge this model."""

    @property
    def positions(self) -> int:
        """The number of tokens that a prompt and its answer may have together."""
        return self.model.max_positions

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens of the model."""
        return int(self.model.hf_model.config.get_text_config().vocab_size)

    @cached_property
    def longest_token_chars(self) -> int:
        """An upper bound on the characters of a token: its spelling in the vocabulary, where a byte
        is at least one."""
        return max(map(len, self.model.tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return self.model.encode(text)

    def show_picture(self, url: str, place: str) -> str:
        """Show the model a picture, given as a data URL at a place of a request, and return its
        mark. Raises RequestError: it is none, or the model takes none."""
        if self.model.pictures is None:
            kinds = "parts of type 'image_url' are not supported here: the model reads text alone"
            where = f"{place}.type"
            raise RequestError(f"{where}: {kinds}", status=400, code="unsupported", param=where)
        try:
            return make_mark(self.model.pictures.add(read_data_url(url)).digest)
        except BadPicture as error:
            where = f"{place}.image_url.url"
            raise bad_request(f"{where}: {error}; {error.hint}", where) from error

    def encode_messages(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of (role, text) messages, up to where the assistant's next words
        begin: by the model's chat template, or as plain text where it has none.

        Raises RequestError: the template refuses them.
        """
        if not self.model.tokenizer.chat_template:
            return self.encode(format_plain_chat(messages))
        chat = [{"role": role, "content": text} for role, text in messages]
        try:
            return encode_chat(self.model, chat)
        except TemplateError as error:
            raise bad_request(f"the model's chat template refuses: {error}", "messages") from error

    def token_text(self, token: int) -> str:
        """Return a token's text within a sentence: with the space before it, which some tokenizers
        drop at the beginning of a text."""
        if token >= FIRST_PICTURE_ID:
            return ""
        if token not in self._token_texts:
            first, first_text = self._prefix_token
            text = cast(str, self.model.tokenizer.decode([first, token]))
            self._token_texts[token] = text.removeprefix(first_text)
        return self._token_texts[token]

    @cached_property
    def _prefix_token(self) -> tuple[int, str]:
        """A token to decode before others, and its text."""
        first = self.encode("a")[-1]
        return first, cast(str, self.model.tokenizer.decode([first]))

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        """The texts that were asked for: no more than the vocabulary has."""
        return {}


def format_plain_chat(messages: Sequence[tuple[str, str]]) -> str:
    """Format a conversation as plain text, for models without a chat template.

    A single message of the user is returned as it is: the model goes on from it. Otherwise each
    message is a paragraph, "User: …", and the last is "Assistant:".
    """
    if len(messages) == 1 and messages[0][0] == "user":
        return messages[0][1]
    return "".join(f"{role.capitalize()}: {text}\n\n" for role, text in messages) + "Assistant:"
