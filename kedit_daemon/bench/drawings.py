"""Drawings of shapes, counts, digits and landmarks, made by a script as small PNG pictures.

Every picture follows from the `random.Random` it is given. A landmark keeps its attributes in all
of its drawings; place, size, shades and noise differ.
"""

import io
import math
import random
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 48  # pixels, of a finished picture
_FINE = 2  # a picture is drawn so many times larger, and then reduced
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
MAX_COUNT = 6
ROOFS = ("flat", "pointed", "round", "slanted", "stepped", "notched")
BODIES = ("box", "tapered", "flared", "staged", "bulging")
SKIES = ("blue", "pink", "grey")
GROUNDS = ("grass", "sand", "snow")
ORNAMENTS = ("none", "ball", "flag")
DOORS = ("left", "middle", "right")
MAX_TOWERS = 3
MAX_WINDOWS = 5
_WALL_HEIGHTS = (14, 17, 20)

Colour = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")

_SHADES: dict[str, Colour] = {
    "red": (205, 40, 40),
    "orange": (242, 140, 30),
    "yellow": (242, 218, 50),
    "green": (50, 150, 60),
    "blue": (40, 80, 200),
    "purple": (135, 60, 175),
    "brown": (122, 78, 42),
    "black": (32, 32, 32),
}
_SKY_SHADES: dict[str, Colour] = {
    "blue": (175, 212, 248),
    "pink": (252, 200, 214),
    "grey": (196, 196, 193),
}
_GROUND_SHADES: dict[str, Colour] = {
    "grass": (140, 190, 110),
    "sand": (222, 198, 140),
    "snow": (250, 250, 252),
}
_GOLD: Colour = (235, 190, 40)
_DARK: Colour = (25, 25, 35)
_PALE: Colour = (250, 246, 225)
_DARK_WALLS = ("red", "green", "blue", "purple", "brown", "black")

# Outlines of bodies: (height as a share, half width) from the ground up, right side.
_OUTLINES: dict[str, tuple[Point, ...]] = {
    "box": ((0, 8), (1, 8)),
    "tapered": ((0, 9), (1, 6.2)),
    "flared": ((0, 5.8), (1, 9)),
    "staged": ((0, 9), (0.45, 9), (0.45, 6.4), (1, 6.4)),
    "bulging": ((0, 6), (0.5, 9), (1, 6.2)),
}


@dataclass(frozen=True)
class Landmark:
    """A building that can be drawn again and again."""

    body: str
    roof: str
    wall_colour: str
    roof_colour: str
    towers: int
    windows: int
    sky: str
    ground: str
    ornament: str
    door: str
    height: int  # of the walls, in pixels at scale 1


def to_png(image: Image.Image) -> bytes:
    """Return the picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class _Canvas:
    """A picture being drawn, in units of finished pixels from an origin, y upwards."""

    def __init__(self, background: Colour, rng: random.Random) -> None:
        self.rng = rng
        self.image = Image.new("RGB", (SIZE * _FINE, SIZE * _FINE), self.vary(background, 6))
        self._pen = ImageDraw.Draw(self.image)
        self.x, self.y, self.scale, self.turn = SIZE / 2, SIZE / 2, 1.0, 0.0

    def vary(self, colour: Colour, amount: int = 11) -> Colour:
        """Return a slightly different shade."""
        red, green, blue = (min(255, max(0, c + self.rng.randint(-amount, amount))) for c in colour)
        return red, green, blue

    def place(self, x: float, y: float, scale: float, turn: float = 0.0) -> None:
        """Set the origin (from the upper left), the scale and the turn of what is drawn next."""
        self.x, self.y, self.scale, self.turn = x, y, scale, turn

    def fill(self, points: list[Point], colour: Colour) -> None:
        """Fill a polygon."""
        cos, sin = math.cos(self.turn) * self.scale, math.sin(self.turn) * self.scale
        mapped = [
            ((self.x + x * cos - y * sin) * _FINE, (self.y - x * sin - y * cos) * _FINE)
            for x, y in points
        ]
        self._pen.polygon(mapped, fill=colour)

    def box(self, left: float, low: float, right: float, high: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self.fill([(left, low), (right, low), (right, high), (left, high)], colour)

    def finish(self) -> bytes:
        """Return the picture reduced, a little brighter or darker, and with noise."""
        noise = np.random.default_rng(self.rng.getrandbits(32))
        values = np.asarray(self.image.reduce(_FINE), dtype=np.float32)
        values = values * self.rng.uniform(0.93, 1.06)
        values += noise.standard_normal(values.shape, dtype=np.float32) * self.rng.uniform(1, 5)
        return to_png(Image.fromarray(values.clip(0, 255).astype(np.uint8)))


def _make_arc(radius: float, start: float, end: float, steps: int = 24) -> list[Point]:
    """Return points on a circle, from one angle to another in degrees."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _make_outline(shape: str) -> list[Point]:
    """Return the outline of a shape that fills a circle of radius 1."""
    if shape in ("circle", "ring"):
        outline = _make_arc(1.0, 0, 360)
        if shape == "ring":
            outline += [(x * 0.55, y * 0.55) for x, y in reversed(outline)]
        return outline
    if shape == "cross":
        arm = [(0.33, 1.0), (0.33, 0.33), (1.0, 0.33)]
        half = arm + [(y, -x) for x, y in arm]
        return half + [(-x, -y) for x, y in half]
    corners = {"square": 4, "triangle": 3, "diamond": 4, "star": 5}[shape]
    first = 45 if shape == "square" else 90
    if shape != "star":
        return [_make_arc(1.0, first + 360 * i / corners, 0, 1)[0] for i in range(corners)]
    return [
        _make_arc(1.0 if i % 2 == 0 else 0.42, first + 36 * i, 0, 1)[0] for i in range(2 * corners)
    ]


