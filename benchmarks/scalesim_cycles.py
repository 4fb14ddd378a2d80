"""Compute cycles of SCALE-Sim 3 for the layers of three networks: the reference of tests/simulator/test_systolic.py.

    python -m venv scalesim && scalesim/bin/pip install scalesim==3.0.0
    scalesim/bin/python benchmarks/scalesim_cycles.py > tests/simulator/scalesim_cycles.csv

Asks SCALE-Sim's compute model for the trace of output writes, one row a cycle, numbered from 0; its memory model, which
adds no compute cycles, is left out: it would take hours for these layers. Needs nothing of qcompiler.
"""

import csv
import sys
import time

import numpy as np
from scalesim.compute.systolic_compute_os import systolic_compute_os  # pyright: ignore[reportMissingImports]
from scalesim.compute.systolic_compute_ws import systolic_compute_ws  # pyright: ignore[reportMissingImports]
from scalesim.scale_config import scale_config  # pyright: ignore[reportMissingImports]

# Output pixels, window times input channels, output channels, groups; at 224x224.
LAYERS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "ResNet-18": (
        (12544, 147, 64, 1), (3136, 576, 64, 1), (784, 576, 128, 1), (784, 1152, 128, 1), (784, 64, 128, 1),
        (196, 1152, 256, 1), (196, 2304, 256, 1), (196, 128, 256, 1), (49, 2304, 512, 1), (49, 4608, 512, 1),
        (49, 256, 512, 1), (1, 512, 1000, 1),
    ),
    "ResNet-50": (
        (12544, 147, 64, 1), (3136, 64, 64, 1), (3136, 576, 64, 1), (3136, 64, 256, 1), (3136, 256, 64, 1),
        (3136, 256, 128, 1), (784, 1152, 128, 1), (784, 128, 512, 1), (784, 256, 512, 1), (784, 512, 128, 1),
        (784, 512, 256, 1), (196, 2304, 256, 1), (196, 256, 1024, 1), (196, 512, 1024, 1), (196, 1024, 256, 1),
        (196, 1024, 512, 1), (49, 4608, 512, 1), (49, 512, 2048, 1), (49, 1024, 2048, 1), (49, 2048, 512, 1),
        (1, 2048, 1000, 1),
    ),
    "MobileNetV1": (
        (12544, 27, 32, 1), (12544, 9, 1, 32), (12544, 32, 64, 1), (3136, 9, 1, 64), (3136, 64, 128, 1),
        (3136, 9, 1, 128), (3136, 128, 128, 1), (784, 9, 1, 128), (784, 128, 256, 1), (784, 9, 1, 256),
        (784, 256, 256, 1), (196, 9, 1, 256), (196, 256, 512, 1), (196, 9, 1, 512), (196, 512, 512, 1),
        (49, 9, 1, 512), (49, 512, 1024, 1), (49, 9, 1, 1024), (49, 1024, 1024, 1), (1, 1024, 1000, 1),
    ),
}  # fmt: skip
COMPUTE = {"weight_stationary": systolic_compute_ws, "output_stationary": systolic_compute_os}


def cycles(m: int, k: int, n: int, size: int, dataflow: str) -> int:
    """Of [m, k] x [k, n] on a square array."""
    config = scale_config()
    config.array_rows = config.array_cols = size
    config.valid_conf_flag = True
    compute = COMPUTE[dataflow]()
    compute.set_params(
        config_obj=config,
        ifmap_op_mat=np.zeros((m, k)),
        filter_op_mat=np.zeros((k, n)),
        ofmap_op_mat=np.zeros((m, n)),
    )
    compute.create_ofmap_demand_mat()
    return int(compute.ofmap_demand_matrix.shape[0]) - 1


def main() -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("network", "m", "k", "n", "groups", "array", "dataflow", "cycles"))
    started = time.perf_counter()
    total = 0
    for network, layers in LAYERS.items():
        for m, k, n, groups in layers:
            for size in (16, 32):
                for dataflow in COMPUTE:
                    found = cycles(m, k, n, size, dataflow)
                    total += found
                    table.writerow((network, m, k, n, groups, size, dataflow, found))
    print(f"{total} cycles traced in {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
