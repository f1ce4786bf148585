"""A Pyro optimizer that takes natural-gradient steps of guides."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import PyroOptim
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, LabWarning
from pyro_vi_lab.natural_parts import NaturalPart, Settings, handles, names, part_of

SHRINKAGE, GROWTH = 0.25, 2.0
"""Factors of the trust region after a step without a direction, and after one with (Nocedal & Wright 2006, 4.1)."""
MANY_FAILURES = 10
"""Steps in a row without a direction after which the user is told."""


class NaturalGradient(PyroOptim):
    r"""Natural-gradient optimizer of guides; a drop-in for Pyro's optimizers.

    Takes one joint natural step, :math:`\phi \leftarrow \phi + \rho F(\phi)^{-1} \nabla_\phi \mathcal L`, in all
    parameters of each guide that it knows, also inside an ``AutoGuideList`` or another module; every other parameter
    goes to ``others``. The gradients that :class:`pyro.infer.SVI` leaves in the parameters are all it needs.

    - Guides over a family (:data:`pyro_vi_lab.guides.FAMILY_GUIDES`) and Pyro's ``AutoNormal``, ``AutoDiagonalNormal``
      and ``AutoMultivariateNormal``: in closed form.
    - :class:`~pyro_vi_lab.guides.Conjugate`: differences of natural parameters; a step of size 1 on exact expectations
      is coordinate ascent.
    - :class:`~pyro_vi_lab.guides.Amortized` and :class:`~pyro_vi_lab.guides.Flow`: by a Kronecker-factored Fisher
      matrix of their networks, the length of the step by the exact one
      (:mod:`pyro_vi_lab.natural_parts.kronecker_part`). For a flow, Adam is as good in each step and cheaper.

    For the weights of a network, or where minibatches make gradients noisy, give ``curvature_momentum``: guides of
    independent normals then take the steps of variational online Newton, in which the precision :math:`P` is a slow
    average of curvatures, of its own pace,

    .. math::
        P \leftarrow P \, (1 + x + \tfrac12 x^2), \quad x = w (\hat h / P - 1), \qquad
        m \leftarrow m + \rho \, \bar g / P,

    with :math:`\hat h` the curvature that a gradient gives, :math:`\bar g` the average gradient, and w the larger of
    1 - β₂ and 4 / (t + 40) at step t, less where the mean is far from its optimum. A mean moves by at most 2ρ standard
    deviations in a step, and a precision by a factor of at most 2.5. For networks start with
    ``NaturalGradient(guide, lr=0.1, momentum=0.9, curvature_momentum=0.999)``, and let a scheduler take ``lr`` to near
    zero: noise in the means falls with it.

    A step whose gradient is not finite is not taken, and shrinks the trust region; after ten in a row there is a
    warning that names the guide's parameters.

    Args:
        guide: The guide that is fitted.
        lr: Step size ρ in (0, 1]: 1 is exact for a Gaussian target without noise. Noise in the parameters falls with
            it. Or one of Pyro's learning-rate schedulers with any torch optimizer, whose learning rate is taken; call
            :meth:`step` as you would call that of the scheduler.
        max_kl: Largest KL divergence between successive guides, in nats: the trust region. For a low-rank guide it is
            no more than 0.5.
        momentum: Weight β in [0, 1) of the past in the exponential average of natural gradients.
        curvature_momentum: Weight β₂ in [0, 1) of the past in the exponential average of curvatures, and the choice of
            online Newton steps; ``None`` for the steps above. Then ``max_kl`` holds for every coordinate alone, and
            ``momentum`` averages gradients.
        damping: λ ≥ 0: the Fisher matrix F is taken as (1 + λ) F for guides over a family, and as F + λI for networks.
        others: Optimizer of all other parameters; ``pyro.optim.Adam({"lr": 0.01})`` by default.
        clip_args: As of Pyro's optimizers: ``{"clip_norm": ...}`` and ``{"clip_value": ...}`` limit the gradient of
            each parameter before the natural step. The trust region does this in the units of the posterior.

    Raises:
        ArgumentError: ``guide`` holds none of the guides above, or a number is out of range; with
            ``curvature_momentum``, ``guide`` has a part that is not of independent normals.

    References:
        Amari 1998, "Natural gradient works efficiently in learning", Neural Computation 10. Khan & Rue 2023, "The
        Bayesian learning rule", JMLR 24. Khan et al. 2018, "Fast and scalable Bayesian deep learning by
        weight-perturbation in Adam", ICML. Lin, Schmidt & Khan 2020, "Handling the positive-definite constraint
        in the Bayesian learning rule", ICML. Shen et al. 2024, "Variational learning is effective for large
        deep networks", ICML, algorithm 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vi_lab.guides import FullRankNormal
        >>> from pyro_vi_lab.objectives import ELBO
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = FullRankNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, lr=1.0), ELBO(num_particles=16))
        >>> for _ in range(20):
        ...     loss = svi.step()
        >>> round(guide.median()["x"].item(), 3)
        1.0
    """

    def __init__(
        self,
        guide: nn.Module,
        *,
        lr: float | PyroLRScheduler = 0.5,
        max_kl: float = 8.0,
        momentum: float = 0.0,
        curvature_momentum: float | None = None,
        damping: float = 0.0,
        others: PyroOptim | None = None,
        clip_args: Mapping[str, float] | None = None,
    ) -> None:
        if isinstance(lr, PyroLRScheduler):
            self._schedule: PyroLRScheduler | None = lr
            self._scheduled = torch.zeros(1)
            self._scheduled.grad = torch.zeros(1)
            lr = _rate(_scheduler_of(lr, self._scheduled))
        else:
            self._schedule = None
        if not 0 < lr <= 1:
            raise ArgumentError(f"lr is a step size in (0, 1], got {lr!r}")
        if not max_kl > 0:
            raise ArgumentError(f"max_kl is a KL divergence in nats and must be positive, got {max_kl!r}")
        if not 0 <= momentum < 1:
            raise ArgumentError(f"momentum is a weight in [0, 1), got {momentum!r}")
        if curvature_momentum is not None and not 0 <= curvature_momentum < 1:
            raise ArgumentError(f"curvature_momentum is a weight in [0, 1), or None, got {curvature_momentum!r}")
        if not 0 <= damping < float("inf"):
            raise ArgumentError(f"damping must be a number of at least 0, got {damping!r}")
        if unknown := set(clip_args or {}) - {"clip_norm", "clip_value"}:
            raise ArgumentError(f"clip_args takes clip_norm and clip_value, got {sorted(unknown)}")
        parts = [part for part in getattr(guide, "modules", tuple)() if handles(part)]  # a plain function has none
        if not parts:
            raise ArgumentError(
                f"NaturalGradient cannot handle the guide {type(guide).__name__}; it knows {', '.join(names())}"
            )
        if curvature_momentum is not None:
            _check_online_newton(parts)
        # for the base class's bookkeeping; no such optimizer is ever made
        super().__init__(torch.optim.SGD, {"lr": lr})
        self.guide, self.lr, self.max_kl, self.momentum, self.damping = guide, lr, max_kl, momentum, damping
        self.curvature_momentum = curvature_momentum
        self.others = others if others is not None else PyroOptim(torch.optim.Adam, {"lr": 0.01})
        self.clip_args = dict(clip_args or {})
        self._states: dict[str, dict[str, Any]] = {}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Take one step from the gradients in ``params`` (unconstrained leaf tensors), as SVI calls it.

        Raises:
            ArgumentError: The parameters are those of another guide.
        """
        remaining = {id(tensor): tensor for tensor in params}
        given, taken = list(remaining.values()), 0
        for path, module in self.guide.named_modules():
            part = part_of(module, online_newton=self.curvature_momentum is not None)
            if part is None or not all(id(tensor) in remaining for tensor in part.tensors):
                continue
            taken += 1
            for tensor in part.tensors:
                remaining.pop(id(tensor))
            state = self._states.setdefault(path, {"radius": self.max_kl, "failures": 0})
            with torch.no_grad():
                if self.clip_args:
                    for tensor in part.tensors:
                        self._clip_grad(tensor, **self.clip_args)
                if not part.direction_is_finite():
                    self._failed(module, part, state)
                    continue
                radius = min(state["radius"], self.max_kl)
                part.step(Settings(self.lr, radius, self.momentum, self.damping, self.curvature_momentum), state)
            state["radius"], state["failures"] = min(state["radius"] * GROWTH, self.max_kl), 0
        if given and not taken and not self._states:
            raise ArgumentError(
                f"NaturalGradient was made for a {type(self.guide).__name__} none of whose parameters is among those "
                f"of this step: {', '.join(map(_name, given))}; give it the guide that SVI has"
            )
        if self._schedule is not None:
            # a step of the optimizer that the scheduler watches, with a gradient of zero
            _scheduler_of(self._schedule, self._scheduled).optimizer.step()
        if remaining:
            self.others(list(remaining.values()), *args, **kwargs)

    def _failed(self, module: nn.Module, part: NaturalPart, state: dict[str, Any]) -> None:
        state["radius"] *= SHRINKAGE
        state["failures"] += 1
        if state["failures"] == MANY_FAILURES:
            bad = [_name(t) for t in part.tensors if t.grad is None or not bool(torch.isfinite(t.grad).all())]
            warnings.warn(
                f"diverged: {MANY_FAILURES} steps in a row had a gradient of {type(module).__name__} that is not "
                f"finite, in {', '.join(bad)}; check the supports and the data of the sites that depend on it",
                LabWarning,
                stacklevel=3,
            )

    @property
    def failures(self) -> int:
        """Steps in a row, up to the present, that were not taken because a gradient was not finite."""
        return max((state["failures"] for state in self._states.values()), default=0)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the learning-rate schedulers, that of ``lr`` and that of ``others``, where there are such.

        Takes the same arguments as the torch scheduler.
        """
        if self._schedule is not None:
            self._schedule.step(*args, **kwargs)
            self.lr = _rate(_scheduler_of(self._schedule, self._scheduled))
        if isinstance(self.others, PyroLRScheduler):
            self.others.step(*args, **kwargs)

    def get_state(self) -> dict[str, Any]:
        """Everything that :meth:`set_state` needs to go on as if nothing had happened."""
        state = {
            "lr": self.lr,
            "max_kl": self.max_kl,
            "momentum": self.momentum,
            "curvature_momentum": self.curvature_momentum,
            "damping": self.damping,
            "parts": copy.deepcopy(self._states),
            "others": self.others.get_state(),
        }
        if self._schedule is not None:
            scheduler = _scheduler_of(self._schedule, self._scheduled)
            state["schedule"] = {"scheduler": scheduler.state_dict(), "optimizer": scheduler.optimizer.state_dict()}
        return state

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` gave."""
        self.lr, self.max_kl = state_dict["lr"], state_dict["max_kl"]
        self.momentum, self.damping = state_dict["momentum"], state_dict["damping"]
        self.curvature_momentum = state_dict["curvature_momentum"]
        if self.curvature_momentum is not None:
            _check_online_newton([part for part in self.guide.modules() if handles(part)])
        self._states = copy.deepcopy(state_dict["parts"])
        self.others.set_state(state_dict["others"])
        if self._schedule is not None and "schedule" in state_dict:
            scheduler = _scheduler_of(self._schedule, self._scheduled)
            scheduler.load_state_dict(state_dict["schedule"]["scheduler"])
            scheduler.optimizer.load_state_dict(state_dict["schedule"]["optimizer"])


def _check_online_newton(parts: Iterable[nn.Module]) -> None:
    for part in parts:
        if not handles(part, online_newton=True):
            raise ArgumentError(
                f"curvature_momentum is for guides of independent normals ({', '.join(names(online_newton=True))}), "
                f"not for {type(part).__name__}; leave it out"
            )


def _scheduler_of(schedule: PyroLRScheduler, tensor: Tensor) -> Any:
    """The torch scheduler that a Pyro scheduler has for one tensor."""
    if tensor not in schedule.optim_objs:
        schedule.optim_objs[tensor] = schedule._get_optim(tensor)
    return schedule.optim_objs[tensor]


def _rate(scheduler: Any) -> float:
    return float(scheduler.optimizer.param_groups[0]["lr"])


def _name(tensor: Tensor) -> str:
    """Name of a parameter in Pyro's param store."""
    store = pyro.get_param_store()
    known = {id(value): name for name, value in store._params.items()}
    return repr(known.get(id(tensor), f"of shape {tuple(tensor.shape)}"))
