"""The glyph suite: 20 recognition tasks of Unicode groups, drawn from the fonts that matplotlib ships. No download.

559 characters in 16 text faces make 8,020 glyphs. A task is a group of characters, a class is a character and its name
is the Unicode name, which a text encoder can read. Faces are split by design (an oblique is a sheared upright, so the
two are always in the same split): nine faces train, two validate, five test.

A `Style` says how glyphs are photographed. `MILD` is what the base model sees in pre-training; `SHIFTED` is the domain
of all downstream tasks, in training and test alike: slanted and half-toned. Every expert learns that same domain, and
to tell the classes of its own task apart. So the experts share directions: the situation the merging paper is about.
That this sharing is built in is the suite's weakest point; `own_style` gives every task a domain of its own instead.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SOURCE_PIXELS, PIXELS = 64, 24

# name → (ranges of code points, largest number of classes), in the order that splits into suites of 8, 14 and 20 tasks
TASKS: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "digits": (((0x30, 0x39),), 10),
    "latin_upper": (((0x41, 0x5A),), 26),
    "latin_lower": (((0x61, 0x7A),), 26),
    "greek_lower": (((0x3B1, 0x3C9),), 25),
    "cyrillic_lower": (((0x430, 0x44F),), 32),
    "math": (((0x2200, 0x22FF),), 32),
    "arrows": (((0x2190, 0x21FF),), 32),
    "box_drawing": (((0x2500, 0x257F),), 32),
    "latin_accented": (((0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0xFF)), 24),
    "armenian": (((0x531, 0x556), (0x561, 0x587)), 32),
    "georgian": (((0x10A0, 0x10FF),), 32),
    "latin_extended": (((0x100, 0x17F),), 24),
    "geometric": (((0x25A0, 0x25FF),), 32),
    "ipa": (((0x250, 0x2AF),), 32),
    "cyrillic_upper": (((0x410, 0x42F),), 32),
    "greek_upper": (((0x391, 0x3A9),), 24),
    "punctuation": (((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x2010, 0x205E)), 32),
    "superscripts": (((0x2070, 0x209C),), 24),
    "block_elements": (((0x2580, 0x259F),), 32),
    "greek_extended": (((0x1F00, 0x1FFF),), 24),
}

FACES: dict[str, tuple[str, ...]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono",
        "DejaVuSansMono-Oblique", "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol",
    ),
    "validation": ("DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    "test": ("DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
             "STIXGeneralBolIta"),
}  # fmt: skip

# For experts that are merged: a scale is tuned on validation faces, and two of one family are few to choose it by. The
# base has seen all nine training faces, in the mild style.
WIDE_VALIDATION = FACES | {
    "train": tuple(face for face in FACES["train"] if face != "STIXGeneralBol"),
    "validation": (*FACES["validation"], "STIXGeneralBol"),
}


@dataclass(frozen=True)
class Style:
    """How a glyph is photographed. Lengths are shares of the image side.

    rotation is in degrees; rotation, shear, scale and shift are half-widths of uniform distributions; contrast is the
    largest loss of contrast; inversion, blur and stroke (thicker or thinner) are probabilities; noise is the standard
    deviation of white noise and clutter the amplitude of smooth background noise. slant, a constant shear, and
    halftone, the share of ink that the dark pixels of the screen lose, are the same in every photograph. Of a screen
    (a, b, p) those pixels (row i, column j) are dark for which (a i + b j) mod p is in the upper half of 0 … p − 1.
    """

    rotation: float = 5.0
    shear: float = 0.1
    scale: float = 0.08
    shift: float = 0.05
    noise: float = 0.03
    contrast: float = 0.2
    inversion: float = 0.5
    blur: float = 0.3
    stroke: float = 0.2
    clutter: float = 0.0
    slant: float = 0.0
    halftone: float = 0.0
    screen: tuple[int, int, int] = (1, 1, 2)  # a checkerboard


MILD = Style()
SHIFTED = Style(rotation=4, shear=0.08, shift=0.04, noise=0.05, contrast=0.3, clutter=0.15, slant=0.45, halftone=0.5)


def shifted_style(slant: float, halftone: float) -> Style:
    """Return the downstream style with another domain shift."""
    return replace(SHIFTED, slant=slant, halftone=halftone)


SCREENS = ((1, 1, 2), (1, 0, 2), (0, 1, 2), (1, 1, 4), (1, 3, 4), (1, 0, 4), (0, 1, 4), (1, 2, 4), (2, 1, 4), (1, 1, 3))
SLANTS = (1.0, -1.0, 0.5, -0.5)  # times the slant


def own_style(task: str, slant: float, halftone: float) -> Style:
    """Return the downstream style of one task in a domain that no other of the 20 tasks has.

    Ten screens (checkerboards, lines in several directions and widths) meet four slants: tasks whose slants or screens
    agree differ in the other. The strengths are those of `shifted_style`.

    Raises:
        ValueError: the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown glyph task {task!r}; there are {', '.join(TASKS)}")
    place = list(TASKS).index(task)
    own = SLANTS[place % len(SLANTS)] * slant
    return replace(SHIFTED, slant=own, halftone=halftone, screen=SCREENS[place % len(SCREENS)])


