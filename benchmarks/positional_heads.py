"""How much of GPT-2's positional scores is about distance, and whether that tells what rotary positions cost a head.

    python benchmarks/positional_heads.py DIRECTORY [--out docs/results/positional_heads.json]

DIRECTORY holds ``model.safetensors`` with the table of positions, the attention and the layer norms of GPT-2 124M under
Hugging Face's names; no other weight counts. The shares are those of `gptlab.inspecting.relative_shares`; the control
has queries and keys drawn at random, of the same standard deviation in each layer. The built-in `pocket` is whole, so
there the shares stand beside what a conversion does to each head's attention on a text that it was not fitted on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import gptlab
from gptlab import GPT, ModelConfig
from gptlab.conversion.calibration import calibration_rows
from gptlab.conversion.rotary import to_rope
from gptlab.inspecting import relative_shares

CONTROLS = 5
ROWS = 24
"""Of the calibration text: the first half to fit a conversion on, the second to compare attention on."""


def gpt2(file: Path) -> GPT:
    """Return GPT-2 124M with the table, attention and first norms of a file, and next to nothing of the rest."""
    model = GPT(ModelConfig.preset("gpt2", vocab_size=1, n_inner=1))
    with safe_open(file, "pt") as real, torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attn." in name or ".ln_1." in name or name == "wpe.weight":
                tensor = real.get_tensor(name)
                parameter.copy_(tensor.T if ".attn." in name and tensor.ndim == 2 else tensor)
    return model


def controls(model: GPT) -> list[Tensor]:
    """The shares of distance of heads whose queries and keys are random."""
    kept = [block.attn.c_attn.weight.detach().clone() for block in model.blocks]
    found = []
    with torch.no_grad():
        for seed in range(CONTROLS):
            draw = torch.Generator().manual_seed(seed)
            for block, weight in zip(model.blocks, kept, strict=True):
                block.attn.c_attn.weight.normal_(0, weight.std().item(), generator=draw)
            found.append(relative_shares(model).distance)
        for block, weight in zip(model.blocks, kept, strict=True):
            block.attn.c_attn.weight.copy_(weight)
    return found


def ranks(values: Tensor) -> Tensor:
    return values.flatten().argsort().argsort().double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; no two values are the same."""
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@torch.no_grad()
def drifts(source: GPT, converted: GPT, rows: list[Tensor]) -> Tensor:
    """(L, H): the mean over queries of KL(attention before || attention after)."""
    total = torch.zeros(source.config.n_layer, source.config.n_head, dtype=torch.float64)
    for row in rows:
        for layer in range(source.config.n_layer):
            before, after = (model.attention_maps(row[None], layer)[0].double() for model in (source, converted))
            total[layer] += torch.special.xlogy(before, before / after.clamp_min(1e-12)).nansum(-1).mean(-1)
    return total / len(rows)


def built_in(name: str) -> dict[str, Any]:
    """The shares of a built-in model's heads, and what two conversions do to their attention."""
    lm = gptlab.load(name)
    length = lm.config.context_length
    rows = calibration_rows(lm.needs_tokenizer(), length, ROWS * length)
    fitted_on, others = rows[: len(rows) // 2], list(rows[len(rows) // 2 :])
    share, result = relative_shares(lm.model).distance, {}
    result["distance"] = rounded(share)
    for method in ("abrupt", "fit"):
        converted = to_rope(lm.model, method=method, rows=fitted_on)  # type: ignore[arg-type]
        drift = drifts(lm.model, converted, others)
        result[method] = {"drift": rounded(drift), "rank_correlation": round(rank_correlation(share, drift), 3)}
    return {"model": name, "rows": len(others), "length": length, **result}


def rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = gpt2(arguments.directory / "model.safetensors")
    shares, random = relative_shares(model), controls(model)
    result = {
        "work": "of the variance of p_t^T M_h p_s between the keys of a query, positions 0 to 1,023 of GPT-2 124M",
        "torch": torch.__version__,
        "distance": rounded(shares.distance),
        "rotary_short_of_distance_at_most": round((shares.distance - shares.rotary).max().item(), 5),
        "control": [round(one.mean().item(), 4) for one in random],
        "control_by_layer": [round(row.mean().item(), 4) for row in torch.stack(random).transpose(0, 1)],
        "control_above": round(
            statistics.fmean((one >= shares.distance.median()).double().mean().item() for one in random), 4
        ),
        "built_in": built_in("pocket"),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        arguments.out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
