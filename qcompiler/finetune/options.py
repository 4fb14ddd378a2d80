"""What a user may say about finetuning."""

from dataclasses import dataclass
from typing import Literal

TrainedActivations = Literal["int8", "int4"]
"""int8 stands for the target's first 8-bit type; int4 for sixteen levels of it, see `qcompiler.finetune.four_bits`."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn."""

    epochs: int = 60
    rate: float | None = None
    """Adam's at the beginning, as a share of each tensor's root mean square; None leaves it to the formats."""
    batch: int = 32
    seed: int = 0
    """Of the order of samples."""
