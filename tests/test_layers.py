"""Imports only point down: the layers of the package, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_vi_lab"

# From the bottom up. A name is a flat module or, ending in a slash, a folder.
LAYERS = (
    (
        "agreement",
        "arviz_bridge",
        "errors",
        "isolation",
        "kmeans",
        "labels",
        "missing_moments",
        "mixture_moments",
        "mixture_prior",
        "phases",
        "plugins",
        "positive_definite",
        "simplification",
        "tree_names",
        "whole_files",
    ),
    ("archive",),
    ("c_builder", "c_emitter", "c_expressions", "c_library", "c_schedule"),
    ("c_operators/",),
    ("c_source",),
    ("native",),
    (
        "arguments",
        "batches",
        "capture",
        "change_of_variables",
        "data",
        "layer_noise",
        "loader",
        "many_runs",
        "pointwise",
        "posterior",
        "program",
        "row_layout",
        "row_sums",
        "rows",
        "sites",
        "user_errors",
    ),
    ("guards", "tiers"),
    ("fused_adam", "loss_graph", "loss_trace", "places"),
    ("loss_call",),
    ("captured_loss",),
    ("captured",),
    ("density", "families/"),
    ("density_batch", "problem", "whitened"),
    ("objectives/", "guides/", "models/"),
    ("natural_parts/", "checks/", "trust_region"),
    ("fixed_draws", "natural_gradient"),
    (
        "batch_and_match",
        "callbacks",
        "conjugate_fit",
        "conjugate_mixture",
        "coordinate_ascent",
        "density_engine",
        "density_fit",
        "density_stages",
        "em",
        "em_steps",
        "escalation",
        "expected_log_joint",
        "fit",
        "fit_epochs",
        "fit_guide",
        "flow_fit",
        "heavy_tails",
        "hierarchy",
        "fit_progress",
        "fitted",
        "mixture_bayes",
        "mixture_fit",
        "mixture_stream",
        "mode_fit",
        "natural_step",
        "nutpie_bridge",
        "nuts",
        "program_draws",
        "program_engine",
        "program_fit",
        "program_traces",
        "provenance",
        "row_weights",
        "saved_fit",
        "second_order_fit",
        "trust",
        "trust_advice",
        "trust_evidence",
        "trust_further",
        "trust_gathered",
        "trust_judgement",
        "verdict",
        "tensorboard",
        "whole_step",
    ),
    ("arviz_groups", "checkpoint", "explain", "export", "model_choice", "pyro_results", "report/", "simulation"),
    ("compare", "simulated_fits"),
    ("calibration",),
    ("cli/",),
    ("__init__", "__main__"),
)
LAYER_OF = {name.rstrip("/"): level for level, names in enumerate(LAYERS) for name in names}

# Third-party packages that only some parts may import.
ONLY_IN: Mapping[str, frozenset[str]] = {
    "arviz": frozenset({"arviz_bridge"}),
    "arviz_base": frozenset({"arviz_bridge"}),
    "arviz_plots": frozenset({"arviz_bridge"}),
    "arviz_stats": frozenset({"arviz_bridge"}),
    "argparse": frozenset({"cli"}),
    "typer": frozenset({"cli"}),
    "zuko": frozenset(),  # its import switches off Pyro's argument checks, for everyone
}
WITHOUT_PYRO = frozenset({"families", "checks"})
JUNK_DRAWERS = frozenset({"utils", "util", "misc", "helpers", "helper", "common"})


def source_modules(package: Path) -> dict[str, Path]:
    """Dotted name of every module below ``package``, and its file."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, also those inside functions, but not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).split(".")[-1] == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from statements(other)
        else:
            yield child
            yield from statements(child)


def imported_names(module: str, path: Path) -> set[str]:
    """Absolute dotted names of all that ``module`` imports; ``from a import b`` is ``a.b``."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def unit(module: str) -> str:
    """The layer table's name of a module: ``pkg.guides.flow`` is ``guides``, ``pkg`` is ``__init__``."""
    return [*module.split("."), "__init__"][1]


