"""What is minimised, as Pyro objectives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, ModelError

Gradient = Literal["stl", "reparam"]


class ELBO(Trace_ELBO):
    r"""The evidence lower bound for reparameterized guides, with a choice of gradient.

    .. math:: \mathcal L(\phi) = E_{\varepsilon}[\log p(x, z) - \log q_\phi(z)], \quad z = z_\phi(\varepsilon)

    ``"reparam"`` differentiates all of it, as Pyro's ``Trace_ELBO`` does. ``"stl"`` leaves out the score
    :math:`\nabla_\phi \log q_\phi(z)` at fixed z, whose mean is zero: what is left vanishes draw by draw where q =
    p, so
    a fit can converge to rounding error.

    Args:
        num_particles: Draws per step.
        gradient: ``"stl"`` or ``"reparam"``.
        **kwargs: As of :class:`pyro.infer.Trace_ELBO` (``max_plate_nesting``, ``vectorize_particles``, ...).

    Raises:
        ArgumentError: ``gradient`` is neither of the two.
        ModelError: With ``"stl"``, a site of the guide is not reparameterized; the message names it.

    References:
        Roeder, Wu & Duvenaud 2017, "Sticking the landing", NeurIPS, eq. 8.
    """

    def __init__(self, num_particles: int = 1, *, gradient: Gradient = "stl", **kwargs: Any) -> None:
        if gradient not in ("stl", "reparam"):
            raise ArgumentError(f"gradient must be 'stl' or 'reparam', got {gradient!r}")
        self.gradient = gradient
        super().__init__(num_particles=num_particles, **kwargs)

    def _get_trace(self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.gradient == "reparam":
            return super()._get_trace(model, guide, args, kwargs)
        whole = poutine.Trace()

        def recorded(*args: Any, **kwargs: Any) -> Any:
            nonlocal whole
            with poutine.trace() as tracer:
                result = guide(*args, **kwargs)
            whole = tracer.trace
            return result

        model_trace, guide_trace = super()._get_trace(model, recorded, args, kwargs)
        with _frozen(whole, guide):
            # the trace that Pyro returns lacks the indices of subsampled plates, which have to be the same here
            frozen = poutine.trace(poutine.replay(guide, trace=whole)).get_trace(*args, **kwargs)
            frozen.compute_log_prob()
        for name, node in guide_trace.nodes.items():
            if node["type"] != "sample" or "score_parts" not in node:
                continue
            if not node["fn"].has_rsample and not node["is_observed"]:
                raise ModelError(
                    f"guide site {name!r} ({type(node['fn']).__name__}) is not reparameterized, so it has no 'stl' "
                    "gradient; use pyro.infer.TraceGraph_ELBO, or enumerate it with pyro.infer.TraceEnum_ELBO"
                )
            node["score_parts"] = node["score_parts"]._replace(entropy_term=frozen.nodes[name]["log_prob"])
        return model_trace, guide_trace


@contextmanager
def _frozen(trace: Any, guide: Any) -> Iterator[None]:
    """Parameters of the guide as constants inside the block; what was recorded before stays recorded."""
    leaves: dict[int, Tensor] = {}
    for node in trace.nodes.values():
        if node["type"] == "param":
            leaf = node["value"].unconstrained() if hasattr(node["value"], "unconstrained") else node["value"]
            leaves[id(leaf)] = leaf
    if isinstance(guide, nn.Module):
        leaves.update({id(parameter): parameter for parameter in guide.parameters()})
    changed = [leaf for leaf in leaves.values() if leaf.is_leaf and leaf.requires_grad]
    for leaf in changed:
        leaf.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # of pyro.module: nothing has to be registered again here
            warnings.filterwarnings("ignore", message=".* was not registered in the param store because requires_grad")
            yield
    finally:
        for leaf in changed:
            leaf.requires_grad_(True)
