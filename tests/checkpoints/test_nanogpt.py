"""nanoGPT's ckpt.pt, judged by transformers; nothing in such a file is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import refusal
from torch import Tensor

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints.pickles import load_pickle
from gptlab.cli import main
from gptlab.text.tokenizers import GPT2Tokenizer, byte_tokenizer

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 65, "dropout": 0.1}


def weights(**args: Any) -> dict[str, Tensor]:
    """A state dict as nanoGPT's model gives it: every projection (out, in), the head beside the embedding."""
    args = {**ARGS, **args}
    width, generator = args["n_embd"], torch.Generator().manual_seed(3)
    shapes = {"wte.weight": (args["vocab_size"], width), "wpe.weight": (args["block_size"], width)}
    norms = []
    for layer in range(args["n_layer"]):
        for name, n_in, n_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes[f"h.{layer}.{name}.weight"] = (n_out, n_in)
            shapes[f"h.{layer}.{name}.bias"] = (n_out,)
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
    for name in [*norms, "ln_f"]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    state = {
        f"transformer.{name}": torch.randn(shape, generator=generator) * 0.2
        for name, shape in shapes.items()
        if args["bias"] or not name.endswith(".bias")
    }
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def theirs(state: dict[str, Tensor], activation: str, **args: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    args = {**ARGS, **args}
    config = GPT2Config(
        vocab_size=args["vocab_size"],
        n_positions=args["block_size"],
        activation_function=activation,
        **{name: args[name] for name in ("n_embd", "n_head", "n_layer")},
    )
    model = GPT2LMHeadModel(config).eval()
    for name, tensor in model.state_dict().items():
        if name in state:
            turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            tensor.copy_(state[name].t() if turned else state[name])
        else:
            assert name.endswith(".bias"), name
            tensor.zero_()  # which is what no bias is
    return model


def write(path: Path, state: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A checkpoint as nanoGPT's train.py writes it."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": weights() if state is None else state,
        "optimizer": optimizer.state_dict(),
        "model_args": ARGS,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.4697),
        "config": {"out_dir": "out-shakespeare-char", "n_layer": 2, "learning_rate": 1e-3, "compile": True},
        "rng_state": torch.get_rng_state(),
    }
    torch.save({**checkpoint, **changes}, path)
    return path


