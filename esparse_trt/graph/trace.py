"""From a model configuration to an ONNX graph without a single weight in memory.

The model is built with fake parameters, which have a shape and no storage; only the constants that a
checkpoint does not hold, such as rotary frequencies, are real. The traced graph is then named after the
modules: parameters keep their names, every linear layer's MatMul or Gemm is called by its module, as is its
output tensor, and MatMul weights become `[K, N]` initializers instead of transposed `[N, K]` ones.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnxscript.optimizer
import torch
from accelerate import init_empty_weights
from onnxscript import ir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from esparse_trt.graph.wrapper import ATTENTION, CausalLM, cache_shape

_ROOT = "causal_lm."  # what CausalLM puts before every module name


@dataclass
class TracedGraph:
    """The graph and what has to be known to fill and edit it.

    `weights`: the initializers without data, by parameter name -> whether the graph wants the parameter
    transposed; `linears`: module name -> its MatMul or Gemm.
    """

    model: ir.Model
    weights: dict[str, bool] = field(default_factory=dict)
    linears: dict[str, ir.Node] = field(default_factory=dict)

    def weight_of(self, module: str) -> str:
        """Name of the initializer that the layer's weight is in; behind a Transpose for tied embeddings."""
        value: Any = self.linears[module].inputs[1]
        producer = value.producer()
        return producer.inputs[0].name if producer else value.name


def trace(config: PretrainedConfig, *, dtype: torch.dtype, opset: int) -> TracedGraph:
    """Export the architecture: prefill and decode in one graph, with batch, sequence and past dynamic.

    The graph's initializers have names, types and shapes but no data.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet():
        model = _weightless(config, dtype, fake)
        wrapper = CausalLM(model).eval()
        arguments, shapes = _arguments(wrapper, dtype, fake)
        program = torch.export.export(wrapper, arguments, dynamic_shapes=shapes, strict=False)
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=opset, optimize=False, verify=False, verbose=False
        )
        assert onnx_program is not None
        graph = onnx_program.model.graph
        with _parameters_as_inputs(graph):  # the optimizer must not want to look at their values
            onnxscript.optimizer.optimize_ir(onnx_program.model)
    onnx_program.model.producer_name = "esparse-trt"
    graph.name = config.model_type
    _name_interface(graph, wrapper)
    return _name_modules(onnx_program.model, model)


def _weightless(config: PretrainedConfig, dtype: torch.dtype, fake: FakeTensorMode) -> PreTrainedModel:
    """The model with fake parameters and real constants; tied parameters stay one object."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    model.tie_weights()
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in fakes:
                with fake:
                    storage = torch.empty(parameter.shape, dtype=parameter.dtype)
                fakes[id(parameter)] = nn.Parameter(storage, requires_grad=False)
            module._parameters[name] = fakes[id(parameter)]
    return model


