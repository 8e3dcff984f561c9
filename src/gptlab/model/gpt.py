"""GPT-2 (Radford et al. 2019), top to bottom.

    ids -> token embedding + position embedding -> n_layer blocks -> norm -> logits

Each block adds to a float32 residual stream twice: what its attention gathers from earlier tokens, and what
its feed-forward network computes at each token on its own. Shapes stand at the ends of lines: B sequences
of T tokens, C = n_embd channels, H heads of width D, V = vocab_size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.config import ModelConfig, RopeConfig
from gptlab.errors import GptlabError
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.cache import Cache, Full
from gptlab.model.checks import check_input
from gptlab.model.linear import Linear
from gptlab.model.masks import Tokens
from gptlab.model.rope import Rotary, frequencies

Head = Callable[[Tensor, Linear], Any]
# GPT-2 was trained with the tanh approximation; the exact erf form differs by up to 5e-4 a neuron.
ACTIVATIONS = {"gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu, "silu": F.silu}
SCALES = ("rope_scale", "wpe_scale")  # the only buffers, of position="blend"; always float32


def all_logits(hidden: Tensor, lm_head: Linear) -> Tensor:
    """The default head: (B, T, C) -> (B, T, V) float32."""
    return lm_head(hidden).float()


class LayerNorm(nn.Module):
    """Normalise each token's channels to mean 0 and variance 1, in float32, then scale and shift."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd)) if config.bias else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C) float32
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps)


