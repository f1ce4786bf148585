"""Run every benchmark and write its table."""

from __future__ import annotations

import sys

from benchmarks import fits
from tests import posteriordb


def main() -> int:
    """Write the tables; 0 if all could be made."""
    if posteriordb.directory() is None:
        print("the benchmarks need posteriordb's data and draws: set POSTERIORDB to their folder", file=sys.stderr)
        return 2
    fits.main()
    return 0


sys.exit(main())
