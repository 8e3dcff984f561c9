from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlab import GptlabError, ModelConfig
from gptlab.config import PRESETS, Position, divisors, with_changes

# Layers, heads and width of the four released models: Radford et al. 2019, table 2; heads from the released hparams.
RELEASED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_released_shapes(name: str) -> None:
    config = ModelConfig.preset(name)
    assert (config.n_layer, config.n_head, config.n_embd) == RELEASED[name]
    assert (config.vocab_size, config.context_length, config.head_dim) == (50257, 1024, 64)


def test_the_defaults_are_gpt2_small() -> None:
    config = ModelConfig()
    assert config == ModelConfig.preset("gpt2")
    assert (config.n_kv_head, config.n_inner) == (12, 3072)
    assert (config.activation, config.position, config.norm_eps) == ("gelu_tanh", "learned", 1e-5)
    assert (config.norm, config.mlp) == ("layer", "gelu")
    assert config.bias
    assert config.tie_embeddings
    assert config.dropout == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_possible_and_goes_through_json(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    n_layer=st.integers(1, 100),
    heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    n_inner=st.none() | st.integers(1, 10_000),
    dropout=st.floats(0.0, 1.0, exclude_max=True),
    norm_eps=st.floats(1e-12, 1.0),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
    bias=st.booleans(),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
    tie=st.booleans(),
)
def test_any_possible_configuration_goes_through_json(
    n_layer: int, heads: int, head_dim: int, n_inner: int | None, tie: bool, **rest: Any
) -> None:
    config = ModelConfig(
        n_layer=n_layer, n_head=heads, n_embd=heads * head_dim, n_inner=n_inner, tie_embeddings=tie, **rest
    )
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.head_dim == head_dim
    assert config.inner == (n_inner if n_inner is not None else 4 * heads * head_dim)


@pytest.mark.parametrize(("n_embd", "inner"), [(768, 2048), (192, 512), (32, 88), (1024, 2736), (3, 8)])
def test_a_gated_network_is_as_large_as_a_plain_one(n_embd: int, inner: int) -> None:
    config = ModelConfig(n_embd=n_embd, n_head=1, mlp="swiglu")
    assert config.inner == inner
    assert 0 <= 3 * n_embd * inner - 2 * n_embd * 4 * n_embd < 3 * n_embd * 8
    assert ModelConfig.preset("gpt2", mlp="swiglu", n_inner=100).inner == 100


def test_what_came_later_is_left_out_of_a_gpt2_and_read_as_gpt2_where_it_is_missing() -> None:
    saved = ModelConfig(norm_eps=1e-6).to_dict()
    assert not saved.keys() & {"norm", "mlp"}
    assert ModelConfig.from_dict(saved) == ModelConfig(norm_eps=1e-6)
    llama = ModelConfig(norm="rms", mlp="swiglu", bias=False)
    assert "activation" not in llama.to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(llama.to_dict()))) == llama


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"norm": "rmsnorm"}, "norm must be one of layer, rms, got 'rmsnorm'"),
        ({"mlp": "swigl"}, "mlp must be one of gelu, swiglu, got 'swigl' (did you mean 'swiglu'?)"),
        ({"norm": 1}, "norm must be one of layer, rms, got 1"),
        ({"mlp": "swiglu", "activation": "relu"}, "activation='relu' has no effect with mlp='swiglu'"),
    ],
)
def test_norms_and_networks_that_there_are_not_are_refused(values: dict[str, Any], said: str) -> None:
    assert said in refusal(**values)


def test_changes_of_the_network_take_what_belonged_to_the_old_one_with_them() -> None:
    values = ModelConfig.preset("gpt2", activation="relu", n_layer=3).to_dict()
    assert ModelConfig.from_dict(with_changes(values, {"mlp": "swiglu"})) == ModelConfig(n_layer=3, mlp="swiglu")
    assert with_changes(values, {"mlp": "gelu", "n_layer": 2}) == {**values, "mlp": "gelu", "n_layer": 2}
    assert with_changes(values, {"mlp": "swiglu", "n_inner": 7})["n_inner"] == 7


def test_preset_takes_overrides() -> None:
    config = ModelConfig.preset("gpt2", n_layer=2, tie_embeddings=False, n_inner=100)
    assert (config.n_layer, config.tie_embeddings, config.inner, config.n_embd) == (2, False, 100, 768)


def test_a_configuration_is_frozen() -> None:
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 3  # type: ignore[misc]


