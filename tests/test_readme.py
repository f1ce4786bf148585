"""The README says only what works: its code runs, its commands parse, its links and make verbs exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from pyro_vi_lab import Status
from pyro_vi_lab.cli import app
from pyro_vi_lab.compare import COLUMNS
from tests.examples import assert_parses, blocks, commands

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the Python blocks leave behind, run one after another as they stand, in an empty directory."""
    names: dict[str, Any] = {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for number, block in enumerate(blocks(README, "python")):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    return names


def test_the_first_example_is_short() -> None:
    lines = [line for line in blocks(README, "python")[0].splitlines() if line]
    assert len(lines) <= 15


def test_the_examples_do_what_their_comments_say(ran: dict[str, Any]) -> None:
    assert ran["fit"].status is Status.CONVERGED
    comment = re.search(r"print\(fit\.message\)  # (.*)", README)
    assert comment is not None
    assert ran["fit"].message == comment[1]
    assert ran["reference"].problems() == []
    assert list(ran["comparison"].fits) == ["mean_field", "full_rank"]
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data"):
        assert group in ran["tree"]


def test_the_loop_of_the_readme_reaches_the_optimum_of_fit(ran: dict[str, Any]) -> None:
    """KL(loop ‖ fit), both normal on the same z, against the noise that is left at a constant step size.

    A natural step of size ρ from K particles leaves an expected KL of ρ/(2 - ρ)·P/(2K) in P parameters, where the
    gradient of one particle has Fisher variance 1 per parameter, as the score of q has. Sticking-the-landing gradients
    of a target close to normal have less. The KL of the last step alone has a heavy tail: ten times its expectation are
    allowed, and the loop starts a hundred times further away.
    """
    guide, fit = ran["guide"], ran["fit"]
    normal = torch.distributions.MultivariateNormal
    loop = normal(guide.loc.detach().double(), scale_tril=guide.scale_tril.detach().double())
    best = normal(fit.loc, scale_tril=fit.params.scale[0])
    dim = len(fit.loc)
    num_parameters = dim + dim * (dim + 1) // 2
    lr, num_particles = 0.5, 64
    assert f"lr={lr}" in README
    assert f"num_particles={num_particles}" in README
    left = lr / (2 - lr) * num_parameters / (2 * num_particles)
    start = normal(torch.zeros_like(fit.loc), scale_tril=0.1 * torch.eye(dim, dtype=fit.loc.dtype))
    assert torch.distributions.kl_divergence(start, best) > 100 * left
    assert torch.distributions.kl_divergence(loop, best) < 10 * left


def test_the_printed_columns_of_the_example_are_all_shown(ran: dict[str, Any]) -> None:
    found = re.search(r"comparison\.table\(\)\[(\[.*?\])\]", README)
    assert found is not None
    shown = ran["comparison"].table()[re.findall(r'"(\w+)"', found[1])]
    assert "..." not in str(shown)


def test_the_first_block_is_a_model_file_for_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schools.py").write_text(blocks(README, "python")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (line,) = [words for words in commands(README) if words[:2] == ["pyro-vi-lab", "fit"]]
    result = CliRunner().invoke(app, line[1:])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "schools").iterdir()] == [f"{line[line.index('--guide') + 1]}.nc"]


@pytest.mark.parametrize("words", [words for words in commands(README) if words[0] == "pyro-vi-lab"], ids=shlex.join)
def test_commands_parse(words: list[str]) -> None:
    assert_parses(words)


def test_every_command_is_in_the_readme() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == {words[1] for words in commands(README) if words[0] == "pyro-vi-lab"}


def test_options_in_the_text_exist() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    group: Any = typer.main.get_command(app)
    known = {option for command in group.commands.values() for p in command.params for option in p.opts}
    named = set(re.findall(r"`(--[\w-]+)`", text))
    assert named
    assert named <= known


def test_make_verbs_exist() -> None:
    code = "\n".join([*blocks(README, "sh"), *re.findall(r"`([^`\n]+)`", README)])
    verbs = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert {"demo", "test"} <= verbs
    assert verbs <= targets


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    local = [link for link in links if "://" not in link]
    assert {"LICENSE", "CONTRIBUTING.md", "docs/report.png", "tutorials/01_first_posterior.ipynb"} <= set(local)
    headings = re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    missing = [link for link in local if not (link in anchors if link.startswith("#") else (ROOT / link).is_file())]
    assert missing == []


def test_pictures_have_a_text_and_are_small() -> None:
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", README))
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 400_000, picture.name


def test_the_pinned_torch_is_the_one_of_the_constraints() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned is not None
    assert set(re.findall(r"torch==([\d.]+)", README)) == {pinned[1]}


def test_columns_of_the_table_exist() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", section("How to read the table"), flags=re.MULTILINE)
    named = [name for cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert {"khat", "max_mean_shift"} <= set(named)
    assert set(named) - {"table"} <= set(COLUMNS)
