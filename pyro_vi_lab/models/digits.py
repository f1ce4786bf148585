"""Images of digits in black and white."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vi_lab.errors import ExtraError


def binary_digits() -> Tensor:
    """scikit-learn's 1,797 digits as images of black and white pixels (above 7 of 16), ``(1797, 1, 8, 8)``.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ExtraError(
            "the digits come with scikit-learn, which is not installed: pip install 'pyro-vi-lab[examples]'"
        ) from error
    return (torch.tensor(datasets.load_digits().images)[:, None] > 7).to(torch.float64)