def _arguments(wrapper: CausalLM, dtype: torch.dtype, fake: FakeTensorMode) -> tuple[tuple, tuple]:
    """Example arguments of `CausalLM.forward` and which of their dimensions are dynamic."""
    batch, sequence, past = 2, 3, 5  # different, and none of them 1, which would be taken as fixed
    config = wrapper.causal_lm.config
    heads, dim = cache_shape(config)
    with fake:
        ids = torch.zeros(batch, sequence, dtype=torch.int64)
        mask = torch.ones(batch, past + sequence, dtype=torch.int64)
        positions = torch.zeros(batch, sequence, dtype=torch.int64) if wrapper.family.positions else None
        cache = [
            torch.zeros(batch, heads, past, dim, dtype=dtype) for _ in range(2 * config.num_hidden_layers)
        ]
    b, s, p = Dim("batch"), Dim("sequence"), Dim("past")
    token_dims = {0: b, 1: s}
    return (ids, mask, positions, cache), (
        token_dims,
        {0: b, 1: Dim.DYNAMIC},
        token_dims if wrapper.family.positions else None,
        [{0: b, 2: p}] * len(cache),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from warning about what no user can change: missing torchvision, its own
    deprecations, initializers that have no data yet.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _parameters_as_inputs(graph: ir.Graph) -> Iterator[None]:
    """Present the initializers without data as graph inputs; afterwards keep those that are used."""
    parameters = {name: value for name, value in graph.initializers.items() if _is_fake(value)}
    inputs = list(graph.inputs)
    for name, value in parameters.items():
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    yield
    del graph.inputs[len(inputs) :]
    for value in parameters.values():
        if value.uses():
            graph.initializers.add(value)


def _is_fake(value: ir.Value) -> bool:
    return isinstance(getattr(value.const_value, "raw", None), FakeTensor)


# --- names -----------------------------------------------------------------------------------------------


def _name_interface(graph: ir.Graph, wrapper: CausalLM) -> None:
    """Inputs, outputs and dynamic dimensions by their public names."""
    names = ["input_ids", "attention_mask", "position_ids"]
    if not wrapper.family.positions:
        names.remove("position_ids")
    layers = range(wrapper.causal_lm.config.num_hidden_layers)
    cache = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    names += [f"past_key_values.{name}" for name in cache]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, ["logits", *(f"present.{name}" for name in cache)], strict=True):
        value.name = name

    ids, past = graph.inputs[0].shape, graph.inputs[len(names) - len(cache)].shape
    assert ids is not None and past is not None
    dims = {str(ids[0]): "batch", str(ids[1]): "sequence", str(past[2]): "past"}
    pattern = re.compile(r"\b(" + "|".join(dims) + r")\b")
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            renamed = [
                dim if isinstance(dim, int) else pattern.sub(lambda found: dims[found[0]], str(dim))
                for dim in value.shape
            ]
            value.shape = ir.Shape(renamed)


def _name_modules(onnx_model: ir.Model, model: PreTrainedModel) -> TracedGraph:
    """Name parameters, nodes and the outputs of linear layers after the modules they come from."""
    graph = onnx_model.graph
    traced = TracedGraph(onnx_model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for traced_name, value in list(graph.initializers.items()):
        name = traced_name.removeprefix(_ROOT)
        value.name = name = aliases.get(name, name)
        if value.const_value is None:
            traced.weights[name] = False
    for node in graph:
        module = _module_of(node)
        if module in linears and node.op_type in ("MatMul", "Gemm"):
            traced.linears[module] = node
            node.name = module
        else:
            node.name = f"{module}/{node.outputs[0].name}" if module else node.outputs[0].name
    _strip_metadata(graph)
    missing = sorted(linears - traced.linears.keys())
    assert not missing, f"linear layers without a MatMul or Gemm: {missing}"
    for module, node in traced.linears.items():
        _store_transposed(traced, node)
        _name_output(module, node)
    return traced


def _strip_metadata(graph: ir.Graph) -> None:
    """Drop the tracer's notes (source lines, node stacks): they are larger than the graph."""
    graph.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()


def _module_of(node: ir.Node) -> str:
    """The module that a node was traced in; empty for the wrapper's own nodes."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    inner = [scope for scope in scopes[:-1] if scope.startswith(_ROOT)]  # the last one is the operation
    return inner[-1].removeprefix(_ROOT) if inner else ""


def _store_transposed(traced: TracedGraph, node: ir.Node) -> None:
    """Replace `MatMul(x, Transpose(W [N, K]))` by `MatMul(x, W [K, N])`, unless W has other readers (tied
    embeddings: one copy in the file, and the runtimes fold the Transpose).
    """
    weight: Any = node.inputs[1]
    transpose = weight.producer()
    if transpose is None or len(transpose.inputs[0].uses()) > 1:
        return
    parameter = transpose.inputs[0]
    parameter.shape = weight.shape
    node.replace_input_with(1, parameter)
    traced.model.graph.remove(transpose, safe=True)
    traced.weights[parameter.name] = True


def _name_output(module: str, node: ir.Node) -> None:
    """Name the layer's output, after the bias, by the module; a graph output keeps its public name."""
    output = node.outputs[0]
    for user, _ in output.uses():
        if user.op_type == "Add" and any(value and value.name == f"{module}.bias" for value in user.inputs):
            user.name = f"{module}/bias"
            output.name = f"{module}/product"
            output = user.outputs[0]
            break
    if not output.is_graph_output():
        output.name = module
