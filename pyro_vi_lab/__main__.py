"""``python -m pyro_vi_lab``."""

from __future__ import annotations

from pyro_vi_lab.cli import main

if __name__ == "__main__":
    main()
