"""Several fits of one problem beside a reference, judged by the same numbers."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro_vi_lab.arviz_groups import Options, tree_of
from pyro_vi_lab.checks import Discrepancy, ImportanceCheck, discrepancy
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, DataError, LabWarning
from pyro_vi_lab.export import data_hash, plain, save_arviz, staged, to_arviz, versions
from pyro_vi_lab.fit import AUTO, Fit, fit
from pyro_vi_lab.fit_guide import is_point_estimate
from pyro_vi_lab.nuts import nuts
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.report import render, warnings_about
from pyro_vi_lab.trust import trust
from pyro_vi_lab.verdict import DECISIONS, Verdict

if TYPE_CHECKING:
    import pandas

    from pyro_vi_lab.calibration import Calibration

MAX_POINTWISE = 2**25
"""Values of one observed row and one draw that a saved file may hold (256 MiB in float64)."""

REPORT, NUMBERS = "report.html", "comparison.json"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Fits of one problem, its reference, and how they differ; :func:`compare` makes it.

    Negative ELBOs are comparable between the candidates of one comparison, and not between problems.

    Args:
        problem: What was fitted.
        reference: Draws that the candidates are judged by.
        reference_problems: Why the reference is unfit to judge them; empty if it is fit.
        fits: Candidate to its fit.
        posteriors: Candidate to its draws, for fits that did not diverge.
        elbos: Candidate to the estimate of its ELBO and the standard error of that.
        importance: Candidate to its importance sampling check.
        discrepancies: Candidate to its differences from the reference.
        verdicts: Candidate to what :func:`pyro_vi_lab.trust` says of it, with the reference as one of its estimates.
        others: Further references, by name; they are held against the first.
        notes: Candidate to the reason why one of the checks could not be computed.
        num_draws: Draws per candidate.
        seed: Seed of fits, reference and draws.
        command: How this comparison was made, if not from Python.
    """

    problem: Problem
    reference: Posterior
    reference_problems: Sequence[str]
    fits: Mapping[str, Fit]
    posteriors: Mapping[str, Posterior]
    elbos: Mapping[str, tuple[float, float]]
    importance: Mapping[str, ImportanceCheck]
    discrepancies: Mapping[str, Discrepancy]
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    others: Mapping[str, Posterior] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    num_draws: int = 1000
    seed: int = 0
    command: str | None = None

    @property
    def reference_name(self) -> str:
        """``"nuts"`` where the reference was made by NUTS, else ``"reference"``."""
        return "nuts" if self.reference.method == "nuts" else "reference"

    def __repr__(self) -> str:
        from pyro_vi_lab.report.words import summary

        return f"Comparison({self.problem.name}: {', '.join(self.fits)} beside {self.reference_name}). " + " ".join(
            summary(self)
        )

    @cached_property
    def best(self) -> str | None:
        """The candidate with the best verdict, and of several the lowest negative ELBO; ``None`` where all diverged."""
        return next((name for name in self.ranked if name in self.posteriors), None)

    @cached_property
    def lowest(self) -> str | None:
        """The candidate with the lowest negative ELBO; ``None`` where none has one."""
        finite = {name: -value for name, (value, _) in self.elbos.items() if math.isfinite(value)}
        return min(finite, key=finite.__getitem__) if finite else None

    @cached_property
    def ranked(self) -> list[str]:
        """All candidates, the best first: by verdict (trust, reweight, refine, sample), then by negative ELBO."""

        def place(name: str) -> tuple[int, bool, float]:
            verdict = self.verdicts.get(name)
            elbo = self.elbos.get(name, (-math.inf, 0.0))[0]
            rank = DECISIONS.index(verdict.decision) if verdict else len(DECISIONS)
            return rank, name not in self.posteriors, -elbo if math.isfinite(elbo) else math.inf

        return sorted(self.fits, key=place)

    def table(self) -> pandas.DataFrame:
        """One row for the reference, one for each further reference, and one per candidate, the best first.

        ``reference_cost`` is how many times the seconds of the candidate the reference took.

        ``attrs["reference_problems"]`` says why the reference is unfit, if it is.
        """
        import pandas

        table = pandas.DataFrame(self._rows(), columns=list(COLUMNS))
        texts, whole = ("candidate", "status", "verdict", "worst_mean_parameter"), ("steps", "gradients")
        table = table.astype({name: "Int64" if name in whole else float for name in COLUMNS if name not in texts})
        table.attrs["reference_problems"] = list(self.reference_problems)
        return table

    def _rows(self) -> list[dict[str, Any]]:
        info = self.reference.info
        reference = {
            "candidate": self.reference_name,
            "status": "unfit reference" if self.reference_problems else "reference",
            "seconds": info.get("seconds"),
            "gradients": info.get("num_gradients"),
        }
        rows = (reference, *map(self._other, self.others), *map(self._row, self.ranked))
        return [{column: row.get(column) for column in COLUMNS} for row in rows]

    def _other(self, name: str) -> dict[str, Any]:
        info = self.others[name].info
        row: dict[str, Any] = {"candidate": name, "status": "reference", "seconds": info.get("seconds")}
        worst = discrepancy(self.reference, self.others[name]).summary()
        row |= {key: getattr(worst, key) for key in worst._fields if key in COLUMNS}
        return row | {"gradients": info.get("num_gradients")}

    def _row(self, name: str) -> dict[str, Any]:
        result = self.fits[name]
        cost = self.reference.info.get("seconds")
        row: dict[str, Any] = {
            "candidate": name,
            "status": str(result.status.value),
            "verdict": self.verdicts[name].decision if name in self.verdicts else None,
            "reference_cost": cost / result.seconds if cost is not None and result.seconds > 0 else None,
            "steps": result.num_steps,
            "seconds": result.seconds,
            "gradients": result.num_gradients,
        }
        if name in self.elbos:
            value, error = self.elbos[name]
            row |= {"negative_elbo": -value, "negative_elbo_se": error}
        if name in self.importance:
            check = self.importance[name]
            row |= {"khat": check.khat, "khat_se": check.khat_se, "importance_ess": check.ess}
        if name in self.discrepancies:
            worst = self.discrepancies[name].summary()
            row |= {key: getattr(worst, key) for key in worst._fields if key in COLUMNS}
        return row

    def parameters(self) -> pandas.DataFrame:
        """One row per candidate and scalar parameter: mean and sd of both, and how they differ."""
        import pandas

        frames = [
            pandas.DataFrame(
                {"candidate": name, "parameter": list(found.parameters)}
                | {column: getattr(found, column) for column in PARAMETER_COLUMNS}
            )
            for name, found in self.discrepancies.items()
        ]
        columns = ["candidate", "parameter", *PARAMETER_COLUMNS]
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=columns)

    def warnings(self) -> dict[str, list[str]]:
        """Candidate to the reasons why it must not be trusted, in words; empty where there are none."""
        found = {}
        for row in map(self._row, self.fits):
            name = row["candidate"]
            verdict = self.verdicts.get(name)
            if verdict is None:
                found[name] = [*self.notes.get(name, ()), *warnings_about(row, judged=not self.reference_problems)]
            else:
                against = [] if verdict.decision == "trust" else verdict.reasons
                found[name] = [*self.notes.get(name, ()), *against]
        return found

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values, ready for JSON: what is not finite is ``None``."""
        reasons = self.warnings()
        reference, *rows = self._rows()
        others, candidates = rows[: len(self.others)], rows[len(self.others) :]
        for row in candidates:
            name = row["candidate"]
            row["message"] = str(self.fits[name].message)
            row["warnings"] = reasons[name]
            row["trust"] = self.verdicts[name].to_dict() if name in self.verdicts else None
            history = self.fits[name].history
            row["negative_elbo_history"] = history["negative_elbo"].tolist() if "negative_elbo" in history else []
        found: dict[str, Any] = {
            "created_by": "pyro-vi-lab",
            "versions": versions(),
            "problem": self.problem.name,
            "data_hash": data_hash(self.problem),
            "sites": {
                name: {"kind": site.kind, "shape": list(site.shape), "dims": list(self.problem.dims(name))}
                for name, site in self.problem.sites.items()
            },
            "seed": self.seed,
            "num_draws": self.num_draws,
            "command": self.command,
            "reference": {
                "name": self.reference_name,
                "method": self.reference.method,
                "num_chains": self.reference.num_chains,
                "num_draws": self.reference.num_draws,
                "problems": list(self.reference_problems),
                "seconds": reference["seconds"],
                "gradients": reference["gradients"],
            },
            "references": others,
            "best": self.best,
            "candidates": candidates,
            "parameters": self.parameters().to_dict("records"),
        }
        result: dict[str, Any] = plain(found)
        return result

    def report(self, *, calibrations: Mapping[str, Calibration] | None = None) -> str:
        """The comparison as one HTML page that needs nothing else.

        Args:
            calibrations: Candidate to what :func:`~pyro_vi_lab.calibrate` found for its guide, to be shown too.

        Raises:
            ArgumentError: A calibration of something that is no candidate, or of another problem.
        """
        return render(self, calibrations=calibrations)

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write ``comparison.json``, ``report.html``, and a NetCDF file for the reference and for every posterior.

        Everything is written elsewhere first and moved in at the end. Files of an earlier comparison that this one does
        not replace are removed, so that no posterior of another run is left beside the report.

        Returns:
            the path of each file, by its name without the ending.

        Raises:
            FileError: The directory cannot be written to.
        """
        directory = Path(directory)
        earlier = _files_of(directory)
        with staged(directory) as folder:
            for name, tree in _trees(self):
                save_arviz(tree, folder / f"{name}.nc")
            (folder / REPORT).write_text(self.report(), encoding="utf-8")
            files = sorted([path.name for path in folder.iterdir()] + [NUMBERS])
            text = json.dumps(self.to_dict() | {"files": files}, allow_nan=False, ensure_ascii=False, indent=1)
            (folder / NUMBERS).write_text(text + "\n", encoding="utf-8")
        diverged = {f"{name}.nc" for name in self.fits if name not in self.posteriors}
        for name in (earlier | diverged) - set(files):
            (directory / name).unlink(missing_ok=True)
        return {Path(name).stem: directory / name for name in files}


