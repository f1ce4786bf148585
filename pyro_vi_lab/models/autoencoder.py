"""Variational autoencoders with any encoder and decoder."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor, nn

from pyro_vi_lab.errors import ArgumentError
from pyro_vi_lab.isolation import seeded
from pyro_vi_lab.models.digits import binary_digits
from pyro_vi_lab.models.importance_bound import RowScores, importance_bound
from pyro_vi_lab.models.networks import (
    NormalHead,
    checked_decoder,
    checked_encoder,
    default_decoder,
    default_encoder,
    place_of,
)
from pyro_vi_lab.models.pictures import picture_grid
from pyro_vi_lab.models.row_likelihood import RowLikelihood, checked_shape
from pyro_vi_lab.models.row_values import Likelihood, checked_rows, refuse_one_row
from pyro_vi_lab.problem import Problem

DIMS = {1: ("feature",), 2: ("height", "width"), 3: ("channel", "height", "width")}
"""What the axes of a row are called, by their number."""
__all__ = ["Encoding", "VariationalAutoencoder", "binary_digits", "example"]
_NUMBERS = itertools.count(1)


class Encoding(NamedTuple):
    """Mean and standard deviation of z for every row under the encoder, ``(N, L)`` each."""

    mean: Tensor
    sd: Tensor


class VariationalAutoencoder(PyroModule):
    r"""Rows or images that a network makes of a normal latent vector each, with another network as their guide.

    .. math::
        z_n \sim \mathrm{Normal}(0, I_L), \quad x_n \sim p(\cdot \mid \mathrm{decoder}(z_n)), \qquad
        q(z_n \mid x_n) = \mathrm{Normal}(\mu(x_n), \operatorname{diag} s(x_n)^2), \quad \mu, s = \mathrm{encoder}

    Sites ``z`` and ``x``. The model is an ordinary Pyro model, :meth:`guide` its guide; a guide that takes natural
    gradients is ``guides.Amortized(problem.model, model.encoder)``. Train them with :func:`pyro_vi_lab.fit_epochs`, or
    until the bound stands still with :func:`pyro_vi_lab.fit`.

    Likelihoods, and what the decoder gives for every number of a row:

    - ``"bernoulli"``: 0 or 1; the logit.
    - ``"continuous_bernoulli"``: gray values from 0 to 1; the logit. Cross-entropy with its normalizing constant.
    - ``"normal"``: any number; the mean. One noise scale for all, learned as ``log_noise``.
    - ``"categorical"``: whole numbers from 0; the logits, ``num_categories`` of them on a last axis.

    Args:
        encoder: From rows to location and scale: a pair of ``(B, L)``, or one tensor ``(B, 2 L)`` with the location and
            the logarithm of the scale side by side. By default convolutions for images ``(C, H, W)`` with one or three
            channels and sides of at least 5, and dense layers else.
        decoder: From z to the parameters of the likelihood, in the shape of a row or flat. By default likewise.
        shape: Shape of a row: ``(D,)``, or ``(C, H, W)`` of images.
        num_latents: L.
        likelihood: One of the above.
        num_categories: Of the likelihood ``"categorical"``.
        hidden: Widths of the hidden dense layers of the defaults, from the data on.
        channels: Channels of the first convolution of the defaults; the second has twice as many.
        seed: Seed of the weights of the defaults.

    Shape:
        X ``(N, *shape)``; plate ``row``.

    Raises:
        ArgumentError: An argument is none of these, or a network does not take or give what it should; the message
            says what was expected.

    References:
        Kingma & Welling 2014, "Auto-encoding variational Bayes", ICLR. Rezende, Mohamed & Wierstra 2014, "Stochastic
        backpropagation and approximate inference in deep generative models", ICML. Loaiza-Ganem & Cunningham 2019,
        "The continuous Bernoulli: fixing a pervasive error in variational autoencoders", NeurIPS.

    Example:
        >>> X = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
        >>> model = VariationalAutoencoder(shape=(6,), num_latents=2, hidden=[16])
        >>> model.problem(X, minibatch=10)
        Problem(VariationalAutoencoder: latent z (row, latent); observed x (row, feature))
        >>> model.encode(X).mean.shape, model.sample(3).shape, model.traversal(num_steps=5).shape
        (torch.Size([20, 2]), torch.Size([3, 6]), torch.Size([2, 5, 6]))
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        *,
        shape: Sequence[int],
        num_latents: int = 8,
        likelihood: Likelihood = "bernoulli",
        num_categories: int | None = None,
        hidden: Sequence[int] = (200,),
        channels: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # two autoencoders do not share parameters in the param store
        self._pyro_name = f"{type(self).__name__}_{next(_NUMBERS)}"
        self.shape = checked_shape(shape)
        whole = {"num_latents": num_latents, "channels": channels}
        whole |= {f"hidden[{i}]": width for i, width in enumerate(hidden)}
        _check_whole(**whole)
        self._row_likelihood = RowLikelihood(likelihood, self.shape, num_categories)
        self.num_latents, self.likelihood, self.num_categories = num_latents, likelihood, num_categories
        dtype, device = place_of(decoder if encoder is None else encoder)
        sizes: dict[str, Any] = {"hidden": hidden, "channels": channels, "num_categories": num_categories}
        with seeded(seed):
            if encoder is None:
                encoder = default_encoder(self.shape, num_latents, **sizes).to(device, dtype)
            if decoder is None:
                decoder = default_decoder(self.shape, num_latents, **sizes).to(device, dtype)
        rows = torch.zeros(2, *self.shape, dtype=torch.long if num_categories else dtype, device=device)
        checked_encoder(encoder, rows, num_latents)
        checked_decoder(
            decoder, torch.zeros(2, num_latents, dtype=dtype, device=device), self._row_likelihood.per_row, likelihood
        )
        self.encoder, self.decoder = NormalHead(encoder), decoder
        zero = torch.zeros(num_latents, dtype=dtype, device=device)
        self.register_buffer("prior_loc", zero)
        self.register_buffer("prior_scale", torch.ones_like(zero))
        if likelihood == "normal":
            self.log_noise = nn.Parameter(zero[0].clone())

    # --- in Pyro ------------------------------------------------------------------------------------------------------

    def forward(self, X: Tensor) -> Tensor:
        """Run the model; returns the latent vector of every row."""
        with pyro.plate("row", X.shape[0]):
            z: Tensor = pyro.sample("z", self._prior())
            pyro.sample("x", self.likelihood_of(z), obs=X)
        return z

    @pyro_method
    def guide(self, X: Tensor) -> Tensor:
        """Run the guide: the encoder's normal for every row."""
        loc, scale = self.encoder(X)
        with pyro.plate("row", X.shape[0]):
            z: Tensor = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        return z

    def likelihood_of(self, z: Tensor) -> Any:
        """Distribution of rows given their latent vectors.

        Shape:
            z ``(..., L)``; batch shape ``(...)``, event shape ``shape``.
        """
        noise = self.log_noise.exp() if self.likelihood == "normal" else None
        return self._row_likelihood.distribution(self._decoded(z), noise)

    def problem(
        self,
        X: Any,
        *,
        minibatch: int | None = None,
        features: Sequence[str] | None = None,
        name: str | None = None,
    ) -> Problem:
        """The model with checked data.

        The networks take the floating-point type of the data, float32 or float64; the data go to their device.

        Args:
            X: Rows: a tensor, an array, or a data frame, whose index names the rows.
            minibatch: Rows in a batch.
            features: Names of the columns, where rows have one axis; by default those of the data frame, or ``x0``, ...
            name: What to call the problem.

        Raises:
            DataError: Rows of another shape, values that are missing or that the likelihood cannot have (the message
                names the row), one row, or rows that are all equal.
            ArgumentError: As many names as columns are needed.
        """
        rows, labels = checked_rows(X, self.shape, self.likelihood, self.num_categories)
        refuse_one_row(rows, labels)
        names = DIMS.get(len(self.shape), tuple(f"axis_{i}" for i in range(len(self.shape))))
        coords: dict[str, Sequence[Any]] = {"latent": [f"z{i}" for i in range(self.num_latents)]}
        if len(self.shape) == 1:
            columns = [str(column) for column in X.columns] if hasattr(X, "columns") else None
            coords["feature"] = list(features or columns or (f"x{i}" for i in range(self.shape[0])))
            if len(coords["feature"]) != self.shape[0]:
                raise ArgumentError(f"features has {len(coords['feature'])} names; X has {self.shape[0]} columns")
        elif features is not None:
            raise ArgumentError(f"features names the columns of a table; rows of shape {self.shape} have none")
        if labels is not None:
            coords["row"] = labels
        if rows.is_floating_point() and rows.dtype != self._dtype:
            self.to(rows.dtype)
        return Problem(
            self,
            self._typed(rows),
            dims={"z": ("row", "latent"), "x": ("row", *names)},
            coords=coords,
            name=name,
            minibatch=minibatch,
            dtype=self._dtype,
        )

    # --- with trained networks ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, X: Any) -> Encoding:
        """Mean and standard deviation of z for every row under the encoder.

        Raises:
            DataError: As of :meth:`problem`; one row is enough here.
        """
        rows = self._rows(X)
        with self._evaluating():
            return Encoding(*self.encoder(rows))

    @torch.no_grad()
    def decode(self, z: Any) -> Tensor:
        """Expected row given its latent vector: a probability of one, a mean, or the probability of every category.

        Shape:
            z ``(..., L)``; result ``(..., *shape)``, or ``(..., *shape, C)`` of categories.

        Raises:
            ArgumentError: z has another number of latents.
        """
        latents = torch.as_tensor(z, dtype=self._dtype, device=self._device)
        if latents.dim() < 1 or latents.shape[-1] != self.num_latents:
            raise ArgumentError(f"z has shape {tuple(latents.shape)}; expected (..., {self.num_latents})")
        with self._evaluating():
            return self._row_likelihood.expected(self._decoded(latents))

    def reconstruct(self, X: Any) -> Tensor:
        """Expected rows at the encoder's mean of z, as of :meth:`decode`."""
        return self.decode(self.encode(X).mean)

    @torch.no_grad()
    def sample(self, num_rows: int = 1, seed: int = 0) -> Tensor:
        """New rows: z from its prior, x from its likelihood; ``(n, *shape)``."""
        _check_whole(num_rows=num_rows)
        with seeded(seed), self._evaluating():
            z = self._prior().sample((num_rows,))
            value: Tensor = self.likelihood_of(z).sample()
        return value

    @torch.no_grad()
    def log_joint(self, X: Tensor, z: Tensor) -> Tensor:
        """Log density log p(x, z) of every row in nats, of data as in :attr:`Problem.inputs`; without gradients.

        Shape:
            X ``(N, *shape)``, z ``(..., N, L)``; result ``(..., N)``.
        """
        with self._evaluating():
            value: Tensor = self._prior().log_prob(z) + self.likelihood_of(z).log_prob(X)
        return value

    def log_likelihood(self, X: Any, *, num_particles: int = 500, seed: int = 0) -> RowScores:
        """Log likelihood of every row, estimated from below with draws of the encoder, such as of held-out data.

        Args:
            X: Rows.
            num_particles: Draws for each row, K: one gives the ELBO, many come near log p(x).
            seed: Seed of the draws.

        Raises:
            DataError: As of :meth:`problem`; one row is enough here.

        References:
            Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", ICLR, Section 5.
        """
        rows = self._rows(X)
        with self._evaluating():
            return importance_bound(rows, self.encoder, self.log_joint, num_particles=num_particles, seed=seed)

    def traversal(self, row: Any = None, *, num_steps: int = 7, span: float = 2.0) -> Tensor:
        """Expected rows along every latent, the others held at zero or at the encoding of a row.

        Args:
            row: One row, of shape ``shape``; ``None`` for the middle of the prior.
            num_steps: Values of each latent.
            span: They go from -span to span, in standard deviations of the prior.

        Shape:
            ``(L, num_steps, *shape)``.
        """
        _check_whole(num_steps=num_steps)
        if not (span > 0 and math.isfinite(span)):
            raise ArgumentError(f"span must be a positive number, got {span!r}")
        middle = self.prior_loc if row is None else self.encode(torch.as_tensor(row)[None]).mean[0]
        z: Any = middle.expand(self.num_latents, num_steps, self.num_latents).clone()
        steps = torch.linspace(-span, span, num_steps, dtype=self._dtype, device=self._device)
        for latent in range(self.num_latents):
            z[latent, :, latent] = steps
        return self.decode(z)

    def plot_traversal(
        self, row: Any = None, *, num_steps: int = 7, span: float = 2.0, image: Sequence[int] | None = None
    ) -> Any:
        """A figure of :meth:`traversal`, one line of pictures for each latent.

        Args:
            row: As of :meth:`traversal`.
            num_steps: As of :meth:`traversal`.
            span: As of :meth:`traversal`.
            image: Shape of the picture that a row is, where rows have one axis: ``(8, 8)`` of digits.

        Raises:
            ArgumentError: The rows are no images.
        """
        images = self.traversal(row, num_steps=num_steps, span=span)
        if self.likelihood == "categorical":
            images = (images * torch.arange(images.shape[-1], device=images.device)).sum(-1)
        shape = self.shape if image is None else tuple(image)
        if math.prod(shape) != math.prod(self.shape) or len(shape) not in (2, 3):
            raise ArgumentError(
                f"rows of shape {self.shape} are no pictures of shape {shape}; give image=(height, width)"
            )
        labels = [f"z{latent}" for latent in range(self.num_latents)]
        return picture_grid(images.reshape(*images.shape[:2], *shape), labels=labels)

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return self.prior_loc.dtype

    @property
    def _device(self) -> torch.device:
        return self.prior_loc.device

    def _decoded(self, z: Tensor) -> Tensor:
        """Parameters of rows, ``(..., *per_row)``."""
        flat: Tensor = self.decoder(z.reshape(-1, self.num_latents))
        return flat.reshape(*z.shape[:-1], *self._row_likelihood.per_row)

    def _prior(self) -> Any:
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def _rows(self, X: Any) -> Tensor:
        return self._typed(checked_rows(X, self.shape, self.likelihood, self.num_categories)[0])

    def _typed(self, rows: Tensor) -> Tensor:
        return rows.to(self._device, torch.long if self.likelihood == "categorical" else self._dtype)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The networks as they are after training, without dropout and the like."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _check_whole(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{name} must be a positive whole number, got {value!r}")


def example() -> Problem:
    """Digits: 1,797 binary images of 8 × 8 pixels, eight latents, dense networks that are not trained yet.

    Raises:
        ExtraError: scikit-learn is not installed.
    """
    model = VariationalAutoencoder(shape=(64,))
    features = [f"pixel_{i}_{j}" for i in range(8) for j in range(8)]
    return model.problem(binary_digits().flatten(1), minibatch=128, features=features, name="autoencoder")
