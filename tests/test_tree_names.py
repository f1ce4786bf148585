from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_vi_lab.tree_names import SAFE, safe_names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("theta_1", "theta_1"),
        ("Θ", "Theta"),
        ("σ²", "sigma2"),
        ("naïve", "naive"),
        ("net.0/weight", "net_0_weight"),
        ("<script>alert('x')</script>", "script_alert_x_script"),
        ('"', "unnamed"),
        ("", "unnamed"),
        ("0.bias", "x_0_bias"),
        ("_latent", "latent"),
        ("模型", "u6a21u578b"),
        ("a\nb\tc", "a_b_c"),
        ("draw", "draw_"),
    ],
)
def test_names_are_letters_digits_and_underscores(name: str, expected: str) -> None:
    assert safe_names([name], reserved=("chain", "draw")) == {name: expected}


@given(st.lists(st.text(max_size=5), max_size=30))
def test_different_names_stay_different_and_safe_ones_stay(names: list[str]) -> None:
    found = safe_names(names, reserved=("chain", "draw"))
    assert list(found) == list(dict.fromkeys(names))
    assert len(set(found.values())) == len(found)
    assert all(SAFE.match(value) for value in found.values())
    assert all(found[name] == name for name in names if SAFE.match(name) and name not in ("chain", "draw"))
    assert not {"chain", "draw"} & set(found.values())
