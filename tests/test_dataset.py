"""Calibration data from every source, and everything lint must notice."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qcompiler.dataset import (
    Dataset,
    ImageOptions,
    InputSpec,
    input_specs,
    lint,
    load_dataset,
    parse_size,
    synthetic,
)
from qcompiler.errors import QCompilerError
from qcompiler.importer import import_onnx

rng = np.random.default_rng(5)
X = InputSpec("x", (1, 3, 4, 5), np.dtype(np.float32))
IDS = InputSpec("ids", (1, 6), np.dtype(np.int64))


def batch(count: int, spec: InputSpec = X) -> np.ndarray:
    return rng.normal(size=(count, *spec.shape[1:])).astype(np.float32)


def messages(dataset: Dataset) -> list[str]:
    return [str(warning) for warning in lint(dataset)]


# --- sources -----------------------------------------------------------------------------------------------


def assert_yields(dataset: Dataset, expected: np.ndarray) -> None:
    assert len(dataset) == len(expected)
    for _ in range(2):  # it can be iterated again
        got = [sample["x"] for sample in dataset]
        assert all(array.shape == X.shape and array.dtype == X.dtype for array in got)
        np.testing.assert_array_equal(np.concatenate(got), expected)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("key", ["x", "images"])
def test_npz(compressed: bool, key: str, tmp_path: Path) -> None:
    data = batch(7)
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    save(tmp_path / "d.npz", **{key: data})
    assert_yields(load_dataset(tmp_path / "d.npz", [X]), data)
    assert_yields(load_dataset(tmp_path / "d.npz", [X], limit=3), data[:3])


def test_npz_in_fortran_order(tmp_path: Path) -> None:
    data = np.asfortranarray(batch(4))
    np.savez(tmp_path / "d.npz", x=data)
    assert_yields(load_dataset(tmp_path / "d.npz", [X]), data)


def test_npz_with_further_arrays_and_several_inputs(tmp_path: Path) -> None:
    data, ids = batch(3), rng.integers(0, 9, (3, 6))
    np.savez(tmp_path / "d.npz", labels=np.arange(3), ids=ids, x=data)
    dataset = load_dataset(tmp_path / "d.npz", [X, IDS])
    np.testing.assert_array_equal(np.concatenate([sample["ids"] for sample in dataset]), ids)
    np.testing.assert_array_equal(np.concatenate([sample["x"] for sample in dataset]), data)


def test_npz_is_read_a_sample_at_a_time(tmp_path: Path) -> None:
    spec = InputSpec("x", (1, 250_000), np.dtype(np.float32))
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros((40, 250_000), np.float32))
    dataset = load_dataset(tmp_path / "d.npz", [spec])
    tracemalloc.start()
    assert sum(float(sample["x"].sum()) for sample in dataset) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * spec.dtype.itemsize * 250_000


def test_npy_and_memory() -> None:
    data = batch(4)
    assert_yields(load_dataset(data, [X]), data)
    assert_yields(load_dataset({"x": data}, [X]), data)
    assert_yields(load_dataset({"x": data[:, np.newaxis]}, [X]), data)  # the batch axis spelt out


def test_a_folder_of_samples_and_batches_in_order_of_name(tmp_path: Path) -> None:
    data = batch(6)
    np.save(tmp_path / "b.npy", data[1:4])
    np.save(tmp_path / "a.npy", data[0])
    np.savez(tmp_path / "c.npz", x=data[4:5])
    np.savez(tmp_path / "d.npz", x=data[5:])
    dataset = load_dataset(tmp_path, [X])
    assert_yields(dataset, data)
    assert [label for label, _ in dataset.labelled()][:3] == ["a.npy", "b.npy#0", "b.npy#1"]


def test_images(tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    for name, image in zip(("one.png", "two.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    options = ImageOptions(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 255, color="bgr")
    bgr = pixels[..., ::-1].astype(np.float32)
    expected = (bgr * np.float32(1 / 255) - np.array([0.1, 0.2, 0.3], np.float32)) / np.array(
        [0.5, 0.6, 0.7], np.float32
    )
    assert_yields(load_dataset(tmp_path, [X], options), expected.transpose(0, 3, 1, 2))
    nhwc = InputSpec("x", (1, 4, 5, 3), np.dtype(np.uint8))
    (first, _) = load_dataset(tmp_path, [nhwc], ImageOptions(layout="NHWC"))
    np.testing.assert_array_equal(first["x"][0], pixels[0])


def test_images_are_resized_and_made_gray(tmp_path: Path) -> None:
    Image.fromarray(rng.integers(0, 256, (20, 10, 3)).astype(np.uint8)).save(tmp_path / "a.jpg")
    gray = InputSpec("x", (1, 1, 6, 8), np.dtype(np.float32))
    (sample,) = load_dataset(tmp_path, [gray], ImageOptions(resize=(6, 8), color="gray"))
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("L").resize((8, 6), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(sample["x"][0, 0], expected)


def test_synthetic_data_is_reproducible_and_flagged() -> None:
    specs = (X, IDS, InputSpec("q", (1, 64), np.dtype(np.uint8)))
    first, again, other = (list(synthetic(specs, 3, seed)) for seed in (1, 1, 2))
    assert synthetic(specs, 3).synthetic and not load_dataset(batch(1), [X]).synthetic
    for a, b, c in zip(first, again, other, strict=True):
        for spec in specs:
            assert a[spec.name].shape == spec.shape and a[spec.name].dtype == spec.dtype
            np.testing.assert_array_equal(a[spec.name], b[spec.name])
            assert not np.array_equal(a["x"], c["x"])
    assert first[0]["q"].max() > 128
    assert set(np.unique([sample["ids"] for sample in first])) == {0, 1}
    assert lint(synthetic(specs, 3)) == ()


def test_input_specs(zoo: Path) -> None:
    model = import_onnx(zoo / "models" / "resnet8_tflite_int8_qdq.onnx")
    assert input_specs(model) == (InputSpec("input_1_int8", (1, 32, 32, 3), np.dtype(np.int8)),)


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("240x320", (240, 320))])
def test_parse_size(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1x2x3", "-4", "big"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(QCompilerError, match="not an image size"):
        parse_size(text)


# --- what is refused on opening ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 5, 4), np.float32), r"shape \[4, 3, 5, 4\]; the model needs \[samples, 3, 4, 5\]"),
        (np.zeros((3, 4, 5), np.float32), r"shape \[3, 4, 5\]"),
        (np.zeros((0, 3, 4, 5), np.float32), "holds no samples"),
        (np.zeros((2, 3, 4, 5), "U3"), "is <U3, the model needs float32; only numbers"),
        (np.zeros((2, 3, 4, 5), np.complex64), "complex64"),
        (np.zeros((2, 3, 4, 5), np.int64), "is int64, the model needs float32"),
        (np.zeros((2, 3, 4, 5), object), "object"),
    ],
)
def test_wrong_arrays(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array)
    for source in ({"x": array}, tmp_path / "d.npz"):
        with pytest.raises(QCompilerError, match=message):
            load_dataset(source, [X])


def test_floats_for_an_integer_input() -> None:
    with pytest.raises(QCompilerError, match="is float32, the model needs int64; quantize or cast"):
        load_dataset({"ids": np.zeros((2, 6), np.float32)}, [IDS])


def test_integers_that_do_not_fit() -> None:
    spec = InputSpec("q", (1, 4), np.dtype(np.int8))
    dataset = load_dataset({"q": np.array([[1, 2, 3, 4], [1, 200, 3, 4]], np.int16)}, [spec])
    with pytest.raises(QCompilerError, match=r"sample 1 of the input 'q' has values 1\.\.200"):
        lint(dataset)


def test_a_wrong_name_suggests_the_nearest() -> None:
    with pytest.raises(QCompilerError, match=r"no array for the input 'ids'; it holds 'x', 'idss'.*rename 'idss'"):
        load_dataset({"x": batch(2), "idss": np.zeros((2, 6), np.int64)}, [X, IDS])


def test_different_numbers_of_samples() -> None:
    with pytest.raises(QCompilerError, match="x: 2, ids: 3"):
        load_dataset({"x": batch(2), "ids": np.zeros((3, 6), np.int64)}, [X, IDS])


def test_files_that_are_missing_or_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="does not exist"):
        load_dataset(tmp_path / "none.npz", [X])
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(QCompilerError, match="not a readable"):
        load_dataset(tmp_path / "text.npz", [X])
    (tmp_path / "empty").mkdir()
    with pytest.raises(QCompilerError, match=r"holds no \.npy, \.npz or image files"):
        load_dataset(tmp_path / "empty", [X])


def test_a_truncated_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=batch(50))
    data = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(QCompilerError, match="not a readable"):
        load_dataset(tmp_path / "d.npz", [X])


def test_a_damaged_npz_names_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=batch(50))
    data = bytearray((tmp_path / "d.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(QCompilerError, match=r"d\.npz is damaged"):
        lint(load_dataset(tmp_path / "d.npz", [X]))


def test_images_that_do_not_fit_or_open(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(QCompilerError, match="say how they become model input"):
        load_dataset(tmp_path, [X])
    with pytest.raises(QCompilerError, match=r"a\.png becomes \[3, 9, 9\] \(NCHW\).*set resize"):
        lint(load_dataset(tmp_path, [X], ImageOptions()))
    with pytest.raises(QCompilerError, match="one input of shape"):
        load_dataset(tmp_path, [IDS], ImageOptions())
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(QCompilerError, match=r"a\.png cannot be read as an image"):
        lint(load_dataset(tmp_path, [X], ImageOptions()))


@pytest.mark.parametrize(
    "wrong", [{"mean": (1.0, 2.0)}, {"std": (0.0,)}, {"resize": (0, 3)}, {"color": "gray", "mean": (1.0, 2.0, 3.0)}]
)
def test_wrong_image_options(wrong: dict[str, object]) -> None:
    with pytest.raises(QCompilerError):
        ImageOptions(**wrong)  # type: ignore[arg-type]


def test_a_limit_of_nothing() -> None:
    with pytest.raises(QCompilerError, match="limit of 0"):
        load_dataset(batch(2), [X], limit=0)


# --- lint --------------------------------------------------------------------------------------------------


def test_good_data_gives_no_warning() -> None:
    assert lint(load_dataset(batch(20), [X])) == ()


@pytest.mark.parametrize(("value", "word"), [(np.nan, "1 NaN"), (np.inf, "1 infinite"), (-np.inf, "1 infinite")])
def test_values_that_are_not_finite(value: float, word: str, tmp_path: Path) -> None:
    data = batch(5)
    data[3, 1, 2, 2] = value
    with pytest.raises(QCompilerError, match=f"sample 3 of the input 'x' holds {word}"):
        lint(load_dataset(data, [X]))
    np.save(tmp_path / "bad.npy", data[3])
    with pytest.raises(QCompilerError, match=rf"sample bad\.npy of the input 'x' holds {word}"):
        lint(load_dataset(tmp_path, [X]))


def test_float64_values_beyond_float32_are_infinite() -> None:
    data = batch(2).astype(np.float64)
    data[1, 0, 0, 0] = 1e300
    with pytest.raises(QCompilerError, match=r"sample 1 .* infinite"):
        lint(load_dataset(data, [X]))


def test_a_constant_sample_is_named() -> None:
    data = batch(5)
    data[2] = 0.5
    assert messages(load_dataset(data, [X])) == ["input 'x', sample 2: every value is 0.5"]


def test_many_constant_samples_are_counted() -> None:
    data = batch(20)
    data[4:16] = np.arange(12, dtype=np.float32).reshape(-1, 1, 1, 1) / 12
    found = messages(load_dataset(data, [X]))
    assert len(found) == 6
    assert "7 more samples likewise" in found[-1]


def test_identical_samples() -> None:
    data = np.repeat(batch(1), 4, axis=0)
    assert messages(load_dataset(data, [X])) == ["input 'x': all 4 samples are identical; give samples that differ"]


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_sample_255_times_the_others_is_named(count: int) -> None:
    data = batch(count)
    data[1] *= 255
    (found,) = messages(load_dataset(data, [X]))
    assert found.startswith("input 'x', sample 1: values are ") and found.endswith("times the others'")


def test_a_sample_ten_times_the_others_is_fine() -> None:
    data = batch(10)
    data[1] *= 10
    assert lint(load_dataset(data, [X])) == ()


def test_pixels_among_unit_values() -> None:
    data = rng.uniform(0, 1, (6, 3, 4, 5)).astype(np.float32)
    data[4] = rng.integers(0, 256, (3, 4, 5))
    (found,) = messages(load_dataset(data, [X]))
    assert found == "input 'x', sample 4: looks like 0..255 while the others are 0..1"


def test_unit_values_among_pixels() -> None:
    data = rng.integers(0, 256, (6, 3, 4, 5)).astype(np.float32)
    data[2] /= 255
    (found,) = messages(load_dataset(data, [X]))
    assert found == "input 'x', sample 2: looks like 0..1 while the others are 0..255"


def test_integers_used_as_floats_are_noted() -> None:
    data = rng.integers(0, 256, (6, 3, 4, 5)).astype(np.uint8)
    dataset = load_dataset(data, [X])
    (found,) = messages(dataset)
    assert "input 'x': stored as uint8 and used as float32" in found
    np.testing.assert_array_equal(next(iter(dataset))["x"][0], data[0].astype(np.float32))


def test_masks_may_be_constant() -> None:
    mask = InputSpec("mask", (1, 6), np.dtype(np.int64))
    dataset = load_dataset({"mask": np.ones((3, 6), np.int64), "ids": rng.integers(0, 30000, (3, 6))}, [IDS, mask])
    assert lint(dataset) == ()
