"""How to get the numbers again: the command or the call, the versions, the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_vi_lab.report.words import reference_line

if TYPE_CHECKING:
    from pyro_vi_lab.compare import Comparison


def reproduce(comparison: Comparison) -> str:
    """The command or the Python call that gives these numbers again."""
    if comparison.command:
        return comparison.command
    info, reference = comparison.reference.info, comparison.reference
    lines = ["import pyro_vi_lab as vl", "", f"problem = vl.Problem(...)  # {comparison.problem.name}"]
    if reference.method == "nuts" and "seed" in info:
        kept = {key: info[key] for key in ("num_warmup", "seed", "backend", "target_accept") if key in info}
        settings = {"num_chains": reference.num_chains, "num_draws": reference.num_draws, **kept}
        lines.append(
            f"reference = vl.nuts(problem, {', '.join(f'{key}={value!r}' for key, value in settings.items())})"
        )
    else:
        lines.append(f"reference = ...  # {reference_line(comparison)}")
    lines.append(
        f"comparison = vl.compare(problem, {list(comparison.fits)}, reference=reference, "
        f"num_draws={comparison.num_draws}, seed={comparison.seed})"
    )
    return "\n".join(lines)


def provenance(comparison: Comparison, numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Seed, draws, versions and the hash of the data.

    Args:
        comparison: What is shown.
        numbers: Its ``to_dict()``.
    """
    facts = [("seed", str(comparison.seed)), ("draws per candidate", f"{comparison.num_draws:,}")]
    facts += [(name, version) for name, version in numbers["versions"].items()]
    facts.append(("data (SHA-256)", numbers["data_hash"]))
    return facts
