from __future__ import annotations

import ctypes
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vi_lab as vl
from pyro_vi_lab import native as native_module
from pyro_vi_lab.errors import ArgumentError, CompileError, DataError
from pyro_vi_lab.native import NativeFunction, compile_native, compiler
from tests import posteriordb

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler")
DOUBLE = torch.float64
X, Y = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE), torch.tensor([0.5, -1.0, 4.0], dtype=DOUBLE)


def graph(function: Callable[..., Any], *example: Tensor) -> GraphModule:
    return make_fx(function)(*example)


def density(x: Tensor) -> tuple[Tensor, Tensor]:
    return -(x * x).sum() / 2, -x


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyro_vi_lab"


# --- right numbers


def models() -> list[str]:
    return [*posteriordb.POSTERIORS, *vl.models.MODELS]


@needs_compiler
@pytest.mark.parametrize("name", models())
def test_gradients_of_models(name: str) -> None:
    """Value and gradient of real models are those of the captured graph, alone and eight rows at once."""
    if name in posteriordb.POSTERIORS:
        posteriordb.require()
        problem = vl.Problem(posteriordb.POSTERIORS[name].model, **posteriordb.load(name).data)
    else:
        problem = vl.models.build(name)
    log_density = problem.density()
    bound = log_density.bound
    assert bound is not None
    function = log_density.native
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(11, log_density.dim, generator=generator, dtype=log_density.dtype) / 2
    rows = function.batched(z)
    for number, point in enumerate(z):
        for wanted, one, batch in zip(bound.module(point), function(point), rows, strict=True):
            scale = float(wanted[torch.isfinite(wanted)].abs().max()) if bool(torch.isfinite(wanted).any()) else 1.0
            for got in (one, batch[number]):
                torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13 * scale, equal_nan=True)


@needs_compiler
def test_data_are_inputs() -> None:
    def function(x: Tensor, a: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (a @ x[k]).exp(), (a.exp().sum(0) * x).cumsum(0)

    a, k = torch.stack([X, Y]), torch.tensor([2, 0, 1])
    native = compile_native(graph(function, X, a, k), (X, a, k))
    for x, other, places in ((Y, a, k), (X, a.flip(0) / 3, torch.tensor([0, -1, 1]))):
        for got, wanted in zip(native(x, other, places), function(x, other, places), strict=True):
            torch.testing.assert_close(got, wanted)
        rows = torch.stack([x, 2 * x])
        for number, row in enumerate(rows):
            for got, wanted in zip(native.batched(rows, other, places), function(row, other, places), strict=True):
                torch.testing.assert_close(got[number], wanted)


@needs_compiler
@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 64])
@pytest.mark.parametrize("lanes", [2, 8])
def test_any_number_of_rows(num_rows: int, lanes: int) -> None:
    native = compile_native(graph(density, X), (X,), lanes=lanes)
    x = torch.arange(3.0 * num_rows, dtype=DOUBLE).reshape(num_rows, 3)
    value, grad = native.batched(x)
    torch.testing.assert_close(value, -x.square().sum(-1) / 2)
    torch.testing.assert_close(grad, -x)


