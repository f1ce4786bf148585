"""The operators of ATen that can be written in C; one that is not in the table is refused by name."""

from __future__ import annotations

from pyro_vi_lab.c_operators import indexing, linear_algebra, pointwise, reductions, views
from pyro_vi_lab.c_operators.arguments import Operator, Result
from pyro_vi_lab.c_operators.views import VIEWS

OPERATORS: dict[str, Operator] = {
    **pointwise.OPERATORS,
    **views.OPERATORS,
    **reductions.OPERATORS,
    **indexing.OPERATORS,
    **linear_algebra.OPERATORS,
}
"""By the name of the overload, as ``aten.exp.default``."""

__all__ = ["OPERATORS", "VIEWS", "Operator", "Result"]
