"""Clamps and tables merge, and not one integer changes."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import add_initializer, make_node
from qcompiler.integer import ops, reference
from qcompiler.passes.fuse_requantize import FuseRequantize
from qcompiler.quant import arithmetic
from qcompiler.verify import verify, verify_shapes

SHAPE = (1, 4, 8, 8)


class Chain:
    """A chain of integer operators on one tensor."""

    def __init__(self, seed: int = 0, dtype: ir.DataType = ir.DataType.INT8) -> None:
        self.rng = np.random.default_rng(seed)
        self.source = self.last = ir.Value(name="x", shape=ir.Shape(SHAPE), type=ir.TensorType(dtype))
        self.graph = ir.Graph([self.source], [], nodes=[], opset_imports={"": 21, "qcompiler": 1}, name="chain")

    def _next(self, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=f"v{len(self.graph)}", shape=ir.Shape(SHAPE), type=ir.TensorType(dtype))

    def const(self, array: np.ndarray) -> ir.Value:
        return add_initializer(self.graph, "c", array)

    def lookup(self, function: str = "Test") -> "Chain":
        table = self.const(self.rng.integers(-128, 128, 256).astype(np.int8))
        out = self._next(ir.DataType.INT8)
        return self._add(ops.QLookup(function).node([self.last, table], out, f"n_{out.name}"), out)

    def requantize(self) -> "Chain":
        factors = [self.const(array) for array in arithmetic.multipliers([0.7], "tosa")]
        out = self._next(ir.DataType.INT8)
        op = ops.QRequantize(5, -9, -120, 100, "tosa")
        return self._add(op.node([self.last, *factors], out, f"n_{out.name}"), out)

    def clip(self, low: int, high: int) -> "Chain":
        assert self.last.dtype is not None
        bounds = [self.const(np.array(bound, self.last.dtype.numpy())) for bound in (low, high)]
        out = self._next(self.last.dtype)
        return self._add(make_node("Clip", [self.last, *bounds], [out]), out)

    def pool(self) -> "Chain":
        assert self.last.dtype is not None
        out = self._next(self.last.dtype)
        op = ops.QMaxPool((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), -100, 100)
        return self._add(op.node([self.last], out, f"n_{out.name}"), out)

    def branch(self) -> "Chain":
        """What was made so far is an output as well."""
        self.graph.outputs.append(self.last)
        return self

    def _add(self, node: ir.Node, out: ir.Value) -> "Chain":
        self.graph.append(node)
        self.last = out
        return self

    def model(self) -> ir.Model:
        self.graph.outputs.append(self.last)
        return ir.Model(self.graph, ir_version=10)


def check(model: ir.Model, op_types: list[str]) -> ir.Model:
    assert model.graph.inputs[0].dtype is not None
    info = np.iinfo(model.graph.inputs[0].dtype.numpy())
    x = np.arange(256).reshape(SHAPE) + info.min
    feeds = {"x": x.astype(info.dtype)}
    want = reference.execute(model, feeds)
    assert FuseRequantize()(model).modified
    verify(model, "the pass")
    verify_shapes(model, "the pass")
    got = reference.execute(model, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
    assert [node.op_type for node in model.graph] == op_types
    assert not FuseRequantize()(model).modified
    return model


def test_clip_goes_into_the_clamp() -> None:
    model = check(Chain().pool().clip(-50, 120).model(), ["QMaxPool"])
    pool = ops.QMaxPool.of(next(iter(model.graph)))
    assert (pool.clamp_min, pool.clamp_max) == (-50, 100)
    check(Chain().requantize().clip(110, 120).model(), ["QRequantize"])


def test_clips_in_a_row_go_into_the_clamp() -> None:
    check(Chain().requantize().clip(-50, 120).clip(-60, 20).model(), ["QRequantize"])


@pytest.mark.parametrize("dtype", [ir.DataType.INT8, ir.DataType.UINT8])
def test_tables_take_in_their_neighbours(dtype) -> None:
    assert dtype.numpy() in (np.int8, np.uint8)
    low = int(np.iinfo(dtype.numpy()).min)
    model = check(Chain(1, dtype).clip(low + 20, 100).lookup("Sigmoid").requantize().clip(-30, 30).model(), ["QLookup"])
    assert ops.QLookup.of(next(iter(model.graph))).function == "Sigmoid"
    model = check(Chain(2, dtype).requantize().lookup("Tanh").lookup("Exp").model(), ["QLookup"])
    assert ops.QLookup.of(next(iter(model.graph))).function == "Tanh+Exp"


def test_fused_node_keeps_the_output_and_its_name() -> None:
    model = check(Chain(3).lookup().requantize().model(), ["QLookup"])
    assert model.graph.outputs[0].name == "v1"


@pytest.mark.parametrize(
    "chain",
    [
        Chain(4).requantize().requantize(),
        Chain(4).lookup().branch().requantize(),
        Chain(4).pool().branch().clip(-3, 3),
        Chain(4).clip(-3, 3).pool(),
        Chain(4).pool().lookup(),
    ],
)
def test_what_must_stay(chain: Chain) -> None:
    model = chain.model()
    before = ir.to_proto(model).SerializeToString()
    assert not FuseRequantize()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
