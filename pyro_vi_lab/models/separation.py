"""Which columns of a table tell two classes apart without an error."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def separating(X: Tensor, classes: Tensor) -> tuple[int, ...]:
    r"""Columns that separate the rows of one class from all others; none if no hyperplane does.

    Where one does, :math:`s_n (\beta_0 + x_n^\top \beta) \ge 0` for every row, with a sign :math:`s_n` for each class
    and some row where it is more, the likelihood of a logistic regression rises along :math:`(\beta_0, \beta)` without
    end. A single column is looked for first; else it is a linear program, and of its columns no more than are needed,

    .. math:: \max_\beta \sum_n s_n (\beta_0 + x_n^\top \beta) \quad
        \text{subject to} \quad s_n (\beta_0 + x_n^\top \beta) \ge 0, \; |\beta| \le 1.

    Args:
        X: Covariates.
        classes: Class of each row.

    Shape:
        X ``(N, D)``, classes ``(N,)``.

    References:
        Albert & Anderson 1984, "On the existence of maximum likelihood estimates in logistic regression models",
        Biometrika 71(1). Konis 2007, "Linear programming algorithms for detecting separated data in binary logistic
        regression models", thesis, Oxford, Section 4.2.

    Example:
        >>> X = torch.tensor([[0.0, 1.0], [3.0, 2.0], [1.0, 5.0], [2.0, 6.0]])
        >>> separating(X, torch.tensor([0, 0, 1, 1]))
        (1,)
    """
    found = sorted(set(classes.tolist()))
    signs = [torch.where(classes == one, 1.0, -1.0).to(X) for one in (found[1:] if len(found) == 2 else found)]
    for sign in signs if len(found) > 1 else ():
        inside, outside = X[sign > 0], X[sign < 0]
        above = inside.amin(0) >= outside.amax(0)
        below = inside.amax(0) <= outside.amin(0)
        alone = ((above | below) & (X.amax(0) > X.amin(0))).nonzero().flatten().tolist()
        if alone:
            return tuple(alone)
    for sign in signs if len(found) > 1 else ():
        columns = list(range(X.shape[1]))
        if not _separates(X, sign):
            continue
        for column in reversed(range(X.shape[1])):
            fewer = [one for one in columns if one != column]
            if fewer and _separates(X[:, fewer], sign):
                columns = fewer
        return tuple(columns)
    return ()


def _separates(X: Tensor, sign: Tensor) -> bool:
    """Whether some hyperplane has all rows of either sign on its side, and not all rows in it."""
    from scipy.optimize import linprog  # which takes a while to import

    scaled = (X - X.mean(0)) / X.std(0, correction=0).clamp_min(torch.finfo(X.dtype).tiny)
    signed = (sign[:, None] * torch.cat([torch.ones_like(scaled[:, :1]), scaled], 1)).numpy(force=True)
    result = linprog(-signed.sum(0), A_ub=-signed, b_ub=np.zeros(len(signed)), bounds=(-1, 1), method="highs")
    # HiGHS takes a constraint for kept that fails by 1e-7
    return result.status == 0 and -result.fun > 1e-6 * len(signed)
