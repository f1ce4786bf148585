"""A captured graph as machine code: written in C, compiled by the system's compiler, called through its address.

A gradient of a small model takes a microsecond this way, and other libraries can call it from their own threads,
without Python's interpreter lock. The compiled library is kept on disk, by a name that depends on its source and on the
machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_vi_lab.c_library import LAPACK
from pyro_vi_lab.errors import ArgumentError, CompileError, DataError, LabWarning
from pyro_vi_lab.phases import phase

if TYPE_CHECKING:
    from pyro_vi_lab.c_source import Source

LANES = 8
"""Rows that :meth:`NativeFunction.batched` computes side by side: of double precision, a cache line."""
LONG = 1_000_000
OPTIMIZE = (
    (200, ("-O3",)),
    (600, ("-O2", "-fno-tree-slp-vectorize")),
    (LONG, ("-O1", "-fexpensive-optimizations", "-fno-forward-propagate")),
)
"""Optimization up to a number of statements: long functions are straight-line code, on which compilers spend most of
their time (GCC half of it to look for vectors there) and win least. Code for many rows says itself which loops are to
be vectors; at higher levels GCC makes vectors of others, which is slower."""
COMPILE_SECONDS = 120
"""A compiler that takes longer is stopped."""

_COMMON = ("-x", "c", "-std=gnu11", "-shared", "-fPIC", "-w", "-fno-math-errno", "-fno-trapping-math")
_EXACT = ("-ffp-contract=off", "-fno-strict-aliasing")
_CHECKSUM = 32


class NativeFunction:
    """A graph compiled to machine code, ``f(x, *data) -> (tensor, ...)``. Made by :func:`compile_native`.

    Several threads may call it at once.

    Args:
        module: The graph.
        example: Inputs of the shapes and types that it is for.

    Attributes:
        inputs: Shape and type of every input, of one row.
        outputs: Shape and type of every output, of one row.
    """

    def __init__(self, module: GraphModule, example: Sequence[Tensor]) -> None:
        self._module, self._example = module, tuple(example)
        self._versions: dict[int, _Compiled] = {}

    def compiled(self, lanes: int) -> _Compiled:
        """The version for so many rows at once."""
        if lanes not in self._versions:
            from pyro_vi_lab.c_source import (
                c_source,  # what writes C is not imported before there is something to write
            )

            self._versions[lanes] = _Compiled(c_source(self._module, self._example, lanes=lanes))
        return self._versions[lanes]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the function on one row.

        Raises:
            ArgumentError: An input has another shape or type than in the graph.
            DataError: An index among the inputs is out of range.
        """
        version = self._versions.get(1) or self.compiled(1)
        return version.call(inputs)

    def batched(self, x: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
        """Run the function on every row of ``x``; ``data`` are the same for all rows.

        Shape:
            x ``(K, ...)``, each result ``(K, ...)``.

        Raises:
            ArgumentError: An input has another shape or type than in the graph.
            DataError: An index among the inputs is out of range.
        """
        version = self.compiled(next((lanes for lanes in self._versions if lanes > 1), LANES))
        ready = version.ready((x, *data), x.shape[:1])
        outputs = [torch.empty((len(x), *shape), dtype=dtype) for shape, dtype in version.source.outputs]
        version.run(ready, outputs, len(x))
        return tuple(outputs)

    @property
    def address(self) -> int:
        r"""Address of a C function that gives a density and its gradient at a point, without Python; 0 if this is none.

        ``int64_t f(uint64_t dim, const double *x, double *gradient, double *value, void *user_data)`` returns 0, or a
        positive number if one of the results is not finite.
        """
        return self.compiled(1).address("vl_density")

    @property
    def user_data(self) -> int:
        """Address of what the function at :attr:`address` is to be given; alive as long as this object is."""
        return ctypes.addressof(self.compiled(1).state)

    def density_pointers(self) -> DensityPointers:
        """What a sampler that calls C functions needs.

        Raises:
            CompileError: The graph is not a density and its gradient at one point, or has inputs besides it.
        """
        version = self.compiled(1)
        if not self.address:
            raise CompileError("the graph is not a density and its gradient at one point")
        return DensityPointers(self.address, version.address("vl_expand"), version.new_state(), self)


def compile_native(module: GraphModule, example: Sequence[Tensor], *, lanes: int = 1) -> NativeFunction:
    """Compile a graph of ATen operators with static shapes.

    Args:
        module: The graph, ``f(x, *data)``; its constants are kept alive.
        example: Inputs of the shapes and types that it is for.
        lanes: Which version to compile at once: 1 for calls with one row, more for batches, of which so many rows are
            computed side by side. The other one is compiled when it is first used.

    Raises:
        CompileError: An operator cannot be written in C, the graph is too large, or there is no working compiler.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> x = torch.tensor([1.0, 2.0])
        >>> function = compile_native(make_fx(lambda x: (x.square().sum(), 2 * x))(x), (x,))
        >>> function(torch.tensor([3.0, 4.0]))
        (tensor(25.), tensor([6., 8.]))
        >>> function.batched(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))[0]
        tensor([25.,  1.])
    """
    if isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1:
        raise ArgumentError(f"lanes must be a whole number of at least 1, got {lanes!r}")
    function = NativeFunction(module, example)
    function.compiled(lanes)
    return function


class State(ctypes.Structure):
    """What generated code is given besides inputs and outputs, ``vl_state``; ``calls`` counts those of a density."""

    _fields_ = (("constants", ctypes.c_void_p), ("lapack", ctypes.c_void_p), ("calls", ctypes.c_uint64))


class DensityPointers(NamedTuple):
    """Addresses of C functions, as nutpie calls them, and what is to be kept alive while it does.

    Args:
        density: Address of the density and its gradient, as :attr:`NativeFunction.address`.
        expand: Address of ``int64_t f(uint64_t dim, uint64_t dim, const double *x, double *out, void *)``: a copy.
        state: What both are given, with a counter of its own.
        function: Owner of all this.
    """

    density: int
    expand: int
    state: State
    function: NativeFunction


class _Compiled:
    """One version of a function: its library, loaded, and its constants."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.library = _library(source.text, source.num_statements if source.lanes == 1 else LONG)
        self._run = self.library.vl_call if source.lanes == 1 else self.library.vl_rows
        self._run.restype = ctypes.c_int64
        self._run.argtypes = ([] if source.lanes == 1 else [ctypes.c_int64]) + [ctypes.c_void_p] * 3
        pointers = [tensor.data_ptr() for tensor in source.constants]
        self._constants = (ctypes.c_void_p * max(1, len(pointers)))(*pointers)
        self._lapack = _lapack() if "lapack[" in source.text else None
        self.state = self.new_state()
        self._state_address = ctypes.addressof(self.state)
        self._shapes = [(torch.Size(shape), dtype) for shape, dtype in source.inputs]
        self._likes = [torch.empty(shape, dtype=dtype) for shape, dtype in source.outputs]
        self._input_pointers = ctypes.c_void_p * max(1, len(source.inputs))
        self._output_pointers = ctypes.c_void_p * max(1, len(source.outputs))

    def new_state(self) -> State:
        """What a call is given besides inputs and outputs; valid as long as this object is."""
        lapack = None if self._lapack is None else ctypes.addressof(self._lapack)
        return State(ctypes.addressof(self._constants), lapack, 0)

    def address(self, name: str) -> int:
        """Address of a function of the library; 0 if there is none of that name."""
        function = getattr(self.library, name, None)
        return 0 if function is None else int(ctypes.cast(function, ctypes.c_void_p).value or 0)

    def ready(self, inputs: Sequence[Tensor], lead: Sequence[int]) -> list[Tensor]:
        """Inputs as C reads them; the first one may have rows."""
        if len(inputs) != len(self.source.inputs):
            raise ArgumentError(f"expected {len(self.source.inputs)} tensors, got {len(inputs)}")
        result = []
        for number, (tensor, (shape, dtype)) in enumerate(zip(inputs, self.source.inputs, strict=True)):
            wanted = (*lead, *shape) if number == 0 else shape
            if tensor.shape != wanted or tensor.dtype is not dtype:
                raise ArgumentError(
                    f"input {number} has shape {tuple(tensor.shape)}, {tensor.dtype}; expected {tuple(wanted)}, {dtype}"
                )
            if tensor.device.type != "cpu":
                raise ArgumentError(f"input {number} is on {tensor.device}; compiled code runs on the CPU")
            result.append(tensor.detach().contiguous())
        return result

    def call(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run on one row: for functions of a microsecond, so nothing is done twice here."""
        if len(inputs) != len(self._shapes):
            inputs = self.ready(inputs, ())
        for tensor, (shape, dtype) in zip(inputs, self._shapes, strict=True):
            if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
                inputs = self.ready(inputs, ())
                break
        outputs = tuple([torch.empty_like(like) for like in self._likes])
        self.run(inputs, outputs)
        return outputs

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *rows: int) -> None:
        """Call the function."""
        code = self._run(
            *rows,
            self._input_pointers(*[tensor.data_ptr() for tensor in inputs]),
            self._output_pointers(*[tensor.data_ptr() for tensor in outputs]),
            self._state_address,
        )
        if code == 1:
            raise DataError("an index is out of range")
        if code:
            raise MemoryError("no memory for intermediate results")


