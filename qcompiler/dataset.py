"""Calibration and evaluation data: read one sample at a time, in the exact shape and dtype of the model's inputs."""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.images import IMAGE_SUFFIXES, ImageOptions, parse_size, read_image
from qcompiler.stored_arrays import MemoryRows, StoredArray, read_headers

__all__ = [
    "Dataset",
    "ImageOptions",
    "InputSpec",
    "LintWarning",
    "input_specs",
    "lint",
    "load_dataset",
    "parse_size",
    "synthetic",
]


@dataclass(frozen=True)
class InputSpec:
    """One input of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    return tuple(InputSpec(g.value_name(value), g.shape_of(value), g.dtype_of(value)) for value in model.graph.inputs)


@dataclass(frozen=True)
class LintWarning:
    """Something odd about the data. sample: its index or file, None where it concerns all."""

    input: str
    sample: str | None
    message: str

    def __str__(self) -> str:
        where = f"input {self.input!r}" + (f", sample {self.sample}" if self.sample else "")
        return f"{where}: {self.message}"


@dataclass(frozen=True)
class Sample:
    """One sample as stored. label: its index or file."""

    label: str
    arrays: Mapping[str, np.ndarray]


class Source(Protocol):
    """Where samples come from."""

    def __len__(self) -> int: ...

    def samples(self) -> Iterator[Sample]:
        """All samples in order, read one by one, keyed by the model's input names."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Samples for a model. Iterating yields ``{input name: array}`` in the input's exact shape and dtype.

    Nothing is kept between samples, and it can be iterated any number of times.
    """

    inputs: tuple[InputSpec, ...]
    source: Source
    synthetic: bool = False
    """True if the samples are random because no data was given."""
    limit: int | None = None
    notes: tuple[LintWarning, ...] = ()
    """What was noticed while opening it; part of what `lint` returns."""

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (arrays for _, arrays in self.labelled())

    def labelled(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Pairs of a sample's label (index or file) and its arrays."""
        for sample in islice(self.source.samples(), self.limit):
            yield sample.label, {spec.name: _convert(sample, spec) for spec in self.inputs}


def load_dataset(
    source: Path | Mapping[str, np.ndarray] | np.ndarray,
    inputs: Sequence[InputSpec],
    images: ImageOptions | None = None,
    limit: int | None = None,
) -> Dataset:
    """Open data without reading it.

    Args:
        source: an .npz (one array per input, the first axis counts samples; further arrays are ignored, and a single
            array serves a single input whatever its name), an .npy for a single input, a folder of .npy and .npz files
            (in order of name, each one sample or a batch), a folder of images, or arrays in memory.
        inputs: what the model wants, see `input_specs`.
        images: preprocessing, for a folder of images.
        limit: use the first so many samples.

    Raises:
        QCompilerError: nothing there, or names, shapes or dtypes that do not fit the model.
    """
    if limit is not None and limit < 1:
        raise QCompilerError(f"a limit of {limit} samples leaves no data; give at least 1")
    specs = tuple(inputs)
    if isinstance(source, np.ndarray):
        opened = _open_arrays(
            "the array given", {"": StoredArray(source.shape, source.dtype, MemoryRows(source))}, specs
        )
    elif isinstance(source, Mapping):
        arrays = {name: np.asarray(array) for name, array in source.items()}
        stored = {name: StoredArray(array.shape, array.dtype, MemoryRows(array)) for name, array in arrays.items()}
        opened = _open_arrays("the data given", stored, specs)
    elif source.is_dir():
        opened = _open_folder(source, specs, images)
    else:
        opened = _open_arrays(str(source), read_headers(source), specs)
    if len(opened.source) == 0:
        raise QCompilerError(f"{source if isinstance(source, Path) else 'the data given'} holds no samples")
    return Dataset(specs, opened.source, limit=limit, notes=opened.notes)


@dataclass(frozen=True)
class _Random:
    inputs: tuple[InputSpec, ...]
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def samples(self) -> Iterator[Sample]:
        for index in range(self.count):
            rng = np.random.default_rng([self.seed, index])
            yield Sample(str(index), {spec.name: _random(rng, spec) for spec in self.inputs})


