import numpy as np
import pytest

from qcompiler.quant.layer_rows import from_weight_rows, has_rows, input_rows, weight_rows

CONVOLUTIONS = (
    ("group=1, pads=[1,1,1,1]", (8, 6, 3, 3), (1, 6, 9, 7)),
    ("group=6, strides=[2,2], pads=[1,0,0,1]", (6, 1, 3, 3), (1, 6, 8, 11)),
    ("group=2, dilations=[2,1]", (4, 3, 3, 2), (2, 6, 9, 5)),
    ("group=3, strides=[2], pads=[2,1]", (6, 2, 5), (1, 6, 17)),
)


@pytest.fixture
def net_conv(parse):
    """A model of one Conv with random weights: `net_conv(attributes, weight shape, input shape)`."""

    def make(attributes, weights, x):
        dims, unknown = ",".join(map(str, x)), ",".join("nchw"[: len(x)])
        return parse(f"g (float[{dims}] x) => (float[{unknown}] y) {{ y = Conv<{attributes}>(x, w) }}", {"w": weights})

    return make


@pytest.mark.parametrize(("attributes", "weights", "x"), CONVOLUTIONS)
def test_rows_times_weight_rows_is_the_convolution(net_conv, run, attributes, weights, x):
    model = net_conv(attributes, weights, x)
    (node,) = model.graph
    values = np.random.default_rng(3).standard_normal(x).astype(np.float32)
    rows = input_rows(node, values, limit=10**6)
    outputs = rows @ weight_rows(node, node.inputs[1].const_value.numpy()).transpose(0, 2, 1)
    (expected,) = run(model, {"x": values})
    # [group, batch * pixels, outputs of the group] against [batch, outputs, pixels].
    flat = expected.reshape(x[0], weights[0], -1).transpose(0, 2, 1).reshape(-1, weights[0])
    np.testing.assert_allclose(np.concatenate(list(outputs), axis=1), flat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_rows_times_weight_rows_is_the_product(parse, run, transposed):
    weights = (5, 7) if transposed else (7, 5)
    model = parse(f"g (float[3,7] x) => (float[3,5] y) {{ y = Gemm<transB={transposed}>(x, w) }}", {"w": weights})
    (node,) = model.graph
    values = np.random.default_rng(4).standard_normal((3, 7)).astype(np.float32)
    rows = weight_rows(node, node.inputs[1].const_value.numpy())
    np.testing.assert_allclose(input_rows(node, values, 100)[0] @ rows[0].T, run(model, {"x": values})[0], rtol=1e-5)


@pytest.mark.parametrize(("attributes", "weights", "x"), CONVOLUTIONS)
def test_weight_rows_can_be_undone(net_conv, attributes, weights, x):
    (node,) = net_conv(attributes, weights, x).graph
    array = node.inputs[1].const_value.numpy()
    np.testing.assert_array_equal(from_weight_rows(node, weight_rows(node, array)), array)


def test_the_limit_keeps_some_of_the_rows_and_the_offset_others(net_conv):
    (node,) = net_conv("group=1", (2, 3, 1, 1), (1, 3, 20, 20)).graph
    values = np.arange(1200, dtype=np.float32).reshape(1, 3, 20, 20)
    everything = {tuple(row) for row in input_rows(node, values, 400)[0]}
    first, second = ({tuple(row) for row in input_rows(node, values, 50, offset)[0]} for offset in (0, 1))
    assert len(everything) == 400 and 40 <= len(first) <= 50
    assert first < everything and second < everything and not first & second


def test_a_product_of_two_activations_has_no_rows(parse):
    batched = parse("g (float[2,3,4] x, float[2,4,5] w) => (float[2,3,5] y) { y = MatMul(x, w) }", {})
    assert not has_rows(batched.graph[0])
