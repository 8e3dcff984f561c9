from pathlib import Path

import numpy as np
import pytest
import torch

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation import engine, memory, padded
from gptlab.generation.compiled.library import NoLibraryError, library
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.padded import last_logits, pad_left
from gptlab.generation.sampling import Sampling
from gptlab.model.gpt import GPT
from gptlab.text.tokenizers import Tokenizer

GREEDY = Sampling(0)
VOCAB = 257
PROMPTS = [[5], [7, 1, 200, 13, 44, 90, 3], [256, 17], [9] * 20, [30, 31, 32]]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine several threads make models this small fifty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, params=["padded"])
def decoder(request, monkeypatch):
    """Which of the two decoders computes: the plain one unless a test asks for both."""
    monkeypatch.setattr(engine, "serves", lambda *_: request.param == "compiled")
    if request.param == "compiled":
        try:
            library()
        except NoLibraryError as error:
            pytest.skip(str(error))


BOTH = pytest.mark.parametrize("decoder", ["padded", "compiled"], indirect=True)


class Numbers(Tokenizer):
    """A token's text is its number, so that texts show every id."""

    def __init__(self, vocab_size=VOCAB, end_of_text=None):
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text

    def _decode(self, ids):
        return "".join(f"{i} " for i in ids).encode()

    def _encode_ordinary(self, texts):
        return [[int(word) for word in text.split()] for text in texts]

    def files(self):
        raise NotImplementedError