def _random(rng: np.random.Generator, spec: InputSpec) -> np.ndarray:
    if spec.dtype.kind == "f":
        return rng.standard_normal(spec.shape).astype(spec.dtype)
    if spec.dtype.kind in "iu" and spec.dtype.itemsize == 1:
        info = np.iinfo(spec.dtype)
        return rng.integers(info.min, info.max, spec.shape, endpoint=True, dtype=spec.dtype)
    # Wider integers are indices or masks; 0 and 1 are valid for any of them.
    return rng.integers(0, 2, spec.shape).astype(spec.dtype)


def synthetic(inputs: Sequence[InputSpec], count: int, seed: int = 0) -> Dataset:
    """Random samples: standard normal floats, 8-bit integers over their whole range, 0 and 1 for wider integers."""
    specs = tuple(inputs)
    return Dataset(specs, _Random(specs, count, seed), synthetic=True)


# --- arrays ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    source: Source
    notes: tuple[LintWarning, ...] = ()


@dataclass(frozen=True)
class _ArraySource:
    """Arrays by input name. count is None where they are one sample without an axis for samples."""

    label: str
    arrays: Mapping[str, StoredArray]
    count: int | None

    def __len__(self) -> int:
        return 1 if self.count is None else self.count

    def samples(self) -> Iterator[Sample]:
        if self.count is None:
            yield Sample(self.label, {name: stored.data.whole() for name, stored in self.arrays.items()})
            return
        prefix = f"{self.label}#" if self.label else ""
        rows = zip(*(stored.data.rows() for stored in self.arrays.values()), strict=True)
        for index, row in enumerate(rows):
            yield Sample(f"{prefix}{index}", dict(zip(self.arrays, row, strict=True)))


def _open_arrays(
    origin: str, stored: Mapping[str, StoredArray], specs: tuple[InputSpec, ...], *, file: str = ""
) -> _Opened:
    """Match stored arrays with inputs. file: label of a file in a folder, which may hold a single sample."""
    arrays = _match_names(origin, stored, specs)
    counts: dict[str, int | None] = {}
    notes: list[LintWarning] = []
    for spec in specs:
        array = arrays[spec.name]
        counts[spec.name] = _sample_count(origin, spec, array, single=bool(file))
        notes += _check_dtype(origin, spec, array.dtype)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise QCompilerError(f"{origin} has different numbers of samples for the inputs ({listed})")
    count = next(iter(counts.values()))
    return _Opened(_ArraySource(file, arrays, count), tuple(notes))


def _match_names(
    origin: str, stored: Mapping[str, StoredArray], specs: tuple[InputSpec, ...]
) -> dict[str, StoredArray]:
    if len(stored) == 1 and len(specs) == 1:
        return {specs[0].name: next(iter(stored.values()))}
    arrays: dict[str, StoredArray] = {}
    for spec in specs:
        if spec.name not in stored:
            found = ", ".join(repr(name) for name in stored) or "nothing"
            close = difflib.get_close_matches(spec.name, stored, 1)
            hint = f"rename {close[0]!r}" if close else "name the arrays after the model's inputs"
            raise QCompilerError(f"{origin} has no array for the input {spec.name!r}; it holds {found}. Please {hint}")
        arrays[spec.name] = stored[spec.name]
    return arrays


def _fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    """Is this the shape of one sample, with or without the batch axis of size 1?"""
    return shape == spec.shape or (spec.shape[:1] == (1,) and shape == spec.shape[1:])


def _sample_count(origin: str, spec: InputSpec, array: StoredArray, *, single: bool) -> int | None:
    """How many samples an array holds; None if it is one sample (allowed where `single`)."""
    if single and _fits(array.shape, spec):
        return None
    if array.shape and _fits(array.shape[1:], spec):
        return array.shape[0]
    wanted = spec.shape[1:] if spec.shape[:1] == (1,) else spec.shape
    shown = ", ".join(map(str, ("samples", *wanted)))
    raise QCompilerError(
        f"{origin}: the array for the input {spec.name!r} has shape {list(array.shape)}; the model needs [{shown}]"
    )


