"""A product of exponential families that are conjugate to the priors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError, ModelError, unknown_name
from pyro_vi_lab.families.exponential import Conditional, ExponentialFamily
from pyro_vi_lab.families.exponential.family import bartlett
from pyro_vi_lab.families.exponential.quantiles import center, quantile
from pyro_vi_lab.guides.conjugate_priors import (
    innermost,
    joint_family,
    joint_family_of_priors,
    member_of_prior,
    member_of_priors,
)
from pyro_vi_lab.guides.plates import check_rows_of_model, plates_for_call
from pyro_vi_lab.rows import active_rows, is_part, model_on

Joint = Mapping[tuple[str, str], str]


def init_to_prior(site: Any = None) -> Any:
    """Start at the mean of the prior: an ``init_loc_fn`` with which :class:`Conjugate` starts at the prior itself.

    For an inverse gamma prior the harmonic mean.
    """
    if site is None:
        return init_to_prior
    fn = site["fn"]
    if fn.has_enumerate_support:
        return fn.enumerate_support(expand=True)[0]
    prior = innermost(fn)
    if type(prior).__name__ == "InverseGamma":  # whose mean may be infinite
        return (prior.rate / prior.concentration).expand(fn.shape())
    return fn.mean


@dataclass(frozen=True)
class Factor:
    """One of the factors of a :class:`Conjugate` guide.

    Args:
        sites: Names of its sites; of a joint family the precision first.
        family: Its family.
        batch_shape: Shape of the batch of its members, with all rows of every plate.
        event_dims: Event dimensions of each site that are part of the batch, since the family has independent elements.
        frames: The plates around it, as frames of the first run.
    """

    sites: tuple[str, ...]
    family: ExponentialFamily
    batch_shape: torch.Size
    event_dims: tuple[int, ...]
    frames: tuple[Any, ...]

    @property
    def name(self) -> str:
        """What its parameters are called."""
        return self.sites[-1]


class Conjugate(AutoGuide):
    r"""Mean-field guide of exponential families, each the one that is conjugate to the prior of its site.

    .. math:: q(z) = \prod_i q_{\eta_i}(z_i), \qquad q_\eta(z) = \exp(\eta \cdot T(z) - A(\eta))

    Normal, multivariate normal, gamma, inverse gamma, beta, Dirichlet, Wishart, categorical and Bernoulli priors, and
    the joint families of a mean and a precision: normal-gamma and normal-Wishart. Where a site's distribution given all
    others and the data is of the same family, a natural-gradient step of size one is the coordinate-ascent step of
    variational Bayes: :math:`\eta_i \leftarrow E_q[\eta_i^*]`. :class:`~pyro_vi_lab.NaturalGradient` takes it from the
    gradients of a plain ``pyro.infer.SVI``, with their noise; ``coordinate_ascent`` takes it exactly.

    ``unconstrained`` holds one real vector for each member: standard parameters in logs and Cholesky factors, so that
    any optimizer stays inside the family.

    Args:
        model: A Pyro model.
        init_loc_fn: Mean of each site at the start, with the spread or concentration of its prior; by default the
            mean of the prior, so that the guide starts at the prior. A mixture starts with all components alike, and
            stays there; give it ``init_to_sample``, ``init_to_value`` or the like. Discrete sites start at the prior.
        joint: Pairs of sites that are not independent, ``{("mu", "tau"): "normal_gamma"}``, or "normal_wishart". By
            default every normal mean whose prior precision is proportional to a gamma or Wishart site of the same
            plates is joined with it; ``{}`` leaves all independent.
        families: Names of families for sites with several choices: ``{"beta": "normal"}`` for independent elements of
            a vector, ``"multivariate_normal"`` for dependent ones. By default a normal or multivariate normal prior of
            a vector (``.to_event(1)``) of at most 512 elements has dependent ones.
        create_plates: As in Pyro's guides, plates that guide and model share; not needed in general.

    Raises:
        ModelError: When it is first run: a prior has no conjugate family; the message names the site.
        ArgumentError: A name in ``joint`` or ``families`` is no latent site or no family.

    References:
        Hoffman, Blei, Wang & Paisley 2013, "Stochastic variational inference", JMLR 14, Sections 2.2-2.4. Khan & Lin
        2017, "Conjugate-computation variational inference", AISTATS.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def coin(y):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("toss", len(y)):
        ...         pyro.sample("y", dist.Bernoulli(p), obs=y)
        >>> y = torch.tensor([1.0, 0.0, 1.0])
        >>> guide = Conjugate(coin)
        >>> _ = guide(y)
        >>> guide.standard("p")
        {'concentration1': tensor(1.), 'concentration0': tensor(1.)}
    """

    takes_rows: ClassVar[bool] = True

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_prior,
        *,
        joint: Joint | None = None,
        families: Mapping[str, str] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        self.init_loc_fn = init_loc_fn
        self._joint = None if joint is None else dict(joint)
        self._families = dict(families or {})
        self.factors: dict[str, Factor] = {}
        self.plan: Any = None
        """What a coordinate ascent found out about the model, kept for its next step."""
        self.row_scales: dict[str, float] = {}
        """How much the rows that the last call saw count for each factor, N/B."""

    # --- the first run ------------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        loaded = "unconstrained" in self._modules
        model = self._model
        self._model = (_Supported(self._families)(InitMessenger(self.init_loc_fn)(model[0])),)
        try:
            with model_on(self, active_rows()), torch.no_grad():
                super()._setup_prototype(*args, **kwargs)
                joint = self._detected(*args, **kwargs) if self._joint is None else self._joint
        finally:
            self._model = model
        try:
            starts = self._read_factors(joint)
            self._check_rows(*args, **kwargs)
            if loaded:
                self._check_loaded()
        except (ModelError, ArgumentError):
            self.prototype_trace = None  # not set up
            raise
        if not loaded:
            self.unconstrained = PyroModule()
            for name, eta in starts.items():
                u = self.factors[name].family.unconstrain(eta)
                deep_setattr(self.unconstrained, name, nn.Parameter(u.detach().clone()))

    def _nodes(self) -> dict[str, Any]:
        assert self.prototype_trace is not None
        return dict(self.prototype_trace.iter_stochastic_nodes())

    def _detected(self, *args: Any, **kwargs: Any) -> Joint:
        """Pairs of a precision and a mean whose prior precision is proportional to it."""
        nodes = self._nodes()
        pairs: dict[tuple[str, str], str] = {}
        for precision, node in nodes.items():
            candidates = {
                name: family
                for name, other in nodes.items()
                if name != precision and (family := joint_family_of_priors(node["fn"], other["fn"]))
            }
            if not candidates or precision in self._families:
                continue
            others = {name: one["value"] for name, one in nodes.items()} | {precision: 4 * node["value"]}
            with poutine.block(), poutine.trace() as tracer, _Given(others):
                self.model(*args, **kwargs)
            found = [
                name
                for name in candidates
                if name not in self._families and _scales_with(nodes[name]["fn"], tracer.trace.nodes[name]["fn"])
            ]
            if len(found) == 1 and not any(found[0] in pair for pair in pairs):
                pairs[found[0], precision] = candidates[found[0]]
        return pairs

    def _read_factors(self, joint: Joint) -> dict[str, Tensor]:
        nodes = self._nodes()
        fns = {name: node["fn"] for name, node in nodes.items()}
        for name in self._families:
            if name not in fns:
                raise unknown_name("site", name, fns)
        self.factors, starts = {}, {}
        joined: dict[str, tuple[str, str]] = {}
        kinds: dict[str, str] = {}
        for names, kind in joint.items():
            pair = joint_family(names, kind, fns)
            for name in pair:
                if name in joined:
                    raise ArgumentError(f"site {name!r} is in two of the pairs of joint=")
                joined[name], kinds[name] = pair, kind
        for name in nodes:
            pair_or_site = joined.get(name, (name,))
            if pair_or_site[-1] != name:
                continue  # with its mean
            if len(pair_or_site) == 2:
                one, two = pair_or_site
                family, eta = member_of_priors(kinds[name], (one, two), (fns[one], fns[two]), nodes[one]["value"])
                if not _same_frames(nodes[one], nodes[two]):
                    raise ModelError(f"sites {one!r} and {two!r} cannot be {kinds[name]!r}: they are in other plates")
            else:
                family, eta = member_of_prior(name, fns[name], asked=self._families.get(name))
            eta = family.moved(eta, tuple(nodes[site]["value"] for site in pair_or_site))
            event_dims = tuple(
                fns[site].event_dim - own for site, own in zip(pair_or_site, family.event_dims, strict=True)
            )
            frames = nodes[name]["cond_indep_stack"]
            for frame in frames:
                if is_part(frame):
                    eta = periodic_repeat(eta, frame.full_size, frame.dim - event_dims[0] - 1)
            self.factors[name] = Factor(pair_or_site, family, eta.shape[:-1], event_dims, tuple(frames))
            starts[name] = eta
        return starts

    def _check_rows(self, *args: Any, **kwargs: Any) -> None:
        frames = {f.name: f for factor in self.factors.values() for f in factor.frames if is_part(f)}
        if frames and active_rows() is None:
            check_rows_of_model(self, frames, *args, **kwargs)

    def _check_loaded(self) -> None:
        known = {name: tuple(value.shape) for name, value in self.unconstrained.named_parameters()}
        wanted = {name: (*f.batch_shape, f.family.num_parameters) for name, f in self.factors.items()}
        if known != wanted:
            raise ModelError(
                f"the state that {type(self).__name__} was loaded from has parameters of the shapes {known}, its "
                f"model {wanted}"
            )

    # --- a draw -------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; the same ``*args, **kwargs`` as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            eta = factor.family.constrain(self._rows(name, self.leaf(name), plates))
            with ExitStack() as stack:
                for frame in factor.frames:
                    stack.enter_context(plates[frame.name])
                values: tuple[Tensor, ...] = ()
                for site, event_dim in zip(factor.sites, factor.event_dims, strict=True):
                    fn = distribution(factor.family.conditional(eta, values))
                    infer: Any = {
                        key: value
                        for key, value in self._nodes()[site]["infer"].items()
                        if factor.family.is_discrete and key in ("enumerate", "expand", "num_samples")
                    }
                    result[site] = pyro.sample(site, fn.to_event(event_dim) if event_dim else fn, infer=infer)
                    values = (*values, result[site])
        return {name: result[name] for name in self._nodes()}

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return plates_for_call(self, *args, **kwargs)

    def _rows(self, name: str, value: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """Members of the rows that this call sees."""
        factor = self.factors[name]
        scale = 1.0
        for frame in factor.frames:
            plate = plates[frame.name]
            if plate.subsample_size != plate.size:
                index = torch.as_tensor(plate.indices, device=value.device)
                value = value.index_select(frame.dim - factor.event_dims[0] - 1, index)
                scale *= plate.size / plate.subsample_size
        self.row_scales[name] = scale
        return value

    # --- parameters ---------------------------------------------------------------------------------------------------

    def leaf(self, name: str) -> Tensor:
        """Unconstrained parameters of a factor, ``(*batch shape, P)``."""
        value: Tensor = attrgetter(name)(self.unconstrained)
        return value

    def natural(self, site: str) -> Tensor:
        """Natural parameters of the factor of a site, ``(*batch shape, P)``, detached."""
        factor = self.factor(site)
        return factor.family.constrain(self.leaf(factor.name).detach())

    def set_natural(self, site: str, eta: Tensor) -> None:
        """Set them.

        Raises:
            ArgumentError: They have another shape, or are none of a distribution.
        """
        factor = self.factor(site)
        leaf = self.leaf(factor.name)
        if eta.shape != leaf.shape:
            raise ArgumentError(
                f"natural parameters of site {site!r} have shape {tuple(leaf.shape)}, got {tuple(eta.shape)}"
            )
        if not bool(factor.family.contains(eta.detach()).all()):
            raise ArgumentError(f"natural parameters of site {site!r} that are none of a distribution")
        with torch.no_grad():
            leaf.copy_(factor.family.unconstrain(eta))

    def standard(self, site: str) -> dict[str, Tensor]:
        """Standard parameters of the factor of a site by name, such as "loc" and "scale", detached."""
        return self.factor(site).family.standard(self.natural(site))

    def factor(self, site: str) -> Factor:
        """The factor that a site is in.

        Raises:
            ArgumentError: There is no such site, or the guide has not been run yet.
        """
        for factor in self.factors.values():
            if site in factor.sites:
                return factor
        if not self.factors:
            raise ArgumentError("this guide has not been run yet: call it with the arguments of the model first")
        raise unknown_name("site", site, [name for factor in self.factors.values() for name in factor.sites])

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every coordinate of each site.

        Probabilities of a Dirichlet and matrices of a Wishart distribution are at their means, as medians of their
        coordinates would be none of their kind; a choice is the likeliest one.
        """
        found: dict[str, Tensor] = {}
        for factor in self.factors.values():
            found |= dict(zip(factor.sites, center(factor.family, self.natural(factor.name)), strict=True))
        return {name: found[name] for name in self._nodes()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of every coordinate of each site, one after another along the first axis.

        Raises:
            ModelError: A site has a Wishart distribution, whose coordinates have no known quantiles.
        """
        found: dict[str, Tensor] = {}
        for factor in self.factors.values():
            if "Wishart" in type(factor.family).__name__:
                raise ModelError(
                    f"there are no quantiles of the Wishart site {factor.sites[0]!r}; take them of draws: "
                    "pyro.infer.Predictive(guide, num_samples=1000)(...)"
                )
            eta = self.natural(factor.name)
            each = [
                quantile(factor.family, eta, probability)
                for probability in torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1).tolist()
            ]
            for site, values in zip(factor.sites, zip(*each, strict=True), strict=True):
                found[site] = torch.stack(values)
        return {name: found[name] for name in self._nodes()}

    # --- copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        model = self._model
        state = dict(super().__getstate__())  # Pyro leaves out the model, of the guide itself too
        self._model = model
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Conjugate:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._model = self._model
        return copied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes the parameters of a guide that has not been run yet."""
        start = f"{prefix}unconstrained."
        if self.prototype_trace is None:
            self.unconstrained = PyroModule()
            for key, value in state_dict.items():
                if key.startswith(start):
                    deep_setattr(self.unconstrained, key.removeprefix(start), nn.Parameter(value.detach().clone()))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Wishart(dist.Wishart):
    """A Wishart distribution whose sampler keeps the good draws."""

    def rsample(self, sample_shape: Any = (), max_try_correction: Any = None) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        return bartlett(self.df.expand(shape), self.scale_tril.expand(shape + self.event_shape))


def distribution(conditional: Conditional) -> Any:
    """As a Pyro distribution."""
    if conditional.name != "Wishart":
        return getattr(dist, conditional.name)(**conditional.parameters)
    with warnings.catch_warnings():
        # of few degrees of freedom, for which our sampler is made
        warnings.simplefilter("ignore")
        return _Wishart(**conditional.parameters)


class _Supported(Messenger):
    """Refuses a prior without a conjugate family where it is met, before it is drawn from."""

    def __init__(self, families: Mapping[str, str]) -> None:
        super().__init__()
        self.families = families

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and hasattr(msg["fn"], "event_dim") and type(msg["fn"]).__name__ != "_Subsample":
            member_of_prior(msg["name"], msg["fn"], asked=self.families.get(msg["name"]))


class _Given(Messenger):
    """Gives sites their values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _scales_with(before: Any, after: Any) -> bool:
    """Whether four times a precision makes all standard deviations half as large, and leaves the mean."""
    tolerance = math.sqrt(torch.finfo(before.mean.dtype).eps)
    half = torch.allclose(after.variance * 4, before.variance, rtol=tolerance, atol=0)
    return half and bool((before.mean == after.mean).all())


def _same_frames(one: Any, other: Any) -> bool:
    return {f.name for f in one["cond_indep_stack"]} == {f.name for f in other["cond_indep_stack"]}
