"""Standard ONNX operators on the CPU against onnxruntime: one table of cases, compiled together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.float_ops import LOWERINGS, refusal, unsupported
from qcompiler.graph import Attribute, value_name
from qcompiler.integer.reference import execute
from qcompiler.recurrent import OPS as RECURRENT
from qcompiler.target_loader import load_target


@dataclass(frozen=True)
class Fixed:
    """A constant input with these values."""

    values: Sequence[float] | float | np.ndarray
    dtype: str = "float32"


@dataclass(frozen=True)
class Random:
    """An input of random numbers in [low, high)."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float = -3
    high: float = 3


Operand = Random | Fixed | tuple[int, ...] | None
"""A bare shape stands for Random(shape)."""


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[Operand, ...]
    attributes: dict[str, Attribute] = field(default_factory=dict)
    outputs: int = 1
    tolerance: float = 2e-5
    shape: tuple[int, ...] | None = None
    """Of a float32 output, where ONNX infers none."""


def ints(*values: int) -> Fixed:
    return Fixed(np.asarray(values), "int64")


POSITIVE = Random((3, 5, 7), low=0.1, high=4)
BOOLS = Random((4, 6), "bool", 0, 2)

ELEMENTWISE: tuple[Case, ...] = (
    *(Case(op, ((2, 3, 5),)) for op in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Mish", "Neg")),
    *(Case(op, ((2, 3, 16),)) for op in ("Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh")),
    *(Case(op, (POSITIVE,)) for op in ("Log", "Sqrt", "Reciprocal")),
    *(Case(op, ((2, 3, 4), (2, 3, 4))) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    *(Case(op, ((2, 1, 4), (3, 1))) for op in ("Add", "Sub", "Mul", "Max", "Less", "Greater")),
    *(Case(op, (Random((40,), "int64", -5, 5), Random((40,), "int64", 1, 5))) for op in ("Add", "Div", "Mod", "Mul")),
    *(Case(op, (Random((40,), "int32", 0, 3), Random((40,), "int32", 0, 3))) for op in ("Equal", "GreaterOrEqual")),
    *(Case(op, (BOOLS, BOOLS)) for op in ("And", "Equal", "Or", "Xor")),
    Case("Not", (BOOLS,)),
    Case("LessOrEqual", ((5, 4), (4,))),
    Case("Max", ((4, 5), (5,), (4, 1))),
    Case("Sum", ((4, 5), (5,), (4, 1))),
    Case("Mean", ((4, 5), (5,), (4, 1))),
    Case("Mod", ((30,), Random((30,), low=0.5, high=2)), {"fmod": 1}),
    Case("Pow", (POSITIVE, (7,))),
    *(Case("Pow", (POSITIVE, Fixed(exponent))) for exponent in (2.0, 3.0, 0.5, -1.0, 1.7)),
    Case("Where", (BOOLS, (4, 6), (6,))),
    Case("Cast", ((4, 5),), {"to": ir.DataType.INT32.value}),
    Case("Cast", ((4, 5),), {"to": ir.DataType.BOOL.value}),
    Case("Cast", (BOOLS,), {"to": ir.DataType.FLOAT.value}),
    Case("Cast", (Random((9,), "int64", -9, 9),), {"to": ir.DataType.FLOAT.value}),
    Case("Clip", ((4, 5), Fixed(-1.0), Fixed(1.5))),
    Case("Clip", ((4, 5), None, Fixed(0.5))),
    Case("Clip", (Random((64,), "int8", -128, 128), Fixed(-7, "int8"), Fixed(100, "int8"))),
    Case("PRelu", ((2, 3, 4, 4), (3, 1, 1))),
    Case("LeakyRelu", ((4, 5),), {"alpha": 0.2}),
    Case("Elu", ((4, 5),), {"alpha": 1.5}),
    Case("Celu", ((4, 5),), {"alpha": 1.5}),
    Case("Selu", ((4, 5),)),
    Case("Gelu", ((4, 5),)),
    Case("Gelu", ((4, 5),), {"approximate": "tanh"}),
    Case("HardSigmoid", ((4, 5),), {"alpha": 0.3, "beta": 0.4}),
    Case("ThresholdedRelu", ((4, 5),), {"alpha": 0.7}),
    Case(
        "BatchNormalization",
        ((2, 3, 4, 4), Fixed([1.0, 2, 3]), Fixed([0.1, 0.2, 0.3]), Fixed([0.5, -0.5, 1]), Fixed([1.0, 0.5, 2])),
    ),
)

REDUCTIONS: tuple[Case, ...] = (
    *(
        Case(f"Reduce{name}", (Random((3, 4, 5, 6), low=0.1, high=2), ints(1, 2)), {"keepdims": keep})
        for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
        for keep in (0, 1)
    ),
    Case("ReduceMean", ((3, 4, 5), ints(-1))),
    Case("ReduceSum", ((3, 4, 5),)),
    Case("ReduceMax", (Random((3, 4, 5), "int8", -128, 128), ints(0))),
    Case("ArgMax", ((3, 4, 5),), {"axis": 1}),
    Case("ArgMin", ((3, 4, 5),), {"axis": -1, "keepdims": 0}),
    Case("ArgMax", (Random((3, 40), "int8", -3, 3),), {"axis": 1}),
    Case("ArgMax", (Random((3, 40), "int8", -3, 3),), {"axis": 1, "select_last_index": 1}),
    Case("Softmax", ((3, 4, 5),), {"axis": 1}),
    Case("Softmax", ((1, 100),)),
    Case("LogSoftmax", ((3, 4, 5),)),
    Case("LayerNormalization", ((2, 5, 8), (8,), (8,))),
    Case("LayerNormalization", ((2, 5, 8), (5, 8)), {"axis": 1, "epsilon": 1e-3}),
    Case("InstanceNormalization", ((2, 3, 4, 5), (3,), (3,))),
    Case("GroupNormalization", ((2, 6, 4, 5), (6,), (6,)), {"num_groups": 3}, shape=(2, 6, 4, 5)),
    Case("LpNormalization", ((3, 4, 5),), {"axis": 1, "p": 2}),
    Case("CumSum", ((3, 4, 5), ints(1))),
    Case("CumSum", ((3, 4), Fixed(np.asarray(-1), "int32")), {"exclusive": 1, "reverse": 1}),
    Case("TopK", (Random((3, 9, 2), "float32"), ints(4)), {"axis": 1}, outputs=2),
    Case("TopK", (Random((3, 20), "int32", 0, 5), ints(7)), {"largest": 0}, outputs=2),
)

NEURAL: tuple[Case, ...] = (
    Case("Conv", ((2, 3, 9, 11), (8, 3, 3, 3), (8,)), {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    Case("Conv", ((1, 6, 8, 16), (9, 2, 3, 2)), {"group": 3, "dilations": [2, 1]}),
    Case("Conv", ((1, 8, 7, 7), (8, 1, 3, 3), (8,)), {"group": 8, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", ((1, 8, 8, 8), (16, 8, 1, 1), (16,))),
    Case("Conv", ((2, 4, 20), (5, 4, 3), (5,)), {"pads": [2, 0]}),
    Case("ConvTranspose", ((1, 4, 5, 6), (4, 3, 3, 2), (3,)), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    Case(
        "ConvTranspose",
        ((2, 4, 5, 5), (4, 2, 4, 4)),
        {"strides": [3, 2], "group": 2, "output_padding": [1, 1], "dilations": [1, 2]},
    ),
    Case("MaxPool", ((2, 3, 9, 9),), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", ((1, 2, 9, 9),), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", (Random((1, 2, 8, 8), "int8", -128, 128),), {"kernel_shape": [3, 3], "dilations": [2, 2]}),
    Case("MaxPool", ((2, 3, 9, 8),), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}, outputs=2),
    Case(
        "MaxPool",
        (Random((2, 3, 7, 8), "int8", -3, 3),),  # equal maxima: the first one counts
        {"kernel_shape": [3, 3], "dilations": [2, 1], "storage_order": 1},
        outputs=2,
    ),
    Case("MaxPool", ((2, 3, 15),), {"kernel_shape": [4], "strides": [3], "pads": [2, 1]}, outputs=2),
    Case("LRN", ((2, 7, 3, 5),), {"size": 5, "alpha": 0.3, "bias": 1.5}),
    Case("LRN", ((1, 6, 4, 3),), {"size": 3, "alpha": 0.1, "beta": 0.6}),
    Case("AveragePool", ((2, 3, 9, 9),), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("AveragePool", ((2, 3, 9, 9),), {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", ((1, 2, 15),), {"kernel_shape": [4], "auto_pad": "SAME_LOWER", "strides": [3]}),
    Case("GlobalAveragePool", ((2, 3, 5, 7),)),
    Case("GlobalMaxPool", ((2, 3, 5, 7),)),
    Case("Gemm", ((5, 7), (7, 9), (9,)), {"alpha": 0.5, "beta": 2.0}),
    Case("Gemm", ((7, 5), (32, 7), (5, 1)), {"transA": 1, "transB": 1}),
    Case("MatMul", ((3, 5, 7), (7, 16))),
    Case("MatMul", ((2, 1, 5, 7), (3, 7, 4))),
    Case("MatMul", ((7,), (2, 7, 4))),
    Case("MatMul", ((2, 4, 7), (7,))),
    Case("Einsum", ((2, 3, 4), (2, 5, 4)), {"equation": "bij,bkj->bik"}),
    Case("Einsum", ((3, 4), (4, 5)), {"equation": "ij,jk"}),
    Case("Resize", ((1, 2, 5, 7), None, Fixed([1, 1, 2, 3.0])), {"mode": "nearest", "nearest_mode": "floor"}),
    Case("Resize", ((1, 2, 5, 7), None, None, ints(1, 2, 11, 4)), {"mode": "linear"}),
    Case(
        "Resize",
        ((1, 2, 5, 7), None, None, ints(1, 2, 9, 15)),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
)

CUBIC: tuple[Case, ...] = tuple(
    Case("Resize", ((1, 2, 5, 7), None, None, ints(1, 2, *size)), {"mode": "cubic", **attributes})
    for size, attributes in (
        ((11, 4), {}),
        ((9, 15), {"coordinate_transformation_mode": "align_corners", "cubic_coeff_a": -0.5}),
        ((3, 20), {"exclude_outside": 1}),
        ((10, 14), {"coordinate_transformation_mode": "asymmetric"}),
    )
)

INT8 = Random((2, 4, 6, 8), "int8", -128, 128)
MOVEMENT: tuple[Case, ...] = (
    *(
        Case("Transpose", (INT8,), {"perm": perm})
        for perm in ([0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1])
    ),
    Case("Transpose", ((1, 5, 1, 7),), {"perm": [0, 2, 1, 3]}),
    Case("Reshape", (INT8, ints(8, -1))),
    Case("Flatten", (INT8,), {"axis": 2}),
    Case("Squeeze", ((1, 3, 1), ints(0))),
    Case("Unsqueeze", ((3, 4), ints(1))),
    Case("Identity", ((3, 4),)),
    Case("Concat", ((2, 3, 4), (2, 5, 4), (2, 1, 4)), {"axis": 1}),
    Case("Concat", (Random((2, 3), "int8", -128, 128), Random((2, 70), "int8", -128, 128)), {"axis": -1}),
    Case("Split", ((2, 9, 4), ints(2, 3, 4)), {"axis": 1}, outputs=3),
    Case("Split", ((2, 7),), {"axis": -1, "num_outputs": 2}, outputs=2),
    Case("Slice", ((4, 9, 5), ints(1, -3), ints(3, 100), ints(0, 1))),
    Case("Slice", ((4, 9, 5), ints(-1, 8), ints(-100, 0), ints(2, 1), ints(-1, -3))),
    Case("Pad", ((2, 3, 4), ints(0, 1, 2, 1, 0, 3), Fixed(1.5))),
    Case("Pad", ((2, 6, 4), ints(-1, 2, 2, 1), None, ints(1, 2))),
    *(Case("Pad", ((2, 5, 6), ints(0, 2, 3, 0, 1, 2)), {"mode": mode}) for mode in ("reflect", "edge", "wrap")),
    Case("Expand", ((3, 1), ints(2, 3, 4))),
    Case("Expand", ((3, 4), ints(3, 4))),
    Case("Tile", ((2, 3), ints(2, 3))),
    Case("Gather", ((5, 6, 7), Random((2, 3), "int64", -6, 6)), {"axis": 1}),
    Case("Gather", ((5, 6), Random((), "int64", -5, 5)), {"axis": 0}),
    Case("GatherElements", ((4, 5), Random((4, 3), "int64", -5, 5)), {"axis": 1}),
    Case("GatherND", ((4, 5, 6), Random((3, 2), "int64", -4, 4))),
    Case("GatherND", ((4, 5, 6), Random((4, 3, 1), "int64", 0, 5)), {"batch_dims": 1}),
    Case("DepthToSpace", ((1, 12, 3, 4),), {"blocksize": 2}),
    Case("DepthToSpace", ((2, 8, 3, 4),), {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", ((2, 3, 4, 6),), {"blocksize": 2}),
    Case("Trilu", ((3, 5, 5),)),
    Case("Trilu", ((4, 6), Fixed(np.asarray(1), "int64")), {"upper": 0}),
    Case("OneHot", (Random((3, 4), "int64", -5, 5), ints(5), Fixed([0.0, 2.0])), {"axis": 1}),
    Case("Dropout", ((3, 4),)),
)

QUANTIZING: tuple[Case, ...] = (
    Case("QuantizeLinear", ((3, 4, 8), Fixed(0.05), Fixed(3, "int8"))),
    Case("QuantizeLinear", ((3, 4, 8), Fixed(0.01), Fixed(130, "uint8"))),
    Case("QuantizeLinear", ((3, 4, 8), Fixed([0.01, 0.02, 0.03, 0.04]), Fixed([1, 2, 3, 4], "int8")), {"axis": 1}),
    Case("DequantizeLinear", (INT8, Fixed(0.05), Fixed(-3, "int8"))),
    Case("DequantizeLinear", (INT8, Fixed(np.arange(1, 9) / 50), Fixed(np.arange(8), "int8")), {"axis": 3}),
    Case("DynamicQuantizeLinear", ((3, 5, 7),), outputs=3),
    Case("DequantizeLinear", (Random((7,), "int32", -90000, 90000), Fixed(np.arange(1, 8) / 999)), {"axis": 0}),
)

FAMILIES = (ELEMENTWISE, REDUCTIONS, NEURAL + CUBIC, MOVEMENT, QUANTIZING)


def add_case(bench, case: Case) -> None:
    rng: np.random.Generator = bench.rng
    values: list[ir.Value | None] = []
    for operand in case.inputs:
        match operand:
            case None:
                values.append(None)
            case Fixed(numbers, dtype):
                values.append(bench.constant(np.asarray(numbers, dtype)))
            case _:
                random = operand if isinstance(operand, Random) else Random(operand)
                if np.dtype(random.dtype).kind == "f":
                    array = rng.uniform(random.low, random.high, random.shape)
                else:
                    array = rng.integers(int(random.low), int(random.high), random.shape)
                values.append(bench.input(array.astype(random.dtype)))
    if case.shape is not None:
        bench.standard(case.op, values, [(case.shape, np.dtype(np.float32))], case.attributes)
    else:
        bench.inferred(case.op, values, case.outputs, case.attributes)


@pytest.mark.parametrize("family", FAMILIES, ids=["elementwise", "reductions", "neural", "movement", "quantizing"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_agrees_with_onnxruntime(workbench, run_on_cpu, tmp_path, family: tuple[Case, ...]) -> None:
    bench = workbench(seed=len(family))
    for case in family:
        add_case(bench, case)
    model = bench.model()
    assert unsupported(model) == ()
    expected = execute(model, bench.feeds)
    actual = run_on_cpu(model, load_target("x86-cpu"), bench.feeds, tmp_path)
    by_name = {value_name(value): array for value, array in zip(model.graph.outputs, actual, strict=True)}
    for node, case in zip(bench.nodes, family, strict=True):
        for value in node.outputs:
            wanted, array = expected[value_name(value)], by_name[value_name(value)]
            assert array.shape == wanted.shape and array.dtype == wanted.dtype, case
            if wanted.dtype.kind == "f":
                np.testing.assert_allclose(array, wanted, rtol=case.tolerance, atol=case.tolerance, err_msg=str(case))
            else:
                np.testing.assert_array_equal(array, wanted, err_msg=str(case))


def test_every_operator_of_the_table_has_a_case() -> None:
    covered = {case.op for family in FAMILIES for case in family}
    # ConstantOfShape needs a constant shape, which constant folding removes together with the node;
    # test_float_recurrent.py has the operators that need simplifying first.
    assert set(LOWERINGS) - covered <= {"ConstantOfShape", *RECURRENT}


def test_unsupported_names_every_node_at_once(workbench) -> None:
    bench = workbench(seed=1)
    x = bench.input(np.zeros((1, 2, 8, 8), np.float32))
    limits = bench.input(np.zeros((), np.float32))
    bench.standard("NonMaxSuppression", [x], [((1, 3), np.dtype(np.int64))])
    bench.standard("Relu", [x], [((1, 2, 8, 8), np.dtype(np.float32))])
    bench.standard("Clip", [x, limits], [((1, 2, 8, 8), np.dtype(np.float32))])
    bench.standard("Einsum", [x], [((2, 8), np.dtype(np.float32))], {"equation": "...ii->...i"})
    found = unsupported(bench.model())
    assert [(item.op, item.node) for item in found] == [
        ("NonMaxSuppression", "node0"),
        ("Clip", "node2"),
        ("Einsum", "node3"),
    ]
    assert "input 1 is not a constant" in found[1].reason


def test_refuses_what_it_would_get_wrong(workbench) -> None:
    bench = workbench(seed=2)
    x = bench.input(np.zeros((1, 2, 8, 8), np.float32))
    scales = bench.constant(np.asarray([1, 1, 2, 2], np.float32))
    smooth = bench.standard(
        "Resize", [x, None, scales], [((1, 2, 16, 16), np.dtype(np.float32))], {"mode": "cubic", "antialias": 1}
    )
    pool = bench.standard(
        "AveragePool", [x], [((1, 2, 6, 6), np.dtype(np.float32))], {"kernel_shape": [2, 2], "dilations": [2, 2]}
    )
    assert "plain resizing" in (refusal(smooth) or "")
    assert "dilation" in (refusal(pool) or "")
