"""The freedom of queries and keys, spent so that rotating them by their positions disturbs attention least.

As long as nothing rotates them, a head's queries and keys are free: with any invertible A (D, D) and any b (D,),

    q -> A q,    k -> A^-T k + b    (k without its bias; heads that share a key share A and b)

all scores stay what they are but for q^T A^T b, which is the same for all keys and drops out of the softmax. Once
positions rotate the pairs of channels at different speeds, A decides which direction of the scores rotates how fast,
and b^T, rotated, is a preference for distances. `spend_gauge` chooses both:

1. A start that balances queries and keys, so that both have the same diagonal second moment, and orders the channels by
   it: what carries most of the scores goes to the pairs that rotate slowest (balanced truncation, Moore 1981).
2. Then gradient descent, layer after layer, on the mean over queries of KL(a || a'), with a the source's attention,
   table of positions and all, and a' that of the rotated scores, from a stream that has lost the table.
3. Where nothing need stay exact, the same descent on the rows of queries and keys themselves.

We know of no earlier work that does this; docs/conversion.md has what it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptlab.conversion.layers import Heads, read_heads
from gptlab.conversion.statistics import batches
from gptlab.errors import GptlabError
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.gpt import GPT
from gptlab.model.kernels import attention_weights
from gptlab.model.masks import Tokens
from gptlab.model.rope import Rotary

STEPS, RATE = 60, 0.04
"""Steps of Adam in each layer for the gauge, and its first learning rate, which falls to 0 along a cosine."""
ROW_STEPS, ROW_RATE = 60, 0.08
"""The same for the rows of queries and keys, whose rate is a share of their root mean square."""
QUERIES = 64
"""Queries of a row of text that a step looks at, drawn anew each time."""
NEGLIGIBLE = 1e-4
"""A share of the mean second moment that every channel is given, so that none is without."""
FLOOR = 1e-20
"""Attention weights below this count as this."""


class Gauge(NamedTuple):
    """What is done to the keys of one layer, and undone by its queries; float64.

    Attributes:
        mix: (H_kv, D, D) A; queries become A q, keys A^-T k.
        bias: (H_kv, D) b, added to the keys.
    """

    mix: Tensor
    bias: Tensor

    def apply(self, heads: Heads) -> Heads:
        """Return the same attention, as long as positions rotate nothing."""
        keys = torch.linalg.inv(self.mix).mT @ heads.k
        keys[..., -1] = self.bias  # its old one is the same for all keys
        return heads._replace(q=self.mix.repeat_interleave(len(heads.q) // len(heads.k), 0) @ heads.q, k=keys)


class _Sample(NamedTuple):
    """A batch of text in one layer: (B, H, T, D) queries and (B, H_kv, T, D) keys, before any rotation.

    Attributes:
        source_q, source_k: of the source.
        z: (B, T, C) what the attention of the rotary model reads, from a stream without the table.
        q, k: its queries and keys; keys without their bias.
        positions: (1, T) where the tokens stand.
    """

    source_q: Tensor
    source_k: Tensor
    z: Tensor
    q: Tensor
    k: Tensor
    positions: Tensor


class _Draws(NamedTuple):
    """What `Rotary` takes: the angle per position of each pair of channels, and a factor; what draws the samples."""

    frequencies: Tensor
    factor: float
    generator: torch.Generator


@torch.no_grad()
def spend_gauge(
    source: GPT, rotated: GPT, rows: Tensor | Sequence[Tensor], *, beyond: bool = False, seed: int = 0
) -> list[Gauge]:
    """Give queries and keys of ``rotated`` the gauge in which its rotation disturbs least; return what was done.

    The streams of both models are kept for the whole text, and the queries and keys of one layer: 28 C bytes per token.

    Args:
        source: a model with learned positions, in float32.
        rotated: the same model with rotary positions and without its table, in float32; changed in place.
        rows: (N, T) int64 token ids, or sequences (T,) of any lengths. As long as the context is best: distances that
            they do not have are not fitted.
        beyond: also fit the rows of queries and keys themselves, with their biases, on what the gauge leaves.
        seed: of the text and the queries that a step looks at.

    Raises:
        GptlabError: no tokens.
    """
    device = source.wte.weight.device
    draws = _Draws(*rotated.frequencies, torch.Generator().manual_seed(seed))
    old = [source.embed(ids.to(device), None, None, None) for ids in batches(rows)]
    new = [rotated.embed(ids.to(device), None, None, None) for ids in batches(rows)]
    if not old:
        raise GptlabError("the calibration text is empty; give it at least one token")
    gauges = []
    for before, after in zip(source.blocks, rotated.blocks, strict=True):
        samples, bias = [], key_bias(after.attn)[:, None]
        for (x, tokens, _), (y, _, _) in zip(old, new, strict=True):
            z = after.ln_1(y)
            source_q, source_k, _, _ = before.attn.project(before.ln_1(x), None)
            q, k, _, _ = after.attn.project(z, None)
            samples.append(_Sample(source_q, source_k, z, q, k - bias, tokens.positions[:1]))
        gauges.append(_fit_gauge(after.attn, samples, draws))
        _write(after.attn, gauges[-1].apply(read_heads(after.attn)))
        if beyond:
            _fit_rows(after.attn, samples, draws)
        old = [(before(x, tokens, None), tokens, None) for x, tokens, _ in old]
        new = [(after(y, tokens, rotary), tokens, rotary) for y, tokens, rotary in new]
    return gauges


def _write(attention: CausalSelfAttention, heads: Heads) -> None:
    """Put queries and keys into a layer."""
    rows = torch.cat([heads.q, heads.k]).flatten(0, 1)
    attention.c_attn.weight[: len(rows)] = rows[:, :-1].to(attention.c_attn.weight)
    if attention.c_attn.bias is not None:
        attention.c_attn.bias[: len(rows)] = rows[:, -1].to(attention.c_attn.bias)


def key_bias(attention: CausalSelfAttention) -> Tensor:
    """Return the bias of a layer's keys, (H_kv, D); 0 where the model has none."""
    heads, width = attention.n_kv_head, attention.head_dim
    if attention.c_attn.bias is None:
        return attention.c_attn.weight.new_zeros(heads, width)
    first = attention.n_head * width
    return attention.c_attn.bias.detach()[first : first + heads * width].view(heads, width)


