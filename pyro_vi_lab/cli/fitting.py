"""One posterior: ``fit`` and ``nuts``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from pyro_vi_lab.cli.interruption import Interruption, TimeBudget
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
    GuideOption,
    JsonOption,
    OptimOption,
    OutOption,
    ProblemArgument,
    QuietOption,
    SeedOption,
    StepsOption,
    WarmupOption,
    check_budget,
    check_guide,
    check_name,
)
from pyro_vi_lab.cli.printing import Output, parameters, print_parameters
from pyro_vi_lab.cli.problem_argument import read_problem
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.export import check_writable, save_arviz, staged, to_arviz, versions
from pyro_vi_lab.fit import AUTO, OPTIMS, Fit, fit
from pyro_vi_lab.nuts import nuts
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.report.words import number


def fit_command(
    problem: ProblemArgument,
    out: OutOption,
    data: DataOption = None,
    guide: GuideOption = "full_rank",
    optim: OptimOption = None,
    seed: SeedOption = 0,
    draws: DrawsOption = 1000,
    max_steps: StepsOption = None,
    time_budget: BudgetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit one guide until it has converged, and write its posterior for ArviZ.

    Ctrl-C ends the fit after the step that it is in; what it has by then is written, and the exit code is 130.
    """
    check_guide(guide)
    check_name("optim", optim, OPTIMS)
    check_budget(time_budget)
    check_writable(out)
    output = Output(as_json=as_json, quiet=quiet)
    with Interruption(output.say) as interruption:
        made = read_problem(problem, data=data, device=device, dtype=dtype, say=output.say)
        found = fitted(made, guide, interruption, output, optim=optim, seed=seed, steps=max_steps, budget=time_budget)
        path = out / f"{guide}.nc"
        if found.status is Status.DIVERGED:
            path.unlink(missing_ok=True)  # a posterior of an earlier run would pass for this one's
            typer.echo(f"{guide} fit of {made.name} {found.message}", err=True)
            if as_json:
                output.result("", fit_values(found, seed=seed))
            raise typer.Exit(EXIT_INTERRUPTED if interruption.asked else EXIT_FAILED)
        posterior = save_posteriors({guide: found}, out, draws=draws, seed=seed + 1)[guide]
    _print_fit(found, posterior, output, draws=draws, seed=seed + 1)
    values = fit_values(found, seed=seed, draws=draws) | {"parameters": parameters(posterior), "file": str(path)}
    output.result(path, values | {"interrupted": interruption.asked})
    if interruption.asked:
        raise typer.Exit(EXIT_INTERRUPTED)


def nuts_command(
    problem: ProblemArgument,
    out: OutOption,
    data: DataOption = None,
    seed: SeedOption = 0,
    chains: ChainsOption = 4,
    warmup: WarmupOption = 1000,
    draws: DrawsOption = 1000,
    target_accept: AcceptOption = DEFAULT_ACCEPT,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw from the posterior by NUTS, check the draws, and write them for ArviZ."""
    check_writable(out)
    output = Output(as_json=as_json, quiet=quiet)
    made = read_problem(problem, data=data, device=device, dtype=dtype, say=output.say)
    posterior = sampled(made, output, seed=seed, chains=chains, warmup=warmup, draws=draws, accept=target_accept)
    path, problems = out / "nuts.nc", posterior.problems()
    with staged(out) as folder:
        save_arviz(to_arviz(posterior, problem=made), folder / path.name)
    print_parameters(posterior, output)
    for sentence in problems:
        output.tell(f"unfit as a reference: {sentence}")
    values = {"problem": made.name, **posterior.info, "problems": problems, "parameters": parameters(posterior)}
    output.result(path, {**values, "versions": versions(), "file": str(path)})


def fitted(
    problem: Problem,
    guide: str,
    interruption: Interruption,
    output: Output,
    *,
    optim: str | None,
    seed: int,
    steps: int | None,
    budget: float | None,
) -> Fit:
    """A fit that ends at Ctrl-C and when its time is over; ``auto`` does so between its stages."""
    if guide == AUTO:
        return fit(
            problem, guide, optim=optim, seed=seed, max_steps=steps, time_budget=budget, progress=not output.quiet
        )
    callbacks = [interruption, *([] if budget is None else [TimeBudget(budget)])]
    return fit(
        problem,
        guide,
        optim=optim,
        seed=seed,
        max_steps=steps,
        progress=not output.quiet,
        callbacks=callbacks,
    )


def sampled(
    problem: Problem, output: Output, *, seed: int, chains: int, warmup: int, draws: int, accept: float
) -> Posterior:
    """Draws by NUTS."""
    output.say(f"NUTS on {problem.name}: {chains} chains of {warmup:,} + {draws:,} steps …")
    return nuts(
        problem,
        num_chains=chains,
        num_warmup=warmup,
        num_draws=draws,
        seed=seed,
        target_accept=accept,
        progress=not output.quiet,
    )


def save_posteriors(fits: Mapping[str, Fit], out: Path, *, draws: int, seed: int) -> dict[str, Posterior]:
    """Write the posteriors of all fits that have one; all of the files, or none."""
    usable = {name: one for name, one in fits.items() if one.status is not Status.DIVERGED}
    posteriors = {name: one.posterior(num_draws=draws, seed=seed) for name, one in usable.items()}
    with staged(out) as folder:
        for name, posterior in posteriors.items():
            # 'auto' may have written the model in another way
            save_arviz(to_arviz(posterior, problem=fits[name].problem), folder / f"{name}.nc")
    return posteriors


def fit_values(found: Fit, *, seed: int, draws: int = 0) -> dict[str, object]:
    """A fit as plain values."""
    values: dict[str, object] = {
        "problem": found.problem.name,
        "guide": found.method,
        "status": found.status.value,
        "message": found.message,
        "steps": found.num_steps,
        "gradients": found.num_gradients,
        "seconds": found.seconds,
        "seed": seed,
        "versions": versions(),
    }
    if found.verdict is not None:
        values["verdict"] = found.verdict.to_dict()
    if found.path:
        values["path"] = [stage._asdict() for stage in found.path]
    if draws > 1 and found.mode is None and found.sampled is None:
        value, error = found.elbo(num_draws=draws, seed=seed + 1)
        values |= {"negative_elbo": -value, "negative_elbo_se": error}
    return values


def _print_fit(found: Fit, posterior: Posterior, output: Output, *, draws: int, seed: int) -> None:
    output.tell(f"{found.method} fit of {found.problem.name} {found.message}")
    steps = f"after {found.num_steps} steps, {found.seconds:.2f} s"
    for stage in found.path:
        output.tell(f"  {stage.guide}: {stage.decision}{'; '.join(('', *stage.changes))}")
    if found.sampled is not None:
        output.tell(f"{found.sampled.num_chains} chains of {found.sampled.num_draws:,} draws, {found.seconds:.2f} s")
    elif found.mode is None and draws > 1 and not output.quiet:
        value, error = found.elbo(num_draws=draws, seed=seed)
        output.tell(f"negative ELBO {number(-value)} ± {number(error)} {steps}")
    elif found.mode is not None:
        output.tell(f"negative log density {number(found.history['negative_log_density'].ravel()[-1])} {steps}")
    print_parameters(posterior, output)
