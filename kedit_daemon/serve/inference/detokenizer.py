"""Tokens become text, piece by piece: no half characters, and nothing of a text that stops."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no character, or not yet
PROMPT_TAIL = 8  # tokens of the prompt: some tokenizers drop the space before a text's first word


class Detokenizer:
    """The text of one answer. All pieces together are what decoding all tokens at once gives, up
    to the first of the texts that stop it."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._decode = decode
        self._ids = list(prompt[-PROMPT_TAIL:])  # those that the next one is decoded with
        self._decoded_count = len(self._ids)  # so many of them are in the text
        self._decoded_text = decode(self._ids)  # of those
        self._stop_texts = [text for text in stop if text]
        self._held_text = ""  # may turn out to be a stop text's beginning
        self.is_stopped = False
        """Whether a stop text has come; the piece that was then given is the last."""

    def add_token(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        return self._release_certain(self._take_new_text(text))

    def flush(self) -> str:
        """What was still held back, when no more tokens come."""
        text = self._release_certain(self._take_new_text(self._decode(self._ids)))
        if self.is_stopped:
            return text
        held, self._held_text = self._held_text, ""
        return text + held

    def _take_new_text(self, text: str) -> str:
        """What a text of the tokens has more than before; they then need not be decoded again."""
        known = self._decoded_text
        if not text.startswith(known):
            known = known.rstrip(REPLACEMENT)  # a character that the prompt began is whole now
        new = text[len(known) :]
        if new:
            self._ids = self._ids[self._decoded_count :]
            self._decoded_count, self._decoded_text = len(self._ids), self._decode(self._ids)
        return new

    def _release_certain(self, new: str) -> str:
        text = self._held_text + new
        found = [at for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held_text = True, ""
            return text[: min(found)]
        certain = len(text) - self._count_held(text)
        self._held_text = text[certain:]
        return text[:certain]

    def _count_held(self, text: str) -> int:
        """How many of the last characters may become a stop text."""
        longest = max(map(len, self._stop_texts), default=1) - 1
        for many in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-many:]) for stop in self._stop_texts):
                return many
        return 0