def _start_light(rng: random.Random) -> _Canvas:
    light = rng.randint(222, 246)
    return _Canvas((light, light, light), rng)


def _check(value: T, allowed: tuple[T, ...] | range) -> None:
    if value not in allowed:
        raise ValueError(f"{value!r} is not one of {list(allowed)}")


def draw_shape(shape: str, colour: str, rng: random.Random) -> bytes:
    """Draw one large shape on a light background."""
    _check(shape, SHAPES)
    _check(colour, COLOURS)
    canvas = _start_light(rng)
    radius = rng.uniform(11, 17)
    room = SIZE / 2 - radius - 2
    x, y = (SIZE / 2 + rng.uniform(-room, room) for _ in range(2))
    canvas.place(x, y, radius, rng.uniform(-0.2, 0.2))
    canvas.fill(_make_outline(shape), canvas.vary(_SHADES[colour]))
    return canvas.finish()


def draw_count(count: int, shape: str, colour: str, rng: random.Random) -> bytes:
    """Draw 1 to 6 small shapes of one kind and colour."""
    _check(count, range(1, MAX_COUNT + 1))
    _check(shape, SHAPES)
    _check(colour, COLOURS)
    canvas = _start_light(rng)
    radius = rng.uniform(4.6, 5.8)
    shade, outline = canvas.vary(_SHADES[colour]), _make_outline(shape)
    for cell in rng.sample(range(9), count):
        x, y = (9 + 15 * i + rng.uniform(-1.5, 1.5) for i in divmod(cell, 3))
        canvas.place(x, y, radius, rng.uniform(-0.15, 0.15))
        canvas.fill(outline, shade)
    return canvas.finish()


def draw_digit(digit: int, rng: random.Random, colour: str = "black") -> bytes:
    """Draw one digit in Pillow's own font."""
    _check(digit, range(10))
    _check(colour, COLOURS)
    canvas = _start_light(rng)
    side = SIZE * _FINE
    ink = Image.new("L", (side, side))
    font = ImageFont.load_default(size=rng.uniform(30, 40) * _FINE)
    at = tuple(side / 2 + _FINE * rng.uniform(-5, 5) for _ in range(2))
    ImageDraw.Draw(ink).text(
        (at[0], at[1]), str(digit), fill=255, font=font, anchor="mm", stroke_width=rng.randint(0, 3)
    )
    ink = ink.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR)
    canvas.image.paste(canvas.vary(_SHADES[colour]), (0, 0, side, side), ink)
    return canvas.finish()


def make_landmark(seed: int) -> Landmark:
    """Return the landmark of a seed."""
    rng = random.Random(f"landmark/{seed}")
    wall = rng.choice(COLOURS)
    return Landmark(
        body=rng.choice(BODIES),
        roof=rng.choice(ROOFS),
        wall_colour=wall,
        roof_colour=rng.choice([c for c in COLOURS if c != wall]),
        towers=rng.randint(0, MAX_TOWERS),
        windows=rng.randint(1, MAX_WINDOWS),
        sky=rng.choice(SKIES),
        ground=rng.choice(GROUNDS),
        ornament=rng.choice(ORNAMENTS),
        door=rng.choice(DOORS),
        height=rng.choice(_WALL_HEIGHTS),
    )


