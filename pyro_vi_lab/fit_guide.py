"""The guide that a fit is to train: found by its name, set up on the problem, and named so that it meets no other."""

from __future__ import annotations

import hashlib
from typing import Any

from pyro import poutine

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.guides import (
    GUIDES,
    ContinuousGuide,
    FamilyGuide,
    LaplaceApproximation,
    PointGuide,
    guide_named,
)
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.problem import Problem


def is_over_family(guide: object) -> bool:
    """Whether a guide, a guide class or a guide's name is one of ours over a family."""
    return is_a(guide, FamilyGuide)


def is_a(guide: object, kind: type) -> bool:
    """Whether a guide, a guide class or a guide's name is of a kind of ours."""
    named = guide_named(guide) if isinstance(guide, str) else guide
    return isinstance(named, kind) or (isinstance(named, type) and issubclass(named, kind))


def is_point_estimate(guide: object) -> bool:
    """Whether a guide stays a point when it is fitted, as those of the Laplace approximation do not."""
    return is_a(guide, PointGuide) and not is_a(guide, LaplaceApproximation)


def prepared(problem: Problem, guide: Any, seed: int) -> tuple[str, Any]:
    """The guide's name and an instance with parameters; the user's own is where the fit starts, and stays as it is."""
    asked = guide if isinstance(guide, str) else None
    if asked is not None:
        guide = guide_named(asked)
    kind = guide if isinstance(guide, type) else type(guide)
    name = asked or next((key for key, one in GUIDES.items() if kind is one), kind.__name__)
    if isinstance(guide, type):
        # a guide made from a class is the same every time: its prototype is a run of the model, for which the seed
        # matters only where the start is drawn
        made = problem.kept.get((guide, None)) or problem.kept.get((guide, seed))
        if made is None:
            made = _set_up(problem, _of_class(problem, guide), seed)
            problem.kept[guide, None if made.starts_at_origin else seed] = made
        return name, made.twin()
    return name, _set_up(problem, guide.twin(), seed)


def _of_class(problem: Problem, kind: type[ContinuousGuide]) -> ContinuousGuide:
    discrete = [site.name for site in problem.sites.values() if site.kind == "discrete"]
    return kind(poutine.block(problem.model, hide=discrete) if discrete else problem.model)


def _set_up(problem: Problem, guide: ContinuousGuide, seed: int) -> ContinuousGuide:
    if guide.prototype_trace is None:
        with model_run(seed=seed, dtype=problem.dtype, validate=False):
            guide._setup_prototype(*problem.args, **problem.kwargs)
    expected = problem.density().dim
    if guide.latent_dim != expected:
        raise ArgumentError(
            f"the guide has {guide.latent_dim} latent dimensions, problem {problem.name} has {expected}"
        )
    return guide


def name_by_content(guide: ContinuousGuide) -> None:
    """Give a guide a name of its own in Pyro's param store.

    The store goes by names: under the name of its class the guide would, when it is run, take over the scale of
    whatever
    guide of that class is in the store already.
    """
    digest = hashlib.blake2b(digest_size=4)
    for value in guide.parameters():
        digest.update(value.detach().numpy(force=True).tobytes())
    guide._pyro_name = f"{type(guide).__name__}_{digest.hexdigest()}"
