# Shared keys and values of OpenAI's 124M: at most the errors of an independent computation.
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gptlab import GPT, ModelConfig
from gptlab.conversion.circuits import circuit_errors
from gptlab.conversion.heads import regroup
from gptlab.conversion.layers import read_heads
from gptlab.conversion.statistics import assumed_statistics

MEASURED = [(5, 6, 0.164, 0.185), (5, 4, 0.256, 0.287), (5, 1, 0.438, 0.474), (11, 4, None, 0.121)]
"""Layer, n_kv_head, and the errors of QK and OV of a joint factorisation: weights alone, neighbours sharing."""


@pytest.mark.parametrize(("layer", "n_kv_head", "qk", "ov"), MEASURED)
def test_svd_loses_no_more_than_was_measured_elsewhere(
    shared: Path, layer: int, n_kv_head: int, qk: float | None, ov: float
) -> None:
    file = shared / "models" / "gpt2-attention" / "model.safetensors"
    if not file.exists():
        pytest.skip("../shared/models/gpt2-attention is absent")
    model = GPT(ModelConfig.preset("gpt2", n_layer=1, vocab_size=1, context_length=1, n_inner=1))
    with safe_open(file, "pt") as real, torch.no_grad():
        for name, parameter in model.blocks[0].named_parameters():
            if name.startswith(("attn.", "ln_1.")):
                tensor = real.get_tensor(f"h.{layer}.{name}")
                parameter.copy_(tensor.T if tensor.ndim == 2 else tensor)  # Conv1D
    new = regroup(model, n_kv_head, method="svd", grouping="contiguous")
    block = model.blocks[0]
    errors = circuit_errors(read_heads(block.attn), read_heads(new.blocks[0].attn), assumed_statistics(block))
    for error, most in zip(errors, (qk, ov), strict=True):
        assert most is None or 0.5 * most < error <= most + 5e-4  # the figures have three digits
