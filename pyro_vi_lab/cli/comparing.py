"""Several guides beside NUTS: ``compare``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from pyro_vi_lab.cli.fitting import fit_values, fitted, sampled, save_posteriors
from pyro_vi_lab.cli.interruption import Interruption
from pyro_vi_lab.cli.options import (
    DEFAULT_ACCEPT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AcceptOption,
    BudgetOption,
    ChainsOption,
    DataOption,
    DeviceOption,
    DrawsOption,
    DtypeOption,
    GuidesOption,
    JsonOption,
    OptimOption,
    OutOption,
    ProblemArgument,
    QuietOption,
    RequireOption,
    SeedOption,
    StepsOption,
    WarmupOption,
    check_budget,
    check_guide,
    check_name,
    command_line,
)
from pyro_vi_lab.cli.printing import Output, print_comparison
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.cli.trusting import leave_unless
from pyro_vi_lab.compare import compare
from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.export import check_writable
from pyro_vi_lab.fit import OPTIMS, Fit
from pyro_vi_lab.fit_guide import is_point_estimate
from pyro_vi_lab.problem import Problem


def compare_command(
    context: typer.Context,
    problem: ProblemArgument,
    out: OutOption,
    data: DataOption = None,
    guide: GuidesOption = None,
    optim: OptimOption = None,
    seed: SeedOption = 0,
    chains: ChainsOption = 4,
    warmup: WarmupOption = 1000,
    draws: DrawsOption = 1000,
    target_accept: AcceptOption = DEFAULT_ACCEPT,
    max_steps: StepsOption = None,
    time_budget: BudgetOption = None,
    require: RequireOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit several guides, run NUTS beside them, and write a report of the differences.

    Every fit gets a verdict, with NUTS as one of its sources where its chains pass their checks. With --require trust
    the exit code is 3 unless one is trusted.

    Ctrl-C keeps the fits that are done: their posteriors are written, without a report, and the exit code is 130.
    """
    context.params["guide"] = guides = list(dict.fromkeys(guide or ["mean_field", "full_rank"]))
    for name in guides:
        check_guide(name)
        if is_point_estimate(name):
            raise ArgumentError(
                f"guide {name!r} is a point, which has no spread to compare with a posterior's: compare 'laplace'"
            )
    check_name("optim", optim, OPTIMS)
    check_name("verdict", require, ["trust"])
    check_budget(time_budget)
    check_writable(out)
    output, fits = Output(as_json=as_json, quiet=quiet), dict[str, Fit]()
    with Interruption(output.say) as interruption:
        made = read_problem(problem, data=data, device=device, dtype=dtype, say=output.say)
        try:
            output.say(f"fits of {made.name}: {', '.join(guides)} …")
            for name in guides:
                fits[name] = fitted(
                    made, name, interruption, output, optim=optim, seed=seed, steps=max_steps, budget=time_budget
                )
                if interruption.asked:
                    raise KeyboardInterrupt
            numbers: dict[str, Any] = {"chains": chains, "warmup": warmup, "draws": draws, "accept": target_accept}
            reference = sampled(made, output, seed=seed, **numbers)
            output.say("report …")
            found = compare(made, fits, reference=reference, num_draws=draws, seed=seed, progress=not quiet)
            found = replace(found, command=command_line(context))
            paths = found.save(out)
        except KeyboardInterrupt:
            _keep(fits, made, out, output, draws=draws, seed=seed)
            raise typer.Exit(EXIT_INTERRUPTED) from None
    print_comparison(found, output)
    files = {name: str(path) for name, path in paths.items()}
    output.result(paths["report"], found.to_dict() | {"files": files})
    if not found.posteriors:
        raise typer.Exit(EXIT_FAILED)
    leave_unless({name: one.decision for name, one in found.verdicts.items()}, require)


def _keep(fits: Mapping[str, Fit], problem: Problem, out: Path, output: Output, *, draws: int, seed: int) -> None:
    """What is done by the time of Ctrl-C: the fits."""
    kept = save_posteriors(fits, out, draws=draws, seed=seed + 1) if fits else {}
    files = {name: str(out / f"{name}.nc") for name in kept}
    for name, found in fits.items():
        output.tell(f"{name} fit of {problem.name} {found.message}")
    done = f"{' and '.join(kept)} {'is' if len(kept) == 1 else 'are'} kept in {out}" if kept else "nothing was written"
    typer.echo(f"interrupted before the comparison was made: {done}", err=True)
    if output.as_json:
        values = {name: fit_values(found, seed=seed) for name, found in fits.items()}
        output.result("", {"problem": problem.name, "interrupted": True, "fits": values, "files": files})
