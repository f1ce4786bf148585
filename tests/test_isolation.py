from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import constraints

from pyro_vi_lab.isolation import default_dtype, model_run, own_params, seeded, threads


def state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002 - the global state is what these tests are about
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "params": {key: value.tolist() for key, value in pyro.get_param_store().items()},
        "validation": (
            pyro.infer.util.is_validation_enabled(),
            torch.distributions.Distribution._validate_args,
        ),
    }


def disturb() -> None:
    """Change everything that a block may change."""
    pyro.set_rng_seed(99)
    torch.set_default_dtype(torch.float16)
    torch.set_num_threads(torch.get_num_threads() + 1)
    pyro.param("new", torch.tensor(1.0))
    pyro.enable_validation(not pyro.infer.util.is_validation_enabled())


BLOCKS: dict[str, tuple[Callable[[], AbstractContextManager[None]], set[str]]] = {
    "seeded": (lambda: seeded(3), {"torch", "numpy", "random"}),
    "seeded, without a seed": (lambda: seeded(None), {"torch", "numpy", "random"}),
    "default_dtype": (lambda: default_dtype(torch.float64), {"dtype"}),
    "threads": (lambda: threads(3), {"threads"}),
    "own_params": (own_params, {"params"}),
    "model_run": (
        lambda: model_run(seed=3, dtype=torch.float64, validate=False),
        {"torch", "numpy", "random", "dtype", "params", "validation"},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_puts_back_what_is_its_own(name: str, fails: bool) -> None:
    block, own = BLOCKS[name]
    pyro.param("old", torch.tensor(2.0))
    before = state()
    with pytest.raises(KeyError) if fails else nullcontext(), block():
        disturb()
        if fails:
            raise KeyError("inside")
    after = state()
    assert {key for key in before if after[key] == before[key]} >= own
    # and the rest is not its business
    assert {key for key in before if after[key] != before[key]} >= set(before) - own - {
        "numpy",
        "random",
        "torch",
    }
    torch.set_num_threads(before["threads"])


def test_a_seed_gives_the_same_numbers_from_all_three_sources() -> None:
    def draw(seed: int) -> list[float]:
        with seeded(seed):
            return [torch.rand(()).item(), float(np.random.rand()), random.random()]  # noqa: NPY002

    assert draw(1) == draw(1)
    assert all(one != other for one, other in zip(draw(1), draw(2), strict=True))


def test_seeds_are_those_of_pyro() -> None:
    with seeded(7):
        inside = [torch.rand(3), random.random(), np.random.rand()]  # noqa: NPY002
    pyro.set_rng_seed(7)
    outside = [torch.rand(3), random.random(), np.random.rand()]  # noqa: NPY002
    assert torch.equal(inside[0], outside[0])
    assert inside[1:] == outside[1:]


def test_without_a_seed_the_block_goes_on_where_the_state_is() -> None:
    with seeded(None):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)


def test_inside_a_model_run_everything_is_as_asked() -> None:
    for validate in (False, True):
        with model_run(seed=0, dtype=torch.float64, validate=validate):
            assert torch.ones(()).dtype == torch.float64
            assert pyro.infer.util.is_validation_enabled() is validate
            assert torch.distributions.Distribution._validate_args is validate


def test_present_parameters_are_seen_and_new_ones_go() -> None:
    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with own_params():
        assert pyro.param("scale").item() == pytest.approx(2)
        pyro.param("other", torch.tensor(1.0))
    store = pyro.get_param_store()
    assert list(store.keys()) == ["scale"]
    assert store.get_state()["constraints"]["scale"] is constraints.positive
    assert pyro.param("scale").item() == pytest.approx(2)


def test_blocks_nest() -> None:
    with default_dtype(torch.float64):
        with default_dtype(torch.float64):
            assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_dtype() == torch.float64
        with default_dtype(torch.float16):
            assert torch.get_default_dtype() == torch.float16
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32
