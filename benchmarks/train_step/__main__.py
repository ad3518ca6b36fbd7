"""The training step of our Conformer beside NeMo's and SpeechBrain's: same sizes, same batch, one run.

    python benchmarks/train_step --nemo work/envs/nemo --speechbrain work/envs/speechbrain [--repeats 15]

A library that is not named is left out. Each has an environment of its own (requirements.txt of `nemo_parity`, and
requirements-speechbrain.txt here, which says how torchaudio is made to import); an absent one is made. The processes
take turns, one step each, in changing order, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import head  # noqa: E402

NEMO_PACKAGES = HERE.parent / "nemo_parity" / "requirements.txt"
SPEECHBRAIN_PACKAGES = HERE / "requirements-speechbrain.txt"
BATCH = 8
WARM_UP = 3
SIZES: dict[str, dict[str, Any]] = {
    "16 x 176": {"layers": 16, "width": 176, "channels": 176},
    "12 x 144": {"layers": 12, "width": 144, "channels": 144},
    # the first layers of SpeechBrain's own recipe, which cost as much as two convolutions with 46 channels
    "12 x 144, light front": {"layers": 12, "width": 144, "channels": 46, "speechbrain_channels": [64, 32]},
}
DURATIONS_S = (2.0, 4.0)


def prepare(env: Path, packages: Path) -> Path:
    """The interpreter of an environment, which is made when it is absent."""
    python = env / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", packages], check=True)
        for library in env.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
            library.unlink()  # they want CUDA; without them torchaudio is plain Python and imports
    return python


@contextmanager
def worker(python: Path, library: str, case: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process that makes one training step for each line that it is sent."""
    command = [python, HERE / "worker.py", library, json.dumps(case)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def answer_of(process: subprocess.Popen[str], ask: str = "") -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(ask)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a worker has died; run it by hand: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    answer: dict[str, float] = json.loads(line)
    return answer


def measure(pythons: dict[str, Path], case: dict[str, Any], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every step of every library, peak memory and parameters."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(python, name, case)) for name, python in pythons.items()}
        results: dict[str, dict[str, Any]] = {name: dict(answer_of(process)) for name, process in workers.items()}
        for result in results.values():
            result |= {"seconds": [], "cpu_seconds": []}
        names = list(workers)
        for turn in range(WARM_UP + repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                step = answer_of(workers[name], "step\n")
                if turn >= WARM_UP:
                    results[name]["seconds"].append(step["seconds"])
                    results[name]["cpu_seconds"].append(step["cpu_seconds"])
                results[name]["peak_mb"] = step["peak_mb"]
    return results


def row_of(sizes: str, seconds: float, name: str, result: dict[str, Any], ours: dict[str, Any]) -> str:
    low, _, high = statistics.quantiles(result["seconds"], n=4)

    def times_ours(key: str) -> float:
        return statistics.median(a / b for a, b in zip(result[key], ours[key], strict=True))

    return (
        f"| {sizes} | {BATCH} x {seconds:.0f} s | {name} | {result['encoder_parameters'] / 1e6:.2f} | "
        f"{statistics.median(result['seconds']):.3f} ({low:.3f} to {high:.3f}) | {times_ours('seconds'):.2f} | "
        f"{statistics.median(result['cpu_seconds']):.3f} | {times_ours('cpu_seconds'):.2f} | {result['peak_mb']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nemo", type=Path, help="folder of NeMo's environment")
    parser.add_argument("--speechbrain", type=Path, help="folder of SpeechBrain's environment")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each that are counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=list(SIZES))
    options = parser.parse_args()
    pythons = {"xded": Path(sys.executable)}
    if options.nemo:
        pythons["nemo"] = prepare(options.nemo, NEMO_PACKAGES)
    if options.speechbrain:
        pythons["speechbrain"] = prepare(options.speechbrain, SPEECHBRAIN_PACKAGES)
    title = head("a training step of our Conformer, NeMo's and SpeechBrain's", "train_step")
    print(title.replace("train_step.py", "train_step").replace("one thread", f"{options.threads} threads"))
    print("Forward (features, encoder, CTC head of 5,000, 4-layer decoder), CTC and KL loss, backward, clipping, fused")
    print(f"AdamW; dropout 0.1, float32. {options.repeats} steps of each library, in turn, one process each. Medians;")
    print("times are absolute. Ratios: its step to ours of the same turn, wall clock and CPU.\n")
    columns = ("layers x width", "batch", "library", "encoder, M", "step, s (quartiles)", "ratio")
    print("|", " | ".join([*columns, "CPU-seconds", "ratio", "peak memory, MB"]), "|")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for sizes in options.sizes:
        for seconds in DURATIONS_S:
            case = {**SIZES[sizes], "seconds": seconds, "batch": BATCH, "threads": options.threads}
            results = measure(pythons, case, options.repeats)
            for name, result in results.items():
                print(row_of(sizes, seconds, name, result, results["xded"]), flush=True)


if __name__ == "__main__":
    main()
