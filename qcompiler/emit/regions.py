"""Write the accelerator's regions of a compiled model for other compilers, and have Vela compile them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qcompiler import tools
from qcompiler.emit.vela import compile_network, require_vela
from qcompiler.errors import QCompilerError
from qcompiler.partition import Partition, Region
from qcompiler.report import VelaReport
from qcompiler.simulator.cost import RegionCost
from qcompiler.target import Target, VelaConfig

EmitFormat = Literal["tflite", "tosa", "vela"]


def check_emission(target: Target, form: EmitFormat) -> None:
    """Refuse what cannot work, before time is spent on the model.

    Raises:
        QCompilerError: the target has no accelerator, its spec does not say how to run Vela, or a tool is missing.
    """
    if target.npu is None:
        raise QCompilerError(f"--emit {form} writes the accelerator's part, and {target.name} has no accelerator")
    if form == "vela":
        _vela_config(target)
        require_vela()
    if form == "tosa":
        from qcompiler.emit.tosa import tosa_program

        tosa_program("tosa-opt")
    else:
        tools.require_package("ai_edge_litert", purpose="to write .tflite", install="pip install 'qcompiler[ethosu]'")


def emit_regions(
    partition: Partition, costs: Mapping[str, RegionCost], target: Target, form: EmitFormat, folder: Path
) -> tuple[VelaReport, ...]:
    """Write REGION.tflite, or REGION.mlir and REGION.tosa, for every accelerator region; with `vela` Vela's files too.

    Args:
        partition: of the integer graph.
        costs: our own estimates, by region name.
        target: passed `check_emission`.
        form: what to write.
        folder: receives the files.

    Returns:
        Vela's estimate beside ours, region by region; empty unless `form` is vela.

    Raises:
        QCompilerError: an operator has no form that computes the same, or Vela fails.
    """
    regions = [region for region in partition.regions if region.backend == "npu"]
    if form == "vela":
        return tuple(_through_vela(region, costs[region.name], _vela_config(target), folder) for region in regions)
    for region in regions:
        (write_tflite if form == "tflite" else write_tosa)(region, folder)
    return ()


def write_tflite(region: Region, folder: Path) -> Path:
    """REGION.tflite."""
    from qcompiler.emit.tflite import tflite_of

    file = folder / f"{region.name}.tflite"
    file.write_bytes(tflite_of(region))
    return file


def write_tosa(region: Region, folder: Path) -> Path:
    """REGION.mlir, and REGION.tosa serialized from it."""
    from qcompiler.emit.tosa import serialize, tosa_of

    text = folder / f"{region.name}.mlir"
    text.write_text(tosa_of(region), "utf-8", newline="\n")
    return serialize(text)


def _through_vela(region: Region, ours: RegionCost, config: VelaConfig, folder: Path) -> VelaReport:
    result = compile_network(_network(region, folder), config, folder)
    return VelaReport(
        region=region.name,
        accelerator=config.accelerator,
        operators=len(region.nodes),
        npu_operators=result.npu_operators,
        cpu_operators=result.cpu_operators,
        refusals=result.refusals,
        cycles=round(ours.cycles),
        vela_cycles=result.cycles,
        scratchpad=ours.peak_scratchpad,
        vela_scratchpad=result.scratchpad,
    )


def _network(region: Region, folder: Path) -> Path:
    """TFLite; or TOSA where only that computes the same, if its tools are there."""
    try:
        return write_tflite(region, folder)
    except QCompilerError:
        if tools.find("tosa-opt", beside_python=True) is None:
            raise
    return write_tosa(region, folder)


def _vela_config(target: Target) -> VelaConfig:
    if target.emit.vela is None:
        raise QCompilerError(
            f"{target.name} is no Ethos-U that Vela knows; a spec that extends one of those, or that has an "
            "emit.vela section, can be compiled with --emit vela"
        )
    return target.emit.vela
