"""Independent normals over the weights of a network, whose noise may go into its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vi_lab.change_of_variables import ChangeOfVariables
from pyro_vi_lab.errors import ModelError, unknown_name
from pyro_vi_lab.guides.initialization import init_to_origin
from pyro_vi_lab.guides.mean_field import MeanFieldNormal
from pyro_vi_lab.layer_noise import ESTIMATORS, Estimator, Spread, mark


class NetworkNormal(MeanFieldNormal):
    r"""Mean-field normal guide of a network, with a choice of how the noise of its weights reaches the loss.

    The family is that of :class:`MeanFieldNormal`, :math:`w = \mu + \sigma \varepsilon`. Of the weights of a
    :class:`~pyro_vi_lab.models.BayesianNeuralNetwork` the guide takes the KL divergence to the prior in closed form,

    .. math:: \mathrm{KL}(q \,\|\, p) = \sum_i \log\frac{s_i}{\sigma_i} + \frac{\sigma_i^2 + (\mu_i - m_i)^2}{2 s_i^2}
              - \frac12 ,

    and their noise reaches the likelihood by one of three estimators of the same bound and of the same gradient:

    - ``"weights"``: one draw of the weights, which all rows of the batch share (Blundell et al. 2015).
    - ``"flipout"``: every row flips the signs of that draw (Wen et al. 2018).
    - ``"local_reparameterization"``: every row draws the pre-activations of linear layers (Kingma et al. 2015);
      convolutions, and linear layers that a row meets more than once, take flipout.

    The last two have a smaller variance, as the noise of the rows averages out, and cost about two passes through the
    network in place of one (:mod:`pyro_vi_lab.layer_noise`). Values of the sites are draws of q in any case. Sites that
    are no weights of a network are drawn as by :class:`MeanFieldNormal`.

    For bounds that are the mean of :math:`\log p - \log q`, as of ``Trace_ELBO`` and :class:`~pyro_vi_lab.ELBO`; the
    log density that the guide reports of a draw is its share of the KL divergence, so that importance weights, and
    bounds that are made of them, mean nothing; :class:`~pyro_vi_lab.IWAE` and its like refuse the guide.

    Args:
        model: A Pyro model.
        init_loc_fn: Where to start each site; by default a network's weights where they are, others at zero on the
            unconstrained scale.
        init_scale: Standard deviation of every coordinate of z at the start.
        estimator: One of the three.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ArgumentError: There is no such estimator, or ``init_scale`` is not a positive number.

    References:
        Blundell, Cornebise, Kavukcuoglu & Wierstra 2015, "Weight uncertainty in neural networks", ICML. Kingma,
        Salimans & Welling 2015, "Variational dropout and the local reparameterization trick", NeurIPS, eq. 6. Wen,
        Vicol, Ba, Tran & Grosse 2018, "Flipout", ICLR, eq. 4.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_origin,
        init_scale: float = 0.01,
        *,
        estimator: Estimator = "local_reparameterization",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise unknown_name("estimator", estimator, ESTIMATORS)
        super().__init__(model, init_loc_fn, init_scale, create_plates=create_plates)
        self.estimator: Estimator = estimator
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}  # of the present call

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the same ``*args, **kwargs`` as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._weights = self._of_weights()
        try:
            result = super().forward(*args, **kwargs)
            for name, (loc, scale) in self._weights.items():
                # particles that come as dimensions to the left are no rows of their own
                if result[name].shape == loc.shape:
                    mark(result[name], Spread(loc, scale, self.estimator))
        finally:
            self._weights = {}
        return result

    def _of_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of the sites that are weights of a network."""
        parts, position, loc, scale = {}, 0, self.loc, self.scale
        for name, shape in self._unconstrained_shapes.items():
            part = slice(position, position + shape.numel())
            position = part.stop
            if self._prototype_nodes()[name]["infer"].get("is_weight"):
                parts[name] = (loc[part].view(shape), scale[part].view(shape))
        return parts

    def _draw(self, plates: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not self._weights:
            return super()._draw(plates, *args, **kwargs)
        if by_row := self._by_row(plates):
            raise ModelError(
                f"site {next(iter(by_row))!r} lies along rows of which a call sees some; beside the weights of a "
                "network give it a guide of its own: AutoGuideList, with poutine.block(model, hide=[...]) here"
            )
        others, position = {}, 0
        for name, shape in self._unconstrained_shapes.items():
            if name not in self._weights:
                others[name] = slice(position, position + shape.numel())
            position += shape.numel()
        values = self._draw_globals(others)
        for name, (loc, scale) in self._weights.items():
            # of no density, as that of the weights is the KL divergence
            noise = dist.Normal(torch.zeros_like(loc), 1.0).to_event(loc.dim()).mask(False)
            marks: Any = {"is_auxiliary": True, "has_no_log_weight": True}
            values[name] = loc + scale * pyro.sample(f"{name}_noise", noise, infer=marks)
        return {name: values[name] for name in self._unconstrained_shapes}

    def _log_density(self, change: ChangeOfVariables, name: str) -> Tensor | float:
        if name not in self._weights:
            return super()._log_density(change, name)
        prior = self._prototype_nodes()[name]["fn"]
        loc, scale = self._weights[name]
        divergence = kl_divergence(dist.Normal(loc, scale).to_event(loc.dim()), prior)
        # the model takes log p off, so that what is left of both is the divergence
        log_density: Tensor = prior.log_prob(change.values[name]) + divergence
        return log_density
