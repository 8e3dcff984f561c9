"""What may be asked of a conversion, and which configuration comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from gptlab.config import ModelConfig, RopeConfig, Scaling
from gptlab.conversion.context import Extension, check_length, with_trained_length
from gptlab.conversion.heads import Grouping, Method, check_grouping, check_heads, check_method
from gptlab.conversion.rotary import RotaryMethod
from gptlab.errors import GptlabError, nearest


@dataclass(frozen=True)
class Changes:
    """What is asked of a conversion; None leaves a thing as it is in the source, or to the default.

    Attributes:
        n_kv_head: key/value heads: fewer by sharing, more by repetition.
        position: ``rope``; ``blend``, from which training goes on to ``rope``; or ``none``, no positions at all.
        rope: settings of the rotary positions.
        window: keys that a query sees: one number, or one per layer.
        sinks: first tokens that stay visible outside the window.
        dilation: distance between the keys of a window: one number, or one per layer.
        context_length: longest text.
        rope_scaling: how rotary positions run longer than trained (`gptlab.config.Scaling`); ``none`` is as trained.
        rope_factor: by how much longer.
        method: how heads come to share; see `gptlab.conversion.heads.Method`.
        grouping: which heads share; see `gptlab.conversion.heads.Grouping`.
        rotary: see `gptlab.conversion.rotary.RotaryMethod`; by default the best, without a calibration text
            ``abrupt``.
        refit: fit the output projections afterwards (`gptlab.conversion.refit`). By default where it was found to help:
            after ``procrustes``, with a calibration text, if positions stay. The paper's three are left as they are,
            for comparison.
        extension: how further learned positions start; ``copy`` by default.
        seed: of everything random.
    """

    n_kv_head: int | None = None
    position: Literal["rope", "blend", "none"] | None = None
    rope: RopeConfig | None = None
    window: int | Sequence[int | None] | None = None
    sinks: int | None = None
    dilation: int | Sequence[int] | None = None
    context_length: int | None = None
    rope_scaling: Scaling | Literal["none"] | None = None
    rope_factor: float | None = None
    method: Method | None = None
    grouping: Grouping | None = None
    rotary: RotaryMethod | None = None
    refit: bool | None = None
    extension: Extension | None = None
    seed: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Changes:
        """Build from plain values, as JSON or TOML give them.

        Raises:
            GptlabError: a key that is not a field (with the nearest field's name).
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise GptlabError(f"unknown setting of a conversion {key!r}{nearest(key, known)}")
        given = dict(values)
        if isinstance(given.get("rope"), Mapping):
            known = [field.name for field in dataclasses.fields(RopeConfig)]
            for key in given["rope"]:
                if key not in known:
                    raise GptlabError(f"unknown setting of rope {key!r}{nearest(key, known)}")
            given["rope"] = RopeConfig(**given["rope"])
        for name in ("window", "dilation"):
            if isinstance(given.get(name), list):
                # TOML has no null, so a layer of full attention may say "none", as on the command line.
                given[name] = tuple(None if one == "none" else one for one in given[name])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, in plain values that JSON can hold; `from_dict` is the inverse."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                value = value.to_dict() if isinstance(value, RopeConfig) else value
                values[field.name] = list(value) if isinstance(value, (tuple, list)) else value
        return values


def target(config: ModelConfig, changes: Changes) -> ModelConfig:
    """Return the configuration that comes out of a conversion; no weights are touched.

    Raises:
        GptlabError: an impossible change, one without effect, or a choice that does not exist.
    """
    if changes.n_kv_head is not None:
        check_heads(config, changes.n_kv_head, more=changes.n_kv_head > config.kv_heads)
    sharing = changes.n_kv_head is not None and changes.n_kv_head < config.kv_heads
    if not sharing and (changes.method is not None or changes.grouping is not None):
        raise GptlabError("method and grouping have no effect unless heads are to share; set n_kv_head, or leave them")
    if changes.method is not None:
        check_method(config, changes.method)
    if changes.grouping is not None:
        check_grouping(changes.grouping)
    _check_positions(config, changes)
    windows = {name: getattr(changes, name) for name in ("window", "sinks", "dilation")}
    settings = {name: _uniform(value, config.n_layer) for name, value in windows.items() if value is not None}
    if "window" in settings and settings["window"] is None:  # full attention has neither
        settings = {"sinks": 0, "dilation": 1, **settings}
    if changes.n_kv_head is not None:
        settings["n_kv_head"] = changes.n_kv_head
    if changes.position is not None:
        settings |= {"position": changes.position, "rope": changes.rope or config.rope}
        settings |= {"rope": None} if changes.position == "none" else {}
    if changes.context_length is not None:
        check_length(config, changes.context_length)
        settings["context_length"] = changes.context_length
    new = dataclasses.replace(config, **settings)
    if new.context_length != config.context_length and new.position == "rope":
        before = dataclasses.replace(new, context_length=config.context_length)
        new = dataclasses.replace(new, rope=with_trained_length(before))
    if changes.rope_scaling is not None or changes.rope_factor is not None:
        new = dataclasses.replace(new, rope=_scaled(new, changes))
    if changes.extension is not None:
        if changes.extension not in get_args(Extension):
            choices = get_args(Extension)
            raise GptlabError(
                f"extension must be copy or random, got {changes.extension!r}{nearest(changes.extension, choices)}"
            )
        if new.context_length == config.context_length or not new.has_table:
            raise GptlabError("extension has no effect unless a table of positions grows; leave it out")
    if changes.refit and not any(
        getattr(new, name) != getattr(config, name)
        for name in ("n_kv_head", "position", "windows", "sinks", "dilations")
    ):
        raise GptlabError("refit has no effect unless heads, positions or windows change; leave it out")
    return new


def _scaled(config: ModelConfig, changes: Changes) -> RopeConfig:
    """Return the settings of rotary positions with another scaling."""
    kind: str | None = changes.rope_scaling
    factor = changes.rope_factor
    if config.position != "rope":
        raise GptlabError(
            f"rope scaling has no effect on a model with position={config.position!r}; set position to 'rope', or leave"
            " rope_scaling and rope_factor out"
        )
    rope = config.rope or RopeConfig()
    if kind == "none":
        if factor is not None:
            raise GptlabError("rope_factor has no effect with rope_scaling 'none'; leave one of them out")
        return dataclasses.replace(rope, scaling=None, factor=1.0)
    choices = (*get_args(Scaling), "none")
    if kind is not None and kind not in choices:
        why = nearest(str(kind), choices)
        if kind == "dynamic":
            why = ": it depends on the length of the text, and a cache holds keys that were rotated at a shorter one"
        raise GptlabError(f"rope_scaling must be one of {', '.join(choices)}, got {kind!r}{why}")
    kind = kind or rope.scaling
    if kind is None or (factor is None and rope.scaling is None):
        raise GptlabError(
            "rope_scaling and rope_factor go together, as in rope_scaling yarn with rope_factor 4 for texts 4 times as"
            " long as trained; set both"
        )
    return dataclasses.replace(rope, scaling=cast(Scaling, kind), factor=rope.factor if factor is None else factor)


def _uniform(value: Any, n_layer: int) -> Any:
    """One value for all layers where a list says the same of each."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) in (1, n_layer) and len(set(value)) == 1 else tuple(value)
    return value


def _check_positions(config: ModelConfig, changes: Changes) -> None:
    """Refuse changes of positions that there are no ways for."""
    asked: str | None = changes.position
    choices = ("rope", "blend", "none")
    if asked is not None and asked not in choices and asked != config.position:
        if asked == "learned":
            raise GptlabError(
                f"a model of {config.position} positions cannot be given a learned table: there is nothing to make it"
                " from; leave position out"
            )
        raise GptlabError(f"position must be rope, blend or none, got {asked!r}{nearest(str(asked), choices)}")
    rotating = asked in ("rope", "blend") and asked != config.position
    if asked == "none" and config.position == "blend":
        raise GptlabError("a blend is on its way to rotary positions; convert the model that it came from")
    if rotating and config.position not in ("learned", "blend"):
        raise GptlabError(f"only learned positions become {asked}; this model has position {config.position!r}")
    if rotating and config.position == "blend" and changes.rotary is not None:
        raise GptlabError("rotary has no effect on a blend, which has its rotary positions; leave it out")
    if not rotating and (changes.rotary is not None or changes.rope is not None):
        raise GptlabError("rotary and rope have no effect unless positions become rotary; set position to 'rope'")
    methods = get_args(RotaryMethod)
    if changes.rotary is not None and changes.rotary not in methods:
        raise GptlabError(
            f"rotary must be one of {', '.join(methods)}, got {changes.rotary!r}{nearest(changes.rotary, methods)}"
        )
