"""Checkpoints that no daemon may start with, each made from a whole tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

DOWN = "model.layers.2.mlp.down_proj.weight"
SPREAD = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 400}
UNQUANTISED = "not quantised, or a GGUF"  # in the remedy
BERT = {**SPREAD, "num_attention_heads": 2}
T5 = {"d_model": 32, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 400}


def change_settings(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors by name, in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _cut_embedding(folder: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_settings(folder, vocab_size=300)
    change_weights(folder, lambda t: t.update({n: t[n][:300].clone() for n in names}))


def _quantise(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: change_settings(folder, quantization_config=settings)


def _replace_tokenizer(add: Callable[[Any], object]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        tokenizer = make_tokenizer()
        add(tokenizer)
        tokenizer.save_pretrained(folder)

    return replace


def _empty_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"] |= {"vocab": {"<|endoftext|>": 0}, "merges": []}
    path.write_text(json.dumps(settings))


def _remove(pattern: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return remove


def _replace_model(made: Any, kind: str, **settings: Any) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        made.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)

    return replace


def _save_body(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])


def _poison(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN][3, 5] = float("nan")


# What is wrong -> how a tiny Llama is broken, a part of the message, and one of the remedy.
REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop(DOWN)),
        rf"1 tensor is missing \({DOWN}\)",
        "all files of one model",
    ),
    "unexpected": (
        lambda folder: change_settings(folder, num_hidden_layers=3),
        r"9 tensors are unknown to it \(model.layers.3.* and 6 more\)",
        "all files of one model",
    ),
    "mismatched": (
        lambda folder: change_settings(folder, intermediate_size=64),
        r"12 tensors are of another shape \(model.* of \(32, 96\) instead of \(32, 64\)",
        "all files of one model",
    ),
    "not finite": (
        lambda folder: change_weights(folder, _poison),
        f"numbers that are not finite, in {DOWN}",
        "all files of one model",
    ),
    "truncated": (_truncate, "the weights of .* cannot be read", "model.safetensors"),
    "no weights": (
        _remove("*.safetensors"),
        "no file named model.safetensors",
        "model.safetensors",
    ),
    "no settings": (_remove("config.json"), "there is no config.json", "config.json"),
    "broken settings": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json of .* not a valid JSON file",
        "config.json",
    ),
    "absurd settings": (
        lambda folder: change_settings(folder, num_attention_heads=0),
        "config.json of .* cannot be read",
        "config.json",
    ),
    "gptq": (
        _quantise(quant_method="gptq", bits=4),
        r"is quantised \(gptq",
        UNQUANTISED,
    ),
    "awq": (
        _quantise(quant_method="awq", bits=4),
        r"is quantised \(awq",
        UNQUANTISED,
    ),
    "bitsandbytes": (
        _quantise(quant_method="bitsandbytes", load_in_4bit=True),
        r"is quantised \(bitsandbytes",
        UNQUANTISED,
    ),
    "fp8": (_quantise(quant_method="fp8"), r"is quantised \(fp8", UNQUANTISED),
    "nameless quantisation": (
        _quantise(load_in_8bit=True),
        r"is quantised \(quantization_config",
        UNQUANTISED,
    ),
    "unknown": (
        lambda folder: change_settings(folder, model_type="monolith"),
        "of type 'monolith': transformers .* does not know it",
        "Llama",
    ),
    "remote code": (
        lambda folder: change_settings(folder, model_type="mine", auto_map={"AutoConfig": "a.B"}),
        "of type 'mine': it needs code of its own, which is never run",
        "Llama",
    ),
    "encoder": (
        _replace_model(AutoModelForMaskedLM, "bert", **BERT),
        "no causal language model, but BertForMaskedLM",
        "Llama",
    ),
    "encoder with a head": (
        _replace_model(AutoModelForCausalLM, "bert", **BERT),
        "type 'bert' reads in both directions",
        "Llama",
    ),
    "encoder and decoder": (
        _replace_model(AutoModelForSeq2SeqLM, "t5", **T5),
        "no causal language model, but T5ForConditionalGeneration",
        "Llama",
    ),
    "no head": (_save_body, "no causal language model, but LlamaModel", "Llama"),
    "adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "is an adapter, not a model",
        "merge_and_unload",
    ),
    "no tokenizer": (_remove("*token*"), "the tokenizer of .* cannot be read", "tokenizer"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "the tokenizer of .* cannot be read: KeyError",
        "tokenizer",
    ),
    "empty tokenizer": (_empty_tokenizer, "the tokenizer of .* is empty", "tokenizer's files"),
    "another tokenizer": (
        _cut_embedding,
        "48 of its tokens, such as .* no row among the 300",
        "tokenizer's files",
    ),
    "added token": (
        _replace_tokenizer(lambda made: made.add_tokens(["zzz"])),
        "1 of its tokens, such as 'zzz', ha",
        "tokenizer's files",
    ),
    "padding without a row": (
        _replace_tokenizer(lambda made: made.add_special_tokens({"pad_token": "<pad>"})),
        "1 of its tokens, such as '<pad>', ha",
        "tokenizer's files",
    ),
}


def make_refused(name: str, whole: Path, folder: Path) -> Path:
    """Write the checkpoint of this name, from a copy of a whole one."""
    shutil.copytree(whole, folder)
    REFUSED[name][0](folder)
    return folder
