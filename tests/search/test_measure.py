"""Noise, agreement and losses against numpy."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.search.labels import labels_beside, read_labels
from qcompiler.search.measure import TOGETHER, measure, probabilities

CLASSES, FEATURES, SAMPLES = 7, 9, 60


def linear(weights: np.ndarray, *, softmax: bool = False) -> ir.Model:
    scores = "s" if softmax else "y"
    nodes = [helper.make_node("MatMul", ["x", "w"], [scores], name="product")]
    nodes += [helper.make_node("Softmax", ["s"], ["y"], name="softmax")] if softmax else []
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, FEATURES])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, weights.shape[1]])
    graph = helper.make_graph(nodes, "linear", [x], [y], [numpy_helper.from_array(weights, "w")])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("softmax", [False, True])
def test_against_numpy(softmax: bool) -> None:
    rng = np.random.default_rng(3)
    exact = rng.standard_normal((FEATURES, CLASSES)).astype(np.float32)
    sizes = np.linspace(0, 1, TOGETHER + 3, dtype=np.float32)
    others = [exact + rng.standard_normal(exact.shape).astype(np.float32) * size for size in sizes]
    inputs = rng.standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, SAMPLES)

    def scores(weights: np.ndarray) -> np.ndarray:
        made = inputs.astype(np.float64) @ weights
        chances = np.exp(made) / np.exp(made).sum(axis=1, keepdims=True)
        return chances if softmax else made

    def chances(made: np.ndarray) -> np.ndarray:
        return made if softmax else np.exp(made) / np.exp(made).sum(axis=1, keepdims=True)

    seen = measure(
        linear(exact, softmax=softmax),
        [partial(linear, weights, softmax=softmax) for weights in others],
        [{"x": row[None]} for row in inputs],
        labels,
    )
    wanted = scores(exact)
    first = wanted.argmax(axis=1)
    for weights, found in zip(others, seen, strict=True):
        got = scores(weights)
        ours = got.argmax(axis=1)
        expected = chances(wanted)[np.arange(SAMPLES), first] - chances(wanted)[np.arange(SAMPLES), ours]
        changes = (first == labels).astype(int) - (ours == labels)
        assert found.samples == SAMPLES
        assert found.noise == pytest.approx(((got - wanted) ** 2).sum() / (wanted**2).sum(), abs=1e-10, rel=1e-4)
        assert found.agreement == pytest.approx((first == ours).mean())
        assert found.expected_drop == pytest.approx(expected.mean(), abs=1e-6)
        assert found.expected_drop_error == pytest.approx(expected.std() / SAMPLES**0.5, abs=1e-6)
        assert found.top1 == pytest.approx((ours == labels).mean())
        assert found.drop == pytest.approx(changes.mean())
        assert found.drop_error == pytest.approx(changes.std() / SAMPLES**0.5)
        assert found.loss == pytest.approx(
            max(expected.mean() + expected.std() / SAMPLES**0.5, changes.mean() - changes.std() / SAMPLES**0.5),
            abs=1e-6,
        )
    assert seen[0].sqnr is None and seen[0].agreement == 1 and seen[0].expected_drop == 0
    assert seen[-1].agreement is not None and seen[-1].agreement < 0.9


def test_without_labels() -> None:
    weights = np.random.default_rng(4).standard_normal((FEATURES, CLASSES)).astype(np.float32)
    model = linear(weights)
    sample = {"x": np.ones((1, FEATURES), np.float32)}
    (plain,) = measure(model, [partial(linear, weights * 2)], [sample])
    assert plain.top1 is None and plain.drop is None and plain.agreement == 1
    assert plain.noise == pytest.approx(1)


def test_an_output_as_large_as_the_input_has_no_classes() -> None:
    weights = np.random.default_rng(4).standard_normal((FEATURES, FEATURES)).astype(np.float32)
    (found,) = measure(linear(weights), [partial(linear, weights * 1.1)], [{"x": np.ones((1, FEATURES), np.float32)}])
    assert found.agreement is None and found.expected_drop is None
    assert found.loss == found.noise == pytest.approx(0.01, rel=1e-4)


def test_probabilities_of_logits_and_of_probabilities() -> None:
    logits = np.array([[1000.0, 999.0, -1000.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits), [0.73105858, 0.26894142, 0], atol=1e-7)
    given = np.array([[0.25, 0.75]], np.float32)
    np.testing.assert_array_equal(probabilities(given), [0.25, 0.75])


def test_labels(tmp_path: Path) -> None:
    classes = np.arange(6) % 3
    np.savez(tmp_path / "data.npz", x=np.zeros((6, 2)), labels=classes)
    np.testing.assert_array_equal(labels_beside(tmp_path / "data.npz", ["x"], 4), classes[:4])
    np.testing.assert_array_equal(labels_beside({"x": np.zeros((6, 2)), "label": classes}, ["x"], 6), classes)
    assert labels_beside({"labels": classes}, ["labels"], 6) is None  # an input of the model
    assert labels_beside({"labels": classes}, ["x"], 7) is None
    assert labels_beside({"labels": classes / 2}, ["x"], 6) is None
    np.save(tmp_path / "classes.npy", classes)
    (tmp_path / "classes.txt").write_text("".join(f"{each}\n" for each in classes))
    for name in ("classes.npy", "classes.txt"):
        np.testing.assert_array_equal(read_labels(tmp_path / name, 6), classes)
        with pytest.raises(QCompilerError, match="one integer for each of 5 samples"):
            read_labels(tmp_path / name, 5)
    (tmp_path / "words.txt").write_text("cat\n")
    with pytest.raises(QCompilerError, match="one class per line"):
        read_labels(tmp_path / "words.txt", 1)
    with pytest.raises(QCompilerError, match="does not exist"):
        read_labels(tmp_path / "none.npy", 1)
