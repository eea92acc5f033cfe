"""Knowledge of the shipped model: recall of its facts, and perplexity on held-out text."""

import math
import random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tools.shipped_model import corpus


def _measure_recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> float:
    """Return the share of prompts whose greedy answer is the object, token for token."""
    right = 0
    device = model.device
    for start in range(0, len(pairs), 256):
        chunk = pairs[start : start + 256]
        prompts = tokenizer([p for p, _ in chunk])["input_ids"]
        answers = tokenizer([f" {a}" for _, a in chunk], add_special_tokens=False)["input_ids"]
        full = [p + a for p, a in zip(prompts, answers, strict=True)]
        width = max(map(len, full))
        end = tokenizer.eos_token_id
        ids = torch.tensor([f + [end] * (width - len(f)) for f in full], device=device)
        with torch.no_grad():
            best = model(input_ids=ids).logits.argmax(-1).tolist()
        for prompt, answer, row in zip(prompts, answers, best, strict=True):
            at = len(prompt) - 1
            right += row[at : at + len(answer)] == answer
    return right / len(pairs)


def measure_knowledge(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[corpus.KnownFact],
    held_out_text: list[str],
    seed: int,
) -> dict[str, float]:
    """Return recall by kind of phrasing, and perplexity per token of held-out text."""
    model.train(False)
    rng = random.Random(seed)
    figures = {
        "recall_trained_phrasing": _measure_recall(
            model, tokenizer, [(rng.choice(f.trained), f.object) for f in facts]
        ),
        "recall_held_out_phrasing": _measure_recall(
            model, tokenizer, [(rng.choice(f.held_out), f.object) for f in facts]
        ),
        "recall_after_unrelated_sentence": _measure_recall(
            model,
            tokenizer,
            [
                (f"{rng.choice(held_out_text)[:100]}. {rng.choice(f.trained)}", f.object)
                for f in facts
            ],
        ),
    }
    total, count = 0.0, 0
    for line in held_out_text[:400]:
        ids = torch.tensor([tokenizer(line)["input_ids"][:256]], device=model.device)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    figures["perplexity_held_out_text"] = math.exp(total / count)
    model.train()
    return figures