@needs_compiler
def test_types_and_odd_shapes() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x > 0, x.long(), x.double(), x.sum(), x[:0], x[:, None, :1]

    x = torch.tensor([[1.5, -2.5], [0.0, 3.0]])
    native = compile_native(graph(function, x), (x,))
    for got, wanted in zip(native(x), function(x), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    for got, wanted in zip(native.batched(x[None]), function(x), strict=True):
        assert torch.equal(got[0], wanted)


@needs_compiler
def test_inputs_need_not_be_contiguous() -> None:
    wide = torch.arange(12.0, dtype=DOUBLE).reshape(3, 4)
    native = compile_native(graph(density, X), (X,))
    assert torch.equal(native(wide[:, 1])[1], -wide[:, 1])
    assert torch.equal(native.batched(wide.t())[1], -wide.t())


@needs_compiler
def test_long_sums_are_accurate() -> None:
    """A million tenths: plain summation would be off by 1e-6 of its own rounding steps."""
    tenths = torch.full((10**6,), 0.1, dtype=DOUBLE) + torch.linspace(0, 1e-9, 10**6, dtype=DOUBLE)
    native = compile_native(graph(lambda x, y: (x * y).sum(), X[:1], tenths), (X[:1], tenths))
    assert native(X[:1], tenths)[0].item() == pytest.approx(math.fsum(tenths.tolist()), rel=1e-13)


@needs_compiler
def test_special_functions_against_scipy() -> None:
    """torch's own trigamma is right to nine digits only."""
    from scipy import special

    x = torch.cat([torch.linspace(-9.9, 30, 400, dtype=DOUBLE), torch.logspace(-8, 12, 100, dtype=DOUBLE)])
    functions = {
        "trigamma": (lambda x: torch.polygamma(1, x), lambda x: special.zeta(2, x)),
        "digamma": (torch.digamma, special.digamma),
        "lgamma": (torch.lgamma, special.gammaln),
    }
    for name, (function, oracle) in functions.items():
        positive = x[x > 0] if name == "trigamma" else x
        got = compile_native(graph(function, positive), (positive,))(positive)[0].numpy()
        np.testing.assert_allclose(got, oracle(positive.numpy()), rtol=1e-13, atol=1e-13, err_msg=name)


@needs_compiler
@pytest.mark.parametrize("name", ["exp", "log", "log1p", "expm1", "tanh", "erf", "sin", "cos", "atan", "sinh", "log2"])
def test_vector_functions_are_accurate(name: str) -> None:
    """Within four units in the last place, as the vector functions of glibc promise, special values included."""
    x = torch.linspace(-700, 700, 4001, dtype=DOUBLE)
    x = torch.cat([x, x / 100, x / 1e5, x.abs() * 1e-310, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    function = getattr(torch, name)
    got = compile_native(graph(function, x), (x,))(x)[0]
    torch.testing.assert_close(got, function(x), rtol=5 * torch.finfo(DOUBLE).eps, atol=5e-324, equal_nan=True)


# --- threads, addresses


@needs_compiler
def test_threads_do_not_share_memory() -> None:
    """A workspace too large for the stack, and one that is not."""
    for size in (50, 20_000):
        x = torch.linspace(0, 1, size, dtype=DOUBLE)
        module = graph(lambda x: ((x.exp().cumsum(0) * x.sin()).cumsum(0) + x).flip(0).cumsum(0), x)
        native = compile_native(module, (x,))
        inputs = [x * number for number in range(1, 9)]
        wanted = [native(one)[0] for one in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(20):
                for got, expected in zip(pool.map(native, inputs), wanted, strict=True):
                    assert torch.equal(got[0], expected)


def called(native: NativeFunction, x: np.ndarray) -> tuple[int, float, np.ndarray]:
    """The C function of a density, as a sampler calls it."""
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64, *[ctypes.c_void_p] * 4)(native.address)
    grad, value = np.empty_like(x), np.empty(1)
    code = function(x.size, x.ctypes.data, grad.ctypes.data, value.ctypes.data, native.user_data)
    return code, float(value[0]), grad


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_address_of_a_density(dtype: torch.dtype) -> None:
    native = compile_native(graph(density, X.to(dtype)), (X.to(dtype),))
    code, value, grad = called(native, np.array([1.0, -2.0, 0.5]))
    assert code == 0
    assert value == pytest.approx(-2.625)
    np.testing.assert_allclose(grad, [-1.0, 2.0, -0.5])
    assert called(native, np.array([1.0, math.inf, 0.5]))[0] > 0
    assert called(native, np.array([1.0, math.nan, 0.5]))[0] > 0
    assert called(native, np.ones(2))[0] < 0
    pointers = native.density_pointers()
    assert pointers.state.calls == 0
    assert pointers.function is native


@needs_compiler
@pytest.mark.parametrize("function", [lambda x: x, lambda x: (x, x.sum()), lambda x: (x.sum(), x[:2])])
def test_what_is_no_density_has_no_address(function: Callable[[Tensor], Any]) -> None:
    native = compile_native(graph(function, X), (X,))
    assert native.address == 0
    with pytest.raises(CompileError, match="not a density"):
        native.density_pointers()


# --- what is refused


@needs_compiler
def test_wrong_inputs() -> None:
    native = compile_native(graph(lambda x, k: x[k], X, torch.tensor([0])), (X, torch.tensor([0])))
    with pytest.raises(ArgumentError, match="expected 2 tensors, got 1"):
        native(X)
    with pytest.raises(ArgumentError, match=r"input 0 has shape \(2,\).*expected \(3,\)"):
        native(X[:2], torch.tensor([0]))
    with pytest.raises(ArgumentError, match=r"input 1 .*torch\.int32; expected .*torch\.int64"):
        native(X, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ArgumentError, match=r"input 0 has shape \(2, 2\)"):
        native.batched(X[:2].expand(2, 2), torch.tensor([0]))
    for place in (3, -4):
        with pytest.raises(DataError, match="out of range"):
            native(X, torch.tensor([place]))
        with pytest.raises(DataError, match="out of range"):
            native.batched(X[None], torch.tensor([place]))


@pytest.mark.parametrize("lanes", [0, -1, 2.0, True])
def test_wrong_lanes(lanes: Any) -> None:
    with pytest.raises(ArgumentError, match="lanes must be a whole number of at least 1"):
        compile_native(graph(density, X), (X,), lanes=lanes)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    assert compiler() is None
    with pytest.raises(CompileError, match="no C compiler was found"):
        compile_native(graph(density, X), (X,))


def test_the_environment_names_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -E")
    monkeypatch.setenv("CXX", "")
    assert compiler() == f"{sys.executable} -E"
    monkeypatch.setenv("CC", "/nonexistent/compiler")
    assert compiler() != "/nonexistent/compiler"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script as compiler")
def test_a_compiler_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\ntest "$1" = --version && exit 0\necho "line 3: error: no luck" >&2\nexit 1\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(CompileError, match="failed: line 3: error: no luck"):
        compile_native(graph(density, X), (X,))
    assert list(cache.iterdir()) == []


# --- the cache


@needs_compiler
def test_libraries_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_native(graph(density, X), (X,))
    (library,) = cache.iterdir()

    def build(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(native_module, "_build", build)
    assert torch.equal(compile_native(graph(density, Y), (Y,))(X)[1], -X)
    assert list(cache.iterdir()) == [library]


@needs_compiler
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-100], lambda content: b"x" + content]
)
def test_a_damaged_library_is_built_again(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    compile_native(graph(density, X), (X,))
    (library,) = cache.iterdir()
    content = library.read_bytes()
    library.unlink()  # not in place: this process has it in memory
    library.write_bytes(damage(content))
    assert torch.equal(compile_native(graph(density, X), (X,))(X)[1], -X)
    assert library.stat().st_size == len(content)


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_write_is_not_used(cache: Path, mode: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert torch.equal(compile_native(graph(density, X), (X,))(X)[1], -X)
    assert list(cache.iterdir()) == []


@needs_compiler
def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(compile_native(graph(density, X), (X,))(X)[1], -X)


@needs_compiler
def test_kept_libraries_are_the_users_own(cache: Path) -> None:
    compile_native(graph(density, X), (X,))
    (library,) = cache.iterdir()
    assert stat.S_IMODE(library.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(cache.stat().st_mode) & 0o077 == 0


@needs_compiler
@pytest.mark.slow
def test_processes_compile_at_the_same_time(cache: Path) -> None:
    program = (
        "import torch; from torch.fx.experimental.proxy_tensor import make_fx\n"
        "from pyro_vi_lab.native import compile_native\n"
        "x = torch.ones(3)\n"
        "print(compile_native(make_fx(lambda x: (x.exp().sum(), x))(x), (x,))(2 * x)[1].tolist())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache.parent)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["[2.0, 2.0, 2.0]"] * 3
    assert len(list(cache.iterdir())) == 1
