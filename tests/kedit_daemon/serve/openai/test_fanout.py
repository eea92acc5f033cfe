"""Several answers to one request, side by side."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pytest

from kedit_daemon.serve.errors import Refused
from kedit_daemon.serve.inference.engine import Figures
from kedit_daemon.serve.inference.types import Opened, Part, Wish
from kedit_daemon.serve.openai.fanout import Rows
from memory.errors import KeditError

WISHES = (Wish((1,)), Wish((2,)), Wish((3,)))


class Told:
    """An engine that answers as it was told to: per answer the generation, then parts or an
    error. The first answer goes on only when the last has begun."""

    def __init__(self, *told: Sequence[int | str | BaseException]) -> None:
        self.told = list(told)
        self.cut = 0  # answers that nobody let come to their end
        self.last = asyncio.Event()

    async def answer(self, wish: Wish) -> AsyncGenerator[Opened | Part]:
        told = self.told.pop(0)
        if not self.told:
            self.last.set()
        try:
            for item in told:
                if isinstance(item, BaseException):
                    raise item
                yield Opened(item, None) if isinstance(item, int) else Part(item)
                await asyncio.sleep(0)
            await self.last.wait()
            yield Part("", (), "stop", 1)
        except asyncio.CancelledError:
            self.cut += 1
            raise

    @property
    def figures(self) -> Figures:
        return Figures(0, 0, 0, 0, 0, ())

    def close(self) -> None:
        self.last.set()


async def collected(rows: Rows) -> list[str]:
    texts = [""] * len(WISHES)
    async for row, part in rows.parts():
        texts[row] += part.text
    return texts


def test_parts_come_to_their_rows_also_those_that_come_before_all_have_begun() -> None:
    async def run() -> None:
        rows = Rows(Told((4, "a", "b"), (4, "c"), (4, "d", "e", "f")), WISHES)
        assert [o.generation for o in await rows.open()] == [4, 4, 4]
        assert await collected(rows) == ["ab", "c", "def"]

    asyncio.run(run())


def test_a_request_has_one_generation_though_a_new_one_comes_in_between() -> None:
    async def run() -> None:
        engine = Told((4, "old"), (4,), (5,), (5, "new"), (5,), (5,))
        rows = Rows(engine, WISHES)
        assert [o.generation for o in await rows.open()] == [5, 5, 5]
        assert await collected(rows) == ["new", "", ""]
        assert engine.cut == 3

    asyncio.run(run())


def test_a_generation_that_never_settles_is_refused() -> None:
    async def run() -> None:
        rows = Rows(Told(*[(1,), (1,), (2,)] * 3), WISHES)
        with pytest.raises(Refused) as caught:
            await rows.open()
        assert caught.value.status == 503

    asyncio.run(run())


@pytest.mark.parametrize("error", [KeditError("no", code="busy"), ZeroDivisionError()])
def test_what_one_row_raises_comes_out(error: Exception) -> None:
    async def opening() -> None:
        rows = Rows(Told((4, "a"), (error,), (4,)), WISHES)
        with pytest.raises(type(error)):
            await rows.open()
        rows.close()

    async def later() -> None:
        rows = Rows(Told((4, "a"), (4, "b", error), (4,)), WISHES)
        await rows.open()
        with pytest.raises(type(error)):
            await collected(rows)
        rows.close()

    asyncio.run(opening())
    asyncio.run(later())


def test_closing_ends_the_rows() -> None:
    async def run() -> None:
        engine = Told((4,), (4,), (4,), ())
        rows = Rows(engine, WISHES)
        await rows.open()
        assert engine.cut == 0
        rows.close()
        await asyncio.sleep(0.01)
        assert engine.cut == 3

    asyncio.run(run())
