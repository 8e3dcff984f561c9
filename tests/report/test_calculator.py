"""The page's own arithmetic against Python's."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gptlab.config import ModelConfig
from gptlab.model import cost
from gptlab.report import calculator
from gptlab.report.view import make_config
from gptlab.roofline import Machine, predict

SMALL = ModelConfig(vocab_size=10, context_length=8, n_layer=2, n_head=2, n_embd=4, n_inner=12, bias=False)
TEMPLATES = Path(calculator.__file__).parent / "templates"


def node(script: str, data: Any) -> Any:
    """Run the page's JavaScript with `data` in hand; return what `script` evaluates to."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("there is no node to run the page's JavaScript with")
    sources = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("roofline.js", "calculator.js"))
    # In the page the calculator looks for its place; here there is none.
    head = "const document = { querySelectorAll: () => [] };\n"
    tail = "\nconst data = JSON.parse(require('fs').readFileSync(0));\nconsole.log(JSON.stringify((() => {%s})()));"
    whole = sources.replace('"use strict";', head, 1) + tail % script
    done = subprocess.run([program, "-e", whole], input=json.dumps(data), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_page_computes_the_same_numbers() -> None:
    machine = Machine(31_234_567_890.1, 198_765_432_109.9)
    asked, expected = [], []
    sizes = {name: ModelConfig.preset(name) for name in ("gpt2", "gpt2-xl", "pocket", "tiny")}
    sizes |= {"own": SMALL, "rope": ModelConfig.preset("pocket", position="rope", tie_embeddings=False, bias=False)}
    sizes |= {"llama": ModelConfig.preset("pocket", norm="rms", mlp="swiglu", position="rope")}
    points = itertools.product(sizes.values(), (None, 1), (None, 1, 100), (1, 100, 99_999), (1, 7, 512), (1, 2, 4))
    for config, heads, window, context, batch, size in points:
        model = make_config({**config.to_dict(), "n_kv_head": heads, "window": window})
        dtype = {1: "int8", 2: "bfloat16", 4: "float32"}[size]
        step = predict(model, machine, context=context, batch=batch, dtype=dtype)
        asked.append([model.to_dict(), context, batch, size, machine.bandwidth, machine.flops])
        numbers = [step.weight_bytes, step.cache_bytes, step.weight_seconds, step.cache_seconds, step.seconds]
        total = sum(cost.parameters(model).values())
        expected.append([total, *numbers, step.tokens_per_second, step.limit])
    actual = node(
        """return data.map((one) => { const s = step(...one);
        return [parameters(one[0]).total, s.weightBytes, s.cacheBytes, s.weightSeconds,
        s.cacheSeconds, s.seconds, s.tokensPerSecond, s.limit]; });""",
        asked,
    )
    assert actual == expected  # equal, not close


def test_the_calculator_shows_itself_only_where_it_agrees() -> None:
    machine = Machine(3e10, 2e11)
    config = ModelConfig.preset("gpt2")
    model = {**config.to_dict(), "kv": [1]}
    checks = [calculator.check("gpt2", config, at, machine, "bfloat16") for at in calculator.CHECKS]
    data = {"models": {"gpt2": model}, "size": 2, "bandwidth": machine.bandwidth, "peak": machine.flops}
    wrong = [{**checks[0], "cacheBytes": 1}, {**checks[0], "seconds": checks[0]["seconds"] * (1 + 1e-15)}]
    script = "return data.checks.map((check) => agrees(data, check));"
    assert node(script, {**data, "checks": [*checks, *wrong]}) == [True] * len(checks) + [False, False]
