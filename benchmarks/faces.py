"""More images for a face detector whose metric is agreement with its own float model, and so needs no labels.

The zoo's face images are few, and one face more or less is several points. Its other images test as well: they are
resized to the model's input, the float model's faces in them are found, and both are appended to the entry's data.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from accuracy import Arrays, Model

SOURCES = ("coco_val_352.npz", "imagenet224.npz")
_SCORE, _OVERLAP = 0.7, 0.3
"""As in the zoo's `evaluate`: the least score of a face, and the overlap above which one of two goes."""
_SAME = 0.9
"""Correlation of thumbnails above which two images show the same: the collections overlap."""


def with_more_faces(
    model: "Model",
    run: "Callable[[Arrays], list[np.ndarray]]",
    evaluation: ModuleType,
    folder: Path,
) -> "Model":
    """A face detector with the images of `SOURCES` that its data lacks, written to `folder`; others as they are.

    The appended images are to be evaluated on, never calibrated on.
    """
    if model.task != "face":
        return model
    entry, zoo = dict(model.entry), model.path.parents[1]
    with np.load(zoo / str(entry["data"])) as stored:
        arrays = {name: stored[name] for name in stored.files}
    images, boxes, offsets = arrays["images"], [arrays["ref_boxes"]], list(arrays["ref_offsets"])
    known, more = _thumbnails(images), list[np.ndarray]()
    for name in SOURCES:
        with np.load(zoo / "data" / name) as stored:
            others = stored["images"]
        fresh = (_thumbnails(others) @ known.T).max(axis=1) < _SAME
        size = (images.shape[2], images.shape[1])
        more += [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BILINEAR)) for each in others[fresh]]
    fed = entry["input"]
    assert isinstance(fed, dict)
    for image in more:
        found = faces_found(run({fed["name"]: evaluation.prep(image, entry.get("pre", {}))}), evaluation)
        boxes.append(found)
        offsets.append(offsets[-1] + len(found))
    arrays |= {
        "images": np.concatenate([images, np.stack(more)]),
        "ref_boxes": np.concatenate(boxes),
        "ref_offsets": np.array(offsets),
    }
    path = folder / "more_faces.npz"
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return replace(model, entry=entry | {"data": str(path)}, learnable=len(images))


def faces_found(outputs: Sequence[np.ndarray], evaluation: ModuleType) -> np.ndarray:
    """Boxes [n, 4] that a detector gave out for one image."""
    scores, boxes = outputs[0][0, :, 1], outputs[1][0]
    likely = scores > _SCORE
    return boxes[likely][evaluation.nms(boxes[likely], scores[likely], _OVERLAP)]


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Unit vectors [images, pixels] whose products are correlations."""
    small = [Image.fromarray(each).convert("L").resize((16, 12), Image.Resampling.BILINEAR) for each in images]
    flat = np.stack([np.asarray(each, np.float64).reshape(-1) for each in small])
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
