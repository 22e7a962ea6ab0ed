"""Running a decoder's ONNX graph one block at a time, so that only one block's weights are in memory.

The export names every node after the module it was traced in, so the last node under `model.layers.3`
computes what decoder block 3 returns: the residual stream. The graph is cut there. Tensors that cross a cut
(the residual stream; masks and rotary tables, which every block reads) are kept for the sections that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto, helper
from polygraphy.backend.onnx import ModifyOutputs, OnnxFromPath

from esparse_trt.evaluate.runtimes import Arrays, onnx_session, run_onnx

Undo = Callable[[str, np.ndarray], np.ndarray]  # tensor name, array -> array in original channel order


@dataclass(frozen=True)
class Section:
    """Nodes [start, stop) of a graph.

    Attributes:
        block: name of the decoder block that it ends with, such as model.layers.3; None after the last.
        output: name of the residual stream as it leaves the block; None after the last.
        linears: module name -> output tensor of its linear layers, in execution order.
    """

    start: int
    stop: int
    block: str | None
    output: str | None
    linears: dict[str, str]


@dataclass(frozen=True)
class SectionResult:
    """What a section computed, by module name in execution order: the outputs of its linear layers and, last,
    of the decoder block itself. All are in original channel order.
    """

    block: str | None
    outputs: Arrays


def as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """The `Undo` of a graph whose tensors are in original channel order."""
    return array


def block_of(module: str) -> str | None:
    """The decoder block of a module: its name up to the first number; None outside of the blocks."""
    found = re.match(r"(.*?\.\d+)(\.|$)", module)
    return found[1] if found else None


def block_index(module: str) -> int | None:
    """Index of the decoder block of a module."""
    block = block_of(module)
    return int(block.rsplit(".", 1)[1]) if block else None


def cut(graph: GraphProto, linears: Collection[str]) -> list[Section]:
    """Cut a topologically sorted graph after every decoder block that has one of these linear layers."""
    outputs = _linear_outputs(graph, linears)
    ends: dict[str, int] = {}
    wanted = {block for name in linears if (block := block_of(name))}
    for position, node in enumerate(graph.node):
        block = block_of(node.name.replace("/", "."))
        if block in wanted:
            ends[block] = position
    sections: list[Section] = []
    start = 0
    for block, last in [*sorted(ends.items(), key=lambda item: item[1]), (None, len(graph.node) - 1)]:
        inside = {name: tensor for name, (position, tensor) in outputs.items() if start <= position <= last}
        output = graph.node[last].output[0] if block else None
        sections.append(Section(start, last + 1, block, output, inside))
        start = last + 1
    return sections


def run_sections(
    path: Path, feed: Arrays, linears: Collection[str], undo: Undo = as_stored
) -> Iterator[SectionResult]:
    """Run an ONNX file in ONNX Runtime, one decoder block at a time, and yield what each one computed.

    Args:
        path: the file; external data is read from its folder, section by section.
        feed: graph input -> array.
        linears: module names of the linear layers whose outputs are wanted.
        undo: puts tensors into original channel order.
    """
    model = OnnxFromPath(str(path), ignore_external_data=True)()
    last_use = {name: position for position, node in enumerate(model.graph.node) for name in node.input}
    arrays = dict(feed)
    for section in cut(model.graph, linears):
        kept = [
            name
            for node in model.graph.node[section.start : section.stop]
            for name in node.output
            if last_use.get(name, -1) >= section.stop
        ]
        marks = list(dict.fromkeys([*section.linears.values(), *kept]))
        if not marks:
            continue
        piece = ModifyOutputs(_piece(model, section, arrays), outputs=marks)()
        session = partial(onnx_session, piece.SerializeToString(), folder=path.parent)
        made = run_onnx(session, {info.name: arrays[info.name] for info in piece.graph.input}, path.name)
        arrays = {name: a for name, a in (arrays | made).items() if last_use.get(name, -1) >= section.stop}
        yield SectionResult(section.block, _in_original_order(section, made, undo))


# --- pieces ----------------------------------------------------------------------------------------------


def _in_original_order(section: Section, made: Arrays, undo: Undo) -> Arrays:
    outputs = {name: undo(tensor, made[tensor]) for name, tensor in section.linears.items()}
    if section.block and section.output:
        *_, last = section.linears.values()  # it is added to the residual stream: they share their basis
        stream = made[section.output]
        outputs[section.block] = undo(last, stream.reshape(made[last].shape)).reshape(stream.shape)
    return outputs


def _linear_outputs(graph: GraphProto, linears: Collection[str]) -> dict[str, tuple[int, str]]:
    """Module name -> (node position, tensor) of each linear's output, in execution order.

    The tensor has the module's name, unless it is a graph output with a name of its own (`logits`).
    """
    found: dict[str, tuple[int, str]] = {}
    for position, node in enumerate(graph.node):
        if node.output[0] in linears:
            found[node.output[0]] = (position, node.output[0])
        elif node.name in linears:
            found[node.name] = (position, node.output[0])
    return found


def _piece(model: ModelProto, section: Section, arrays: Arrays) -> ModelProto:
    """A section as a model of its own; its weights stay where they are, in the file's external data."""
    nodes = model.graph.node[section.start : section.stop]
    made = {name for node in nodes for name in node.output}
    used = {name for node in nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in arrays.items()
        if name in used - made
    ]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, "section", inputs, outputs=[], initializer=weights)
    return helper.make_model(
        graph, opset_imports=model.opset_import, functions=model.functions, ir_version=model.ir_version
    )
