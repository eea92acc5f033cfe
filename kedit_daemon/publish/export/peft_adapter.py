"""Adapters in PEFT's layout, which engines load beside the model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from memory.model.checkpoint import WeightLocation

WEIGHTS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterFactors:
    """ΔW = B A of one matrix: where it is, B (hidden, rank) and A (rank, width)."""

    location: WeightLocation
    up: Tensor
    down: Tensor


def write_adapter(to: Path, base: str, factors: Sequence[AdapterFactors]) -> None:
    """Write an adapter of factors of one rank into a folder. base: the model's name or folder, by
    which an engine knows that the adapter is for it."""
    tensors: dict[str, Tensor] = {}
    for one in factors:
        name = f"base_model.model.{one.location.module_name}"
        tensors[f"{name}.lora_A.weight"] = one.down.contiguous()
        tensors[f"{name}.lora_B.weight"] = one.up.contiguous()
    save_file(tensors, to / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(_build_settings(base, factors), indent=2, sort_keys=True) + "\n"
    (to / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _build_settings(base: str, factors: Sequence[AdapterFactors]) -> dict[str, Any]:
    """Build PEFT's settings. Alpha is the rank, so that the product is not scaled."""
    rank = factors[0].down.shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [one.location.module_name for one in factors],
        "fan_in_fan_out": all(one.location.transposed for one in factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
