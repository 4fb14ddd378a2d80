import numpy as np
import pytest

from qcompiler.quant.variants import Variants, _stretched, image_axes


@pytest.fixture
def images(parse, samples):
    model = parse("g (float[1,3,12,17] x) => (float[1,4,10,15] y) { y = Conv(x, w) }", {"w": (4, 3, 3, 3)})
    return model, list(samples(model, 5))


def test_the_samples_come_first_and_then_their_variants(images):
    model, given = images
    found = list(Variants(given, model, 2))
    assert len(found) == len(Variants(given, model, 2)) == 15
    for index, sample in enumerate(found):
        np.testing.assert_equal(sample["x"].shape, (1, 3, 12, 17))
        assert sample["x"].dtype == np.float32 and sample["x"].flags.c_contiguous
        assert (sample is given[index % 5]) == (index < 5)


def test_variants_are_the_same_every_time_and_differ_from_each_other(images):
    model, given = images
    variants = Variants(given, model, 3)
    again = Variants(given, model, 3)
    for index in range(len(variants)):
        np.testing.assert_array_equal(variants[index]["x"], again[index]["x"])
    assert len({variants[index]["x"].tobytes() for index in range(20)}) == 20
    with pytest.raises(IndexError):
        variants[20]


def test_a_variant_is_a_part_of_its_image_some_mirrored(images):
    """Of a picture whose values say where they are."""
    model, _ = images
    rows, columns = np.meshgrid(np.arange(12.0), np.arange(17.0), indexing="ij")
    place = np.stack([rows, columns, np.ones_like(rows)])[None].astype(np.float32)
    mirrored = 0
    assert (Variants([{"x": place}], model, 1)[1]["x"] == place[..., ::-1]).all()
    for sample in list(Variants([{"x": place}], model, 60))[2:]:
        (found,) = sample["x"]
        heights, widths = np.diff(found[0], axis=0)[1:-1], np.diff(found[1], axis=1)[:, 1:-1]
        height, width = heights.max(), np.abs(widths).max()
        assert 0.45 < height * width <= 1.0 + 1e-5 and 1 / 1.55 < height / width < 1.55
        assert found[:2].min() > -1e-5 and found[0].max() < 11 + 1e-5 and found[1].max() < 16 + 1e-5
        np.testing.assert_allclose(found[2], 1)
        mirrored += widths.sum() < 0
    assert 15 < mirrored < 45


def test_integers_stay_integers():
    image = np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4)
    found = _stretched(image, 2, 0.7, 0.3)
    assert found.dtype == np.uint8 and found.shape == image.shape and found.max() <= 47
    np.testing.assert_array_equal(_stretched(image, 3, 1.0, 0.5), image)


def test_other_tensors_than_images_have_none(parse, samples):
    rows = parse("g (float[1,8] x) => (float[1,4] y) { y = Gemm(x, w, b) }", {"w": (8, 4), "b": (4,)})
    given = list(samples(rows, 3))
    assert list(Variants(given, rows, 3)) == given
    two = parse("g (float[1,3,9,9] x, float[1,3,9,9] z) => (float[1,3,9,9] y) { y = Add(x, z) }", {})
    assert len(Variants(given, two, 3)) == 3


def test_three_channels_make_an_image():
    assert image_axes((1, 3, 20, 24)) == (2, 3)
    assert image_axes((1, 20, 24, 3)) == (1, 2)
    assert image_axes((1, 1, 28, 28)) is None
    assert image_axes((1, 3, 20, 2)) is None
    assert image_axes((1, 640)) is None
