"""Right, wrong or unclear: every parameter against every estimate of the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.checks import Ensemble
from pyro_vi_lab.checks.moments import Closeness, Coverage, Moments

if TYPE_CHECKING:
    import pandas

RIGHT, WRONG, UNCLEAR = "right", "wrong", "unclear"
INTERVALS = (0.5, 0.9)
"""Probabilities of the central intervals whose coverage is judged: the middle and the tails."""
ERRORS = 2.0
"""Standard errors by which an estimate must clear a tolerance."""
MAX_MEMORY = 0.3
"""Correlation with the start above which chains do not speak for a fit: what they show of a shift is at most so much
too small."""
LEVEL = 0.05
"""Chance that one of all coordinates shows a correlation that is not there."""
MOST_NAMED = 5


class Source(NamedTuple):
    """One estimate of the truth.

    Args:
        name: ``"weights"``, ``"chains"`` or ``"reference"``.
        near: How far the guide is from it.
        coverage: Share of its draws in the guide's central intervals, by their probability.
        reliable: Whether it can speak for a fit; otherwise it can only speak against it.
    """

    name: str
    near: Closeness
    coverage: Mapping[float, Coverage]
    reliable: bool


class Mixing(NamedTuple):
    """Whether chains have forgotten their start, and have settled.

    Args:
        forgotten: Whether no correlation with the start is left that could hide a shift.
        memory: The largest correlation with it, of a coordinate or of its squared distance from the mean.
        coordinate: Its coordinate.
        settled: Whether means and spreads of the first half of the chains are those of the second.
        drifting: The coordinate that moves most.
    """

    forgotten: bool
    memory: float
    coordinate: int
    settled: bool
    drifting: int

    @property
    def reliable(self) -> bool:
        """Whether the chains can speak for a fit."""
        return self.forgotten and self.settled


def mixing(chains: Ensemble) -> Mixing:
    """Judge the memory and the drift of chains, given that the largest of many numbers of chance is not small."""
    memory, drift = chains.memory, chains.drift.abs()
    normal, dim = NormalDist(), memory.shape[-1]
    worst, moving = divmod(int(memory.argmax()), dim)[1], divmod(int(drift.argmax()), dim)[1]
    chance = normal.inv_cdf(1 - LEVEL / memory.numel()) * chains.memory_se
    return Mixing(
        forgotten=float(memory.max()) <= max(MAX_MEMORY, chance),
        memory=float(memory.max()),
        coordinate=worst,
        settled=float(drift.max()) <= normal.inv_cdf(1 - LEVEL / 2 / drift.numel()),
        drifting=moving,
    )


@dataclass(frozen=True)
class Judged:
    """Every parameter, judged.

    Args:
        names: Of the parameters.
        sources: What they were judged by; may be none.
        verdicts: Right, wrong or unclear.
        by: Index of the source that each is shown by, the strictest.
    """

    names: Sequence[str]
    sources: Sequence[Source]
    verdicts: Sequence[str]
    by: Sequence[int]

    @property
    def all_right(self) -> bool:
        """Whether every parameter is."""
        return bool(self.sources) and all(verdict == RIGHT for verdict in self.verdicts)

    def wrong(self) -> list[int]:
        """Which parameters are wrong, the worst first."""
        found = [i for i, verdict in enumerate(self.verdicts) if verdict == WRONG]
        return sorted(found, key=lambda i: -self._size(i))

    def _size(self, i: int) -> float:
        near = self.sources[self.by[i]].near
        return max(abs(float(near.shift[i])), abs(float(near.log_ratio[i])))

    def sources_agree(self, tolerances: tuple[float, float]) -> bool:
        """Whether the estimates of the truth differ by less than what would matter."""
        if len(self.sources) < 2:
            return True
        one, other = (source.near for source in self.sources[:2])
        ratio_error = torch.hypot(one.log_ratio_se, other.log_ratio_se)
        ratio_gap = (one.log_ratio - other.log_ratio).abs() - ERRORS * ratio_error
        # shifts are in standard deviations of the truth, of which the two have their own
        scale = torch.maximum(one.log_ratio.exp(), other.log_ratio.exp())
        shift_gap = (one.shift / one.log_ratio.exp() - other.shift / other.log_ratio.exp()).abs() * scale
        shift_gap = shift_gap - ERRORS * torch.hypot(one.shift_se, other.shift_se)
        return bool(((shift_gap <= tolerances[0]) & (ratio_gap <= math.log(tolerances[1]))).all())

    def reasons(self, tolerances: tuple[float, float]) -> list[str]:
        """What the parameters say, in words."""
        if not self.sources:
            return ["nothing reliable is known about the true means and standard deviations"]
        limits = f"{tolerances[0]:g} sd in the mean or a factor {tolerances[1]:g} in the sd, or have another shape"
        within = f"{tolerances[0]:g} sd in the mean and a factor {tolerances[1]:g} in the sd"
        total = len(self.names)
        if self.all_right:
            worst = max(range(total), key=self._size)
            return [
                f"all {total} means and standard deviations are confirmed to within {within}; the farthest is "
                f"{self._named(worst)}"
            ]
        found = []
        wrong, unclear = self.wrong(), [i for i, verdict in enumerate(self.verdicts) if verdict == UNCLEAR]
        if wrong:
            named = "; ".join(self._named(i) for i in wrong[:MOST_NAMED])
            more = f"; and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
            verb = "is" if len(wrong) == 1 else "are"
            found.append(f"{len(wrong)} of {total} parameters {verb} off by more than {limits}: {named}{more}")
        if unclear:
            shown = ", ".join(self.names[i] for i in unclear[:MOST_NAMED])
            more = f" and {len(unclear) - MOST_NAMED} more" if len(unclear) > MOST_NAMED else ""
            found.append(
                f"it cannot be told whether {shown}{more} {'is' if len(unclear) == 1 else 'are'} within {limits}"
            )
        return found

    def _named(self, i: int) -> str:
        source = self.sources[self.by[i]]
        near, middle = source.near, float(source.coverage[INTERVALS[0]].share[i])
        shift, ratio = float(near.shift[i]), math.exp(min(float(near.log_ratio[i]), 700.0))
        return (
            f"{self.names[i]} (mean off by {shift:+.2f} ± {float(near.shift_se[i]):.2f} sd, sd {ratio:.2f} times the "
            f"true one, the middle half holds {middle:.0%})"
        )

    def table(self, own: Moments) -> pandas.DataFrame:
        """One row per parameter; see :class:`~pyro_vi_lab.verdict.Verdict`."""
        import pandas

        rows: list[dict[str, Any]] = []
        for i, name in enumerate(self.names):
            row: dict[str, Any] = {"parameter": name, "mean": float(own.mean[i]), "sd": float(own.sd[i])}
            if self.sources:
                source = self.sources[self.by[i]]
                ratio = math.exp(min(float(source.near.log_ratio[i]), 700.0))
                row |= {
                    "mean_shift": float(source.near.shift[i]),
                    "mean_shift_se": float(source.near.shift_se[i]),
                    "sd_ratio": ratio,
                    "sd_ratio_se": ratio * float(source.near.log_ratio_se[i]),
                    "coverage_50": float(source.coverage[0.5].share[i]),
                    "coverage_90": float(source.coverage[0.9].share[i]),
                    "source": source.name,
                }
            rows.append({**row, "verdict": self.verdicts[i]})
        return pandas.DataFrame(rows, columns=list(TABLE))


TABLE = (
    "parameter",
    "mean",
    "sd",
    "mean_shift",
    "mean_shift_se",
    "sd_ratio",
    "sd_ratio_se",
    "coverage_50",
    "coverage_90",
    "source",
    "verdict",
)


def judged(names: Sequence[str], sources: Sequence[Source], tolerances: tuple[float, float]) -> Judged:
    """Wrong where any estimate says so by two standard errors; right where a reliable one says so and none doubts."""
    number = len(names)
    if not sources:
        return Judged(names, [], [UNCLEAR] * number, [0] * number)
    excess = torch.stack([_excess(source, tolerances, -ERRORS) for source in sources])
    clear = torch.stack([_excess(source, tolerances, ERRORS) for source in sources])
    wrong = (excess > 0).any(0)
    reliable = torch.tensor([source.reliable for source in sources])
    right = (clear[reliable] <= 0).any(0)
    by = excess.nan_to_num(nan=-math.inf).argmax(0).tolist()
    verdicts = [
        WRONG if bad else RIGHT if good else UNCLEAR for bad, good in zip(wrong.tolist(), right.tolist(), strict=True)
    ]
    return Judged(names, sources, verdicts, by)


def _excess(source: Source, tolerances: tuple[float, float], errors: float) -> Tensor:
    """By how many tolerances a parameter is outside, with so many standard errors added.

    What is not a number counts as neither wrong (errors are taken off) nor right (they are added).
    """
    near = source.near
    shift = (near.shift.abs() + errors * near.shift_se) / tolerances[0]
    ratio = (near.log_ratio.abs() + errors * near.log_ratio_se) / math.log(tolerances[1])
    worst = torch.maximum(shift, ratio) - 1
    for probability, found in source.coverage.items():
        low, high = coverage_limits(probability, tolerances)
        below, above = (low - found.share) / (probability - low), (found.share - high) / (high - probability)
        margin = errors * found.share_se / min(probability - low, high - probability)
        worst = torch.maximum(worst, torch.maximum(below, above) + margin)
    # 0/0: a constant that both agree on
    same = (near.shift.isnan() | (near.shift == 0)) & near.log_ratio.isnan() & (near.log_ratio_se == 0)
    return torch.where(same, torch.full_like(worst, -1.0), worst.nan_to_num(nan=math.copysign(math.inf, errors)))


def coverage_limits(probability: float, tolerances: tuple[float, float]) -> tuple[float, float]:
    """What a central interval of a normal guide may hold of a standard normal, at twice the tolerances.

    Twice, as this is to see another shape behind the right moments, such as one mode for two, and not the moments
    again.

    Example:
        >>> [round(limit, 2) for limit in coverage_limits(0.5, (0.3, 1.5))]
        [0.2, 0.87]
    """
    normal = NormalDist()
    half = normal.inv_cdf((1 + probability) / 2)
    shift, ratio = 2 * tolerances[0], tolerances[1] ** 2
    return (
        normal.cdf(shift + half / ratio) - normal.cdf(shift - half / ratio),
        normal.cdf(half * ratio) - normal.cdf(-half * ratio),
    )
