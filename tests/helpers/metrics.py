"""The metrics of a run that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

START = {"event": "start", "step": 0, "steps": 100, "tokens_per_step": 64, "name": "pocket", "resumed_from": None}


def step(n: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    rate = 1e-3 * min(n / 20, 1)
    row = {"event": "step", "step": n, "tokens": 64 * n, "loss": 3 + 5 / n if loss is None else loss}
    return row | {"learning_rate": rate, "seconds": n / 8, "tokens_per_second": 512.0, **more}


def evaluation(n: int, loss: float) -> dict[str, Any]:
    return {"event": "evaluate", "step": n, "tokens": 64 * n, "validation_loss": loss, "seconds": n / 8}


ROWS = [START, *(step(n) for n in range(10, 60, 10)), evaluation(50, 3.3), *(step(n) for n in range(60, 110, 10))]
ROWS += [evaluation(100, 3.2), {"event": "end", "step": 100, "reason": "finished", "validation_loss": 3.2}]


def write(run: Path, rows: list[dict[str, Any]], tail: bytes = b"") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + tail)
    return run
