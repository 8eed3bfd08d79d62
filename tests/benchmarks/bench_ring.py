"""Compares one worker with several, on the same model, tokens and machine, one thread each, and with the simulator's prediction.

    python tests/benchmarks/bench_ring.py --calibration TEXT                      # random Llama, hidden 1024, 8 layers
    python tests/benchmarks/bench_ring.py --calibration TEXT --backend ray --num-workers 2

The single worker and the ring take turns. The figures:

- run: from the first message to the last; without imports and process starts, which do not depend on the model's size.
- ring: from the first step of any worker to the last, without embedding and merging; this is what the simulator predicts.
- utilisation: share of the ring's time in which a worker forwards, searches or rounds; mean over the workers.
- simulated: makespan for the median step times of the single worker's layers.

Run it on an idle machine with at least as many cores as workers, and OMP_WAIT_POLICY=passive.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from awqdist.report.intervals import Timeline, timeline
from bench_llm_compressor import write_random_llama

from awqdist.plan.simulate import measured_times, simulate
from awqdist.run.events import LayerFinished, RunStarted, last_run, log_file, read_log
from awqdist.run.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one run. run_s: the whole run; ring_s: without embedding and merging."""

    run_s: float
    ring_s: float
    utilisation: float
    predicted_s: float  # simulated from this run's layers, for a ring of `num_workers`


def main() -> int:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="awqdist-bench-") as name:
        scratch = Path(name)
        model = write_random_llama(scratch / "model", options.calibration, num_layers=options.num_layers)
        single: list[Measured] = []
        several: list[Measured] = []
        for repeat in range(options.repeats):
            single.append(run(options, model, scratch / f"single-{repeat}", "local", 1))
            several.append(run(options, model, scratch / f"ring-{repeat}", options.backend, options.num_workers))
            check_bytes(scratch / f"single-{repeat}", scratch / f"ring-{repeat}")
        show(options, single, several)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--backend", choices=("torchrun", "ray"), default="torchrun")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--repeats", type=int, default=1, help="the table shows medians")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, model: Path, output: Path, backend: str, num_workers: int) -> Measured:
    quantize = ["-m", "awqdist", "quantize", model, output, "--calibration", options.calibration, "--threads", 1]
    quantize += ["--num-samples", options.num_samples, "--seq-len", options.seq_len, "--recipe", options.recipe]
    quantize += ["--chunk-tokens", options.chunk_tokens, "--progress", "plain", "--no-report"]
    if backend == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_workers]
        command = [sys.executable, *launcher, *quantize]
    else:
        command = [sys.executable, *quantize, "--backend", backend, "--num-workers", num_workers]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return measure(options, output)


def measure(options: argparse.Namespace, output: Path) -> Measured:
    messages = last_run(read_log(log_file(output)).messages)
    drawn = timeline(messages)
    started = next(m.event for m in messages if isinstance(m.event, RunStarted))
    records = [m.event.record for m in messages if isinstance(m.event, LayerFinished)]
    num_chunks = -(-options.num_samples // max(1, options.chunk_tokens // options.seq_len))
    times = measured_times(records, started.num_tokens, num_chunks)
    schedule = Schedule(0, started.num_layers, options.num_workers, num_chunks)
    ring_s = ring_seconds(drawn)
    busy = statistics.fmean(lane.busy_seconds for lane in drawn.lanes)
    return Measured(drawn.wall_seconds, ring_s, busy / ring_s, simulate(schedule, times).makespan_s)


def ring_seconds(drawn: Timeline) -> float:
    spans = [span for lane in drawn.lanes for span in lane.spans]
    return max(span.end for span in spans) - min(span.start for span in spans)


def check_bytes(single: Path, several: Path) -> None:
    for file in sorted(single.glob("*.safetensors")):
        assert file.read_bytes() == (several / file.name).read_bytes(), f"{file.name} differs"


def show(options: argparse.Namespace, single: list[Measured], several: list[Measured]) -> None:
    def median(runs: list[Measured], field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs)

    print(
        f"{options.num_layers} layers, {options.num_samples} x {options.seq_len} tokens, {options.backend}, one thread each"
    )
    print(f"{'':22}{'1 worker':>10}{f'{options.num_workers} workers':>12}{'ratio':>8}")
    for label, field in (("run, s", "run_s"), ("ring, s", "ring_s"), ("utilisation", "utilisation")):
        one, many = median(single, field), median(several, field)
        print(f"{label:22}{one:10.2f}{many:12.2f}{f'{one / many:.2f}x' if field != 'utilisation' else '':>8}")
    predicted, measured = median(single, "predicted_s"), median(several, "ring_s")
    print(f"{'simulated, s':22}{'':10}{predicted:12.2f}{f'{predicted / measured - 1:+.1%}':>8}")


if __name__ == "__main__":
    sys.exit(main())
