import pytest
import torch

import gptlab
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.evaluation.scoring import token_logprobs
from gptlab.generation.sampling import Sampling
from gptlab.language_model import LanguageModel
from gptlab.model.gpt import GPT
from gptlab.model.quantised import bits_of, dequantise
from gptlab.text.tokenizers import byte_tokenizer, char_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["The dog", "a", "naïve 🦙", "x" * 40]


def make_lm(tokenizer=None, **overrides):
    """A random model with lively logits, whose text is bytes unless a tokenizer is given."""
    model = GPT(ModelConfig.preset("tiny", **{"vocab_size": 257, **overrides}), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return LanguageModel(model, tokenizer or byte_tokenizer())


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def letters():
    """Every token is a letter, so that every continuation can be read character by character."""
    tokenizer = char_tokenizer(["abcdefghijklmnopqrstuvwxyz"])
    return make_lm(tokenizer, vocab_size=tokenizer.vocab_size)


def continue_one(lm, prompt, n=20, stop=(), sampling=None):
    (continuation,) = grown = lm.new_continuations(1, stop)
    pieces = "".join(piece for _, piece in lm.continue_all([prompt], grown, sampling or Sampling(0), n))
    assert pieces == continuation.text
    return continuation


# --- generate ------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_a_naive_loop(letters):
    ids = letters.tokenizer.encode("hello")
    for _ in range(30):
        token = int(letters.model(torch.tensor([ids]))[0, -1].argmax())
        if token == letters.tokenizer.end_of_text:
            break
        ids.append(token)
    assert letters.generate("hello", max_new_tokens=30, temperature=0) == [letters.tokenizer.decode(ids[5:])]
    assert len(set(ids)) > 5


def test_one_prompt_or_several(lm):
    alone = [lm.generate(prompt, max_new_tokens=15, temperature=0) for prompt in PROMPTS]
    assert all(len(texts) == 1 for texts in alone)
    assert lm.generate(PROMPTS, max_new_tokens=15, temperature=0) == [text for (text,) in alone]
    assert lm.generate(tuple(PROMPTS[:1]), max_new_tokens=15, temperature=0) == alone[0]
    assert lm.generate([]) == []


def test_seeds(lm):
    first, again, other = (lm.generate(PROMPTS, max_new_tokens=15, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    # Without one each call takes a new seed: two equal texts of 15 tokens would be a wonder.
    assert lm.generate(PROMPTS, max_new_tokens=15) != lm.generate(PROMPTS, max_new_tokens=15)


def test_sampling_values_reach_the_sampler(lm):
    greedy = lm.generate(PROMPTS, max_new_tokens=15, temperature=0)
    for values in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-9}):
        assert lm.generate(PROMPTS, max_new_tokens=15, seed=1, **values) == greedy
    assert lm.generate(PROMPTS, max_new_tokens=15, seed=1) != greedy


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 2.0}, {"seed": -1}, {"min_p": 2}, {"repetition_penalty": 0}],
)
def test_absurd_sampling_values_are_refused_at_once(lm, values):
    for function in (lm.generate, lm.stream):
        with pytest.raises(GptlabError, match=next(iter(values))):
            function("a", **values)


@pytest.mark.parametrize("n", [0, -3, 1.5, "9", None, True])
def test_a_number_of_tokens_below_one_is_refused(lm, n):
    for function in (lm.generate, lm.stream):
        with pytest.raises(GptlabError, match=f"max_new_tokens must be at least 1, got {n!r}"):
            function("a", max_new_tokens=n)


@pytest.mark.parametrize(("stop", "said"), [(3, "int 3"), (b"a", "int 97"), (None, "NoneType"), (["a", 3], "int 3")])
def test_stop_strings_of_a_wrong_type_are_refused(lm, stop, said):
    for function in (lm.generate, lm.stream):
        with pytest.raises(GptlabError, match=f"stop must be a text or a list of texts, got {said}"):
            function("a", stop=stop)


@pytest.mark.parametrize("prompt", [3, b"a", None, ["a", 3], {"a": 1}, object(), 2.5, [[1.5]], [["a"]]])
def test_prompts_of_a_wrong_type_are_refused(lm, prompt):
    with pytest.raises(GptlabError, match="a prompt is a text or a list of token ids, got"):
        lm.generate(prompt)


