"""A log likelihood of 40 million values takes hardly more memory than these, and seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, time
from pathlib import Path
import pyro, pyro.distributions as dist, torch
import pyro_vi_lab as vl

torch.set_num_threads(1)

def kib(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

def model(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(5), 5.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(a + x @ b, s), obs=y)

generator = torch.Generator().manual_seed(0)
x = torch.randn(10_000, 5, generator=generator, dtype=torch.float64)
y = x.sum(-1) + torch.randn(10_000, generator=generator, dtype=torch.float64)
problem = vl.Problem(model, x, y)
start = vl.fit(problem, progress=False)
nuts = vl.nuts(problem, num_chains=4, num_warmup=50, num_draws=1000, start=start, progress=False)
few = vl.Posterior({name: value[:, :2] for name, value in nuts.draws.items()})
vl.to_arviz(few, problem=problem)  # imports ArviZ, which takes seconds
found = {}
for name, options in (("log_likelihood", {"predictive": False}), ("both", {})):
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory is counted from now on
    before, began = kib("VmRSS"), time.process_time()
    tree = vl.to_arviz(nuts, problem=problem, **options)
    seconds, memory = time.process_time() - began, 1024 * (kib("VmHWM") - before)
    groups = ["log_likelihood"] if name == "log_likelihood" else ["log_likelihood", "posterior_predictive"]
    assert tree["log_likelihood"]["y"].shape == (4, 1000, 10_000)
    size = sum(tree[group]["y"].nbytes for group in groups)
    found[name] = {"seconds": seconds, "times": memory / size}
    if name == "log_likelihood":
        kept = tree  # or the next one would take over its memory
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is read from /proc")
def test_the_log_likelihood_of_ten_thousand_rows_is_made_in_place() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    # seconds of one core: others may be busy
    assert found["log_likelihood"]["seconds"] < 3, found
    assert max(value["times"] for value in found.values()) < 1.5, found
