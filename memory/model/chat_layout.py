"""Conversations as a model's chat template writes them."""

from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase


def render_chat(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, str]]) -> str:
    """Write a conversation, of roles and contents, as the prompt of its next reply. The token that
    begins a text is left out where the tokenizer adds it. Raises TemplateError."""
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in chat], tokenize=False, add_generation_prompt=True
    )
    added = cast(list[int], tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(str(tokenizer.bos_token)) if added else str(text)
