# The rules of the house that can be read off the source.
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptlab

SOURCE = Path(gptlab.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Each floor imports only from floors below it. A package may import from itself.
FLOORS = {
    "errors": 1,
    "formatting": 1,
    "progress": 1,
    "placeholders": 1.5,
    "devices": 2,
    "config": 2,
    "text": 2,
    "model": 3,
    "generation": 4,
    "evaluation": 4,
    "conversion": 4,
    "checkpoints": 4,
    "roofline": 4,
    "language_model": 5,
    # The package itself hands out names up to there, lazily.
    "__init__": 5.5,
    "training": 6,
    "verification": 6,
    "exporting": 6,
    "harness": 6,
    "inspecting": 6,
    "plotting": 7,
    "study": 7,
    "report": 8,
    "benchmark": 8,
    "serving": 8,
    "exploring": 8.5,
    "cli": 9,
    "__main__": 10,
}
LONGEST_FUNCTION = 60
"""Lines of a body, docstring and blank lines aside."""

READ_IN_ONE_SITTING = ["gpt.py", "attention.py", "masks.py", "rope.py"]


def room(name: str) -> str:
    """The part of gptlab to which a dotted name below it belongs."""
    return name.split(".")[1] if "." in name else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at any depth, in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # `from gptlab import x` names the submodule x, `from gptlab.x import y` is in x either way.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def where(path: Path) -> str:
    return room(".".join(["gptlab", *path.relative_to(SOURCE).with_suffix("").parts]))


def ids(paths: list[Path]) -> list[str]:
    return [path.relative_to(SOURCE).as_posix() for path in paths]


def public_home(name: str) -> str:
    """Where a name lives that `gptlab` itself hands out; other names are submodules."""
    short = name.removeprefix("gptlab.").split(".")[0]
    return room(gptlab._HOMES.get(short, name))


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {where(path) for path in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_each_floor_imports_only_from_floors_below(path: Path) -> None:
    here = where(path)
    for name in imports(path):
        if name.split(".")[0] != "gptlab" or name == "gptlab.__version__":
            continue
        there = public_home(name)
        if there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {name} ({FLOORS[there]})"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_no_prebuilt_transformer(path: Path) -> None:
    forbidden = {"transformers", "x_transformers", "flash_attn", "xformers"}
    assert not forbidden & {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert not name.startswith("Transformer")
        assert name not in ("MultiheadAttention", "multi_head_attention_forward")
    assert not any(name.split(".")[-1].startswith(("Transformer", "MultiheadAttention")) for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_nothing_is_unpickled(path: Path) -> None:
    # `pickle` may be imported for the name of its error alone.
    assert not any(name in ("pickle.load", "pickle.loads", "pickle.Unpickler") for name in imports(path))
    assert not {"dill", "cloudpickle", "joblib", "shelve", "marshal"} & {n.split(".")[0] for n in imports(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
            assert node.attr in ("UnpicklingError", "PickleError")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
            assert [ast.unparse(value) for value in safe] == ["True"]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


@pytest.mark.parametrize("path", MODULES, ids=ids(MODULES))
def test_functions_fit_on_a_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]  # parameters do not count
            body = [line for line in lines[first.lineno - 1 : node.end_lineno] if line.strip()]
            assert len(body) <= LONGEST_FUNCTION, node.name


def test_the_model_can_be_read_in_one_sitting() -> None:
    files = [SOURCE / "model" / name for name in READ_IN_ONE_SITTING]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 660


MODEL_FILES = sorted((SOURCE / "model").rglob("*.py"))


@pytest.mark.parametrize("path", MODEL_FILES, ids=ids(MODEL_FILES))
def test_the_model_imports_next_to_nothing(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        if top == "gptlab":
            assert room(name) in ("config", "errors", "model")
        else:
            assert top in ("torch", "numpy", "safetensors") or top in sys.stdlib_module_names


GENERATION_FILES = sorted((SOURCE / "generation").rglob("*.py"))


@pytest.mark.parametrize("path", GENERATION_FILES, ids=ids(GENERATION_FILES))
def test_generation_imports_torch_and_numpy_alone(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top in ("gptlab", "torch", "numpy", "safetensors") or top in sys.stdlib_module_names
