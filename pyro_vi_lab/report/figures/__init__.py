"""The pictures of the report: numbers in, an ``<svg>`` element out."""

from __future__ import annotations

from pyro_vi_lab.report.figures.calibration import ranks
from pyro_vi_lab.report.figures.convergence import convergence
from pyro_vi_lab.report.figures.drawing import SIZES
from pyro_vi_lab.report.figures.forest import forest
from pyro_vi_lab.report.figures.graph import graph_picture
from pyro_vi_lab.report.figures.legend import swatch
from pyro_vi_lab.report.figures.marginals import marginal
from pyro_vi_lab.report.figures.pairs import Shape, pair
from pyro_vi_lab.report.figures.predictive import bars, cumulative
from pyro_vi_lab.report.figures.weights import khats, weight_tails

__all__ = [
    "SIZES",
    "Shape",
    "bars",
    "convergence",
    "cumulative",
    "forest",
    "graph_picture",
    "khats",
    "marginal",
    "pair",
    "ranks",
    "swatch",
    "weight_tails",
]
