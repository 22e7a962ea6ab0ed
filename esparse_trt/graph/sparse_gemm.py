"""The operator `esparse::SparseGemm`, and what it means in standard ONNX operators.

    y[..., N] = x[..., K] · W[N, K]ᵀ,   W from `values` and `metadata` in the layout es24-v1 (es24.py)

An ONNX function body cannot branch on an absent input, so the variants are operators of their own:

    SparseGemm             (x, values, metadata)
    SparseGemmBias         (x, values, metadata, bias [N])
    SparseGemmPermute      (x, values, metadata, permutation int32 [K])
    SparseGemmBiasPermute  (x, values, metadata, bias [N], permutation int32 [K])

with y += bias, and x[..., permutation] in the place of x. A model that uses them carries a local function for
each that decompresses W and multiplies: ONNX Runtime and `onnx.reference` run the file as it is, and TensorRT
takes the plugin of the same name, which its parser prefers. The plugin reads the attributes; the function
takes its sizes from its inputs. x, values, bias and y have one type, fp16 or bf16 (which ONNX Runtime has no
CPU kernels for). `choices` names the plugin's kernels by number of tokens ("1=decode_a,64=wgmma_b"); where it
is empty, the plugin's heuristic chooses.
"""

from __future__ import annotations

from onnx import FunctionProto, ModelProto, NodeProto, helper, parser

from esparse_trt.graph.es24 import LAYOUT

DOMAIN, DOMAIN_VERSION = "esparse", 1
PATTERN = "2:4"
PLUGIN_VERSION, PLUGIN_NAMESPACE = "1", "esparse"

# One word has the places (2 bits) of 16 values: rows n and n + 8, 4 chunks, first and second value. Sorted by
# row and value like `values`, they say where in W each value belongs: value j of a row lies in chunk j // 2.
_DECOMPRESS = """
    words = Cast <to = 12> (metadata)
    innermost = Constant <value = int64[3] {-3, -2, -1}> ()
    word = Unsqueeze (words, innermost)
    shifts = Constant <value = uint32[2, 4, 2] {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}> ()
    shifted = BitShift <direction = "RIGHT"> (word, shifts)
    low_byte = Cast <to = 2> (shifted)
    mask = Constant <value = uint8 {3}> ()
    stored = BitwiseAnd (low_byte, mask)
    sorted = Transpose <perm = [1, 2, 6, 4, 0, 5, 3, 7, 8]> (stored)
    padded = Flatten <axis = 4> (sorted)
    shape = Shape (values)
    origin = Constant <value = int64[2] {0, 0}> ()
    unpadded = Slice (padded, origin, shape)
    places = Cast <to = 6> (unpadded)

    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    four = Constant <value = int64 {4}> ()
    half_k = Gather <axis = 0> (shape, one)
    columns = Range (zero, half_k, one)
    chunks = Div (columns, two)
    first_k = Mul (chunks, four)
    starts = Cast <to = 6> (first_k)
    k = Add (places, starts)

    twice = Constant <value = int64[2] {1, 2}> ()
    dense_shape = Mul (shape, twice)
    nothing = CastLike (zero, values)
    zeros = Expand (nothing, dense_shape)
    weight = ScatterElements <axis = 1> (zeros, k, values)
    transposed = Transpose <perm = [1, 0]> (weight)
"""


def operator(*, bias: bool, permutation: bool) -> str:
    """Name of the variant."""
    return "SparseGemm" + ("Bias" if bias else "") + ("Permute" if permutation else "")


VARIANTS = {operator(bias=b, permutation=p): (b, p) for b in (False, True) for p in (False, True)}


def function(name: str, opset: int) -> FunctionProto:
    """The body of a variant in the standard operators of an opset, 18 or later."""
    bias, permutation = VARIANTS[name]
    inputs = ["x", "values", "metadata", *["bias"] * bias, *["permutation"] * permutation]
    body = _DECOMPRESS
    body += (
        "    input = Gather <axis = -1> (x, permutation)\n" if permutation else "    input = Identity (x)\n"
    )
    body += "    product = MatMul (input, transposed)\n" if bias else "    y = MatMul (input, transposed)\n"
    body += "    y = Add (product, bias)\n" if bias else ""
    attributes = (
        f'pattern, in_features, out_features, layout: string = "{LAYOUT}", '
        f'plugin_version: string = "{PLUGIN_VERSION}", plugin_namespace: string = "{PLUGIN_NAMESPACE}", '
        'choices: string = ""'
    )
    return parser.parse_function(
        f'<opset_import: ["": {opset}], domain: "{DOMAIN}">\n'
        f"{name} <{attributes}> ({', '.join(inputs)}) => (y) {{{body}}}"
    )


def make_node(
    name: str,
    x: str,
    y: str,
    *,
    shape: tuple[int, int],
    bias: bool = False,
    permutation: bool = False,
    choices: str = "",
) -> NodeProto:
    """A node of the operator; its weights are the initializers `<name>.values`, `<name>.metadata` and so on.

    Args:
        name: of the node.
        x: the input tensor.
        y: the output tensor.
        shape: `[N, K]` of the weight.
        bias: whether there is a `<name>.bias`.
        permutation: whether there is a `<name>.permutation`.
        choices: the plugin's kernels by number of tokens.
    """
    weights = ["values", "metadata", *["bias"] * bias, *["permutation"] * permutation]
    return helper.make_node(
        operator(bias=bias, permutation=permutation),
        [x, *(f"{name}.{weight}" for weight in weights)],
        [y],
        name=name,
        domain=DOMAIN,
        pattern=PATTERN,
        in_features=shape[1],
        out_features=shape[0],
        layout=LAYOUT,
        plugin_version=PLUGIN_VERSION,
        plugin_namespace=PLUGIN_NAMESPACE,
        choices=choices,
    )


def add_functions(model: ModelProto) -> None:
    """Give a model the function bodies of the variants that it uses."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(function(name, opset) for name in VARIANTS if name in used)
    model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
