"""The reference's own checks, with their values, so that a pass can be seen too."""

from __future__ import annotations

import math
from typing import Any

from pyro_vi_lab.posterior import MAX_RHAT, MIN_EBFMI, MIN_ESS, Posterior
from pyro_vi_lab.report.parameters import labeled
from pyro_vi_lab.report.words import number


def reference_checks(reference: Posterior) -> list[dict[str, Any]]:
    """The checks of ``Posterior.problems()``: name, value, limit, where, and whether it passed."""
    convergence = reference.convergence()

    def extreme(key: str, largest: bool) -> tuple[str, float]:
        known = {name: value for name, value in labeled(convergence[key]).items() if not math.isnan(value)}
        if not known:
            return "", math.nan
        return (max if largest else min)(known.items(), key=lambda item: item[1])

    checks = []
    if reference.num_chains > 1:
        where, value = extreme("rhat", True)
        checks.append(_check("largest R-hat", number(value, 3), f"below {MAX_RHAT}", value < MAX_RHAT, where))
    for kind in ("bulk", "tail"):
        where, value = extreme(f"ess_{kind}", False)
        limit = f"at least {MIN_ESS:.0f}"
        checks.append(_check(f"smallest {kind} ESS", number(value, 0), limit, value >= MIN_ESS, where))
    if "diverging" in reference.stats:
        count = int(reference.stats["diverging"].sum())
        checks.append(_check("divergent transitions", str(count), "0", count == 0))
    ebfmi = reference.ebfmi()
    if ebfmi is not None:
        worst = int(ebfmi.argmin())
        value, limit = float(ebfmi[worst]), f"at least {MIN_EBFMI}"
        checks.append(_check("smallest E-BFMI", number(value), limit, value >= MIN_EBFMI, f"chain {worst}"))
    return checks


def _check(name: str, value: str, limit: str, ok: bool, where: str = "") -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "ok": ok, "where": where}
