"""One order for the components of many mixtures: each mixture's are matched with those of a reference."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

FEW = 5
"""Most components of which all orders, 120 of five, are compared, for all mixtures at once."""


def matched(cost: Tensor) -> Tensor:
    r"""For each mixture the order of its components that costs least.

    .. math:: \arg\min_\sigma \sum_k c_{\sigma(k) k}

    Args:
        cost: Of taking component j of a mixture for component k of the reference.

    Of more than a few components by the Hungarian method.

    Shape:
        cost ``(S, K, K)``, result ``(S, K)``: entry k says which component of the mixture comes k-th.

    Example:
        >>> matched(torch.tensor([[[9.0, 0.0], [1.0, 9.0]]]))
        tensor([[1, 0]])
    """
    number = cost.shape[-1]
    if number <= FEW:
        every = torch.tensor(list(permutations(range(number))), device=cost.device)
        total = torch.stack([cost[:, every[:, k], k] for k in range(number)]).sum(0)
        return every[total.argmin(1)]
    from scipy.optimize import linear_sum_assignment  # which takes a while to import

    # rows of the transposed cost are the components of the reference, in their order
    orders = [linear_sum_assignment(one.mT.numpy(force=True))[1] for one in cost]
    return torch.stack([torch.as_tensor(order) for order in orders]).to(cost.device)


def reordered(values: Tensor, order: Tensor, axis: int) -> Tensor:
    """Values with their components in another order.

    Args:
        values: One entry along ``axis`` for each component.
        order: From :func:`matched`.
        axis: Axis of the components, counted from the left.

    Shape:
        values ``(S, ..., K, ...)``, order ``(S, K)``.
    """
    shape = [1] * values.dim()
    shape[0], shape[axis] = order.shape
    return values.gather(axis, order.reshape(shape).expand(values.shape))


def normal_divergences(loc: Tensor, covariance: Tensor, to_loc: Tensor, to_covariance: Tensor) -> Tensor:
    r"""Symmetric divergence KL(j ‖ k) + KL(k ‖ j) of normals, of each of one mixture and each of another.

    .. math:: \tfrac12 \mathrm{tr}(\Sigma_j \Lambda_k + \Sigma_k \Lambda_j) - D
        + \tfrac12 (\mu_j - \mu_k)^\top (\Lambda_j + \Lambda_k) (\mu_j - \mu_k)

    Shape:
        loc ``(S, J, D)``, covariance ``(S, J, D, D)``, of the other ``(K, D)`` and ``(K, D, D)``; result ``(S, J, K)``.
    """
    precision, to_precision = (torch.linalg.inv(value) for value in (covariance, to_covariance))
    apart = loc.unsqueeze(-2) - to_loc
    traces = torch.einsum("sjab,kab->sjk", covariance, to_precision)
    traces = traces + torch.einsum("sjab,kab->sjk", precision, to_covariance)
    squares = torch.einsum("sjka,sjab,sjkb->sjk", apart, precision, apart)
    squares = squares + torch.einsum("sjka,kab,sjkb->sjk", apart, to_precision, apart)
    return (traces + squares) / 2 - loc.shape[-1]
