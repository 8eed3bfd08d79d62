"""awqdist against llm-compressor 0.14, whole process to whole process, on the same model, tokens, machine and threads.

    python tests/benchmarks/bench_llm_compressor.py --peer-python PEER/bin/python --model DIR \\
        --calibration TEXT --num-samples 64 --seq-len 256 --eval TEXT
    python tests/benchmarks/bench_llm_compressor.py --peer-python PEER/bin/python --random-llama \\
        --calibration TEXT --num-samples 32 --seq-len 256

The peer lives in an environment of its own, since it pins other versions than we do; `--peer-python` or the variable
AWQDIST_PEER_PYTHON names its interpreter. Nothing is installed: without the peer the benchmark says so and ends well.

Both take turns, so that a machine that warms up or gets busy hurts both, and write to fresh folders. The figures:
- whole process: from start to exit, imports included; what a user waits for.
- quantization alone: the peer's `oneshot` call; ours the whole run, reading and writing included.
- over the floor: quantization alone / (one read of the weights + one forward pass of the tokens + one write), the floor
  as awqdist measured it in the same run.
- one forward pass: a process that imports torch and transformers, loads the model and runs the tokens through it, and no more.

Run it on an idle machine: two processes of two threads on two cores slow each other down tenfold.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("llm_compressor_driver.py")
FORWARD_DRIVER = Path(__file__).with_name("forward_driver.py")
PEER_VERSION = "0.14"


@dataclass(frozen=True, slots=True)
class Job:
    """What both quantize."""

    model: Path
    calibration: Path
    num_samples: int
    seq_len: int
    recipe: str  # ours; the peer runs AWQ with `peer_rounding`
    peer_rounding: str
    peer_python: str
    threads: int


@dataclass(slots=True)
class Times:
    """Seconds of each repeat of one side."""

    process_s: list[float] = field(default_factory=list)
    quantize_s: list[float] = field(default_factory=list)
    floor_s: list[float] = field(default_factory=list)  # ours only
    forward_s: list[float] = field(default_factory=list)  # the process of one forward pass, with our Python


def main() -> int:
    options = parse(sys.argv[1:])
    reason = why_no_peer(options.peer_python)
    if reason:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="awqdist-bench-") as name:
        scratch = Path(name)
        if options.random_llama:
            options.model = write_random_llama(scratch / "random-llama", options.calibration)
        job = Job(**{option: getattr(options, option) for option in Job.__slots__})
        tokens = write_tokens(job, scratch / "tokens.json")
        print(describe(job))
        peer, ours = Times(), Times()
        for repeat in range(options.repeats):
            run_peer(job, tokens, scratch / f"peer-{repeat}", peer)
            run_ours(job, scratch / f"ours-{repeat}", ours)
            command = [sys.executable, str(FORWARD_DRIVER), str(job.model), str(tokens)]
            ours.forward_s.append(run(command, job.threads)[0])
        rows = time_rows(ours, peer)
        if options.eval:
            rows += quality_rows(job, options.eval, scratch / "ours-0", scratch / "peer-0")
        print_table(rows)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    peer = os.environ.get("AWQDIST_PEER_PYTHON")
    parser.add_argument("--peer-python", default=peer, help="Python with llm-compressor")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="folder of the model")
    model.add_argument("--random-llama", action="store_true", help="a random bf16 Llama of 4 layers, hidden 1024")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--recipe", default="awq", help="ours: preset or file (default: awq)")
    parser.add_argument("--peer-rounding", choices=("nearest", "gptq"), default="nearest", help="the peer's, after AWQ")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="the table shows medians")
    parser.add_argument("--eval", type=Path, help="text file: also print KL and perplexity of both outputs")
    return parser.parse_args(arguments)


def why_no_peer(python: str | None) -> str | None:
    """Why llm-compressor cannot be run, or None if it can."""
    if not python:
        return "no peer; name the Python of an environment with llm-compressor by --peer-python or AWQDIST_PEER_PYTHON"
    ask = "import importlib.metadata as m; print(m.version('llmcompressor'))"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"the peer's Python {python} cannot be run: {error.strerror}"
    if answer.returncode:
        return f"the peer's Python {python} has no llmcompressor"
    version = answer.stdout.strip()
    return None if version.startswith(PEER_VERSION + ".") else f"the peer is {version}, not {PEER_VERSION}"


def write_tokenizer(folder: Path, text: Path) -> None:
    """A tokenizer of 4096 entries, trained on the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained, lines = ByteLevelBPETokenizer(), text.read_text(encoding="utf-8").splitlines()
    trained.train_from_iterator(lines, vocab_size=4096, special_tokens=["<s>", "</s>"], show_progress=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)


