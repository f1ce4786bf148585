"""Run benchmarks and write their tables: ``python -m benchmarks [fits|nuts|...|natural_gradient|bbb ...] [--quick]``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import encoder, fits, report, trust_calibration, trust_checks, warm_nuts
from benchmarks.natural_gradient import run
from benchmarks.tables import (
    autoencoder,
    bayesian_network,
    bbb,
    growth,
    mixture,
    race,
    regression,
    sampling,
    svi,
    vae,
)
from benchmarks.trust import run as trust
from tests import posteriordb

STUDIES = {
    "bbb": bbb.main,
    "encoder": encoder.main,
    "trust": trust.main,
    "trust_calibration": trust_calibration.main,
    "trust_checks": trust_checks.main,
    "warm_nuts": warm_nuts.main,
    "mixture": mixture.main,
    "regression": regression.main,
    "autoencoder": autoencoder.main,
    "bayesian_network": bayesian_network.main,
}
"""Studies that write a page of their own."""
TABLES = {"fits": race, "nuts": sampling, "svi": svi, "vae": vae, "growth": growth}


def main() -> int:
    """Write the tables; 0 if all could be made."""
    names = [*TABLES, "stops", "natural_gradient", *STUDIES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", choices=names, help="which tables; all if none is named")
    parser.add_argument("--quick", action="store_true", help="a smoke run: the first problem, hardly any repeats")
    parser.add_argument("--out", type=Path, default=report.HERE, help="directory of the results")
    options = parser.parse_args()
    if posteriordb.directory() is None:
        print("the benchmarks need posteriordb's data and draws: set POSTERIORDB to their folder", file=sys.stderr)
        return 2
    chosen = options.tables or names
    results = report.load(options.out)
    for name, module in TABLES.items():
        if name not in chosen:
            continue
        rows, began = [], time.perf_counter()
        for row in module.measure(options.quick):
            rows.append(row)
            results = report.save(results, name, rows, quick=options.quick, directory=options.out)
            shown = ", ".join(str(value) for value in row.values() if isinstance(value, str | int))
            print(f"{name}: {shown} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    if "stops" in chosen:
        fits.main()
    if "natural_gradient" in chosen:
        run.main(options.out, quick=options.quick)
    for name, study in STUDIES.items():
        if name in chosen:
            study(options.out, quick=options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
