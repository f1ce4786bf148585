"""Arguments and options that commands share, and what becomes of errors."""

from __future__ import annotations

import functools
import shlex
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from pyro_vi_lab.errors import ArgumentError, LabError, LabWarning, unknown_name
from pyro_vi_lab.fit import AUTO, OPTIMS
from pyro_vi_lab.guides import GUIDES, guide_named
from pyro_vi_lab.models import MODELS
from pyro_vi_lab.nuts import TARGET_ACCEPT

P = ParamSpec("P")

EXIT_FAILED = 1
"""The work was done, and there is no posterior to show for it."""
EXIT_USAGE = 2
"""The input cannot be used."""
EXIT_NOT_TRUSTED = 3
"""``--require trust``, and no candidate is trusted."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells have it."""
MAX_SEED = 2**32 - 2
"""NumPy takes 32 bits, and the draws from a fit take the seed after the one given."""


def errors_in_words(command: Callable[P, None]) -> Callable[P, None]:
    """Deliberate errors become one line and exit code 2; warnings of ours one line each, others none."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("once", LabWarning)
                warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
                command(*args, **kwargs)
        except LabError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(EXIT_USAGE) from error
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing was written", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped


def command_line(context: typer.Context) -> str:
    """The command with all of its options, the defaults too, as it can be given again."""
    words = ["pyro-vi-lab", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value is None or value is False or parameter.name in ("quiet", "as_json"):
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        option = parameter.opts[0] if parameter.param_type_name == "option" else ""
        for one in values:
            words += [option] * bool(option) + [str(one)] * (one is not True)
    return shlex.join(words)


def check_name(kind: str, name: str | None, known: Iterable[str]) -> None:
    """Refuse a name that is not in a table, nor that of a guide of another package, before any work."""
    names = list(known)
    if name is None or name in names:
        return
    if kind != "guide":
        raise unknown_name(kind, name, names)
    guide_named(name)


def check_guide(name: str) -> None:
    """Refuse a guide that nobody knows, before any work."""
    check_name("guide", name, [AUTO, *GUIDES])


def check_budget(seconds: float | None) -> None:
    """Refuse a budget that is no time."""
    if seconds is not None and not seconds > 0:
        raise ArgumentError(f"--time-budget is a number of seconds above 0, got {seconds}")


def _completed(names: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


ProblemArgument = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEM",
        help="A name that `pyro-vi-lab models` lists, or file.py:object or module:object, where the object is a "
        "pyro_vi_lab.Problem, a function that returns one, or a Pyro model (with --data where it has arguments).",
        show_default=False,
        autocompletion=_completed(MODELS),
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Data by name for the arguments of the model: .csv, .tsv, .json, .json.zip, .npz, .parquet or .nc.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Directory for the files; made if it is not there.", show_default=False)
]
GuideOption = Annotated[
    str,
    typer.Option(
        help=f"What to fit: auto, which climbs until a fit is right, or {', '.join(GUIDES)}.",
        autocompletion=_completed([AUTO, *GUIDES]),
    ),
]
GuidesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--guide",
        help=f"A guide to fit; repeat for several; by default mean_field and full_rank. auto, or {', '.join(GUIDES)}.",
        autocompletion=_completed([AUTO, *GUIDES]),
        show_default=False,
    ),
]
OptimOption = Annotated[
    str | None,
    typer.Option(
        help=f"How guides over a family are fitted: {', '.join(OPTIMS)}.",
        show_default=False,
        autocompletion=_completed(OPTIMS),
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=MAX_SEED)]
ChainsOption = Annotated[int, typer.Option(help="Chains of NUTS.")]
WarmupOption = Annotated[int, typer.Option(help="Warm-up steps per chain, not kept.")]
DrawsOption = Annotated[int, typer.Option(help="Draws per chain, and from every guide.")]
AcceptOption = Annotated[
    float, typer.Option(help="Acceptance rate of NUTS; nearer to 1 where it reports divergent transitions.")
]
StepsOption = Annotated[int | None, typer.Option(help="Most steps of a fit.", show_default=False)]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--time-budget",
        help="Seconds after which a fit ends with what it has, and auto begins nothing new.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the data are put: cpu, cuda, cuda:1, mps.", show_default=False)
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="Type of floating-point data: float32 or float64 (the default).", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output, and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no table.")]
RequireOption = Annotated[
    str | None,
    typer.Option("--require", help="Exit code 3 unless a candidate has this verdict: trust.", show_default=False),
]
DEFAULT_ACCEPT = TARGET_ACCEPT

Options = dict[str, Any]
