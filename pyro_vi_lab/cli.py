"""The command line: ``pyro-vi-lab compare``, ``fit`` and ``models``."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ParamSpec

import typer

from pyro_vi_lab.compare import Comparison, compare
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, FileError, LabError, LabWarning, ModelError, unknown_name
from pyro_vi_lab.export import check_writable, save_arviz, staged, to_arviz
from pyro_vi_lab.fit import fit
from pyro_vi_lab.guides import GUIDES
from pyro_vi_lab.models import MODELS, build
from pyro_vi_lab.nuts import TARGET_ACCEPT, nuts
from pyro_vi_lab.posterior import Posterior, element_name
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.report.words import number, on_scale, summary

P = ParamSpec("P")

EXIT_FAILED = 1
"""The work was done, and there is no posterior to show for it."""
EXIT_USAGE = 2
"""The input cannot be used."""
MAX_SEED = 2**32 - 2
"""NumPy takes 32 bits, and the draws from a fit take the seed after the one given."""

app = typer.Typer(
    help="Fit, check and compare variational posteriors of any Pyro model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ProblemArgument = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEM",
        help="A name that `pyro-vi-lab models` lists, or path/to/file.py:object, where the object is a "
        "pyro_vi_lab.Problem or a function without arguments that returns one.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Directory for the files; made if it is not there.", show_default=False)
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=MAX_SEED)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no table.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="pyro-vi-lab")


def _errors_in_words(command: Callable[P, None]) -> Callable[P, None]:
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
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USAGE) from error

    return wrapped


@app.command("compare")
@_errors_in_words
def compare_command(
    problem: ProblemArgument,
    out: OutOption,
    guide: Annotated[
        list[str] | None, typer.Option(help=f"A guide to fit; repeat for several. One of {', '.join(GUIDES)}.")
    ] = None,
    seed: SeedOption = 0,
    chains: Annotated[int, typer.Option(help="Chains of NUTS.")] = 4,
    warmup: Annotated[int, typer.Option(help="Warm-up steps per chain, not kept.")] = 1000,
    draws: Annotated[int, typer.Option(help="Draws per chain, and from every guide.")] = 1000,
    target_accept: Annotated[
        float, typer.Option(help="Acceptance rate of NUTS; nearer to 1 where it reports divergent transitions.")
    ] = TARGET_ACCEPT,
    quiet: QuietOption = False,
) -> None:
    """Fit several guides, run NUTS beside them, and write a report of the differences."""
    guides = list(dict.fromkeys(guide or ["mean_field", "full_rank"]))
    for name in guides:
        if name not in GUIDES:
            raise unknown_name("guide", name, GUIDES)
    check_writable(out)
    made = _problem(problem)
    options = {"seed": seed, "chains": chains, "warmup": warmup, "draws": draws, "target-accept": target_accept}
    words = [problem, "--out", str(out), *(word for name in guides for word in ("--guide", name))]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    _say(f"NUTS on {made.name}: {chains} chains of {warmup:,} + {draws:,} steps", quiet)
    reference = nuts(
        made,
        num_chains=chains,
        num_warmup=warmup,
        num_draws=draws,
        seed=seed,
        target_accept=target_accept,
        progress=not quiet,
    )
    _say(f"fits: {', '.join(guides)}", quiet)
    found = compare(made, guides, reference=reference, num_draws=draws, seed=seed, progress=not quiet)
    found = replace(found, command=shlex.join(["pyro-vi-lab", "compare", *words]))
    _say("report", quiet)
    paths = found.save(out)
    if not quiet:
        _print_comparison(found)
    typer.echo(str(paths["report"]))
    if not found.posteriors:
        raise typer.Exit(EXIT_FAILED)


@app.command("fit")
@_errors_in_words
def fit_command(
    problem: ProblemArgument,
    out: OutOption,
    guide: Annotated[str, typer.Option(help=f"What to fit: one of {', '.join(GUIDES)}.")] = "full_rank",
    seed: SeedOption = 0,
    draws: Annotated[int, typer.Option(help="Draws from the fitted guide.")] = 1000,
    max_steps: Annotated[int, typer.Option(help="Most steps.")] = 500,
    quiet: QuietOption = False,
) -> None:
    """Fit one guide by natural gradient, and write its posterior for ArviZ."""
    if guide not in GUIDES:
        raise unknown_name("guide", guide, GUIDES)
    check_writable(out)
    made = _problem(problem)
    result = fit(made, guide, seed=seed, max_steps=max_steps, progress=not quiet)
    path = out / f"{guide}.nc"
    if result.status is Status.DIVERGED:
        path.unlink(missing_ok=True)  # a posterior of an earlier run would pass for this one's
        typer.echo(f"{guide} fit of {made.name} {result.message}", err=True)
        raise typer.Exit(EXIT_FAILED)
    posterior = result.posterior(num_draws=draws, seed=seed + 1)
    with staged(out) as folder:
        save_arviz(to_arviz(posterior, problem=made), folder / path.name)
    if not quiet:
        value, error = result.elbo(num_draws=draws, seed=seed + 1)
        typer.echo(f"{guide} fit of {made.name} {result.message}")
        typer.echo(
            f"negative ELBO {number(-value)} ± {number(error)} after {result.num_steps} steps, {result.seconds:.2f} s"
        )
        _print_parameters(posterior)
    typer.echo(str(path))


@app.command("models")
@_errors_in_words
def models_command() -> None:
    """List the example problems."""
    width = max(map(len, MODELS))
    for name, example in MODELS.items():
        typer.echo(f"{name:<{width}}  {example.description}")


# --- the problem ----------------------------------------------------------------------------------------------------


def _problem(text: str) -> Problem:
    """The problem that PROBLEM names: an example, or an object in a file."""
    file, colon, name = text.rpartition(":")
    if colon and file:
        return _from_file(Path(file), name)
    if text.endswith(".py") or Path(text).is_file():
        raise ArgumentError(f"{text} is a file: name the object in it too, as in {text}:problem")
    return build(text)


def _from_file(path: Path, name: str) -> Problem:
    with _model_code(path):
        module = _imported(path)
    if not hasattr(module, name):
        known = [
            key for key, value in vars(module).items() if _defined_here(module, value) or isinstance(value, Problem)
        ]
        raise unknown_name(f"object in {path}", name, [key for key in known if not key.startswith("_")])
    found = getattr(module, name)
    if callable(found) and not isinstance(found, Problem):
        with _model_code(path):
            made = _called(found, f"{path}:{name}")
        if not isinstance(made, Problem):
            raise ArgumentError(
                f"calling {path}:{name} gives {type(made).__name__}, not a pyro_vi_lab.Problem; it should return "
                "pyro_vi_lab.Problem(model, ...)"
            )
        return made
    if not isinstance(found, Problem):
        raise ArgumentError(
            f"{path}:{name} is {type(found).__name__}, not a pyro_vi_lab.Problem: wrap model and data as "
            "pyro_vi_lab.Problem(model, ...)"
        )
    return found


def _called(function: Callable[..., Any], where: str) -> Any:
    import inspect

    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except ValueError:  # a built-in without a signature
        needed = []
    if needed:
        call = ", ".join([getattr(function, "__name__", "model"), *needed])
        raise ArgumentError(
            f"{where} needs arguments ({', '.join(needed)}), so it is not a problem yet: add a line such as "
            f"problem = pyro_vi_lab.Problem({call}), and name that object"
        )
    return function()


def _imported(path: Path) -> ModuleType:
    """The module of a file; modules beside it can be imported by it."""
    if not path.is_file():
        raise FileError(f"there is no model file {path} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileError(f"{path} is not a Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    before, beside = sys.modules.get(path.stem), str(path.parent.absolute())
    sys.path.insert(0, beside)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
        if before is not None:
            sys.modules[path.stem] = before
    return module


def _defined_here(module: ModuleType, value: object) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


@contextmanager
def _model_code(path: Path) -> Iterator[None]:
    """What the user's file raises, in one line that names its place."""
    try:
        yield
    except LabError:
        raise
    except (Exception, SystemExit) as error:
        where, line = str(path), ""
        if isinstance(error, SyntaxError) and error.lineno is not None:
            where, line = error.filename or where, f", line {error.lineno}"
        else:
            inside = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
            if inside:
                where, line = inside[-1].filename, f", line {inside[-1].lineno}"
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ModelError(
            f"model file {path} cannot be used: {type(error).__name__}: {reason or 'no message'} ({where}{line})"
        ) from error


