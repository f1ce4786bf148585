"""The page: what is shown where. How it looks is in the template, its style sheet and its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vi_lab.report import figures
from pyro_vi_lab.report.calibration import calibration_panels
from pyro_vi_lab.report.model import graph, site_rows, source
from pyro_vi_lab.report.origin import provenance, reproduce
from pyro_vi_lab.report.pairs import pair_pictures
from pyro_vi_lab.report.parameters import (
    coordinate_labels,
    model_order,
    most_parameters,
    parameter_rows,
    scalars,
    worst_first,
)
from pyro_vi_lab.report.predictive import predictive_checks
from pyro_vi_lab.report.reference_checks import reference_checks
from pyro_vi_lab.report.verdicts import by_parameter, card, lead
from pyro_vi_lab.report.words import (
    CLOSE_RATIO,
    CLOSE_SHIFT,
    MAX_KHAT,
    MAX_MEAN_SHIFT,
    SD_RATIOS,
    beside_reference,
    judge,
    number,
    on_scale,
    reference_line,
    summary,
)

if TYPE_CHECKING:
    from pyro_vi_lab.calibration import Calibration
    from pyro_vi_lab.compare import Comparison

MAX_FOREST = 40
MAX_MARGINALS = 24
"""Most parameters shown, the worst ones first."""
STYLE, SCRIPT = "style.css", "script.js"


def render(comparison: Comparison, *, calibrations: Mapping[str, Calibration] | None = None) -> str:
    """One self-contained HTML page: no files beside it, no requests, and no script but its own.

    Args:
        comparison: What to show.
        calibrations: Candidate to the calibration of its guide, to be shown too.

    Raises:
        ArgumentError: A calibration of something that is no candidate, or of another problem.
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
    style, script = (resources.files(__package__).joinpath(name).read_text("utf-8") for name in (STYLE, SCRIPT))
    shell = {"style": style, "script": script, "policy": policy(style, script)}
    return environment.get_template("page.html.j2").render(view(comparison, calibrations or {}) | shell).lstrip()


