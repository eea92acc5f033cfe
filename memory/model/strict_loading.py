"""Loading of a model that takes nothing on trust: what is not whole is refused.

transformers fills tensors that a checkpoint lacks with random numbers, leaves out those that it
does not know, and warns; the daemon would keep such a model current for ever.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from memory.errors import KeditError, UnsupportedModel, UnusableModel
from memory.model.checkpoint import list_weight_files
from memory.model.layout import HINT_DECODER, find_down_projections
from memory.model.picture_processor import load_processor
from memory.oom import is_out_of_memory

HINT_FOLDER = "give a folder with config.json, model.safetensors and a tokenizer"
HINT_UNQUANTISED = "take the checkpoint that is not quantised, or a GGUF file of the model"
HINT_WHOLE = "take all files of one model: some are cut off, missing, or another model's"
HINT_TOKENIZER = "put the tokenizer's files of this very model beside its weights"
HINT_PROCESSOR = "put the files of its processor beside the weights, such as processor_config.json"
HINT_ADAPTER = "merge it into its model with PEFT's merge_and_unload, and give the result"
META = torch.device("meta")
# Masks that GPT-2, GPT-J, GPT-Neo and GPT-NeoX once saved beside their weights.
SAVED_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
MOST_NAMES = 3  # of tensors in a message
PLAIN_TEXT = "The capital of France is"  # what any tokenizer has tokens for


def load_strictly(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin | None]:
    """Load a causal language model in a dtype, its tokenizer, and the processor of one that takes
    pictures, from a folder or hub id.

    Only safetensors are read, and no code from the model is run. On the device "meta" the files'
    headers alone are read, which shows all that is wrong except for numbers that are not finite.

    Raises UnusableModel: a file is missing or broken; a tensor is missing, unknown, of another
    shape, or holds NaN or infinity; the checkpoint is quantised; the tokenizer does not fit.
    UnsupportedModel: it is no causal language model.
    """
    with refuse_unreadable(f"config.json of {name}"):
        _check_config(name)
    with refuse_unreadable(f"the weights of {name}"):
        model, found = _read_model(name, device, dtype)
        check_tensors(name, found)
        _check_causal(model)
        _check_finite(name, () if device == META else model.named_parameters())
    with refuse_unreadable(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
        _check_tokenizer(name, tokenizer, rows)
    return model, tokenizer, _read_processor(name, model)


def _read_processor(name: str, model: PreTrainedModel) -> ProcessorMixin | None:
    """Read the processor of a model that takes pictures; None for one of text alone."""
    if not hasattr(model.config, "vision_config"):
        return None
    with refuse_unreadable(f"the processor of {name}", HINT_PROCESSOR):
        return load_processor(name, model.config)


def check_model_folder(folder: Path) -> None:
    """Check that a model can be loaded and edited, without the memory that it would take.

    Raises UnusableModel or UnsupportedModel, as `load_strictly` and `find_down_projections` do.
    """
    model, *_ = load_strictly(str(folder), META)
    find_down_projections(model)
    with refuse_unreadable(f"the weights of {folder}"):
        _check_finite(str(folder), _read_tensors(list_weight_files(folder)))


@contextmanager
def refuse_unreadable(part: str, hint: str = HINT_FOLDER) -> Iterator[None]:
    """Turn any error of transformers about bad files into UnusableModel, and keep it quiet.

    `part` names what is read in the block; `hint` is the remedy.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except KeditError:
        raise
    except Exception as error:  # which one a broken file leads to is nowhere defined
        if is_out_of_memory(error):
            raise
        raise UnusableModel(f"{part} cannot be read: {_summarise(error)}", hint=hint) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _summarise(error: Exception) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, LookupError):
        lines.insert(0, f"{type(error).__name__}:")  # the message may be a word alone
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _check_config(name: str) -> None:
    """Refuse by config.json alone what transformers would take for something else, or would want
    other packages, code or files for."""
    if cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False):
        raise UnusableModel(f"{name} is an adapter, not a model", hint=HINT_ADAPTER)
    settings: Mapping[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    parts = [settings, *(part for part in settings.values() if isinstance(part, Mapping))]
    for key in ("quantization_config", "compression_config"):
        for given in [part[key] for part in parts if part.get(key)]:
            method = given.get("quant_method") if isinstance(given, Mapping) else None
            problem = f"the model {name} is quantised ({method or key} in config.json)"
            raise UnusableModel(problem, hint=HINT_UNQUANTISED)
    if not settings:
        raise UnusableModel(f"there is no config.json in {name}", hint=HINT_FOLDER)
    kind = settings.get("model_type")
    if kind not in CONFIG_MAPPING:
        needs = (
            "it needs code of its own, which is never run"
            if "auto_map" in settings
            else (f"transformers {transformers.__version__} does not know it")
        )
        problem = f"the model {name} is of type {kind!r}: {needs}"
        raise UnsupportedModel(problem, hint=HINT_DECODER)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    made_for = getattr(config, "architectures", None) or []
    sees = hasattr(config, "vision_config")
    known = type(config) in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if sees else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    decoders = [n for n in made_for if "CausalLM" in n or "LMHead" in n or "Generation" in n]
    if not known or config.is_encoder_decoder or (made_for and not decoders):
        form = ", ".join(made_for) or type(config).__name__
        problem = f"the model {name} is no causal language model, but {form}"
        raise UnsupportedModel(problem, hint=HINT_DECODER)


def _read_model(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read the model, and return what transformers found of its tensors."""
    sees = hasattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "vision_config")
    read = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        name,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        device_map={"": META} if device == META else None,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        output_loading_info=True,
    )
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], read)
    return model.to(device), found  # type: ignore[arg-type]


def check_tensors(name: str, found: Mapping[str, Any]) -> None:
    """Raise UnusableModel where the tensors are not exactly the architecture's.

    `found` is transformers' loading information: without what is tied, and without most of what
    older versions saved.
    """
    unknown = sorted(n for n in found["unexpected_keys"] if not SAVED_MASKS.search(n))
    shapes = [
        f"{tensor} of {tuple(stored)} instead of {tuple(wanted)}"
        for tensor, stored, wanted in sorted(found["mismatched_keys"])
    ]
    problems = [
        *_describe_tensors("missing", sorted(found["missing_keys"])),
        *_describe_tensors("unknown to it", unknown),
        *_describe_tensors("of another shape", shapes),
    ]
    if problems:
        problem = f"the tensors of {name} are not those of its architecture: {'; '.join(problems)}"
        raise UnusableModel(problem, hint=HINT_WHOLE)


def _describe_tensors(fault: str, names: Collection[str]) -> Iterator[str]:
    if names:
        shown = ", ".join([*names][:MOST_NAMES])
        shown += f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        count = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        yield f"{count} {fault} ({shown})"


def _check_causal(model: PreTrainedModel) -> None:
    """Refuse an encoder: where tokens see those that follow, no prefix keeps its activations."""
    causal = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if getattr(model.config, "is_decoder", True) is False and True not in causal:
        problem = f"a model of type {model.config.model_type!r} reads in both directions"
        raise UnsupportedModel(f"{problem}: it is an encoder", hint=HINT_DECODER)


def _check_finite(name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for tensor_name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            lowest, highest = torch.aminmax(tensor.detach())  # both NaN where there is one
            if not (torch.isfinite(lowest) and torch.isfinite(highest)):
                problem = f"the model {name} holds numbers that are not finite, in {tensor_name}"
                raise UnusableModel(problem, hint=HINT_WHOLE)


def _read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of these files by name, one at a time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that is empty, or has tokens for which the model has no embedding.

    Special tokens of other uses may lie beyond: Gemma 3 has one for pictures, also where it takes
    none.
    """
    ids = cast(list[int], tokenizer(PLAIN_TEXT, add_special_tokens=False)["input_ids"])
    if not set(ids) - {tokenizer.unk_token_id}:
        problem = f"the tokenizer of {name} is empty: it knows no token of plain text"
        raise UnusableModel(problem, hint=HINT_TOKENIZER)
    added = tokenizer.added_tokens_decoder
    used = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    }
    beyond = [
        token
        for token, n in tokenizer.get_vocab().items()
        if n >= rows and (n in used or n not in added or not added[n].special)
    ]
    if beyond:
        problem = (
            f"the tokenizer does not fit the model {name}: {len(beyond)} of its tokens, such as"
            f" {beyond[0]!r}, have no row among the {rows} of the embedding"
        )
        raise UnusableModel(problem, hint=HINT_TOKENIZER)