def _is_users(file: str) -> bool:
    ours = os.path.dirname(__file__) + os.sep
    return not (file.startswith((ours, "<frozen")) or "site-packages" in file or f"{os.sep}lib{os.sep}python" in file)


# --- what is printed ------------------------------------------------------------------------------------------------


def _say(what: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(f"{what} …", err=True)


def _print_comparison(comparison: Comparison) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("candidate", no_wrap=True)
    for title in ("negative ELBO", "k-hat", "largest mean shift", "sd ratio", "seconds", "gradients"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in comparison.to_dict()["candidates"]:
        if row["status"] == "diverged":
            cells = ["diverged", "", "", ""]
        else:
            shift = (
                f"{number(row['max_mean_shift'])} ({row['worst_mean_parameter']})"
                if row["worst_mean_parameter"]
                else "–"
            )
            ratios = f"{number(row['min_sd_ratio'])} – {number(row['max_sd_ratio'])}"
            elbo = f"{number(row['negative_elbo'])} ± {number(row['negative_elbo_se'])}"
            khat = number(row["khat"]) + (f" ± {number(row['khat_se'])}" if row["khat_se"] else "")
            cells = [elbo, khat, shift, ratios]
        table.add_row(row["candidate"], *cells, number(row["seconds"]), number(row["gradients"], 0))
    info = comparison.reference.info
    name = comparison.reference_name + (" (unfit)" if comparison.reference_problems else "")
    table.add_row(name, "", "", "", "", number(info.get("seconds")), number(info.get("num_gradients"), 0))
    _print(table)
    typer.echo("")
    for sentence in summary(comparison):
        typer.echo(sentence)
    typer.echo("")


def _print_parameters(posterior: Posterior, *, most: int = 40) -> None:
    import numpy as np
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("parameter", no_wrap=True)
    for title in ("mean", "sd", "5%", "95%"):
        table.add_column(title, justify="right", no_wrap=True)
    columns = [posterior.mean(), posterior.sd(), posterior.quantile(0.05), posterior.quantile(0.95)]
    rows = [(name, index) for name, sd in columns[1].items() for index in np.ndindex(tuple(sd.shape))]
    for name, index in rows[:most]:
        sd = float(columns[1][name][index])
        table.add_row(element_name(name, index), *(on_scale(float(column[name][index]), sd) for column in columns))
    _print(table)
    if len(rows) > most:
        typer.echo(f"… and {len(rows) - most} more; the file has all of them")


def _print(table: Any) -> None:
    """Print a table at its own width, also into a file or a pipe."""
    from rich.console import Console

    wanted = Console(width=1000).measure(table).maximum
    Console(highlight=False, markup=False, width=max(wanted, 80)).print(table)
