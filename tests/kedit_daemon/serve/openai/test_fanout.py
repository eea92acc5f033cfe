"""Several answers to one request, side by side."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, GenerationRequest
from kedit_daemon.serve.openai.fanout import AnswerFanout
from memory.errors import KeditError

REQUESTS = (GenerationRequest((1,)), GenerationRequest((2,)), GenerationRequest((3,)))


class Script:
    """Answers by a script: per answer the generation, then parts or an error. The first answer
    goes on only when the last has begun."""

    def __init__(self, *answers: Sequence[int | str | BaseException]) -> None:
        self.answers = list(answers)
        self.cut = 0  # answers that were cancelled
        self.last = asyncio.Event()

    async def answer(self, _request: GenerationRequest) -> AsyncGenerator[AnswerStart | AnswerPart]:
        items = self.answers.pop(0)
        if not self.answers:
            self.last.set()
        try:
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                yield AnswerStart(item, None) if isinstance(item, int) else AnswerPart(item)
                await asyncio.sleep(0)
            await self.last.wait()
            yield AnswerPart("", (), "stop", 1)
        except asyncio.CancelledError:
            self.cut += 1
            raise


async def collected(rows: AnswerFanout) -> list[str]:
    texts = [""] * len(REQUESTS)
    async for row, part in rows.stream_parts():
        texts[row] += part.text
    return texts


def test_parts_come_to_their_rows_also_those_that_come_before_all_have_begun() -> None:
    async def run() -> None:
        rows = AnswerFanout(Script((4, "a", "b"), (4, "c"), (4, "d", "e", "f")).answer, REQUESTS)
        assert [o.generation for o in await rows.start_answers()] == [4, 4, 4]
        assert await collected(rows) == ["ab", "c", "def"]

    asyncio.run(run())


def test_a_request_has_one_generation_though_a_new_one_comes_in_between() -> None:
    async def run() -> None:
        script = Script((4, "old"), (4,), (5,), (5, "new"), (5,), (5,))
        rows = AnswerFanout(script.answer, REQUESTS)
        assert [o.generation for o in await rows.start_answers()] == [5, 5, 5]
        assert await collected(rows) == ["new", "", ""]
        assert script.cut == 3

    asyncio.run(run())


def test_a_generation_that_never_settles_is_refused() -> None:
    async def run() -> None:
        rows = AnswerFanout(Script(*[(1,), (1,), (2,)] * 3).answer, REQUESTS)
        with pytest.raises(RequestError) as caught:
            await rows.start_answers()
        assert caught.value.status == 503

    asyncio.run(run())


@pytest.mark.parametrize("error", [KeditError("no", code="busy"), ZeroDivisionError()])
def test_what_one_row_raises_comes_out(error: Exception) -> None:
    async def opening() -> None:
        rows = AnswerFanout(Script((4, "a"), (error,), (4,)).answer, REQUESTS)
        with pytest.raises(type(error)):
            await rows.start_answers()
        rows.close()

    async def later() -> None:
        rows = AnswerFanout(Script((4, "a"), (4, "b", error), (4,)).answer, REQUESTS)
        await rows.start_answers()
        with pytest.raises(type(error)):
            await collected(rows)
        rows.close()

    asyncio.run(opening())
    asyncio.run(later())


def test_closing_ends_the_rows() -> None:
    async def run() -> None:
        script = Script((4,), (4,), (4,), ())
        rows = AnswerFanout(script.answer, REQUESTS)
        await rows.start_answers()
        assert script.cut == 0
        rows.close()
        await asyncio.sleep(0.01)
        assert script.cut == 3

    asyncio.run(run())