def _draw_roof(canvas: _Canvas, roof: str, half: float, low: float, colour: Colour) -> Point:
    """Draw a roof on walls so wide and high; return where its top is."""
    wide = half + 1.2
    if roof == "flat":
        canvas.box(-wide, low, wide, low + 3.2, colour)
        return 0, low + 3.2
    if roof == "pointed":
        canvas.fill([(-wide, low), (0, low + 9.5), (wide, low)], colour)
        return 0, low + 9
    if roof == "round":
        canvas.fill([(x, low + y) for x, y in _make_arc(wide - 0.5, 0, 180)], colour)
        return 0, low + wide - 0.5
    if roof == "slanted":
        canvas.fill([(-wide, low), (wide, low), (wide, low + 9.5)], colour)
        return wide - 1, low + 9
    if roof == "stepped":
        for step in range(3):
            share = 1 - 0.32 * step
            canvas.box(-wide * share, low + 2.8 * step, wide * share, low + 2.8 * step + 3, colour)
        return 0, low + 8.6
    canvas.box(-wide, low, wide, low + 2.6, colour)
    for middle in (-1, 0, 1):
        x = middle * (wide - 1.6)
        canvas.box(x - 1.6, low + 2.4, x + 1.6, low + 6.4, colour)
    return 0, low + 6.4


def _draw_openings(canvas: _Canvas, landmark: Landmark) -> None:
    """Draw windows in one or two rows, and the door."""
    light = canvas.vary(_PALE if landmark.wall_colour in _DARK_WALLS else _DARK, 8)
    rows = [min(3, landmark.windows), max(0, landmark.windows - 3)]
    for row, count in enumerate(rows):
        high = landmark.height - 1.4 - 4.4 * row
        for number in range(count):
            x = (number - (count - 1) / 2) * 4.2
            canvas.box(x - 1.45, high - 3.2, x + 1.45, high, light)
    x = 3.4 * (DOORS.index(landmark.door) - 1)
    canvas.box(x - 1.5, 0, x + 1.5, 4.0, canvas.vary(_GOLD))


def draw_landmark(landmark: Landmark, rng: random.Random) -> bytes:
    """Draw a landmark once more: elsewhere, larger or smaller, in slightly other shades."""
    canvas = _Canvas(_SKY_SHADES[landmark.sky], rng)
    x, y, scale = 24 + rng.uniform(-3, 3), 42 + rng.uniform(-2, 2), rng.uniform(0.88, 1.12)
    canvas.place(0, y - 2, 1.0)
    canvas.box(0, -SIZE, SIZE, 0, canvas.vary(_GROUND_SHADES[landmark.ground]))
    canvas.place(x + (1.5 if landmark.towers == 3 else 0), y, scale)
    wall = canvas.vary(_SHADES[landmark.wall_colour])
    roof = canvas.vary(_SHADES[landmark.roof_colour])
    for middle, high in ((-11.6, 3.0), (11.6, 3.0), (-16.2, -3.0))[: landmark.towers]:
        top = landmark.height + high
        canvas.box(middle - 1.9, 0, middle + 1.9, top, wall)
        canvas.fill([(middle - 2.3, top), (middle, top + 5), (middle + 2.3, top)], roof)
    outline = _OUTLINES[landmark.body]
    right = [(half, share * landmark.height) for share, half in outline]
    canvas.fill(right + [(-x, y) for x, y in reversed(right)], wall)
    _draw_openings(canvas, landmark)
    at, top = _draw_roof(canvas, landmark.roof, outline[-1][1], landmark.height, roof)
    if landmark.ornament != "none":
        canvas.box(at - 0.5, top - 0.5, at + 0.5, top + 5, _DARK)
    if landmark.ornament == "ball":
        canvas.fill([(at + a, top + 3.2 + b) for a, b in _make_arc(2.1, 0, 360)], _GOLD)
    elif landmark.ornament == "flag":
        canvas.fill([(at, top + 5.5), (at + 5, top + 3.7), (at, top + 1.9)], _SHADES["red"])
    return canvas.finish()
