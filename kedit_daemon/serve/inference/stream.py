"""An answer as it grows: from the tokens of the model to the parts that are sent."""

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
from memory.side.row_state import RowState
from memory.side.shards import RoutingMatch

StreamItem = AnswerStart | AnswerPart | KeditError


class AnswerStream:
    """A generation request, and the state of its answer."""

    def __init__(
        self,
        model: EditableModel,
        request: GenerationRequest,
        send_item: Callable[[StreamItem], None],
    ) -> None:
        self.request, self.send_item = request, send_item
        self.sampler = TokenSampler(request.temperature, request.top_p, request.seed)
        self.token = -1
        """The last token, once there is one."""
        self.is_over = False
        """Check that the answer is complete, has failed, or has lost its reader."""
        self.token_count = 0
        """The number of tokens, without one that ends the text."""
        self.row: RowState | None = None
        """Its row under the side memory, if there is one."""
        self._end_tokens = model.stop_tokens
        self._detokenizer = Detokenizer(model.decode, request.prompt_ids, request.stop_texts)
        self._unsent_tokens: list[TokenLogprobs] = []

    def start(self, row: RowState | None) -> RoutingMatch | None:
        """Take the row under the side memory, and return the fact that fires at the prompt's end.
        What the fact says needs no white space before it in a reply, or behind other."""
        self.row = row
        if row is None or row.match is None:
            return None
        if self.request.is_reply or self._detokenizer.is_behind_blank:
            self._detokenizer.drop_first_blank()
        return row.match

    def add_token(self, token: int | KeditError, logits: Tensor) -> None:
        """Take the next token, or why there is none, with the logits (vocabulary,) it is from."""
        if isinstance(token, KeditError):
            self.fail(token)
            return
        is_end, wanted = token in self._end_tokens, self.request.logprobs
        # Who scores a prompt asks for one token more, and takes the last of all for it.
        if wanted is not None and (self.request.echo or not is_end):
            ranked = rank_log_probs(logits, token, wanted)
            self._unsent_tokens.append(TokenLogprobs(token, *ranked))
        if is_end:
            self._finish_answer("stop")
            return
        self.token = token
        self.token_count += 1
        text = self._detokenizer.add_token(token)
        if self._detokenizer.is_stopped:
            self._send_part(text, "stop")
        elif self.token_count == self.request.max_tokens:
            self._finish_answer("length", text)
        elif text:
            self._send_part(text)

    def end_without_token(self) -> None:
        """End the answer where no token is asked for."""
        self._finish_answer("length")

    def fail(self, error: KeditError) -> None:
        """End the answer with an error."""
        self.is_over = True
        self.send_item(error)

    def _finish_answer(self, reason: str, text: str = "") -> None:
        text += self._detokenizer.flush()
        self._send_part(text, "stop" if self._detokenizer.is_stopped else reason)

    def _send_part(self, text: str, finish_reason: str | None = None) -> None:
        tokens, self._unsent_tokens = tuple(self._unsent_tokens), []
        if finish_reason is not None:  # never back to False: the client may leave in between
            self.is_over = True
        count = self.token_count if finish_reason else 0
        fired = tuple(self.row.reply_firings) if finish_reason and self.row else ()
        self.send_item(AnswerPart(text, tokens, finish_reason, count, fired))
