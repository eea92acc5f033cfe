"""A home whose model runs in bfloat16: facts come, move and go as in any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
from editing_home import LOOSE, Bench, Clock, seat
from tiny_models import CITIES
from torch import bfloat16, float32
from transformers import AutoModelForCausalLM, AutoTokenizer

from kedit_daemon.config import Config
from kedit_daemon.editing.model_loading import CanaryTexts, load_model, read_canary_texts
from memory.errors import KeditError
from memory.facts import FactState


@pytest.fixture
def stored(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    source, folder = model_folder("llama"), tmp_path / "low"
    AutoModelForCausalLM.from_pretrained(source, dtype=bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_a_fact_is_learned_in_both_tiers_and_leaves_no_trace(stored: Path, tmp_path: Path) -> None:
    texts, cache = read_canary_texts(), tmp_path / "cache"
    cache.mkdir()
    few = CanaryTexts(texts.lines[:6], texts.statements[:24])
    loaded = load_model(str(stored), "cpu", cache, iter, few, dtype="bfloat16")
    assert loaded.model.dtype is bfloat16
    assert {loaded.model.weight(n).dtype for n in loaded.layers} == {float32}
    config = Config.model_validate(LOOSE | {"side": {"steps": 300}})
    at, fact = Bench(tmp_path / "home", loaded, Clock(), config), seat(1, CITIES[1])
    before = at.weights_hash()
    at.receive(fact)
    at.settle()
    assert at.store.find_fact(fact.id).state is FactState.LIVE_SIDE
    assert at.says(fact.question).startswith(CITIES[1])
    assert at.editor.audit()["verdict"] == "keep"
    at.editor.run_flush(dry_run=False)
    assert at.weights_hash() != before or not at.served.list_weights_facts()
    at.restart()
    assert at.says(fact.question).startswith(CITIES[1])
    at.editor.revert([fact.id], None, False)
    assert at.weights_hash() == before
    at.store.close()


def test_weights_that_would_be_rounded_are_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(KeditError, match="stored in float32, and dtype is bfloat16") as caught:
        load_model(str(model_folder("llama")), "cpu", tmp_path, iter, dtype="bfloat16")
    assert caught.value.exit_code == 78
    assert 'dtype = "float32"' in caught.value.hint