def test_an_empty_prompt_is_refused(lm):
    for prompts in ("", ["a", ""]):
        with pytest.raises(GptlabError, match="the prompt is empty; give it some text"):
            lm.generate(prompts)


def test_a_prompt_longer_than_the_context_is_refused(lm):
    with pytest.raises(GptlabError, match="the prompt has 65 tokens, the model's context holds 64"):
        lm.generate(["a", "x" * 65])
    with pytest.raises(GptlabError, match="the prompt has 65 tokens"):
        list(lm.stream("x" * 65))


def test_a_prompt_that_fills_the_context_gives_one_token(letters):
    continuation = continue_one(letters, "x" * 64)
    assert (len(continuation.tokens), continuation.finish) == (1, "context")
    assert continue_one(letters, "x" * 63, n=2).finish == "context"
    assert continue_one(letters, "x" * 62, n=2).finish == "length"


# --- where a text begins and ends ----------------------------------------------------------------------------


def test_no_prompt_starts_a_new_document(lm):
    continuation = continue_one(lm, None)
    end = lm.tokenizer.end_of_text
    assert continuation.tokens[0] == int(lm.model(torch.tensor([[end]]))[0, -1].argmax())
    grown = lm.new_continuations(2)
    list(lm.continue_all(["a", None], grown, Sampling(0), 20))
    assert grown[1].tokens == continuation.tokens


def test_no_prompt_needs_an_end_of_text():
    tokenizer = byte_tokenizer()
    tokenizer.end_of_text = None
    with pytest.raises(GptlabError, match=r"no <\|endoftext\|> to start from; give a prompt"):
        continue_one(make_lm(tokenizer), None)


def test_a_tokenizer_larger_than_the_model_is_refused_in_words():
    lm = make_lm(vocab_size=100)
    for prompt, largest in (("caf\xe9", 0xC3), (None, 256)):
        with pytest.raises(GptlabError, match=f"gives ids up to {largest}, the model has 100: they do not fit"):
            continue_one(lm, prompt)
    assert max(continue_one(lm, "ABC", sampling=Sampling(1e6)).tokens) < 100


def test_a_model_with_a_padded_vocabulary_speaks_the_tokenizers_ids_only():
    lm = make_lm(vocab_size=300)
    for seed in range(5):
        continuation = continue_one(lm, "a", n=64, sampling=Sampling(1e6, seed=seed))
        assert all(token < 257 for token in continuation.tokens)


def test_end_of_text_in_a_prompt_is_text(lm):
    text = "<|endoftext|>"
    ids = list(text.encode())
    assert continue_one(lm, text).tokens[0] == int(lm.model(torch.tensor([ids]))[0, -1].argmax())


def test_stop_strings_end_a_text_before_them(letters):
    whole = continue_one(letters, "dog", n=40).text
    assert len(whole) == 40
    for word in (whole[7], whole[5:8], whole[20:]):
        n = whole.index(word)
        assert letters.generate("dog", max_new_tokens=40, temperature=0, stop=word) == [whole[:n]]
        assert "".join(letters.stream("dog", max_new_tokens=40, temperature=0, stop=[word])) == whole[:n]
    words = [whole[9:12], whole[3:6], "never!"]
    expected = whole[: min(whole.index(word) for word in words[:2])]
    assert letters.generate("dog", max_new_tokens=40, temperature=0, stop=words) == [expected]


def test_stop_strings_are_looked_for_in_new_text_only(letters):
    texts = {letter: continue_one(letters, letter, n=5).text for letter in "abcdefghijklmnopqrstuvwxyz"}
    borders = {letter: letter + text[0] for letter, text in texts.items() if letter + text[0] not in text}
    assert borders
    for letter, stop in borders.items():
        assert continue_one(letters, letter, n=5, stop=stop).text == texts[letter]


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(lm, stop):
    with pytest.raises(GptlabError, match="a stop string is empty; leave it out"):
        lm.generate("a", stop=stop)


# --- stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(), "e", ["\ufffd\ufffd"]])
def test_stream_joined_is_generate(lm, stop):
    for prompt in PROMPTS:
        for seed in range(3):
            values = {"max_new_tokens": 24, "top_k": 100, "seed": seed, "stop": stop}
            pieces = list(lm.stream(prompt, **values))
            assert all(pieces)
            assert ["".join(pieces)] == lm.generate(prompt, **values)


