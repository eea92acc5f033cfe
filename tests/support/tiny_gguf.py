"""GGUF files of tiny Llamas, as llama.cpp's converter writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    folder: Path,
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    more: Mapping[str, Tensor] | None = None,
    without: str = "",
    architecture: str = "llama",
    parts: int = 0,
) -> Path:
    """Write the GGUF file of a Llama that `save_model` has made, with its matrices of a kind.

    `more` and `without`: tensors that are added and left out, by their names in the file.
    """
    settings = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_vocab_size(settings["vocab_size"])
    if parts:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer, folder)
    tensors = load_file(folder / "model.safetensors")
    named = {_rename(n): _permute(n, t, settings) for n, t in tensors.items()}
    for name, tensor in (named | dict(more or {})).items():
        if name == without:
            continue
        values = tensor.float().numpy()
        if values.ndim > 1:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    made = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in made["added_tokens"]}
    vocabulary = sorted(made["model"]["vocab"].items(), key=lambda item: item[1])
    kinds = [TokenType.CONTROL if n in special else TokenType.NORMAL for _, n in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def _rename(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part in NAMES:
        return f"{NAMES[part]}.{kind}"
    _, _, layer, within = part.split(".", 3)
    return f"blk.{layer}.{NAMES[within]}.{kind}"


def _permute(name: str, tensor: Tensor, settings: Mapping[str, int]) -> Tensor:
    """Order the rows of queries and keys as llama.cpp's rotary embedding wants them."""
    count = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    heads = [settings[key] for part, key in count.items() if part in name]
    if not heads:
        return tensor
    rows = np.arange(len(tensor)).reshape(heads[0], 2, -1).swapaxes(1, 2).ravel()
    return tensor[rows]
