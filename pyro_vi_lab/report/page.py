"""The page: what is shown where. How it looks is in the template."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_lab.posterior import MAX_RHAT, MIN_EBFMI, MIN_ESS, Posterior, element_name
from pyro_vi_lab.report import figures
from pyro_vi_lab.report.words import (
    CLOSE_RATIO,
    CLOSE_SHIFT,
    MAX_KHAT,
    MAX_MEAN_SHIFT,
    SD_RATIOS,
    judge,
    number,
    on_scale,
    reference_line,
    summary,
)

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison
    from pyro_vi_lab.problem import Problem

MAX_FOREST = 40
MAX_MARGINALS = 24
MAX_TABLE = 200
"""Most parameters shown, the worst ones first; ``comparison.json`` has all of them."""


def render(comparison: Comparison) -> str:
    """One self-contained HTML page: no scripts, no files beside it, no requests.

    Args:
        comparison: What to show.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_vi_lab.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    environment.filters["on_scale"] = on_scale
    return environment.get_template("page.html.j2").render(view(comparison))


def view(comparison: Comparison) -> dict[str, Any]:
    """Everything that the template shows, by its names there."""
    numbers = comparison.to_dict()
    version = numbers["versions"]["pyro-vi-lab"]
    judgements = {item.name: item for item in judge(comparison)}
    reference, *rows = [_missing_as_none(row) for row in comparison.table().to_dict("records")]
    worst = _worst_first(comparison)
    names = list(comparison.fits)
    return {
        "title": comparison.problem.name,
        "facts": _facts(comparison),
        "summary": summary(comparison),
        "unfit": bool(comparison.reference_problems),
        "reference": reference,
        "reference_line": reference_line(comparison),
        "candidates": [
            {
                **row,
                "swatch": figures.swatch(names.index(row["candidate"])),
                "grade": judgements[row["candidate"]].grade,
                "reasons": judgements[row["candidate"]].reasons,
                "message": comparison.fits[row["candidate"]].message,
                "best": row["candidate"] == comparison.best,
            }
            for row in rows
        ],
        "limits": {
            "khat": MAX_KHAT,
            "shift": MAX_MEAN_SHIFT,
            "ratios": SD_RATIOS,
            "close_shift": CLOSE_SHIFT,
            "close_ratio": f"{CLOSE_RATIO:.0%}",
        },
        "total": len(worst),
        **_pictures(comparison, worst),
        "parameters": _parameter_rows(comparison, worst[:MAX_TABLE]),
        "checks": _reference_checks(comparison.reference),
        "reproduce": _reproduce(comparison),
        "provenance": _provenance(comparison, numbers),
        "maker": f"pyro-vi-lab {version}" if version[:1].isdigit() else "pyro-vi-lab",
    }


def _facts(comparison: Comparison) -> list[str]:
    """What the problem is, in a few short phrases."""
    problem = comparison.problem
    counts = {
        kind: [s for s in problem.sites.values() if s.kind == kind] for kind in ("latent", "discrete", "observed")
    }
    latent = len(counts["latent"])
    facts = [f"{problem.density().dim} unknowns in {latent} latent site{'s' if latent > 1 else ''}"]
    if counts["discrete"]:
        facts.append(f"{len(counts['discrete'])} discrete, summed out")
    observed = sum(value.numel() for value in problem.observed.values())
    if observed:
        facts.append(f"{observed:,} observed value{'s' if observed > 1 else ''}")
    facts.append(f"reference: {reference_line(comparison)}")
    return facts


def _worst_first(comparison: Comparison) -> list[str]:
    """Parameters that were compared, by the largest distance of any candidate from the reference."""
    distance: dict[str, float] = {}
    for found in comparison.discrepancies.values():
        for name, value in zip(found.parameters, found.wasserstein.tolist(), strict=True):
            distance[name] = max(distance.get(name, 0.0), value if math.isfinite(value) else math.inf)
    return sorted(distance, key=lambda name: -distance[name])


def _pictures(comparison: Comparison, worst: list[str]) -> dict[str, Any]:
    order = list(comparison.fits)
    place = {name: i for i, name in enumerate(_model_order(comparison))}
    for_forest = sorted(worst[:MAX_FOREST], key=lambda name: place[name])
    for_panels = sorted(worst[:MAX_MARGINALS], key=lambda name: place[name])
    judged = [name for name in order if name in comparison.discrepancies]
    reference = figures.scalars(comparison.reference, for_forest)
    candidates = {name: figures.scalars(comparison.posteriors[name], for_forest) for name in judged}
    labels = coordinate_labels(comparison.problem)
    forests = []
    if for_forest:
        forests = [
            figures.forest(
                reference, candidates, labels if css == "wide" else {}, order=order, size=size, name=f"forest-{css}"
            )
            for css, size in figures.SIZES.items()
        ]
    panels = [
        {
            "parameter": parameter,
            "label": labels.get(parameter, ""),
            "svg": figures.marginal(
                parameter,
                reference[parameter],
                {name: draws[parameter] for name, draws in candidates.items()},
                order=order,
                name=f"marginal-{i}",
            ),
        }
        for i, parameter in enumerate(for_panels)
    ]
    histories = {
        name: fit.history["negative_elbo"] for name, fit in comparison.fits.items() if "negative_elbo" in fit.history
    }
    curves = []
    if comparison.best is not None:
        lowest = -comparison.elbos[comparison.best][0]
        curves = [
            figures.convergence(histories, lowest, size=size, name=f"convergence-{css}")
            for css, size in figures.SIZES.items()
        ]
    return {"forests": forests, "num_forest": len(for_forest), "panels": panels, "curves": curves}


