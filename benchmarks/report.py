"""results.json, which keeps what was measured, and results.md, which is made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import goals, machine
from benchmarks.tables import growth, race, sampling, svi, vae

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]
Results = dict[str, Any]


def load(directory: Path = HERE) -> Results:
    """What has been measured so far."""
    path = directory / "results.json"
    return json.loads(path.read_text()) if path.exists() else {"tables": {}}


def save(results: Results, table: str, rows: Rows, *, quick: bool, directory: Path = HERE) -> Results:
    """Put one table's rows in place of its old ones, and write both files."""
    part = {"quick": quick, "versions": machine.versions(), **machine.processor(), "rows": rows}
    results = {"tables": {**results["tables"], table: part}}
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (directory / "results.md").write_text("\n".join(render(results)) + "\n")
    return results


def render(results: Mapping[str, Any]) -> list[str]:
    """The page."""
    parts = results["tables"]
    tables: dict[str, Rows] = {name: part["rows"] for name, part in parts.items()}
    lines = [
        "# Speed",
        "",
        "Ratios say how many times faster we are (for NUTS: how many times more effective draws per second), all contenders",
        "in the same run, on the same data, taking turns, each on one thread per operation and with the same two cores; JAX",
        "in float64. *Warm*: built, captured or compiled before. *Cold*: from the start of a new process, imports and",
        "compilers counted. Medians; in brackets the smallest and the largest.",
        "",
        "## Goals",
        "",
        *goals.render(tables),
    ]
    for name, section in SECTIONS.items():
        if name in tables:
            lines += ["", *section([row for row in tables[name] if "skipped" not in row or "size" in row])]
            lines += _skipped(tables[name])
            if parts[name]["quick"]:
                lines += ["", "**A smoke run: one problem, hardly any repeats. Not a measurement.**"]
    lines += ["", "## Measured with", ""]
    for name, part in parts.items():
        versions = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
        lines.append(f"- {name}: {part['processor']}, {part['cores']} cores; {versions}")
    lines += ["", "Made by `make bench`; `results.json` has every single time."]
    return lines


def _skipped(rows: Rows) -> list[str]:
    """Which rows there are not, and why."""
    missing = [row for row in rows if "skipped" in row and "size" not in row]
    return [""] * bool(missing) + [
        f"- Not measured: {row['problem']}{', ' + row['family'] if 'family' in row else ''}: {row['skipped']}"
        for row in missing
    ]


def _heading(title: str, module: Any) -> list[str]:
    """A title, and what the module says of its table."""
    return [f"## {title}", "", *module.__doc__.strip().splitlines(), ""]


def _spread(values: list[float], number: Callable[[float], str]) -> str:
    middle = number(statistics.median(values))
    return f"{middle} ({number(min(values))}–{number(max(values))})" if len(values) > 1 else middle


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _ratio(value: float | None, *, at_least: bool = False) -> str:
    return "–" if value is None else f"{'≥ ' if at_least else ''}{value:.3g}"


# Fits

PEERS = {"in_numpyro": "NumPyro", "in_pymc": "PyMC", "in_pyro": "Pyro"}


