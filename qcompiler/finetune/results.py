"""What finetuning gained, to print and to keep."""

from dataclasses import asdict, dataclass

from rich.table import Table

from qcompiler.quantized_file import WrittenModel
from qcompiler.search.measure import Measured


@dataclass(frozen=True)
class Finetuned:
    """A finetuned model beside the same formats without training."""

    written: WrittenModel
    before: Measured
    """Rounded without training."""
    after: Measured
    held_out: bool
    """Whether the samples measured on were not learned from."""
    losses: tuple[float, ...]
    """Mean loss of each epoch."""
    trained_on: int
    """Samples."""

    @property
    def float_top1(self) -> float | None:
        """By the labels, if there are any."""
        if self.after.top1 is None or self.after.drop is None:
            return None
        return self.after.top1 + self.after.drop

    @property
    def helped(self) -> bool:
        """Whether the outputs are nearer to the float model's than without training."""
        return self.after.noise < self.before.noise

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "written": {**asdict(self.written), "path": str(self.written.path)},
                "float_top1": self.float_top1}  # fmt: skip


def render(found: Finetuned) -> Table:
    """Three rows: float, rounded, finetuned."""
    where = "held-out samples" if found.held_out else "samples that were learned from: there are too few to hold out"
    table = Table(
        "model",
        "top-1",
        "same class as float",
        "SQNR",
        title=f"{found.trained_on} samples learned from; measured on {found.after.samples} {where}",
        title_justify="left",
        caption=None if found.helped else "Training did not help: try more samples, or a smaller --lr.",
        caption_justify="left",
    )
    table.add_row("float", _percent(found.float_top1), "", "")
    for name, measured in (("rounded", found.before), ("finetuned", found.after)):
        ratio = "exact" if measured.sqnr is None else f"{measured.sqnr:.1f} dB"
        table.add_row(name, _percent(measured.top1), _percent(measured.agreement), ratio)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
