"""Tiny random vision-language models of six architectures, with their processors."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_models import COMMON, END, make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Blip2Processor,
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    **COMMON,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
VISION_KINDS = ("llava", "smolvlm", "idefics3", "qwen2_5_vl", "gemma3", "blip-2")
# The content of a turn is a text or a list of parts, as in the templates of such models.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def draw_picture(colour: Sequence[int] = (200, 30, 30), size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture of two colours, as a PNG file."""
    image = Image.new("RGB", size, (240, 240, 240))
    image.paste(tuple(colour), (3, 3, size[0] - 5, size[1] - 2))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def save_vision_model(kind: str, folder: Path) -> Path:
    """Write a random model of a kind with its processor, as `from_pretrained` wants it."""
    torch.manual_seed(0)
    special, written = SPECIAL_TOKENS[kind], PLACEHOLDERS[kind]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
        extra_special_tokens=(
            {}  # BLIP-2's processor has its own
            if kind == "blip-2"
            else {f"{name}_token": token for name, token in special.items()}
        ),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*special.values()]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("PICTURE", written)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    config = AutoConfig.for_model(kind, **_make_settings(kind, len(tokenizer), ids))
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
            # Gemma's: else an MLP weighs too little, and no token is much likelier than others.
            elif "post_feedforward" in name or (kind == "gemma3" and "model.norm" in name):
                parameter.fill_(16.0)
    model.save_pretrained(folder)
    if kind == "qwen2_5_vl":  # its processor wants a part for videos, which is not installed
        tokenizer.save_pretrained(folder)
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024
        )
        images.save_pretrained(folder)
    else:
        _make_processor(kind, tokenizer).save_pretrained(folder)
    return folder


IMAGE = {"image": "<image>"}
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "llava": IMAGE,
    "smolvlm": {
        **IMAGE,
        "around": "<fake_token_around_image>",
        "whole": "<global-img>",
        "end": "<end_of_utterance>",
    },
    "idefics3": {
        **IMAGE,
        "around": "<fake_token_around_image>",
        "whole": "<global-img>",
        "end": "<end_of_utterance>",
    },
    "qwen2_5_vl": {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    },
    "gemma3": {
        "image": "<image_soft_token>",
        "boi": "<start_of_image>",
        "eoi": "<end_of_image>",
    },
    "blip-2": IMAGE,
}
PLACEHOLDERS = {
    **dict.fromkeys(("llava", "smolvlm", "idefics3", "blip-2"), "<image>"),
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
}


def _make_settings(kind: str, size: int, ids: dict[str, int]) -> dict[str, Any]:
    """Settings of a configuration of a kind."""
    text = {**TEXT, "vocab_size": size}
    if kind == "llava":
        return {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**text, "model_type": "llama"},
            "image_token_id": ids["image"],
            "vision_feature_select_strategy": "full",
        }
    if kind in ("smolvlm", "idefics3"):
        return {
            "vision_config": VISION,
            "text_config": {**text, "model_type": "llama"},
            "image_token_id": ids["image"],
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        }
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        return {
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
                "out_hidden_size": 32,
            },
            "text_config": {**text, "rope_parameters": rope},
            "image_token_id": ids["image"],
            "video_token_id": ids["video"],
            "vision_start_token_id": ids["vision_start"],
            "vision_end_token_id": ids["vision_end"],
        }
    if kind == "gemma3":
        return {
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "text_config": {**text, "head_dim": 16, "query_pre_attn_scalar": 16},
            "image_token_index": ids["image"],
            "boi_token_index": ids["boi"],
            "eoi_token_index": ids["eoi"],
            "mm_tokens_per_image": 4,
        }
    return {
        "vision_config": VISION,
        "qformer_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 16,
            "vocab_size": size,
        },
        "text_config": {
            **{
                name: value
                for name, value in text.items()
                if name not in ("intermediate_size", "num_key_value_heads")
            },
            "model_type": "opt",
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
        },
        "num_query_tokens": 4,
        "image_token_index": ids["image"],
    }


def _make_processor(kind: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The processor of a kind."""
    side = {"height": 16, "width": 16}
    if kind == "llava":
        images: Any = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    if kind in ("smolvlm", "idefics3"):
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 16},
            max_image_size={"longest_edge": 16},
            do_image_splitting=False,
        )
        return Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
        )
    if kind == "gemma3":
        images = Gemma3ImageProcessorPil(size=side, image_seq_length=4)
        return Gemma3Processor(
            images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
        )
    return Blip2Processor(BlipImageProcessorPil(size=side), tokenizer, num_query_tokens=4)