@pytest.mark.parametrize(
    ("args", "activation"),
    [
        ({}, "gelu"),
        ({"bias": False}, "gelu"),  # and no biases at all, in norms neither
        ({"bias": None}, "gelu_new"),  # a file of before there was a choice is of before the erf form, too
    ],
)
def test_the_logits_are_those_of_transformers(tmp_path: Path, args: dict[str, Any], activation: str) -> None:
    settings = {name: value for name, value in {**ARGS, **args}.items() if value is not None}
    state = weights(bias=settings.get("bias", True))
    lm = gptlab.load(write(tmp_path / "ckpt.pt", state, model_args=settings))
    assert lm.config.bias is settings.get("bias", True)
    ids = torch.arange(32).reshape(2, 16) * 7 % 65
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(ids), theirs(state, activation)(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["file", "directory", "string"])
def test_prefixes_and_places(tmp_path: Path, prefix: str, form: str) -> None:
    state = {prefix + name: tensor for name, tensor in weights().items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # a mask of before torch 2
    path = write(tmp_path / "ckpt.pt", state)
    lm = gptlab.load({"file": path, "directory": tmp_path, "string": str(path)}[form])
    assert torch.equal(lm.model.wte.weight, weights()["lm_head.weight"])
    assert lm.config.tie_embeddings
    assert checkpoints.read_config(path) == lm.config


def test_a_file_of_before_torch_1_6(tmp_path: Path) -> None:
    state = weights()
    torch.save({"model": state, "model_args": ARGS}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(gptlab.load(tmp_path / "a.pt").model.wte.weight, state["lm_head.weight"])


def test_an_untied_head_of_a_fork(tmp_path: Path) -> None:
    state = weights() | {"lm_head.weight": torch.ones(65, 8)}
    lm = gptlab.load(write(tmp_path / "ckpt.pt", state))
    assert not lm.config.tie_embeddings
    assert torch.equal(lm.model.lm_head.weight, torch.ones(65, 8))


@pytest.mark.parametrize(("vocab_size", "rows"), [(50257, 50257), (50304, 50257), (50258, 50258), (50432, 50257)])
def test_a_padded_vocabulary_is_cropped(tmp_path: Path, vocab_size: int, rows: int) -> None:
    args = {"vocab_size": vocab_size, "n_embd": 2, "n_head": 1, "n_layer": 1}
    state = weights(**args)
    lm = gptlab.load(write(tmp_path / "ckpt.pt", state, model_args={**ARGS, **args}))
    assert lm.config.vocab_size == rows
    assert torch.equal(lm.model.wte.weight, state["lm_head.weight"][:rows])
    assert isinstance(lm.tokenizer, GPT2Tokenizer) == (rows == 50257)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": torch.ones(2)}, "holds no weights as nanoGPT stores them"),
        ({"model": {"a": 1}}, "holds no weights as nanoGPT stores them"),
        ({"model": {}}, "lacks wte.weight"),
        ({"model_args": None, "config": None}, "does not say how its model is built"),
        ({"model_args": {"dim": 288, "n_layers": 6}}, "its settings lack vocab_size"),
        ({"model_args": {**ARGS, "n_head": 3}}, "valid n_head: 1, 2, 4, 8"),
        ({"model_args": {**ARGS, "n_head": None}}, "n_head must be"),
        ({"model_args": {**ARGS, "bias": "yes"}}, "bias must be"),
        ({"model_args": {**ARGS, "use_rmsnorm": True}}, "made with use_rmsnorm=True, a setting of a fork"),
        ({"model_args": {**ARGS, "n_layer": 3}}, "lacks h.2."),
        ({"model_args": {**ARGS, "block_size": 17}}, "where its model_args asks for (17, 8)"),
        ({"model_args": {**ARGS, "bias": False}}, "which a model of its model_args does not have"),
        ({"model": weights() | {"transformer.h.0.attn.q_norm.weight": torch.ones(4)}}, "holds h.0.attn.q_norm.weight"),
        ({"model": weights() | {"module.lm_head.weight": torch.ones(65, 8)}}, "lm_head.weight twice"),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    assert complaint in refusal(write(tmp_path / "ckpt.pt", **changes))


# --- pickles ---------------------------------------------------------------------------------------------------------


STORAGE = torch.ones(20_000)
SHARED = [STORAGE[i:] for i in range(20)]


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (Evil(open, "owned", "w"), "is in it): loading it could run code, so it was not loaded"),
        (Evil(eval, "1"), ".eval is in it"),
        (Evil(bytearray, 10**12), ".bytearray is in it"),  # which torch would call
        (Evil(torch.FloatTensor, 10**12), "torch.FloatTensor is in it"),
        (np.float64(1.5), "turn NumPy's numbers in it into Python's"),
        (np.ones(2), "turn NumPy's numbers in it into Python's"),
        (Path("x"), "is in it): loading it could run code"),
        (torch.ones(2, 2).to_sparse(), "is in it)"),
        (torch.ones(1).expand(2**40), "has fewer numbers than that"),
        (SHARED, "its tensors share their numbers"),
    ],
)
def test_a_pickle_of_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, complaint: str, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights(), "model_args": ARGS, "x": value}, "a.pt", _use_new_zipfile_serialization=zipped)
    assert complaint in refusal(Path("a.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_tuples_in_tuples_and_archives_that_grow(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt.pt")
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    for compression, pickled, complaint in (
        (zipfile.ZIP_DEFLATED, pickle.dumps({}, 2), "archive is compressed"),
        (zipfile.ZIP_STORED, b"\x80\x02})" + b"\x85" * 500_000 + b"Ks.", "nested too deeply"),
        (zipfile.ZIP_STORED, b"\x80\x02" + bytes(2**24), "its pickle has more than"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in contents.items():
                archive.writestr(name, pickled if name.endswith(".pkl") else content)
        assert complaint in refusal(path)


def test_what_training_leaves_beside_the_weights_is_read(tmp_path: Path) -> None:
    values = load_pickle(write(tmp_path / "ckpt.pt"))
    assert values["iter_num"] == 2000
    assert values["optimizer"]["state"][0]["step"] == 1


# --- gptlab import ---------------------------------------------------------------------------------------------------


def imported(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gptlab", "import", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_characters_are_given_as_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    characters = "\n !$&',-.3:;?" + "".join(map(chr, [*range(65, 91), *range(97, 123)]))  # as in tiny Shakespeare
    assert len(characters) == 65
    path = write(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Evil(open, tmp_path / "owned", "w")))
    (tmp_path / "input.txt").write_text(characters[::-1] * 2)
    assert imported(monkeypatch, path, "--out", tmp_path / "out", "--characters", tmp_path / "input.txt") == 0
    lm = gptlab.load(tmp_path / "out")
    tokenizer = lm.needs_tokenizer()
    assert tokenizer.encode("First Citizen:\n") == [sorted(characters).index(c) for c in "First Citizen:\n"]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (65, None)
    assert len(lm.generate("A", max_new_tokens=5, seed=1)[0]) == 5
    assert torch.equal(lm.model.wte.weight, gptlab.load(path).model.wte.weight)
    assert not (tmp_path / "owned").exists()
    capsys.readouterr()
    (tmp_path / "input.txt").write_text(characters + "é")
    assert imported(monkeypatch, path, "--out", tmp_path / "new", "--characters", tmp_path / "input.txt") == 2
    assert "holds 66 different characters, the model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_activation_can_be_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "ckpt.pt")
    assert imported(monkeypatch, path, "--out", tmp_path / "out", "--activation", "gelu_tanh") == 0
    lm, ids = gptlab.load(tmp_path / "out"), torch.arange(16)[None]
    with torch.inference_mode():
        torch.testing.assert_close(lm.model(ids), theirs(weights(), "gelu_new")(ids).logits, atol=1e-5, rtol=0)
    assert imported(monkeypatch, path, "--out", tmp_path / "new", "--activation", "gleu") == 2
    assert imported(monkeypatch, path, "--out", tmp_path / "out") == 2  # already exists


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "ckpt.pt")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(gptlab.GptlabError, match=r"ckpt.pt is damaged \(it is cut short\); copy or download it again$"):
        gptlab.load(path)


def test_an_activation_that_is_stated_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(monkeypatch, "pocket", "--out", tmp_path / "out", "--activation", "gelu") == 2
    assert "which do not state it; pocket does: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_characters_the_way_to_give_them_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ckpt.pt")
    with pytest.raises(gptlab.GptlabError, match=r"gptlab import .*ckpt.pt --characters input.txt --out model` takes"):
        gptlab.load(path).generate("A")
    assert imported(monkeypatch, path, "--out", tmp_path / "out") == 0
    assert "give the training text of a character-level model with --characters" in capsys.readouterr().out


def test_a_tokenizer_beside_the_file_is_used(tmp_path: Path) -> None:
    state = weights(vocab_size=257)
    path = write(tmp_path / "ckpt.pt", state, model_args={**ARGS, "vocab_size": 257})
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().files()["tokenizer.json"])
    assert gptlab.load(path).needs_tokenizer().vocab_size == 257
