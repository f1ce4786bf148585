"""Whether a variational posterior may be believed, and why: the value that ``trust`` returns."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pyro_vi_lab.posterior import Posterior

if TYPE_CHECKING:
    import pandas

Decision = Literal["trust", "reweight", "refine", "sample"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
MEANING: Mapping[Decision, str] = {
    "trust": "means and standard deviations are right to within the tolerances",
    "reweight": "the guide's own draws are off; use the attached reweighted draws",
    "refine": "fit something richer, as the reasons say",
    "sample": "use NUTS",
}
MOST_NUMBERS = 1000
"""Longest array of a check that is written out."""
MOST_ROWS = 30
"""Parameters shown in a terminal or a notebook, the worst first; ``parameters`` has all."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """What several independent checks say about a fit, and what to do with it.

    Args:
        decision: ``"trust"``; ``"reweight"``: use ``posterior``; ``"refine"``: fit what ``suggestions`` name;
            ``"sample"``: use NUTS.
        reasons: Why, in words with numbers, the most important first.
        suggestions: What to try next: names of guides, and ``"non-center <site>"``.
        parameters: One row per scalar parameter: what the guide says (``mean``, ``sd``), how far that is from the best
            estimate of the truth (``mean_shift`` in standard deviations, ``sd_ratio``, each with a standard error
            ``_se``), the share of true draws in the guide's central 50 % and 90 % intervals (``coverage_50``,
            ``coverage_90``), where the estimate is from (``source``), and whether it is ``right``, ``wrong`` or
            ``unclear``.
        posterior: Draws after Pareto-smoothed importance resampling, where the weights allow it; else ``None``.
        checks: The results of the checks by name.
        problem: Name of the problem.
        method: Name of the guide.
        budget: How much work was allowed.
        tolerances: Largest mean shift in standard deviations, and largest ratio of standard deviations.
        seconds: Wall-clock time.
        num_gradients: Gradients of the log density.
        seed: Seed of all randomness.
    """

    decision: Decision
    reasons: Sequence[str]
    suggestions: Sequence[str]
    parameters: pandas.DataFrame = field(repr=False)
    posterior: Posterior | None = field(repr=False)
    checks: Mapping[str, Any] = field(repr=False)
    problem: str
    method: str
    budget: str
    tolerances: tuple[float, float]
    seconds: float
    num_gradients: int
    seed: int

    def __repr__(self) -> str:
        return f"Verdict({self.decision}: the {self.method} fit of {self.problem}. {' '.join(self.reasons[:1])})"

    def __str__(self) -> str:
        import io

        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, highlight=False, color_system=None).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        lines: list[Any] = [Text(self._headline(), style="bold")]
        lines += [Padding(Text(f"– {reason}"), (0, 0, 0, 2)) for reason in self.reasons]
        if len(self.parameters):
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column("parameter", overflow="fold")
            for title in SHOWN.values():
                table.add_column(title, justify="right", no_wrap=True)
            for cells in self._cells():
                table.add_row(*(Text(cell) for cell in cells))
            lines += [Text(""), table]
            if len(self.parameters) > MOST_ROWS:
                lines.append(Text(f"… and {len(self.parameters) - MOST_ROWS} more in .parameters"))
        return Group(*lines)

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons)
        head = "".join(f"<th>{html.escape(title)}</th>" for title in ("parameter", *SHOWN.values()))
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in self._cells()
        )
        more = len(self.parameters) - MOST_ROWS
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
        rest = f"<p>… and {more} more in <code>.parameters</code></p>" if more > 0 else ""
        return f"<p><strong>{html.escape(self._headline())}</strong></p><ul>{items}</ul>{table}{rest}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the draws as plain values; what is not finite is ``None``."""
        return {
            "decision": self.decision,
            "meaning": MEANING[self.decision],
            "reasons": list(self.reasons),
            "suggestions": list(self.suggestions),
            "problem": self.problem,
            "method": self.method,
            "budget": self.budget,
            "max_mean_shift": self.tolerances[0],
            "max_sd_ratio": self.tolerances[1],
            "seconds": self.seconds,
            "num_gradients": self.num_gradients,
            "seed": self.seed,
            "checks": {name: _plain(value) for name, value in self.checks.items()},
            "parameters": [
                {key: _plain(value) for key, value in row.items()} for row in self.parameters.to_dict("records")
            ],
        }

    def _headline(self) -> str:
        return f"{self.decision}: {self.method} fit of {self.problem} – {MEANING[self.decision]}"

    def _cells(self) -> list[list[str]]:
        """Cells of the worst parameters, the worst first."""
        table = self.parameters
        if not len(table):
            return []
        shift = table["mean_shift"].abs().fillna(math.inf) / self.tolerances[0]
        ratio = table["sd_ratio"].map(lambda r: abs(math.log(r)) if r > 0 else math.inf) / math.log(self.tolerances[1])
        order = shift.where(shift > ratio, ratio).fillna(math.inf).sort_values(ascending=False, kind="stable").index
        return [
            [str(row["parameter"]), *(_shown(row, key) for key in SHOWN)]
            for row in table.loc[order[:MOST_ROWS]].to_dict("records")
        ]


SHOWN = {
    "mean": "mean",
    "sd": "sd",
    "mean_shift": "mean off by (sd)",
    "sd_ratio": "sd ratio",
    "coverage_50": "50% holds",
    "coverage_90": "90% holds",
    "verdict": "verdict",
}
"""Columns shown, and their titles."""


def _shown(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    if key.startswith("coverage"):
        return f"{value:.0%}"
    error = row.get(f"{key}_se")
    digits = "" if error is None or not math.isfinite(error) else f" ± {error:.2f}"
    return f"{value:.3g}" if key in ("mean", "sd") else f"{value:.2f}{digits}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in fields(value) if one.repr}
        value = {key: one for key, one in value.items() if math.prod(getattr(one, "shape", ())) <= MOST_NUMBERS}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
