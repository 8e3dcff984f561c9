"""`ModelConfig`: everything that defines a model's function, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gptlab.errors import GptlabError, nearest

Norm = Literal["layer", "rms"]
FeedForward = Literal["gelu", "swiglu"]
Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
Position = Literal["learned", "rope", "none", "blend"]
Scaling = Literal["linear", "ntk", "yarn", "llama3"]

LARGEST = {
    "vocab_size": 2**31 - 1,
    "context_length": 2**31 - 1,
    "n_layer": 1000,
    "n_head": 2**16,
    "n_kv_head": 2**16,
    "n_embd": 2**20,
    "n_inner": 2**22,
}
"""Far above any model, and low enough that a damaged configuration is refused before memory is."""
LARGEST_FLOAT32 = 3.4028234663852886e38
LATER = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "norm": "layer", "mlp": "gelu"}
"""Fields that came later: `to_dict` leaves them out at these defaults, so that what was saved before still compares."""


def divisors(n: int) -> list[int]:
    """Return every positive divisor of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown(what: str, values: Mapping[str, Any], of: type) -> None:
    fields = [field.name for field in dataclasses.fields(of)]
    for key in values:
        if key not in fields:
            raise GptlabError(f"unknown {what} {key!r}{nearest(key, fields)}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021).

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: how to run longer than trained, or None.
        factor: by how much longer, for ``scaling``.
        trained_length: tokens of the texts that the model was trained on, where ``context_length`` was raised since
            without training; None: ``context_length``. It is ``original_max_position_embeddings`` of transformers.
    """

    theta: float = 10000.0
    scaling: Scaling | None = None
    factor: float = 1.0
    trained_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``trained_length``, which came later, is left out where it is None."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "trained_length" or value is not None}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one model. The defaults are GPT-2 small (124M).

    Frozen and validated: an object that exists is possible to build. `to_dict` and `from_dict` are
    inverse and go through JSON.

    Attributes:
        vocab_size: number of token ids, V.
        context_length: longest sequence trained on; with a table of positions (learned, blend), the longest possible.
        n_layer: number of blocks, L.
        n_head: query heads, H; must divide ``n_embd``.
        n_kv_head: key/value heads, a divisor of ``n_head``; None means ``n_head`` (multi-head attention).
        n_embd: width of the residual stream, C.
        n_inner: width of the feed-forward layer; None means ``4 * n_embd``, and two thirds of it with ``swiglu`` (up to
            the next multiple of 8), whose three matrices then weigh what the two of ``gelu`` do.
        norm: ``layer``, or ``rms`` (Zhang & Sennrich 2019), which neither centres nor shifts.
        mlp: ``gelu``, GPT-2's two matrices with the `activation` between, or ``swiglu`` (Shazeer 2020), gated by silu.
        activation: ``gelu_tanh`` (GPT-2's own), ``gelu`` (the erf form), ``relu`` or ``silu``; not of ``swiglu``.
        position: how a model knows where a token stands; ``blend`` is learned and rotary positions, each with a factor,
            for the way from one to the other.
        rope: settings of rotary positions; only with ``position="rope"`` or ``"blend"``.
        window: how many keys a query sees, itself included; None, one number, or one per layer.
        sinks: first tokens that stay visible outside the window.
        dilation: distance between the keys of a window; one number, or one per layer.
        dropout: probability, applied to embeddings, attention weights and residual branches in training.
        bias: whether projections and layer norms have a bias.
        norm_eps: epsilon of the norms.
        tie_embeddings: whether the output head is the token embedding.
        scale_attn_weights: whether scores are divided by the square root of ``head_dim``.
        scale_attn_by_inverse_layer_idx: whether the scores of the n-th layer are also divided by n, counted from 1
            (Karamcheti et al. 2021, *Mistral*: it keeps 16-bit scores of deep layers finite).

    Raises:
        GptlabError: when a value, or a combination of values, is impossible; it names the valid ones.
    """

    vocab_size: int = 50257
    context_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    n_inner: int | None = None
    norm: Norm = "layer"
    mlp: FeedForward = "gelu"
    activation: Activation = "gelu_tanh"
    position: Position = "learned"
    rope: RopeConfig | None = None
    window: int | tuple[int | None, ...] | None = None
    sinks: int = 0
    dilation: int | tuple[int, ...] = 1
    dropout: float = 0.0
    bias: bool = True
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        for name in ("window", "dilation"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_inner is None and _is_whole(self.n_embd):
            # Up to a multiple of 8, as matrices of odd widths are slow.
            swiglu = self.mlp == "swiglu"
            object.__setattr__(self, "n_inner", -(-self.n_embd // 3) * 8 if swiglu else 4 * self.n_embd)
        self._check_numbers()
        self._check_heads()
        self._check_choices()
        self._check_positions()
        self._check_windows()

    def _check_numbers(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise GptlabError(f"{name} must be a whole number of at least 1, got {value!r}")
            if value > largest:
                raise GptlabError(f"{name} must be at most {largest:,}, got {value:,}")
        for name in ("dropout", "norm_eps"):
            value = getattr(self, name)
            # A comparison, since math.isfinite overflows on the enormous integers that JSON may hold.
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST_FLOAT32:
                raise GptlabError(f"{name} must be a finite number, got {value!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise GptlabError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.norm_eps <= 0.0:
            raise GptlabError(f"norm_eps must be above 0, got {self.norm_eps!r}")
        if not _is_whole(self.sinks) or self.sinks < 0:
            raise GptlabError(f"sinks must be a whole number of at least 0, got {self.sinks!r}")
        for name, optional in (("window", True), ("dilation", False)):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if not (_is_whole(one) and one >= 1) and not (optional and one is None):
                    raise GptlabError(f"{name} must be a whole number of at least 1, or one per layer, got {value!r}")
        for name in ("bias", "tie_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if not isinstance(getattr(self, name), bool):
                raise GptlabError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_heads(self) -> None:
        if self.n_embd % self.n_head:
            raise GptlabError(
                f"n_embd={self.n_embd} cannot be split evenly over n_head={self.n_head};"
                f" valid n_head: {', '.join(map(str, divisors(self.n_embd)))}"
            )
        if self.n_head % self.kv_heads:
            raise GptlabError(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head};"
                f" valid n_kv_head: {', '.join(map(str, divisors(self.n_head)))}"
            )

    def _check_choices(self) -> None:
        for name, kind in (("norm", Norm), ("mlp", FeedForward), ("activation", Activation), ("position", Position)):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                hint = nearest(str(value), choices)
                raise GptlabError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
        if self.mlp == "swiglu" and self.activation != "gelu_tanh":
            raise GptlabError(
                f"activation={self.activation!r} has no effect with mlp='swiglu', which is gated by silu; leave it out"
            )

    def _check_positions(self) -> None:
        if self.rope is not None and not self.has_rotation:
            raise GptlabError(f"rope has settings but position is {self.position!r}; set position to 'rope'")
        if self.has_rotation and self.head_dim % 2:
            raise GptlabError(
                f"position={self.position!r} rotates pairs of channels, but head_dim is {self.head_dim}, an odd number"
            )
        if self.rope is not None:
            self._check_rope(self.rope)

    def _check_rope(self, rope: RopeConfig) -> None:
        if not isinstance(rope, RopeConfig):
            raise GptlabError(f"rope must hold the settings theta, scaling, factor and trained_length, got {rope!r}")
        for name, least in (("theta", "above 1"), ("factor", "at least 1")):
            value = getattr(rope, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= LARGEST_FLOAT32
            if not number or (name == "theta" and value == 1):
                raise GptlabError(f"rope: {name} must be a finite number {least}, got {value!r}")
        length = rope.trained_length
        if length is not None and not (_is_whole(length) and 1 <= length <= LARGEST["context_length"]):
            raise GptlabError(f"rope: trained_length must be a whole number of at least 1, got {length!r}")
        choices = get_args(Scaling)
        if rope.scaling is not None and rope.scaling not in choices:
            hint = nearest(str(rope.scaling), choices)
            raise GptlabError(f"rope: scaling must be one of {', '.join(choices)}, got {rope.scaling!r}{hint}")
        if (rope.scaling is None) != (rope.factor == 1):
            raise GptlabError(
                f"rope: scaling={rope.scaling!r} with factor={rope.factor!r} has no effect; set both, or neither"
            )
        if rope.scaling == "ntk" and self.head_dim == 2:
            raise GptlabError("rope: scaling='ntk' needs at least two pairs of channels, but head_dim is 2")

    def _check_windows(self) -> None:
        for name in ("window", "dilation"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_layer:
                raise GptlabError(f"{name} lists {len(value)} layers, the model has n_layer={self.n_layer}")
        dilated = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        if all(window is None for window in self.windows) and (self.sinks or any(d != 1 for d in dilated)):
            raise GptlabError("sinks and dilation have no effect without a window; set window, or leave them out")
        if isinstance(self.dilation, tuple) and self.dilation != self.dilations:
            raise GptlabError(
                f"dilation={list(self.dilation)} has no effect in layers without a window; write 1 for those"
            )
        pairs = zip(self.windows, self.dilations, strict=True)
        wide = [w for w, d in pairs if w is not None and d == 1 and w >= self.context_length]
        if wide:
            warnings.warn(
                f"window={max(wide)} hides nothing within the context_length of {self.context_length}", stacklevel=4
            )

    @property
    def has_table(self) -> bool:
        """Whether positions are looked up in a table, which ends at ``context_length``."""
        return self.position in ("learned", "blend")

    @property
    def has_rotation(self) -> bool:
        """Whether positions rotate queries and keys."""
        return self.position in ("rope", "blend")

    @property
    def trained_length(self) -> int:
        """Tokens of the texts trained on: `RopeConfig.trained_length`, else ``context_length``."""
        return (self.rope.trained_length if self.rope is not None else None) or self.context_length

    @property
    def windows(self) -> tuple[int | None, ...]:
        """`window` of every layer."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.n_layer

    @property
    def dilations(self) -> tuple[int, ...]:
        """`dilation` of every layer; 1 where there is no window."""
        every = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.n_layer
        return tuple(d if w is not None else 1 for d, w in zip(every, self.windows, strict=True))

    @property
    def head_dim(self) -> int:
        """Width of one head, D."""
        return self.n_embd // self.n_head

    @property
    def score_factors(self) -> tuple[float, ...]:
        """What the scores of every layer are multiplied by, beyond 1 / sqrt(``head_dim``)."""
        factor = 1.0 if self.scale_attn_weights else math.sqrt(self.head_dim)
        by_layer = self.scale_attn_by_inverse_layer_idx
        return tuple(factor / (layer + 1) if by_layer else factor for layer in range(self.n_layer))

    @property
    def kv_heads(self) -> int:
        """`n_kv_head` as a plain number (it is filled in when the object is made)."""
        assert self.n_kv_head is not None
        return self.n_kv_head

    @property
    def inner(self) -> int:
        """`n_inner` as a plain number (it is filled in when the object is made)."""
        assert self.n_inner is not None
        return self.n_inner

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return a named configuration with some fields replaced.

        Args:
            name: one of `PRESETS`.
            **overrides: any field of `ModelConfig`.

        Raises:
            GptlabError: unknown name or field, or an impossible combination.
        """
        if name not in PRESETS:
            raise GptlabError(f"unknown preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a configuration from plain values, as JSON or TOML give them.

        Raises:
            GptlabError: a key that is not a field (with the nearest field's name), or an impossible value.
        """
        _refuse_unknown("model setting", values, cls)
        values = dict(values)
        if isinstance(values.get("rope"), Mapping):
            _refuse_unknown("setting of rope", values["rope"], RopeConfig)
            values["rope"] = RopeConfig(**values["rope"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold; `from_dict` is the inverse."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in LATER or v != LATER[k]}
        if self.mlp == "swiglu":
            del values["activation"]
        if self.rope is not None:
            values["rope"] = self.rope.to_dict()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `ModelConfig` with others on top; with another mlp, the old one's width and activation go."""
    gone = ("n_inner", "activation") if changes.get("mlp", before := values.get("mlp", "gelu")) != before else ()
    return {**{name: value for name, value in values.items() if name not in gone}, **changes}


PRESETS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "pocket": {"vocab_size": 4096, "context_length": 512, "n_layer": 4, "n_head": 6, "n_embd": 192},
    "tiny": {"vocab_size": 256, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 32},
}
"""The four sizes of GPT-2 (Radford et al. 2019), the built-in model, and one for quick checks."""
