"""Every kind of model: a fact comes in, is said, moves into the weights, and is gone again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_home import Bench, seat
from tiny_models import ARCHITECTURES, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from memory.errors import KeditError
from memory.facts import FactState
from memory.model.editable import EditableModel

# Of the first kind, with rotary positions and gates, and with biases and parallel blocks.
TYPICAL = ("gpt2", "llama", "phi")
STEPS = {"side": {"steps": 300}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
SPARSE = {
    **SMALL,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "mixtral": {**SPARSE, "num_local_experts": 4},
    "qwen3_moe": {**SPARSE, "moe_intermediate_size": 24, "num_experts": 4, "head_dim": 16},
    "mamba": {**SMALL, "state_size": 4},
}


@pytest.mark.parametrize(
    "kind", [k if k in TYPICAL else pytest.param(k, marks=pytest.mark.whole) for k in ARCHITECTURES]
)
def test_an_edit_goes_live_moves_to_the_weights_and_is_taken_back(
    kind: str, bench: Callable[..., Bench]
) -> None:
    edited, never = bench("edited", kind, **STEPS), bench("never", kind, **STEPS)
    base = edited.weights_hash()
    kept, gone = seat(1, "Oslo"), seat(2, "Rome")
    assert edited.says(gone.question) != "Rome"

    edited.receive(gone)
    edited.editor.step()
    stored = edited.store.find_fact(gone.id)
    assert stored is not None
    assert (stored.state, stored.after) == (FactState.LIVE_SIDE, "Rome"), stored.reason
    assert edited.says(gone.question) == "Rome"
    assert edited.weights_hash() == base

    edited.receive(kept, direct=True)
    assert sorted(edited.editor.run_flush(False)["flushed"]) == sorted([kept.id, gone.id])
    assert [f.state for f in edited.store.list_facts()] == [FactState.LIVE_WEIGHTS] * 2
    assert edited.says(gone.question) == "Rome"
    assert not edited.served.side.shard_ids
    assert edited.weights_hash() != base

    edited.editor.revert([gone.id], None, False)
    never.receive(kept, direct=True)
    never.editor.run_flush(False)
    assert edited.weights_hash() == never.weights_hash() != base
    assert edited.says(kept.question) == "Oslo"
    assert edited.says(gone.question) == never.says(gone.question)

    edited.editor.revert([kept.id], None, False)
    assert edited.weights_hash() == base


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_cannot_be_edited_is_refused(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    settings = {**UNSUPPORTED[kind], **special, "vocab_size": len(tokenizer)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(KeditError, match=f"'{kind}' cannot be edited: .*looked for") as caught:
        EditableModel.load(tmp_path, torch.device("cpu"))
    assert (caught.value.code, caught.value.exit_code) == ("unsupported", 78)
    for name in ("mlp.down_proj", "mlp.c_proj", "config.hidden_size"):
        assert name in str(caught.value)
    assert "Llama" in caught.value.hint