def _fits(rows: Rows) -> list[str]:
    lines = _heading("Fits", race)
    for family in race.FAMILIES:
        chosen = [row for row in rows if row["family"] == family]
        peers = [peer for peer in PEERS if any(peer in row["contenders"] for row in chosen)]
        lines += [f"### {family.replace('_', '-').capitalize()}", ""]
        head = ["problem", "D", *(f"× {PEERS[peer]}, warm" for peer in peers)]
        head += [f"× {PEERS[peer]}, cold" for peer in peers if peer != "in_pyro"]
        head += ["ours, s", "ours to its own stop, s", *(f"{PEERS[peer]}, s" for peer in peers)]
        head += ["ours cold, s", "ours again, s"]
        head += [f"{PEERS[peer]} cold, s" for peer in peers if peer != "in_pyro"]
        head += [f"{PEERS[peer]} grid, s" for peer in peers if peer != "in_pyro"]
        head += [*(f"{PEERS[peer]}: rate, particles, steps" for peer in peers), "ours: nats below"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in chosen:
            lines.append("| " + " | ".join(_fit_cells(row, peers)) + " |")
        lines.append("")
    lines += [
        "≥: the peer did not arrive in its time, which stands in its place. ≈: Pyro did not arrive in its time; its seconds",
        "per step times NumPyro's median steps with the same learning rate and particles. Pyro runs NumPyro's best",
        "configuration. PyMC's rate *default* is its own optimizer's. Grid: what trying all configurations took, each cut off at",
        "its arrival or soon after the best one's.",
    ]
    return lines


def _fit_cells(row: Mapping[str, Any], peers: list[str]) -> list[str]:
    contenders = row["contenders"]
    compiled = [peer for peer in peers if peer != "in_pyro"]
    late = {peer: "warm" in contenders.get(peer, {}) and not race.arrived(contenders[peer]) for peer in peers}
    cells = [row["problem"], str(row["dim"])]
    cells += [_ratio(race.warm_ratio(row, peer), at_least=late[peer]) for peer in peers]
    cells += [_ratio(race.cold_ratio(row, peer), at_least=late[peer]) for peer in compiled]
    whole = [run["whole"] for run in contenders["ours"]["warm"]]
    cells += [_fit_seconds(contenders["ours"], False), _spread(whole, _seconds)]
    cells += [_fit_seconds(contenders.get(peer, {}), late[peer]) for peer in peers]
    cells += [_spread(contenders["ours"]["cold"], _seconds), _seconds(contenders["ours"]["again"])]
    cells += [_spread(contenders[peer]["cold"], _seconds) for peer in compiled]
    cells += [_seconds(sum(run["seconds"] for run in contenders[peer]["grid"])) for peer in compiled]
    cells += [_configuration(contenders.get(peer, {})) for peer in peers]
    gaps = [run["gap"] for run in contenders["ours"]["warm"]]
    return [*cells, _spread(gaps, lambda gap: f"{gap:.3f}")]


def _fit_seconds(contender: Mapping[str, Any], late: bool) -> str:
    if "warm" not in contender:
        return contender.get("skipped", "–")
    if "extrapolated" in contender:
        return f"≈ {_seconds(contender['extrapolated'])}"
    return ("≥ " if late else "") + _spread([run["seconds"] for run in contender["warm"]], _seconds)


def _configuration(contender: Mapping[str, Any]) -> str:
    if "best" not in contender:
        return "–"
    best = contender["best"]
    steps = statistics.median(run["steps"] for run in contender["warm"])
    return f"{best['lr'] or 'default'}, {best['num_particles']}, {steps:.0f}"


# NUTS


def _nuts(rows: Rows) -> list[str]:
    lines = _heading("NUTS", sampling)
    lines += [
        "| problem | D | × NumPyro, warm | × NumPyro, cold | × NumPyro, ours at 0.9, warm | × Pyro | NumPyro's best way | "
        "ours, ESS/s | NumPyro, ESS/s | Pyro, ESS/s | ours, s | NumPyro, s | ours cold, s | ours again, s | NumPyro cold, s |",
        "|---" * 15 + "|",
    ]
    for row in rows:
        contenders = row["contenders"]
        method, rate = sampling.best_numpyro(row, "warm")
        cold_method, _ = sampling.best_numpyro(row, "cold")
        ours, theirs = contenders["ours"], contenders[f"NumPyro, {method}"]
        own, pyros = sampling.median_rate(ours, "warm"), sampling.median_rate(contenders["Pyro"], "warm")
        cells = [
            row["problem"],
            str(row["dim"]),
            _ratio(sampling.ratio(row, "NumPyro", "warm")),
            _ratio(sampling.ratio(row, "NumPyro", "cold")),
            _ratio(sampling.ratio(row, "NumPyro", "warm", ours="ours, 0.9")),
            _ratio(sampling.ratio(row, "Pyro", "warm")),
            method,
            f"{own:.0f}",
            f"{rate:.0f}",
            contenders["Pyro"].get("skipped", "–") if pyros is None else f"{pyros:.1f}",
            *(_spread([run["seconds"] for run in one["warm"]], _seconds) for one in (ours, theirs)),
            _seconds(ours["cold"][0]["seconds"]),
            _seconds(ours["again"][0]["seconds"]),
            _seconds(contenders[f"NumPyro, {cold_method}"]["cold"][0]["seconds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# Steps and epochs


def _svi(rows: Rows) -> list[str]:
    lines = _heading("One step of SVI", svi)
    lines += ["| guide | objective | × faster than Trace_ELBO | µs per step |", "|---" * 4 + "|"]
    for row in rows:
        for objective, contender in row["contenders"].items():
            times = contender.get("microseconds")
            shown = _spread(times, lambda value: f"{value:.0f}") if times else f"skipped: {contender['skipped']}"
            lines.append(
                f"| {row['guide']} | {objective} | {_ratio(svi.ratio(row, 'Trace_ELBO', objective))} | {shown} |"
            )
    return lines


def _vae(rows: Rows) -> list[str]:
    lines = _heading("One epoch of a variational autoencoder", vae)
    lines += [
        "| hidden | way | speed, of the faster by hand | ms per epoch | loss per row at the end |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        for way, contender in row["contenders"].items():
            times = contender.get("seconds")
            shown = _spread(times, lambda value: f"{1e3 * value:.1f}") if times else f"skipped: {contender['skipped']}"
            loss = f"{contender['loss']:.2f}" if times else "–"
            lines.append(f"| {row['hidden']} | {way} | {_ratio(vae.ratio(row, way))} | {shown} | {loss} |")
    return lines


# Growth


def _growth(rows: Rows) -> list[str]:
    lines = _heading("Growth", growth)
    lines += ["| what | size | seconds | growth | memory, MiB | steps | converged |", "|---" * 7 + "|"]
    last: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda one: [other["series"] for other in rows].index(one["series"])):
        name = row["series"]
        if "skipped" in row:
            lines.append(f"| {name} | {row['size']:,} | {row['skipped']} | | | | |")
            continue
        exponent = f"{growth.exponent(last[name], row):.2f}" if name in last else ""
        memory = f"{row['peak'] - row['before']:.0f}" if "peak" in row else ""
        lines.append(
            f"| {name} | {row['size']:,} | {_spread(row['seconds'], _seconds)} | {exponent} | {memory} | "
            f"{row.get('steps', '')} | {row.get('converged', '')} |"
        )
        last[name] = row
    return lines


SECTIONS: dict[str, Callable[[Rows], list[str]]] = {
    "fits": _fits,
    "nuts": _nuts,
    "svi": _svi,
    "vae": _vae,
    "growth": _growth,
}