def _fit_gauge(attention: CausalSelfAttention, samples: list[_Sample], draws: _Draws) -> Gauge:
    size = attention.n_head // attention.n_kv_head
    start = balanced_order(samples)
    there, back = start.float().repeat_interleave(size, 0), torch.linalg.inv(start).mT.float()
    # Once for all steps; q and k are (.., D, T) here.
    samples = [sample._replace(q=there @ sample.q.mT, k=back @ sample.k.mT) for sample in samples]
    scale = torch.stack([sample.k.square().mean((0, 2, 3)) for sample in samples]).mean(0).sqrt()[:, None]  # (H_kv, 1)
    mix = torch.eye(attention.head_dim, device=scale.device).repeat(len(start), 1, 1).requires_grad_()
    bias = torch.zeros_like(mix[..., 0]).requires_grad_(attention.c_attn.bias is not None)

    def project(sample: _Sample, some: Tensor) -> tuple[Tensor, Tensor]:
        q = mix.repeat_interleave(size, 0) @ sample.q[..., some]
        k = torch.linalg.inv(mix).mT @ sample.k + (bias * scale)[..., None]
        return q.mT, k.mT

    _descend(attention, samples, draws, project, [(mix, RATE), (bias, RATE)], STEPS)
    return Gauge((mix.double() @ start).cpu(), (bias * scale).double().cpu())


