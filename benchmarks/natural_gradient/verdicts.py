"""What the rows say: distances, ratios, false stops, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.natural_gradient.evaluation import arrival
from benchmarks.natural_gradient.suited import families
from benchmarks.target import WITHIN

Row = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Row]]

STANDARD_ERRORS = 3.0
STEP_GOAL, COST_GOAL, FALSE_GOAL = 20.0, 3.0, 0.01
KL_GOAL = 1e-2
"""Nats above the least KL of a family that a fit of a Gaussian may end with: the largest tolerance of the stop."""


@dataclass(frozen=True, eq=False)
class Line:
    """One posterior and family, with everyone's numbers.

    Args:
        posterior: Name of the posterior.
        family: Name of the guide.
        ours: Our row.
        adam: Adam's on our density.
        pyro: Pyro's.
        numpyro: NumPyro's.
    """

    posterior: str
    family: str
    ours: Row
    adam: Row
    pyro: Row
    numpyro: Row

    @property
    def name(self) -> str:
        return f"{self.posterior}, {self.family}"

    @property
    def suited(self) -> bool:
        return "skipped" not in self.ours and "failed" not in self.ours

    @property
    def best(self) -> float | None:
        """The best bound of any method, by the common draws; a peer's is known by its distance."""
        return self._best("common")

    def _best(self, draws: str) -> float | None:
        values = [row.get(draws) for row in (self.ours, self.long, self.adam)]
        found = [value for value in values if value is not None]
        if not found:
            return None
        # a peer was measured against the best of ours and Adam
        return max(found) + max([0.0, *(-row["gap"] for row in (self.pyro, self.numpyro) if "gap" in row)])

    @property
    def long(self) -> Row:
        """Ours with ten times the steps."""
        return self.ours.get("long") or {}

    @property
    def below_best(self) -> float | None:
        own, best = self.ours.get("judged"), self._best("judged")
        return None if own is None or best is None else best - own

    @property
    def below_longer(self) -> float | None:
        return _above(self.long.get("judged"), self.ours.get("judged"))

    @property
    def adam_below(self) -> float | None:
        """Nats by which Adam ends below ours."""
        return _above(self.ours.get("judged"), self.adam.get("judged"))

    @property
    def below_baseline(self) -> float | None:
        return _above(self.ours.get("baseline"), self.ours.get("elbo"))

    @property
    def adam_arrival(self) -> float | None:
        """Steps after which Adam's best run was within 0.1 nat of the best of any method, and stayed."""
        best = self.best
        if best is None or "path" not in self.adam:
            return None
        found = arrival(self.adam["path"], best)
        return None if found is None else float(found[0])

    @property
    def adam_ratio(self) -> float | None:
        """Adam's steps over all of ours, our stop included; a lower bound where Adam did not arrive."""
        if "path" not in self.adam or not self.ours.get("steps"):
            return None
        return (self.adam_arrival or float(self.adam["steps"])) / float(self.ours["steps"])


