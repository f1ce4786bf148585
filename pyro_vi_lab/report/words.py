"""What the numbers of a comparison mean, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pyro_vi_lab.checks import Discrepancy

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison

MAX_KHAT = 0.7
"""Largest Pareto k-hat at which importance sampling is practical (Vehtari et al. 2024, Section 3.2.4)."""
MAX_MEAN_SHIFT = 0.5
"""Mean shift, in reference sds, above which bounds mislead: at 0.5 a normal one-sided 95% bound holds 87%."""
SD_RATIOS = (0.5, 2.0)
"""Sd ratios outside which intervals mislead: at 0.5 a normal 95% interval holds 67%."""
CLOSE_SHIFT = 0.1
"""Mean shift up to which means agree: a normal 95% interval still holds more than 94.8%."""
CLOSE_RATIO = 0.1
"""Distance of the sd ratio from 1 up to which sds agree: a normal 95% interval holds 92 to 97%."""
NOISE_ERRORS = 2.0
"""Monte Carlo standard errors by which a difference has to exceed a limit to count."""

Grade = Literal["agrees", "differs", "unjudged", "untrusted", "failed"]


@dataclass(frozen=True)
class Judgement:
    """One candidate in words.

    Args:
        name: The candidate.
        grade: ``"agrees"`` and ``"differs"`` are relative to the reference; ``"unjudged"`` means that there is no fit
            reference; ``"untrusted"`` that there is a reason not to use it at all; ``"failed"`` that it has no
            posterior.
        reasons: One sentence part each.
    """

    name: str
    grade: Grade
    reasons: Sequence[str]


def number(value: Any, digits: int = 2) -> str:
    """A number for people: fixed digits, a true minus sign, an n-dash for what is missing.

    Example:
        >>> number(-31.6512), number(float("nan")), number(4.9e7), number(1234.5, 0)
        ('−31.65', '–', '4.90e7', '1,234')
    """
    if value is None or math.isnan(float(value)):
        return "–"
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.2e}" if abs(value) >= 1e6 else f"{value:,.{digits}f}"
    return typeset("0" + text[2:] if float(text.replace(",", "")) == 0 and text.startswith("-") else text)


def on_scale(value: float, sd: float) -> str:
    """A value with as many digits as a standard deviation of ``sd`` leaves it.

    Example:
        >>> on_scale(1234.5678, 0.0213), on_scale(-712.3, 184.2), on_scale(1.5e-7, 2e-8)
        ('1,234.568', '−712', '1.50e−7')
    """
    if not (math.isfinite(value) and math.isfinite(sd)) or sd <= 0:
        return number(value)
    digits = max(0, 1 - math.floor(math.log10(sd)))
    if digits > 5 and abs(value) < 1e-2:
        return typeset(f"{value:.2e}")
    return number(value, min(digits, 8))


def typeset(text: str) -> str:
    """A number's text with true minus signs and a short exponent."""
    mantissa, _, exponent = text.partition("e")
    return (mantissa + (f"e{int(exponent)}" if exponent else "")).replace("-", "−")


def warnings_about(row: Mapping[str, Any], *, judged: bool) -> list[str]:
    """Why one candidate must not be trusted; empty where nothing speaks against it.

    Args:
        row: The candidate's numbers as in ``Comparison.table()``; what is missing is not judged.
        judged: Whether there is a reference that passes its own checks.
    """
    found = []
    khat = _known(row, "khat")
    error = float(row.get("khat_se") or 0)
    if khat - NOISE_ERRORS * error > MAX_KHAT:
        found.append(
            f"k-hat is {number(khat)}{f' ± {number(error)}' if error else ''} (must be at most {MAX_KHAT}): the "
            "posterior has mass where this approximation has almost none, so that even reweighted draws cannot be "
            "relied on"
        )
    if judged:
        shift, low, high = (_known(row, key) for key in ("max_mean_shift", "min_sd_ratio", "max_sd_ratio"))
        if shift > MAX_MEAN_SHIFT:
            found.append(
                f"the mean of {row['worst_mean_parameter']} is off by {number(shift)} reference standard deviations "
                f"(must be at most {MAX_MEAN_SHIFT})"
            )
        if low < SD_RATIOS[0]:
            found.append(
                f"a standard deviation is {number(low)} times the reference's (must be at least {SD_RATIOS[0]}): its "
                "intervals are far too narrow"
            )
        if high > SD_RATIOS[1]:
            found.append(
                f"a standard deviation is {number(high)} times the reference's (must be at most {SD_RATIOS[1]:.0f}): "
                "its intervals are far too wide"
            )
    return found


def judge(comparison: Comparison) -> list[Judgement]:
    """Every candidate in words, in the order of the comparison."""
    warnings = comparison.warnings()
    result = []
    for name, fit in comparison.fits.items():
        found = comparison.discrepancies.get(name)
        reasons = list(warnings[name])
        grade: Grade
        if name not in comparison.posteriors:
            grade = "failed"
        elif reasons:
            grade = "untrusted"
        elif comparison.reference_problems or found is None:
            grade = "unjudged"
        else:
            differing = _differing(found)
            grade = "differs" if differing else "agrees"
            reasons.append(_difference(found, differing))
        check = comparison.importance.get(name)
        if grade != "untrusted" and check is not None and check.khat > MAX_KHAT - NOISE_ERRORS * check.khat_se:
            reasons.append(
                f"k-hat is {number(check.khat)} ± {number(check.khat_se)}, which cannot be told from the limit of "
                f"{MAX_KHAT}: reweight its draws with care"
            )
        if fit.status.value == "out of steps":
            reasons.append(f"the fit {fit.message}")
        result.append(Judgement(name, grade, reasons))
    return result