def _fit_rows(attention: CausalSelfAttention, samples: list[_Sample], draws: _Draws) -> None:
    width, n_q = attention.head_dim, attention.n_head * attention.head_dim
    weight, bias = attention.c_attn.weight, attention.c_attn.bias
    rows = weight[: n_q + attention.n_kv_head * width].clone().requires_grad_()
    shift = torch.zeros_like(rows[:, 0]) if bias is None else bias[: len(rows)].clone().requires_grad_()

    def project(sample: _Sample, some: Tensor) -> tuple[Tensor, Tensor]:
        q = (sample.z[:, some] @ rows[:n_q].T + shift[:n_q]) * attention.score_factor
        k = sample.z @ rows[n_q:].T + shift[n_q:]
        return q.unflatten(-1, (-1, width)).transpose(1, 2), k.unflatten(-1, (-1, width)).transpose(1, 2)

    rate = ROW_RATE * rows.detach().square().mean().sqrt().item()
    _descend(attention, samples, draws, project, [(rows, rate), (shift, rate)], ROW_STEPS)
    weight[: len(rows)] = rows
    if bias is not None:
        bias[: len(rows)] = shift


def _descend(
    attention: CausalSelfAttention,
    samples: list[_Sample],
    draws: _Draws,
    project: Callable[[_Sample, Tensor], tuple[Tensor, Tensor]],
    parameters: Sequence[tuple[Tensor, float]],
    steps: int,
) -> None:
    """Fit parameters in place, each from a learning rate of its own, to the source's attention.

    ``project`` makes queries (B, H, n, D), of n places, and keys (B, H_kv, T, D), before any rotation.
    """
    frequencies, factor, generator = draws
    limit, rule = attention.sinks_at_most, attention.visibility
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in parameters if tensor.requires_grad]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for _ in range(steps):
        sample = samples[int(torch.randint(len(samples), (), generator=generator))]
        some = torch.randperm(sample.positions.shape[1], generator=generator)[:QUERIES].sort().values
        some = some.to(sample.positions.device)
        queries, keys = Tokens(sample.positions[:, some]), Tokens(sample.positions)
        wanted = attention_weights(sample.source_q[:, :, some], sample.source_k, rule, queries, keys)
        place = Rotary(queries.positions, frequencies, factor, {None, limit})
        with torch.enable_grad():
            q, k = project(sample, some)
            q_sinks = None if limit is None else place.rotate(q, at_most=limit)
            k = Rotary(keys.positions, frequencies, factor).rotate(k)
            weights = attention_weights(place.rotate(q), k, rule, queries, keys, q_sinks)
            loss = -(wanted * weights.clamp(min=FLOOR).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def balanced_order(samples: Sequence[_Sample]) -> Tensor:
    """Return the A (H_kv, D, D) of step 1 above; float64.

    With second moments Q of the queries and K of the keys, both around nothing that the softmax sees, and Cholesky
    factors Q = L L^T, K = M M^T, and L^T M = U S V^T: A = S^(1/2) U^T L^-1 makes both S.
    (Q and K are sums over tokens here: S grows with their number, A does not.)
    """
    width, shared = samples[0].q.shape[-1], samples[0].k.shape[1]
    tokens = sum(sample.q.shape[0] * sample.q.shape[2] for sample in samples)
    mean = torch.stack([sample.k.double().sum((0, 2)) for sample in samples]).sum(0) / tokens  # (H_kv, D)
    q_moment = samples[0].q.new_zeros(shared, width, width, dtype=torch.float64)
    k_moment = torch.zeros_like(q_moment)
    for sample in samples:
        q = sample.q.double().unflatten(1, (shared, -1)).transpose(0, 1).flatten(1, 3)  # (H_kv, N, D)
        k = (sample.k.double() - mean[:, None]).transpose(0, 1).flatten(1, 2)
        q_moment += q.mT @ q
        k_moment += k.mT @ k
    factors = []
    for moment in (q_moment, k_moment):
        least = NEGLIGIBLE * moment.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        factors.append(torch.linalg.cholesky(moment + torch.eye(width).to(moment) * least[:, None, None]))
    u, s, _ = torch.linalg.svd(factors[0].mT @ factors[1])
    mix = s.sqrt()[..., None] * torch.linalg.solve_triangular(factors[0].mT, u, upper=True).mT
    # Largest first, two to a pair (i, i + D / 2), from the slowest pair to the fastest.
    slowest = torch.arange(width // 2 - 1, -1, -1)
    places = torch.stack([slowest, slowest + width // 2], 1).flatten()
    ordered = torch.empty_like(mix)
    ordered[:, places.to(mix.device)] = mix
    return ordered
