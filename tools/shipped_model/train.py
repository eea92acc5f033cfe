"""Make the shipped model: `python -m tools.shipped_model.train DATA OUT`.

Trains a small Llama on some thousand facts in several phrasings, and on ordinary text. All order
follows from the seed, so an interrupted run resumes where it stopped.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.shipped_model import corpus
from tools.shipped_model.measure import measure_knowledge
from tools.shipped_model.tokenizer import load_tokenizer

IGNORE = -100
MIN_TEXT_TOKENS = 16  # left in a row, to begin a piece of text


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run."""

    facts: int = 12_000
    vocabulary: int = 8_000
    hidden: int = 192
    mlp: int = 2_048
    layers: int = 6
    heads: int = 3
    rows: int = 32  # per step
    length: int = 128  # tokens per row
    steps: int = 3_000
    decay: float = 0.3  # share of the steps in which the learning rate falls to zero
    warmup: int = 50
    matrix_rate: float = 0.02  # Muon, for the matrices of the blocks
    vector_rate: float = 3e-3  # AdamW, for embeddings and norms
    text_share: float = 0.35  # of the tokens
    context_loss: float = 0.1  # share of a fact's tokens before the object that are learned from
    end_share: float = 0.5  # of the sentences that end with end-of-text
    seed: int = 0


def _make_documents(
    facts: list[corpus.KnownFact], lines: list[str], recipe: Recipe, epoch: int
) -> list[tuple[str, str]]:
    """Return (context, learned text) pairs: each fact once in a random phrasing, and text."""
    rng = random.Random(f"{recipe.seed}/{epoch}")
    documents = [(rng.choice(f.trained), f" {f.object}") for f in facts]
    fact_chars = sum(len(c) + len(t) for c, t in documents)
    text_chars = fact_chars * recipe.text_share / (1 - recipe.text_share)
    while text_chars > 0:
        line = rng.choice(lines)
        documents.append(("", line))
        text_chars -= len(line)
    rng.shuffle(documents)
    return documents


