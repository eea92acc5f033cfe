"""One reader's answer as it grows, from the tokens that the model gives to the parts that are
told."""

from collections.abc import Callable

from torch import Tensor

from kedit_daemon.serve.inference.detokenizer import Detokenizer
from kedit_daemon.serve.inference.types import (
    AnswerPart,
    AnswerStart,
    GenerationRequest,
    TokenLogprobs,
)
from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.sampling import TokenSampler, rank_log_probs

StreamItem = AnswerStart | AnswerPart | KeditError


class AnswerStream:
    """A wish, and what has been told of its answer."""

    def __init__(
        self, model: EditableModel, wish: GenerationRequest, tell: Callable[[StreamItem], None]
    ) -> None:
        self.request, self.send_item = wish, tell
        self.chance = TokenSampler(wish.temperature, wish.top_p, wish.seed)
        self.token = -1
        """The last token, when there is one."""
        self.is_over = False
        """Whether no more is told: the answer is whole, has failed, or nobody reads it."""
        self.token_count = 0
        """How many tokens, without one that ends the text."""
        self._end_tokens = model.stop_tokens
        self._detokenizer = Detokenizer(model.decode, wish.prompt_ids, wish.stop_texts)
        self._unsent_tokens: list[TokenLogprobs] = []

    def add_token(self, token: int | KeditError, logits: Tensor) -> None:
        """The next token, or why there is none, with the logits (vocabulary,) that it is from."""
        if isinstance(token, KeditError):
            self.fail(token)
            return
        if token in self._end_tokens:
            self._finish_answer("stop")
            return
        self.token = token
        self.token_count += 1
        if self.request.logprobs is not None:
            self._unsent_tokens.append(
                TokenLogprobs(token, *rank_log_probs(logits, token, self.request.logprobs))
            )
        text = self._detokenizer.add_token(token)
        if self._detokenizer.is_stopped:
            self._send_part(text, "stop")
        elif self.token_count == self.request.max_tokens:
            self._finish_answer("length", text)
        elif text:
            self._send_part(text)

    def fail(self, error: KeditError) -> None:
        """The answer breaks off."""
        self.is_over = True
        self.send_item(error)

    def _finish_answer(self, why: str, text: str = "") -> None:
        text += self._detokenizer.flush()
        self._send_part(text, "stop" if self._detokenizer.is_stopped else why)

    def _send_part(self, text: str, finish: str | None = None) -> None:
        tokens, self._unsent_tokens = tuple(self._unsent_tokens), []
        if finish is not None:  # never back to False: the reader may leave in between
            self.is_over = True
        self.send_item(AnswerPart(text, tokens, finish, self.token_count if finish else 0))
