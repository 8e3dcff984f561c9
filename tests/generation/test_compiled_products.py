"""Products of whole numbers: by the processor's tiles, by its vectors, and by arithmetic that is exact."""

import contextlib

import pytest
import torch

from gptlab.config import ModelConfig
from gptlab.generation.compiled import library, linear, step
from gptlab.generation.compiled.decoder import Compiled
from gptlab.model import quantised
from gptlab.model.gpt import GPT
from gptlab.model.quantised import QuantisedLinear, dequantise, multiplied_by, quantise, quantise_model

try:
    HAS_TILES = bool(library.library().gptlab_use_tiles(1))
except library.NoLibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="this processor has no tiles (AMX), or no permission for them")


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """The C++ computes even where PyTorch is faster."""

    class Library:
        def __getattr__(self, name):
            return (lambda bits: True) if name == "gptlab_linear_is_fast" else getattr(library.library(), name)

    monkeypatch.setattr(linear, "library", Library)


@contextlib.contextmanager
def tiles(use):
    library.library().gptlab_use_tiles(int(use))
    try:
        yield
    finally:
        library.library().gptlab_use_tiles(1)


def draw(n_rows, n_in, n_out, seed=0):
    """Rows that are whole numbers of 16 bits already, int8 weights, their factors and biases."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-32767, 32768, (n_rows, n_in), generator=random).float()
    x[:, -1] = 32767  # so that a row's factor is 1
    weight = torch.randint(-127, 128, (n_out, n_in), generator=random, dtype=torch.int8)
    return x, weight, torch.rand(n_out, generator=random), torch.randn(n_out, generator=random)


def exact(x, weight, factors, bias):
    """One rounding of the whole sum, one after each factor, one after the bias."""
    totals = x.long() @ weight.long().T
    y = totals.float() * factors
    return y if bias is None else y + bias


@pytest.mark.parametrize("use", [False, pytest.param(True, marks=needs_tiles)])
@pytest.mark.parametrize(
    ("n_in", "n_out"),
    [(1, 1), (32, 40), (48, 33), (64, 32), (80, 47), (127, 50), (576, 101), (768, 96), (3072, 64), (8200, 35)],
)
def test_sums_are_exact_and_rounded_once(n_in, n_out, use):
    for n_rows in [1, 2, 3, 4, 5, 15, 16, 17, 33, 40, 150]:
        numbers = draw(n_rows, n_in, n_out, seed=n_rows)
        with tiles(use):
            assert torch.equal(linear.multiply(*numbers), exact(*numbers)), n_rows
            assert torch.equal(linear.multiply(*numbers[:3], None), exact(*numbers[:3], None))


@pytest.mark.parametrize("use", [False, pytest.param(True, marks=needs_tiles)])
def test_the_largest_sums_fit(use):
    for n_in in (8128, 65536, 65600):
        for sign in (1, -1):
            numbers = (
                torch.full((6, n_in), 32767.0),
                torch.full((40, n_in), -128, dtype=torch.int8),
                torch.ones(40),
                None,
            )
            numbers[0][1::2] *= sign
            with tiles(use):
                assert torch.equal(linear.multiply(*numbers), exact(*numbers))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("use", [False, pytest.param(True, marks=needs_tiles)])
def test_a_row_that_is_not_numbers_spoils_no_other(use, bits):
    x = torch.randn(24, 96)
    weight, factors = quantise(torch.randn(70, 96), bits)
    with tiles(use):
        before = linear.multiply(x, weight, factors, None)
        x[5, 7], x[17, 90] = torch.nan, torch.inf
        x[20] = 0.0
        after = linear.multiply(x, weight, factors, None)
    assert after[[5, 17]].isnan().all()
    assert (after[20] == 0).all()
    others = [row for row in range(24) if row not in (5, 17, 20)]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("use", [False, pytest.param(True, marks=needs_tiles)])
@pytest.mark.parametrize(("n_in", "n_out"), [(32, 7), (64, 32), (96, 45), (160, 64), (768, 70), (3072, 33)])
def test_4_bits_are_those_of_float64(n_in, n_out, use):
    for n_rows in (1, 5, 16, 40, 150):
        x, weight, _, bias = draw(n_rows, n_in, n_out)
        weight, factors = quantise(weight.float(), 4)
        expected = x.double() @ dequantise(weight, factors).double().T + bias
        with tiles(use):
            y = linear.multiply(x, weight, factors, bias).double()
        assert (y - expected).abs().max() < 2e-6 * expected.std()


@pytest.mark.parametrize("bits", [8, 4])
def test_plain_pytorch_multiplies_in_pieces_and_the_same(bits, monkeypatch):
    linear_module = QuantisedLinear(*quantise(torch.randn(100, 64), bits), torch.nn.Parameter(torch.randn(100)))
    x = torch.randn(2, 3, 64, requires_grad=True)
    monkeypatch.setattr(quantised, "fast_bfloat16", lambda: False)
    whole = linear_module(x)
    monkeypatch.setattr(quantised, "PIECE", 64 * 17)
    pieces = linear_module(x)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(
        pieces, x @ dequantise(linear_module.weight, linear_module.factors).T + linear_module.bias
    )
    pieces.sum().backward()
    torch.testing.assert_close(x.grad, dequantise(linear_module.weight, linear_module.factors).sum(0).expand_as(x))
    with torch.no_grad(), multiplied_by(linear.multiply):
        torch.testing.assert_close(linear_module(x), whole, rtol=1e-3, atol=1e-3)


@needs_tiles
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_by_tiles_has_the_same_bits(threads, monkeypatch):
    monkeypatch.setattr(step, "n_threads", lambda: threads)
    model = GPT(ModelConfig(vocab_size=211, context_length=64, n_layer=2, n_head=4, n_embd=80, n_inner=136)).eval()
    quantise_model(model, 8)
    tokens = torch.arange(37)

    def logits(use):
        with torch.inference_mode(), tiles(use):
            decoder = Compiled(model, [[i, 1] for i in range(37)], 10)
            return torch.stack([decoder.read(), decoder.step(tokens), decoder.step(tokens + 1)])

    assert torch.equal(logits(True), logits(False))
