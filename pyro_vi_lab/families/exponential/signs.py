"""Tables of signs in which few columns at a time show all combinations equally often."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def sign_design(num_columns: int, strength: int) -> Tensor:
    r"""A table of plus and minus ones, in any ``strength`` columns of which all combinations occur equally often.

    So its average of a product of functions of at most ``strength`` columns is the product of their averages. An
    orthogonal array with two levels: column j is :math:`(-1)^{v_j \cdot r}` over all bit strings r, where no
    ``strength`` or fewer of the bit strings :math:`v_j` add up to zero (a lexicographic code).

    Args:
        num_columns: Columns.
        strength: t, at least 1; with t columns or fewer the table has all combinations.

    Shape:
        result ``(R, num_columns)``, with R a power of two.

    References:
        Hedayat, Sloane & Stufken 1999, "Orthogonal Arrays", Theorem 4.6. Conway & Sloane 1986, "Lexicographic codes",
        IEEE Transactions on Information Theory 32.

    Example:
        >>> sign_design(3, 2)
        tensor([[ 1.,  1.,  1.],
                [-1.,  1., -1.],
                [ 1., -1., -1.],
                [-1., -1.,  1.]])
    """
    columns = list(_independent(num_columns, min(strength, num_columns)))
    bits = max(columns, default=0).bit_length()
    runs = torch.arange(2**bits)
    table = torch.zeros(len(runs), num_columns)
    for j, vector in enumerate(columns):
        overlap = runs & vector
        parity = sum(((overlap >> k) & 1 for k in range(bits)), start=torch.zeros_like(runs)) % 2
        table[:, j] = 1 - 2 * parity
    return table


def _independent(number: int, strength: int) -> Iterator[int]:
    """The smallest numbers of which no ``strength`` or fewer have the exclusive or zero."""
    chosen: list[int] = []
    candidate = 0
    # sums[k]: exclusive ors of exactly k of the chosen; a new number must not be one of fewer than ``strength``
    sums: list[set[int]] = [{0}] + [set() for _ in range(strength - 1)]
    while len(chosen) < number:
        candidate += 1
        if any(candidate in part for part in sums):
            continue
        for k in range(strength - 1, 0, -1):
            sums[k] |= {candidate ^ other for other in sums[k - 1]}
        chosen.append(candidate)
        yield candidate