def _above(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def lines(rows: Rows) -> list[Line]:
    """One line per posterior and family of ours, in the order of the table."""
    found = []
    order = families()
    for key, ours in sorted(rows.get("ours", {}).items(), key=lambda one: _place(order, one[0])):
        posterior, family = key.split("|")
        others = [rows.get(part, {}).get(key, {}) for part in ("adam", "pyro", "numpyro")]
        found.append(Line(posterior, family, ours, *others))
    return found


def _place(order: list[str], key: str) -> tuple[int, str]:
    posterior, family = key.split("|")
    return order.index(family) if family in order else len(order), posterior


@dataclass(frozen=True, eq=False)
class Stops:
    """The stops of one posterior and family over the seeds.

    Args:
        name: Posterior and family.
        row: Its row.
        best: The best bound known, by the common draws.
    """

    name: str
    row: Row
    best: float | None

    @property
    def fits(self) -> list[Row]:
        return list(self.row.get("fits", ()))

    @property
    def converged(self) -> list[Row]:
        return [fit for fit in self.fits if fit["status"] == "converged"]

    @property
    def top(self) -> float:
        """The best bound known, a seed's own included."""
        own = [fit["common"] for fit in self.fits if fit["common"] is not None]
        return max([*own, *([] if self.best is None else [self.best])], default=float("nan"))

    @property
    def gaps(self) -> list[float]:
        return [self.top - fit["common"] for fit in self.converged]

    def false(self, errors: float = STANDARD_ERRORS) -> int:
        """Stops that say CONVERGED more than 0.1 nat and so many standard errors below the best known."""
        return sum(gap > WITHIN + errors * fit["error"] for gap, fit in zip(self.gaps, self.converged, strict=True))

    @property
    def wasted(self) -> list[int]:
        return [fit["wasted"] for fit in self.converged]


def stops(rows: Rows) -> list[Stops]:
    """The rows of many seeds with the best bounds known."""
    best = {f"{line.posterior}|{line.family}": line.best for line in lines(rows)}
    return [
        Stops(key.replace("|", ", "), row, best.get(key)) for key, row in rows.get("seeds", {}).items() if "fits" in row
    ]


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Args:
        what: What is measured.
        goal: What it should be, in words.
        found: What it is, in words.
        met: Whether it is; ``None`` where nothing was measured.
    """

    what: str
    goal: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "missed"


def goals(rows: Rows) -> list[Goal]:
    """Every goal, with what was found."""
    suited = [line for line in lines(rows) if line.suited]
    return [
        _converged(suited),
        _distance("below `gaussian_vi_baseline`, mean-field and full-rank", suited, "below_baseline"),
        _distance("below the best of any method", suited, "below_best"),
        _distance("below ours with ten times the steps", suited, "below_longer"),
        _adam(suited),
        _false(rows),
        _gaussians(rows),
        *_large(rows),
    ]


def _converged(suited: list[Line]) -> Goal:
    others = [line.name for line in suited if line.ours["status"] != "converged"]
    found = f"{len(suited) - len(others)} of {len(suited)}"
    return Goal(
        "fits that end CONVERGED, of all guides on the posteriors that suit them",
        "all",
        f"{found}; not: {_few(others)}" if others else found,
        not others if suited else None,
    )


def _distance(what: str, suited: list[Line], attribute: str) -> Goal:
    known = {line: getattr(line, attribute) for line in suited if getattr(line, attribute) is not None}
    # by fresh draws the bound has an error of its own; by common draws hardly any is left in a difference
    slack = {line: STANDARD_ERRORS * (line.ours.get("error") or 0) * (attribute == "below_baseline") for line in known}
    worse = sorted((line for line in known if known[line] > WITHIN + slack[line]), key=lambda line: -known[line])
    if not known:
        return Goal(f"nats {what}", f"≤ {WITHIN}", "–", None)
    worst = max(known, key=lambda line: known[line])
    found = f"{len(known) - len(worse)} of {len(known)} are; most {known[worst]:.3f} ({worst.name})"
    if len(worse) > 1:
        found += "; beyond: " + _few([f"{line.name} {known[line]:.2f}" for line in worse])
    return Goal(f"nats {what}", f"≤ {WITHIN}", found, not worse)


def _adam(suited: list[Line]) -> Goal:
    what = "Adam's steps (best of 4 learning rates, to 0.1 nat) over ours (to our stop)"
    known = {line: line.adam_ratio for line in suited if line.adam_ratio is not None}
    if not known:
        return Goal(what, f"median ≥ {STEP_GOAL:.0f}", "–", None)
    late = sum(line.adam_arrival is None for line in known)
    least = min(known, key=lambda line: known[line] or 0)
    median = statistics.median(value for value in known.values() if value is not None)
    found = (
        f"median {'≥ ' if late else ''}{median:.1f}, least {known[least]:.1f} ({least.name}); Adam had not arrived when it "
        f"was cut off in {late} of {len(known)}"
    )
    return Goal(what, f"median ≥ {STEP_GOAL:.0f}", found, median >= STEP_GOAL)


def _false(rows: Rows) -> Goal:
    what = "false stops: CONVERGED more than 0.1 nat (and 3 s.e.) below the best known"
    known = stops(rows)
    total = sum(len(one.converged) for one in known)
    if not total:
        return Goal(what, "< 1 %", "–", None)
    wrong = sum(one.false() for one in known)
    named = _few([f"{one.name} {one.false()}" for one in known if one.false()])
    found = f"{wrong} of {total} ({100 * wrong / total:.1f} %){': ' + named if named else ''}"
    return Goal(what, "< 1 %", found, wrong / total < FALSE_GOAL)


def _gaussians(rows: Rows) -> Goal:
    known = {key: max(row["kl"]) for key, row in rows.get("gaussians", {}).items() if "kl" in row}
    what = "Gaussian targets: nats above the least KL, of the worst seed"
    if not known:
        return Goal(what, f"≤ {KL_GOAL:g}", "–", None)
    worst = max(known, key=lambda key: known[key])
    return Goal(
        what, f"≤ {KL_GOAL:g}", f"most {known[worst]:.2g} ({worst.replace('|', ', ')})", known[worst] <= KL_GOAL
    )


def _large(rows: Rows) -> Iterable[Goal]:
    for family, row in rows.get("large", {}).items():
        if "fit" in row:
            seconds, memory = cost(row)
            found = f"{seconds:.2f} × the time, {memory:.2f} × the memory"
            what = f"a step in 10,000 dimensions, {family}, over its gradients alone"
            yield Goal(what, f"≤ {COST_GOAL:.0f} ×", found, max(seconds, memory) <= COST_GOAL)


def cost(row: Row) -> tuple[float, float]:
    """Time and memory of a step over those of its gradients; memory above what the process had before."""
    fit, gradient = row["fit"], row["gradient"]
    used = gradient["peak"] - gradient["before"]
    memory = (fit["peak"] - fit["before"]) / used if used > 0 else float("nan")
    return fit["seconds"] / gradient["seconds"], memory


def _few(names: list[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
