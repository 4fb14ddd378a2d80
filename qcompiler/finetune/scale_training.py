"""The training behind `tune_scales`: scales and biases learn to reproduce the float network's tensors."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]

from qcompiler.calibrate import Progress
from qcompiler.finetune.network import Network
from qcompiler.graph import input_of
from qcompiler.quant.moments import Sample
from qcompiler.quant.types import QuantPlan

EPOCHS = 40
"""At most, and no more steps than `STEPS`."""
STEPS = 160
PROBED = 3
"""Steps after which it is known how many there is time for."""
BATCH = 16
SCALE_RATE = 5e-3
"""Adam's at the beginning for logarithms of scales: a step changes a scale by half a percent."""
BIAS_RATE = 3e-3
"""The same for biases, in their units (`Network.weights`)."""


@dataclass(frozen=True)
class Trained:
    """What was learned."""

    plan: QuantPlan
    biases: dict[str, np.ndarray]
    """By node name, [output channels]."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums come out the same on every number of cores; and small networks are not slowed down by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_scales(
    model: ir.Model,
    shifted: ir.Model,
    plan: QuantPlan,
    compared: Sequence[str],
    samples: Sequence[Sample],
    seconds: float,
    *,
    power_of_two: bool,
    seed: int,
    progress: Progress | None,
) -> Trained:
    """Adam on the errors of tensors, each over its variance; later ones weigh more, for in them errors add up.

    Arguments as of `tune_scales`, and:

    Args:
        shifted: the model with the biases to begin with; each layer has its own.
        plan: says the integers of all weights, and shifts no biases.
        compared: names of the tensors to reproduce, in order.
    """
    teacher = Network(model.graph, outputs=compared)
    student = Network(shifted.graph, plan, power_of_two=power_of_two, outputs=compared)
    spreads = _variances(teacher, samples)
    weights = {name: (index + 1) / len(compared) for index, name in enumerate(compared)}
    scale = sum(weights.values())

    groups = [{"params": [parameter], "lr": BIAS_RATE * unit} for parameter, unit in student.weights()]
    if not power_of_two:
        groups.append({"params": student.weight_scales(), "lr": SCALE_RATE})
    rates = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.Adam(groups)
    order = np.random.default_rng(seed)
    start = time.thread_time()
    steps = max(1, len(samples) // BATCH)
    done, total = 0, min(steps * EPOCHS, STEPS)
    while done < total:
        for chosen in np.array_split(order.permutation(len(samples)), steps):
            batch = _stacked([samples[index] for index in chosen])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + np.cos(np.pi * done / total)) / 2
            with torch.no_grad():
                wanted = teacher(batch)
            found = student(batch)
            errors = [weights[name] * F.mse_loss(found[name], wanted[name]) / spreads[name] for name in compared]
            loss = torch.stack(errors).sum() / scale
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress is not None:
                progress(done, total)
            if done == min(steps, PROBED):
                # The rate falls to zero however many steps there are, so that must be known early.
                affordable = int(done * seconds / max(time.thread_time() - start, 1e-6))
                total = min(total, max(done, affordable))
            if done == total:
                break
    return Trained(student.learned_plan(), _biases(shifted.graph, student))


def _stacked(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}


def _variances(teacher: Network, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Of each tensor over all samples, which never are in memory together."""
    sums: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for start in range(0, len(samples), BATCH):
        batch = [samples[index] for index in range(start, min(start + BATCH, len(samples)))]
        with torch.no_grad():
            found = teacher(_stacked(batch))
        for name, tensor in found.items():
            each = tensor.double()
            sums[name] = sums.get(name, 0) + torch.stack([each.sum(), each.square().sum()])
            sizes[name] = sizes.get(name, 0) + each.numel()
    moments = {name: total / sizes[name] for name, total in sums.items()}
    return {name: (square - mean**2).float().clamp_min(1e-12) for name, (mean, square) in moments.items()}


def _biases(shifted: ir.Graph, student: Network) -> dict[str, np.ndarray]:
    constants = student.learned_constants()
    return {
        node.name or "": constants[bias.name or ""].reshape(-1)
        for node in shifted
        if (bias := input_of(node, 2)) is not None and bias.name in constants
    }
