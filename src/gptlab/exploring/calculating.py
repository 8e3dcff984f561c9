"""The report's calculator, with the figures of this machine."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.report.calculator import calculator
from gptlab.report.texts import template
from gptlab.study.costs import SIZES
from gptlab.study.measure import machine

DTYPE = "bfloat16"


def calculator_here(device: torch.device) -> dict[str, Any]:
    """Measure the machine, which takes about a second; return the calculator as ``html`` and what it starts from."""
    about = machine(device)
    threads = f"{about.threads} thread{'s' * (about.threads != 1)}" if about.device == "cpu" else about.device
    words = f"{about.processor}, {threads}, torch\u00a0{about.torch}, measured just now"
    configs = {name: ModelConfig.preset(name) for name in (*SIZES, "pocket")}
    data = calculator(configs, roofline.measure(device, DTYPE), DTYPE, words)
    return {"html": _html(data), "data": data}


def _html(data: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["json"] = lambda value: Markup(json.dumps(value).replace("<", "\\u003c"))
    return str(environment.get_template("calculator.html.j2").module.calculator(data))  # type: ignore[attr-defined]
