"""Train a guide, and a model's own parameters, for a number of epochs, as networks are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import SVI
from pyro.nn import PyroModule
from pyro.optim.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vi_lab.callbacks import Callback, Watch, checked
from pyro_vi_lab.captured import Captured
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.errors import ArgumentError, unknown_name
from pyro_vi_lab.fit_guide import is_over_family
from pyro_vi_lab.fit_progress import fit_progress
from pyro_vi_lab.fitted import Fit
from pyro_vi_lab.fused_adam import FusedAdam
from pyro_vi_lab.guides import Amortized, Conjugate, Flow
from pyro_vi_lab.isolation import default_dtype, seeded, threads
from pyro_vi_lab.natural_gradient import NaturalGradient
from pyro_vi_lab.objectives import ELBO
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.program_engine import MAX_FAILURES, calls_of, enumerated, step_size
from pyro_vi_lab.program_fit import forget, instance_of, name_of, num_threads, objective_of
from pyro_vi_lab.tiers import Compile, check_compile

ADAM_LR, NATURAL_LR = 1e-3, 0.5
"""Step sizes: what Kingma & Ba 2015 recommend for Adam, and the default of the natural gradient."""
OPTIMS = ("adam", "natural_gradient")


def fit_epochs(
    problem: Problem,
    guide: str | type[Any] | Callable[..., Any],
    *,
    num_epochs: int = 100,
    warm_up: int = 0,
    beta: float = 1.0,
    optim: PyroOptim | str = "adam",
    objective: PyroELBO | None = None,
    lr: float | None = None,
    num_particles: int | None = None,
    seed: int = 0,
    progress: bool = True,
    compile: Compile = "auto",
    callbacks: Sequence[Callback] = (),
    on_epoch: Callable[[int, float], None] | None = None,
) -> Fit:
    r"""Train a guide and the parameters of its model for a number of epochs.

    Where :func:`fit` goes on until the bound stands still, this is how networks are trained: for so many epochs, at one
    step size. Every epoch sees each row once. With ``warm_up`` the weight of the latent sites rises in a line,

    .. math:: E_q[\log p(x \mid z)] - \beta_t \, \mathrm{KL}(q \,\|\, p), \qquad \beta_t = \beta \min(1, t / T),

    over the steps t of the first epochs, which keeps latents in use that a weak decoder would give up at first. It is a
    scale of the latent sites of model and guide; problem and guide themselves stay as they are, so that
    :meth:`Fit.elbo` is the bound with weight one whatever ``beta`` was.

    Trained in place, as by :class:`pyro.infer.SVI`, with networks in the mode that they are in (dropout is on unless
    they are told ``eval()``). The same seed gives the same numbers.

    Args:
        problem: Model and data; a ``minibatch`` of it is a step, all rows otherwise.
        guide: As of :func:`fit`; such as the ``guide`` of an autoencoder.
        num_epochs: Times that every row is seen.
        warm_up: Epochs over which the weight of the latent sites rises; 0 for none.
        beta: Their weight in the end; with another than 1 the objective is no bound on the evidence for what it
            reports (Higgins et al. 2017).
        optim: ``"adam"``, ``"natural_gradient"`` (of guides that :class:`NaturalGradient` knows, such as
            ``guides.Amortized``; all else goes by Adam), or a Pyro optimizer.
        objective: By default the ELBO with its KL divergences in closed form where they have one; the objectives of
            :func:`fit` for guides of ours.
        lr: Step size; by default 0.001 of Adam, and 0.5 of the natural gradient (whose Adam has 0.001).
        num_particles: Draws per step of the default objective.
        seed: Seed of the order of the rows and of the draws.
        progress: Show a progress line on a terminal when the work takes long.
        compile: As of :func:`fit`.
        callbacks: As of :func:`fit`; their records have ``beta`` and ``epoch``, too.
        on_epoch: Called after each epoch with its number, from 1, and the mean loss of its steps.

    Returns:
        A fit whose status is ``OUT_OF_STEPS``: all epochs were made, and nobody looked whether they were enough. Its
        history has a row for every step: ``negative_elbo``, with the weight of that step, ``beta``, ``step_size`` and
        ``seconds``.

    Raises:
        ArgumentError: A number out of range, an unknown optimizer, or one that does not suit the guide.

    References:
        Bowman et al. 2016, "Generating sentences from a continuous space", CoNLL, Section 3.1; Sønderby et al. 2016,
        "Ladder variational autoencoders", NeurIPS, Section 2.3 (the warm-up). Higgins et al. 2017, "beta-VAE", ICLR.

    Example:
        >>> from pyro_vi_lab.models import VariationalAutoencoder
        >>> X = (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
        >>> model = VariationalAutoencoder(shape=(6,), num_latents=2, hidden=[16])
        >>> fit = fit_epochs(model.problem(X, minibatch=20), model.guide, num_epochs=5, warm_up=2, progress=False)
        >>> fit.num_steps, [round(float(beta), 2) for beta in fit.history["beta"][:5]]
        (10, [0.25, 0.5, 0.75, 1.0, 1.0])
    """
    if not isinstance(problem, Problem):
        raise ArgumentError(
            f"problem must be a pyro_vi_lab.Problem, got {type(problem).__name__}; wrap it: Problem(model, *args)"
        )
    _check_numbers(num_epochs=num_epochs, warm_up=warm_up, beta=beta, lr=lr, num_particles=num_particles)
    check_compile(compile)
    told = checked(callbacks)
    began = time.perf_counter()
    name, made = name_of(guide), instance_of(problem, guide)
    captured = _objective(problem, made, objective, num_particles, compile)
    weighted = warm_up > 0 or beta != 1
    per_epoch = problem.num_rows / problem.minibatch if problem.num_rows and problem.minibatch else 1.0
    num_steps, rising = math.ceil(num_epochs * per_epoch), warm_up * per_epoch
    history: dict[str, list[float]] = {key: [] for key in ("negative_elbo", "beta", "step_size", "seconds")}
    culprit, failures, epoch, since = "", 0, 0, 0
    with (
        seeded(seed),
        default_dtype(problem.dtype),
        threads(num_threads(problem)),
        fit_progress(progress, f"{name} fit of {problem.name}") as line,
    ):
        watch = Watch((*told, *line))
        calls, program = calls_of(problem, enumerated(problem), made, seed)
        optimizer = _optimizer(made, optim, lr, weighted=weighted)
        plain = SVI(*program, optimizer, loss=captured)
        weight = torch.ones((), dtype=problem.dtype)
        warm = plain
        if weighted:
            # the encoder takes note of its scale as a number, which a graph does not have
            loss = captured.objective if _notes_its_scale(made) else captured
            weighted_model, weighted_guide = (Weighted(one, weight) for one in program)
            warm = SVI(weighted_model, weighted_guide, optimizer, loss=loss)
        for step in range(1, num_steps + 1):
            now = beta * min(1.0, step / rising) if rising else beta
            weight.fill_(now)
            args, kwargs = next(calls)
            loss_now = float((plain if now == 1 else warm).step(*args, **kwargs))
            row = (loss_now, now, step_size(optimizer), time.perf_counter() - began)
            for values, value in zip(history.values(), row, strict=True):
                values.append(value)
            record = {**dict(zip(history, row, strict=True)), "epoch": epoch + 1}
            stopped = watch(step, lambda record=record: record)  # type: ignore[misc]
            failures = 0 if math.isfinite(loss_now) else failures + 1
            if failures >= MAX_FAILURES:
                culprit = f"the loss of {MAX_FAILURES} steps in a row is no finite number"
                break
            if math.floor(step / per_epoch) > epoch or step == num_steps:
                epoch += 1
                if on_epoch is not None:
                    on_epoch(epoch, float(np.mean(history["negative_elbo"][since:])))
                since = step
            if stopped:
                break
    if made is not guide and isinstance(made, PyroModule):
        forget(made)
    taken = len(history["seconds"])
    result = Fit(
        problem=problem,
        method=name,
        guide=made,
        params=None,
        statuses=(Status.DIVERGED if culprit else Status.OUT_OF_STEPS,),
        message=f"diverged: {culprit}; take a smaller step size (lr=...)"
        if culprit
        else f"trained for num_epochs={num_epochs}, as asked; whether these were enough, held-out rows tell",
        num_steps=taken,
        num_gradients=taken * int(captured.num_particles),
        seconds=time.perf_counter() - began,
        seed=seed,
        history={key: np.array(values) for key, values in history.items()},
        objective=captured,
    )
    return watch.ended(result)


class Weighted(nn.Module):
    """A model or a guide whose latent sites have a weight.

    Args:
        program: The model or the guide.
        weight: Their weight, a number; it may be written into between the calls.
    """

    weight: Tensor

    def __init__(self, program: Callable[..., Any], weight: Tensor) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("weight", weight, persistent=False)
        self.__name__ = getattr(program, "__name__", type(program).__name__)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with _LatentWeight(self.weight):
            return self.program(*args, **kwargs)


class _LatentWeight(Messenger):
    """Scales the latent sites inside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


def _notes_its_scale(guide: Any) -> bool:
    return isinstance(guide, nn.Module) and any(isinstance(part, Amortized) for part in guide.modules())


def _objective(
    problem: Problem, guide: Any, objective: PyroELBO | None, num_particles: int | None, compile: Compile
) -> Captured:
    discrete = any(site.kind == "discrete" for site in problem.sites.values())
    ours = is_over_family(guide) or isinstance(guide, (Conjugate, Flow, Amortized))
    if objective is None and not discrete and not ours:
        return Captured(ELBO(num_particles or 1, gradient="reparam", analytic_kl=True), compile=compile)
    return objective_of(problem, guide, objective, num_particles, compile)


def _optimizer(guide: Any, optim: PyroOptim | str, lr: float | None, *, weighted: bool) -> PyroOptim:
    if isinstance(optim, PyroOptim):
        if lr is not None:
            raise ArgumentError("lr and optim were both given: the step size of an optimizer is set where it is made")
        return optim
    if optim not in OPTIMS:
        if not isinstance(optim, str):
            raise ArgumentError(f"optim must be a name or a Pyro optimizer, got {type(optim).__name__}")
        raise unknown_name("optim", optim, OPTIMS)
    if optim == "adam":
        return FusedAdam({"lr": lr or ADAM_LR})
    if weighted:
        raise ArgumentError(
            "optim='natural_gradient' takes steps in the geometry of the guide, which warm_up and beta do not scale: "
            "leave them out, or take optim='adam'"
        )
    return NaturalGradient(guide, lr=lr or NATURAL_LR, others=FusedAdam({"lr": ADAM_LR}))


def _check_numbers(*, num_epochs: Any, warm_up: Any, beta: Any, lr: float | None, num_particles: int | None) -> None:
    for name, value, least in (("num_epochs", num_epochs, 1), ("warm_up", warm_up, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if warm_up > num_epochs:
        raise ArgumentError(f"warm_up={warm_up} epochs are more than num_epochs={num_epochs}")
    if isinstance(beta, bool) or not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ArgumentError(f"beta must be a positive number, got {beta!r}")
    if lr is not None and not 0 < lr <= 1:
        raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
    if num_particles is not None and num_particles < 1:
        raise ArgumentError(f"num_particles must be at least 1, got {num_particles!r}")
