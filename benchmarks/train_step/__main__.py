"""The training step of our Conformer beside those of other libraries: same sizes, same batch, one run.

    python benchmarks/train_step --nemo work/envs/nemo --speechbrain work/envs/speechbrain [--repeats 15]
    python benchmarks/train_step --nemo work/envs/nemo --frozen

The second is the step with a frozen encoder: NeMo's, which encodes the batch (in eval mode, without gradients) and
trains the heads, and ours, which has kept the encoded frames, as from the second epoch of a frozen stage on.

A library that is not named is left out. NeMo and SpeechBrain have environments of their own (requirements.txt of
`nemo_parity`, and requirements-speechbrain.txt here, which says how torchaudio is made to import); an absent one is
made. transformers' Parakeet encoder is measured where the package is installed beside ours. The processes take turns,
a few steps each, in changing order, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from common import head  # noqa: E402

NEMO_PACKAGES = HERE.parent / "nemo_parity" / "requirements.txt"
SPEECHBRAIN_PACKAGES = HERE / "requirements-speechbrain.txt"
BATCH = 8
WARM_UP = 1
SIZES: dict[str, dict[str, Any]] = {
    "16 x 176": {"layers": 16, "width": 176, "channels": 176},
    "12 x 144": {"layers": 12, "width": 144, "channels": 144},
    # the first layers of SpeechBrain's own recipe, which cost as much as two convolutions with 46 channels
    "12 x 144, light front": {"layers": 12, "width": 144, "channels": 46, "speechbrain_channels": [64, 32]},
}
DURATIONS_S = (2.0, 4.0)
OURS, OURS_BF16 = "xded", "xded, bf16"


class Side(NamedTuple):
    """One of those that are compared: an environment's interpreter, a library of worker.py, what is special."""

    python: Path
    library: str
    special: dict[str, Any]


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
def worker(side: Side, case: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process that takes a turn for each line that it is sent."""
    command = [str(side.python), str(HERE / "worker.py"), side.library, json.dumps({**case, **side.special})]
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


def measure(sides: dict[str, Side], case: dict[str, Any], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of a step of every side in every turn, peak memory and parameters."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(side, case)) for name, side in sides.items()}
        results: dict[str, dict[str, Any]] = {name: dict(answer_of(process)) for name, process in workers.items()}
        for result in results.values():
            result |= {"seconds": [], "cpu_seconds": []}
        names = list(workers)
        for turn in range(WARM_UP + repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                taken = answer_of(workers[name], "turn\n")
                if turn >= WARM_UP:
                    results[name]["seconds"].append(taken["seconds"])
                    results[name]["cpu_seconds"].append(taken["cpu_seconds"])
                results[name]["peak_mb"] = taken["peak_mb"]
    return results


def row_of(sizes: str, seconds: float, name: str, results: dict[str, dict[str, Any]]) -> str:
    result = results[name]
    low, middle, high = statistics.quantiles(result["seconds"], n=4)

    def times(key: str) -> str:
        pairs = [zip(result[key], results[ours][key], strict=True) for ours in (OURS, OURS_BF16)]
        return " | ".join(f"{statistics.median(a / b for a, b in rows):.2f}" for rows in pairs)

    return (
        f"| {sizes} | {BATCH} x {seconds:.0f} s | {name} | {result['encoder_parameters'] / 1e6:.2f} | "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) | {times('seconds')} | "
        f"{statistics.median(result['cpu_seconds']):.3f} | {times('cpu_seconds')} | {result['peak_mb']:.0f} |"
    )


def agreement_lines() -> list[str]:
    """A table: how far our loss and gradients are from float64's."""
    import torch
    from ours import Xded, agreement
    from worker import made_up_batch

    lines = [
        "\nOur loss and gradients against the same weights in float64, whose loss is written out plainly; 16 x 176, no",
        "dropout, recordings of 1 to 2 s. Relative differences: of the loss, of the gradient of all parameters",
        "(norm of the difference over norm), of the worst tensor among those with a thousandth of the norm.\n",
        "| step | loss | gradient | worst tensor |\n| --- | ---: | ---: | ---: |",
    ]
    torch.manual_seed(0)
    waveforms, samples, *texts = made_up_batch(BATCH, 2.0)
    samples = (samples * torch.linspace(0.5, 1.0, BATCH)).long()
    rows = {"float32, torch's own products": ("highest", False), OURS: (None, False), OURS_BF16: (None, True)}
    for name, (products, bf16) in rows.items():
        torch.manual_seed(1)
        ours = Xded({**SIZES["16 x 176"], "dropout": 0.0, "bf16": bf16}, waveforms, samples, *texts)
        trained_with = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(products or trained_with)
        found = agreement(ours)
        torch.set_float32_matmul_precision(trained_with)
        lines.append(f"| {name} | " + " | ".join(f"{found[key]:.1e}" for key in ("loss", "gradient", "tensor")) + " |")
    return lines


def sides_of(options: argparse.Namespace) -> dict[str, Side]:
    """Who is compared."""
    own = Path(sys.executable)
    sides = {OURS: Side(own, "xded", {}), OURS_BF16: Side(own, "xded", {"bf16": True})}
    if options.nemo:
        sides["nemo"] = Side(prepare(options.nemo, NEMO_PACKAGES), "nemo", {})
    if options.frozen:
        return sides
    if find_spec("transformers"):
        sides["transformers"] = Side(own, "transformers", {})
    if options.speechbrain:
        sides["speechbrain"] = Side(prepare(options.speechbrain, SPEECHBRAIN_PACKAGES), "speechbrain", {})
    return sides


FROZEN = """
CTC head of 5,000 pieces and 4-layer decoder, CTC and KL loss, backward, clipping, fused AdamW; dropout 0.1. NeMo's
features and encoder are in its step (eval mode, no gradients); ours has kept the encoded frames."""
WHOLE = """
Forward (features, encoder, CTC head of 5,000, 4-layer decoder), CTC and KL loss, backward, clipping, fused AdamW;
dropout 0.1. transformers: Parakeet's encoder (its first layers are depthwise separable: fewer operations) and our
features."""
RATIOS = """{} turns of each, one process each: a step that is not counted, then the mean of three. Medians; times are
absolute. Ratios: its step to ours in float32 and to ours in bf16 of the same turn, wall clock and CPU.
"""
COLUMNS = (
    *("layers x width", "batch", "side", "encoder, M", "step, s (quartiles)", "ratio", "to bf16"),
    *("CPU-seconds", "ratio", "to bf16", "peak memory, MB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nemo", type=Path, help="folder of NeMo's environment")
    parser.add_argument("--speechbrain", type=Path, help="folder of SpeechBrain's environment")
    parser.add_argument("--frozen", action="store_true", help="the step of a stage with a frozen encoder, 16 x 176")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each that are counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=list(SIZES))
    options = parser.parse_args()
    sides = sides_of(options)
    title = head(
        f"a training step {'with a frozen encoder' if options.frozen else 'of ours and of others'}", "train_step"
    )
    print(title.replace("train_step.py", "train_step").replace("one thread", f"{options.threads} thread(s)"), end="")
    print(FROZEN if options.frozen else WHOLE)
    print(RATIOS.format(options.repeats))
    print("|", " | ".join(COLUMNS), "|\n| --- | --- | --- |" + " ---: |" * 8)
    for sizes in ["16 x 176"] if options.frozen else options.sizes:
        for seconds in DURATIONS_S:
            case = {**SIZES[sizes], "seconds": seconds, "batch": BATCH, "threads": options.threads}
            results = measure(sides, case | {"frozen": options.frozen}, options.repeats)
            for name in results:
                print(row_of(sizes, seconds, name, results), flush=True)
    if not options.frozen:
        print("\n".join(agreement_lines()))


if __name__ == "__main__":
    main()
