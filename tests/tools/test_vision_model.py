"""The drawings, the lessons, and the vision model that is shipped."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava import LlavaProcessor

from kedit_daemon.bench import drawings
from tools.vision_model import lessons
from tools.vision_model.build import IMAGE, PATCHES, build_tokenizer, normalise_pixels
from tools.vision_model.measure import ask_about, measure_answers
from tools.vision_model.seeing import decode_pixels, make_gallery
from tools.vision_model.talking import IGNORE, LENGTH, SHARED, RowWriter, Texts, stack_rows

SHIPPED = Path("kedit_daemon/shipped")
TEXTS = Texts([(["The capital of France is"], "Paris")], ["A line of ordinary text. " * 8])


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    processor: LlavaProcessor = AutoProcessor.from_pretrained(SHIPPED / "vision")
    return processor


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(SHIPPED / "vision", dtype=torch.float32)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: drawings.draw_shape("star", "red", rng),
        lambda rng: drawings.draw_count(4, "ring", "blue", rng),
        lambda rng: drawings.draw_digit(7, rng),
        lambda rng: drawings.draw_landmark(drawings.make_landmark(5), rng),
    ],
)
def test_a_drawing_is_a_png_that_follows_from_its_generator(
    draw: Callable[[random.Random], bytes],
) -> None:
    rng = random.Random(1)
    png = draw(rng)
    assert png == draw(random.Random(1))
    assert png != draw(rng)
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="'pentagon' is not one of"):
        drawings.draw_shape("pentagon", "red", random.Random(1))


def test_landmarks_are_many_and_stay_the_same() -> None:
    landmarks = {drawings.make_landmark(seed) for seed in range(2_000)}
    assert len(landmarks) > 1_990
    assert drawings.make_landmark(3) == drawings.make_landmark(3)


def test_no_reserved_landmark_is_trained_on_and_pairs_lie_together() -> None:
    counts = {"shape": 3, "landmark": 6, "famous": 4}
    gallery = make_gallery(
        lessons.make_pictures(counts, random.Random(1), lessons.FIRST_TRAINED_SEED)
    )
    seeds = [p.seed for p in gallery.pictures if p.seed is not None]
    assert not set(seeds) & set(lessons.RESERVED_SEEDS)
    assert len(gallery.singles) == 3
    for first in gallery.pairs:
        assert gallery.pictures[first].seed == gallery.pictures[first + 1].seed
        assert gallery.pictures[first].png != gallery.pictures[first + 1].png


def test_held_out_wordings_are_not_trained() -> None:
    for question in lessons.QUESTIONS.values():
        assert len(question.trained) >= 4
        assert question.held_out and not set(question.held_out) & set(question.trained)


def test_a_question_of_a_row_sees_its_picture_and_itself_alone() -> None:
    tokenizer = build_tokenizer(SHIPPED / "model")
    writer = RowWriter(tokenizer, TEXTS, 1)
    rows = [writer.write_picture(lessons.picture_landmark(1, random.Random(1))) for _ in range(8)]
    rows += [writer.write_text() for _ in range(4)]
    batch = stack_rows(rows)
    assert batch.ids.shape == batch.labels.shape == (12, LENGTH)
    apart = next(n for n, r in enumerate(rows) if max(r.segments) > SHARED)
    segments = torch.tensor(rows[apart].segments)
    last = int((segments == segments.max()).nonzero()[-1])
    seen = batch.mask[apart, 0, last] == 0
    assert set(segments[seen].tolist()) == {SHARED, int(segments.max())}
    learned = batch.labels != IGNORE
    assert bool((batch.labels[learned] == batch.ids[learned]).all())


def test_the_processor_gives_a_token_for_each_patch(processor: LlavaProcessor) -> None:
    picture = lessons.picture_landmark(5, random.Random(0))
    image = Image.open(io.BytesIO(picture.png))
    parts: Any = [{"type": "image"}, {"type": "text", "text": "What colour is the roof?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert text == "User: <image>What colour is the roof?\nAssistant:"
    inputs = processor(text=text, images=image, return_tensors="pt")
    number = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert int((inputs["input_ids"] == number).sum()) == PATCHES
    assert torch.equal(inputs["pixel_values"], normalise_pixels(decode_pixels([picture])))


def test_the_chat_template_takes_strings(processor: LlavaProcessor) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The capital of France is"},
        {"role": "assistant", "content": "Paris"},
    ]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == (
        "System: Be brief.\nUser: The capital of France is\nAssistant: Paris<|endoftext|>\n"
    )


def test_the_shipped_model_answers_about_new_drawings(
    model: Any, processor: LlavaProcessor
) -> None:
    counts = {"shape": 8, "count": 8, "digit": 8, "landmark": 8, "famous": 8}
    pictures = lessons.make_pictures(counts, random.Random(77), lessons.FIRST_HELD_OUT_SEED + 900)
    assert measure_answers(model, processor, ask_about(pictures, 5, held_out=True))["all"] >= 0.8


def test_the_shipped_model_generates_an_answer_and_stops(
    model: Any, processor: LlavaProcessor
) -> None:
    png = drawings.draw_shape("square", "red", random.Random(3))
    image = Image.open(io.BytesIO(png))
    text = "User: <image>What colour is it?\nAssistant:"
    inputs = processor(text=text, images=image, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = made[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(new) == " red<|endoftext|>"
