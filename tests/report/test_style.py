"""The colors of the candidates, as they are seen with and without the three kinds of cones."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import numpy as np
import pytest

STYLE = resources.files("pyro_vi_lab.report").joinpath("style.css").read_text("utf-8")
SCHEMES = dict(
    zip(("light", "dark", "print"), re.findall(r":root \{(.*?)\n\s*\}", STYLE, flags=re.DOTALL), strict=True)
)
# Machado, Oliveira & Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", Table 1.
VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.95047, 1.0, 1.08883])
NOTICEABLE = 2.3
"""Distance in CIELAB that is just noticed (Mahy, Van Eycken & Oosterlinck 1994)."""


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x = TO_XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def colors(scheme: str) -> list[str]:
    return re.findall(r"--c\d: (#[0-9a-f]{6})", SCHEMES[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("vision", VISION)
def test_candidates_are_told_apart_by_color_with_any_cones(scheme: str, vision: str) -> None:
    seen = [lab(VISION[vision] @ linear(color)) for color in colors(scheme)]
    assert len(seen) == 6
    # thin lines need several times what is just noticed between large areas
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 8 * NOTICEABLE


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_stand_out_from_their_ground(scheme: str) -> None:
    (ground,) = re.findall(r"--card: (#[0-9a-f]{3,6})", SCHEMES[scheme])
    below = float(TO_XYZ[1] @ linear(ground if len(ground) == 7 else "#ffffff"))
    for color in colors(scheme):
        light, dark = sorted((float(TO_XYZ[1] @ linear(color)), below), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, color  # WCAG 2.2, 1.4.11
