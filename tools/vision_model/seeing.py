"""First part of the training: tower and projector learn what is in a picture.

Linear heads on the mean of the projector's outputs name each attribute; a contrastive term brings
two drawings of one landmark near each other, and away from those of others.
"""

import io
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Linear
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tools.vision_model.build import normalise_pixels, read_features
from tools.vision_model.lessons import FAMOUS, QUESTIONS, Picture

IGNORE = -100
TEMPERATURE = 0.1


def decode_pixels(pictures: list[Picture]) -> Tensor:
    """Return the pixels of pictures as bytes, (pictures, 3, height, width)."""
    arrays = [np.asarray(Image.open(io.BytesIO(p.png)).convert("RGB")) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Gallery:
    """Pictures of the training with their pixels, and where those of each kind are."""

    pictures: list[Picture]
    pixels: Tensor  # bytes
    places: Mapping[str, list[int]]  # by kind; named landmarks are the kind "famous"

    @property
    def singles(self) -> list[int]:
        """The places of pictures that show no landmark."""
        return [i for i, p in enumerate(self.pictures) if p.seed is None]

    @property
    def pairs(self) -> list[int]:
        """The places of the first of two drawings of each landmark; the second follows it."""
        return [i for i, p in enumerate(self.pictures) if p.seed is not None][::2]


def make_gallery(pictures: list[Picture]) -> Gallery:
    """Return the gallery of pictures in which a landmark's two drawings are neighbours."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, picture in enumerate(pictures):
        famous = picture.seed is not None and picture.seed < len(FAMOUS)
        places["famous" if famous else picture.kind].append(place)
    return Gallery(pictures, decode_pixels(pictures), places)


class AttributeHeads(Linear):
    """One linear layer that names all attributes; each topic has a stretch of its outputs."""

    def __init__(self, hidden: int, pictures: list[Picture]) -> None:
        self.classes = {
            topic: sorted({p.answers[topic] for p in pictures if topic in p.answers})
            for topic in QUESTIONS
        }
        super().__init__(hidden, sum(map(len, self.classes.values())))

    def label(self, pictures: list[Picture]) -> Tensor:
        """Return the number of each answer within its topic, (pictures, topics)."""
        numbers = [{a: i for i, a in enumerate(c)} for c in self.classes.values()]
        columns = list(zip(self.classes, numbers, strict=True))
        rows = [
            [n[p.answers[t]] if t in p.answers else IGNORE for t, n in columns] for p in pictures
        ]
        return torch.tensor(rows)

    def split(self, pooled: Tensor) -> list[Tensor]:
        """Return the scores of each topic."""
        return list(self(pooled).split([len(c) for c in self.classes.values()], dim=1))

    def compute_loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the topics' cross-entropies, each over the pictures that have it."""
        losses = [
            F.cross_entropy(scores, wanted, ignore_index=IGNORE)
            for scores, wanted in zip(self.split(pooled), labels.T, strict=True)
            if bool((wanted != IGNORE).any())
        ]
        return torch.stack(losses).sum()


def compute_contrast(pooled: Tensor, seeds: Tensor) -> Tensor:
    """Return InfoNCE over pairs that lie next to each other; the batch mean is taken off.

    Other pairs of the same landmark do not count as different.
    """
    points = F.normalize(pooled - pooled.mean(0), dim=1)
    scores = points @ points.T / TEMPERATURE
    places = torch.arange(len(points))
    partners = places ^ 1
    same = seeds[:, None] == seeds[None, :]
    same[places, partners] = False
    return F.cross_entropy(scores.masked_fill(same, -1e4), partners)


def iter_batches(gallery: Gallery, singles: int, pairs: int, seed: int) -> Iterator[list[int]]:
    """Yield places of pictures without end: single ones, then pairs next to each other."""
    rng = random.Random(seed)
    all_alone, all_paired = gallery.singles, gallery.pairs
    alone: list[int] = []
    paired: list[int] = []
    while True:
        if len(alone) < singles:
            alone += rng.sample(all_alone, len(all_alone))
        if len(paired) < pairs:
            paired += rng.sample(all_paired, len(all_paired))
        batch, alone = alone[:singles], alone[singles:]
        firsts, paired = paired[:pairs], paired[pairs:]
        yield batch + [place for first in firsts for place in (first, first + 1)]


class Seeing:
    """Losses of the tower and the projector on batches from a gallery."""

    def __init__(
        self, model: LlavaForConditionalGeneration, gallery: Gallery, singles: int, pairs: int
    ) -> None:
        self.model, self.gallery, self.singles = model, gallery, singles
        hidden = len(model.get_parameter("model.multi_modal_projector.linear_2.weight"))
        self.heads = AttributeHeads(hidden, gallery.pictures)
        self.labels = self.heads.label(gallery.pictures)
        self.seeds = torch.tensor([-1 if p.seed is None else p.seed for p in gallery.pictures])
        self.batches = iter_batches(gallery, singles, pairs, 0)

    def compute_loss(self) -> Tensor:
        """Return the loss of the next batch."""
        places = next(self.batches)
        pixels = normalise_pixels(self.gallery.pixels[places])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = read_features(self.model, pixels).float().mean(1)
        contrast = compute_contrast(pooled[self.singles :], self.seeds[places[self.singles :]])
        return self.heads.compute_loss(pooled, self.labels[places]) + contrast

    @torch.no_grad()
    def measure(self, pictures: list[Picture]) -> dict[str, float]:
        """Return by topic the share of pictures whose attribute the heads name rightly."""
        pixels = normalise_pixels(decode_pixels(pictures))
        pooled = torch.cat([read_features(self.model, p).mean(1) for p in pixels.split(256)])
        figures = {}
        labels = self.heads.label(pictures).T
        columns = zip(self.heads.classes, self.heads.split(pooled), labels, strict=True)
        for topic, scores, wanted in columns:
            chosen = wanted != IGNORE
            if bool(chosen.any()):
                right = scores.argmax(1)[chosen] == wanted[chosen]
                figures[topic] = float(right.float().mean())
        return figures