def _check_dtype(origin: str, spec: InputSpec, dtype: np.dtype) -> tuple[LintWarning, ...]:
    """Raise if the stored dtype cannot serve the input; warn where integers become floats."""
    problem = f"{origin}: the array for the input {spec.name!r} is {dtype}, the model needs {spec.dtype}"
    kind, wanted = dtype.kind, spec.dtype.kind
    if kind not in "biuf":
        raise QCompilerError(f"{problem}; only numbers can be used")
    if wanted == "f" and kind in "biu":
        if not np.can_cast(dtype, spec.dtype, "safe"):
            raise QCompilerError(f"{problem}; if these are the values the model expects, store them as {spec.dtype}")
        message = (
            f"stored as {dtype} and used as {spec.dtype} as they are; "
            "if the model expects normalized values, normalize them first"
        )
        return (LintWarning(spec.name, None, message),)
    if wanted in "iu" and kind not in "iu":
        raise QCompilerError(f"{problem}; quantize or cast it first, since rounding it here would hide a mistake")
    if wanted == "b" and kind != "b":
        raise QCompilerError(f"{problem}; store it as bool")
    return ()


def _convert(sample: Sample, spec: InputSpec) -> np.ndarray:
    """A stored sample in the exact shape and dtype of the input."""
    array = sample.arrays[spec.name]
    if spec.dtype.kind in "iu" and array.dtype != spec.dtype:
        info = np.iinfo(spec.dtype)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise QCompilerError(
                f"sample {sample.label} of the input {spec.name!r} has values {low}..{high}, "
                f"which do not fit the model's {spec.dtype}"
            )
    with np.errstate(over="ignore"):  # a float64 too large becomes infinite, which lint reports
        return np.ascontiguousarray(array, spec.dtype).reshape(spec.shape)


# --- folders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The samples of several files, one after the other."""

    parts: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def samples(self) -> Iterator[Sample]:
        for part in self.parts:
            yield from part.samples()


def _open_folder(folder: Path, specs: tuple[InputSpec, ...], options: ImageOptions | None) -> _Opened:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    arrays = [path for path in files if path.suffix.lower() in (".npy", ".npz")]
    pictures = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if arrays and pictures:
        raise QCompilerError(f"{folder} holds both arrays and images; keep one kind in it")
    if pictures:
        if options is None:
            raise QCompilerError(
                f"{folder} holds images; say how they become model input (resize, mean, std, layout, color)"
            )
        return _Opened(_ImageSource(folder, tuple(pictures), _image_spec(folder, specs), options))
    if not arrays:
        raise QCompilerError(f"{folder} holds no .npy, .npz or image files")
    if len(specs) > 1 and any(path.suffix == ".npy" for path in arrays):
        raise QCompilerError(
            f"{folder} holds .npy files, but the model has {len(specs)} inputs; store each sample as an .npz "
            f"with the arrays {', '.join(spec.name for spec in specs)}"
        )
    opened = [
        _open_arrays(str(path), read_headers(path), specs, file=path.relative_to(folder).as_posix()) for path in arrays
    ]
    notes = dict.fromkeys(note for part in opened for note in part.notes)
    return _Opened(_Files(tuple(part.source for part in opened)), tuple(notes))


def _image_spec(folder: Path, specs: tuple[InputSpec, ...]) -> InputSpec:
    if len(specs) != 1 or len(specs[0].shape) != 4 or specs[0].shape[0] != 1:
        shown = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
        raise QCompilerError(
            f"{folder} holds images, which serve one input of shape [1, …, …, …]; the model has {shown}"
        )
    return specs[0]


@dataclass(frozen=True)
class _ImageSource:
    folder: Path
    files: tuple[Path, ...]
    spec: InputSpec
    options: ImageOptions

    def __len__(self) -> int:
        return len(self.files)

    def samples(self) -> Iterator[Sample]:
        for file in self.files:
            label = file.relative_to(self.folder).as_posix()
            yield Sample(label, {self.spec.name: self._checked(file, read_image(file, self.options))})

    def _checked(self, file: Path, image: np.ndarray) -> np.ndarray:
        spec = self.spec
        if image.shape != spec.shape[1:]:
            raise QCompilerError(
                f"{file} becomes {list(image.shape)} ({self.options.layout}), the input {spec.name!r} is "
                f"{list(spec.shape)}; set resize, layout and color to fit"
            )
        if spec.dtype.kind == "f":
            return image
        info = np.iinfo(spec.dtype)
        rounded = np.rint(image)
        if rounded.min() < info.min or rounded.max() > info.max:
            raise QCompilerError(
                f"{file} has values {rounded.min():g}..{rounded.max():g} after preprocessing, which do not fit the "
                f"input {spec.name!r} of {spec.dtype}; adjust scale, mean and std"
            )
        return rounded.astype(spec.dtype)


