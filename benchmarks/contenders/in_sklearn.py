"""scikit-learn: the classical counterparts, which give a point or a Gaussian in closed form."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from sklearn.linear_model import BayesianRidge, LogisticRegression

from benchmarks.channel import Channel


def fit(channel: Channel, *, model: str, data: dict[str, np.ndarray], prior_sd: float, repeats: int) -> None:
    """Seconds of each of several fits."""
    seconds = []
    for _ in range(repeats):
        estimator = {
            "logistic_regression": lambda: LogisticRegression(C=prior_sd**2, fit_intercept=False),
            "linear_regression": lambda: BayesianRidge(fit_intercept=False),
        }[model]()
        began = time.perf_counter()
        estimator.fit(data["X"], data["y"])
        seconds.append(time.perf_counter() - began)
    channel.send({"seconds": seconds})


COMMANDS: dict[str, Callable[..., None]] = {"fit": fit}
