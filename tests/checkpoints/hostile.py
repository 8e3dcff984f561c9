"""Model files as an attacker or a bad disk would leave them; as a program, it loads many and says what went wrong."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import gptlab
from gptlab import checkpoints
from gptlab.checkpoints import Checkpoint, gguf, huggingface
from gptlab.text.tokenizers import train_bpe

SECONDS, MEGABYTES = 2.0, 500
OPENAI = Path(__file__).parent / "openai"


def make_sources(root: Path) -> list[Path]:
    """One small intact model in each format, each in a directory of its own."""
    tokenizer = train_bpe(["the cat sat on the mat " * 20], 280)
    config = gptlab.ModelConfig(vocab_size=tokenizer.vocab_size, context_length=16, n_layer=2, n_head=2, n_embd=8)
    model = gptlab.GPT(config, seed=3)
    gptlab.save(gptlab.LanguageModel(model, tokenizer), root / "native")
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    plain = {name: tensor.clone() for name, tensor in model.tensors().items()}
    theirs = {name: t.t().contiguous() if name.endswith(turned) else t for name, t in plain.items()}
    values = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 280}
    values["vocab_size"] = tokenizer.vocab_size
    for name in ("one", "shards", "bin", "old"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(values))
        (root / name / "tokenizer.json").write_bytes(tokenizer.files()["tokenizer.json"])
    save_file(theirs, root / "one" / "model.safetensors")
    names = list(theirs)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: theirs[name] for name in some}, root / "shards" / file)
    weight_map = {name: file for file, some in parts.items() for name in some}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(theirs, root / "bin" / "pytorch_model.bin")
    torch.save(theirs, root / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    llama = {"norm": "rms", "mlp": "swiglu", "bias": False, "position": "rope", "n_inner": None}
    gated = gptlab.GPT(gptlab.ModelConfig.from_dict({**config.to_dict(), **llama}))
    huggingface.write(root / "llama", Checkpoint(gated.config, gated.tensors(), tokenizer))
    (root / "nanogpt").mkdir()
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": config.vocab_size}
    torch.save({"model": plain, "model_args": settings, "iter_num": 3}, root / "nanogpt" / "ckpt.pt")
    shutil.copytree(OPENAI / "plain", root / "openai")
    shutil.copytree(OPENAI / "sharded", root / "openai-shards")
    for kind, width in (("f32", 8), ("q8_0", 32)):
        wide = gptlab.GPT(gptlab.ModelConfig.from_dict({**config.to_dict(), "n_embd": width, "n_inner": None}))
        gguf.write(root / f"gguf-{kind}" / "m.gguf", Checkpoint(wide.config, wide.tensors(), tokenizer), type=kind)
    return sorted(path for path in root.iterdir() if path.is_dir())


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def flip(data: bytes, draw: random.Random) -> bytes:
    bad = bytearray(data)
    # Headers are where parsers stumble.
    reach = len(bad) if draw.random() < 0.3 else min(len(bad), 1024)
    for _ in range(draw.choice([1, 1, 2, 8])):
        bad[draw.randrange(reach) if draw.random() < 0.8 else -1 - draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(bad)


def number(data: bytes, draw: random.Random) -> bytes:
    """A number somewhere becomes enormous or negative."""
    value = draw.choice([2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 8, 2**64 - 1, 0])
    width = draw.choice([4, 8])
    at = draw.randrange(max(1, min(len(data), 2048) - width))
    return data[:at] + struct.pack("<Q", value)[:width] + data[at + width :]


def splice(data: bytes, draw: random.Random) -> bytes:
    at, other = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return draw.choice([data[:at] + data[other:], data[:other] + data[at:], data + data[:at], draw.randbytes(other)])


def text(data: bytes, draw: random.Random) -> bytes:
    """In a file of text: a value of another kind, a digit more, nesting, a path that leads away."""
    bad = data.decode(errors="replace")
    large = "1" + "0" * draw.choice([6, 9, 19, 4000, 5000])
    things = ["-1", "1e999", large, large, "null", '"../../x"', "[]", "NaN", '"/etc/passwd"']
    deep = draw.choice([50, 2000, 200_000])
    things += ["[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, '"' + "x" * 100_000 + '"', '"\\ud800"']
    places = [i for i, c in enumerate(bad) if c in ":["] or [0]
    at = draw.choice(places) + 1
    end = min((i for i in (bad.find(c, at) for c in ",}]\n") if i >= 0), default=len(bad))
    return (bad[:at] + draw.choice(things) + bad[end:]).encode(errors="replace")


def paths(data: bytes, draw: random.Random) -> bytes:
    """Names of files in an index lead elsewhere."""
    trick = draw.choice(
        ["../one/model.safetensors", "/etc/passwd", "..", "", "a.safetensors\\u0000", "./b.safetensors"]
    )
    return data.replace(draw.choice([b"a.safetensors", b"model.ckpt"]), trick.encode())


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (truncate, flip, flip, number, number, splice, text, paths)


def cases(sources: list[Path], n: int, seed: int) -> Iterator[tuple[str, Path, str, bytes]]:
    """Yield (a name for the case, an intact model, a file in it, what the file holds now)."""
    for i in range(n):
        draw = random.Random(f"{seed}/{i}")
        source = sources[i % len(sources)]
        file = draw.choice(sorted(source.iterdir()))
        way = draw.choice(WAYS)
        yield f"{i} {source.name} {file.name} {way.__name__}", source, file.name, way(file.read_bytes(), draw)


def wrong_with(place: Path) -> str | None:
    """Load a model; None when it loads or is refused in one sentence, in time."""
    started = time.process_time()
    try:
        checkpoints.read_config(place)
        checkpoints.read(place)
    except gptlab.GptlabError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"no sentence: {str(error)[:300]}"
    except BaseException:  # RecursionError, MemoryError and what Rust panics with
        return traceback.format_exc(limit=-3)
    seconds = time.process_time() - started
    return f"{seconds:.1f} seconds" if seconds > SECONDS else None


def run(root: Path, n: int, seed: int) -> list[str]:
    """Load ``n`` bad models below ``root``; return what went wrong, with the names of the cases."""
    sources = make_sources(root / "sources")
    problems = []
    (root / "work").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, source, file, content in cases(sources, n, seed):
        place = root / "work" / "model"
        shutil.copytree(source, place)
        (place / file).write_bytes(content)
        there = sorted(path.name for path in place.iterdir())
        print(name, file=sys.stderr, flush=True)  # of a crash, the last line says where
        if problem := wrong_with(place):
            problems.append(f"{name}: {problem}")
        if sorted(path.name for path in place.iterdir()) != there or len(list((root / "work").iterdir())) != 1:
            problems.append(f"{name}: it wrote files")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES:
            problems.append(f"{name}: {grown:.0f} MB of memory")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shutil.rmtree(place)
    return problems


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # what asks for more is told no, and the machine lives on
    lines = run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print("\n".join(lines))