COLUMNS = (
    "candidate",
    "status",
    "verdict",
    "negative_elbo",
    "negative_elbo_se",
    "khat",
    "khat_se",
    "importance_ess",
    "max_mean_shift",
    "worst_mean_parameter",
    "min_sd_ratio",
    "max_sd_ratio",
    "steps",
    "seconds",
    "gradients",
    "reference_cost",
)
PARAMETER_COLUMNS = (
    "reference_mean",
    "reference_sd",
    "mean",
    "sd",
    "mean_shift",
    "mean_shift_mcse",
    "sd_ratio",
    "sd_ratio_mcse",
    "wasserstein",
    "wasserstein_noise",
)


def compare(
    problem: Problem,
    guides: str | Sequence[Any] | Mapping[str, Any] = ("mean_field", "full_rank"),
    *,
    reference: Posterior | Mapping[str, Posterior] | None = None,
    budget: Literal["fast", "thorough"] = "fast",
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Fit every guide, take NUTS as the reference unless one is given, and say which fits may be trusted.

    A candidate that diverges stays in the comparison, with its status and without a posterior. A reference that fails
    its own checks (``Posterior.problems()``) is used and reported as unfit, wherever its numbers are shown.

    Args:
        problem: What to fit.
        guides: Names of ``GUIDES``, ``"auto"``, guide classes or guide instances, which are fitted with the defaults,
            or a :class:`Fit` of this problem as it is, made with any optimizer; as a mapping, with names of your own.
        reference: Draws to judge by: of NUTS, an exact solution, or published ones; latent sites that it lacks are
            not judged by it. Of several by name the first is the one, and the others are held against it.
        budget: Work that the verdicts may take, as of :func:`pyro_vi_lab.trust`.
        num_draws: Draws from each candidate.
        seed: Seed of the fits, of NUTS and of all draws.
        progress: Show progress on long work.

    Raises:
        ArgumentError: No guides, an unknown guide, a guide that is a point, a fit of another problem, or a reference
            without a site of this problem.
        DataError: Draws of the reference have another shape than the problem's site.
    """
    candidates = _named(guides)
    for name, guide in candidates.items():
        # a fit of 'auto' may have written the model in another way
        if isinstance(guide, Fit) and guide.problem is not problem and not guide.path:
            raise ArgumentError(f"the fit {name!r} is of {guide.problem!r}, not of the problem {problem!r} itself")
        if guide != AUTO and is_point_estimate(guide.guide if isinstance(guide, Fit) else guide):
            raise ArgumentError(
                f"guide {name!r} is a point, which has no spread to compare with a posterior's: compare 'laplace', the "
                "normal at the mode"
            )
    others: dict[str, Posterior] = {}
    if isinstance(reference, Mapping):
        if not reference:
            raise ArgumentError("reference is an empty dict: name at least one posterior, or leave it out for NUTS")
        (_, reference), *rest = reference.items()
        others = {str(name): one for name, one in rest}
    for one in (reference, *others.values()):
        if one is not None:
            _check_reference(problem, one)
    # The fits come first: they are quick, and a wrong guide should not cost a run of NUTS.
    fits = {
        name: guide if isinstance(guide, Fit) else fit(problem, guide, seed=seed, progress=progress)
        for name, guide in candidates.items()
    }
    if reference is None:
        reference = nuts(problem, seed=seed, progress=progress)
    usable = {name: result for name, result in fits.items() if result.status is not Status.DIVERGED}
    # The fits have seen draws of their own seed; an estimate from the same draws would flatter them.
    posteriors = {name: result.posterior(num_draws=num_draws, seed=seed + 1) for name, result in usable.items()}
    notes: dict[str, list[str]] = {}
    differences: dict[str, Discrepancy] = {}
    for name, posterior in posteriors.items():
        try:
            differences[name] = discrepancy(reference, posterior)
        except DataError as error:
            notes.setdefault(name, []).append(f"it cannot be compared with the reference: {error}")
    guides_alone = {name: result for name, result in usable.items() if result.sampled is None}
    verdicts = {name: trust(result, budget=budget, reference=reference, seed=seed) for name, result in fits.items()}
    return Comparison(
        problem=problem,
        reference=reference,
        reference_problems=reference.problems(),
        fits=fits,
        posteriors=posteriors,
        elbos={name: result.elbo(num_draws=num_draws, seed=seed + 1) for name, result in guides_alone.items()},
        importance={
            name: verdict.checks["importance"] for name, verdict in verdicts.items() if "importance" in verdict.checks
        },
        discrepancies=differences,
        verdicts=verdicts,
        others=others,
        notes=notes,
        num_draws=num_draws,
        seed=seed,
    )


@to_arviz.register
def _(comparison: Comparison, **options: Any) -> dict[str, Any]:
    return dict(_trees(comparison, **options))


def _trees(comparison: Comparison, **options: Any) -> Iterator[tuple[str, Any]]:
    """A tree for the reference and one per posterior, without the pointwise groups where they would be too large."""
    problem, reference = comparison.problem, comparison.reference
    missing = [name for name, site in problem.sites.items() if site.kind == "latent" and name not in reference.draws]
    posteriors = {comparison.reference_name: reference, **comparison.posteriors}
    rows = sum(value.numel() for value in problem.observed.values())
    for name, posterior in posteriors.items():
        chosen = dict(options)
        size = rows * posterior.num_chains * posterior.num_draws
        if size > MAX_POINTWISE:
            warnings.warn(
                f"predictive draws and log likelihoods of {name} are left out: {size:,} values each; "
                "to_arviz(posterior, problem=problem) makes them",
                LabWarning,
                stacklevel=3,
            )
        if size > MAX_POINTWISE or (posterior is reference and missing):
            chosen |= {"predictive": False, "log_likelihood": False, "log_prior": False}
        yield name, tree_of(posterior, problem, Options(**chosen), fit=comparison.fits.get(name))


def _named(guides: str | Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """A name for every candidate, which is also that of its file."""
    if isinstance(guides, Mapping):
        pairs = [(str(name), guide) for name, guide in guides.items()]
    else:
        pairs = []
        for guide in [guides] if isinstance(guides, str) else guides:
            cls = guide if isinstance(guide, type) else type(guide)
            own = guide.method if isinstance(guide, Fit) else cls.__name__
            pairs.append((guide if isinstance(guide, str) else own, guide))
    if not pairs:
        raise ArgumentError('there is nothing to compare: name at least one guide, such as "full_rank"')
    named: dict[str, Any] = {}
    reserved = ("nuts", "reference", Path(REPORT).stem, Path(NUMBERS).stem)
    for name, guide in pairs:
        base = re.sub(r"[^\w.-]", "_", name) if not isinstance(guide, str) or isinstance(guides, Mapping) else name
        if isinstance(guide, str) and guide in named and not isinstance(guides, Mapping):
            raise ArgumentError(f"guide {guide!r} is named twice")
        key, count = base, 1
        while key in named or key.lower() in reserved:
            count += 1
            key = f"{base}_{count}"
        named[key] = guide
    return named


def _check_reference(problem: Problem, reference: Posterior) -> None:
    latent = {name: site for name, site in problem.sites.items() if site.kind == "latent"}
    common = [name for name in latent if name in reference.draws]
    if not common:
        raise ArgumentError(
            f"the reference has no draws of a latent site of {problem.name}: it has {', '.join(reference.draws)}; "
            f"the model has {', '.join(latent)}"
        )
    for name in common:
        shape = tuple(reference.draws[name].shape[2:])
        if shape != tuple(latent[name].shape):
            raise DataError(
                f"reference draws of site {name!r} have shape {shape} per draw; the site of {problem.name} has "
                f"{tuple(latent[name].shape)}"
            )


def _files_of(directory: Path) -> set[str]:
    """Files that an earlier comparison left in ``directory``, by its own account."""
    try:
        files = json.loads((directory / NUMBERS).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    named = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    ours = [name for name in named if Path(name).name == name]  # nothing outside the directory
    return {name for name in ours if name.endswith(".nc") or name in (REPORT, NUMBERS)}
