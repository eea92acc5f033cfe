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

from kedit_daemon.serve.inference.replica import BROKEN, Replica
from kedit_daemon.serve.inference.stream import Answering, Told
from kedit_daemon.serve.inference.types import EDITED, Opened, Part, Wish
from memory.errors import KeditError
from memory.model.batch_decoder import Decoding
from memory.model.sampling import choose

IDLE_SECONDS = 1.0  # between two looks at the home while nobody asks
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """What the engine has done since its start, and how it stands."""

    requests: int  # taken in; those turned away are not among them
    running: int
    waiting: int
    generation: int  # served as edited
    problems: tuple[str, ...]  # what of the home could not be followed


class Engine:
    """Owns the replica from its making to `close`."""

    def __init__(self, replica: Replica, most_rows: int, most_waiting: int) -> None:
        """`most_rows` are answered together, `most_waiting` more may wait for their turn."""
        self.replica, self.model = replica, replica.model
        self.most_rows, self.most_waiting = most_rows, most_waiting
        self._decoding = Decoding(self.model, None)
        self._served: tuple[bool, int] = (False, 0)  # with the side memory or not; the generation
        self._running: list[Answering] = []
        self._joining: list[Answering] = []  # being read in
        self._waiting: deque[Answering] = deque()
        self._requests = 0
        self._closing = False
        self._changed = threading.Condition()  # of who waits and joins, and of closing
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Readers, each in its own event loop --------------------------------------------------------

    async def answer(self, wish: Wish) -> AsyncGenerator[Opened | Part]:
        """What is told of an answer: Opened, then parts; the last one has a finish.

        Who closes the generator, or is cancelled, leaves at once. Raises KeditError: "too-long",
        "bad-request" (a token that the model does not have), "busy" and "stopping" before
        anything is told; "model" (no such generation), "corrupt" (its file) and "unreadable" (the
        database) in its place;
        "non-finite" and "unexpected" also later.
        """
        self._check(wish)
        told: asyncio.Queue[Told] = asyncio.Queue()
        one = Answering(self.model, wish, _sender(asyncio.get_running_loop(), told))
        self._queue(one)
        try:
            while True:
                item = await told.get()
                if isinstance(item, KeditError):
                    raise item
                yield item
                if isinstance(item, Part) and item.finish is not None:
                    return
        finally:
            one.over = True

    def _check(self, wish: Wish) -> None:
        prompt, most = len(wish.ids), self.model.positions
        if prompt < 1 or wish.max_tokens < 1 or prompt + wish.max_tokens > most:
            raise KeditError(
                f"a prompt of {prompt} tokens with an answer of up to {wish.max_tokens}: each must"
                f" be 1 at least, and both together {most} at most",
                code="too-long",
            )
        tokens = int(self.model.model.get_input_embeddings().weight.shape[0])
        if not 0 <= min(wish.ids) <= max(wish.ids) < tokens:
            raise KeditError(f"the model's tokens are 0 to {tokens - 1}", code="bad-request")

    def _queue(self, one: Answering) -> None:
        with self._changed:
            if self._closing:
                raise _stopping()
            free = self.most_rows - len(self._running) - len(self._joining)
            waiting = self._patient() - free  # without those who are about to join
            if waiting >= self.most_waiting:
                raise KeditError(
                    f"{waiting} requests are waiting already",
                    code="busy",
                    hint="try again in a moment",
                    exit_code=75,
                )
            self._waiting.append(one)
            self._requests += 1
            self._changed.notify()

    def _patient(self) -> int:
        """How many wait and have not left; with the lock."""
        return sum(not one.over for one in self._waiting)

    @property
    def figures(self) -> Figures:
        """As they are now."""
        with self._changed:
            return Figures(
                self._requests,
                len(self._running) + len(self._joining),
                self._patient(),
                self.replica.generation,
                self.replica.problems,
            )

    def close(self) -> None:
        """End after the step that runs; who still reads is told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.replica.close()

    # The thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # one step must not end the engine
                    self._break_off(error)
        finally:
            with self._changed:
                self._closing = True
            for one in [*self._running, *self._joining, *self._waiting]:
                one.fail(_stopping())

    def _wait(self) -> bool:
        """Until there is something to do, or it is time to look at the home; False: to end."""
        with self._changed:
            if not (self._waiting or self._running or self._closing):
                self._changed.wait(IDLE_SECONDS)
            return not self._closing

    def _turn(self) -> None:
        self._leave()
        if self._waiting or not self._running:
            self.replica.sync()
        self._admit()
        if self._joining:
            self._join()
        if self._running:
            logits = self._decoding.step([one.token for one in self._running])
            self._take(self._running, logits)

    def _admit(self) -> None:
        """Call up those who may join now, first come first served."""
        while self._waiting and len(self._running) + len(self._joining) < self.most_rows:
            one = self._waiting[0]
            try:
                if not self._suits(one.wish):
                    return
            except BROKEN as error:
                self._fail([one], error)
            with self._changed:
                self._waiting.popleft()
                if not one.over:
                    self._joining.append(one)

    def _suits(self, wish: Wish) -> bool:
        """Whether the weights are those that a reader wants; they are laid where nobody runs."""
        sided = wish.which == EDITED
        wanted = (sided, self.replica.number_of(wish.which))
        if self._running or self._joining:
            return wanted == self._served
        self.replica.use(wanted[1])
        self._served = wanted
        self._decoding = Decoding(self.model, self.replica.side if sided else None)
        return True

    def _join(self) -> None:
        """Read in those who were called up; if it fails, those who run go on."""
        joining = self._joining
        try:
            joined = self._decoding.join([one.wish.ids for one in joining])
        except BROKEN as error:
            self._joining = []
            self._fail(joining, error)
            return
        with self._changed:
            self._running, self._joining = [*self._running, *joining], []
        for one, match in zip(joining, joined.fired, strict=True):
            one.tell(Opened(self._served[1], match))
        self._take(joining, joined.logits)

    def _take(self, rows: list[Answering], logits: Tensor) -> None:
        """Next tokens of some rows, from logits (rows, vocabulary); who has enough leaves."""
        chosen = choose(logits, [one.chance for one in rows])
        for one, token, row in zip(rows, chosen, logits, strict=True):
            if not one.over:
                one.take(token, row)
        self._leave()

    def _leave(self) -> None:
        """Let those go who have all, or have left; also of those who wait."""
        with self._changed:
            self._waiting = deque(one for one in self._waiting if not one.over)
        kept = [n for n, one in enumerate(self._running) if not one.over]
        self._decoding.keep(kept)
        self._running = [self._running[n] for n in kept]

    def _break_off(self, error: Exception) -> None:
        """Tell those who run or join, or if it went wrong before anyone did, those who wait."""
        with self._changed:
            broken = [*self._running, *self._joining]
            self._running, self._joining = [], []
            if not broken:
                broken, self._waiting = list(self._waiting), deque()
        self._fail(broken, error)

    def _fail(self, broken: Sequence[Answering], error: Exception) -> None:
        if not isinstance(error, KeditError):
            log.error("an answer broke off", exc_info=error)
            what = f"the answer broke off: {type(error).__name__}: {error}"
            error = KeditError(what, code="unexpected")
        for one in broken:
            one.fail(error)


def _stopping() -> KeditError:
    return KeditError("the daemon is stopping", code="stopping", exit_code=75)


def _sender(
    loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Told]"
) -> Callable[[Told], None]:
    def send(item: Told) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody reads
            loop.call_soon_threadsafe(queue.put_nowait, item)

    return send
