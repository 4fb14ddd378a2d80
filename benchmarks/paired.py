"""What each sample contributes to a metric, and how far the choice of samples moves the difference of two models.

The metrics are those of the zoo's `evaluate`, taken apart by sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from faces import faces_found

REPETITIONS = 400
_HIT = 0.5
"""As in `evaluate`: the overlap above which something is found."""

Detections = tuple[np.ndarray, ...]
"""Boxes [n, 4], scores [n] (not of what is to be found) and classes [n]."""


@dataclass(frozen=True)
class Ranking:
    """What a detector found of one class in all images, the likeliest first."""

    images: np.ndarray
    """[found] of which image each is."""
    hits: np.ndarray
    """bool [found]"""
    wanted: np.ndarray
    """[images] how many there are to find."""

    def precision(self, counts: np.ndarray) -> float:
        """Mean precision at 101 recalls if each image occurred so many times; as in `evaluate`."""
        weights = counts[self.images]
        found, right = np.cumsum(weights), np.cumsum(weights * self.hits)
        if not right.size or right[-1] == 0:
            return 0.0
        best = np.maximum.accumulate((right / np.maximum(found, 1))[::-1])[::-1]
        recall, wanted = right / (counts @ self.wanted), np.linspace(0, 1, 101)
        reached = wanted[wanted <= recall[-1]]
        return float(best[np.searchsorted(recall, reached)].sum() / wanted.size)


@dataclass(frozen=True)
class Contributions:
    """Of each sample, in order."""

    terms: np.ndarray
    """[samples, 2], of whose sums the metric is the ratio: whether the class is right, or the squared error, and 1;
    hits, and half of found and wanted faces."""
    rankings: tuple[Ranking, ...] = ()
    """Of detectors of many classes, by class: the mean of their precisions is no ratio of sums."""

    def metric(self, counts: np.ndarray) -> float:
        """The metric if each sample occurred so many times, [samples]."""
        if self.rankings:
            present = [each for each in self.rankings if counts @ each.wanted > 0]
            return float(np.mean([each.precision(counts) for each in present])) if present else 0.0
        totals = counts @ self.terms
        return float(totals[0] / max(totals[1], 1e-30))


def contributions(
    entry: Mapping[str, object], outputs: Sequence[Sequence[np.ndarray]], evaluation: ModuleType
) -> Contributions:
    """From what a model gave out for each sample of an entry's data."""
    task = str(entry["task"])
    with np.load(str(entry["data"])) as stored:
        data = {name: stored[name] for name in stored.files}
    match task:
        case "cls":
            offset = int(str(entry.get("label_offset", 0)))
            classes = [int(each[0].reshape(-1)[offset:].argmax()) for each in outputs]
            right = (np.array(classes) == data["labels"][: len(classes)]).astype(float)
            return Contributions(np.stack([right, np.ones(len(right))], axis=1))
        case "recon":
            off = [np.square(each[0] - x[None]).mean() for each, x in zip(outputs, data["frames"], strict=True)]
            return Contributions(np.stack([np.array(off, float), np.ones(len(off))], axis=1))
        case "face":
            bounds = zip(data["ref_offsets"], data["ref_offsets"][1:], strict=False)
            wanted = [data["ref_boxes"][start:end] for start, end in bounds]
            terms = [_faces(each, boxes, evaluation) for each, boxes in zip(outputs, wanted, strict=True)]
            return Contributions(np.array(terms, float))
        case _:
            found = [_found(entry, each, evaluation) for each in outputs]
            bounds = zip(data["box_offsets"], data["box_offsets"][1:], strict=False)
            wanted = [_wanted(data["boxes"][start:end]) for start, end in bounds]
            classes = sorted({int(each) for _, present in wanted for each in present})
            rankings = tuple(_ranking(each, found, wanted, evaluation) for each in classes)
            return Contributions(np.zeros((len(found), 2)), rankings)


def _ranking(chosen: int, found: Sequence[Detections], wanted: Sequence[Detections], evaluation: ModuleType) -> Ranking:
    """Of one class: in each image, the likeliest box takes the object that it overlaps most and nobody took."""
    rows: list[tuple[float, int, bool]] = []
    for image, ((all_boxes, all_scores, classes), (all_objects, kinds)) in enumerate(zip(found, wanted, strict=True)):
        boxes, scores = all_boxes[classes == chosen], all_scores[classes == chosen]
        objects = all_objects[kinds == chosen]
        overlaps = evaluation.iou(boxes, objects) if len(boxes) and len(objects) else np.zeros((len(boxes), 0))
        for box in scores.argsort()[::-1]:
            best = int(overlaps[box].argmax()) if overlaps.shape[1] else -1
            hit = best >= 0 and bool(overlaps[box, best] >= _HIT)
            rows.append((float(scores[box]), image, hit))
            if hit:
                overlaps[:, best] = -1
    rows.sort(key=lambda row: -row[0])
    images = np.array([image for _, image, _ in rows], int)
    hits = np.array([hit for _, _, hit in rows], bool)
    return Ranking(images, hits, np.array([int((kinds == chosen).sum()) for _, kinds in wanted]))


def _faces(outputs: Sequence[np.ndarray], wanted: np.ndarray, evaluation: ModuleType) -> tuple[float, float]:
    """Hits, and half of the faces found and wanted: F1 is the ratio of their sums."""
    found = faces_found(outputs, evaluation)
    hits = int((evaluation.iou(wanted, found).max(1) > _HIT).sum()) if len(found) and len(wanted) else 0
    return hits, (len(found) + len(wanted)) / 2


def _found(entry: Mapping[str, object], outputs: Sequence[np.ndarray], evaluation: ModuleType) -> Detections:
    boxes, scores = getattr(evaluation, f"dec_{entry['decoder']}")(outputs)
    classes, best = scores.argmax(1), scores.max(1)
    likely = best > 0.01
    boxes, classes, best = boxes[likely], classes[likely], best[likely]
    # Boxes of different classes are moved apart, so that they do not suppress each other.
    kept = evaluation.nms(boxes + classes[:, None] * 4.0, best, 0.45)[:100]
    return boxes[kept], best[kept], classes[kept]


def _wanted(rows: np.ndarray) -> Detections:
    """Rows of class, center and size."""
    center, size = rows[:, 1:3], rows[:, 3:5]
    return np.concatenate([center - size / 2, center + size / 2], axis=1), rows[:, 0].astype(int)


def standard_error(
    ours: Sequence[Contributions],
    theirs: Sequence[Contributions],
    places: Sequence[np.ndarray],
    samples: int,
) -> float:
    """Of the difference of two models' metrics, the mean over draws, by the choice of samples.

    A bootstrap: as many samples as there are, drawn with replacement, each with all it contributes to any draw.

    Args:
        ours: of each draw.
        theirs: of the same draws.
        places: which of all samples each draw was evaluated on.
        samples: how many there are.
    """
    chance, differences = np.random.default_rng(0), list[float]()
    for _ in range(REPETITIONS):
        counts = chance.multinomial(samples, np.full(samples, 1 / samples))
        drawn = [
            mine.metric(counts[place]) - other.metric(counts[place])
            for mine, other, place in zip(ours, theirs, places, strict=True)
            if counts[place].any()
        ]
        differences.append(float(np.mean(drawn)))
    return float(np.std(differences, ddof=1))