# --- compiler and libraries ----------------------------------------------------------------------------


def compiler() -> str | None:
    """The C compiler: what ``CC`` or ``CXX`` says, else the first of cc, gcc, clang and g++ that is found."""
    for variable in ("CC", "CXX"):
        command = os.environ.get(variable, "").strip()
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return next((path for name in ("cc", "gcc", "clang", "g++") if (path := shutil.which(name))), None)


@functools.cache
def _version(command: str) -> str:
    try:
        done = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the C compiler {command!r} cannot be run: {error}") from error
    return done.stdout


@functools.cache
def _machine() -> str:
    """What machine code depends on: a home directory may be shared by different processors."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        marks = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    except OSError:
        marks = [platform.processor()]
    return "\n".join([platform.platform(), platform.machine(), *marks])


def _flag_sets(num_statements: int) -> list[tuple[str, ...]]:
    """Compiler options, the best first; a compiler that refuses them is asked with fewer."""
    level = next(flags for most, flags in OPTIMIZE if num_statements <= most)
    name, number = platform.libc_ver()
    version = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    # vector functions for x86-64: exp, log, sin, cos, pow since glibc 2.22, the others since 2.35
    vector = 0 if name != "glibc" or platform.machine() != "x86_64" else (version >= (2, 22)) + (version >= (2, 35))
    fast = ("-march=native", "-fopenmp-simd", f"-DVL_VECTOR_MATH={vector}", *(("-lmvec",) if vector else ()), "-lm")
    plain = ("-DVL_VECTOR_MATH=0", "-lm")
    return [
        (*_COMMON, *_EXACT, *level, *fast),
        (*_COMMON, *_EXACT, *level, *plain),
        ("-x", "c", "-shared", "-fPIC", "-O1", *plain),
    ]


@functools.cache
def say_no_compiler() -> None:
    """Warn, once, that graphs stay interpreted."""
    warnings.warn(
        "no C compiler was found (cc, gcc, clang, or what the environment variable CC names): graphs are interpreted, "
        "which is slower in NUTS and in long trainings",
        LabWarning,
        stacklevel=3,
    )


def _library(text: str, num_statements: int) -> ctypes.CDLL:
    command = compiler()
    if command is None:
        raise CompileError("no C compiler was found: install gcc or clang, or name one in the environment variable CC")
    flag_sets = _flag_sets(num_statements)
    parts = [text, command, _version(command), _machine(), *(" ".join(flags) for flags in flag_sets)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]
    directory = _directory()
    path = directory / f"{name}.so"
    library = _loaded(path)
    if library is None:
        _build(text, command, flag_sets, path)
        library = _loaded(path)
    if library is None:
        raise CompileError(f"the compiled library {path} cannot be loaded")
    return library


def _build(text: str, command: str, flag_sets: Sequence[Sequence[str]], path: Path) -> None:
    message = ""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as directory:
        source, result = Path(directory, "function.c"), Path(directory, "function.so")
        source.write_text(text, encoding="utf-8")
        for flags in flag_sets:
            libraries = [flag for flag in flags if flag.startswith("-l")]
            options = [flag for flag in flags if not flag.startswith("-l")]
            arguments = [*shlex.split(command), *options, str(source), "-o", str(result), *libraries]
            try:
                with phase("compiling the graph"):
                    done = subprocess.run(
                        arguments, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
                    )
            except subprocess.TimeoutExpired as error:
                raise CompileError(
                    f"the graph is too large: {command} was stopped after {COMPILE_SECONDS} seconds"
                ) from error
            except OSError as error:
                raise CompileError(f"the C compiler {command!r} cannot be run: {error}") from error
            if done.returncode == 0:
                content = result.read_bytes()
                result.write_bytes(content + hashlib.sha256(content).digest())
                result.chmod(0o700)
                os.replace(result, path)
                return
            message = message or done.stderr.strip()
    first = next((line for line in message.splitlines() if "error" in line), message.splitlines()[0] if message else "")
    raise CompileError(f"the C compiler {command!r} failed: {first}")


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library in a file, if it is there and whole: what was cut off could crash the process."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[:-_CHECKSUM]).digest() != content[-_CHECKSUM:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _directory() -> Path:
    """Where libraries are kept: the user's cache, or where that cannot be written, a directory of this process."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(root, "pyro_vi_lab")
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # what is loaded runs as this user: nobody else may write it
        owner = directory.stat()
        if os.access(directory, os.W_OK | os.X_OK) and owner.st_uid == os.getuid() and not owner.st_mode & 0o022:
            return directory
    except OSError:
        pass
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pyro_vi_lab-")


@functools.cache
def _lapack() -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of SciPy's functions of BLAS and LAPACK."""
    import importlib

    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    addresses = []
    for module, name in LAPACK:
        capsule = importlib.import_module(f"scipy.linalg.{module}").__pyx_capi__[name]
        addresses.append(pointer_of(capsule, name_of(capsule)))
    return (ctypes.c_void_p * len(addresses))(*addresses)