def test_stream_may_be_left_early(lm):
    stream = lm.stream("a", max_new_tokens=50, seed=1)
    first = next(stream)
    stream.close()
    assert first == next(lm.stream("a", max_new_tokens=50, seed=1))


# --- the model's own state -----------------------------------------------------------------------------------


def test_dropout_is_off_while_generating():
    lm = make_lm(dropout=0.5)
    expected = make_lm().generate(PROMPTS, max_new_tokens=15, temperature=0)
    lm.model.train()
    assert lm.generate(PROMPTS, max_new_tokens=15, temperature=0) == expected


@pytest.fixture
def mixed():
    """A model that is trained but for one frozen block."""
    lm = make_lm(dropout=0.5)
    lm.model.train()
    lm.model.h[0].eval()
    return lm


def modes(lm):
    return [module.training for module in lm.model.modules()]


def test_generating_leaves_every_module_in_its_mode(mixed):
    before = modes(mixed)
    text = mixed.generate("a", max_new_tokens=5, temperature=0)
    assert modes(mixed) == before
    pieces = []
    for piece in mixed.stream("a", max_new_tokens=5, temperature=0):
        assert modes(mixed) == before  # between two pieces as well
        pieces.append(piece)
    assert ["".join(pieces)] == text
    abandoned = mixed.stream("a", max_new_tokens=5)
    next(abandoned)
    assert modes(mixed) == before  # and for as long as nobody takes the next


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_every_module_in_its_mode(mixed, error):
    before = modes(mixed)

    def fail(*_):
        raise error

    mixed.model.h[1].register_forward_hook(fail)
    with pytest.raises(error):
        mixed.generate("a")
    assert modes(mixed) == before


def test_a_model_that_is_switched_to_training_between_pieces_still_generates_without_dropout():
    lm, expected = make_lm(dropout=0.5), make_lm().generate("a", max_new_tokens=9, temperature=0)
    pieces = []
    for piece in lm.stream("a", max_new_tokens=9, temperature=0):
        lm.model.train()
        pieces.append(piece)
    assert ["".join(pieces)] == expected
    assert lm.model.training


def test_a_model_can_be_trained_on_after_it_generated():
    lm = make_lm()
    lm.generate("a", max_new_tokens=3)
    lm.model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in lm.model.parameters())


# --- without a tokenizer -------------------------------------------------------------------------------------


def test_without_a_tokenizer_the_text_functions_say_what_is_missing():
    lm = LanguageModel(make_lm().model)
    for use in (lambda: lm.generate("a"), lambda: lm.stream("a"), lm.needs_tokenizer):
        with pytest.raises(GptlabError, match=r"came without a tokenizer.*tokenizer.json.*tokenizer='gpt2'"):
            use()


def test_without_a_tokenizer_a_model_computes_saves_and_loads(tmp_path):
    lm = LanguageModel(make_lm().model)
    ids = torch.tensor([[1, 2, 3]])
    gptlab.save(lm, tmp_path / "model")
    back = gptlab.load(tmp_path / "model")
    assert back.tokenizer is None
    assert back.config == lm.config
    assert torch.equal(back.model(ids), lm.model(ids))
    # It speaks as soon as it is given one.
    named = gptlab.load(tmp_path / "model", tokenizer="bytes")
    made = gptlab.load(tmp_path / "model", tokenizer=byte_tokenizer())
    expected = make_lm().generate("a", temperature=0)
    assert named.generate("a", temperature=0) == made.generate("a", temperature=0) == expected


def test_saved_with_its_tokenizer_it_says_the_same_after_loading(lm, tmp_path):
    gptlab.save(lm, tmp_path)
    back = gptlab.load(str(tmp_path))
    assert not back.model.training
    assert back.generate(PROMPTS, max_new_tokens=15, seed=4) == lm.generate(PROMPTS, max_new_tokens=15, seed=4)


