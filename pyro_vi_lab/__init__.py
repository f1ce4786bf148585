"""Fit, check and compare variational posteriors of any Pyro model.

Example:
    >>> import torch, pyro, pyro.distributions as dist
    >>> import pyro_vi_lab as vl
    >>> def model(x, y):
    ...     slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    ...     noise = pyro.sample("noise", dist.HalfNormal(1.0))
    ...     with pyro.plate("row", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, noise), obs=y)
    >>> x = torch.linspace(-1.0, 1.0, 20)
    >>> fit = vl.fit(vl.Problem(model, x, 2.0 * x + 0.1 * torch.cos(20.0 * x)), seed=0)
    >>> fit.status.value
    'converged'
"""

from pyro_vi_lab import checks, families, guides, models
from pyro_vi_lab.calibration import Calibration, calibrate
from pyro_vi_lab.callbacks import Callback
from pyro_vi_lab.captured import Captured
from pyro_vi_lab.checkpoint import load
from pyro_vi_lab.compare import Comparison, compare
from pyro_vi_lab.coordinate_ascent import coordinate_ascent, natural_sweep
from pyro_vi_lab.density import LogDensity
from pyro_vi_lab.density_engine import Status
from pyro_vi_lab.density_fit import fit_each
from pyro_vi_lab.em import em
from pyro_vi_lab.errors import LabError, LabWarning
from pyro_vi_lab.explain import explain
from pyro_vi_lab.export import to_arviz
from pyro_vi_lab.fit import Fit, fit
from pyro_vi_lab.fit_epochs import fit_epochs
from pyro_vi_lab.fused_adam import FusedAdam
from pyro_vi_lab.model_choice import ModelChoice, choose_model
from pyro_vi_lab.natural_gradient import NaturalGradient
from pyro_vi_lab.nuts import nuts
from pyro_vi_lab.objectives import ELBO, IWAE, PerSiteELBO, RenyiELBO
from pyro_vi_lab.posterior import Posterior
from pyro_vi_lab.problem import Problem
from pyro_vi_lab.tensorboard import TensorBoard
from pyro_vi_lab.trust import trust
from pyro_vi_lab.verdict import Verdict

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "Calibration",
    "Callback",
    "Captured",
    "Comparison",
    "Fit",
    "FusedAdam",
    "LabError",
    "LabWarning",
    "LogDensity",
    "ModelChoice",
    "NaturalGradient",
    "PerSiteELBO",
    "Posterior",
    "Problem",
    "RenyiELBO",
    "Status",
    "TensorBoard",
    "Verdict",
    "calibrate",
    "checks",
    "choose_model",
    "compare",
    "coordinate_ascent",
    "em",
    "explain",
    "families",
    "fit",
    "fit_each",
    "fit_epochs",
    "guides",
    "load",
    "models",
    "natural_sweep",
    "nuts",
    "to_arviz",
    "trust",
]
