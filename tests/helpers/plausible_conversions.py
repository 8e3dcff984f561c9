# Results of a study of conversions, from numbers that nobody measured.
from __future__ import annotations

from typing import Any

from gptlab.config import ModelConfig
from gptlab.model import cost
from helpers import plausible

FIELDS = {"rope": "position", "gqa": "n_kv_head", "swa": "window"}
SHARES = (0.0, 0.01, 0.05)
OF, LOSS = 8_192_000, (4.4, 4.39, 4.38)
MADE: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "longer": ({}, (0.0, 0.0, 0.0)),
    "svd": ({"n_kv_head": 2, "method": "svd"}, (0.01, 0.004, 0.0001)),
    "mean": ({"n_kv_head": 2, "method": "mean"}, (0.2, 0.06, 0.03)),
    "rope": ({"position": "rope"}, (2.0, 0.5, 0.1)),
    "swa": ({"window": 128}, (-0.01, -0.02, -0.03)),
    "all": ({"n_kv_head": 2, "position": "rope", "window": 128}, (2.2, 0.6, 0.2)),
}


def interval(mean: float, half: float = 0.006) -> dict[str, Any]:
    method = "paired bootstrap over documents"
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 39, "unit": "nats per token", "method": method}


def conversion_results(only: tuple[str, ...] = tuple(MADE), uptrained: bool = True) -> dict[str, Any]:
    """`results.json` of a study of conversions; as the runner writes it, by name."""
    results = plausible.results([()])
    shares = SHARES if uptrained else SHARES[:1]
    for name in only:
        changes, added = MADE[name]
        fields = {key: value for key, value in changes.items() if key != "method"}
        config = ModelConfig.preset("pocket", **fields)
        parts = cost.parameters(config)
        alike = [n for n in only if n != name and {**MADE[n][0], "method": 0} == {**changes, "method": 0} and changes]
        looks = []
        for i, share in enumerate(shares):
            rivals = {other: interval(added[i] - MADE[other][1][i]) for other in alike}
            gap = None if name == "longer" and i else interval(added[i])
            look = {"share": share, "tokens": int(share * OF), "nats_per_token": LOSS[i] + added[i]}
            looks.append({**look, "by_run": [LOSS[i] + added[i]], "difference": gap, "rivals": rivals})
        values = plausible.variant((), label=f"by {name}", source="converted", changes=fields, config=config.to_dict())
        about = {"changes": changes, "steps": ["a -> b"] if changes else [], "settings": [], "checkpoints": looks}
        values |= {
            "conversion": {**about, "divergence": 0.5, "divergence_tokens": 8000},
            "parameters": {**parts, "total": sum(parts.values())},
            "tokens_trained": OF + looks[-1]["tokens"],
            "kinds": [kind for kind, field in FIELDS.items() if field in changes],
            "reference": "longer" if uptrained and name != "longer" else "base",
            "difference": interval(added[len(shares) - 1]),
        }
        results["variants"][name] = values
    recipe = {"schedule": {"kind": "cosine"}, "budget": {"steps": 1}}
    results["study"] |= {
        "name": "mine",
        "conversion": {
            "calibration": "about 30 tokens of a text",
            "reference": "longer" if uptrained else None,
            "pretraining_tokens": OF if uptrained else None,
            "recipe": recipe if uptrained else None,
        },
    }
    return results
