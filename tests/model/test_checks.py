"""What the model refuses to read, in words."""

from __future__ import annotations

import pytest
import torch

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT

MODEL = GPT(ModelConfig.preset("tiny")).eval()  # 256 tokens, 64 positions
IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 2]], r"ids must be a tensor .* got list; use torch.tensor"),
        (None, "got NoneType"),
        (torch.tensor([1, 2]), r"got shape \(2,\) and torch.int64; for one sequence"),
        (torch.tensor([[1.0]]), "got shape .* and torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), r"at least one row and one token in each, got shape \(1, 0\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"at least one row and one token in each, got shape \(0, 3\)"),
        (torch.tensor([[1, 256]]), "ids must be 0 to 255, got 256: the vocabulary ends there"),
        (torch.tensor([[-1, 5]]), "ids must be 0 to 255, got -1"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens exceed the context of 64 learned positions"),
    ],
)
def test_ids(ids: object, said: str) -> None:
    for read in (
        MODEL,
        lambda ids: MODEL.attention_maps(ids, 0),
        lambda ids: MODEL(ids, cache=MODEL.make_cache(1, 64)),
    ):
        with pytest.raises(GptlabError, match=said if "65" not in said or read is MODEL else "65 tokens|64 slots"):
            read(ids)


@pytest.mark.parametrize("name", ["positions", "documents"])
@pytest.mark.parametrize(
    "value", [[[0, 1, 2]], torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]), torch.tensor([[0.0, 1.0, 2.0]])]
)
def test_positions_and_documents_of_another_shape_or_type(name: str, value: object) -> None:
    with pytest.raises(GptlabError, match=rf"{name} must be int64 of the shape of ids, \(1, 3\), got"):
        MODEL(IDS, **{name: value})


@pytest.mark.parametrize("position", [64, -2])
def test_positions_out_of_range(position: int) -> None:
    with pytest.raises(GptlabError, match=rf"positions must be -1 to 63, got {position}: the learned positions end"):
        MODEL(IDS, positions=torch.tensor([[0, 1, position]]))
    rotary = GPT(ModelConfig.preset("tiny", position="rope")).eval()
    if position > 0:
        assert rotary(IDS, positions=torch.tensor([[0, 1, position]])).isfinite().all()


@pytest.mark.parametrize("layer", [-1, 2, 1.0, "0", None])
def test_no_such_layer(layer: object) -> None:
    with pytest.raises(GptlabError, match=f"layer must be 0 to 1, got {layer!r}"):
        MODEL.attention_maps(IDS, layer)  # type: ignore[arg-type]


def test_what_is_refused_leaves_a_cache_as_it_was() -> None:
    cache = MODEL.make_cache(1, 64)
    with pytest.raises(GptlabError, match="ids must be 0 to 255"):
        MODEL(torch.tensor([[1, 300]]), cache=cache)
    assert torch.equal(MODEL(IDS, cache=cache), MODEL(IDS))


def test_compiled_code_does_not_look_at_values() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compile(MODEL, backend=backend, fullgraph=True)(IDS)
    assert len(graphs) == 1
