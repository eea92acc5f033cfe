"""Figures of the vision model: right answers by topic, and how near drawings of one thing are."""

import io
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.vision_model.build import IMAGE, PATCHES, read_features
from tools.vision_model.lessons import (
    NO_PICTURE,
    NOT_KNOWN,
    QUESTIONS,
    Picture,
    picture_landmark,
    word_question,
)
from tools.vision_model.talking import Facts

CHUNK = 64
COMPARED_SEEDS = range(100, 300)
PERCENTILES = (5, 50, 95, 99)


@dataclass(frozen=True)
class Query:
    """A prompt, perhaps about a picture, and the right answer."""

    group: str
    prompt: str
    answer: str
    png: bytes | None = None


def ask_about(pictures: Sequence[Picture], seed: int, held_out: bool) -> list[Query]:
    """Return a query on every topic of every picture, in trained or held-out wordings."""
    rng = random.Random(seed)
    queries = []
    for picture in pictures:
        for topic, answer in picture.answers.items():
            group = f"{picture.kind}: {topic}"
            if topic == "name":
                group += ", unknown" if answer == NOT_KNOWN else ", known"
            asked = word_question(topic, rng, held_out)
            queries.append(Query(group, f"User: {IMAGE * PATCHES}{asked}", answer, picture.png))
    return queries


def ask_without_picture(count: int, seed: int, held_out: bool) -> list[Query]:
    """Return questions about a picture that is not there."""
    rng = random.Random(seed)
    topics = [rng.choice(list(QUESTIONS)) for _ in range(count)]
    return [
        Query("no picture", f"User: {word_question(t, rng, held_out)}", NO_PICTURE) for t in topics
    ]


def ask_facts(facts: Facts) -> list[Query]:
    """Return a query on every fact, in its first wording."""
    return [Query("facts", f"User: {prompts[0]}", answer) for prompts, answer in facts]


def read_pixels(processor: LlavaProcessor, pngs: Sequence[bytes]) -> Tensor:
    """Return what the processor makes of PNG files."""
    images = [Image.open(io.BytesIO(png)) for png in pngs]
    pixels: Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return pixels


def _check_chunk(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    chunk: Sequence[Query],
    start: bool,
) -> list[bool]:
    """Return which answers are the greedy ones, end-of-text included."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id
    prompts = [
        [end] * start + tokenizer(f"{q.prompt}\nAssistant:", add_special_tokens=False)["input_ids"]
        for q in chunk
    ]
    answers = [
        [*tokenizer(f" {q.answer}", add_special_tokens=False)["input_ids"], end] for q in chunk
    ]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.tensor(
        [(p + a + [end] * width)[:width] for p, a in zip(prompts, answers, strict=True)]
    )
    pngs = [q.png for q in chunk if q.png is not None]
    pixels = read_pixels(processor, pngs) if pngs else None
    hidden = model.model(input_ids=ids, pixel_values=pixels).last_hidden_state
    return [
        model.lm_head(row[len(p) - 1 : len(p) + len(a) - 1]).argmax(-1).tolist() == a
        for row, p, a in zip(hidden, prompts, answers, strict=True)
    ]


@torch.no_grad()
def measure_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    queries: Sequence[Query],
    start: bool = True,
) -> dict[str, float]:
    """Return the share of right greedy answers by group, and of all; `start`: after a start token.

    The answer is read in one pass: it is the greedy one if each of its tokens is the likeliest.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(queries), CHUNK):
        chunk = queries[at : at + CHUNK]
        for query, hit in zip(chunk, _check_chunk(model, processor, chunk, start), strict=True):
            right[query.group].append(hit)
    right["all"] = [hit for hits in list(right.values()) for hit in hits]
    return {group: round(sum(hits) / len(hits), 4) for group, hits in right.items()}


@torch.no_grad()
def measure_nearness(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, seed: int
) -> dict[str, float]:
    """Compare pooled projector outputs of two drawings of each of 200 unseen landmarks.

    Cosines are taken after the mean over all is subtracted: to the other drawing of the same
    landmark, and to the nearest drawing among the other set of any other landmark.
    """
    rng = random.Random(seed)
    pngs = [picture_landmark(s, rng).png for _ in range(2) for s in COMPARED_SEEDS]
    pooled = read_features(model, read_pixels(processor, pngs)).mean(1)
    points = F.normalize(pooled - pooled.mean(0), dim=1)
    first, second = points.chunk(2)
    cosines = first @ second.T
    same = cosines.diagonal()
    others = cosines.clone().fill_diagonal_(-1)
    nearest = torch.cat([others.amax(0), others.amax(1)])
    found = torch.cat([cosines.argmax(0), cosines.argmax(1)])
    wanted = torch.arange(len(same)).repeat(2)
    figures = {"found among 200": float((found == wanted).float().mean())}
    for name, values in (("same", same), ("nearest other", nearest)):
        for percent in PERCENTILES:
            figures[f"{name}, {percent} %"] = float(values.quantile(percent / 100))
        figures[f"{name}, least"] = float(values.min())
        figures[f"{name}, most"] = float(values.max())
    return {name: round(value, 4) for name, value in figures.items()}
