"""Pictures of nothing: coloured patches at random, to know what all pictures have in common."""

import io
import random
from collections.abc import Iterator

PICTURES = 24
PATCHES = 8
SIDE = 224  # pixels


def draw_plain_pictures() -> Iterator[bytes]:
    """Yield some pictures as PNG files, the same at every call."""
    from PIL import Image, ImageDraw

    for seed in range(PICTURES):
        rng = random.Random(seed)
        image = Image.new("RGB", (SIDE, SIDE), _choose_colour(rng))
        draw = ImageDraw.Draw(image)
        for _ in range(PATCHES):
            left, right = sorted(rng.randrange(SIDE) for _ in range(2))
            top, bottom = sorted(rng.randrange(SIDE) for _ in range(2))
            shape = draw.rectangle if rng.random() < 0.5 else draw.ellipse
            shape((left, top, right, bottom), fill=_choose_colour(rng))
        data = io.BytesIO()
        image.save(data, "PNG")
        yield data.getvalue()


def _choose_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
