"""Adam for all parameters in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor


class FusedAdam(PyroOptim):
    r"""Adam for all parameters in one call: ``pyro.optim.Adam``'s numbers at a fraction of its time.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \mathrm{lr} \,
        \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    ``pyro.optim.Adam`` runs one optimizer for each parameter, in Python: for a small model most of the time of a step.
    Here the parameters that have the same options are stepped together by one kernel. Everything else is as there:
    each parameter has its own state and its own count of steps, from the step at which it first gets a gradient;
    states are saved and loaded in the same form, and one optimizer can load the state of the other.

    Args:
        optim_args: Options of :class:`torch.optim.Adam` (``lr``, ``betas``, ``eps``, ``weight_decay``, ``amsgrad``,
            ``maximize``), or a function that gives those of a parameter from its name.
        clip_args: ``clip_norm`` and ``clip_value`` of each parameter's gradient, or a function that gives them.

    References:
        Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", ICLR, algorithm 1.

    Example:
        >>> weight = pyro.param("weight", torch.zeros(2)).unconstrained()
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> FusedAdam({"lr": 0.1})([weight])
        >>> weight.detach()
        tensor([-0.1000,  0.1000])
    """

    def __init__(
        self,
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, Any] | Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(torch.optim.Adam, optim_args, clip_args)
        self._known: set[Tensor] = set()
        self._groups: list[_Group] = []
        self._alone: list[Tensor] = []

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step ``params``; those without a gradient stay as they are."""
        params = params if isinstance(params, set) else set(params)
        if params != self._known or any(group.is_stale() for group in self._groups):
            self._arrange(params)
        for param in params if self.pt_clip_args else ():
            clip = self.grad_clip[param]
            if clip is not None and param.grad is not None:
                clip(param)
        for group in self._groups:
            group.step()
        for param in self._alone:
            self.optim_objs[param].step()

    def get_state(self) -> dict[str, Any]:
        """State of each parameter by its name, as of ``pyro.optim.Adam``."""
        for group in self._groups:
            group.part()
        state: dict[str, Any] = super().get_state()
        return state

    def _arrange(self, params: set[Tensor]) -> None:
        """Sort the parameters into groups that are stepped together."""
        groups: dict[Any, list[Tensor]] = {}
        self._alone = []
        for param in params:
            if param not in self.optim_objs:
                self._meet(param)
            options = self.optim_objs[param].param_groups[0]
            if _is_fusable(param, options):
                groups.setdefault((param.dtype, param.device, _NUMBERS(options)), []).append(param)
            else:
                self._alone.append(param)
        for group in self._groups:
            group.part()
        self._groups = [_Group(members, [self.optim_objs[param] for param in members]) for members in groups.values()]
        self._known = set(params)

    def _meet(self, param: Tensor) -> None:
        """Give a new parameter its own state, or the one that was loaded for it."""
        optim = self.optim_objs[param] = self._get_optim(param)
        self.grad_clip[param] = self._get_grad_clip(param)  # type: ignore[arg-type]
        state = self._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(param), None)
        if state is not None:
            optim.load_state_dict(state)


class _Group:
    """Parameters of one type on one device, with the same options.

    Their states stay in torch's optimizers, one for each parameter.
    """

    def __init__(self, params: list[Tensor], optims: list[torch.optim.Adam]) -> None:
        self.params, self.optims = params, optims
        self.options = [optim.param_groups[0] for optim in optims]
        self.numbers = _NUMBERS(self.options[0])
        lr, (beta1, beta2), eps, weight_decay, amsgrad, maximize = self.numbers
        self.keywords = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        self.keywords |= {"amsgrad": amsgrad, "maximize": maximize}
        self._states: list[list[Tensor]] | None = None

    def is_stale(self) -> bool:
        """Whether someone has changed an option or loaded a state."""
        for optim, options in zip(self.optims, self.options, strict=True):
            if optim.param_groups[0] is not options or _NUMBERS(options) != self.numbers:
                return True
        return False

    def part(self) -> None:
        """Give each parameter a count of its own, as it is where an optimizer is for one parameter."""
        for param, optim in zip(self.params, self.optims, strict=True):
            if "step" in optim.state[param]:
                optim.state[param]["step"] = optim.state[param]["step"].clone()
        self._states = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of those that have a gradient."""
        gradients = [param.grad for param in self.params]
        present = [number for number, gradient in enumerate(gradients) if gradient is not None]
        if len(present) == len(gradients):
            if self._states is None:
                self._states = self._collect(present)
                self._share_count()
            self._step(self.params, gradients, self._states)
        elif present:
            self.part()
            params = [self.params[number] for number in present]
            self._step(params, [gradients[number] for number in present], self._collect(present))

    def _step(self, params: list[Tensor], gradients: Any, states: list[list[Tensor]]) -> None:
        averages, squares, largest, steps = states
        if steps[0] is steps[-1]:
            steps[0].add_(1)
        else:
            torch._foreach_add_(steps, 1)
        gradients = [gradient.contiguous() for gradient in gradients]
        torch._fused_adam_(params, gradients, averages, squares, largest, steps, **self.keywords)

    def _collect(self, numbers: Sequence[int]) -> list[list[Tensor]]:
        """States of some of the parameters, made where there is none yet, as the kernel takes them."""
        states = []
        for number in numbers:
            param, state = self.params[number], self.optims[number].state[self.params[number]]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            if self.keywords["amsgrad"] and "max_exp_avg_sq" not in state:
                state["max_exp_avg_sq"] = torch.zeros_like(param)
            # of the type that the kernel takes
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=param.device)
            states.append(state)
        largest = [state["max_exp_avg_sq"] for state in states] if self.keywords["amsgrad"] else []
        averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        return [averages, squares, largest, steps]

    def _share_count(self) -> None:
        """One count for parameters that have made the same number of steps: one addition instead of many."""
        assert self._states is not None
        steps = self._states[3]
        if all(bool(step == steps[0]) for step in steps):
            self._states[3] = [steps[0]] * len(steps)
            for param, optim in zip(self.params, self.optims, strict=True):
                optim.state[param]["step"] = steps[0]


_NUMBERS = itemgetter("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


def _is_fusable(param: Tensor, options: dict[str, Any]) -> bool:
    """Whether the kernel can step it: it knows neither strides nor what torch's optimizers do besides Adam."""
    unusual = ("capturable", "differentiable", "decoupled_weight_decay")
    return (
        param.is_floating_point()
        and param.device.type in ("cpu", "cuda")
        and param.is_contiguous()
        and isinstance(options["lr"], (int, float))
        and not any(options.get(name) for name in unusual)
    )
