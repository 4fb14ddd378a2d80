"""Runs what gpu_device.py prepared: on a machine with an NVIDIA GPU, python3 and numpy, without qcompiler.

    python3 FOLDER/run.py [-o RESULTS] [--repeat 200] [--budget 240]

Each program, and each rival, runs in a process of its own with a time limit; what fails says so and does not stop the
others. Writes RESULTS.md and RESULTS.json. PyTorch and onnxruntime are raced where they are installed.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
LIMIT = 60
"""Seconds of one process."""
ROUNDS, RUNS = 10, 100


# --- one program, in a process of its own -------------------------------------------------------------------


def launcher() -> Any:
    """The launcher's library; compiled here if the one that was brought does not load."""
    try:
        library = ctypes.CDLL(str(FOLDER / "libqgpu.so"))
    except OSError:
        source, made = FOLDER / "launcher", Path(os.environ.get("TMPDIR", "/tmp")) / "libqgpu_here.so"
        files = [str(source / name) for name in ("qgpu.c", "cuda.c")]
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", f"-I{source}", "-o", str(made), *files, "-ldl"], check=True)
        library = ctypes.CDLL(str(made))
    for name in ("qgpu_problem", "qgpu_device", "qgpu_error"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def load(name: str) -> np.ndarray:
    with np.load(FOLDER / name) as file:
        return file["arr_0"]


def program_of(case: dict[str, Any]) -> np.ndarray:
    """The encoded program at an address that is a multiple of 64; constants that were not brought are random."""
    head, start, size = load(case["head"]), case["constants_at"], case["constants_bytes"]
    memory = np.empty(len(head) + size + 64, np.uint8)
    blob = memory[-memory.ctypes.data % 64 :][: len(head) + size]
    blob[:start], blob[start + size :] = head[:start], head[start:]
    if case["constants"]:
        blob[start : start + size] = load(case["constants"])
    else:
        blob[start : start + size] = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return blob


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def infer(library: Any, blob: np.ndarray, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
    library.qgpu_open(0, pointer(blob))
    for index, array in enumerate(inputs):
        library.qgpu_write(index, pointer(array))
    library.qgpu_run()
    for index, array in enumerate(outputs):
        library.qgpu_read(index, pointer(array))
    if library.qgpu_close() != 0:
        raise SystemExit(library.qgpu_error().decode(errors="replace"))


def run_case(number: int, repeat: int) -> dict[str, Any]:
    """Compare with the reference, then time: with copies, without, and each launch."""
    case = json.loads((FOLDER / "cases.json").read_text("utf-8"))[number]
    library = launcher()
    if (problem := library.qgpu_problem()) is not None:
        raise SystemExit(problem.decode(errors="replace"))
    blob = program_of(case)
    inputs, wanted = [load(name) for name in case["inputs"]], [load(name) for name in case["outputs"]]
    result: dict[str, Any] = {"device": library.qgpu_device().decode(errors="replace")}
    samples = len(inputs[0]) if inputs else 0
    wrong = worst = 0
    feeds, outputs = list[np.ndarray](), list[np.ndarray]()
    for turn in range(2 * samples):  # twice: what one inference leaves behind must not matter to the next
        feeds = [np.ascontiguousarray(array[turn % samples]) for array in inputs]
        outputs = [np.full_like(array[0], 77) for array in wanted]
        infer(library, blob, feeds, outputs)
        different = [int((a != b[turn % samples]).sum()) for a, b in zip(outputs, wanted, strict=True)]
        wrong += any(different)
        worst = max([worst, *different])
    result |= {"samples": 2 * samples, "wrong": wrong, "elements": worst}
    if samples:
        times = []
        for _ in range(ROUNDS if repeat > 1 else 1):
            start = time.perf_counter()
            for _ in range(RUNS if repeat > 1 else 1):
                infer(library, blob, feeds, outputs)
            times.append((time.perf_counter() - start) / (RUNS if repeat > 1 else 1))
        result["with_copies"] = min(times)
    else:
        # A sweep: no inputs. Its ports are read off the program itself, and nothing is compared.
        library.qgpu_open(0, pointer(blob))
        library.qgpu_run()
        if library.qgpu_close() != 0:
            raise SystemExit(library.qgpu_error().decode(errors="replace"))
    each, whole = (ctypes.c_float * max(1, len(case["launches"])))(), ctypes.c_float()
    if library.qgpu_measure(repeat, each, ctypes.byref(whole)) == 0:
        result |= {"each": list(each), "whole": whole.value}
    else:
        result["not_measured"] = library.qgpu_error().decode(errors="replace")
    return result


# --- all of them --------------------------------------------------------------------------------------------


def in_process(command: list[str], limit: float) -> tuple[str, str | None]:
    """What a process printed, and why it failed if it did."""
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {limit:.0f} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return done.stdout, lines[-1]
    return done.stdout, None


def races(name: str, limit: float) -> dict[str, Any]:
    """PyTorch and onnxruntime on a network: seconds with copies and without."""
    found: dict[str, Any] = {}
    for rival in ("torch", "onnxruntime"):
        text, problem = in_process([str(FOLDER / "gpu_engines.py"), rival, str(FOLDER / f"{name}.onnx")], limit)
        found[rival] = problem if problem is not None else [float(number) for number in text.split()[-2:]]
    return found


def layer_races(limit: float) -> dict[str, dict[str, float | str]]:
    """Microseconds of the sweep's layers in other libraries, by layer and library."""
    text, problem = in_process([str(FOLDER / "gpu_engines.py"), "layers", str(FOLDER / "cases.json")], limit)
    if problem is not None:
        print(f"layers: {problem}", flush=True)
        return {}
    return {item.pop("name"): item for item in json.loads(text.splitlines()[-1])}


def micro(seconds: Any) -> str:
    return f"{seconds * 1e6:,.1f} µs" if isinstance(seconds, float) else str(seconds)


def tables(
    cases: list[dict[str, Any]],
    results: list[dict[str, Any]],
    rivals: dict[str, dict[str, Any]],
    layers: dict[str, dict[str, float | str]],
) -> list[str]:
    device = next((item["device"] for item in results if "device" in item), "no device")
    lines = [f"Executed on: {device}. Batch 1. Times are the least of {ROUNDS} rounds of {RUNS}.", ""]
    lines += ["| network | version | launches | wrong | with copies | on the device |", "|---|---|--:|--:|--:|--:|"]
    networks = [(case, item) for case, item in zip(cases, results, strict=True) if case["version"] != "sweep"]
    for case, item in networks:
        title = f"| {case['name']} | {case['version']} | {len(case['launches'])} |"
        if "problem" in item:
            lines.append(f"{title} **{item['problem']}** | | |")
            continue
        whole = micro(item["whole"] * 1e-6) if "whole" in item else item.get("not_measured", "")
        lines.append(f"{title} {item['wrong']} of {item['samples']} | {micro(item['with_copies'])} | {whole} |")
    lines += ["", "| network | engine | with copies | on the device |", "|---|---|--:|--:|"]
    for name, found in rivals.items():
        ours = next((item for case, item in networks if case["name"] == name and "whole" in item), None)
        for rival, times in found.items():
            if isinstance(times, str):
                lines.append(f"| {name} | {rival} | {times} | |")
                continue
            ratio = (times[0] / ours["with_copies"], times[1] / ours["whole"] / 1e-6) if ours else None
            words = [f" ({number:.2f}× ours)" for number in ratio] if ratio else ["", ""]
            cells = " | ".join(micro(number) + word for number, word in zip(times, words, strict=True))
            lines.append(f"| {name} | {rival}, fp16 | {cells} |")
    for case, item in networks:
        if case["version"] == "all" and "each" in item:
            lines += ["", f"### {case['name']}, launch by launch", "", "| launch | µs |", "|---|--:|"]
            lines += [f"| {label} | {spent:.2f} |" for label, spent in zip(case["launches"], item["each"], strict=True)]
    sweeps = [pair for pair in zip(cases, results, strict=True) if pair[0]["version"] == "sweep"]
    if sweeps:
        lines += ["", "### Layers", "", "| product | chosen | µs | best | µs | cuDNN fp16 | cuBLASLt INT8 |"]
        lines.append("|---|---|--:|---|--:|--:|--:|")
    for case, item in sweeps:
        if "each" not in item:
            lines.append(f"| {case['name']} | {item.get('problem', item.get('not_measured'))} | | | | | |")
            continue
        timed = sorted(zip(item["each"], case["launches"], strict=True))
        chosen = next(pair for pair in timed if pair[1].startswith("* "))
        other = [layers.get(case["name"], {}).get(name, "") for name in ("cuDNN fp16", "cuBLASLt INT8")]
        cells = [chosen[1][2:], f"{chosen[0]:.2f}", timed[0][1], f"{timed[0][0]:.2f}"]
        cells += [f"{number:.2f}" if isinstance(number, float) else number for number in other]
        lines.append(f"| {case['name']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER / "results")
    parser.add_argument("--repeat", type=int, default=200, help="launches that a time is the mean of")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which nothing more is started")
    parser.add_argument("--case", type=int, help="one program, by its number in cases.json: prints what it found")
    parser.add_argument("--no-rivals", action="store_true")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run_case(options.case, options.repeat)))
        return
    started = time.perf_counter()
    cases = json.loads((FOLDER / "cases.json").read_text("utf-8"))
    results: list[dict[str, Any]] = [{"problem": "not run: out of time"} for _ in cases]
    rivals: dict[str, dict[str, Any]] = {}
    # Networks first, then the race, then the sweep.
    order = sorted(range(len(cases)), key=lambda number: cases[number]["version"] == "sweep")
    names = list(dict.fromkeys(case["name"] for case in cases if case["version"] == "all"))
    for number in order:
        if cases[number]["version"] == "sweep" and not rivals and not options.no_rivals:
            rivals = {name: races(name, LIMIT) for name in names}
            print("\n".join(f"{name}: {found}" for name, found in rivals.items()), flush=True)
        if time.perf_counter() - started > options.budget:
            break
        command = [str(FOLDER / "run.py"), "--case", str(number), "--repeat", str(options.repeat)]
        text, problem = in_process(command, LIMIT)
        results[number] = {"problem": problem} if problem is not None else json.loads(text.splitlines()[-1])
        short = {key: value for key, value in results[number].items() if key != "each"}
        print(f"{cases[number]['name']}, {cases[number]['version']}: {short}", flush=True)
    if not rivals and not options.no_rivals:
        rivals = {name: races(name, LIMIT) for name in names}
    sweeps = any(case["version"] == "sweep" for case in cases)
    layers = layer_races(2 * LIMIT) if sweeps and not options.no_rivals else {}
    lines = tables(cases, results, rivals, layers)
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
    everything = {"cases": cases, "results": results, "rivals": rivals, "layers": layers}
    options.output.with_suffix(".json").write_text(json.dumps(everything), "utf-8")
    print("\n".join(lines))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