@dataclass(frozen=True)
class Glyphs:
    """Drawn glyphs of one split: images (N, 64, 64) uint8 with ink 255, and labels (N,) among `names` (the classes)."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


@cache
def characters(task: str) -> tuple[str, ...]:
    """Return the task's classes: visible characters that all twelve DejaVu faces hold, evenly thinned out.

    Raises:
        ValueError: the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown glyph task {task!r}; there are {', '.join(TASKS)}")
    ranges, most = TASKS[task]
    dejavu = [face for faces in FACES.values() for face in faces if "DejaVu" in face]
    drawable = frozenset.intersection(*map(_coverage, dejavu))
    found = [chr(point) for low, high in ranges for point in range(low, high + 1)
             if point in drawable and unicodedata.category(chr(point))[0] not in "CZ"]  # fmt: skip
    picks = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return tuple(found[pick] for pick in picks)


def class_names(task: str) -> tuple[str, ...]:
    """Return the Unicode names of the task's classes, in label order."""
    return tuple(unicodedata.name(character) for character in characters(task))


def glyphs(tasks: Sequence[str], split: str, faces: Mapping[str, tuple[str, ...]] = FACES) -> Glyphs:
    """Draw every class of `tasks` in every face of `split` (train, validation or test) that holds it.

    Args:
        tasks: names.
        split: a key of `faces`.
        faces: the faces of each split.

    Raises:
        ValueError: a task or the split is unknown.
    """
    if split not in faces:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(faces)}")
    alphabet = [character for task in tasks for character in characters(task)]
    pairs = [(label, face, character) for face in faces[split] for label, character in enumerate(alphabet)
             if ord(character) in _coverage(face)]  # fmt: skip
    images = torch.from_numpy(np.stack([_draw(face, character) for _, face, character in pairs]))
    names = tuple(name for task in tasks for name in class_names(task))
    return Glyphs(images, torch.tensor([label for label, _, _ in pairs]), names)


def photographs(data: Glyphs, style: Style, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """Photograph every glyph `copies` times with a fixed seed: images (copies·N, 3, 24, 24) float and their labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat([photograph(data.images, style, generator) for _ in range(copies)])
    return images, data.labels.repeat(copies)


def photograph(images: Tensor, style: Style, generator: Generator) -> Tensor:
    """Turn drawings (B, 64, 64) uint8 into photographs (B, 3, 24, 24), about in [−1, 1], one random view of each."""
    ink = images[:, None].float() / 255  # (B, 1, 64, 64)
    uniform = _Uniform(len(images), generator, images.device)
    ink = _stroke(ink, uniform(0, 1), style.stroke)
    ink = _warp(ink, style, uniform)  # (B, 1, 24, 24)
    ink = torch.where(uniform(0, 1) < style.blur, F.avg_pool2d(ink, 3, 1, 1), ink)
    ink = ink * (1 - style.halftone * _screen(style.screen, ink.device)) * uniform(1 - style.contrast, 1)
    if style.clutter:
        coarse = torch.rand(len(ink), 1, 4, 4, generator=generator).to(ink.device)
        ink = ink + style.clutter * F.interpolate(coarse, PIXELS, mode="bilinear", align_corners=True)
    ink = torch.where(uniform(0, 1) < style.inversion, 1 - ink, ink)
    ink = ink + style.noise * torch.randn(ink.shape, generator=generator).to(ink.device)
    return (2 * ink - 1).expand(-1, 3, -1, -1)


class _Uniform:
    """Uniform draws, one per sample: `uniform(low, high)` is (B, 1, 1, 1), drawn on the CPU for every device."""

    def __init__(self, batch: int, generator: Generator, device: torch.device):
        self.batch, self.generator, self.device = batch, generator, device

    def __call__(self, low: float, high: float) -> Tensor:
        draw = torch.rand(self.batch, 1, 1, 1, generator=self.generator)
        return (low + (high - low) * draw).to(self.device)


def _stroke(ink: Tensor, draw: Tensor, probability: float) -> Tensor:
    draw, ink = draw.flatten(), ink.clone()
    thicker, thinner = draw < probability / 2, draw > 1 - probability / 2
    ink[thicker] = F.max_pool2d(ink[thicker], 3, 1, 1)
    ink[thinner] = -F.max_pool2d(-ink[thinner], 3, 1, 1)
    return ink


def _warp(ink: Tensor, style: Style, uniform: _Uniform) -> Tensor:
    """Rotate, shear, scale and shift at twice the final size, then average down (no aliasing)."""
    angle = uniform(-1, 1).flatten() * math.radians(style.rotation)
    shear = style.slant + uniform(-1, 1).flatten() * style.shear
    size = 1 + uniform(-1, 1).flatten() * style.scale
    shift = 2 * style.shift
    dx, dy = uniform(-shift, shift).flatten(), uniform(-shift, shift).flatten()
    cos, sin = angle.cos() / size, angle.sin() / size
    theta = torch.stack([cos, shear * cos - sin, dx, sin, shear * sin + cos, dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(ink), 1, 2 * PIXELS, 2 * PIXELS], align_corners=False)
    return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)


def _screen(screen: tuple[int, int, int], device: torch.device) -> Tensor:
    down, along, period = screen
    index = torch.arange(PIXELS, device=device)
    return (2 * ((down * index[:, None] + along * index) % period) >= period).float()


@cache
def _coverage(face: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    return frozenset(TTFont(_font_file(face), lazy=True).getBestCmap())


def _font_file(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@cache
def _font(face: str):
    from PIL import ImageFont

    return ImageFont.truetype(str(_font_file(face)), 46)


def _draw(face: str, character: str) -> np.ndarray:
    """Draw one character, centred in x on a fixed baseline: (64, 64) uint8, ink 255."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SOURCE_PIXELS, SOURCE_PIXELS))
    ImageDraw.Draw(image).text((SOURCE_PIXELS / 2, 47), character, fill=255, font=_font(face), anchor="ms")
    return np.asarray(image)