def beside_reference(comparison: Comparison, name: str) -> tuple[Literal["agrees", "differs"], str] | None:
    """How one candidate compares with the reference; ``None`` where that is unfit, or has nothing to compare."""
    found = comparison.discrepancies.get(name)
    if comparison.reference_problems or found is None:
        return None
    differing = _differing(found)
    return "differs" if differing else "agrees", _difference(found, differing)


def summary(comparison: Comparison, *, each: bool = True) -> list[str]:
    """The outcome in a few sentences, the most important first.

    Args:
        comparison: What to tell.
        each: Also say of each candidate why it must not be trusted as it is.
    """
    sentences = []
    judgements = judge(comparison)
    usable = [item.name for item in judgements if item.grade in ("agrees", "differs")]
    closest = _closest(comparison)
    if comparison.reference_problems:
        sentences.append(
            f"The reference is unfit: {'; '.join(comparison.reference_problems)}. What looks like an error of a "
            "candidate may be an error of the reference, so no candidate can be judged by it. Reparameterize the "
            "model; "
            "more draws, or a target_accept towards 0.99, help in mild cases only."
        )
    elif closest is not None:
        worst = comparison.discrepancies[closest].summary()
        lead = "matches the reference best" if len(comparison.discrepancies) > 1 else "beside the reference"
        sentences.append(
            f"{closest} {lead}: no mean is off by more than {number(worst.max_mean_shift)} "
            f"reference standard deviations ({worst.worst_mean_parameter}), and its standard deviations are "
            f"{number(worst.min_sd_ratio)} to {number(worst.max_sd_ratio)} times the reference's."
        )
        if not usable and len(comparison.fits) > 1:
            sentences.append("Best does not mean good here: every candidate has a reason not to be trusted.")
    lowest = comparison.lowest
    if lowest is not None and len(comparison.elbos) > 1:
        value, error = comparison.elbos[lowest]
        again = lowest == closest and not comparison.reference_problems
        rivals = [
            name
            for name, (other, rival_error) in comparison.elbos.items()
            if name != lowest and value - other < NOISE_ERRORS * math.hypot(error, rival_error)
        ]
        if rivals:
            sentences.append(
                f"Its negative ELBO, {number(-value)} ± {number(error)} nats, cannot be told from that of "
                f"{' and '.join(rivals)}."
                if again
                else f"The negative ELBOs of {lowest} and {' and '.join(rivals)} cannot be told apart."
            )
        else:
            who = "It also has" if again else f"{lowest} has"
            sentences.append(f"{who} the lowest negative ELBO, {number(-value)} ± {number(error)} nats.")
    for item in judgements if each else []:
        if item.grade == "untrusted":
            verdict = comparison.verdicts.get(item.name)
            what = "must be reweighted" if verdict and verdict.decision == "reweight" else "must not be trusted"
            sentences.append(f"{item.name} {what}: {'; '.join(item.reasons)}.")
        elif item.grade == "failed":
            sentences.append(f"{item.name} has no posterior: {'; '.join(item.reasons)}.")
    return sentences


def reference_line(comparison: Comparison) -> str:
    """What the reference is, in one line."""
    reference = comparison.reference
    made = {"nuts": "NUTS", "hmc": "HMC", "exact": "the exact posterior", "": "given draws"}.get(
        reference.method, reference.method
    )
    chains = f"{reference.num_chains} chain{'s' if reference.num_chains > 1 else ''}"
    return f"{made}, {chains} of {reference.num_draws:,} draws"


def _known(row: Mapping[str, Any], key: str) -> float:
    """A number of the row; NaN, which no comparison is true of, where it is missing."""
    value = row.get(key)
    return math.nan if value is None else float(value)


def _differing(found: Discrepancy) -> list[str]:
    """Parameters whose mean or sd differs by more than a little and by more than Monte Carlo noise."""
    shift = np.abs(found.mean_shift) > CLOSE_SHIFT + NOISE_ERRORS * found.mean_shift_mcse
    ratio = np.abs(found.sd_ratio - 1) > CLOSE_RATIO + NOISE_ERRORS * found.sd_ratio_mcse
    return [found.parameters[i] for i in np.flatnonzero(shift | ratio)]


def _difference(found: Discrepancy, differing: Sequence[str]) -> str:
    total = len(found.parameters)
    limits = f"{CLOSE_SHIFT} sd in the mean or {CLOSE_RATIO:.0%} in the sd"
    if not differing:
        return f"none of its {total} parameters is off by more than {limits}, beyond Monte Carlo error"
    shown = ", ".join(differing[:4]) + (" and others" if len(differing) > 4 else "")
    verb = "is" if len(differing) == 1 else "are"
    return f"{len(differing)} of {total} parameters {verb} off by more than {limits}: {shown}"


def _closest(comparison: Comparison) -> str | None:
    """The candidate whose worst number is best: mean shifts, and logarithms of sd ratios, as the table has them."""
    worst = {}
    for name, found in comparison.discrepancies.items():
        seen = found.summary()
        worst[name] = max(
            seen.max_mean_shift, *(abs(math.log(max(r, 1e-300))) for r in (seen.min_sd_ratio, seen.max_sd_ratio))
        )
    return min(worst, key=worst.__getitem__) if worst else None
