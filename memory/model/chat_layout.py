"""Turns of a conversation, found again in a prompt that a model's chat template has written.

Whoever reads a prompt has its tokens alone. What a user asks stands between the pieces of text that
the template puts around every turn, and these are learned from the template itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from memory.errors import BadRequest, KeditError

if TYPE_CHECKING:  # a server answers before transformers is loaded
    from transformers import PreTrainedTokenizerBase

    from memory.model.editable import EditableModel

MARKS = ("Qfirstq", "Qreplyq", "Qsecondq")  # turns that no template writes itself


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt in chat form: everything before the last user's turn, that turn, and the beginning
    of its reply, which is empty where the reply is still to come."""

    history: str
    question: str
    reply: str


@dataclass(frozen=True)
class ChatLayout:
    """Texts that a chat template writes before a user's turn, and between it and the reply."""

    user_header: str
    reply_header: str

    def split_prompt(self, text: str) -> ChatPrompt | None:
        """Find the turns of a text with its special tokens; None if it is not in chat form."""
        before, header, reply = text.rpartition(self.reply_header)
        history, start, question = before.rpartition(self.user_header)
        return ChatPrompt(history, question.strip(), reply.lstrip()) if header and start else None


def find_chat_layout(tokenizer: "PreTrainedTokenizerBase") -> ChatLayout | None:
    """Find the layout of a tokenizer's chat template; None where there is no template, or one that
    does not write a user's turns and replies one after the other."""
    if not tokenizer.chat_template:
        return None
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    try:
        text = render_chat(tokenizer, chat)
    except (TemplateError, ValueError, TypeError):
        return None
    if any(text.count(mark) != 1 for mark in MARKS):
        return None
    start, rest = text.split(MARKS[0])
    to_reply, rest = rest.split(MARKS[1])
    to_user, to_last_reply = rest.split(MARKS[2])
    # The first turn may follow a system message, or nothing.
    user_header = _find_shared_start(start[::-1], to_user[::-1])[::-1]
    # Some templates put more into the header of the reply that is to come.
    reply_header = _find_shared_start(to_reply, to_last_reply)
    if not user_header.strip() or not reply_header.strip():
        return None
    return ChatLayout(user_header, reply_header)


def render_chat(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation, of roles and contents, as the text of a prompt for its next reply. The
    token that begins a text is left out where the tokenizer adds it. Raises TemplateError."""
    text = _fill_template(tokenizer, chat)
    added = cast(list[int], tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if added else text


def write_chat(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation as `render_chat` does, for a person who asked for it. Raises KeditError:
    there is no template ("no-chat-template"), or it refuses the conversation ("bad-request")."""
    if not tokenizer.chat_template:
        raise KeditError(
            "the model has no chat template, so it continues text and is not asked",
            code="no-chat-template",
            hint="ask with a text to go on from, without --chat; or use a chat model",
        )
    try:
        return render_chat(tokenizer, chat)
    except TemplateError as error:
        raise BadRequest(
            f"the model's chat template refuses: {error}",
            hint="leave the system message out, or let the turns alternate",
        ) from error


def encode_chat(model: "EditableModel", chat: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the token ids of a conversation up to its next reply: the template writes the special
    tokens itself. Raises TemplateError."""
    return model.encode(_fill_template(model.tokenizer, chat), whole=False)


def _fill_template(tokenizer: "PreTrainedTokenizerBase", chat: Sequence[Mapping[str, str]]) -> str:
    turns = [dict(turn) for turn in chat]
    if _wants_parts(tokenizer):
        turns = list(map(_put_in_parts, turns))
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _wants_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Check that a template leaves a turn's text out unless it is in a list of parts, as those of
    models that take pictures may."""
    turn = {"role": "user", "content": MARKS[0]}
    try:
        if MARKS[0] in str(tokenizer.apply_chat_template([turn], tokenize=False)):
            return False
        parts = [_put_in_parts(turn)]
        return MARKS[0] in str(tokenizer.apply_chat_template(parts, tokenize=False))
    except (TemplateError, ValueError, TypeError):
        return False


def _put_in_parts(turn: Mapping[str, str]) -> dict[str, str]:
    """Return a turn with its text as the only part of its content."""
    parts = [{"type": "text", "text": turn["content"]}]
    return {**turn, "content": cast(str, parts)}


def _find_shared_start(one: str, other: str) -> str:
    """Return the longest beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    end = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
    return one[:end]
