"""One reader's answer as it grows, from the tokens that the model gives to the parts that are
told."""

from collections.abc import Callable

from torch import Tensor

from kedit_daemon.serve.inference.detokenizer import Spelling
from kedit_daemon.serve.inference.types import Opened, Part, Token, Wish
from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.sampling import Chance, likelihood

Told = Opened | Part | KeditError


class Answering:
    """A wish, and what has been told of its answer."""

    def __init__(self, model: EditableModel, wish: Wish, tell: Callable[[Told], None]) -> None:
        self.wish, self.tell = wish, tell
        self.chance = Chance(wish.temperature, wish.top_p, wish.seed)
        self.token = -1
        """The last token, when there is one."""
        self.over = False
        """Whether no more is told: the answer is whole, has failed, or nobody reads it."""
        self.produced = 0
        """How many tokens, without one that ends the text."""
        self._ends = model.ends
        self._spelling = Spelling(model.decode, wish.ids, wish.stop)
        self._untold: list[Token] = []

    def take(self, token: int | KeditError, logits: Tensor) -> None:
        """The next token, or why there is none, with the logits (vocabulary,) that it is from."""
        if isinstance(token, KeditError):
            self.fail(token)
            return
        if token in self._ends:
            self._finish("stop")
            return
        self.token = token
        self.produced += 1
        if self.wish.logprobs is not None:
            self._untold.append(Token(token, *likelihood(logits, token, self.wish.logprobs)))
        text = self._spelling.add(token)
        if self._spelling.stopped:
            self._part(text, "stop")
        elif self.produced == self.wish.max_tokens:
            self._finish("length", text)
        elif text:
            self._part(text)

    def fail(self, error: KeditError) -> None:
        """The answer breaks off."""
        self.over = True
        self.tell(error)

    def _finish(self, why: str, text: str = "") -> None:
        text += self._spelling.rest()
        self._part(text, "stop" if self._spelling.stopped else why)

    def _part(self, text: str, finish: str | None = None) -> None:
        tokens, self._untold = tuple(self._untold), []
        if finish is not None:  # never back to False: the reader may leave in between
            self.over = True
        self.tell(Part(text, tokens, finish, self.produced if finish else 0))
