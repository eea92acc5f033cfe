from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM

from memory.model.layout import find_down_projections

DOWN = {
    "gpt2": "transformer.h.3.mlp.c_proj",
    "gptj": "transformer.h.3.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.3.mlp.dense_4h_to_h",
    "phi": "model.layers.3.mlp.fc2",
    "opt": "model.decoder.layers.3.fc2",
}


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_a_model_without_weights_shows_where_they_would_be(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    config = AutoConfig.from_pretrained(model_folder(kind))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    blocks, downs = find_down_projections(model)
    assert len(blocks) == len(downs) == 4
    assert names[downs[3]] == DOWN.get(kind, "model.layers.3.mlp.down_proj")
