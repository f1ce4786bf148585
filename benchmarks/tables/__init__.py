"""One module per table: ``measure(quick)`` gives plain values for results.json, ``render(values)`` lines of results.md."""
