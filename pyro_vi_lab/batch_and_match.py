r"""Batch and match: a full-rank normal fitted to the scores of the posterior at its own draws.

Each step draws a batch from :math:`q_t` and takes the normal nearest to it, in KL, whose scores match those of the
posterior at the batch,

.. math:: q_{t+1} = \arg\min_q\ \frac1B \sum_b \|\nabla\log q(z_b) - \nabla\log p(z_b)\|^2_{\mathrm{Cov}(q)}
          + \frac{2}{\lambda_t} \mathrm{KL}(q_t \,\|\, q),

which has a closed form. What it converges to minimizes a divergence between *scores*: the optimum of the ELBO where
the posterior is normal, and another normal where it is not.

The batches are antithetic with exact second moments, in coordinates in which :math:`q_t` is a standard normal; a step
after which the divergence has grown manifold, and the ELBO fallen, is taken back, and a smaller :math:`\lambda` tried.
Both are additions to the paper.

References:
    Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul 2024, "Batch and match: black-box variational inference
    with a score-based divergence", ICML, Algorithm 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.families import LocationScale, Params
from pyro_vi_lab.families.family import eigh
from pyro_vi_lab.natural_step import MAX_SIZE, tolerance

MIN_BATCH = 64
BATCH_PER_DIMENSION = 4
"""Draws per dimension: more than scores have degrees of freedom, so that a Gaussian posterior is matched exactly."""
WINDOW = 5
"""Steps that are compared with a single one, to see whether noise is what moves q."""
DIRECTED = 4.0
"""KL of that many steps, or of a mean over batches, relative to noise: steps on a straight way would make it 25."""
WORSE = 4.0
"""How manifold the divergence may grow in a step that does not raise the bound either: it is measured in the metric of
the present q, and grows with that on the way."""
NOISE = 0.5
"""Nats of KL per dimension by which noise moves q in a step at most: longer steps are on their way."""
MAX_BOLDNESS = 2.0**20
"""Most that the learning rate is multiplied with."""
REJECTIONS = 40
"""Steps in a row that may be taken back."""


class Batch(NamedTuple):
    """A batch of draws of a standard normal, and the posterior's log density and scores there, whitened."""

    eps: Tensor
    scores: Tensor
    negative_elbo: float
    divergence: float


class Round(NamedTuple):
    """One step of the history."""

    negative_elbo: float
    score_divergence: float
    kl: float
    step_size: float
    seconds: float


class Match(NamedTuple):
    """The end of a run."""

    params: Params
    status: Status
    rounds: list[Round]
    num_gradients: int


