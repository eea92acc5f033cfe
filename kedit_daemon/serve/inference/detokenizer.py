"""Incremental detokenization: no half characters, and nothing of a text that stops the answer.

`tokenizers.decoders.DecodeStream` does not do it: it repeats the prompt if that ends within a
character, cannot return the bytes that it still holds when the tokens end, raises a bare Exception
on some bytes of byte-fallback tokenizers, and takes no tokenizer that is written in Python.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are no character, or not yet
PROMPT_TAIL = 8  # tokens of the prompt: some tokenizers drop the space before a text's first word


class Detokenizer:
    """The text of one answer. Its pieces together are the text of all tokens decoded at once, up
    to the first stop text."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._decode = decode
        self._ids = list(prompt[-PROMPT_TAIL:])  # the window that is decoded for the next token
        self._decoded_count = len(self._ids)  # tokens of the window whose text was released
        self._decoded_text = decode(self._ids)
        self._stop_texts = [text for text in stop if text]
        self._held_text = ""  # may become a stop text
        self._drops_blanks = False
        self.is_stopped = False
        """Check that a stop text has come; the piece returned with it is the last."""

    @property
    def is_behind_blank(self) -> bool:
        """Check, before the first token, that the prompt ends in white space."""
        return self._decoded_text[-1:].isspace()

    def drop_first_blank(self) -> None:
        """Let the answer begin without white space."""
        self._drops_blanks = True

    def add_token(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(REPLACEMENT) else self._release_certain(text)

    def flush(self) -> str:
        """Return the held text once there are no more tokens."""
        text = self._release_certain(self._decode(self._ids))
        return text if self.is_stopped else text + self._held_text

    def _release_certain(self, window: str) -> str:
        """Return the new text of the window that cannot become part of a stop text."""
        new = self._take_new_text(window)
        if self._drops_blanks:
            new = new.lstrip()
            self._drops_blanks = not new
        text = self._held_text + new
        ends = [end for stop in self._stop_texts if (end := text.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            return text[: min(ends)]
        certain = len(text) - self._count_held(text)
        self._held_text = text[certain:]
        return text[:certain]

    def _take_new_text(self, window: str) -> str:
        """Return the new text of the window, and drop the tokens before it."""
        known = self._decoded_text
        if not window.startswith(known):
            known = known.rstrip(REPLACEMENT)  # a character that the prompt began is whole now
        new = window[len(known) :]
        if new:
            self._ids = self._ids[self._decoded_count :]
            self._decoded_count, self._decoded_text = len(self._ids), self._decode(self._ids)
        return new

    def _count_held(self, text: str) -> int:
        """Return the number of characters at the end that may become a stop text."""
        longest = max(map(len, self._stop_texts), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop_texts):
                return count
        return 0
