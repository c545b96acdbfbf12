"""Colours: a hue per micro-batch, lighter forwards, darker backwards, a shade per sub-sequence.

Copies of model chunks, which are of no micro-batch, have one colour for each direction.
"""

import math
from typing import NamedTuple

from seq1f1b.schedule import Action, Kind

# Neighbours in this list are far apart on the colour wheel, so neighbours in time are told apart.
_HUES = (255.0, 40.0, 155.0, 325.0, 85.0, 215.0, 10.0, 290.0, 125.0)


class _Tone(NamedTuple):
    lightest: float
    darkest: float
    chroma: float
    ink: str


_TONES = {
    Kind.F: _Tone(0.92, 0.80, 0.075, "#1d2433"),
    Kind.B: _Tone(0.64, 0.48, 0.125, "#ffffff"),
    Kind.I: _Tone(0.76, 0.64, 0.155, "#1d2433"),
    Kind.W: _Tone(0.77, 0.66, 0.035, "#1d2433"),
}


_LOAD, _FREE, _LIGHT = "#1f6f78", "#8a5a12", "#ffffff"


def fill(action: Action, num_splits: int) -> str:
    """Return the colour of a computation or copy as ``#rrggbb``."""
    if not action.kind.is_compute:
        return _LOAD if action.kind.is_load else _FREE
    tone = _TONES[action.kind]
    depth = action.sub_sequence / (num_splits - 1) if num_splits > 1 else 0.35
    lightness = tone.lightest + (tone.darkest - tone.lightest) * depth
    return _oklch(lightness, tone.chroma, _HUES[action.micro_batch % len(_HUES)])


def ink(action: Action) -> str:
    """Return the colour of a label on ``fill``."""
    return _TONES[action.kind].ink if action.kind.is_compute else _LIGHT


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """Convert from OKLCH, where equal steps look equal (Ottosson 2020), to sRGB."""
    a = chroma * math.cos(math.radians(hue))
    b = chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{_to_srgb(channel):02x}" for channel in linear)


def _to_srgb(linear: float) -> int:
    linear = min(max(linear, 0.0), 1.0)
    curved = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * curved)