def batch_and_match(
    density: LogDensity,
    family: LocationScale,
    start: Params,
    *,
    num_particles: int | None,
    max_steps: int,
    generator: torch.Generator,
    on_step: Callable[[int, Round], bool | None],
) -> Match:
    r"""Run until q no longer moves but for noise, and the mean over that noise is quiet.

    The learning rate is the paper's for normal posteriors, :math:`\lambda = BD`, doubled after each good step and
    divided by four after a bad one, until several short steps lead no farther than one. From then on it is :math:`1/s`
    in the s-th step, which makes q the mean over all batches since. It has converged when that mean has moved by less
    than half the tolerance, in nats of KL, while the number of its batches doubled. If it has moved by more than its
    noise, the larger steps begin anew.

    Args:
        density: Log density of z.
        family: The full-rank normal family.
        start: One member, without a batch of fits.
        num_particles: Draws per batch; chosen from D if ``None``.
        max_steps: Most steps.
        generator: Source of the draws.
        on_step: Called with the number and the record of each step; the run ends where it returns ``True``.
    """
    dim, clock = start.loc.shape[-1], time.perf_counter()
    size = num_particles or max(MIN_BATCH, BATCH_PER_DIMENSION * dim)
    size += size % 2
    limit = tolerance(dim) / 2
    exact = 1e3 * dim * torch.finfo(density.dtype).eps

    def drawn(params: Params) -> Batch:
        half = family.draw((size // 2,), dim, generator=generator, dtype=density.dtype).to(density.device)
        eps = family.particles(half)
        z = family.sample(params, eps)
        log_p, grad = density.value_and_grad(z)
        scores = family.spread_transposed(params, grad)
        return Batch(
            eps,
            scores,
            float((family.log_prob(params, z) - log_p).mean()),
            float((scores + eps).square().sum(-1).mean()),
        )

    params, batch = start, drawn(start)
    rounds = [Round(batch.negative_elbo, batch.divergence, 0.0, 0.0, time.perf_counter() - clock)]
    stopped = on_step(0, rounds[0])
    gradients, rejected, averaged = size, 0, 0
    boldness = 1.0
    way: list[tuple[float, Params]] = []  # the steps since the last change of the learning rate
    noise, earlier = math.inf, params
    status = Status.OUT_OF_STEPS if math.isfinite(batch.divergence) else Status.DIVERGED
    for step in range(1, max_steps + 1):
        if status is not Status.OUT_OF_STEPS or stopped:
            break
        rate = 1 / averaged if averaged else boldness * size * dim
        proposal = matched(family, params, batch, rate)
        new = drawn(proposal)
        gradients += size
        nearer = new.divergence <= WORSE * batch.divergence + exact or new.negative_elbo <= batch.negative_elbo
        nearer |= averaged > 0  # noise goes up and down
        if not (nearer and math.isfinite(new.divergence) and math.isfinite(new.negative_elbo)):
            rejected += 1
            boldness /= 4
            rounds.append(rounds[-1]._replace(kl=0.0, step_size=rate, seconds=time.perf_counter() - clock))
            status = Status.DIVERGED if rejected > REJECTIONS else status
            stopped = on_step(step, rounds[-1])
            continue
        kl = float(family.kl(proposal, params))
        params, batch, rejected, boldness = proposal, new, 0, min(MAX_BOLDNESS, 2 * boldness)
        rounds.append(Round(new.negative_elbo, new.divergence, kl, rate, time.perf_counter() - clock))
        stopped = on_step(step, rounds[-1])
        if float(params.loc.abs().max()) > MAX_SIZE or float(params.scale.abs().max()) > MAX_SIZE:
            status = Status.DIVERGED
        elif kl < exact and boldness >= 1:
            status = Status.CONVERGED
        elif averaged:
            averaged += 1
            if averaged >= 8 and averaged & (averaged - 1) == 0:  # it has doubled
                moved = float(family.kl(params, earlier))
                status = Status.CONVERGED if moved < limit and noise / averaged < limit else status
                if moved > limit and moved > DIRECTED * noise / averaged * 2:
                    averaged, way = 0, []
                earlier = params
        else:
            way.append((kl, params))
            if len(way) > WINDOW:
                noise = statistics.median(one for one, _ in way[-WINDOW:])
                if noise < NOISE * dim and float(family.kl(params, way[-WINDOW - 1][1])) < DIRECTED * noise:
                    averaged, earlier = 1, params
    return Match(params, status, rounds, gradients)


def matched(family: LocationScale, params: Params, batch: Batch, rate: float) -> Params:
    r"""The proximal step: in whitened coordinates the covariance S that solves :math:`S U S + S = V`.

    .. math:: S = 2V (I + (I + 4UV)^{1/2})^{-1}, \qquad m = \tfrac{\lambda}{1 + \lambda} (S \bar g + \bar\varepsilon)

    with :math:`U = \lambda\Gamma + \frac{\lambda}{1+\lambda}\bar g\bar g^\top` of the scores' mean and covariance, and
    :math:`V = I + \lambda C + \frac{\lambda}{1+\lambda}\bar\varepsilon\bar\varepsilon^\top` of the draws'.

    Args:
        family: The full-rank normal family.
        params: The present member.
        batch: Draws and scores, whitened with it.
        rate: Learning rate λ.
    """
    eps, scores = batch.eps, batch.scores
    weight = rate / (1 + rate)
    draw, score = eps.mean(0), scores.mean(0)
    identity = torch.eye(eps.shape[-1], dtype=eps.dtype, device=eps.device)
    u = rate * _covariance(scores) + weight * torch.outer(score, score)
    v = identity + rate * _covariance(eps) + weight * torch.outer(draw, draw)
    root = torch.linalg.cholesky(v)
    values, vectors = eigh(root.mT @ u @ root)
    shrunk = 2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())
    factor = root @ vectors * shrunk.sqrt()
    loc = weight * (factor @ (factor.mT @ score) + draw)
    triangle = torch.linalg.qr(factor.mT, mode="r").R.mT
    triangle = triangle * triangle.diagonal().sign()
    return Params(params.loc + family.spread(params, loc), params.scale @ triangle)


def _covariance(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    return centered.mT @ centered / len(x)
