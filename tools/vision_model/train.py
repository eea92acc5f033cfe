"""Make the shipped vision model: `python -m tools.vision_model.train DATA OUT`.

Trains a small LLaVA on drawings: first its eyes (tower and projector), with heads that are thrown
away; then the decoder, on questions about pictures and on text. All order follows from the seed.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.shipped_model import corpus
from tools.vision_model.build import (
    Size,
    build_model,
    build_processor,
    build_tokenizer,
    copy_embeddings,
    normalise_pixels,
    read_features,
)
from tools.vision_model.lessons import FIRST_HELD_OUT_SEED, FIRST_TRAINED_SEED, make_pictures
from tools.vision_model.measure import (
    ask_about,
    ask_facts,
    ask_without_picture,
    measure_answers,
    measure_nearness,
)
from tools.vision_model.seeing import Gallery, Seeing, make_gallery
from tools.vision_model.talking import Facts, RowWriter, Texts, compute_answer_loss, stack_rows

SHIPPED = Path("kedit_daemon/shipped/model")
FULL_MINUTES = 20.0  # for which the numbers of steps are meant


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run."""

    size: Size = field(default_factory=Size)
    pictures: Mapping[str, int] = field(
        default_factory=lambda: {
            "shape": 6_000,
            "count": 8_000,
            "digit": 6_000,
            "landmark": 14_000,
            "famous": 1_600,
        }
    )
    tests: Mapping[str, int] = field(
        default_factory=lambda: {
            "shape": 200,
            "count": 200,
            "digit": 200,
            "landmark": 200,
            "famous": 100,
        }
    )
    shares: Mapping[str, float] = field(  # of the rows about pictures
        default_factory=lambda: {
            "shape": 0.1,
            "count": 0.16,
            "digit": 0.14,
            "landmark": 0.42,
            "famous": 0.18,
        }
    )
    seeing_steps: int = 1_500
    singles: int = 48  # pictures per step of seeing, beside the pairs of landmarks
    pairs: int = 40
    talking_steps: int = 380
    picture_rows: int = 22  # per step of talking
    text_rows: int = 8
    facts: int = 1_500
    warmup: int = 30
    decay: float = 0.8  # share of the steps in which the learning rate falls to zero
    matrix_rate: float = 0.015  # Muon, for the matrices of blocks and projector
    vector_rate: float = 3e-3  # AdamW, for embeddings, norms and heads
    seed: int = 0


class Optimisers:
    """Muon for matrices and AdamW for the rest, with a rate that warms up and falls to zero."""

    def __init__(self, named: Mapping[str, Parameter], recipe: Recipe, steps: int) -> None:
        self.recipe, self.steps, self.step = recipe, steps, 0
        self.parameters = list(named.values())
        matrices = {n: p for n, p in named.items() if p.ndim == 2 and _is_inner(n)}
        others = [p for n, p in named.items() if n not in matrices]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(list(matrices.values()), weight_decay=0.01),
                recipe.matrix_rate,
            ),
            (
                torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
                recipe.vector_rate,
            ),
        ]

    def take_step(self, loss: Tensor) -> float:
        """Take one step down the loss; return the loss."""
        falling = self.steps * self.recipe.decay
        factor = min(1.0, (self.step + 1) / self.recipe.warmup, (self.steps - self.step) / falling)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, rate in self.parts:
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())


def _is_inner(name: str) -> bool:
    return "layers." in name or "multi_modal_projector" in name


def run_steps(
    optimisers: Optimisers, compute_loss: Callable[[], Tensor], description: str
) -> Iterator[int]:
    """Take all steps; yield the number of each, and tell the mean loss at times."""
    recent, began = 0.0, time.monotonic()
    for number in track(range(1, optimisers.steps + 1), description=description):
        loss = optimisers.take_step(compute_loss())
        recent = loss if not recent else 0.95 * recent + 0.05 * loss
        if number % 50 == 0:
            seconds = (time.monotonic() - began) / number
            click.echo(f"{description} {number} loss {recent:.3f} {seconds:.2f} s/step", err=True)
        yield number


def learn_to_see(model: LlavaForConditionalGeneration, gallery: Gallery, recipe: Recipe) -> None:
    """Train tower and projector with heads that are thrown away."""
    seeing = Seeing(model, gallery, recipe.singles, recipe.pairs)
    named = {n: p for n, p in model.named_parameters() if _is_eye(n)}
    named |= {f"heads.{n}": p for n, p in seeing.heads.named_parameters()}
    optimisers = Optimisers(named, recipe, recipe.seeing_steps)
    held_out = make_pictures(recipe.tests, random.Random(1), FIRST_HELD_OUT_SEED)
    for number in run_steps(optimisers, seeing.compute_loss, "seeing"):
        if number % 200 == 0 or number == recipe.seeing_steps:
            click.echo(json.dumps(seeing.measure(held_out)), err=True)


