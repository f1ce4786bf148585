"""The posteriors of the race in the peers' languages; ours are in ``tests/posteriordb.py``."""
