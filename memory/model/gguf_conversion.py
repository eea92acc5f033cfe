"""Conversion of a GGUF file, the format of llama.cpp, to a checkpoint as transformers writes it.

The weights are dequantised to float32. What numbers a quantised file stands for is defined by the
format, so the same file gives the same checkpoint.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memory.errors import UnusableModel
from memory.files import to_os_error
from memory.model.strict_loading import check_tensors, refuse_unreadable

HINT_GGUF = "take the whole file of a Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 or GPT-2"
HINT_JOIN = "join its parts: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
FLOAT32_BYTES = 4
# Rotary frequencies that llama.cpp stores as tensors, and transformers computes.
COMPUTED = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def count_numbers(file: Path) -> int:
    """Count the numbers in the tensors of a GGUF file.

    Raises UnusableModel: it is no such file, is cut off, or is a part of a split one.
    """
    with refuse_unreadable(f"the GGUF file {file}", HINT_GGUF):
        reader = GGUFReader(file)
        split = reader.fields.get("split.count")
        if split is not None and (parts := int(split.contents())) > 1:
            raise UnusableModel(f"{file} is one of {parts} parts of a file", hint=HINT_JOIN)
        tensors = [part for part in reader.tensors if not part.name.startswith(COMPUTED)]
        return sum(int(part.n_elements) for part in tensors)


def convert_gguf(file: Path, to: Path, numbers: int) -> None:
    """Write the model of a GGUF file into a folder: config.json, safetensors and tokenizer.

    `numbers`: of `count_numbers`.

    Raises UnusableModel: transformers does not know the architecture, or the file lacks a tensor
    of it, or has others. OSError: the disk fails or is full.
    """
    with refuse_unreadable(f"the GGUF file {file}", HINT_GGUF):
        model, tokenizer = _read_gguf(file)
        _check_all_read(file, model, numbers)
    try:
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)
    except SafetensorError as error:
        raise to_os_error(error, to) from error
    settings_mode = (to / "config.json").stat().st_mode
    for path in to.glob("*.safetensors"):  # which are written for their owner alone
        path.chmod(settings_mode)


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    named = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with redirect_stderr(io.StringIO()):  # of a progress bar that cannot be turned off
        read = AutoModelForCausalLM.from_pretrained(
            **named,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**named)
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], read)
    check_tensors(str(file), found)
    return model, tokenizer


def _check_all_read(file: Path, model: PreTrainedModel, numbers: int) -> None:
    """Refuse a file with more numbers than the model: transformers leaves out, without a word,
    tensors whose names it does not know."""
    read = sum(parameter.numel() for parameter in model.parameters())
    if numbers != read:
        problem = f"the GGUF file {file} holds {numbers} numbers, and its architecture has {read}"
        raise UnusableModel(problem, hint=HINT_GGUF)
