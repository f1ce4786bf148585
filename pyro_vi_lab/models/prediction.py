"""What a model with random weights predicts: how uncertain it is, of which kind, and whether rightly so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_lab.errors import ArgumentError, DataError

LEVELS = tuple(i / 20 for i in range(1, 20))
"""Levels of the central intervals whose coverage is looked at."""


@dataclass(frozen=True, eq=False)
class NormalPrediction:
    r"""Predictive distribution of an outcome whose mean a network gives: an equal mixture of normals.

    .. math::
        p(y \mid x) = \tfrac1S \sum_s \mathrm{Normal}(y \mid f_s(x), \sigma_s), \qquad
        \mathrm{Var}[y] = \underbrace{\mathrm{Var}_s[f_s(x)]}_{\text{epistemic}}
        + \underbrace{E_s[\sigma_s^2]}_{\text{aleatoric}}

    The epistemic part falls with more data, the aleatoric one does not.

    Args:
        outputs: Outputs of the network for every draw of its weights.
        noise: Standard deviation of the noise for every draw.

    Shape:
        outputs ``(S, N)`` or ``(S, N, K)``, noise ``(S,)``.

    Example:
        >>> prediction = NormalPrediction(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 2.0]))
        >>> prediction.mean, prediction.epistemic, prediction.aleatoric, prediction.variance
        (tensor([2.]), tensor([1.]), tensor([2.5000]), tensor([3.5000]))
    """

    outputs: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        if self.outputs.dim() not in (2, 3) or self.noise.shape != self.outputs.shape[:1]:
            raise DataError(
                f"outputs have shape {tuple(self.outputs.shape)} and noise {tuple(self.noise.shape)}; expected "
                "(draws, rows) or (draws, rows, outputs), and (draws,)"
            )

    @property
    def mean(self) -> Tensor:
        """Mean of the outcome, ``(N,)`` or ``(N, K)``."""
        return self.outputs.mean(0)

    @property
    def variance(self) -> Tensor:
        """Variance of the outcome: the sum of the two parts."""
        return self.epistemic + self.aleatoric

    @property
    def epistemic(self) -> Tensor:
        """Variance of the network's output over the draws (divisor S)."""
        return self.outputs.var(0, correction=0)

    @property
    def aleatoric(self) -> Tensor:
        """Mean variance of the noise."""
        return self.noise.square().mean().expand(self.outputs.shape[1:])

    def log_density(self, y: Tensor) -> Tensor:
        """Log predictive density of the outcome of each row, ``(N,)``, jointly of its K values."""
        density = self._normal().log_prob(self._outcome(y))
        joint = density.sum(-1) if density.dim() == 3 else density
        return joint.logsumexp(0) - math.log(len(joint))

    def cdf(self, y: Tensor) -> Tensor:
        """Probability of no more than the outcome, for each value; uniform over the rows of a calibrated model."""
        return self._normal().cdf(self._outcome(y)).mean(0)

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of the outcome that has probability ``level``, by bisection."""
        _check_levels([level])
        scale = self._noise()
        ends = []
        for probability in ((1 - level) / 2, (1 + level) / 2):
            place = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
            # the quantile of a mixture lies between those of its parts
            each = self.outputs + place * scale
            low, high = each.amin(0), each.amax(0)
            for _ in range(60):
                middle = (low + high) / 2
                below = self._normal().cdf(middle).mean(0) < probability
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            ends.append((low + high) / 2)
        return ends[0], ends[1]

    def coverage(self, y: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
        """Part of the outcomes inside their central intervals of each level, ``(levels,)``."""
        _check_levels(levels)
        distance = (2 * self.cdf(y) - 1).abs().reshape(-1)
        return torch.stack([(distance <= level).to(distance.dtype).mean() for level in levels])

    def calibration_error(self, y: Tensor, levels: Sequence[float] = LEVELS) -> float:
        """Mean absolute difference of coverage and level.

        References:
            Kuleshov, Fenner & Ermon 2018, "Accurate uncertainties for deep learning using calibrated regression",
            ICML, Section 3.5, there with squares.
        """
        covered = self.coverage(y, levels)
        return float((covered - torch.tensor(levels).to(covered)).abs().mean())

    def _noise(self) -> Tensor:
        return self.noise.reshape(-1, *(1,) * (self.outputs.dim() - 1))

    def _normal(self) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.outputs, self._noise())

    def _outcome(self, y: Tensor) -> Tensor:
        if y.shape != self.outputs.shape[1:]:
            raise DataError(f"y has shape {tuple(y.shape)}; expected that of the prediction, {(*self.mean.shape,)}")
        if not bool((finite := torch.isfinite(y.reshape(len(y), -1)).all(1)).all()):
            raise DataError(f"y has a missing or infinite value in row {int((~finite).nonzero()[0])}")
        return y.to(self.outputs)


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """Rows by the probability of the class that is predicted for them; empty bins have NaN for the two means.

    Args:
        confidence: Mean of that probability in each bin.
        accuracy: Part of the rows that are of the predicted class.
        count: Number of rows.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    r"""Predictive probabilities of classes, and the two parts of their entropy.

    .. math::
        p(y \mid x) = \tfrac1S \sum_s p_s(y \mid x), \qquad
        H[y] = \underbrace{H[y] - E_s H_s[y]}_{\text{mutual information of y and weights: epistemic}}
        + \underbrace{E_s H_s[y]}_{\text{aleatoric}}

    Args:
        log_probs: Log probability of each class for every draw of the weights.

    Shape:
        log_probs ``(S, N, C)``.

    References:
        Depeweg, Hernández-Lobato, Doshi-Velez & Udluft 2018, "Decomposition of uncertainty in Bayesian deep learning",
        ICML, eq. 8.

    Example:
        >>> probabilities = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two sure draws that disagree
        >>> prediction = ClassPrediction(probabilities.log())
        >>> prediction.mean, prediction.epistemic, prediction.aleatoric
        (tensor([[0.5000, 0.5000]]), tensor([0.6931]), tensor([0.]))
    """

    log_probs: Tensor

    def __post_init__(self) -> None:
        if self.log_probs.dim() != 3:
            raise DataError(f"log_probs have shape {tuple(self.log_probs.shape)}; expected (draws, rows, classes)")

    @property
    def mean(self) -> Tensor:
        """Probability of each class, ``(N, C)``."""
        return self.log_probs.exp().mean(0)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the prediction in nats, ``(N,)``: the sum of the two parts."""
        return _entropy(self.mean)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information of the class and the weights, ``(N,)``; falls with more data."""
        return (self.entropy - self.aleatoric).clamp_min(0.0)  # below zero by rounding alone

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the draws, ``(N,)``."""
        return _entropy(self.log_probs.exp()).mean(0)

    def log_density(self, y: Tensor) -> Tensor:
        """Log predictive probability of the class of each row, ``(N,)``."""
        labels = self._labels(y)
        each = self.log_probs.gather(-1, labels.expand(len(self.log_probs), -1)[..., None])[..., 0]
        return each.logsumexp(0) - math.log(len(each))

    def calibration(self, y: Tensor, num_bins: int = 10) -> CalibrationBins:
        """Confidence and accuracy in bins of equal width of the confidence, each ``(num_bins,)``."""
        if isinstance(num_bins, bool) or not isinstance(num_bins, int) or num_bins < 1:
            raise ArgumentError(f"num_bins must be a positive whole number, got {num_bins!r}")
        labels = self._labels(y)
        confidence, predicted = self.mean.max(-1)
        index = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)  # (a, b], as Guo et al.
        count = torch.bincount(index, minlength=num_bins)
        means = [
            torch.bincount(index, weights=values.double(), minlength=num_bins) / count
            for values in (confidence, predicted == labels)
        ]
        return CalibrationBins(means[0], means[1], count)

    def calibration_error(self, y: Tensor, num_bins: int = 10) -> float:
        r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|`.

        References:
            Guo, Pleiss, Sun & Weinberger 2017, "On calibration of modern neural networks", ICML, eq. 3.
        """
        bins = self.calibration(y, num_bins)
        used = bins.count > 0
        gaps = (bins.accuracy - bins.confidence)[used].abs()
        return float((gaps * bins.count[used]).sum() / bins.count.sum())

    def _labels(self, y: Tensor) -> Tensor:
        num_rows, num_classes = self.log_probs.shape[1:]
        if y.shape != (num_rows,):
            raise DataError(f"y has shape {tuple(y.shape)}; expected ({num_rows},), a label for each row")
        wrong = ~((y >= 0) & (y < num_classes) & (y == y.long()))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DataError(f"y has the label {float(y[row]):g} in row {row}; expected 0 to {num_classes - 1}")
        return y.long()


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def _check_levels(levels: Sequence[float]) -> None:
    for level in levels:
        if not 0 < level < 1:
            raise ArgumentError(f"a level is a probability between 0 and 1, got {level!r}")
