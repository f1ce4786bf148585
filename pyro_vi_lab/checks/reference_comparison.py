"""All that tells an approximation from a reference, each number beside its noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_vi_lab.checks.classifier import ClassifierTest, classifier_test
from pyro_vi_lab.checks.correlations import CorrelationError, correlation_error
from pyro_vi_lab.checks.discrepancy import Discrepancy, discrepancy
from pyro_vi_lab.checks.interval_coverage import IntervalCoverage, interval_coverage
from pyro_vi_lab.checks.predictive_density import PredictiveComparison, compare_predictions
from pyro_vi_lab.checks.sliced_wasserstein import SlicedWasserstein, sliced_wasserstein
from pyro_vi_lab.posterior import Posterior

if TYPE_CHECKING:
    import pandas


class Measure(NamedTuple):
    """One number of a comparison.

    Args:
        name: What it is.
        value: Of the approximation against the reference.
        se: Its standard error.
        noise: What it comes to, about, where the approximation is right and has as many draws; of two halves of the
            reference, or from the Monte Carlo errors of both.
        where: The parameters that it is the worst of; empty of those that are of all.
    """

    name: str
    value: float
    se: float
    noise: float
    where: str


@dataclass(frozen=True, eq=False)
class ReferenceComparison:
    """How an approximation differs from a reference, by every measure.

    Args:
        discrepancy: Means, standard deviations and marginals.
        coverage: Of central intervals.
        sliced_wasserstein: Of the joint distribution.
        classifier: Two-sample test of the joint distribution.
        correlation: Of pairs; ``None`` where there is a single scalar.
        predictive: Expected log predictive density; ``None`` without log likelihoods.
    """

    discrepancy: Discrepancy
    coverage: IntervalCoverage
    sliced_wasserstein: SlicedWasserstein
    classifier: ClassifierTest
    correlation: CorrelationError | None
    predictive: PredictiveComparison | None

    def measures(self) -> list[Measure]:
        """The worst of each kind."""
        found, names = self.discrepancy, self.discrepancy.parameters
        shift = int(np.abs(found.mean_shift).argmax())
        with np.errstate(divide="ignore"):  # an approximation without spread
            stretch = np.abs(np.log(found.sd_ratio))
        ratio, far = int(stretch.argmax()), int(found.wasserstein.argmax())
        rows = [
            _worst("mean shift", found.mean_shift, found.mean_shift_mcse, found.mean_shift_mcse, shift, names),
            _worst("sd ratio", found.sd_ratio, found.sd_ratio_mcse, found.sd_ratio_mcse, ratio, names),
            # the distance of draws is noisy by what its noise is
            _worst("wasserstein", found.wasserstein, found.wasserstein_noise, found.wasserstein_noise, far, names),
        ]
        if self.correlation is not None:
            one = self.correlation
            where = ", ".join(one.largest_pair)
            rows.append(Measure("correlation error", one.largest, one.largest_se, one.noise, where))
        for level, covered in self.coverage.levels.items():
            worst = int(np.abs(covered.value - level).argmax())
            name = f"coverage of {100 * level:g} % intervals"
            rows.append(_worst(name, covered.value, covered.se, covered.noise, worst, names))
        sliced, test = self.sliced_wasserstein, self.classifier
        rows.append(Measure("sliced wasserstein", sliced.value, sliced.se, sliced.noise, ""))
        rows.append(Measure("classifier accuracy", test.accuracy, test.se, test.noise, ""))
        if self.predictive is not None:
            elpd = self.predictive
            rows.append(Measure("elpd difference", elpd.difference, elpd.se, elpd.noise, ""))
        return rows

    def table(self) -> pandas.DataFrame:
        """One row for the worst of each kind: ``measure``, ``value``, ``se``, ``noise``, ``where``."""
        import pandas

        return pandas.DataFrame(self.measures()).rename(columns={"name": "measure"})

    def to_dict(self) -> dict[str, Any]:
        """The worst of each kind as plain values, ready for JSON; what is not finite is ``None``."""
        return {
            one.name: {
                key: value if isinstance(value, str) or math.isfinite(value) else None
                for key, value in one._asdict().items()
                if key != "name"
            }
            for one in self.measures()
        }

    def __repr__(self) -> str:
        shown = [f"{one.name} {one.value:.3g} (noise {one.noise:.2g})" for one in self.measures()]
        return f"ReferenceComparison({', '.join(shown)})"


def against_reference(
    reference: Posterior,
    approximation: Posterior,
    *,
    log_likelihoods: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    seed: int = 0,
) -> ReferenceComparison:
    """Compare an approximation with a reference in every way.

    Args:
        reference: Draws to compare against; whether they are fit for it is :meth:`Posterior.problems`' to say.
        approximation: Draws to judge.
        log_likelihoods: Log likelihoods of the observed rows at the draws of the reference and of the approximation, as
            :meth:`Problem.log_likelihood <pyro_vi_lab.Problem.log_likelihood>` gives; without them there is no
            predictive density.
        seed: Seed of random directions.

    Raises:
        DataError: No common site, sites or rows whose shapes disagree, values that are not finite, or too few draws:
            200 of the reference and 100 of the approximation are needed.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> y = torch.randn(1, 1000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        >>> comparison = against_reference(Posterior({"x": x}), Posterior({"x": 0.5 * y}))
        >>> row = comparison.measures()[1]
        >>> row.name, round(row.value, 1)
        ('sd ratio', 0.5)
    """
    marginal = discrepancy(reference, approximation)
    return ReferenceComparison(
        discrepancy=marginal,
        coverage=interval_coverage(reference, approximation),
        sliced_wasserstein=sliced_wasserstein(reference, approximation, seed=seed),
        classifier=classifier_test(reference, approximation),
        correlation=correlation_error(reference, approximation) if len(marginal.parameters) > 1 else None,
        predictive=None if log_likelihoods is None else compare_predictions(*log_likelihoods),
    )


def _worst(name: str, value: Any, se: Any, noise: Any, index: int, names: tuple[str, ...]) -> Measure:
    return Measure(name, float(value[index]), float(se[index]), float(noise[index]), names[index])
