"""GPT-2 as a graph for ONNX Runtime, with a cache that is written in place, as its own generation library has it.

    python benchmarks/peers_onnx.py HF_DIRECTORY OUT_DIRECTORY

Writes model.onnx in float32, and model8.onnx and model4.onnx with `MatMulNBits` for the weights. Attention is
`GroupQueryAttention`, the fused operator that reads and extends a cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

LAYERS, HEADS, HEAD_DIM, WIDTH = 12, 12, 64, 768


class Graph:
    """Nodes and weights as they are added."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights, self.nodes, self.initializers = weights, [], {}

    def weight(self, name: str, transpose: bool = False) -> str:
        value = self.weights[name].T if transpose else self.weights[name]
        name += "_transposed" if transpose else ""
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"{kind}_{len(self.nodes)}"]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"node_{len(self.nodes)}", **attributes))
        return outputs[0]

    def norm(self, x: str, name: str) -> str:
        inputs = [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self.add("LayerNormalization", inputs, axis=-1, epsilon=1e-5)

    def linear(self, x: str, name: str) -> str:
        y = self.add("MatMul", [x, self.weight(f"{name}.weight")])
        return self.add("Add", [y, self.weight(f"{name}.bias")])


def build(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph, microsoft = Graph(weights), "com.microsoft"
    x = graph.add(
        "Add",
        [
            graph.add("Gather", [graph.weight("wte.weight"), "ids"]),
            graph.add("Gather", [graph.weight("wpe.weight"), "positions"]),
        ],
    )
    caches = []
    for i in range(LAYERS):
        qkv = graph.linear(graph.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        pasts, presents = ([f"{time}_{kind}_{i}" for kind in ("key", "value")] for time in ("past", "present"))
        caches += [pasts, presents]
        inputs, outputs = [qkv, "", "", *pasts, "lengths", "total"], [f"attention_{i}", *presents]
        heads = {"num_heads": HEADS, "kv_num_heads": HEADS}
        y = graph.add("GroupQueryAttention", inputs, outputs, domain=microsoft, **heads)
        x = graph.add("Add", [x, graph.linear(y, f"h.{i}.attn.c_proj")])
        y = graph.add("MatMul", [graph.norm(x, f"h.{i}.ln_2"), graph.weight(f"h.{i}.mlp.c_fc.weight")])
        y = graph.add("FastGelu", [y, graph.weight(f"h.{i}.mlp.c_fc.bias")], domain=microsoft)
        x = graph.add("Add", [x, graph.linear(y, f"h.{i}.mlp.c_proj")])
    graph.initializers["last"] = numpy_helper.from_array(np.array(-1, np.int64), "last")
    x = graph.norm(graph.add("Gather", [x, "last"], axis=1), "ln_f")
    graph.add("MatMul", [x, graph.weight("wte.weight", transpose=True)], ["logits"])
    text, cache = ["batch", "tokens"], ["batch", HEADS, "length", HEAD_DIM]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, text) for name in ("ids", "positions")]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, [1]))
    float_info = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    inputs += [float_info(name, cache) for names in caches[::2] for name in names]
    outputs = [float_info(name, cache) for names in caches[1::2] for name in names]
    outputs.append(float_info("logits", ["batch", weights["wte.weight"].shape[0]]))
    made = helper.make_graph(graph.nodes, "gpt2", inputs, outputs, list(graph.initializers.values()))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(microsoft, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def quantise(path: Path, bits: int, out: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(onnx.load(path), bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
    quantiser.process()
    quantiser.model.save_model_to_file(str(out), use_external_data_format=False)


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    weights = load_file(source / "model.safetensors")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    onnx.save(build(weights), out / "model.onnx")
    for bits in (8, 4):
        quantise(out / "model.onnx", bits, out / f"model{bits}.onnx")


if __name__ == "__main__":
    main()
