"""A BERT encoder as ONNX, in the spelling of PyTorch's exporter, with the sentence embedding behind it.

Inputs input_ids, attention_mask and token_type_ids, int64 [batch, sequence], both sizes open; output
sentence_embedding, float32 [batch, hidden]: the mean of the last layer's rows that the mask keeps, of length one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"
MASKED = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Sizes:
    layers: int
    heads: int
    epsilon: float = 1e-12


Weights = Mapping[str, np.ndarray]
"""By the names of Hugging Face's BertModel: matrices [outputs, inputs]."""


def random_weights(
    rng: np.random.Generator, *, layers: int, hidden: int, inner: int, words: int, positions: int
) -> dict[str, np.ndarray]:
    """Weights of a small encoder that nobody trained; a few channels stand out, as in trained ones."""

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def vector(size: int) -> np.ndarray:
        return (0.1 * rng.standard_normal(size)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        gain = (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32)
        gain[rng.integers(hidden, size=2)] *= 6
        return {f"{name}.weight": gain, f"{name}.bias": vector(hidden)}

    def dense(name: str, outputs: int, inputs: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": matrix(outputs, inputs), f"{name}.bias": vector(outputs)}

    weights = {
        "embeddings.word_embeddings.weight": matrix(words, hidden),
        "embeddings.position_embeddings.weight": matrix(positions, hidden),
        "embeddings.token_type_embeddings.weight": matrix(2, hidden),
        **norm("embeddings.LayerNorm"),
    }
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            weights |= dense(f"{layer}.attention.self.{part}", hidden, hidden)
        weights |= dense(f"{layer}.attention.output.dense", hidden, hidden)
        weights |= norm(f"{layer}.attention.output.LayerNorm")
        weights |= dense(f"{layer}.intermediate.dense", inner, hidden) | dense(f"{layer}.output.dense", hidden, inner)
        weights |= norm(f"{layer}.output.LayerNorm")
    return weights


def encoder(weights: Weights, sizes: Sizes) -> onnx.ModelProto:
    """The model."""
    return _Exporter(weights, sizes).run()


class _Exporter:
    def __init__(self, weights: Weights, sizes: Sizes) -> None:
        self.weights = weights
        self.sizes = sizes
        self.hidden = weights["embeddings.word_embeddings.weight"].shape[1]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def run(self) -> onnx.ModelProto:
        ids, mask, kinds = INPUTS
        x = self.embed(ids, kinds)
        kept = self.op("Cast", [self.op("Unsqueeze", [mask, self.ints(1, 2)], "mask_4d")], "mask_float", to=1)
        hidden = self.op("Sub", [self.scalar(1.0), kept], "mask_inverse")
        bias = self.op("Mul", [hidden, self.scalar(MASKED)], "mask_bias")
        for index in range(self.sizes.layers):
            x = self.layer(f"encoder.layer.{index}", x, bias)
        self.pool(x, mask)
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in INPUTS]
        output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", self.hidden])
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "encoder", inputs, [output], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def embed(self, ids: str, kinds: str) -> str:
        words = self.op("Gather", [self.weight("embeddings.word_embeddings.weight"), ids], "words")
        types = self.op("Gather", [self.weight("embeddings.token_type_embeddings.weight"), kinds], "types")
        length = self.op("Gather", [self.op("Shape", [ids], "ids_shape"), self.constant("one", np.int64(1))], "length")
        end = self.op("Unsqueeze", [length, self.ints(0)], "end")
        table = self.weight("embeddings.position_embeddings.weight")
        every = self.constant("position_ids", np.arange(len(self.weights[table]))[None])
        places = self.op("Slice", [every, self.ints(0), end, self.ints(1)], "places")
        positions = self.op("Gather", [table, places], "positions")
        total = self.op("Add", [self.op("Add", [words, types], "words_types"), positions], "embedded")
        return self.norm("embeddings.LayerNorm", total)

    def layer(self, name: str, x: str, bias: str) -> str:
        heads, width = self.sizes.heads, self.hidden // self.sizes.heads
        attention = f"{name}.attention"

        def split(part: str, perm: Sequence[int]) -> str:
            dense = self.dense(f"{attention}.self.{part}", x)
            shaped = self.op("Reshape", [dense, self.ints(0, 0, heads, width)], f"{attention}.{part}.heads")
            return self.op("Transpose", [shaped], f"{attention}.{part}.moved", perm=perm)

        query, key, value = split("query", (0, 2, 1, 3)), split("key", (0, 2, 3, 1)), split("value", (0, 2, 1, 3))
        scores = self.op("MatMul", [query, key], f"{attention}.scores")
        scaled = self.op("Div", [scores, self.scalar(float(np.sqrt(width)))], f"{attention}.scaled")
        masked = self.op("Add", [scaled, bias], f"{attention}.masked")
        chances = self.op("Softmax", [masked], f"{attention}.softmax", axis=-1)
        context = self.op("MatMul", [chances, value], f"{attention}.context")
        joined = self.op("Transpose", [context], f"{attention}.joined", perm=(0, 2, 1, 3))
        flat = self.op("Reshape", [joined, self.ints(0, 0, self.hidden)], f"{attention}.flat")
        sum_ = self.op("Add", [self.dense(f"{attention}.output.dense", flat), x], f"{attention}.sum")
        x = self.norm(f"{attention}.output.LayerNorm", sum_)
        inner = self.gelu(f"{name}.gelu", self.dense(f"{name}.intermediate.dense", x))
        sum_ = self.op("Add", [self.dense(f"{name}.output.dense", inner), x], f"{name}.sum")
        return self.norm(f"{name}.output.LayerNorm", sum_)

    def gelu(self, name: str, x: str) -> str:
        error = self.op("Erf", [self.op("Div", [x, self.scalar(float(np.sqrt(2)))], f"{name}.div")], f"{name}.erf")
        shifted = self.op("Add", [error, self.scalar(1.0)], f"{name}.add")
        return self.op("Mul", [self.op("Mul", [x, shifted], f"{name}.mul"), self.scalar(0.5)], name)

    def pool(self, x: str, mask: str) -> None:
        wide = self.op("Unsqueeze", [mask, self.ints(-1)], "mask_3d")
        counted = self.op("Expand", [wide, self.op("Shape", [x], "x_shape")], "mask_wide")
        kept = self.op("Cast", [counted], "kept", to=1)
        total = self.op("ReduceSum", [self.op("Mul", [x, kept], "kept_rows"), self.ints(1)], "total", keepdims=0)
        count = self.op("ReduceSum", [kept, self.ints(1)], "count", keepdims=0)
        floor = self.op("Clip", [count, self.scalar(1e-9)], "count_floor")
        mean = self.op("Div", [total, floor], "mean")
        norm = self.op("ReduceL2", [mean], "norm", axes=[1], keepdims=1)
        safe = self.op("Clip", [norm, self.scalar(1e-12)], "norm_floor")
        self.op("Div", [mean, safe], OUTPUT)

    # --- building ------------------------------------------------------------------------------------------

    def dense(self, name: str, x: str) -> str:
        product = self.op("MatMul", [x, self.transposed(f"{name}.weight")], f"{name}.matmul")
        return self.op("Add", [self.weight(f"{name}.bias"), product], name)

    def norm(self, name: str, x: str) -> str:
        operands = [x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias")]
        return self.op("LayerNormalization", operands, name, axis=-1, epsilon=self.sizes.epsilon)

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: int | float | Sequence[int]) -> str:
        node = helper.make_node(op_type, inputs, [output], name=output)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray | np.generic) -> str:
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def transposed(self, name: str) -> str:
        return self.constant(f"{name}.T", np.ascontiguousarray(self.weights[name].T))

    def scalar(self, number: float) -> str:
        return self.constant(f"scalar_{number:g}", np.float32(number))

    def ints(self, *numbers: int) -> str:
        return self.constant("ints_" + "_".join(map(str, numbers)), np.asarray(numbers, np.int64))
