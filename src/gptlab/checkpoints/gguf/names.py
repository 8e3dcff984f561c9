"""What llama.cpp calls the parts of a model."""

from __future__ import annotations

ARCHITECTURES = {"gpt2": "learned", "starcoder2": "rope"}
"""The architectures that are read and written, each with its positions."""
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "lm_head.weight": "output.weight",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