def test_an_unknown_tokenizer_name_is_refused(lm, tmp_path):
    gptlab.save(lm, tmp_path)
    with pytest.raises(GptlabError, match=r"unknown tokenizer 'gpt3'.*did you mean 'gpt2'"):
        gptlab.load(tmp_path, tokenizer="gpt3")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dtype": "float23"}, "dtype must be one of .*got 'float23' .did you mean 'float32'"),
        ({"dtype": torch.int64}, "dtype must be one of .*got torch.int64"),
        ({"dtype": 32}, "dtype must be one of .*got 32"),
        ({"device": "gpu"}, "no device 'gpu' here"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here"),
        ({"device": "meta"}, "no device 'meta' here"),
        ({"device": 1.5}, "no device '1.5' here"),
    ],
)
def test_no_such_dtype_or_device(lm, tmp_path, values, said):
    with pytest.raises(GptlabError, match=said):
        gptlab.load("pocket", **values)
    if "dtype" in values:
        with pytest.raises(GptlabError, match=said):
            gptlab.save(lm, tmp_path, **values)
        assert not list(tmp_path.iterdir())


def test_load_and_save_refuse_what_is_no_name_and_no_model(lm, tmp_path):
    for name in (None, 3, b"pocket"):
        with pytest.raises(GptlabError, match="the model must be a name or a directory, got"):
            gptlab.load(name)
    with pytest.raises(GptlabError, match="save takes a LanguageModel, got GPT; wrap a GPT"):
        gptlab.save(lm.model, tmp_path)
    for place in (None, 3, ""):
        with pytest.raises(GptlabError, match="the path of a directory, got"):
            gptlab.save(lm, place)


def test_a_dtype_may_be_named(lm, tmp_path):
    gptlab.save(lm, tmp_path, dtype="bfloat16")
    assert gptlab.load(tmp_path, dtype="bfloat16").model.wte.weight.dtype == torch.bfloat16


def test_half_precision_generates_too(lm, tmp_path):
    gptlab.save(lm, tmp_path, dtype=torch.bfloat16)
    half = gptlab.load(tmp_path, dtype=torch.bfloat16)
    assert half.model.wte.weight.dtype == torch.bfloat16
    texts = half.generate(PROMPTS, max_new_tokens=10, seed=1)
    assert texts == half.generate(PROMPTS, max_new_tokens=10, seed=1)
    assert all(texts)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_numbers_are_saved_and_read_again_bit_for_bit(bits, tied, tmp_path):
    model = GPT(ModelConfig.preset("tiny", tie_embeddings=tied), seed=3)
    gptlab.save(gptlab.LanguageModel(model), tmp_path / "float")
    lm = gptlab.load(tmp_path / "float", dtype=f"int{bits}")
    gptlab.save(lm, tmp_path / "whole")
    again = gptlab.load(tmp_path / "whole")
    assert bits_of(again.model) == bits_of(lm.model) == bits
    mine, theirs = lm.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "float")]
    assert sizes[0] < sizes[1] * (bits + 5) / 32
    named = gptlab.load(tmp_path / "whole", dtype=f"int{bits}").model.state_dict()
    assert all(torch.equal(mine[name], named[name]) for name in mine)
    other = 12 - bits
    assert bits_of(gptlab.load(tmp_path / "whole", dtype=f"int{other}").model) == other
    # Asked for floats, it gives those that the whole numbers stand for.
    floats = gptlab.load(tmp_path / "whole", dtype="float32").model
    torch.testing.assert_close(floats.wte.weight, dequantise(lm.model.wte.weight, lm.model.wte.factors))
    with pytest.raises(GptlabError, match="leave out dtype"):
        gptlab.save(again, tmp_path / "other", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_whole_numbers_generate_and_are_evaluated(dtype, tmp_path):
    lm = gptlab.load("pocket", dtype=dtype)
    assert len(lm.generate("The city", max_new_tokens=5, seed=1)[0]) > 0
    ids = [lm.tokenizer.encode("The city of London is the capital of England and of the United Kingdom.")]
    exact = token_logprobs(gptlab.load("pocket").model, ids)[0].mean()
    rounded = token_logprobs(lm.model, ids, dtype=dtype)[0].mean()
    assert 0 < abs(exact - rounded) < {"int8": 0.02, "int4": 0.3}[dtype]
    torch.testing.assert_close(token_logprobs(gptlab.load("pocket").model, ids, dtype=dtype)[0].mean(), rounded)
    with pytest.raises(GptlabError, match="load it in float32"):
        token_logprobs(lm.model, ids)


def test_auto_is_one_of_the_precisions():
    assert gptlab.load("pocket", dtype="auto").model.cache_dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", ["int9", "auto8", torch.int8])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(GptlabError, match="dtype must be one of"):
        gptlab.load("pocket", dtype=dtype)
