"""The model itself: its sites, its source, and its graph."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import subprocess
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_vi_lab.errors import LabError
from pyro_vi_lab.isolation import model_run
from pyro_vi_lab.report.figures.graph import NodeText, graph_picture, node_size
from pyro_vi_lab.user_errors import user_errors

if TYPE_CHECKING:
    from pyro_vi_lab.problem import Problem

MAX_SITES = 200
MAX_NODES = 60
"""Sites beyond which a graph is a knot."""
MAX_SOURCE = 400
LAYOUT_SECONDS = 20


def site_rows(problem: Problem) -> list[dict[str, str]]:
    """Kind, distribution, shape and support of the first sites."""
    return [
        {
            "name": name,
            "kind": site.kind,
            "distribution": site.distribution,
            "shape": " × ".join(map(str, site.shape)) or "scalar",
            "dims": ", ".join(problem.dims(name)),
            "support": str(site.support) if site.kind in ("latent", "discrete") else "",
        }
        for name, site in list(problem.sites.items())[:MAX_SITES]
    ]


def source(model: Any) -> tuple[str, str]:
    """The lines that define a model, and why there are none if so.

    Example:
        >>> source(len)
        ('', 'Python has no source of it: it was not read from a file.')
    """
    while isinstance(model, functools.partial):
        model = model.func
    definition = model if inspect.isroutine(model) or inspect.isclass(model) else type(model)
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(definition)))
    except (OSError, TypeError, ValueError):
        return "", "Python has no source of it: it was not read from a file."
    lines = text.rstrip().splitlines()
    if len(lines) > MAX_SOURCE:
        return "\n".join(lines[:MAX_SOURCE]), f"The first {MAX_SOURCE} of {len(lines)} lines."
    return "\n".join(lines), ""


def graph(problem: Problem) -> tuple[str, str]:
    """Picture of how the sites depend on one another, and why there is none if so.

    The relations are those of ``pyro.render_model``; ``dot`` of Graphviz places them, and sees numbers in place of
    names, so that no name can be taken for a part of its language.
    """
    if len(problem.sites) > MAX_NODES:
        return "", f"It is not drawn: {len(problem.sites)} sites are too many for a picture."
    dot = shutil.which("dot")
    if dot is None:
        return "", "It is not drawn: the program dot of Graphviz is not installed."
    try:
        specification = relations(problem)
    except (LabError, NotImplementedError) as error:
        return "", f"It is not drawn: {error}"
    nodes = list(specification["node_data"])
    plates = [plate for plate in specification["plate_groups"] if plate is not None]
    texts = [_text(problem, name, specification["node_data"][name]) for name in nodes]
    try:
        run = subprocess.run(
            [dot, "-Tjson"],
            input=_dot(specification, nodes, plates, texts),
            capture_output=True,
            text=True,
            timeout=LAYOUT_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        return "", f"It is not drawn: dot of Graphviz failed ({type(error).__name__})."
    labels = [_plate_label(problem, plate) for plate in plates]
    return graph_picture(json.loads(run.stdout), texts, labels, name=problem.name), ""


def relations(problem: Problem) -> dict[str, Any]:
    """Sites, plates and edges as ``pyro.render_model`` finds them.

    Raises:
        ModelError: The model cannot be run for this.
        NotImplementedError: Plates that overlap.
    """
    from pyro.infer.inspect import generate_graph_specification, get_model_relations

    args, kwargs = problem.args, problem.kwargs
    if problem.example is not None:
        args, kwargs = problem.example.args, problem.example.kwargs
    with user_errors(problem.name), model_run(seed=0, dtype=problem.dtype, validate=False):
        found = get_model_relations(problem.model, args, kwargs, include_deterministic=True)
    result: dict[str, Any] = generate_graph_specification(found)
    return result


def _text(problem: Problem, name: str, data: Mapping[str, Any]) -> NodeText:
    kind = problem.sites[name].kind if name in problem.sites else "latent"
    look = "deterministic" if kind == "deterministic" else "observed" if data["is_observed"] else "latent"
    distribution = "" if kind == "deterministic" else str(data["distribution"])
    return NodeText(name, distribution, look)


def _plate_label(problem: Problem, plate: str) -> str:
    name = plate.split("__CLONE")[0]
    sizes = {one[1] for site in problem.sites.values() for one in site.plates if one and one[0] == name}
    return f"{name} · {sizes.pop():,}" if len(sizes) == 1 else name


def _dot(specification: Mapping[str, Any], nodes: list[str], plates: list[str], texts: list[NodeText]) -> str:
    """The graph in the language of dot, with numbers for names."""
    parents = {plate: specification["plate_data"][plate]["parent"] for plate in plates}
    groups = specification["plate_groups"]
    inner: dict[str | None, set[str]] = {plate: set() for plate in plates}
    for plate in plates:
        above = parents[plate]
        while above is not None:
            inner[above] |= set(groups[plate])
            above = parents[above]

    def block(plate: str | None) -> str:
        own = [name for name in groups[plate] if plate is None or name not in inner[plate]]
        lines = [_node(nodes.index(name), texts[nodes.index(name)]) for name in own]
        lines += [
            f'subgraph cluster_{plates.index(child)} {{ label=" "; labelloc=b; {block(child)} }}'
            for child in plates
            if parents[child] == plate
        ]
        return " ".join(lines)

    edges = " ".join(f"n{nodes.index(a)} -> n{nodes.index(b)};" for a, b in specification["edge_list"])
    return f"digraph {{ nodesep=0.35; ranksep=0.4; {block(None)} {edges} }}"


def _node(i: int, text: NodeText) -> str:
    width, height = node_size(text)
    return f'n{i} [label="" shape=ellipse fixedsize=true width={width / 72:.3f} height={height / 72:.3f}];'