def internal_target(name: str, modules: Mapping[str, Path]) -> str:
    """The module of the package that the imported ``name`` is or lives in."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def broken_rules(package: Path) -> list[str]:
    """One sentence for every import and name in ``package`` that breaks a rule of the layers."""
    modules = source_modules(package)
    broken = [f"{m}: a junk drawer; name the concept" for m in modules if m.split(".")[-1] in JUNK_DRAWERS]
    broken += [f"{m}: has no layer; add {unit(m)!r} to LAYERS" for m in modules if unit(m) not in LAYER_OF]
    sideways: dict[str, set[str]] = {}
    for module, path in modules.items():
        here = unit(module)
        for name in sorted(imported_names(module, path)):
            top = name.split(".")[0]
            if top != package.name:
                if here not in ONLY_IN.get(top, {here}):
                    allowed = " and ".join(sorted(ONLY_IN[top])) or "nothing"
                    broken.append(f"{module} imports {name}: only {allowed} may")
                if top == "pyro" and here in WITHOUT_PYRO:
                    broken.append(f"{module} imports {name}: {here}/ knows no Pyro")
                continue
            target = internal_target(name, modules)
            there = unit(target)
            if here == there or here not in LAYER_OF or there not in LAYER_OF:
                continue
            if LAYER_OF[there] > LAYER_OF[here]:
                broken.append(f"{module} (layer {LAYER_OF[here]}) imports {target} (layer {LAYER_OF[there]}): up")
            elif LAYER_OF[there] == LAYER_OF[here]:
                if (package / here).is_dir() or (package / there).is_dir():
                    broken.append(f"{module} imports {target}: sideways between a folder and its layer")
                sideways.setdefault(here, set()).add(there)
    try:
        TopologicalSorter(sideways).prepare()
    except CycleError as error:
        broken.append(f"cycle inside a layer: {' <- '.join(error.args[1])}")
    return broken


def test_imports_of_the_package_point_down() -> None:
    assert len(source_modules(PACKAGE)) > 1
    assert broken_rules(PACKAGE) == []


def write_package(directory: Path, sources: Mapping[str, str]) -> Path:
    package = directory / "pyro_vi_lab"
    for name, text in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_all_ways_to_import_downwards_are_allowed(tmp_path: Path) -> None:
    sources = {
        "__init__.py": "from . import fit, guides\nfrom .guides import Flow",
        "errors.py": "import torch",
        "isolation.py": "from .errors import LabError",
        "arviz_bridge.py": "def f():\n    import arviz",
        "problem.py": "import typing\nif typing.TYPE_CHECKING:\n    from .fit import Fit",
        "fit.py": "import pyro_vi_lab.guides.flow\nfrom pyro_vi_lab import problem",
        "guides/__init__.py": "from .flow import Flow",
        "guides/flow.py": "from . import base\nfrom ..errors import LabError\nimport pyro\nclass Flow: ...",
        "guides/base.py": "from pyro_vi_lab.guides.flow import Flow",
        "families/normal.py": "import torch",
        "cli.py": "import typer",
    }
    assert broken_rules(write_package(tmp_path, sources)) == []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (
            {"problem.py": "from pyro_vi_lab.fit import fit", "fit.py": ""},
            f"imports pyro_vi_lab.fit (layer {LAYER_OF['fit']}): up",
        ),
        ({"problem.py": "from .fit import fit", "fit.py": ""}, "up"),
        ({"problem.py": "from . import fit", "fit.py": ""}, "up"),
        ({"problem.py": "import pyro_vi_lab.fit", "fit.py": ""}, "up"),
        ({"problem.py": "def f():\n    from pyro_vi_lab.fit import fit", "fit.py": ""}, "up"),
        ({"problem.py": "try:\n    pass\nexcept ImportError:\n    from .fit import fit", "fit.py": ""}, "up"),
        ({"problem.py": "if not TYPE_CHECKING:\n    from .fit import fit", "fit.py": ""}, "up"),
        ({"problem.py": "if TYPE_CHECKING:\n    pass\nelse:\n    from .fit import fit", "fit.py": ""}, "up"),
        (
            {"problem.py": "import pyro_vi_lab", "__init__.py": ""},
            f"imports pyro_vi_lab (layer {LAYER_OF['__init__']}): up",
        ),
        (
            {"problem.py": "from pyro_vi_lab import Fit", "__init__.py": ""},
            f"imports pyro_vi_lab (layer {LAYER_OF['__init__']}): up",
        ),
        ({"guides/flow.py": "from ..fit import fit", "fit.py": "", "guides/__init__.py": ""}, "up"),
        ({"guides/__init__.py": "from ..fit import fit", "fit.py": ""}, "up"),
        ({"guides/flow.py": "from ..objectives import ELBO", "objectives.py": ""}, "sideways"),
        ({"objectives.py": "from .guides import flow", "guides/flow.py": ""}, "sideways"),
        ({"models/a.py": "from ..guides import flow", "guides/flow.py": ""}, "sideways"),
        (
            {"capture.py": "from .sites import a", "sites.py": "from .capture import b"},
            "cycle inside a layer",
        ),
        ({"plots.py": ""}, "pyro_vi_lab.plots: has no layer; add 'plots' to LAYERS"),
        ({"guides/utils.py": ""}, "junk drawer"),
        ({"fit.py": "def f():\n    import arviz as az"}, "imports arviz: only arviz_bridge may"),
        ({"fit.py": "from arviz_stats.base import array_stats"}, "only arviz_bridge may"),
        ({"compare.py": "import typer"}, "only cli may"),
        ({"guides/flow.py": "import zuko"}, "only nothing may"),
        ({"families/normal.py": "from pyro.distributions import Normal"}, "knows no Pyro"),
        ({"checks/pareto.py": "import pyro"}, "knows no Pyro"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, sources: dict[str, str], expected: str) -> None:
    # `import pyro_vi_lab.x` needs the package itself to be there.
    (sentence,) = broken_rules(write_package(tmp_path, {"__init__.py": "", **sources}))
    assert expected in sentence
