"""Answers many readers at once: one thread decodes all their rows together, step by step.

Who asks while others are answered joins at the next step. All rows that run at one time are
answered by the same weights: a reader who wants others, also because the daemon has just published
them, waits until those rows are done, and so do all who come later. So each answer is of one
generation, first token to last, and nobody waits for ever. Facts of the side memory come and go
without any waiting: a row keeps what fired for it.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from kedit_daemon.serve.inference.replica import MODEL_ERRORS, Replica
from kedit_daemon.serve.inference.stream import AnswerStream, StreamItem
from kedit_daemon.serve.inference.types import EDITED, AnswerPart, AnswerStart, GenerationRequest
from memory.errors import BadRequest, KeditError, Stopping
from memory.model.batch_decoder import BatchDecoder
from memory.model.sampling import choose_tokens

IDLE_SECONDS = 1.0  # between two looks at the home while nobody asks
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchStatus:
    """What the engine has done since its start, and how it stands."""

    requests: int  # taken in; those turned away are not among them
    running: int
    waiting: int
    generation: int  # served as edited
    problems: tuple[str, ...]  # what of the home could not be followed


class BatchEngine:
    """Owns the replica from its making to `close`."""

    def __init__(self, replica: Replica, most_rows: int, most_waiting: int) -> None:
        """`most_rows` are answered together, `most_waiting` more may wait for their turn."""
        self.replica, self.model = replica, replica.model
        self.max_rows, self.max_waiting = most_rows, most_waiting
        self._decoding = BatchDecoder(self.model, None)
        self._active_weights: tuple[bool, int] = (
            False,
            0,
        )  # with the side memory or not; the generation
        self._running: list[AnswerStream] = []
        self._joining: list[AnswerStream] = []  # being read in
        self._waiting: deque[AnswerStream] = deque()
        self._request_count = 0
        self._is_closing = False
        self._condition = threading.Condition()  # of who waits and joins, and of closing
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._thread.start()

    # Readers, each in its own event loop --------------------------------------------------------

    async def stream_answer(
        self, wish: GenerationRequest
    ) -> AsyncGenerator[AnswerStart | AnswerPart]:
        """What is told of an answer: Opened, then parts; the last one has a finish.

        Who closes the generator, or is cancelled, leaves at once. Raises KeditError: "too-long",
        "bad-request" (a token that the model does not have), "busy" and "stopping" before
        anything is told; "model" (no such generation), "corrupt" (its file) and "unreadable" (the
        database) in its place;
        "non-finite" and "unexpected" also later.
        """
        self._check_request(wish)
        told: asyncio.Queue[StreamItem] = asyncio.Queue()
        one = AnswerStream(self.model, wish, _make_sender(asyncio.get_running_loop(), told))
        self._add_waiting(one)
        try:
            while True:
                item = await told.get()
                if isinstance(item, KeditError):
                    raise item
                yield item
                if isinstance(item, AnswerPart) and item.finish_reason is not None:
                    return
        finally:
            one.is_over = True

    def _check_request(self, wish: GenerationRequest) -> None:
        prompt, most = len(wish.prompt_ids), self.model.max_positions
        if prompt < 1 or wish.max_tokens < 1 or prompt + wish.max_tokens > most:
            raise KeditError(
                f"a prompt of {prompt} tokens with an answer of up to {wish.max_tokens}: each must"
                f" be 1 at least, and both together {most} at most",
                code="too-long",
            )
        tokens = int(self.model.hf_model.get_input_embeddings().weight.shape[0])
        if not 0 <= min(wish.prompt_ids) <= max(wish.prompt_ids) < tokens:
            raise BadRequest(f"the model's tokens are 0 to {tokens - 1}")

    def _add_waiting(self, one: AnswerStream) -> None:
        with self._condition:
            if self._is_closing:
                raise _stopping_error()
            free = self.max_rows - len(self._running) - len(self._joining)
            waiting = self._count_waiting() - free  # without those who are about to join
            if waiting >= self.max_waiting:
                raise KeditError(
                    f"{waiting} requests are waiting already",
                    code="busy",
                    hint="try again in a moment",
                )
            self._waiting.append(one)
            self._request_count += 1
            self._condition.notify()

    def _count_waiting(self) -> int:
        """How many wait and have not left; with the lock."""
        return sum(not one.is_over for one in self._waiting)

    @property
    def status(self) -> BatchStatus:
        """As they are now."""
        with self._condition:
            return BatchStatus(
                self._request_count,
                len(self._running) + len(self._joining),
                self._count_waiting(),
                self.replica.generation,
                self.replica.problems,
            )

    def close(self) -> None:
        """End after the step that runs; who still reads is told so."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()
        self.replica.close()

    # The thread ---------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._run_step()
                except Exception as error:  # one step must not end the engine
                    self._abort_answers(error)
        finally:
            with self._condition:
                self._is_closing = True
            for one in [*self._running, *self._joining, *self._waiting]:
                one.fail(_stopping_error())

    def _wait_for_work(self) -> bool:
        """Until there is something to do, or it is time to look at the home; False: to end."""
        with self._condition:
            if not (self._waiting or self._running or self._is_closing):
                self._condition.wait(IDLE_SECONDS)
            return not self._is_closing

    def _run_step(self) -> None:
        self._drop_finished()
        if self._waiting or not self._running:
            self.replica.sync()
        self._admit_waiting()
        if self._joining:
            self._join_batch()
        if self._running:
            logits = self._decoding.decode_step([one.token for one in self._running])
            self._choose_tokens(self._running, logits)

    def _admit_waiting(self) -> None:
        """Call up those who may join now, first come first served."""
        while self._waiting and len(self._running) + len(self._joining) < self.max_rows:
            one = self._waiting[0]
            try:
                if not self._prepare_weights(one.request):
                    return
            except MODEL_ERRORS as error:
                self._fail_answers([one], error)
            with self._condition:
                self._waiting.popleft()
                if not one.is_over:
                    self._joining.append(one)

    def _prepare_weights(self, wish: GenerationRequest) -> bool:
        """Whether the weights are those that a reader wants; they are laid where nobody runs."""
        sided = wish.variant == EDITED
        wanted = (sided, self.replica.resolve_generation(wish.variant))
        if self._running or self._joining:
            return wanted == self._active_weights
        self.replica.set_generation(wanted[1])
        self._active_weights = wanted
        self._decoding = BatchDecoder(self.model, self.replica.side if sided else None)
        return True

    def _join_batch(self) -> None:
        """Read in those who were called up; if it fails, those who run go on."""
        joining = self._joining
        try:
            joined = self._decoding.prefill_rows([one.request.prompt_ids for one in joining])
        except MODEL_ERRORS as error:
            self._joining = []
            self._fail_answers(joining, error)
            return
        with self._condition:
            self._running, self._joining = [*self._running, *joining], []
        for one, match in zip(joining, joined.matches, strict=True):
            one.send_item(AnswerStart(self._active_weights[1], match))
        self._choose_tokens(joining, joined.logits)

    def _choose_tokens(self, rows: list[AnswerStream], logits: Tensor) -> None:
        """Next tokens of some rows, from logits (rows, vocabulary); who has enough leaves."""
        chosen = choose_tokens(logits, [one.chance for one in rows])
        for one, token, row in zip(rows, chosen, logits, strict=True):
            if not one.is_over:
                one.add_token(token, row)
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Let those go who have all, or have left; also of those who wait."""
        with self._condition:
            self._waiting = deque(one for one in self._waiting if not one.is_over)
        kept = [n for n, one in enumerate(self._running) if not one.is_over]
        self._decoding.keep_rows(kept)
        self._running = [self._running[n] for n in kept]

    def _abort_answers(self, error: Exception) -> None:
        """Tell those who run or join, or if it went wrong before anyone did, those who wait."""
        with self._condition:
            broken = [*self._running, *self._joining]
            self._running, self._joining = [], []
            if not broken:
                broken, self._waiting = list(self._waiting), deque()
        self._fail_answers(broken, error)

    def _fail_answers(self, broken: Sequence[AnswerStream], error: Exception) -> None:
        if not isinstance(error, KeditError):
            log.error("an answer broke off", exc_info=error)
            what = f"the answer broke off: {type(error).__name__}: {error}"
            error = KeditError(what, code="unexpected")
        for one in broken:
            one.fail(error)


def _stopping_error() -> KeditError:
    return Stopping("the daemon is stopping")


def _make_sender(
    loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[StreamItem]"
) -> Callable[[StreamItem], None]:
    def send(item: StreamItem) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody reads
            loop.call_soon_threadsafe(queue.put_nowait, item)

    return send
