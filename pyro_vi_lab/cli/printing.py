"""What the commands print: tables and sentences for people, or one JSON text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from pyro_vi_lab.compare import Comparison
from pyro_vi_lab.export import plain
from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.report.words import number, on_scale, summary

MOST_PARAMETERS = 40
"""Parameters that are printed; files hold all of them."""


class Output:
    """Where a command's words go: with ``--json`` standard output holds one JSON text and nothing else.

    Args:
        as_json: Whether ``--json`` was given.
        quiet: Whether only the result is wanted.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    def say(self, text: str) -> None:
        """What goes on, to standard error."""
        if not self.quiet:
            typer.echo(text, err=True)

    def tell(self, text: str = "") -> None:
        """A sentence of the result for people."""
        if not self.quiet:
            typer.echo(text, err=self.as_json)

    def table(self, table: Table) -> None:
        """A table at its own width, also into a file or a pipe."""
        if not self.quiet:
            wanted = Console(width=1000).measure(table).maximum
            console = Console(stderr=self.as_json, highlight=False, markup=False, width=max(wanted, 80))
            console.print(table)

    def result(self, path: object, values: dict[str, Any]) -> None:
        """What a program wants to know: the path of a file, or everything as JSON."""
        if self.as_json:
            typer.echo(json.dumps(plain(values), allow_nan=False, ensure_ascii=False, indent=1))
        else:
            typer.echo(str(path))


def new_table(first: str, *titles: str) -> Table:
    """A table of text and numbers without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def print_comparison(comparison: Comparison, output: Output) -> None:
    """The table of candidates and the sentences about them."""
    titles = ("verdict", "negative ELBO", "k-hat", "largest mean shift", "sd ratio", "seconds", "gradients")
    table = new_table("candidate", *titles)
    for row in comparison.to_dict()["candidates"]:
        cells = ["diverged", "", "", ""] if row["status"] == "diverged" else _cells(row)
        table.add_row(row["candidate"], row["verdict"], *cells, number(row["seconds"]), number(row["gradients"], 0))
    info = comparison.reference.info
    name = comparison.reference_name + (" (unfit)" if comparison.reference_problems else "")
    table.add_row(name, "", "", "", "", "", number(info.get("seconds")), number(info.get("num_gradients"), 0))
    output.table(table)
    output.tell()
    for sentence in summary(comparison):
        output.tell(sentence)
    output.tell()


def _cells(row: dict[str, Any]) -> list[str]:
    worst = row["worst_mean_parameter"]
    khat = number(row["khat"]) + (f" ± {number(row['khat_se'])}" if row["khat_se"] else "")
    return [
        f"{number(row['negative_elbo'])} ± {number(row['negative_elbo_se'])}",
        khat,
        f"{number(row['max_mean_shift'])} ({worst})" if worst else "–",
        f"{number(row['min_sd_ratio'])} – {number(row['max_sd_ratio'])}",
    ]


def print_parameters(posterior: Posterior, output: Output) -> None:
    """Mean, sd and quantiles of every scalar, the first ones if there are many."""
    table = new_table("parameter", "mean", "sd", "5%", "95%")
    columns = [posterior.mean(), posterior.sd(), posterior.quantile(0.05), posterior.quantile(0.95)]
    rows = [(name, index) for name, sd in columns[1].items() for index in np.ndindex(tuple(sd.shape))]
    for name, index in rows[:MOST_PARAMETERS]:
        sd = float(columns[1][name][index])
        table.add_row(element_name(name, index), *(on_scale(float(column[name][index]), sd) for column in columns))
    output.table(table)
    if len(rows) > MOST_PARAMETERS:
        output.tell(f"… and {len(rows) - MOST_PARAMETERS} more; the file has all of them")


def parameters(posterior: Posterior) -> list[dict[str, Any]]:
    """The same as plain values."""
    columns = {
        "mean": posterior.mean(),
        "sd": posterior.sd(),
        "q05": posterior.quantile(0.05),
        "q95": posterior.quantile(0.95),
    }
    return [
        {
            "parameter": element_name(name, index),
            **{key: float(column[name][index]) for key, column in columns.items()},
        }
        for name, sd in columns["sd"].items()
        for index in np.ndindex(tuple(sd.shape))
    ]
