"""Batched generation: one thread decodes the rows of all clients together, step by step.

A request joins the batch at the next step. All rows that run at one time use the same weights: a
request for other weights, also because the daemon has just published them, waits until those rows
are done, and so do all requests after it. So each answer is of one generation from its first token
to its last, and nobody waits for ever. Facts of the side memory come and go without any waiting: a
row keeps the fact that fired for it.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from kedit_daemon.serve.errors import RETRY_SECONDS, RequestError
from kedit_daemon.serve.inference.batch_decoder import BatchDecoder
from kedit_daemon.serve.inference.prompt_scorer import score_prompt
from kedit_daemon.serve.inference.replica import MODEL_ERRORS, Replica
from kedit_daemon.serve.inference.stream import AnswerStream, StreamItem
from kedit_daemon.serve.inference.types import (
    EDITED,
    AnswerPart,
    AnswerStart,
    EchoedPrompt,
    GenerationRequest,
)
from kedit_daemon.system.allocator import release_free_memory
from memory.errors import BadRequest, KeditError, Stopping
from memory.model.sampling import choose_tokens
from memory.picture_marks import FIRST_PICTURE_ID

IDLE_SECONDS = 1.0  # between two looks at the home while nobody asks
STOPPING = "the daemon is stopping"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchStatus:
    """The state of the engine."""

    requests: int  # accepted since the start
    running: int
    waiting: int
    generation: int  # served as edited
    problems: tuple[str, ...]  # changes of the home that could not be followed


class BatchEngine:
    """The owner of a replica, which it closes with `close`."""

    def __init__(self, replica: Replica, max_rows: int, max_waiting: int) -> None:
        """Answer `max_rows` requests together; `max_waiting` more may wait for their turn."""
        self.replica, self.model = replica, replica.model
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self._decoder = BatchDecoder(self.model, None)
        self._active_weights = (False, 0)  # (with the side memory, generation)
        self._running: list[AnswerStream] = []
        self._joining: list[AnswerStream] = []  # whose prompts are being read
        self._waiting: deque[AnswerStream] = deque()
        self._request_count = 0
        self._is_closing = False
        self._has_worked = True  # since freed memory was given back: the model was loaded
        self._condition = threading.Condition()  # guards the waiting and joining rows and closing
        self._thread = threading.Thread(target=self._run_loop, name="engine", daemon=True)
        self._thread.start()

    # Clients, each in its own event loop --------------------------------------------------------

    async def stream_answer(
        self, request: GenerationRequest
    ) -> AsyncGenerator[AnswerStart | AnswerPart]:
        """Yield an AnswerStart, then AnswerParts; the last one has a finish reason.

        Closing the generator, or cancelling its task, ends the answer. Raises KeditError:
        "too-long", "bad-request" (a token that the model does not have), "busy" or "stopping"
        before the first item; "model" (no such generation), "corrupt" (its file) or "unreadable"
        (the database) instead of it; "non-finite" and "unexpected" also later.
        """
        self._check_request(request)
        items: asyncio.Queue[StreamItem] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(item: StreamItem) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody reads
                loop.call_soon_threadsafe(items.put_nowait, item)

        stream = AnswerStream(self.model, request, send)
        self._add_waiting(stream)
        try:
            while True:
                item = await items.get()
                if isinstance(item, KeditError):
                    raise item
                yield item
                if isinstance(item, AnswerPart) and item.finish_reason is not None:
                    return
        finally:
            stream.is_over = True

    def _check_request(self, request: GenerationRequest) -> None:
        length, max_length = len(request.prompt_ids), self.model.max_positions
        least = 0 if request.echo else 1
        if length < 1 or request.max_tokens < least or length + request.max_tokens > max_length:
            raise KeditError(
                f"a prompt of {length} tokens with an answer of up to {request.max_tokens}: each"
                f" must be 1 at least, and both together {max_length} at most",
                code="too-long",
            )
        tokens = int(self.model.hf_model.get_input_embeddings().weight.shape[0])
        ids = list(request.prompt_ids)
        if self.model.pictures is not None:
            ids = [token for token in ids if token < FIRST_PICTURE_ID]
        if ids and not 0 <= min(ids) <= max(ids) < tokens:
            raise BadRequest(f"the model's tokens are 0 to {tokens - 1}")

    def _add_waiting(self, stream: AnswerStream) -> None:
        with self._condition:
            if self._is_closing:
                raise Stopping(STOPPING)
            free = self.max_rows - len(self._running) - len(self._joining)
            waiting = self._count_waiting() - free  # without those that are about to join
            if waiting >= self.max_waiting:
                message = f"{waiting} requests are waiting already: try again in a moment"
                raise RequestError(message, status=429, code="busy", retry=RETRY_SECONDS)
            self._waiting.append(stream)
            self._request_count += 1
            self._condition.notify()

    def _count_waiting(self) -> int:
        """Return the number of waiting requests that are still wanted; needs the lock."""
        return sum(not stream.is_over for stream in self._waiting)

    @property
    def status(self) -> BatchStatus:
        """The current state."""
        with self._condition:
            return BatchStatus(
                self._request_count,
                len(self._running) + len(self._joining),
                self._count_waiting(),
                self.replica.generation,
                self.replica.problems,
            )

    def close(self) -> None:
        """End after the current step; answers that still run end with an error."""
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
            for stream in [*self._running, *self._joining, *self._waiting]:
                stream.fail(Stopping(STOPPING))

    def _wait_for_work(self) -> bool:
        """Wait for a request, or until it is time to look at the home; return False to end."""
        with self._condition:
            is_idle = not (self._waiting or self._running or self._is_closing)
            if is_idle and not self._condition.wait(IDLE_SECONDS) and self._has_worked:
                release_free_memory()
                self._has_worked = False
            return not self._is_closing

    def _run_step(self) -> None:
        self._drop_finished()
        if self._waiting or not self._running:
            self.replica.sync()
        self._admit_waiting()
        if self._joining:
            self._has_worked = True
            self._join_batch()
        if self._running:
            logits = self._decoder.decode_step([stream.token for stream in self._running])
            self._choose_tokens(self._running, logits)

    def _admit_waiting(self) -> None:
        """Move requests that may join now from the queue, first come first served."""
        while self._waiting and len(self._running) + len(self._joining) < self.max_rows:
            stream = self._waiting[0]
            try:
                if not self._prepare_weights(stream.request):
                    return
            except MODEL_ERRORS as error:
                self._fail_answers([stream], error)
            with self._condition:
                self._waiting.popleft()
                if not stream.is_over:
                    self._joining.append(stream)

    def _prepare_weights(self, request: GenerationRequest) -> bool:
        """Return whether the weights are those of a request; set them if no row runs."""
        with_side = request.variant == EDITED
        wanted = (with_side, self.replica.resolve_generation(request.variant))
        if self._running or self._joining:
            return wanted == self._active_weights
        self.replica.set_generation(wanted[1])
        self._active_weights = wanted
        self._decoder = BatchDecoder(self.model, self.replica.side if with_side else None)
        return True

    def _join_batch(self) -> None:
        """Read the prompts of the joining rows; if that fails, the running rows go on."""
        joining = self._joining
        going_on = [row for row in joining if row.request.max_tokens]
        try:
            echoes = self._score_prompts([row.request for row in joining])
            prefilled = self._decoder.prefill_rows([row.request.prompt_ids for row in going_on])
        except MODEL_ERRORS as error:
            self._joining = []
            self._fail_answers(joining, error)
            return
        with self._condition:
            self._running, self._joining = [*self._running, *going_on], []
        rows = iter(prefilled.rows)
        for stream, echoed in zip(joining, echoes, strict=True):
            match = stream.start(next(rows)) if stream.request.max_tokens else None
            stream.send_item(AnswerStart(self._active_weights[1], match, echoed))
            if not stream.request.max_tokens:
                stream.end_without_token()
        if going_on:
            self._choose_tokens(going_on, prefilled.logits)

    def _score_prompts(self, requests: Sequence[GenerationRequest]) -> list[EchoedPrompt | None]:
        """Score the tokens of the prompts that are to be reported, each prompt once."""
        scored: dict[tuple[tuple[int, ...], int], EchoedPrompt] = {}
        found: list[EchoedPrompt | None] = []
        for request in requests:
            if not request.echo or request.logprobs is None:
                found.append(None)
                continue
            key = request.prompt_ids, request.logprobs
            if key not in scored:
                scored[key] = score_prompt(self.model, self._decoder.side_memory, *key)
            found.append(scored[key])
        return found

    def _choose_tokens(self, streams: list[AnswerStream], logits: Tensor) -> None:
        """Choose the next tokens of some rows, from logits (rows, vocabulary)."""
        tokens = choose_tokens(logits, [stream.sampler for stream in streams])
        for stream, token, row in zip(streams, tokens, logits, strict=True):
            if not stream.is_over:
                stream.add_token(token, row)
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Remove the rows and waiting requests that are over."""
        with self._condition:
            self._waiting = deque(stream for stream in self._waiting if not stream.is_over)
        kept = [n for n, stream in enumerate(self._running) if not stream.is_over]
        self._decoder.keep_rows(kept)
        self._running = [self._running[n] for n in kept]

    def _abort_answers(self, error: Exception) -> None:
        """Fail the running and joining rows; if there are none, the waiting requests."""
        with self._condition:
            broken = [*self._running, *self._joining]
            self._running, self._joining = [], []
            if not broken:
                broken, self._waiting = list(self._waiting), deque()
        self._fail_answers(broken, error)

    def _fail_answers(self, broken: Sequence[AnswerStream], error: Exception) -> None:
        if not isinstance(error, KeditError):
            log.error("Generation failed", exc_info=error)
            message = f"the answer broke off: {type(error).__name__}: {error}"
            error = KeditError(message, code="unexpected")
        for stream in broken:
            stream.fail(error)
