"""The command line: its commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import typer

from pyro_vi_lab.cli.about import explain_command, models_command
from pyro_vi_lab.cli.comparing import compare_command
from pyro_vi_lab.cli.fitting import fit_command, nuts_command
from pyro_vi_lab.cli.options import errors_in_words
from pyro_vi_lab.cli.saved import export_command, report_command
from pyro_vi_lab.cli.trusting import trust_command

app = typer.Typer(
    help="Fit, check and compare variational posteriors of any Pyro model.",
    epilog="Every command has examples: pyro-vi-lab compare --help. Tab completion: pyro-vi-lab --install-completion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: Mapping[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "compare": (
        compare_command,
        (
            "pyro-vi-lab compare eight_schools --out demo",
            "pyro-vi-lab compare file.py:model --data d.csv --out out",
            "pyro-vi-lab compare eight_schools --guide block --guide flow --out out",
        ),
    ),
    "fit": (
        fit_command,
        (
            "pyro-vi-lab fit eight_schools --out fits",
            "pyro-vi-lab fit file.py:model --data d.csv --time-budget 60 --out fits",
            "pyro-vi-lab fit package.module:model --data d.json --out fits --json",
        ),
    ),
    "nuts": (
        nuts_command,
        (
            "pyro-vi-lab nuts eight_schools --out draws",
            "pyro-vi-lab nuts file.py:model --data d.csv --chains 8 --out draws",
        ),
    ),
    "trust": (
        trust_command,
        (
            "pyro-vi-lab trust eight_schools",
            "pyro-vi-lab trust file.py:model --data d.csv --guide auto --require trust",
        ),
    ),
    "report": (
        report_command,
        ("pyro-vi-lab report demo", "pyro-vi-lab report out file.py:model --data d.csv"),
    ),
    "export": (export_command, ("pyro-vi-lab export demo/nuts.nc demo/nuts.zarr",)),
    "models": (models_command, ("pyro-vi-lab models",)),
    "explain": (
        explain_command,
        ("pyro-vi-lab explain eight_schools", "pyro-vi-lab explain file.py:model --data d.csv --guide flow"),
    ),
}
"""Name to the command and its examples."""

for name, (command, examples) in COMMANDS.items():
    # lines after \b stay lines
    shown = "\n".join(f"  {example}" for example in examples)
    app.command(name, help=f"{inspect.getdoc(command)}\n\n\b\nExamples:\n{shown}")(errors_in_words(command))


def main() -> None:
    """Run the command line."""
    app(prog_name="pyro-vi-lab")
