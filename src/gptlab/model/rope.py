"""Rotary position embedding (RoPE; Su et al. 2021, *RoFormer*): position as rotation.

The D channels of a head form D / 2 pairs. The pair i of a query or key at position p is rotated by the angle
p * theta^(-2i/D), so that the score of a query at p and a key at s depends on p - s alone. A rotation has no
parameters and no last position.

Pairs are (i, i + D/2), the "half" layout of GPT-NeoX, Hugging Face and llama.cpp's neox mode. RoFormer, GPT-J and
Meta's Llama files pair neighbours (2i, 2i + 1): their projections are ours with the rows permuted.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from gptlab.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int, trained_length: int) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (D/2,) float64 on the CPU, and a factor for cos and sin.

    Scaling, to run to ``factor`` times the trained length:

    - ``linear`` (Chen et al. 2023): every position divided by the factor.
    - ``ntk`` (bloc97 2023): the base grown so that the slowest pair is stretched by the factor, the fastest not.
    - ``yarn`` (Peng et al. 2023): pairs that rotate more than 32 times in the trained length stay, those that rotate
      less than once are divided by the factor, with a ramp between; scores grow by (0.1 ln factor + 1)^2.
    - ``llama3`` (Llama 3.1, Meta 2024): as ``yarn`` with 4 rotations for 32 and the ramp over rotations, not pairs;
      scores stay as they are. Models are trained with it.

    Args:
        rope: base and scaling.
        head_dim: D.
        trained_length: tokens of the context that the model was trained on.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    theta, attention_factor = rope.theta, 1.0
    if rope.scaling == "ntk":
        theta = theta * rope.factor ** (head_dim / (head_dim - 2))
    angles = theta**-exponents
    if rope.scaling == "linear":
        angles = angles / rope.factor
    elif rope.scaling == "yarn":

        def pair_of(rotations: float) -> float:
            """The (fractional) pair that rotates so many times in the trained length."""
            return head_dim * math.log(trained_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low = max(math.floor(pair_of(32)), 0)
        high = min(math.ceil(pair_of(1)), head_dim - 1)
        pairs = torch.arange(head_dim // 2, dtype=torch.float64)
        slow = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
        angles = angles * (1 - slow) + angles / rope.factor * slow
        attention_factor = 0.1 * math.log(rope.factor) + 1.0
    elif rope.scaling == "llama3":
        rotations = trained_length * angles / (2 * math.pi)
        slow = ((4 - rotations) / 3).clamp(0, 1)
        angles = angles * (1 - slow) + angles / rope.factor * slow
    return angles, attention_factor


class Rotary:
    """Rotates queries and keys to the positions of one batch; its cosines and sines serve all layers.

    Angles are float64: at position 100,000 a float32 angle puts a score of 11 off by 1e-2. Cosines and sines are kept
    and applied in float32, whatever the dtype of the weights.

    Args:
        positions: (B, T) int64.
        frequencies: (D/2,) float64, from `frequencies`.
        factor: multiplies cos and sin.
        limits: every ``at_most`` that `rotate` will be asked for; None is for no limit.
        scale: (D/2,) how much of its angle each pair takes, 0 to 1; None is all of it.
    """

    def __init__(
        self,
        positions: Tensor,
        frequencies: Tensor,
        factor: float = 1.0,
        limits: Collection[int | None] = (None,),
        scale: Tensor | None = None,
    ) -> None:
        self.positions, self.frequencies, self.factor, self.scale = positions, frequencies, factor, scale
        self._tables = {at_most: self._table(at_most) for at_most in limits}

    def rotate(self, x: Tensor, at_most: int | None = None) -> Tensor:
        """Rotate queries or keys (B, H, T, D) to their positions; computed in float32, returned in x's dtype.

        Args:
            x: what to rotate.
            at_most: positions beyond this count as this. Attention sinks see their queries so: at a distance that
                never grows past the end of the window.
        """
        cos, sin = self._tables[at_most]
        a, b = x.float().chunk(2, dim=-1)  # each (B, H, T, D/2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def _table(self, at_most: int | None) -> tuple[Tensor, Tensor]:
        positions = self.positions if at_most is None else self.positions.clamp(max=at_most)
        # MPS has no float64: there the angles are computed on the CPU.
        where = positions.device if positions.device.type != "mps" else torch.device("cpu")
        frequencies: Tensor = self.frequencies.to(where)
        factor: float | Tensor = self.factor
        if self.scale is not None:
            scale = self.scale.to(where).double()
            frequencies, factor = frequencies * scale, 1 + (factor - 1) * scale
        angles = positions.to(where).double()[:, None, :, None] * frequencies  # (B, 1, T, D/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cos.float().to(positions.device), sin.float().to(positions.device)
