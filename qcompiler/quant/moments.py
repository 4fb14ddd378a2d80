"""What layer-wise reconstruction has to know of the calibration data: first and second moments of a layer's inputs.

They are sums, so memory does not grow with the number of samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompiler.exact_session import exact_session
from qcompiler.graph import data_input, remove_dead, value_name
from qcompiler.quant.layer_rows import input_rows

ROWS = 256
"""Rows of one sample that enter the moments of a layer; neighbouring pixels say little new."""

_FLUSH = 2048
"""Rows that wait before they enter the sums."""

Sample = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Moments:
    """Means over rows of a layer's inputs: x in the float model, x̂ where everything before is quantized."""

    gram: np.ndarray
    """E[x̂ x̂ᵀ], float64 [groups, K, K]."""
    float_gram: np.ndarray
    """E[x xᵀ], float64 [groups, K, K]."""
    cross: np.ndarray
    """E[x̂ xᵀ], float64 [groups, K, K]."""
    mean: np.ndarray
    """E[x̂], [groups, K]."""
    float_mean: np.ndarray
    """E[x], [groups, K]."""
    rows: int

    def of_float(self) -> "Moments":
        """What they would be if x̂ were x."""
        return replace(self, gram=self.float_gram, cross=self.float_gram, mean=self.float_mean)

    def joined(self, other: "Moments") -> "Moments":
        """Those of both rows together."""
        rows = self.rows + other.rows
        own, its = self.rows / rows, other.rows / rows
        return Moments(
            gram=own * self.gram + its * other.gram,
            float_gram=own * self.float_gram + its * other.float_gram,
            cross=own * self.cross + its * other.cross,
            mean=own * self.mean + its * other.mean,
            float_mean=own * self.float_mean + its * other.float_mean,
            rows=rows,
        )

    @property
    def covariance(self) -> np.ndarray:
        return self.gram - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def cross_covariance(self) -> np.ndarray:
        return self.cross - self.mean[:, :, None] * self.float_mean[:, None, :]


def collect(
    model: ir.Model, quantized: ir.Model, layers: Sequence[ir.Node], samples: Iterable[Sample]
) -> dict[str, Moments]:
    """Run both models over the samples, each once.

    Args:
        model: the float model.
        quantized: what `quantize` made of it.
        layers: nodes of `model` for which `has_rows` is true.

    Returns:
        By node name. A layer whose inputs are not finite is left out.
    """
    twins = {node.name: node for node in quantized.graph}
    pairs = {node: (value_name(data_input(node)), value_name(data_input(twins[node.name]))) for node in layers}
    exact = Tap(model, [name for name, _ in pairs.values()])
    coarse = Tap(quantized, [name for _, name in pairs.values()])
    sums: dict[str, _Sums] = {}
    for index, sample in enumerate(samples):
        x, x_hat = exact.run(sample), coarse.run(sample)
        for node, (name, twin) in pairs.items():
            float_rows, rows = (input_rows(node, a, ROWS, index) for a in (x[name], x_hat[twin]))
            sums.setdefault(node.name or "", _Sums()).add(rows, float_rows)
    means = {name: total.means() for name, total in sums.items()}
    return {
        name: seen for name, seen in means.items() if np.isfinite(seen.gram).all() and np.isfinite(seen.cross).all()
    }


@dataclass
class _Sums:
    """What `Moments` holds, before dividing by the number of rows."""

    gram: np.ndarray | float = 0.0
    float_gram: np.ndarray | float = 0.0
    cross: np.ndarray | float = 0.0
    total: np.ndarray | float = 0.0
    float_total: np.ndarray | float = 0.0
    rows: int = 0

    pending: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, rows: np.ndarray, float_rows: np.ndarray) -> None:
        self.pending.append((rows, float_rows))
        if sum(waiting.shape[1] for waiting, _ in self.pending) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Take in what waits: a few large products cost far less than many small ones."""
        if not self.pending:
            return
        rows, float_rows = (np.concatenate(waiting, axis=1) for waiting in zip(*self.pending, strict=True))
        self.pending.clear()
        turned = rows.transpose(0, 2, 1)
        # Some samples' products may be summed in float32, all samples' not.
        self.gram = self.gram + (turned @ rows).astype(np.float64)
        self.float_gram = self.float_gram + (float_rows.transpose(0, 2, 1) @ float_rows).astype(np.float64)
        self.cross = self.cross + (turned @ float_rows).astype(np.float64)
        self.total = self.total + rows.sum(axis=1, dtype=np.float64)
        self.float_total = self.float_total + float_rows.sum(axis=1, dtype=np.float64)
        self.rows += rows.shape[1]

    def means(self) -> Moments:
        self.flush()
        sums = (self.gram, self.float_gram, self.cross, self.total, self.float_total)
        gram, float_gram, cross, mean, float_mean = (np.asarray(array / self.rows) for array in sums)
        return Moments(gram, float_gram, cross, mean, float_mean, self.rows)


class Tap:
    """A session that returns tensors from inside a model, and computes nothing that they do not need."""

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        fed = {value_name(value) for value in model.graph.inputs}
        self.names = [name for name in dict.fromkeys(names) if name not in fed]
        exposed = model.clone()
        by_name = {value_name(value): value for node in exposed.graph for value in node.outputs if value.name}
        exposed.graph.outputs.clear()
        exposed.graph.outputs.extend(by_name[name] for name in self.names)
        remove_dead(exposed)
        # Layers run for microseconds between copies: threads that spin meanwhile only take cores from numpy.
        proto = ir.to_proto(exposed).SerializeToString()
        self.session = exact_session(proto, spinning=False) if self.names else None

    def run(self, sample: Sample) -> dict[str, np.ndarray]:
        """The named tensors, inputs of the model among them."""
        if self.session is None:
            return dict(sample)
        outputs = self.session.run(self.names, dict(sample))
        return {name: np.asarray(output) for name, output in zip(self.names, outputs, strict=True)} | dict(sample)
