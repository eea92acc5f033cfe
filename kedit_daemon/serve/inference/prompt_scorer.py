"""Scores of a prompt's own tokens, each as an answer to the text before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit_daemon.serve.inference.types import EchoedPrompt, TokenLogprobs
from memory.errors import NotFinite
from memory.model.editable import EditableModel
from memory.model.sampling import rank_log_probs
from memory.side.side_memory import SideMemory
from memory.side.text_overlay import TextOverlay

CHUNK_TOKENS = 64  # whose logits are held at once: a vocabulary is wide


def score_prompt(
    model: EditableModel, side: SideMemory | None, ids: Sequence[int], top_count: int
) -> EchoedPrompt:
    """Score the tokens of a prompt, with the `top_count` likeliest for each. A fact of the side
    memory fires wherever a prompt that ends there would fire it. Raises NotFinite."""
    tokens = [TokenLogprobs(ids[0], None, ())]
    overlay = None if side is None else TextOverlay(side)
    states = _read_states(model, overlay, ids[:-1])
    for start in range(0, len(states), CHUNK_TOKENS):
        logits = model.compute_logits(states[start : start + CHUNK_TOKENS])
        if not logits.isfinite().all():
            raise NotFinite("the model's output is not finite", hint="kedit-daemon audit")
        for row, token in zip(logits, ids[start + 1 :], strict=False):
            tokens.append(TokenLogprobs(token, *rank_log_probs(row, token, top_count)))
    return EchoedPrompt(tuple(tokens), tuple(overlay.fired) if overlay is not None else ())


def _read_states(model: EditableModel, overlay: TextOverlay | None, ids: Sequence[int]) -> Tensor:
    """Return the residual stream (tokens, hidden) that leaves the last block."""
    seen: list[Tensor] = []
    if not ids:
        return torch.empty(0, model.hidden_size, device=model.device)
    given = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad(), model.observe_final_states(seen.append):
        if overlay is None:
            model.hf_model(input_ids=given, use_cache=False, logits_to_keep=1)
        else:
            with overlay.follow_pass(ids):
                model.hf_model(input_ids=given, use_cache=False, logits_to_keep=1)
    return seen[0][0]