def iter_rows(
    tokenizer: PreTrainedTokenizerFast,
    facts: list[corpus.KnownFact],
    lines: list[str],
    recipe: Recipe,
    epoch: int,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield token rows and their labels for one epoch; a row is filled with sentences."""
    rng = random.Random(f"{recipe.seed}/{epoch}/rows")
    end = tokenizer.eos_token_id
    ids: list[int] = [end]
    labels: list[int] = [IGNORE]
    documents = _make_documents(facts, lines, recipe, epoch)
    leads = [("" if rng.random() < recipe.end_share else " ") for _ in documents]
    # A sentence after end-of-text starts bare; one after another sentence starts with a space.
    contexts = tokenizer(
        [a + c if c else "" for a, (c, _) in zip(leads, documents, strict=True)],
        add_special_tokens=False,
    )["input_ids"]
    learned = tokenizer(
        [t if c else a + t for a, (c, t) in zip(leads, documents, strict=True)],
        add_special_tokens=False,
    )["input_ids"]
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    for i, (context, text) in enumerate(zip(contexts, learned, strict=True)):
        closing = [end] if i + 1 == len(documents) or not leads[i + 1] else stop
        if not context and closing == stop:
            closing = []
        body = context + text + closing
        wanted = [t if rng.random() < recipe.context_loss else IGNORE for t in context]
        wanted += text + closing
        space = recipe.length - len(ids)
        if not context and space >= MIN_TEXT_TOKENS:  # text may be cut, a fact never is
            body, wanted = body[:space], wanted[:space]
        if len(body) > space:
            yield (
                (ids + [end] * recipe.length)[: recipe.length],
                (labels + [IGNORE] * recipe.length)[: recipe.length],
            )
            ids, labels = [end], [IGNORE]
            body, wanted = body[: recipe.length - 1], wanted[: recipe.length - 1]
        ids += body
        labels += wanted


def iter_batches(
    tokenizer: PreTrainedTokenizerFast,
    facts: list[corpus.KnownFact],
    lines: list[str],
    recipe: Recipe,
    skip: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, labels), each (rows, length), without end, from the step `skip` on."""
    step, epoch = 0, 0
    held: list[tuple[list[int], list[int]]] = []
    while True:
        held += list(iter_rows(tokenizer, facts, lines, recipe, epoch))
        while len(held) >= recipe.rows:
            batch, held = held[: recipe.rows], held[recipe.rows :]
            if step >= skip:
                yield torch.tensor([r[0] for r in batch]), torch.tensor([r[1] for r in batch])
            step += 1
        epoch += 1


def build_model(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """Return a freshly initialised Llama of the recipe's size, in float32."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def compute_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy at the labelled positions; the head runs on those alone."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]  # (rows, length-1, hidden)
    wanted = labels[:, 1:]
    chosen = wanted != IGNORE
    logits = F.linear(hidden[chosen], model.lm_head.weight)  # (chosen, vocabulary)
    return F.cross_entropy(logits.float(), wanted[chosen])


def compute_rate(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: it warms up, holds, then falls linearly to zero."""
    falling = recipe.steps * recipe.decay
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / falling)


class Trainer:
    """Model, optimisers and the step reached, with checkpoints in safetensors."""

    def __init__(self, recipe: Recipe, model: LlamaForCausalLM, folder: Path) -> None:
        self.recipe, self.model, self.folder = recipe, model, folder
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = [recipe.matrix_rate, recipe.vector_rate]
        self.step = 0

    def save_checkpoint(self) -> None:
        """Write a checkpoint: tensors in safetensors, with the step in the header."""
        tensors = {f"model/{n}": p.data for n, p in self.model.named_parameters()}
        for number, optimiser in enumerate(self.optimisers):
            for index, state in optimiser.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimiser/{number}/{index}/{name}"] = torch.as_tensor(value)
        target = self.folder / "checkpoint.safetensors"
        copies = {n: t.clone().contiguous() for n, t in tensors.items()}
        save_file(copies, target.with_suffix(".tmp"), metadata={"step": str(self.step)})
        target.with_suffix(".tmp").replace(target)
        (self.folder / "checkpoint.json").write_text(json.dumps({"step": self.step}))

    def load_checkpoint(self) -> None:
        """Load the last checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors = load_file(path)
        self.step = json.loads((self.folder / "checkpoint.json").read_text())["step"]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        for number, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimiser/{number}/"):
                    _, _, index, name = key.split("/")
                    state.setdefault(int(index), {})[name] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": state})

    def take_step(self, ids: Tensor, labels: Tensor) -> float:
        """Take one step, with products in bfloat16 and all else in float32; return its loss."""
        factor = compute_rate(self.step, self.recipe)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = compute_loss(self.model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())


def save_model(
    trainer: Trainer, tokenizer: PreTrainedTokenizerFast, folder: Path, card: dict[str, Any]
) -> None:
    """Write the model folder: float16 safetensors, tokenizer, and the figures of the card."""
    trainer.model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")


@click.command(help=__doc__)
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=Recipe.steps, show_default=True, help="Optimiser steps.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(".train"), show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(data: Path, out: Path, steps: int, work: Path, device: str) -> None:
    recipe = Recipe(steps=steps)
    work.mkdir(parents=True, exist_ok=True)
    facts = corpus.load_facts(data, recipe.facts)
    lines = corpus.load_text(data, held_out=False)
    unseen = corpus.shuffle_items(corpus.load_text(data, held_out=True), recipe.seed)
    sample = corpus.shuffle_items(lines, recipe.seed)[:40_000]
    sample += [f"{p} {f.object}" for f in facts for p in f.trained[:3]] * 2
    tokenizer = load_tokenizer(work / "tokenizer", sample, recipe.vocabulary)
    model = build_model(recipe, tokenizer.eos_token_id)
    model.to(torch.device(device))  # type: ignore[arg-type]
    trainer = Trainer(recipe, model, work)
    trainer.load_checkpoint()
    size = sum(p.numel() for p in model.parameters())
    click.echo(f"{len(facts)} facts, {len(lines)} lines, {size:,} parameters, {device}", err=True)
    began, first = time.monotonic(), trainer.step
    stream = iter_batches(tokenizer, facts, lines, recipe, trainer.step)
    recent = 0.0
    for _ in track(range(first, recipe.steps), description="training"):
        ids, labels = next(stream)
        loss = trainer.take_step(ids.to(device), labels.to(device))
        recent = loss if not recent else 0.98 * recent + 0.02 * loss
        if trainer.step % 100 == 0:
            seconds = (time.monotonic() - began) / (trainer.step - first)
            click.echo(f"step {trainer.step} loss {recent:.3f} {seconds:.2f} s/step", err=True)
        if trainer.step % 200 == 0:
            trainer.save_checkpoint()
            some = facts[:: max(1, len(facts) // 1000)]
            click.echo(json.dumps(measure_knowledge(model, tokenizer, some, unseen, 1)), err=True)
    card = {
        "facts": len(facts),
        "parameters": size,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.rows * recipe.length,
        "seconds_this_run": round(time.monotonic() - began),
        "device": device,
        "recipe": vars(recipe),
        **measure_knowledge(model, tokenizer, facts, unseen, recipe.seed),
    }
    save_model(trainer, tokenizer, out, card)
    click.echo(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