# --- lint --------------------------------------------------------------------------------------------------

OUTLIER_RATIO = 50.0
NAMED_AT_MOST = 5
"""So many samples are named with the same warning; the rest are counted."""


@dataclass(frozen=True)
class _Summary:
    label: str
    low: float
    high: float
    digest: bytes

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high))


def lint(dataset: Dataset) -> tuple[LintWarning, ...]:
    """Read the data once, one sample at a time, and say what is odd about it.

    Returns:
        Warnings: constant samples, all samples alike, samples far larger than the others, pixels 0..255 among 0..1,
        integers used as floats.

    Raises:
        QCompilerError: no data; NaN or infinite values, or values outside the input's dtype, naming sample and input.
    """
    summaries: dict[str, list[_Summary]] = {spec.name: [] for spec in dataset.inputs}
    for label, arrays in dataset.labelled():
        for name, array in arrays.items():
            summaries[name].append(_summarize(label, name, array))
    if not all(summaries.values()):
        raise QCompilerError("the data holds no samples")
    warnings = list(dataset.notes)
    for spec in dataset.inputs:
        # Masks and indices (wide integers, bool) are rightly constant and of any size.
        if spec.dtype.kind == "f" or (spec.dtype.itemsize == 1 and spec.dtype.kind in "iu"):
            warnings += _constant(spec, summaries[spec.name])
            warnings += _outliers(spec, summaries[spec.name])
    if len(dataset) > 1 and all(len({entry.digest for entry in entries}) == 1 for entries in summaries.values()):
        message = f"all {len(dataset)} samples are identical; give samples that differ"
        warnings.append(LintWarning(", ".join(summaries), None, message))
    return tuple(warnings)


def _summarize(label: str, name: str, array: np.ndarray) -> _Summary:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        nans, infinities = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        kinds = " and ".join(f"{count} {kind}" for count, kind in ((nans, "NaN"), (infinities, "infinite")) if count)
        raise QCompilerError(
            f"sample {label} of the input {name!r} holds {kinds} value(s) out of {array.size}; "
            "one of them ruins every range, so remove the sample or mend it"
        )
    digest = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()
    return _Summary(label, float(array.min()), float(array.max()), digest)


def _constant(spec: InputSpec, entries: Sequence[_Summary]) -> list[LintWarning]:
    if g.element_count(spec.shape) == 1:
        return []
    flat = [entry for entry in entries if entry.low == entry.high]
    return _named(spec, flat, lambda entry: f"every value is {entry.low:g}")


def _outliers(spec: InputSpec, entries: Sequence[_Summary]) -> list[LintWarning]:
    varied = [entry for entry in entries if entry.low < entry.high]
    pixels = [entry for entry in varied if entry.low >= 0 and 1.5 * OUTLIER_RATIO < entry.high <= 255]
    units = [entry for entry in varied if entry.low >= 0 and entry.high <= 1]
    if pixels and units and len(pixels) + len(units) == len(varied) and spec.dtype.kind == "f":
        if len(pixels) <= len(units):
            return _named(spec, pixels, lambda _: "looks like 0..255 while the others are 0..1")
        return _named(spec, units, lambda _: "looks like 0..1 while the others are 0..255")
    magnitudes = [entry.magnitude for entry in entries]
    # Of two samples the larger one is measured by the smaller; of more, by the one in the middle.
    typical = float(np.median(magnitudes)) if len(entries) > 2 else min(magnitudes)
    found = [entry for entry in entries if entry.magnitude >= OUTLIER_RATIO * typical > 0]
    return _named(spec, found, lambda entry: f"values are {entry.magnitude / typical:.0f} times the others'")


def _named(spec: InputSpec, entries: Sequence[_Summary], describe: Callable[[_Summary], str]) -> list[LintWarning]:
    warnings = [LintWarning(spec.name, entry.label, describe(entry)) for entry in entries[:NAMED_AT_MOST]]
    if len(entries) > NAMED_AT_MOST:
        last = describe(entries[-1])
        warnings.append(LintWarning(spec.name, None, f"{len(entries) - NAMED_AT_MOST} more samples likewise ({last})"))
    return warnings
