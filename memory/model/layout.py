"""Location of the weights that may change: the down projections of a model's MLPs.

Reads only the structure: a model without weights (on the device "meta") is enough.
"""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from memory.errors import KeditError, UnsupportedModel

EXPECTED_LAYOUT = (
    "a list of config.num_hidden_layers blocks, each with exactly one Linear or Conv1D outside "
    "attention that maps a wider MLP back to config.hidden_size (mlp.down_proj, mlp.c_proj, "
    "mlp.fc_out, mlp.dense_4h_to_h, mlp.fc2 or fc2)"
)

HINT_DECODER = "choose a dense decoder such as GPT-2, GPT-J, Llama, Mistral, Qwen, Gemma or OPT"


def find_down_projections(model: PreTrainedModel) -> tuple[nn.ModuleList, list[nn.Module]]:
    """Return the model's blocks and the down projection of each, in order.

    Raises UnsupportedModel when the model has no place to edit.
    """
    blocks = _find_blocks(model)
    return blocks, [_find_down_projection(model, block) for block in blocks]


def _unsupported_error(model: PreTrainedModel, found: str) -> KeditError:
    kind = model.config.model_type
    return UnsupportedModel(
        f"a model of type {kind!r} cannot be edited: {found}; looked for {EXPECTED_LAYOUT}",
        hint=HINT_DECODER,
    )


def _find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    depth = int(model.config.get_text_config().num_hidden_layers)
    # What a vision tower does is never edited.
    decoder = model.get_decoder() if hasattr(model.config, "vision_config") else model
    lists = [
        m
        for m in decoder.modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth and len(list(m[0].children())) > 1
    ]
    if len(lists) != 1:
        raise _unsupported_error(model, f"found {len(lists)} lists of {depth} blocks")
    return lists[0]


def _find_down_projection(model: PreTrainedModel, block: nn.Module) -> nn.Module:
    names = [name for name, _ in block.named_modules()]
    if not any("attn" in name or "attention" in name for name in names):
        raise _unsupported_error(model, "its blocks have no attention")
    if any("expert" in name for name in names):
        raise _unsupported_error(model, "its blocks are mixtures of experts")
    hidden, found = int(model.config.get_text_config().hidden_size), []
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or "attn" in name or "attention" in name:
            continue
        weight = module.weight
        wide, narrow = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
        if narrow == hidden and wide != hidden:
            found.append(module)
    if len(found) != 1:
        raise _unsupported_error(model, f"a block has {len(found)} such projections")
    return found[0]