def write_random_llama(folder: Path, text: Path, num_layers: int = 4) -> Path:
    """A random Llama in bf16, with a tokenizer trained on the text."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support`
    from support.tiny_llama import write_llama

    write_tokenizer(folder, text)
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    write_llama(folder, bos_token_id=0, eos_token_id=1, **sizes, **heads)
    return folder


def write_tokens(job: Job, file: Path) -> Path:
    """The samples that awqdist will cut from the text by itself, as token ids for the peer."""
    from transformers import AutoTokenizer

    from awqdist.calibration.text import load_calibration

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    samples = load_calibration(job.calibration, tokenizer, job.num_samples, job.seq_len)
    file.write_text(json.dumps(samples.tolist()))
    return file


def run_peer(job: Job, tokens: Path, output: Path, times: Times, limit_s: float | None = None) -> None:
    command = [job.peer_python, str(DRIVER), str(job.model), str(output), str(tokens), job.peer_rounding]
    seconds, lines = run(command, job.threads, limit_s)
    times.process_s.append(seconds)
    times.quantize_s.append(json.loads(lines[-1])["quantize"])
    print(f"llm-compressor {seconds:.1f} s", flush=True)


def run_ours(job: Job, output: Path, times: Times) -> None:
    command = [sys.executable, "-m", "awqdist", "quantize", str(job.model), str(output), "--recipe", job.recipe]
    command += ["--calibration", str(job.calibration), "--num-samples", str(job.num_samples)]
    command += ["--seq-len", str(job.seq_len), "--progress", "json"]
    seconds, lines = run(command, job.threads)
    events = {event["event"]: event for event in (json.loads(line) for line in lines if line.startswith("{"))}
    expected = job.num_samples * job.seq_len
    if events["RunStarted"]["num_tokens"] != expected:
        raise SystemExit(f"awqdist read {events['RunStarted']['num_tokens']} tokens, the peer {expected}")
    times.process_s.append(seconds)
    times.quantize_s.append(events["RunFinished"]["seconds"])
    times.floor_s.append(events["RunFinished"]["floor_seconds"])
    print(f"awqdist {seconds:.1f} s", flush=True)


def run(command: Sequence[str], threads: int, limit_s: float | None = None) -> tuple[float, list[str]]:
    """Seconds from start to exit, and the lines of stdout. Ends the benchmark if the command fails. Raises TimeoutExpired."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s)
    seconds = time.perf_counter() - started
    if finished.returncode:
        tail = "\n".join(finished.stderr.splitlines()[-15:])
        raise SystemExit(f"failed with status {finished.returncode}: {' '.join(command)}\n{tail}")
    return seconds, finished.stdout.splitlines()


def time_rows(ours: Times, peer: Times) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what, awqdist, llm-compressor, how many times faster."""
    floor = statistics.median(ours.floor_s)
    rows = []
    for name, own, other in (
        ("whole process, s", ours.process_s, peer.process_s),
        ("quantization alone, s", ours.quantize_s, peer.quantize_s),
        ("one forward pass | the peer's process, s", ours.forward_s, peer.process_s),
    ):
        a, b = statistics.median(own), statistics.median(other)
        rows.append((name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}x"))
    alone = [statistics.median(times.quantize_s) / floor for times in (ours, peer)]
    rows.append((f"over the floor of {floor:.2f} s", f"{alone[0]:.1f}x", f"{alone[1]:.1f}x", ""))
    return rows


def quality_rows(job: Job, text: Path, ours: Path, peer: Path) -> list[tuple[str, str, str, str]]:
    from awqdist.eval.evaluate import evaluate

    own, other = (evaluate(str(output), text, against=str(job.model)) for output in (ours, peer))
    assert own.kl is not None and other.kl is not None  # noqa: PT018
    return [
        ("KL(float || quantized)", f"{own.kl:.6f}", f"{other.kl:.6f}", f"{other.kl / own.kl:.1f}x"),
        (f"perplexity, float {own.against_perplexity:.2f}", f"{own.perplexity:.2f}", f"{other.perplexity:.2f}", ""),
    ]


def describe(job: Job) -> str:
    import torch

    load = os.getloadavg()[0]
    busy = "" if load < 0.5 else "  <- not idle: figures are worth little"
    return (
        f"{job.model.name}, {job.num_samples} x {job.seq_len} tokens; awqdist recipe {job.recipe}, "
        f"peer AWQ with rounding {job.peer_rounding}\n"
        f"{platform.machine()}, {os.cpu_count()} cores, {job.threads} threads, torch {torch.__version__}, "
        f"load {load:.1f}{busy}"
    )


def print_table(rows: list[tuple[Any, ...]]) -> None:
    table = [("", "awqdist", "llm-compressor", "ratio"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    print()
    for row in table:
        print(
            row[0].ljust(widths[0]), *(cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True))
        )


if __name__ == "__main__":
    sys.exit(main())
