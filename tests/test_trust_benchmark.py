"""The page of verdicts, from rows made by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.store import Store
from benchmarks.trust import page


def row(decision: str, *, wrong: bool | None, seconds: float = 0.5) -> dict[str, object]:
    found: dict[str, object] = {
        "status": "converged",
        "decision": decision,
        "suggestions": ["full_rank"] if decision == "refine" else [],
        "reasons": ["because"],
        "fit_seconds": 1.0,
        "seconds": seconds,
    }
    if wrong is not None:
        found |= {"wrong": wrong, "shift": 0.5 if wrong else 0.1, "min_ratio": 0.9, "max_ratio": 1.1}
    return found


def test_the_page_counts_and_explains_every_miss(tmp_path: Path) -> None:
    store = Store(tmp_path, "trust")
    rows = {
        "a|mean_field|0": row("refine", wrong=True),
        "a|mean_field|1": row("trust", wrong=True),
        "a|full_rank|0": row("trust", wrong=False),
        "a|full_rank|1": row("sample", wrong=False, seconds=3.0),
        "b|full_rank|0": row("refine", wrong=None),
    }
    for key, one in rows.items():
        store.put("fast", key, one)
    store.put("thorough", "a|mean_field|0", row("refine", wrong=True, seconds=1.0))
    store.put("nuts", "a", {"seconds": 2.0, "gradients": 5, "problems": []})
    ended = {"method": "full_rank", "changes": ["non-center x"], "path": ["mean_field: refine"], "seconds": 2.0}
    store.put("auto", "a|0", ended | {"wrong": False, "shift": 0.1, "min_ratio": 0.9, "max_ratio": 1.1})
    text = page.render(store)
    assert "| right | 1 | 0 | 0 | 1 |" in text
    assert "| wrong | 1 | 0 | 1 | 0 |" in text
    assert "| diverged | 0 | 0 | 1 | 0 |" in text
    assert "Wrong fits called `trust`: 1 of 2 (goal 0). Right fits not called `trust`: 1 of 2, 50.0%" in text
    assert "| a | mean_field | 1 | wrong | trust | 0.50 | 0.90–1.10 | because |" in text
    assert "| a | full_rank | 1 | right | sample | 0.10 | 0.90–1.10 | because |" in text
    assert "It took longer than the fit and one second in 1 of 4 (goal 0)." in text
    assert "in 1 of 1 (goal all)" in text
    assert "| a | 0 | full_rank, non-center x | right | 0.10 | 0.90–1.10 | 2.0 | mean_field: refine |" in text
