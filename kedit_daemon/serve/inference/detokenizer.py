"""Tokens become text, piece by piece: no half characters, and nothing of a text that stops."""

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no character, or not yet
TAIL = 8  # tokens of the prompt: some tokenizers drop the space before a text's first word


class Spelling:
    """The text of one answer. All pieces together are what decoding all tokens at once gives, up
    to the first of the texts that stop it."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._decode = decode
        self._ids = list(prompt[-TAIL:])  # those that the next one is decoded with
        self._read = len(self._ids)  # so many of them are in the text
        self._text = decode(self._ids)  # of those
        self._stop = [text for text in stop if text]
        self._held = ""  # may turn out to be a stop text's beginning
        self.stopped = False
        """Whether a stop text has come; the piece that was then given is the last."""

    def add(self, token: int) -> str:
        """The text that is certain with one token more."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(BROKEN):
            return ""
        return self._certain(self._new(text))

    def rest(self) -> str:
        """What was still held back, when no more tokens come."""
        text = self._certain(self._new(self._decode(self._ids)))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _new(self, text: str) -> str:
        """What a text of the tokens has more than before; they then need not be decoded again."""
        known = self._text
        if not text.startswith(known):
            known = known.rstrip(BROKEN)  # a character that the prompt began is whole now
        new = text[len(known) :]
        if new:
            self._ids = self._ids[self._read :]
            self._read, self._text = len(self._ids), self._decode(self._ids)
        return new

    def _certain(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - self._beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def _beginning(self, text: str) -> int:
        """How many of the last characters may become a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for many in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-many:]) for stop in self._stop):
                return many
        return 0
