from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import close, noisy, random_ids
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptlab import GptlabError
from gptlab.model import PADDING, Tokens, Visibility, kernels
from gptlab.model.attention import attend
from gptlab.model.kernels import KERNELS, Inputs, attention_weights, reference, select, use

WHOLE = ["banded", "unfused"]
"""Those that need whole sequences; test_windows.py compares them with the reference."""
OTHERS = [name for name in KERNELS if name not in ("reference", *WHOLE)]
EVERY = ["reference", *OTHERS]
"""Those that compute anything."""
H, D, B = 6, 8, 2

Case = tuple[Tokens, Tokens]


def known(length: int) -> Case:
    tokens = Tokens(torch.arange(length).expand(B, -1), plain=True)
    return tokens, tokens


def unknown(length: int) -> Case:
    tokens = Tokens(torch.arange(length).expand(B, -1))
    return tokens, tokens


def documents() -> Case:
    numbers = torch.tensor([[0] * 5 + [1] * 9 + [2] * 6, [3] * 19 + [0]])
    tokens = Tokens(torch.arange(20).expand(B, -1), numbers)
    return tokens, tokens


def padded(*rows: list[int]) -> Case:
    tokens = Tokens(torch.tensor(rows))
    return tokens, tokens


def rectangle(n_queries: int, n_keys: int, plain: bool = True) -> Case:
    queries = Tokens(torch.arange(n_keys - n_queries, n_keys).expand(B, -1), plain=plain)
    return queries, Tokens(torch.arange(n_keys).expand(B, -1), plain=plain)


def ragged_rectangle() -> Case:
    """New tokens of rows of different lengths, one of them padding, against a cache with empty slots."""
    queries = Tokens(torch.tensor([[4, 5, 6], [PADDING, 2, 3]]))
    return queries, Tokens(torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, PADDING, PADDING, PADDING]]))


CASES: dict[str, Callable[[], Case]] = {
    "one token": lambda: known(1),
    "causal": lambda: known(20),
    "causal, not known to be": lambda: unknown(20),
    "documents": documents,
    "padding on the left": lambda: padded([-1, -1, -1, 0, 1, 2], [0, 1, 2, 3, 4, 5]),
    "padding inside": lambda: padded([0, -1, 1, -1, 2, -1], [-1, 0, 1, -1, -1, 2]),
    "a row of padding": lambda: padded([-1] * 6, [0, 1, 2, 3, 4, 5]),
    "one query, many keys": lambda: rectangle(1, 20),
    "some queries, more keys": lambda: rectangle(5, 20),
    "some queries, more keys, not known": lambda: rectangle(5, 20, plain=False),
    "ragged queries, more keys": ragged_rectangle,
}


def inputs(case: Case, n_kv_head: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n_queries, n_keys = case[0].positions.shape[1], case[1].positions.shape[1]
    shapes = [(B, H, n_queries, D), (B, n_kv_head, n_keys, D), (B, n_kv_head, n_keys, D)]
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
    """Head by head and query by query, in float64, with the rule written out again."""
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])  # contiguous groups: Ainslie et al. 2023
            for i, at in enumerate(queries.positions[b].tolist()):
                seen = [
                    j
                    for j, there in enumerate(keys.positions[b].tolist())
                    if at == PADDING
                    or (
                        there != PADDING
                        and there <= at
                        and (
                            queries.documents is None
                            or keys.documents is None
                            or queries.documents[b, i] == keys.documents[b, j]
                        )
                    )
                ]
                scores = k[b, g, seen].double() @ q[b, h, i].double() / math.sqrt(D)
                powers = torch.exp(scores - scores.max())
                out[b, h, i] = powers / powers.sum() @ v[b, g, seen].double()
    return out


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_is_the_formula(name: str, n_kv_head: int, kernel: str) -> None:
    case = CASES[name]()
    q, k, v = inputs(case, n_kv_head)
    with torch.no_grad():
        actual = KERNELS[kernel](Inputs(q, k, v, Visibility(), *case))
        close(actual, by_hand(q, k, v, *case).float())


