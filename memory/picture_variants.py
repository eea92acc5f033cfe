"""Variants of a picture: how one thing looks from nearer, from beside, or in other light."""

import io
from collections.abc import Iterator

from memory.picture_files import open_picture

ZOOMS = (0.88, 1.12)
SHIFTS = ((0.06, 0.0), (-0.06, 0.0), (0.0, 0.06), (0.0, -0.06))  # of its width and height
LIGHTS = (0.9, 1.1)


def vary_picture(data: bytes) -> Iterator[bytes]:
    """Yield variants of a picture as PNG files, the same at every call. Raises BadPicture."""
    from PIL import Image, ImageEnhance

    image = open_picture(data)
    wide, high = image.size
    moves = [
        (1 / zoom, 0, (wide - wide / zoom) / 2, 0, 1 / zoom, (high - high / zoom) / 2)
        for zoom in ZOOMS
    ]
    moves += [(1, 0, x * wide, 0, 1, y * high) for x, y in SHIFTS]
    varied = [
        image.transform(
            image.size,
            Image.Transform.AFFINE,
            move,
            resample=Image.Resampling.BILINEAR,
            fillcolor=image.getpixel((0, 0)),
        )
        for move in moves
    ]
    varied += [ImageEnhance.Brightness(image).enhance(light) for light in LIGHTS]
    for one in varied:
        made = io.BytesIO()
        one.save(made, "PNG")
        yield made.getvalue()
