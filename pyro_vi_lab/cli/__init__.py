"""The command line, ``pyro-vi-lab``: the only part that parses arguments and prints."""

from pyro_vi_lab.cli.app import app, main

__all__ = ["app", "main"]