class RMSNorm(nn.Module):
    """Divide each token's channels by their root mean square, in float32, then scale (Zhang & Sennrich 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C) float32
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class MLP(nn.Module):
    """The point-wise feed-forward network: C -> n_inner -> C at each token, with an activation between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)
        self.activation = cast(Callable[[Tensor], Tensor], ACTIVATIONS[config.activation])
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class SwiGLU(nn.Module):
    """The gated feed-forward network (Shazeer 2020): what one projection gives is multiplied by a gate, another's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_gate = Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_fc = Linear(config.n_embd, config.inner, bias=config.bias)
        self.c_proj = Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x)))


NORMS: dict[str, type[LayerNorm | RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}
MLPS: dict[str, type[MLP | SwiGLU]] = {"gelu": MLP, "swiglu": SwiGLU}


class Block(nn.Module):
    """One layer: attention between tokens, then computation at each; norms come first ("pre-norm")."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.run: Callable[..., Tensor] | None = None  # training puts `compute` here, compiled or checkpointed

    def forward(
        self, x: Tensor, tokens: Tokens, rotary: Rotary | None = None, cache: Full | None = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        return (self.run or self.compute)(x, tokens, rotary, cache)

    def compute(self, x: Tensor, tokens: Tokens, rotary: Rotary | None, cache: Full | None) -> Tensor:
        """Return what `forward` does."""
        x = x + self.attn(self.ln_1(x), tokens, rotary, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 of any size, randomly initialised.

    Parameter names are GPT-2's own. Weights are (out, in), the transpose of the original files.

    Args:
        config: the architecture.
        seed: start of the random initialisation (see `init_weights`).

    Attributes:
        rope_scale: with ``position="blend"``, (D/2,) how much of its angle each pair takes, 0 to 1; starts at 0.
        wpe_scale: with ``position="blend"``, () a factor on ``wpe``; starts at 1.
    """

    rope_scale: Tensor
    wpe_scale: Tensor

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, _weight=torch.empty(config.vocab_size, config.n_embd))
        if config.has_table:
            self.wpe = nn.Embedding(
                config.context_length, config.n_embd, _weight=torch.empty(config.context_length, config.n_embd)
            )
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.position == "blend":
            self.register_buffer("rope_scale", torch.zeros(config.head_dim // 2, dtype=torch.float32))
            self.register_buffer("wpe_scale", torch.ones((), dtype=torch.float32))
        if config.has_rotation:
            with torch.device("cpu"):
                # Not a buffer: `model.to(torch.bfloat16)` must not touch the angles.
                self.frequencies = frequencies(config.rope or RopeConfig(), config.head_dim, config.trained_length)
        self.tie()
        if self.wte.weight.device.type != "meta":
            self.init_weights(seed)

    @property
    def blocks(self) -> list[Block]:
        """The layers, from the embeddings up."""
        return cast(list[Block], list(self.h))

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values, unless told otherwise: the weights' own, bfloat16 where they are whole numbers."""
        dtype = self.wte.weight.dtype
        return dtype if dtype.is_floating_point else torch.bfloat16

    def tie(self) -> None:
        """Let the output head be the token embedding, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.wte.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Move or cast the model, but never cast its scales: a rounded angle is far off at a distant position."""
        scales = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            setattr(self, name, scale.to(getattr(self, name).device))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return all that defines the function: every parameter by name, a tied one once, and the scales."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()} | dict(self.named_buffers())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter as GPT-2's authors describe: N(0, 0.02), biases 0, norms 1.

        The two projections that write to the residual stream are scaled by 1 / sqrt(2 * n_layer), so that
        its variance does not grow with depth. Each parameter has a generator of its own, seeded by a hash of
        ``seed`` and its name: two models that share a shape share its start, whatever else differs.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name or name.startswith("ln_"):
                parameter.fill_(1.0)
            else:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                # In float32 on the CPU whatever the defaults are, so that every device and dtype starts alike.
                start = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(start.normal_(0.0, std, generator=generator))

    def make_cache(
        self, batch: int, length: int, *, chunk: int = 512, dtype: torch.dtype | None = None, reserve: int | None = None
    ) -> Cache:
        """Return an empty cache for ``batch`` sequences of at most ``length`` tokens.

        Args:
            batch: number of sequences, B.
            length: tokens of the longest; costs memory only in layers without a window.
            chunk: most tokens that one call may bring; counts only in layers with a window.
            dtype: of keys and values; None is `cache_dtype`.
            reserve: tokens to make room for at once, the rest when it is needed; None makes room for all of ``length``.

        Raises:
            GptlabError: learned positions, and a ``length`` that exceeds them.
        """
        if self.config.has_table and length > self.config.context_length:
            raise GptlabError(
                f"a cache for {length} tokens exceeds the context of {self.config.context_length}"
                " learned positions; make it shorter"
            )
        return Cache(
            [block.attn.visibility for block in self.blocks],
            batch=batch,
            length=length,
            chunk=chunk,
            n_kv_head=self.config.kv_heads,
            head_dim=self.config.head_dim,
            dtype=dtype or self.cache_dtype,
            device=self.wte.weight.device,
            scales=dict(self.named_buffers(recurse=False)),
            reserve=reserve,
        )

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Compute the logits of the next token at every position.

        Args:
            ids: (B, T) int64 token ids.
            positions: (B, T) int64, -1 for padding; by default rows count from 0, or go on from the cache.
            documents: (B, T) int64; tokens attend only within their own document. None: one document a row.
            cache: from `make_cache`; holds the tokens before ``ids`` and takes up ``ids``.
            head: what to do with the hidden states: called as ``head(hidden, lm_head)`` with (B, T, C) float32
                and the output projection. By default `all_logits`.

        Returns:
            (B, T, V) float32 logits, or whatever ``head`` returns.

        Raises:
            GptlabError: ids of the wrong shape or type, none, or out of range (seen on the CPU only), more tokens than
                learned positions, a full cache.
        """
        x, tokens, rotary = self.embed(ids, positions, documents, cache)
        for i, block in enumerate(self.blocks):
            x = block(x, tokens, rotary, None if cache is None else cache.layers[i])
        return (head or all_logits)(self.ln_f(x), self.lm_head)

    def embed(
        self, ids: Tensor, positions: Tensor | None, documents: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tokens, Rotary | None]:
        """Return the first residual stream (B, T, C) float32, where its tokens stand, and their rotation."""
        check_input(self.config, ids, positions, documents, cache)
        scales = dict(self.named_buffers(recurse=False))
        if cache is not None:
            cache.check_scales(scales)
        if positions is not None:
            tokens = Tokens(positions, documents)
        elif cache is not None:
            tokens = cache.describe(ids, documents)
        else:
            offsets = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            tokens = Tokens(offsets, documents, plain=documents is None, in_order=True)
        x, rotary = self.wte(ids).float(), None
        if self.config.has_table:
            x = x + self.wpe(tokens.positions.clamp(min=0)).float() * scales.get("wpe_scale", 1.0)
        if self.config.has_rotation:
            seen_as = {block.attn.sinks_at_most for block in self.blocks}
            rotary = Rotary(tokens.positions, *self.frequencies, {None} | seen_as, scales.get("rope_scale"))
        return self.drop(x), tokens, rotary

    @torch.no_grad()
    def attention_maps(self, ids: Tensor, layer: int) -> Tensor:
        """Return what every head of one layer looks at: (B, H, T, T) float32, [b, h, query, key].

        Args:
            ids: (B, T) int64 token ids.
            layer: index of the block, from 0.
        """
        if not isinstance(layer, int) or layer not in range(self.config.n_layer):
            raise GptlabError(f"layer must be 0 to {self.config.n_layer - 1}, got {layer!r}")
        x, tokens, rotary = self.embed(ids, None, None, None)
        for block in self.blocks[:layer]:
            x = block(x, tokens, rotary)
        block = self.blocks[layer]
        return block.attn.weights(block.ln_1(x), tokens, rotary)