def make_model(**overrides):
    """A random model whose logits differ by several units: texts vary, and rounding decides nothing."""
    model = GPT(ModelConfig.preset("tiny", **{"vocab_size": VOCAB, **overrides}), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def run(model, prompts, sampling=GREEDY, n=20, stop=(), tokenizer=None):
    tokenizer = tokenizer or Numbers()
    grown = [Continuation(tokenizer, stop) for _ in prompts]
    pieces = list(decode(model, prompts, grown, sampling=sampling, max_new_tokens=n, vocab_size=tokenizer.vocab_size))
    for row, continuation in enumerate(grown):
        assert "".join(piece for i, piece in pieces if i == row) == continuation.text
    return grown


def tokens(grown):
    return [continuation.tokens for continuation in grown]


@torch.no_grad()
def naive_greedy(model, prompt, n):
    """One whole forward pass a token, nothing remembered."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def naive_sampled(model, prompt, n, temperature, seed, row):
    """What `Sampling` promises, written out: the row's own uniform numbers against the summed softmax."""
    stream = np.random.default_rng([seed, row])
    ids = list(prompt)
    for _ in range(n):
        weights = torch.softmax(model(torch.tensor([ids]))[0, -1].double() / temperature, -1).numpy()
        ids.append(int((weights.cumsum() <= stream.random()).sum()))
    return ids[len(prompt) :]


def test_greedy_equals_the_naive_loop_without_a_cache(model):
    for prompt in PROMPTS:
        (grown,) = run(model, [prompt], n=30)
        assert grown.tokens == naive_greedy(model, prompt, 30)
        assert grown.finish == "length"
    assert len(set(grown.tokens)) > 3  # the model does not merely repeat itself


def test_sampling_equals_the_naive_loop_without_a_cache(model):
    grown = run(model, PROMPTS, Sampling(0.9, seed=3), n=20)
    expected = [naive_sampled(model, prompt, 20, 0.9, 3, row) for row, prompt in enumerate(PROMPTS)]
    assert tokens(grown) == expected


def test_a_batch_gives_what_each_prompt_gives_alone(model):
    assert tokens(run(model, PROMPTS)) == [tokens(run(model, [prompt]))[0] for prompt in PROMPTS]


def test_a_row_does_not_depend_on_the_others(model):
    sampling = Sampling(1.0, top_k=50, top_p=0.95, seed=11)
    whole = tokens(run(model, PROMPTS, sampling))
    others = [[1, 2], [3] * 30, [4], [5, 6, 7]]
    for row, prompt in enumerate(PROMPTS[:4]):
        mixed = [*others[:row], prompt, *others[row:]]
        assert tokens(run(model, mixed, sampling))[row] == whole[row]


def test_equal_prompts_of_a_batch_give_different_texts(model):
    texts = tokens(run(model, [[1, 2]] * 6, Sampling(1.0, seed=5)))
    assert len({tuple(text) for text in texts}) == 6
    assert len({tuple(text) for text in tokens(run(model, [[1, 2]] * 6))}) == 1


def test_the_same_seed_gives_the_same_text_and_another_does_not(model):
    first, again, other = (tokens(run(model, PROMPTS, Sampling(1.0, seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_global_random_state_is_not_touched(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(model, PROMPTS, Sampling(1.0, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_end_early_leave_the_batch_and_others_go_on(model):
    sampling = Sampling(1.0, seed=2)
    alone = tokens(run(model, PROMPTS, sampling, n=30))
    # The end of text is a token that row 0 draws early; some others draw it later or never.
    end = alone[0][2]
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    grown = run(model, PROMPTS, sampling, n=30, tokenizer=Numbers(end_of_text=end))
    hook.remove()
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in alone]
    assert tokens(grown) == expected
    assert [g.finish for g in grown] == ["end_of_text" if end in ids else "length" for ids in alone]
    assert len({len(ids) for ids in expected}) > 1
    # After the prompt, one token for each row that has not ended, and no pass for nobody.
    assert sizes[0] == (5, 20)
    draws = [min(len(ids) + (end in full), 30) for ids, full in zip(expected, alone, strict=True)]
    assert sizes[1:] == [(sum(d > step for d in draws), 1) for step in range(1, max(draws))]


def test_the_longest_row_may_leave_first(model):
    # The cache then goes on with shorter rows only, and needs fewer slots than were used.
    prompts = [[5, 6], list(range(40)), [8]]
    alone = [tokens(run(model, [prompt], n=25))[0] for prompt in prompts]
    end = alone[1][1]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in alone]
    assert len(expected[1]) < min(len(expected[0]), len(expected[2]))
    assert tokens(run(model, prompts, n=25, tokenizer=Numbers(end_of_text=end))) == expected


@pytest.mark.parametrize("length", [1, 40, 62, 63, 64])
def test_the_context_ends_exactly_when_it_is_full(model, length):
    # Each of the 64 positions is read once, and the last of them still says which token comes next.
    prompt = [i % 250 for i in range(length)]
    (grown,) = run(model, [prompt], n=1000)
    assert len(grown.tokens) == 65 - length
    assert grown.finish == "context"
    assert grown.tokens == naive_greedy(model, prompt, 65 - length)


def test_as_many_tokens_as_asked_for_or_as_fit(model):
    prompt = [1] * 60
    assert [len(run(model, [prompt], n=n)[0].tokens) for n in (1, 3, 4, 5, 6)] == [1, 3, 4, 5, 5]
    assert [run(model, [prompt], n=n)[0].finish for n in (4, 5, 6)] == ["length", "context", "context"]


def test_a_full_context_ends_its_own_row_only(model):
    prompts = [[3, 4], [1] * 64, [1] * 61, [9]]
    grown = run(model, prompts, n=40)
    assert [g.finish for g in grown] == ["length", "context", "context", "length"]
    assert [len(g.tokens) for g in grown] == [40, 1, 4, 40]
    assert tokens(grown) == [tokens(run(model, [prompt], n=40))[0] for prompt in prompts]


def test_a_prompt_longer_than_the_context_is_refused(model):
    with pytest.raises(GptlabError, match="the prompt has 65 tokens, the model's context holds 64; shorten the prompt"):
        run(model, [[1], [1] * 65])


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(GptlabError, match="the prompt is empty"):
        run(model, [[1], []])


def test_no_prompts_give_nothing(model):
    assert run(model, []) == []


def test_padding_of_the_vocabulary_is_never_sampled():
    model = make_model(vocab_size=300)
    with torch.no_grad():
        model.wte.weight[VOCAB:] *= 30  # by far the largest logits, of one sign or the other
    logits = model(torch.tensor([PROMPTS[1]]))[0, -1]
    assert logits.argmax() >= VOCAB
    for sampling in (GREEDY, Sampling(1.0, seed=1), Sampling(1e6, seed=1), Sampling(1.0, 5, 0.9)):
        grown = run(model, PROMPTS, sampling, n=30)
        assert max(max(ids) for ids in tokens(grown)) < VOCAB


def test_pieces_come_while_the_text_grows(model):
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    (continuation,) = grown = [Continuation(Numbers())]
    pieces = decode(model, [[1]], grown, sampling=GREEDY, max_new_tokens=9, vocab_size=VOCAB)
    for n in range(1, 10):
        row, piece = next(pieces)
        assert (row, piece) == (0, f"{continuation.tokens[-1]} ")
        assert len(passes) == len(continuation.tokens) == n
    hook.remove()


def test_nothing_is_left_switched_off_between_pieces(model):
    pieces = decode(model, [[1]], [Continuation(Numbers())], sampling=GREEDY, max_new_tokens=3, vocab_size=VOCAB)
    for _ in pieces:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_last_pass_is_not_wasted(model):
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    run(model, [[1]], n=7)
    hook.remove()
    assert len(passes) == 7


def test_last_logits_are_the_last_of_all_logits(model):
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(model(ids, head=last_logits), model(ids)[:, -1], rtol=0, atol=1e-5)


def test_padding_stands_on_the_left_at_no_position():
    ids, positions = pad_left([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert positions.tolist() == [[0, 1, 2], [-1, -1, 0]]
    ids, positions = pad_left([[5, 6], [8, 9]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [8, 9]]
    assert positions is None


# What bfloat16 promises: docs/generation.md


def test_in_bfloat16_other_rows_move_a_row_by_rounding_alone():
    model = make_model().bfloat16()
    again = [tokens(run(model, PROMPTS, Sampling(1.0, seed=3))) for _ in range(2)]
    assert again[0] == again[1]  # the same call gives the same texts
    logits, hook = [], None
    for prompts in ([PROMPTS[1]], PROMPTS):
        outputs = []
        hook = model.lm_head.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out.float()))
        run(model, prompts, n=1)
        hook.remove()
        logits.append(outputs[-1])
    alone, together = logits[0][0], logits[1][1]
    # bfloat16 has 8 bits: a few units in the last place of the largest logit, where another row would be far off.
    assert (alone - together).abs().max() <= 8 * 2**-8 * alone.abs().max()
    assert (alone - logits[1][0]).abs().max() > 50 * 2**-8 * alone.abs().max()
    assert tokens(run(model, PROMPTS)) == [tokens(run(model, [prompt]))[0] for prompt in PROMPTS]  # greedy is the same


# Rotary positions, windows, grouped queries

ENDLESS = {"position": "rope", "n_kv_head": 2, "window": 16, "sinks": 2}
SWITCHES = [
    {"position": "rope"},
    {"position": "none", "n_kv_head": 1},
    {"position": "learned", "window": 5, "n_kv_head": 2},
    {"position": "rope", "window": (6, None), "sinks": 1},
    {"position": "rope", "window": (4, 3), "dilation": (1, 3), "sinks": 2, "n_kv_head": 2},
]


@BOTH
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("chunk", [8, 512])
def test_every_variant_continues_a_ragged_batch_as_the_naive_loop(switches, chunk, monkeypatch):
    monkeypatch.setattr(padded, "CHUNK", chunk)
    model = make_model(**switches)
    prompts = [*PROMPTS, [i % 200 for i in range(17)], [3] * 8, [4] * 16]
    assert tokens(run(model, prompts, n=25)) == [naive_greedy(model, prompt, 25) for prompt in prompts]
    sampling = Sampling(0.9, seed=3)
    expected = [naive_sampled(model, prompt, 12, 0.9, 3, row) for row, prompt in enumerate(prompts)]
    assert tokens(run(model, prompts, sampling, n=12)) == expected


@pytest.mark.parametrize("length", [7, 8, 9, 15, 16, 17, 64])
def test_a_prompt_is_read_in_chunks_and_its_last_token_gives_the_first(length, monkeypatch):
    monkeypatch.setattr(padded, "CHUNK", 8)
    model = make_model(**ENDLESS)
    prompt, sizes = [i % 250 for i in range(length)], []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    (grown,) = run(model, [prompt], n=4)
    full, rest = divmod(length - 1, 8)
    assert sizes == [8] * full + [rest + 1] + [1] * 3
    assert grown.tokens == naive_greedy(model, prompt, 4)


@BOTH
@pytest.mark.parametrize("switches", [ENDLESS, {"position": "rope"}, {"position": "none"}], ids=str)
def test_prompts_longer_than_a_chunk_and_than_the_trained_context_go_on(switches):
    model = make_model(**switches)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(VOCAB, size=n).tolist() for n in (padded.CHUNK * 2 + 30, 65, padded.CHUNK + 1)]
    grown = run(model, prompts, n=6)
    assert tokens(grown) == [naive_greedy(model, prompt, 6) for prompt in prompts]
    assert [g.finish for g in grown] == ["length"] * 3


@pytest.mark.parametrize("switches", [{"window": 8}, {"window": (8, None), "sinks": 1}, {"n_kv_head": 1}], ids=str)
def test_learned_positions_end_with_their_context_whatever_the_window(switches):
    model = make_model(**switches)
    prompts = [[3] * 40, [7, 8]]
    grown = run(model, prompts, n=1000)
    assert [g.finish for g in grown] == ["context", "context"]
    assert tokens(grown) == [naive_greedy(model, prompt, 65 - len(prompt)) for prompt in prompts]
    with pytest.raises(GptlabError, match="the prompt has 65 tokens, the model's context holds 64"):
        run(model, [[1] * 65])


# How the cache grows


def caches_of(model, monkeypatch):
    caches, make_cache = [], model.make_cache
    monkeypatch.setattr(
        model, "make_cache", lambda *args, **rest: caches.append(make_cache(*args, **rest)) or caches[-1]
    )
    return caches


@pytest.mark.parametrize("switches", [{}, *SWITCHES, ENDLESS, {"position": "rope", "window": 200}], ids=str)
def test_a_cache_that_grows_gives_the_same_bits(switches, monkeypatch):
    model = make_model(context_length=400, **switches)
    prompts, sampling = [*PROMPTS[:3], [3] * 40], Sampling(1.0, seed=4)
    seen = {}
    for reserve in (0, 1, 64, 10**6):
        monkeypatch.setattr(padded, "RESERVE", reserve)
        logits = seen.setdefault(reserve, [])
        hook = model.lm_head.register_forward_hook(lambda _, __, out, logits=logits: logits.append(out))
        logits.append(tokens(run(model, prompts, sampling, n=150)))
        hook.remove()
    for logits in seen.values():
        assert logits[-1] == seen[64][-1]
        assert all(torch.equal(a, b) for a, b in zip(logits[:-1], seen[64][:-1], strict=True))


@BOTH
@pytest.mark.parametrize("n", [100_000, 10**9, 10**30])
def test_a_long_text_that_ends_early_takes_little_memory(n, monkeypatch):
    model = make_model(position="rope")
    caches = caches_of(model, monkeypatch)
    ends = tokens(run(model, [[5]], Sampling(1.0, seed=1), n=5))[0][-1]
    (grown,) = run(model, [[5]], Sampling(1.0, seed=1), n=n, tokenizer=Numbers(end_of_text=ends))
    assert grown.finish == "end_of_text"
    assert caches[1].nbytes == 2 * 2 * (1 + padded.RESERVE) * 4 * 8 * 4  # k and v, layers, slots, heads, width, bytes


def test_a_cache_grows_seldom_and_to_at_most_twice_what_it_holds(monkeypatch):
    model = make_model(position="rope")
    caches, sizes = caches_of(model, monkeypatch), []
    model.register_forward_hook(lambda *_: sizes.append(caches[0].layers[0].k.shape[2]))
    run(model, [[5]], n=1000)
    assert sorted(set(sizes)) == [65, 130, 260, 520, 1001]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("free", "n_rows", "said"),
    [
        (0, 1, "1 text at once, 1 tokens each to begin with, takes about 0.0 GiB of memory, and 0.0 GiB are free;"),
        (2**32, 10**9, "1,000,000,000 texts at once, 1 tokens each to begin with, take about .* GiB of memory"),
    ],
)
def test_a_batch_that_memory_cannot_hold_is_refused_before_the_work(free, n_rows, said, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    model = make_model(position="rope")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(GptlabError, match=f"{said}.*continue fewer texts"):
        engine.check_batch(model, n_rows, 1)
    if n_rows == 1:
        with pytest.raises(GptlabError, match=said):
            run(model, [[5]])


def test_a_text_that_outgrows_the_memory_ends_in_a_sentence(monkeypatch):
    model = make_model(position="rope")
    (grown,) = [Continuation(Numbers())]
    pieces = decode(model, [[5]], [grown], sampling=GREEDY, max_new_tokens=10**9, vocab_size=VOCAB)
    next(pieces)
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(GptlabError, match="going on after 65 tokens takes about"):
        for _ in pieces:
            pass
    assert len(grown.tokens) == 65


def test_an_allocation_that_fails_is_a_sentence(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    model = make_model(position="rope")
    model.register_forward_hook(lambda *_: torch.empty(2**60))  # what this machine cannot have
    with pytest.raises(GptlabError, match="the memory does not suffice to go on; continue fewer texts"):
        run(model, [[5]])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc")
def test_the_available_memory_is_what_psutil_says():
    psutil = pytest.importorskip("psutil")
    free = memory.available_memory(torch.device("cpu"))
    assert 0 < free <= psutil.virtual_memory().available * 1.2


# Repetition penalty and min-p


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_a_repetition_penalty_gives_the_greedy_text_of_transformers(penalty, n_samples):
    transformers = pytest.importorskip("transformers")
    model = make_model()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
    ).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: t.T if name.endswith(turned) else t for name, t in model.tensors().items()}
    theirs.transformer.load_state_dict(state)
    prompt = PROMPTS[1]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, repetition_penalty=penalty, pad_token_id=0
    )[0, len(prompt) :].tolist()
    sampling = Sampling(0, repetition_penalty=penalty)
    # Rows that were penalised otherwise, and leave at another time, change nothing.
    prompts = [prompt, [1] * 30, [2]][:n_samples]
    assert tokens(run(model, prompts, sampling, n=40))[0] == expected
    assert expected != tokens(run(model, [prompt], n=40))[0]


def test_min_p_of_one_is_greedy_and_penalties_follow_rows_that_stay():
    model = make_model()
    assert tokens(run(model, PROMPTS, Sampling(1.0, seed=3, min_p=1.0))) == tokens(run(model, PROMPTS))
    sampling = Sampling(0, repetition_penalty=1.5)
    alone = [tokens(run(model, [prompt], sampling, n=30))[0] for prompt in PROMPTS]
    end = alone[0][2]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in alone]
    assert tokens(run(model, PROMPTS, sampling, n=30, tokenizer=Numbers(end_of_text=end))) == expected


@pytest.mark.parametrize("prompt", [[5, VOCAB], [-1]])
def test_ids_that_the_model_lacks_are_refused(model, prompt):
    with pytest.raises(GptlabError, match=f"the prompt has the id {prompt[-1]}, the model has 0 to 256"):
        run(model, [[1], prompt])


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@BOTH
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_rope_with_a_window_generates_for_ever_in_constant_memory(monkeypatch):
    model, n = make_model(**ENDLESS), 5500
    caches, sizes, memory = [], [], []
    make_cache = model.make_cache
    monkeypatch.setattr(
        model, "make_cache", lambda *args, **rest: caches.append(make_cache(*args, **rest)) or caches[-1]
    )
    (grown,) = [Continuation(Numbers())]
    pieces = decode(model, [[5, 6]], [grown], sampling=Sampling(1.0, seed=1), max_new_tokens=10**9, vocab_size=VOCAB)
    for _ in range(n):
        next(pieces)
        if len(grown.tokens) % 50 == 0:
            sizes.append([(layer.k.data_ptr(), layer.k.nbytes, layer.v.data_ptr()) for layer in caches[0].layers])
            memory.append(resident())
    pieces.close()
    assert len(grown.tokens) == n
    assert grown.finish is None
    assert len(caches) == 1
    full = sizes[padded.CHUNK // 50 + 1 :]  # until then the rings are not full, and grow
    assert all(size == full[0] for size in full)
    assert (
        caches[0].nbytes == 2 * 2 * (15 + padded.CHUNK + 2) * 2 * 8 * 4
    )  # k and v, layers, slots, heads, width, bytes
    slope = np.polyfit(50 * np.arange(len(memory) - 10), memory[10:], 1)[0]  # bytes per token, after warming up
    assert slope * 5000 < 8 * 2**20
    # And it is still the model: one pass over all tokens, without a cache, gives the same draws up to rounding.
    text, stream = torch.tensor([5, 6, *grown.tokens]), np.random.default_rng([1, 0])
    with torch.no_grad():
        shares = torch.softmax(model(text[None, :-1])[0, 1:].double(), -1).cumsum(-1)  # (n, V)
    drawn = text[2:, None]
    uniforms = torch.tensor([[stream.random()] for _ in range(n)])
    below = torch.where(drawn > 0, shares.gather(1, (drawn - 1).clamp(min=0)), 0.0)
    assert ((below - 1e-3 < uniforms) & (uniforms < shares.gather(1, drawn) + 1e-3)).all()