def _model_order(comparison: Comparison) -> list[str]:
    names: dict[str, None] = {}
    for found in comparison.discrepancies.values():
        names |= dict.fromkeys(found.parameters)
    return list(names)


def _parameter_rows(comparison: Comparison, parameters: list[str]) -> list[dict[str, Any]]:
    """One block per parameter, with one line per candidate, in the model's order."""
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in _model_order(comparison) if name in set(parameters)}
    for row in comparison.parameters().to_dict("records"):
        if row["parameter"] in lines:
            far_mean = abs(row["mean_shift"]) > MAX_MEAN_SHIFT
            far_sd = not SD_RATIOS[0] <= row["sd_ratio"] <= SD_RATIOS[1]
            lines[row["parameter"]].append({**row, "far_mean": far_mean, "far_sd": far_sd})
    labels = coordinate_labels(comparison.problem)
    return [
        {"parameter": name, "label": labels.get(name, ""), "lines": found} for name, found in lines.items() if found
    ]


def coordinate_labels(problem: Problem) -> dict[str, str]:
    """The user's labels of the scalars that have any, ``{"theta[0]": "A"}``."""
    labels = {}
    for name, site in problem.sites.items():
        known = [problem.coords.get(dim) for dim in problem.dims(name)]
        if site.shape and site.kind in ("latent", "deterministic") and any(known):
            for index in np.ndindex(tuple(site.shape)):
                parts = [str(values[i]) for values, i in zip(known, index, strict=True) if values]
                labels[element_name(name, index)] = ", ".join(parts)
    return labels


def _reference_checks(reference: Posterior) -> list[dict[str, Any]]:
    """The checks of ``Posterior.problems()`` with their values, so that a pass can be seen too."""
    convergence = reference.convergence()

    def extreme(key: str, largest: bool) -> tuple[str, float]:
        values = figures.labeled(convergence[key])
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        if not known:
            return "", math.nan
        return (max if largest else min)(known.items(), key=lambda item: item[1])

    checks = []
    if reference.num_chains > 1:
        where, value = extreme("rhat", True)
        checks.append(
            {
                "name": "largest R-hat",
                "value": number(value, 3),
                "where": where,
                "limit": f"below {MAX_RHAT}",
                "ok": value < MAX_RHAT,
            }
        )
    for kind in ("bulk", "tail"):
        where, value = extreme(f"ess_{kind}", False)
        checks.append(
            {
                "name": f"smallest {kind} ESS",
                "value": number(value, 0),
                "where": where,
                "limit": f"at least {MIN_ESS:.0f}",
                "ok": value >= MIN_ESS,
            }
        )
    if "diverging" in reference.stats:
        count = int(reference.stats["diverging"].sum())
        checks.append(
            {"name": "divergent transitions", "value": str(count), "where": "", "limit": "0", "ok": count == 0}
        )
    ebfmi = reference.ebfmi()
    if ebfmi is not None:
        worst = int(ebfmi.argmin())
        checks.append(
            {
                "name": "smallest E-BFMI",
                "value": number(float(ebfmi[worst])),
                "where": f"chain {worst}",
                "limit": f"at least {MIN_EBFMI}",
                "ok": bool(ebfmi[worst] >= MIN_EBFMI),
            }
        )
    return checks


def _reproduce(comparison: Comparison) -> str:
    """The command or the Python call that gives these numbers again."""
    if comparison.command:
        return comparison.command
    info, reference = comparison.reference.info, comparison.reference
    lines = ["import pyro_vi_lab as vl", "", f"problem = vl.Problem(...)  # {comparison.problem.name}"]
    if reference.method == "nuts" and "seed" in info:
        kept = {key: info[key] for key in ("num_warmup", "seed", "backend", "target_accept") if key in info}
        settings = {"num_chains": reference.num_chains, "num_draws": reference.num_draws, **kept}
        lines.append(
            f"reference = vl.nuts(problem, {', '.join(f'{key}={value!r}' for key, value in settings.items())})"
        )
    else:
        lines.append(f"reference = ...  # {reference_line(comparison)}")
    lines.append(
        f"comparison = vl.compare(problem, {list(comparison.fits)}, reference=reference, "
        f"num_draws={comparison.num_draws}, seed={comparison.seed})"
    )
    return "\n".join(lines)


def _provenance(comparison: Comparison, numbers: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("seed", str(comparison.seed)), ("draws per candidate", f"{comparison.num_draws:,}")]
    facts += [(name, version) for name, version in numbers["versions"].items()]
    facts.append(("data (SHA-256)", numbers["data_hash"]))
    return facts


def _missing_as_none(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a data frame with ``None`` for every kind of missing value."""
    import pandas

    return {str(key): None if pandas.isna(value) else value for key, value in row.items()}
