from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_vi_lab import errors
from pyro_vi_lab.errors import ArgumentError, LabError, LabWarning, unknown_name

KINDS: dict[type[LabError], type[Exception]] = {
    errors.ModelError: ValueError,
    errors.DataError: ValueError,
    errors.ArgumentError: ValueError,
    errors.CaptureError: RuntimeError,
    errors.CompileError: RuntimeError,
    errors.FitError: RuntimeError,
    errors.FileError: OSError,
    errors.ExtraError: ImportError,
    errors.PluginError: ImportError,
}
NAMES = ["full_rank", "mean_field", "low_rank", "flow"]


def test_every_error_is_in_the_table() -> None:
    found = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LabError)}
    assert found == {LabError, *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_ours_and_the_builtin_that_fits(kind: type[LabError]) -> None:
    for caught in (LabError, KINDS[kind]):
        with pytest.raises(caught, match="what is wrong"):
            raise kind("what is wrong")


def test_the_warning_can_be_told_from_others() -> None:
    assert issubclass(LabWarning, UserWarning)
    assert not issubclass(LabWarning, LabError)


@given(st.sampled_from(NAMES), st.integers(0, 20))
def test_a_name_with_a_letter_missing_is_found(name: str, place: int) -> None:
    wrong = name[: place % len(name)] + name[place % len(name) + 1 :]
    error = unknown_name("guide", wrong, NAMES)
    assert isinstance(error, ArgumentError)
    assert str(error) == (
        f"unknown guide {wrong!r}: did you mean {name!r}? Known: flow, full_rank, low_rank, mean_field"
    )


@pytest.mark.parametrize("wrong", ["zzz", "", None, 3])
def test_nothing_is_suggested_where_nothing_is_near(wrong: object) -> None:
    assert str(unknown_name("guide", wrong, NAMES)) == (
        f"unknown guide {wrong!r}: Known: flow, full_rank, low_rank, mean_field"
    )
