"""Processors, which turn a picture into a model's inputs: their loading, for pictures alone, and
what they write in a text.

Processors that take videos too want packages for these, which nothing here needs.
"""

import inspect
from collections.abc import Collection
from contextlib import suppress
from typing import Any, cast

from transformers import (
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMProcessor,
)


def load_processor(name: str, config: PreTrainedConfig) -> ProcessorMixin:
    """Load the processor of a model from a folder or hub id; no code from the model is run.

    Raises what transformers does, and TypeError where it finds a tokenizer alone.
    """
    kind = cast("type[ProcessorMixin] | None", PROCESSOR_MAPPING.get(type(config), None))
    if kind is not None and "video_processor" in _list_parts(kind):
        return _load_without_videos(name, kind)
    found = AutoProcessor.from_pretrained(name, trust_remote_code=False, backend="pil")
    if not isinstance(found, ProcessorMixin):
        raise TypeError(f"{name} says how it reads text, and not how it sees pictures")
    return found


def _load_without_videos(name: str, kind: type[ProcessorMixin]) -> ProcessorMixin:
    """Load a processor that takes videos too, without what is for these."""
    if kind is SmolVLMProcessor:  # writes pictures as this one does
        kind = Idefics3Processor
    settings = dict[str, Any]()
    with suppress(OSError):  # older models have no file of the processor's own
        settings = ProcessorMixin.get_processor_dict(name)[0]
    wanted = _list_parts(kind)
    parts: dict[str, Any] = {key: value for key, value in settings.items() if key in wanted}
    parts["tokenizer"] = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    parts["image_processor"] = AutoImageProcessor.from_pretrained(
        name, trust_remote_code=False, backend="pil"
    )
    if "video_processor" in wanted:
        parts["video_processor"] = None
        # transformers refuses a part that is None.
        kind = type(kind.__name__, (kind,), {"check_argument_for_proper_class": _accept_part})
    parts["chat_template"] = parts["tokenizer"].chat_template
    return kind(**parts)


def _list_parts(kind: type[ProcessorMixin]) -> Collection[str]:
    return inspect.signature(kind).parameters.keys()


def _accept_part(_self: ProcessorMixin, _name: str, part: object) -> type:
    return type(part)


def find_placeholder_id(model: PreTrainedModel) -> int:
    """Find the id of the token whose place a picture takes."""
    names = ("image_token_id", "image_token_index")
    return int(next(n for name in names if (n := getattr(model.config, name, None)) is not None))


def _make_chat(content: object) -> list[Any]:
    return [{"role": "user", "content": content}]


def find_written(processor: ProcessorMixin, placeholder: str) -> str:
    """Find how a picture is written: as the chat template does, else as the processor wants it."""
    if "num_query_tokens" in inspect.signature(type(processor).__init__).parameters:
        return ""  # BLIP-2's writes it by itself
    parts = [{"type": "image"}, {"type": "text", "text": "Qtextq"}]
    with suppress(Exception):  # a template may fail in any way, and there may be none
        with_it, without = (
            str(processor.apply_chat_template(chat))
            for chat in (_make_chat(parts), _make_chat(parts[1:]))
        )
        pairs = enumerate(zip(with_it, without, strict=False))
        start = next(n for n, (a, b) in pairs if a != b)
        written = with_it[start : with_it.index("Qtextq")]
        if written.strip():
            return written
    return str(getattr(processor, "boi_token", None) or placeholder)