@given(st.integers(1, 2000))
def test_divisors_are_all_of_them(n: int) -> None:
    assert divisors(n) == sorted(d for d in range(1, n + 1) if n / d == n // d)


def refusal(**values: Any) -> str:
    with pytest.raises(GptlabError) as caught:
        ModelConfig.from_dict(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do() -> None:
    message = refusal(n_head=7)
    assert "n_embd=768" in message
    assert "n_head=7" in message
    valid = [int(n) for n in message.split("valid n_head: ")[1].split(", ")]
    assert valid == [n for n in range(1, 769) if 768 % n == 0]


@pytest.mark.parametrize("n_kv_head", [5, 24])
def test_kv_heads_that_do_not_divide_the_heads_are_refused_with_those_that_do(n_kv_head: int) -> None:
    message = refusal(n_kv_head=n_kv_head)
    assert f"n_kv_head={n_kv_head}" in message
    assert message.endswith("valid n_kv_head: 1, 2, 3, 4, 6, 12")


@pytest.mark.parametrize(
    ("key", "meant"), [("n_layers", "n_layer"), ("vocabsize", "vocab_size"), ("drop_out", "dropout"), ("zzz", None)]
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, meant: str | None) -> None:
    message = refusal(**{key: 1})
    assert repr(key) in message
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or repr(meant) in message


def test_an_unknown_key_of_rope_is_refused_with_the_nearest_name() -> None:
    message = refusal(rope={"thetta": 1e4})
    assert "'thetta'" in message
    assert "did you mean 'theta'" in message


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(GptlabError, match="did you mean 'gpt2-medium'") as caught:
        ModelConfig.preset("gpt2-medum")
    assert all(name in str(caught.value) for name in PRESETS)


SIZES = ["vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -12, True, 12.0, math.nan, "12", [12], {}, 2**31 + 1, 10**400])
def test_a_size_must_be_a_whole_number_of_at_least_one(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    # Four times an enormous width is an enormous n_inner: either name points at the mistake.
    assert name in message or (name == "n_embd" and "n_inner" in message)


@pytest.mark.parametrize("name", [name for name in SIZES if name not in ("n_kv_head", "n_inner")])
def test_a_size_without_a_default_of_its_own_cannot_be_none(name: str) -> None:
    assert name in refusal(**{name: None})


@pytest.mark.parametrize("name", ["dropout", "norm_eps"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.1", None, [0.1], -0.1, 10**400])
def test_a_real_number_must_be_finite_and_in_range(name: str, value: Any) -> None:
    assert name in refusal(**{name: value})


def test_dropout_of_everything_and_an_epsilon_of_zero_are_refused() -> None:
    assert "dropout" in refusal(dropout=1.0)
    assert "norm_eps" in refusal(norm_eps=0.0)


@pytest.mark.parametrize("name", ["bias", "tie_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
@pytest.mark.parametrize("value", [0, 1, "true", None, 1.0])
def test_a_flag_must_be_true_or_false(name: str, value: Any) -> None:
    assert f"{name} must be true or false" in refusal(**{name: value})


@pytest.mark.parametrize("value", ["gelu_tan", "relu6", None, 1, ["gelu"]])
def test_an_unknown_activation_is_refused_with_the_known_ones(value: Any) -> None:
    message = refusal(activation=value)
    assert "activation must be one of gelu_tanh, gelu" in message
    assert (value != "gelu_tan") or "did you mean 'gelu_tanh'" in message


@pytest.mark.parametrize("value", ["ropes", "learnt", "", None, 0, True])
def test_an_unknown_position_is_refused_with_the_known_ones(value: Any) -> None:
    message = refusal(position=value)
    assert f"position must be one of {', '.join(get_args(Position))}, got" in message
    assert (value != "ropes") or "did you mean 'rope'" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("sinks", value) for value in (False, True, 0.0, -1, "4", None, [4], math.nan)],
        *[("window", value) for value in (0, -1, True, 256.0, "256", [256, 0], [True] * 12, {})],
        *[("dilation", value) for value in (0, -1, True, 1.0, "1", None, [1, None], [1.0] * 12)],
    ],
)
def test_window_sinks_and_dilation_must_be_whole_numbers(name: str, value: Any) -> None:
    assert f"{name} must be a whole number" in refusal(**{name: value})


# Positions, windows and grouped queries: what goes together, and what has no effect


@pytest.mark.parametrize("position", [p for p in get_args(Position) if not ModelConfig(position=p).has_rotation])
def test_settings_of_rope_without_rope_are_refused(position: str) -> None:
    message = refusal(position=position, rope={"theta": 5e5})
    assert message.startswith("rope")
    assert repr(position) in message


@pytest.mark.parametrize("n_head", [12, 4])
def test_rope_turns_pairs_so_an_odd_head_is_refused(n_head: int) -> None:
    message = refusal(position="rope", n_head=n_head, n_embd=n_head * 7)
    assert "head_dim is 7" in message
    assert ModelConfig(position="none", n_head=n_head, n_embd=n_head * 7).head_dim == 7


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        *[("theta", {"theta": value}) for value in (0, 1, 0.5, -1e4, math.nan, math.inf, "10000", None, True, 10**400)],
        *[("factor", {"scaling": "linear", "factor": value}) for value in (0.5, 0, -4, math.nan, math.inf, "4", None)],
        *[("scaling", {"scaling": value, "factor": 4}) for value in ("yarm", "dynamic", 4, ["ntk"])],
        ("factor", {"factor": 4.0}),
        ("scaling", {"scaling": "yarn"}),
    ],
)
def test_rope_settings_that_are_impossible_or_idle_are_refused(name: str, rope: dict[str, Any]) -> None:
    message = refusal(position="rope", rope=rope)
    assert message.startswith("rope")
    assert name in message
    assert (rope.get("scaling") != "yarm") or "did you mean 'yarn'" in message


def test_rope_must_be_its_settings_and_ntk_needs_two_pairs() -> None:
    assert "theta, scaling, factor and trained_length" in refusal(position="rope", rope=10000.0)
    assert "two pairs" in refusal(position="rope", n_embd=24, rope={"scaling": "ntk", "factor": 2.0})


@pytest.mark.parametrize(
    "values", [{"sinks": 4}, {"dilation": 2}, {"dilation": [1, 2] * 6}, {"sinks": 1, "dilation": 3}]
)
@pytest.mark.parametrize("window", [None, [None] * 12])
def test_sinks_and_dilation_without_any_window_are_refused(values: dict[str, Any], window: Any) -> None:
    assert "no effect without a window" in refusal(window=window, **values)


def test_dilation_listed_for_a_layer_without_a_window_is_refused() -> None:
    assert "layers without a window" in refusal(window=[256, None] * 6, dilation=[1, 2] * 6)
    config = ModelConfig(window=(256, None) * 6, dilation=2)  # one number is meant for those that have a window
    assert config.dilations == (2, 1) * 6


@pytest.mark.parametrize("values", [{"window": [256] * 11}, {"window": []}, {"window": 256, "dilation": [1, 2]}])
def test_lists_of_a_wrong_length_are_refused_with_both_lengths(values: dict[str, Any]) -> None:
    message = refusal(**values)
    assert "n_layer=12" in message
    listed = next(value for value in values.values() if isinstance(value, list))
    assert f"lists {len(listed)} layers" in message


@pytest.mark.parametrize(
    "values",
    [
        {"position": "rope", "n_kv_head": 4, "window": 256},
        {"position": "rope", "rope": {"theta": 5e5, "scaling": "yarn", "factor": 4.0}},
        {"position": "none", "n_kv_head": 1},
        {"window": [128] * 4 + [256] * 4 + [None] * 4, "sinks": 4},
        {"window": 64, "dilation": [1, 2, 3] * 4},
    ],
)
def test_the_three_changes_go_through_json(values: dict[str, Any]) -> None:
    config = ModelConfig.preset("gpt2", **values)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert len(config.windows) == len(config.dilations) == 12


@pytest.mark.parametrize("window", [1024, 5000, [256] * 11 + [1024]])
def test_a_window_as_long_as_the_context_is_allowed_with_one_line_of_warning(window: Any) -> None:
    with pytest.warns(UserWarning, match="hides nothing") as caught:
        ModelConfig(window=window)
    (warning,) = caught
    message = str(warning.message)
    assert "\n" not in message
    assert "context_length of 1024" in message
    assert str(max(window) if isinstance(window, list) else window) in message
    assert warning.filename == __file__


@pytest.mark.parametrize("values", [{"window": 1023}, {"window": 1024, "dilation": 2}, {"window": [1023, None] * 6}])
def test_a_window_that_hides_something_is_not_warned_about(values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig(**values)