def policy(style: str, script: str) -> str:
    """Content security policy of the page: this style sheet, this script, and nothing else."""
    known = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{known[0]}'; script-src 'sha256-{known[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def view(comparison: Comparison, calibrations: Mapping[str, Calibration]) -> dict[str, Any]:
    """Everything that the template shows, by its names there."""
    numbers = comparison.to_dict()
    version = numbers["versions"]["pyro-vi-lab"]
    judgements = {item.name: item for item in judge(comparison)}
    table = {row["candidate"]: _missing_as_none(row) for row in comparison.table().to_dict("records")}
    references = [row for name, row in table.items() if name not in comparison.fits]
    rows = [row for name, row in table.items() if name in comparison.fits]
    worst = worst_first(comparison)
    names = list(comparison.fits)
    shown = {
        "title": comparison.problem.name,
        "facts": _facts(comparison),
        "lead": lead(comparison.verdicts),
        "summary": summary(comparison, each=not comparison.verdicts),
        "unfit": bool(comparison.reference_problems),
        "reference": references[0],
        "references": references,
        "reference_line": reference_line(comparison),
        "candidates": [
            {
                **row,
                "swatch": figures.swatch(names.index(row["candidate"])),
                "grade": judgements[row["candidate"]].grade,
                "reasons": judgements[row["candidate"]].reasons,
                "message": comparison.fits[row["candidate"]].message,
                "best": row["candidate"] == comparison.lowest,
                "beside": beside_reference(comparison, row["candidate"]),
                "verdict": card(comparison.verdicts.get(row["candidate"]), comparison.notes.get(row["candidate"], ())),
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
        **_on_the_reference(comparison, worst),
        "curves": _curves(comparison),
        "weights": _weights(comparison),
        "calibrations": calibration_panels(comparison, calibrations),
        "verdicts": by_parameter(comparison),
        "parameters": parameter_rows(comparison, worst[: most_parameters(comparison)]),
        "checks": reference_checks(comparison.reference),
        "sites": site_rows(comparison.problem),
        "num_sites": len(comparison.problem.sites),
        "reproduce": reproduce(comparison),
        "provenance": provenance(comparison, numbers),
        "maker": f"pyro-vi-lab {version}" if version[:1].isdigit() else "pyro-vi-lab",
    }
    shown["pairs"], shown["no_pairs"] = pair_pictures(comparison)
    shown["predictive"], shown["no_predictive"] = predictive_checks(comparison)
    shown["graph"], shown["no_graph"] = graph(comparison.problem)
    shown["source"], shown["no_source"] = source(comparison.problem.model)
    return shown | {"sections": _sections(shown)}


def _sections(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """Id and name of the sections that the page has."""
    return [
        ("candidates", "Candidates"),
        *([("forest", "Forest plot"), ("marginals", "Marginals")] if shown["forests"] else []),
        ("pairs", "Pairs"),
        ("convergence", "Convergence"),
        *([("weights", "Importance weights")] if shown["weights"] else []),
        *([("calibration", "Calibration")] if shown["calibrations"] else []),
        ("predictive", "Predictive check"),
        *([("parameters", "Parameters")] if shown["parameters"] else []),
        ("reference", "Reference"),
        ("model", "Model"),
        ("again", "Reproduce"),
    ]


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


def _on_the_reference(comparison: Comparison, worst: list[str]) -> dict[str, Any]:
    """Forest and marginals of the parameters that are farthest from the reference, in the model's order."""
    order = list(comparison.fits)
    place = {name: i for i, name in enumerate(model_order(comparison))}
    for_forest = sorted(worst[:MAX_FOREST], key=place.__getitem__)
    for_panels = sorted(worst[:MAX_MARGINALS], key=place.__getitem__)
    reference = scalars(comparison.reference, for_forest)
    candidates = {
        name: scalars(comparison.posteriors[name], for_forest) for name in order if name in comparison.discrepancies
    }
    labels = coordinate_labels(comparison.problem)
    forests = [
        figures.forest(reference, candidates, labels if css == "wide" else {}, order=order, size=size, css=css)
        for css, size in figures.SIZES.items()
        if for_forest
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
            ),
        }
        for parameter in for_panels
    ]
    return {"forests": forests, "num_forest": len(for_forest), "panels": panels}


def _curves(comparison: Comparison) -> list[str]:
    """The bound against steps, and against seconds."""
    histories = {name: fit.history for name, fit in comparison.fits.items() if "negative_elbo" in fit.history}
    if comparison.lowest is None or not histories:
        return []
    order, lowest = list(comparison.fits), -comparison.elbos[comparison.lowest][0]
    steps = {
        name: (np.arange(len(history["negative_elbo"])), history["negative_elbo"])
        for name, history in histories.items()
    }
    seconds = {
        name: (history["seconds"], history["negative_elbo"])
        for name, history in histories.items()
        if len(history.get("seconds", ())) == len(history["negative_elbo"])
    }
    curves = [figures.convergence(steps, lowest, order=order, unit="step")]
    return curves + ([figures.convergence(seconds, lowest, order=order, unit="seconds")] if seconds else [])


def _weights(comparison: Comparison) -> list[str]:
    """Tails of the importance weights, and k-hats."""
    order, checks = list(comparison.fits), comparison.importance
    if not checks:
        return []
    tails = {name: check.smoothed_log_weights.flatten().numpy(force=True) for name, check in checks.items()}
    khats = {name: (check.khat, check.khat_se) for name, check in checks.items()}
    return [figures.weight_tails(tails, order=order), figures.khats(khats, order=order)]


def _missing_as_none(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a data frame with ``None`` for every kind of missing value."""
    import pandas

    return {str(key): None if pandas.isna(value) else value for key, value in row.items()}