@pytest.mark.parametrize("kernel", OTHERS)
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_agrees_with_the_reference_forward_and_backward(name: str, n_kv_head: int, kernel: str) -> None:
    case = CASES[name]()
    results = []
    for compute in (reference, KERNELS[kernel]):
        qkv = inputs(case, n_kv_head)
        out = compute(Inputs(*qkv, Visibility(), *case))
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad((out * upstream).sum(), qkv)])
    for expected, actual in zip(*results, strict=True):
        assert torch.isfinite(expected).all()
        close(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_reference_gradients_are_those_of_finite_differences(name: str) -> None:
    # In float64 the kernel itself rounds to float32, so one direction and a coarse step.
    case = CASES[name]()
    qkv = inputs(case, 3)
    directions = [t.detach() for t in inputs(case, 3, seed=2)]
    out = reference(Inputs(*qkv, Visibility(), *case))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((out * upstream).sum(), qkv)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()

    def value(step: float) -> float:
        moved = [t.detach().double() + step * d.double() for t, d in zip(qkv, directions, strict=True)]
        return (by_hand(*moved, *case) * upstream.double()).sum().item()

    assert along == pytest.approx((value(1e-4) - value(-1e-4)) / 2e-4, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kernel", EVERY)
def test_padding_makes_no_nan_and_real_tokens_ignore_it(kernel: str) -> None:
    case = padded([-1, -1, 0, 1, -1, 2], [-1] * 6)
    q, k, v = inputs(case, 3)
    out = KERNELS[kernel](Inputs(q, k, v, Visibility(), *case))
    gradients = torch.autograd.grad(out[0, :, [2, 3, 5]].sum(), (q, k, v))
    assert all(torch.isfinite(t).all() for t in (out, *gradients))
    for gradient in gradients:
        assert torch.equal(gradient[0, :, [0, 1, 4]], torch.zeros_like(gradient[0, :, [0, 1, 4]]))
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_queries(kernel: str, dtype: torch.dtype) -> None:
    case = known(20)
    q, k, v = (t.detach() for t in inputs(case, 3))
    actual = KERNELS[kernel](Inputs(q.to(dtype), k.to(dtype), v.to(dtype), Visibility(), *case))
    assert actual.dtype == dtype
    close(actual.float(), reference(Inputs(q, k, v, Visibility(), *case)), 0.03)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_shares(name: str) -> None:
    case = CASES[name]()
    q, k, _ = (t.detach() for t in inputs(case, 3))
    weights = attention_weights(q, k, Visibility(), *case)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-6)
    hidden = ~Visibility().visible(*case)[:, None].expand_as(weights)
    assert torch.equal(weights[hidden], torch.zeros(int(hidden.sum())))


@pytest.mark.parametrize("kernel", EVERY)
def test_dropout_drops_its_share_of_the_weights_and_scales_the_rest(kernel: str) -> None:
    torch.manual_seed(0)
    queries, keys = rectangle(1, 400)
    # With equal scores and an identity for values, the output is the weights themselves.
    q, k = torch.zeros(B, 1, 1, 400), torch.zeros(B, 1, 400, 400)
    v = torch.eye(400).expand(B, 1, -1, -1)
    out = KERNELS[kernel](Inputs(q, k, v, Visibility(), queries, keys, 0.25))
    dropped = out == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.08  # 800 draws: five standard errors
    close(out[~dropped], torch.full((int((~dropped).sum()),), 1 / 400 / 0.75), 1e-7)


@pytest.mark.parametrize("kernel", WHOLE)
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_whole_sequences_refuse_what_they_cannot_compute(name: str, kernel: str) -> None:
    case = CASES[name]()
    q, k, v = inputs(case, 3)
    for rule in (Visibility(), Visibility(4)):  # nothing says that these are whole sequences
        with pytest.raises(GptlabError, match=f"the {kernel} kernel needs whole sequences"):
            KERNELS[kernel](Inputs(q, k, v, rule, *case))


@pytest.mark.parametrize("kernel", WHOLE)
def test_kernels_of_whole_sequences_refuse_dropout(kernel: str) -> None:
    tokens = Tokens(torch.arange(20).expand(B, -1), in_order=True)
    q, k, v = inputs((tokens, tokens), 3)
    KERNELS[kernel](Inputs(q, k, v, Visibility(4), tokens, tokens))
    with pytest.raises(GptlabError, match="no dropout"):
        KERNELS[kernel](Inputs(q, k, v, Visibility(4), tokens, tokens, 0.1))


# Choosing


def chosen() -> kernels.Kernel:
    return select(Inputs(*inputs(known(3), H), Visibility(), *known(3)))


def test_an_unknown_kernel_is_refused_with_the_nearest_name() -> None:
    with (
        pytest.raises(GptlabError, match=r"unknown kernel 'sdap' \(did you mean 'sdpa'\?\); there are reference"),
        use("sdap"),
    ):
        pass


def test_use_forces_a_kernel_and_gives_the_choice_back() -> None:
    default = chosen()
    with use("reference"):
        assert chosen() is reference
        with use("sdpa"):
            assert chosen() is KERNELS["sdpa"]
        assert chosen() is reference
    assert chosen() is default


def test_use_gives_the_choice_back_after_an_error() -> None:
    default = chosen()
    with pytest.raises(ZeroDivisionError), use("reference"):
        _ = 1 / 0
    assert chosen() is default


def test_the_forced_kernel_is_the_one_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def spy(*args: object) -> Tensor:
        called.append(len(args))
        return reference(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(kernels.KERNELS, "reference", spy)
    model = noisy(n_layer=3)
    ids = random_ids(model, 1, 5)
    expected = model(ids)
    assert not called
    with use("reference"):
        close(model(ids), expected)
    assert len(called) == 3


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gptlab.model.kernels"), use("reference"):
        case = known(3)
        attend(*inputs(case, H), Visibility(), case[0])
    assert "reference" in caplog.text


def chosen_on(device: str, **changes: object) -> str:
    """The choice for half-precision inference with a window, on a pretended device, with some changes."""
    case: dict[str, Any] = {"length": 600, "dtype": torch.bfloat16, "rule": Visibility(256), "training": False}
    case |= {"known": {"plain": True, "in_order": True}} | changes
    with FakeTensorMode():
        shapes = [(B, n, case["length"], 64) for n in (H, 2, 2)]
        q, k, v = (torch.empty(shape, device=device, dtype=case["dtype"]) for shape in shapes)
    for x in (q, k, v):
        x.requires_grad_(case["training"])
    tokens = Tokens(torch.arange(case["length"]).expand(B, -1), **case["known"])
    kernel = select(Inputs(q, k, v, case["rule"], tokens, tokens))
    return next(name for name, one in (KERNELS | kernels.SPECIAL).items() if one is kernel)


@pytest.mark.parametrize("length", [600, 4096])
@pytest.mark.parametrize("training", [False, True])
def test_on_cuda_nothing_is_chosen_that_no_gpu_has_run(length: int, training: bool) -> None:
    assert chosen_on("cuda", length=length, training=training) == "sdpa"


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [600, 4096])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_that_compiles_is_chosen_elsewhere(
    device: str, dtype: torch.dtype, length: int, training: bool
) -> None:
    changes = {"dtype": dtype, "length": length, "training": training}
    keeps = device == "cpu" and dtype == torch.bfloat16 and training  # the weights, where there are few
    assert chosen_on(device, **changes) == ("unfused" if keeps else "banded")
    assert chosen_on(device, **changes, known={}) == "sdpa"
    assert chosen_on(device, **changes, rule=Visibility()) == "sdpa"


@pytest.mark.parametrize(("length", "name"), [(512, "unfused"), (513, "sdpa")])
def test_weights_are_kept_for_short_sequences_alone(length: int, name: str) -> None:
    assert chosen_on("cpu", length=length, rule=Visibility(), training=True) == name
    assert chosen_on("cpu", length=length, rule=Visibility()) == "sdpa"


@pytest.mark.parametrize("name", kernels.SPECIAL)
def test_a_special_kernel_is_forced_even_where_it_can_only_refuse(name: str) -> None:
    model = noisy(window=3, dropout=0.1).train()
    with (
        use(name),
        pytest.raises(GptlabError, match=f"the {name} kernel does not support dropout; choose another kernel"),
    ):
        model(random_ids(model, 1, 20))