def _is_eye(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name


def learn_to_talk(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    gallery: Gallery,
    texts: Texts,
    recipe: Recipe,
) -> None:
    """Train the decoder; tower and projector stay as they are."""
    rng = random.Random(recipe.seed)
    writer = RowWriter(processor.tokenizer, texts, recipe.seed)
    named = {n: p for n, p in model.named_parameters() if not _is_eye(n)}
    optimisers = Optimisers(named, recipe, recipe.talking_steps)

    def compute_loss() -> Tensor:
        kinds = rng.choices(
            list(recipe.shares), list(recipe.shares.values()), k=recipe.picture_rows
        )
        places = [rng.choice(gallery.places[kind]) for kind in kinds]
        rows = [writer.write_picture(gallery.pictures[p]) for p in places]
        rows += [writer.write_text() for _ in range(recipe.text_rows)]
        with torch.no_grad():
            features = read_features(model, normalise_pixels(gallery.pixels[places]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return compute_answer_loss(model, stack_rows(rows), features)

    for number in run_steps(optimisers, compute_loss, "talking"):
        if number % 200 == 0:
            click.echo(json.dumps(measure(model, processor, recipe, texts.facts)), err=True)


def measure(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, recipe: Recipe, facts: Facts
) -> dict[str, Any]:
    """Return all figures, on drawings and landmarks that were not trained on."""
    model.train(False)
    pictures = make_pictures(recipe.tests, random.Random(1), FIRST_HELD_OUT_SEED)
    figures: dict[str, Any] = {}
    for name, held_out in (("trained wordings", False), ("held-out wordings", True)):
        queries = ask_about(pictures, 2, held_out) + ask_without_picture(200, 3, held_out)
        figures[name] = measure_answers(model, processor, queries)
        bare = measure_answers(model, processor, queries[::4], start=False)
        figures[f"{name}, no start token"] = bare["all"]
    figures["facts as chats"] = measure_answers(model, processor, ask_facts(facts))["all"]
    figures["nearness"] = measure_nearness(model, processor, 4)
    model.train()
    return figures


def load_texts(data: Path, recipe: Recipe) -> Texts:
    """Return facts and lines of ordinary text of the corpus."""
    facts = corpus.load_facts(data, recipe.facts)
    return Texts([(f.trained, f.object) for f in facts], corpus.load_text(data, held_out=False))


def save_folder(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    folder: Path,
    card: Mapping[str, Any],
) -> None:
    """Write the model folder: float16 safetensors, tokenizer, processor, and the card."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n")


def prepare_eyes(
    model: LlavaForConditionalGeneration, gallery: Gallery, recipe: Recipe, work: Path
) -> None:
    """Train tower and projector, or take those of an earlier run with the same work folder."""
    path = work / "eyes.safetensors"
    if not path.exists():
        learn_to_see(model, gallery, recipe)
        work.mkdir(parents=True, exist_ok=True)
        eyes = {n: p.data.clone() for n, p in model.named_parameters() if _is_eye(n)}
        save_file(eyes, path)
    model.load_state_dict(load_file(path), strict=False)


@click.command(help=__doc__)
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minutes", default=FULL_MINUTES, show_default=True, help="Scales the steps.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(".vision-train"), show_default=True
)
def main(data: Path, out: Path, minutes: float, work: Path) -> None:
    began = time.monotonic()
    share = minutes / FULL_MINUTES
    recipe = Recipe(
        seeing_steps=max(1, round(Recipe.seeing_steps * share)),
        talking_steps=max(1, round(Recipe.talking_steps * share)),
    )
    gallery = make_gallery(
        make_pictures(recipe.pictures, random.Random(recipe.seed), FIRST_TRAINED_SEED)
    )
    texts = load_texts(data, recipe)
    processor = build_processor(build_tokenizer(SHIPPED))
    model = build_model(recipe.size, processor.tokenizer, recipe.seed)
    with safe_open(SHIPPED / "model.safetensors", "pt") as tensors:
        copy_embeddings(model, tensors.get_tensor("model.embed_tokens.weight"))
    prepare_eyes(model, gallery, recipe, work)
    seen = time.monotonic()
    learn_to_talk(model, processor, gallery, texts, recipe)
    model.half().float()  # the figures are those of what is saved
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(gallery.pictures),
        "seconds before talking": round(seen - began),
        "seconds of talking": round(time.monotonic() - seen),
        "recipe": asdict(recipe),
        **measure(model, processor, recipe, texts.facts),
    }
    save_folder(model, processor, out, card)
    click.echo(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
