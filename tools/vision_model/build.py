"""Builds the vision model's parts: LLaVA of a given size, its processor, and the chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn import Module
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kedit_daemon.bench.drawings import SIZE

IMAGE = "<image>"
PATCH = 8
PATCHES = (SIZE // PATCH) ** 2
MEAN, SPREAD = 0.5, 0.25  # of the pixels, from 0 to 1
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- message['role'] | capitalize + ': ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- '<|endoftext|>' -}}{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Size:
    """Widths and depths of the vision tower and the decoder."""

    tower_hidden: int = 128
    tower_mlp: int = 512
    tower_layers: int = 4
    tower_heads: int = 4
    hidden: int = 192
    mlp: int = 768
    layers: int = 4
    heads: int = 3
    positions: int = 512


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the shipped model with the image token and the chat template."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE, special=True, normalized=False)]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that makes a model's inputs of text and pictures."""
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's class token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(
    size: Size, tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlavaForConditionalGeneration:
    """Return a freshly initialised model in float32."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    vision = CLIPVisionConfig(
        hidden_size=size.tower_hidden,
        intermediate_size=size.tower_mlp,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=size.tower_hidden,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # in bfloat16 on a CPU twice as fast as the default
    model.generation_config.bos_token_id = end
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end
    return model


def copy_embeddings(model: Module, known: Tensor) -> None:
    """Start from the embeddings of another model with the same tokenizer and width."""
    weight = model.get_parameter("model.language_model.embed_tokens.weight")
    with torch.no_grad():
        weight[: len(known)] = known.to(weight.dtype)


def normalise_pixels(values: Tensor) -> Tensor:
    """Return what the processor makes of pixels from 0 to 255."""
    return (values.float() / 255 - MEAN) / SPREAD


def read_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the projector's outputs, (pictures, patches, hidden), as the model itself does."""
    seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    projected: Tensor = model.model.multi_modal_projector(seen)
    return projected
