"""Ready models, and problems that pair each with data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyro_vi_lab import plugins
from pyro_vi_lab.models import (
    autoencoder,
    bayesian_network,
    eight_schools,
    gaussian_mixture,
    hierarchical_regression,
    linear_regression,
    logistic_regression,
    multinomial_regression,
    negative_binomial_regression,
    poisson_regression,
    robust_regression,
    univariate_normal,
)
from pyro_vi_lab.models.autoencoder import VariationalAutoencoder
from pyro_vi_lab.models.bayesian_network import BayesianNeuralNetwork
from pyro_vi_lab.models.eight_schools import EightSchools
from pyro_vi_lab.models.formula import regression
from pyro_vi_lab.models.gaussian_mixture import GaussianMixture
from pyro_vi_lab.models.hierarchical_regression import HierarchicalRegression
from pyro_vi_lab.models.linear_regression import ExactPosterior, LinearRegression
from pyro_vi_lab.models.logistic_regression import LogisticRegression
from pyro_vi_lab.models.multinomial_regression import MultinomialRegression
from pyro_vi_lab.models.negative_binomial_regression import NegativeBinomialRegression
from pyro_vi_lab.models.pictures import picture_grid
from pyro_vi_lab.models.poisson_regression import PoissonRegression
from pyro_vi_lab.models.prediction import ClassPrediction, NormalPrediction
from pyro_vi_lab.models.principal_components import ProbabilisticPCA, probabilistic_pca
from pyro_vi_lab.models.robust_regression import RobustRegression
from pyro_vi_lab.models.univariate_normal import NormalGammaPosterior, UnivariateNormal
from pyro_vi_lab.problem import Problem


@dataclass(frozen=True)
class Example:
    """A problem that can be built without any input.

    Args:
        description: One line.
        build: Makes the problem; raises an :class:`~pyro_vi_lab.errors.ExtraError` where its data come with a
            package that is not installed.
    """

    description: str
    build: Callable[[], Problem]


MODELS: dict[str, Example] = {
    "autoencoder": Example("variational autoencoder, before training: 1,797 digits, 8 latents", autoencoder.example),
    "bayesian_neural_network": Example(
        "a network with normal weights: diabetes progression, 442 patients, 8 hidden units", bayesian_network.example
    ),
    "eight_schools": Example("effects of coaching in eight schools, non-centered", eight_schools.example),
    "eight_schools_centered": Example("the same, centered: a funnel", eight_schools.example_centered),
    "gaussian_mixture": Example(
        "mixture of three normals, full covariances: simulated, 150 rows", gaussian_mixture.example
    ),
    "linear_regression": Example(
        "linear regression, unknown noise: diabetes progression, 442 patients, 10 covariates",
        linear_regression.example,
    ),
    "linear_regression_known_noise": Example(
        "the same with known noise: the posterior is exactly normal", linear_regression.example_known_noise
    ),
    "linear_regression_simulated": Example(
        "linear regression, unknown noise: simulated, 200 rows, 5 covariates",
        linear_regression.example_simulated,
    ),
    "logistic_regression": Example(
        "logistic regression: breast cancer, 569 tumors, 30 covariates", logistic_regression.example
    ),
    "logistic_regression_simulated": Example(
        "logistic regression: simulated, 1000 rows, 20 covariates", logistic_regression.example_simulated
    ),
    "robust_regression_simulated": Example(
        "linear regression with Student-t noise: simulated, 200 rows, 4 covariates", robust_regression.example_simulated
    ),
    "multinomial_regression": Example(
        "softmax regression: species of iris, 150 flowers, 4 covariates, 3 classes", multinomial_regression.example
    ),
    "poisson_regression_simulated": Example(
        "regression of counts: simulated, 300 rows, 4 covariates", poisson_regression.example_simulated
    ),
    "negative_binomial_regression_simulated": Example(
        "regression of overdispersed counts: simulated, 300 rows, 4 covariates",
        negative_binomial_regression.example_simulated,
    ),
    "hierarchical_regression_simulated": Example(
        "regression with intercepts and slopes by group: simulated, 240 rows, 12 groups",
        hierarchical_regression.example_simulated,
    ),
    "univariate_normal": Example(
        "normal data, unknown mean and precision: simulated, 50 rows", univariate_normal.example
    ),
}
"""Example problems by name; the data of some come with scikit-learn, the extra ``examples``."""


def build(name: str) -> Problem:
    """Build the example problem called ``name``.

    Args:
        name: A name of ``MODELS``, or one that an installed package offers under the entry points
            ``pyro_vi_lab.models``: an :class:`Example`, or a function without arguments that returns a problem.

    Raises:
        ArgumentError: There is no such example; the message suggests the nearest.
        ExtraError: Its data come with a package that is not installed.
        PluginError: The package that offers it is broken.

    Example:
        >>> build("eight_schools").coords
        {'school': ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H']}
    """
    if name in MODELS:
        return MODELS[name].build()
    found = plugins.load("model", name, MODELS)
    make = found.build if isinstance(found, Example) else found
    if not callable(make):
        raise plugins.refused("model", name, f"it is {type(found).__name__}, not an Example or a function")
    try:
        made = make()
    except Exception as error:  # code of others, as its import is
        raise plugins.refused("model", name, f"making it raises {type(error).__name__}: {error}") from error
    if not isinstance(made, Problem):
        raise plugins.refused("model", name, f"it makes {type(made).__name__}, not a pyro_vi_lab.Problem")
    return made


__all__ = [
    "MODELS",
    "BayesianNeuralNetwork",
    "ClassPrediction",
    "EightSchools",
    "ExactPosterior",
    "Example",
    "GaussianMixture",
    "HierarchicalRegression",
    "LinearRegression",
    "LogisticRegression",
    "MultinomialRegression",
    "NegativeBinomialRegression",
    "NormalGammaPosterior",
    "NormalPrediction",
    "PoissonRegression",
    "ProbabilisticPCA",
    "RobustRegression",
    "UnivariateNormal",
    "VariationalAutoencoder",
    "build",
    "picture_grid",
    "probabilistic_pca",
    "regression",
]
