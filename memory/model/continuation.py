"""Tokens of a text that goes on behind another one."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # a server answers before transformers is loaded
    from transformers import PreTrainedTokenizerBase

# Texts to put before, one of which stays apart: a tokenizer may put a space of its own before the
# first word of a text, and may merge a text's first letters with those before.
_LEADS = ("\n", "-", "a")


def encode_behind(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the token ids of just this text, behind others."""

    def encode(text: str) -> list[int]:
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])

    for lead in _LEADS:
        before, both = encode(lead), encode(lead + text)
        if before and both[: len(before)] == before:
            return both[len(before) :]
    return encode(text)
