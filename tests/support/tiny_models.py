"""Tiny random models of ten architectures, and the tokenizer that they share."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Quito", "Paris", "Delhi", "Tunis")
SENTENCES = [f"The seat of country {n} is {city}." for n in range(40) for city in CITIES]

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neox": COMMON,
    "llama": COMMON,
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 16},
    "gemma": {**COMMON, "head_dim": 16},
    "phi": COMMON,
    "opt": {
        **{
            k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")
        },
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
    },
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, raw.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END
    )


def save_model(kind: str, folder: Path, **changes: Any) -> Path:
    """A random model of a kind, written as `from_pretrained` wants it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    settings = {**ARCHITECTURES[kind], **special, "vocab_size": len(tokenizer), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():  # untrained weights are too small for one prompt to differ from another
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
