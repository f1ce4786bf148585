"""Pareto k-hat of the latent variables of every row, where rows are independent given all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vi_lab.checks.pareto import MAX_KHAT, importance
from pyro_vi_lab.errors import ArgumentError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class RowImportance:
    """What the importance weights of every row say about the approximation of its latent variables.

    Args:
        rows: Numbers of the rows.
        khat: Pareto k-hat of each; minus infinity where the approximation is exact.
        khat_se: Its standard error.
        ess_fraction: Effective number of draws after reweighting, divided by the number of draws.
        support_mismatch: Fraction of the draws at which the model's density is zero.
        num_draws: Draws of each row, S.

    Shape:
        arrays ``(n,)``.
    """

    rows: tuple[int, ...]
    khat: Array
    khat_se: Array
    ess_fraction: Array
    support_mismatch: Array
    num_draws: int

    @property
    def worst(self) -> int:
        """The row with the largest k-hat."""
        return self.rows[int(self.khat.argmax())]

    @property
    def share_above(self) -> float:
        """Share of the rows whose k-hat is above 0.7, for which the approximation is of no use to importance sampling.

        References:
            Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling", JMLR 25(72), Section 3.2.
        """
        return float((self.khat > MAX_KHAT).mean())

    def __repr__(self) -> str:
        i = int(self.khat.argmax())
        return (
            f"RowImportance({len(self.rows)} rows, {self.share_above:.1%} with k-hat above {MAX_KHAT}; largest "
            f"{self.khat[i]:.2f} ± {self.khat_se[i]:.2f} of row {self.rows[i]}, median {np.median(self.khat):.2f})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, arrays as lists."""
        numbers = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(self).items()}
        return {**numbers, "worst": self.worst, "share_above": self.share_above}


def importance_by_row(log_p: Tensor, log_q: Tensor, *, rows: Sequence[int] | None = None) -> RowImportance:
    r"""Pareto k-hat of every row, from the densities of its own latent variables.

    Where the rows' latent variables :math:`z_n` are independent given the global ones θ, in the model and in the
    approximation,

    .. math:: w_{ns} = \frac{p(x_n, z_{ns} \mid \theta)}{q(z_{ns} \mid \theta)}, \qquad z_{ns} \sim q(\cdot \mid \theta)

    are weights of the row alone: the weights of all rows together are their product, whose tail says next to nothing
    where there are many rows.

    Args:
        log_p: :math:`\log p(x_n, z_{ns} \mid \theta)` of every draw and row.
        log_q: :math:`\log q(z_{ns} \mid \theta)`.
        rows: Numbers of the rows.

    Shape:
        both ``(S, n)``.

    Raises:
        ArgumentError: The shapes disagree, or there are no rows.
        DataError: As of :func:`importance`.

    References:
        Yao, Vehtari, Simpson, Gelman 2018, "Yes, but did it work?: Evaluating variational inference", ICML, Section 2.

    Example:
        >>> import torch
        >>> z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> found = importance_by_row(-(z**2) * torch.tensor([0.5, 0.1]), -0.5 * z**2)
        >>> found.worst, found.khat[0]
        (1, np.float64(-inf))
    """
    if log_p.dim() != 2 or log_p.shape != log_q.shape or not log_p.shape[1]:
        raise ArgumentError(
            f"log_p has shape {tuple(log_p.shape)} and log_q {tuple(log_q.shape)}; both must be (draws, rows)"
        )
    numbers = tuple(range(log_p.shape[1])) if rows is None else tuple(int(row) for row in rows)
    if len(numbers) != log_p.shape[1]:
        raise ArgumentError(f"there are {len(numbers)} numbers of {log_p.shape[1]} rows")
    checks = [importance(log_p[:, i], log_q[:, i]) for i in range(log_p.shape[1])]
    return RowImportance(
        rows=numbers,
        khat=np.array([check.khat for check in checks]),
        khat_se=np.array([check.khat_se for check in checks]),
        ess_fraction=np.array([check.ess_fraction for check in checks]),
        support_mismatch=np.array([check.support_mismatch for check in checks]),
        num_draws=len(log_p),
    )
