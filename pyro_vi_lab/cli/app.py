"""The command line: its commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import typer

from pyro_vi_lab.cli.about import explain_command, models_command
from pyro_vi_lab.cli.comparing import compare_command
from pyro_vi_lab.cli.fitting import fit_command, nuts_command
from pyro_vi_lab.cli.options import errors_in_words

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
            "pyro-vi-lab compare my_model.py:model --data d.csv --out out",
            "pyro-vi-lab compare eight_schools --guide full_rank --guide flow --out demo",
        ),
    ),
    "fit": (
        fit_command,
        (
            "pyro-vi-lab fit eight_schools --out fits",
            "pyro-vi-lab fit my_model.py:model --data d.csv --guide flow --time-budget 60 --out fits",
            "pyro-vi-lab fit my_package.models:model --data d.json --out fits --json --quiet",
        ),
    ),
    "nuts": (
        nuts_command,
        (
            "pyro-vi-lab nuts eight_schools --out draws",
            "pyro-vi-lab nuts my_model.py:model --data d.csv --target-accept 0.95 --out draws",
        ),
    ),
    "models": (models_command, ("pyro-vi-lab models",)),
    "explain": (
        explain_command,
        ("pyro-vi-lab explain eight_schools", "pyro-vi-lab explain my_model.py:model --data d.csv --guide flow"),
    ),
}
"""Name to the command and its examples."""

for name, (command, examples) in COMMANDS.items():
    # every paragraph of an epilog is a line of its own
    app.command(name, epilog="\n\n".join(["Examples:", *examples]))(errors_in_words(command))


def main() -> None:
    """Run the command line."""
    app(prog_name="pyro-vi-lab")
