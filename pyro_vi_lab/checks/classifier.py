"""Can a classifier tell the draws of an approximation from those of a reference?"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_vi_lab.checks.scalars import common_scalars, halves
from pyro_vi_lab.checks.sliced_wasserstein import whitening
from pyro_vi_lab.errors import DataError
from pyro_vi_lab.posterior import Posterior

Array = NDArray[Any]

MIN_DRAWS = 100
"""Fewest draws of each kind to train on and to judge by."""
MAX_DRAWS = 1000
"""Draws of each kind that the classifier sees."""
NUM_FOLDS = 5
RIDGE = 1.0
"""Precision of the normal prior of the coefficients of standardized features."""
CLIP = 5.0
"""Standard deviations at which coordinates are cut off, so that a single far draw does not make a cube of its own."""
MAX_PAIRED = 20
"""Coordinates up to which their products are features."""


@dataclass(frozen=True)
class ClassifierTest:
    """Accuracy of a classifier on draws that it was not trained on.

    Args:
        accuracy: Share of draws told rightly; one half where there is nothing to tell.
        se: Its standard error.
        noise: The accuracy between the two halves of the reference.
        p_value: Of an accuracy of one half, one-sided.
        num_draws: Draws of each kind.
    """

    accuracy: float
    se: float
    noise: float
    p_value: float
    num_draws: int


def classifier_test(reference: Posterior, approximation: Posterior) -> ClassifierTest:
    r"""Classifier two-sample test, beside that of two halves of the reference.

    The classifier is a logistic regression on whitened coordinates u, their squares, cubes and products,
    cross-validated over blocks of successive draws. The logarithm of the ratio of two normals is a quadratic function,
    so that no classifier tells a normal approximation from a normal posterior better; cubes and products see skewness
    and funnels. It needs neither tuning nor a package, and takes a part of a second; for what has the same first three
    moments it is blind, unlike a large network that is trained long enough.

    Args:
        reference: Draws to compare against.
        approximation: Draws to judge.

    Raises:
        DataError: As :func:`~pyro_vi_lab.checks.discrepancy`, or fewer than 100 draws in a half of the reference or of
            the approximation.

    References:
        Lopez-Paz & Oquab 2017, "Revisiting classifier two-sample tests", ICLR.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> test = classifier_test(Posterior({"x": x}), Posterior({"x": 0.5 * x}))
        >>> test.accuracy > 0.6, test.p_value < 1e-3
        (True, True)
    """
    pair = common_scalars(reference, approximation)
    first, second, other = halves(pair, MAX_DRAWS)
    if len(first) < MIN_DRAWS:
        raise DataError(
            f"too few draws: a classifier would be trained on {len(first)} of each kind; at least {MIN_DRAWS} in each "
            "half of the reference and in the approximation are needed"
        )
    one, two = _right(first, other), _right(second, other)
    blocks = np.concatenate([one, two])
    accuracy = float(blocks.mean())
    se = float(blocks.std(ddof=1)) / math.sqrt(len(blocks))
    # draws of the approximation are judged twice: their number is what the null distribution has
    least = math.sqrt(0.25 / (2 * len(first)))
    return ClassifierTest(
        accuracy=accuracy,
        se=se,
        noise=float(_right(first, second).mean()),
        p_value=0.5 * math.erfc((accuracy - 0.5) / max(least, se) / math.sqrt(2)),
        num_draws=len(first),
    )


def _right(x: Array, y: Array) -> Array:
    """Share of held-out draws of both kinds that are told rightly, by fold and kind, ``(2 * folds,)``."""
    edges = np.linspace(0, len(x), NUM_FOLDS + 1).astype(int)
    shares = []
    for start, end in itertools.pairwise(edges):
        held = np.zeros(len(x), bool)
        held[start:end] = True
        coordinates = _coordinates(x[~held], y[~held])
        features, center, scale = _standardized([x[~held], y[~held]], coordinates)
        labels = np.repeat([0.0, 1.0], (~held).sum())
        weights = _logistic(features, labels)
        for kind, draws in enumerate((x[held], y[held])):
            scores = (
                np.column_stack([np.ones(end - start), (_features(draws, *coordinates) - center) / scale]) @ weights
            )
            shares.append(float((scores > 0).mean() if kind else (scores <= 0).mean()))
    return np.array(shares)


def _coordinates(x: Array, y: Array) -> tuple[Array, Array]:
    """A center and a matrix of coordinates in which x is white and the covariance of y is diagonal."""
    matrix = whitening(x)
    rotation = np.linalg.eigh(np.atleast_2d(np.cov(y @ matrix, rowvar=False)))[1]
    return x.mean(0), matrix @ rotation


def _features(draws: Array, center: Array, matrix: Array) -> Array:
    u = np.clip((draws - center) @ matrix, -CLIP, CLIP)
    columns = [u, u**2, u**3]
    if u.shape[1] <= MAX_PAIRED:
        i, j = np.triu_indices(u.shape[1], 1)
        columns += [u[:, i] * u[:, j], u[:, i] ** 2 * u[:, j], u[:, i] * u[:, j] ** 2]
    return np.concatenate(columns, 1)


def _standardized(sets: list[Array], coordinates: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    features = np.concatenate([_features(draws, *coordinates) for draws in sets])
    center, scale = features.mean(0), np.maximum(features.std(0), np.finfo(float).tiny)
    return np.column_stack([np.ones(len(features)), (features - center) / scale]), center, scale


def _logistic(features: Array, labels: Array) -> Array:
    """Coefficients at the mode, the intercept first and free."""
    from scipy.optimize import minimize
    from scipy.special import expit

    signs = 2 * labels - 1
    ridge = np.full(features.shape[1], RIDGE)
    ridge[0] = 0.0

    def loss(weights: Array) -> tuple[float, Array]:
        margins = signs * (features @ weights)
        value = np.logaddexp(0, -margins).sum() + (ridge * weights**2).sum() / 2
        return float(value), -features.T @ (signs * expit(-margins)) + ridge * weights

    return np.asarray(minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B").x)
