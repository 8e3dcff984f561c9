"""A model as the C++ step reads it: the structures of step.cpp, filled with the addresses of a `GPT`'s tensors."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptlab.config import RopeConfig
from gptlab.model.gpt import GPT, LayerNorm, RMSNorm, SwiGLU
from gptlab.model.rope import frequencies

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
INT4 = 3
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")


class Norm(Structure):
    """See step.cpp."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Product(Structure):
    """See product.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("factors", c_void_p),
        ("bias", c_void_p),
        ("n_out", c_int64),
        ("n_in", c_int64),
        ("kind", c_int32),
    )


class Layer(Structure):
    """See step.cpp."""

    _fields_ = (
        ("before_attention", Norm),
        ("before_mlp", Norm),
        ("qkv", Product),
        ("out", Product),
        ("up", Product),
        ("gate", Product),
        ("down", Product),
        ("span", c_int64),
        ("sinks", c_int64),
        ("dilation", c_int64),
        ("limit", c_int64),
        ("score_factor", c_float),
    )


class Model(Structure):
    """See step.cpp."""

    _fields_ = (
        ("n_layer", c_int64),
        ("n_embd", c_int64),
        ("n_head", c_int64),
        ("n_kv_head", c_int64),
        ("head_dim", c_int64),
        ("n_inner", c_int64),
        ("activation", c_int32),
        ("rms", c_int32),
        ("eps", c_float),
        ("wpe_scale", c_float),
        ("cache", c_int32),
        ("wte", Product),
        ("wpe", Product),
        ("head", Product),
        ("frequencies", POINTER(c_double)),
        ("factors", POINTER(c_double)),
        ("limits", POINTER(c_int64)),
        ("n_limits", c_int64),
        ("last", Norm),
        ("layers", POINTER(Layer)),
    )


class Layout:
    """Describes a model to the C++ step.

    Attributes:
        struct: what the step is given. It holds addresses, so that the model must not be moved, cast or freed.

    Args:
        model: on the CPU, its weights float32, bfloat16 or quantised.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        self._kept: list[Any] = [model]
        scales = dict(model.named_buffers(recurse=False))
        limits: list[int] = [2**62]
        layers = (Layer * config.n_layer)()
        for layer, block in zip(layers, model.blocks, strict=True):
            sight, mlp, at_most = block.attn.visibility, block.mlp, block.attn.sinks_at_most
            layer.before_attention, layer.before_mlp = self._norm(block.ln_1), self._norm(block.ln_2)
            layer.qkv, layer.out = self._product(block.attn.c_attn), self._product(block.attn.c_proj)
            layer.up, layer.down = self._product(mlp.c_fc), self._product(mlp.c_proj)
            if isinstance(mlp, SwiGLU):
                layer.gate = self._product(mlp.c_gate)
            layer.span, layer.sinks, layer.dilation = sight.span or 0, sight.sinks, sight.dilation
            layer.score_factor = block.attn.score_factor
            if config.has_rotation and at_most is not None:
                if at_most not in limits:
                    limits.append(at_most)
                layer.limit = limits.index(at_most)
        self.struct = Model(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_kv_head=config.kv_heads,
            head_dim=config.head_dim,
            n_inner=config.inner,
            activation=ACTIVATIONS.index("silu" if config.mlp == "swiglu" else config.activation),
            rms=config.norm == "rms",
            eps=config.norm_eps,
            wpe_scale=float(scales.get("wpe_scale", 1.0)),
            cache=KINDS[model.cache_dtype],
            wte=self._product(model.wte),
            head=self._product(model.lm_head),
            n_limits=len(limits),
            limits=self._array(c_int64, limits),
            last=self._norm(model.ln_f),
            layers=layers,
        )
        if config.has_table:
            self.struct.wpe = self._product(model.wpe)
        if config.has_rotation:
            angles, factor = frequencies(config.rope or RopeConfig(), config.head_dim, config.trained_length)
            scale = scales.get("rope_scale", torch.ones(config.head_dim // 2)).double()
            self.struct.frequencies = self._array(c_double, (angles * scale).tolist())
            self.struct.factors = self._array(c_double, (1 + (factor - 1) * scale).tolist())

    def _array(self, kind: Any, values: list[Any]) -> Any:
        array = (kind * len(values))(*values)
        self._kept.append(array)
        return array

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: LayerNorm | RMSNorm) -> Norm:
        return Norm(self._address(norm.weight.float()), self._bias(norm))

    def _bias(self, module: nn.Module) -> int | None:
        bias = getattr(module, "bias", None)
        return None if bias is None else self._address(bias.float())

    def _product(self, module: nn.Module) -> Product:
        weight, factors = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "factors", None))
        product = describe(weight, factors)
        product.weight, product.factors = self._address(weight), self._address(factors)
        product.bias = self._bias(module)
        return product


def describe(weight: Tensor, factors: Tensor | None, bias: Tensor | None = None) -> Product:
    """Describe a product: a matrix of floats (n_out, n_in), or one with its factors as `quantise` returns them.

    Args:
        weight: contiguous, as are the others; all must outlive what is returned.
        factors: None for floats.
        bias: (n_out,) float32, or None.
    """
    groups = factors is not None and factors.dim() == 2
    return Product(
        weight=weight.data_ptr(),
        factors=None if factors is None else factors.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        n_out=weight.shape[0],
        n_in=weight.shape[1] * (2 if groups else 1),
        kind=INT4 if groups else KINDS[weight.dtype],
    )
