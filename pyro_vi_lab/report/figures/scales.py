"""Scales of a picture: where a value lies, and which values the axis names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyro_vi_lab.report.words import typeset

Array = NDArray[Any]
Tick = tuple[float, str]

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LARGEST = 1e300
"""Values are cut off here, where the differences between them are still finite."""


@dataclass(frozen=True)
class Scale:
    """From values between ``low`` and ``high`` to places between ``start`` and ``end``.

    Args:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Place of the lowest value.
        end: Place of the highest value.
        kind: ``"symlog"`` is linear between -1 and 1 and logarithmic beyond.

    Example:
        >>> Scale(0.0, 10.0, 100.0, 200.0)(5.0).item()
        150.0
        >>> [text for _, text in Scale(-1.0, 2.0, 0.0, 1.0).ticks(4)]
        ['−1', '0', '1', '2']
    """

    low: float
    high: float
    start: float
    end: float
    kind: Literal["linear", "log", "symlog"] = "linear"

    def __call__(self, values: ArrayLike) -> Array:
        """Places of values; those of values that are not finite are not finite."""
        low, high, middle = (self._flat(np.asarray(value, float)) for value in (self.low, self.high, values))
        width = high - low
        share = (middle - low) / width if width > 0 else np.full_like(middle, 0.5)
        return np.asarray(self.start + share * (self.end - self.start))

    def ticks(self, most: int) -> list[Tick]:
        """At most about ``most`` round values of the scale, with their texts."""
        return decades(self.low, self.high, most) if self.kind != "linear" else round_values(self.low, self.high, most)

    def _flat(self, values: Array) -> Array:
        values = np.clip(values, -LARGEST, LARGEST)
        if self.kind == "log":
            return np.log10(values)
        if self.kind == "symlog":
            size = np.maximum(np.abs(values), 1.0)
            return np.asarray(np.where(np.abs(values) <= 1, values, np.sign(values) * (1 + np.log10(size))))
        return values / 2  # so that the width of the widest scale is finite


def round_values(low: float, high: float, most: int) -> list[Tick]:
    """Multiples of a round number between two values.

    Example:
        >>> round_values(0.0, 0.9, 4)
        [(0.0, '0.00'), (0.25, '0.25'), (0.5, '0.50'), (0.75, '0.75')]
    """
    width = high - low
    if not (math.isfinite(width) and width > abs(high) * 1e-12):
        return [(low, tick_text(low, abs(low) or 1.0))]
    rough = width / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    if power == 0:
        return [(low, tick_text(low, abs(low) or 1.0))]
    step = next(factor * power for factor in STEPS if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, tick_text(i * step, step)) for i in range(first, last + 1)]


def decades(low: float, high: float, most: int) -> list[Tick]:
    """Zero and powers of ten between two values."""
    found = [0.0] if low <= 0 <= high else []
    top = math.floor(math.log10(high) + 1e-9) if high > 0 else -1
    bottom = math.ceil(math.log10(low) - 1e-9) if low > 0 else 0
    every = max(1, math.ceil((top - bottom + 1) / max(most - len(found), 1)))
    found += [10.0**k for k in range(bottom, top + 1, every)]
    return [(value, tick_text(value, value or 1.0)) for value in found]


def tick_text(value: float, step: float) -> str:
    """A value with the digits that tell it from its neighbors, ``step`` away.

    Example:
        >>> tick_text(-1500.0, 500.0), tick_text(2e6, 1e6), tick_text(0.0025, 0.0025), tick_text(1e-7, 1e-7)
        ('−1,500', '2e6', '0.0025', '1e−7')
    """
    if value == 0 and step < 1e-4:
        return "0"
    if value != 0 and (abs(value) >= 1e6 or step < 1e-4):
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step)))
        return typeset(f"{value:.{min(digits, 6)}e}")
    power = math.floor(math.log10(step) + 1e-9)
    digits = max(0, -power) + (1 if round(step / 10.0**power, 6) == 2.5 and power <= 0 else 0)
    return typeset(f"{value + 0.0:,.{digits}f}")
