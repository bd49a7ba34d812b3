"""Pixels of the testbed's pictures: coloured shapes and lettering, each with its place known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
_LARGEST_LETTERING = 24
_VARIED_LETTERING = (14, 16, 18, 20, 22, 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyph:
    """One rendered character and where its middle is, e.g. `Glyph(character="k", x=40, y=20)`."""

    character: str
    """The character as rendered."""
    x: float
    """Pixels from the left edge."""
    y: float
    """Pixels from the upper edge, at half the height of a small letter."""


def draw_text(
    text: str,
    size: int = 112,
    *,
    rng: np.random.Generator | None = None,
    glyphs: list[Glyph] | None = None,
) -> Image.Image:
    """A typographic picture: the text, wrapped, as large as it fits, on a plain background.

    Without `rng` it is black on white; with it, colours and lettering size vary. Text that does
    not fit at the smallest lettering runs over the lower edge. A list given as `glyphs` receives
    the rendered characters.
    """
    tone: Colour = (255, 255, 255)
    ink: Colour = (0, 0, 0)
    largest = _LARGEST_LETTERING
    if rng is not None:
        tone = background_tone(rng, low=170, high=256)
        red, green, blue = (int(level) for level in rng.integers(0, 60, size=3))
        ink = (red, green, blue)
        largest = int(rng.choice(_VARIED_LETTERING))
    image = Image.new("RGB", (size, size), tone)
    canvas = ImageDraw.Draw(image)
    margin = 4
    lines, font = _fit(text, size - 2 * margin, largest * size / 112)
    height = _line_height(font)
    first = max(margin, (size - height * len(lines)) // 2)
    for number, line in enumerate(lines):
        left = max(margin, int((size - font.getlength(line)) / 2))
        top = first + number * height
        canvas.text((left, top), line, fill=ink, font=font)
        if glyphs is not None:
            glyphs.extend(_glyphs(line, left, top, font))
    return image


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow returns its bundled scalable font for any given size.
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OSError("expected a Pillow built with FreeType; install the pillow wheel")
    return font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return int(ascent + descent)


def background_tone(rng: np.random.Generator, low: int = 150, high: int = 205) -> Colour:
    """A nearly grey tone, so that it is never taken for one of the colours, white included."""
    grey = int(rng.integers(low, high))
    red, green, blue = (min(255, grey + int(rng.integers(-12, 13))) for _ in range(3))
    return red, green, blue


def draw_shape(
    canvas: ImageDraw.ImageDraw,
    kind: str,
    colour: Colour,
    cell: tuple[int, int],
    size: int,
    rng: np.random.Generator,
) -> None:
    """Draws one shape into the grid cell (row, column), its size, place and colour jittered."""
    width = size / 3
    radius = width * rng.uniform(0.26, 0.42)
    slack = max(width / 2 - radius, 0.0) * 0.9
    x = (cell[1] + 0.5) * width + rng.uniform(-slack, slack)
    y = (cell[0] + 0.5) * width + rng.uniform(-slack, slack)
    fill = tuple(int(np.clip(level + rng.integers(-14, 15), 0, 255)) for level in colour)
    if kind == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    turn = rng.uniform(-0.2, 0.2)
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.45)}[kind]
    start = turn - math.pi / 2 + (math.pi / 4 if kind == "square" else 0.0)
    points = []
    for index in range(2 * corners if inner < 1 else corners):
        step = math.pi / corners if inner < 1 else 2 * math.pi / corners
        reach = radius * (inner if inner < 1 and index % 2 else 1.0)
        points.append(
            (
                x + reach * math.cos(start + index * step),
                y + reach * math.sin(start + index * step),
            )
        )
    canvas.polygon(points, fill=fill)


def draw_word(
    canvas: ImageDraw.ImageDraw,
    word: str,
    row: int,
    size: int,
    rng: np.random.Generator,
) -> list[Glyph]:
    """Writes a word into the grid row, its lettering, place and ink jittered."""
    style = int(rng.integers(3))
    shown = (word, word.upper(), word.capitalize())[style]
    points = size * rng.uniform(0.14, 0.22)
    font = _font(max(8, int(points)))
    while font.getlength(shown) > size - 6 and font.size > 8:
        font = _font(int(font.size) - 1)
    width, height = font.getlength(shown), _line_height(font)
    left = rng.uniform(3, max(4.0, size - 3 - width))
    room = max(size / 3 - height, 0.0)
    top = row * size / 3 + rng.uniform(0.0, 1.0) * room
    red, green, blue = (int(level) for level in rng.integers(0, 50, size=3))
    ink = (red, green, blue)
    canvas.text((left, top), shown, fill=ink, font=font)
    return _glyphs(shown, left, top, font)


def _glyphs(line: str, left: float, top: float, font: ImageFont.FreeTypeFont) -> list[Glyph]:
    middle = top + font.getmetrics()[0] - 0.27 * font.size
    ends = [font.getlength(line[:count]) for count in range(len(line) + 1)]
    return [
        Glyph(character=character, x=left + (ends[index] + ends[index + 1]) / 2, y=middle)
        for index, character in enumerate(line)
        if character != " "
    ]


def _fit(text: str, width: int, largest: float) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The text's lines at the largest lettering at which width and height suffice."""
    sizes = range(8, max(9, int(largest) + 1))
    for point in reversed(sizes):
        font = _font(point)
        lines = _wrap(text, width, font)
        widest = max(font.getlength(line) for line in lines)
        if widest <= width and _line_height(font) * len(lines) <= width:
            return lines, font
    font = _font(sizes[0])
    return _wrap(text, width, font), font


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines
