import numpy as np
import pytest

from qcompiler.quant.operators import (
    clamp_of,
    inherits_format,
    interior_values,
    is_fused_clamp,
    lookup_regions,
    refusal,
)


def _by_name(model):
    return {node.name: node for node in model.graph}


def _names(values):
    return {value.name for value in values}


def test_relu_and_clip_run_inside_what_is_before_them(parse):
    model = parse(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] kept)"
        "{ c = Conv(x, w)  r = Relu(c)  s = Add(r, x)  t = Clip(s, low, high)  kept = Conv(t, w)  u = Relu(kept)"
        "  p = Concat<axis=1>(u)  y = Relu(p) }",
        {"w": (4, 4, 1, 1), "low": np.float32(0), "high": np.float32(6)},
    )
    nodes = _by_name(model)
    assert clamp_of(nodes["c"]) is nodes["r"] and clamp_of(nodes["s"]) is nodes["t"]
    assert clamp_of(nodes["kept"]) is None  # a graph output must exist before the Relu
    assert not is_fused_clamp(nodes["y"])  # Concat clamps nothing
    assert {"c", "s"} <= _names(interior_values(list(model.graph))) and "kept" not in _names(
        interior_values(list(model.graph))
    )


def test_gated_activations_become_one_table(parse):
    model = parse(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y, float[1,4,8,8] z)"
        "{ c = Conv(x, w)  s = Sigmoid(c)  y = Mul(c, s)"
        "  d = Conv(x, w)  a = Add(d, three)  b = Clip(a, zero, six)  m = Mul(d, b)  z = Div(m, six) }",
        {"w": (4, 4, 1, 1), "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)},
    )
    nodes = _by_name(model)
    regions = lookup_regions(list(model.graph))
    assert regions == {
        nodes["y"]: (nodes["s"], nodes["y"]),
        nodes["z"]: (nodes["a"], nodes["b"], nodes["m"], nodes["z"]),
    }
    assert _names(interior_values(list(model.graph))) == {"s", "a", "b", "m"}


def test_tables_take_one_tensor_and_keep_what_others_read(parse):
    model = parse(
        "g (float[1,4] x, float[1,4] v) => (float[1,4] p, float[1,4] q, float[1,4] t)"
        "{ s = Sigmoid(x)  p = Mul(s, v)  t = Tanh(x)  e = Exp(t)  k = Mul(e, per)  q = Sigmoid(k) }",
        {"per": np.arange(4, dtype=np.float32)},
    )
    nodes = _by_name(model)
    # p reads two tensors; t is an output, so e starts its own table; k multiplies by four different numbers.
    assert lookup_regions(list(model.graph)) == {nodes[name]: (nodes[name],) for name in ("s", "t", "e", "q")}


@pytest.mark.parametrize(
    ("text", "constants", "reason"),
    [
        ("{ y = Conv(x, v) }", {}, "weights are not constant"),
        ("{ y = Conv(x, w, b) }", {"w": (4, 4, 1, 1)}, "bias is not constant"),
        ("{ y = Clip(x, low) }", {"low": np.float32(0.5)}, "does not hold 0"),
        ('{ y = Resize<mode = "cubic">(x, , s) }', {"s": np.array([1, 1, 2, 2], np.float32)}, "cubic"),
        ("{ y = Softmax<axis=2>(x) }", {}, "axis 2"),
        ("{ y = PRelu(x, s) }", {"s": (4, 1, 1)}, "no integer form"),
        ("{ y, i = MaxPool<kernel_shape=[2,2]>(x)  z = Cast<to=1>(i) }", {}, "indices"),
        ("{ y = AveragePool<kernel_shape=[2,2], dilations=[2,2]>(x) }", {}, "dilated"),
        ("{ y = Gemm<alpha=0.5>(m, w) }", {"w": (3, 3)}, "alpha"),
        ("{ y = Gemm<transA=1>(m, w) }", {"w": (3, 3)}, "transposed"),
        ("{ y = Gemm(m, w, c) }", {"w": (3, 3), "c": (3, 1)}, None),
        ("{ y = Gemm(m, w, c) }", {"w": (3, 3), "c": (3, 3)}, "one value per output"),
        ("{ i = Cast<to=7>(m)  y = Add(i, i) }", {}, "float activations"),
        ("{ y = Softmax<axis=1>(x) }", {}, None),
        ("{ y = Conv(x, w) }", {"w": (4, 4, 3, 3)}, None),
        ("{ y = MaxPool<kernel_shape=[2,2], ceil_mode=1>(x) }", {}, None),
    ],
)
def test_refusals_say_why(parse, text, constants, reason):
    signature = "g (float[1,4,8,8] x, float[4,4,1,1] v, float[4] b, float[3,3] m) => "
    model = parse(f"{signature} (y) {text}", constants)
    given = refusal(next(node for node in model.graph if node.outputs[0].name == "y"))
    assert (given is None) if reason is None else (given is not None and reason in given)


def test_movement_keeps_formats(parse):
    model = parse(
        "g (float[1,4,8,8] x) => (y, z)"
        "{ a = Transpose<perm=[0,2,3,1]>(x)  y = MaxPool<kernel_shape=[2,2]>(a)"
        "  z = AveragePool<kernel_shape=[2,2]>(x) }",
        {},
    )
    assert [inherits_format(node) for node in model.graph] == [True, True, False]
