"""What an earlier command has saved: ``report`` and ``export``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from pyro_vi_lab.cli.options import DataOption, DeviceOption, DtypeOption, JsonOption, QuietOption
from pyro_vi_lab.cli.printing import Output, print_comparison
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.compare import NUMBERS, Comparison, compare
from pyro_vi_lab.errors import ArgumentError, DataError, FileError
from pyro_vi_lab.export import check_writable, data_hash, load_arviz, save_arviz
from pyro_vi_lab.fit import Fit, fit
from pyro_vi_lab.fit_guide import is_point_estimate
from pyro_vi_lab.guides import guide_named
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem

ENDINGS = (".nc", ".zarr")


def report_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `compare --out DIR` has written.")],
    problem: Annotated[
        str | None,
        typer.Argument(metavar="[PROBLEM]", help="The problem, if it is not where the saved command has it."),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make the report of a saved comparison again, from the draws of NUTS in its files.

    NUTS is not run again. The guides are fitted again with the saved seed, which takes seconds. The data have to be
    the same.
    """
    check_writable(directory)
    saved = _saved(directory)
    output, options = Output(as_json=as_json, quiet=quiet), _options(saved)
    made = read_problem(
        problem or _text(options.get("problem"), saved),
        data=data or options.get("data"),
        device=device or options.get("device"),
        dtype=dtype or options.get("dtype"),
        say=output.say,
    )
    if data_hash(made) != saved["data_hash"]:
        raise DataError(
            f"the data of {made.name} are not those of the comparison in {directory}: give the same --data, or compare "
            "anew"
        )
    reference = _reference(directory / f"{saved['reference']['name']}.nc", made)
    fits = _fits(made, saved, options, output)
    output.say("report …")
    found: Comparison = compare(
        made,
        fits,
        reference=reference,
        num_draws=saved["num_draws"],
        seed=saved["seed"],
        progress=not quiet,
    )
    paths = replace(found, command=saved.get("command")).save(directory)
    print_comparison(found, output)
    output.result(paths["report"], found.to_dict() | {"files": {name: str(path) for name, path in paths.items()}})


def export_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A saved posterior: .nc or .zarr.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Where it goes: .nc (NetCDF) or .zarr (Zarr).")],
    as_json: JsonOption = False,
) -> None:
    """Write a saved posterior in another format: NetCDF or Zarr."""
    for path in (source, target):
        if path.suffix not in ENDINGS:
            raise ArgumentError(f"cannot tell from its name what {path} is: it has to end in .nc or .zarr")
    if not source.exists():
        raise FileError(f"there is no file {source} (looked in {Path.cwd()})")
    if source.resolve() == target.resolve():
        raise ArgumentError(f"{target} is the source itself: give another name")
    save_arviz(load_arviz(source), target)
    Output(as_json=as_json).result(target, {"source": str(source), "file": str(target)})


def _saved(directory: Path) -> dict[str, Any]:
    """The numbers of the comparison in a directory."""
    path = directory / NUMBERS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        complete = {"data_hash", "reference", "candidates", "num_draws", "seed"} <= found.keys()
    except FileNotFoundError as error:
        raise FileError(
            f"there is no comparison in {directory}: pyro-vi-lab compare ... --out {directory} makes one"
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not complete:
        raise FileError(f"{path} is not what pyro-vi-lab compare writes")
    return dict(found)


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command that made a comparison; none of one made in Python."""
    words = shlex.split(saved.get("command") or "")
    if words[:2] != ["pyro-vi-lab", "compare"]:
        return {}
    from pyro_vi_lab.cli.app import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands["compare"].make_context("compare", words[2:]).params)


def _text(problem: str | None, saved: Mapping[str, Any]) -> str:
    if problem is None:
        raise ArgumentError(
            f"the comparison of {saved['problem']} was made in Python: name its problem, as in pyro-vi-lab report DIR "
            "file.py:problem"
        )
    return problem


def _reference(path: Path, problem: Problem) -> Posterior:
    """The draws of the reference as they were saved."""
    if not path.is_file():
        raise FileError(f"there are no draws of the reference: {path} is missing; compare anew")
    tree = load_arviz(path)
    drawn, stats = _group(tree, "posterior"), _group(tree, "sample_stats")
    known = {name: value for name, value in drawn.items() if name in problem.sites}
    if not known:
        raise DataError(f"{path} has no draws of a site of {problem.name}: it has {', '.join(drawn) or 'none'}")
    attrs = dict(tree.attrs)
    info = {key: value for key, value in attrs.items() if isinstance(value, (str, int, float, np.number))}
    return Posterior(known, stats, method=str(attrs.get("method", "reference")), info=info)


def _group(tree: Any, name: str) -> dict[str, torch.Tensor]:
    """The variables of a group by the names of the sites."""
    if name not in (tree.groups() if callable(tree.groups) else tree.children):
        return {}
    variables = {str(key): tree[name][key] for key in tree[name].data_vars}
    return {
        str(value.attrs.get("long_name", key)): torch.from_numpy(np.array(value.to_numpy()))
        for key, value in variables.items()
    }


def _fits(problem: Problem, saved: Mapping[str, Any], options: Mapping[str, Any], output: Output) -> dict[str, Fit]:
    """The same fits again: the guides by their names, with the same seed."""
    names = [row["candidate"] for row in saved["candidates"]]
    for name in names:
        guide_named(name)  # one of the user's own can only be compared in Python
        if is_point_estimate(name):
            raise ArgumentError(f"guide {name!r} is a point, and no candidate")
    output.say(f"fits of {problem.name}: {', '.join(names)} …")
    how = {"optim": options.get("optim"), "max_steps": options.get("max_steps"), "seed": saved["seed"]}
    return {name: fit(problem, name, progress=not output.quiet, **how) for name in names}
