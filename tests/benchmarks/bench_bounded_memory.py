"""Quantizes a model of several GB under a hard memory limit far below its size, and compares the run with what `plan` predicted.

    python tests/benchmarks/bench_bounded_memory.py --calibration TEXT --limit 1.5GB --offload disk
    python tests/benchmarks/bench_bounded_memory.py --calibration TEXT --config config.json --num-samples 8 --seq-len 64 --verify

Writes a model with random bf16 weights, tensor by tensor and shard by shard: a Llama of 6 GB (hidden 2048, 58 layers), or that of
`--config`, stored as its configuration says. Plans the run, then runs it and samples its memory every second.

The limit is RLIMIT_DATA: the kernel refuses private memory beyond it, touched or not, so a process that needs more dies. Pages of files
do not count: the code of libraries is part of the resident memory shown here, and the cached part of the model is shown separately
(`fincore`). Where memory cgroups are available, they limit both: `systemd-run --scope -p MemoryMax=1.5G python …` around the command.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from awqdist.checkpoint.writer import LazyTensor, lazy_tensor, stream_safetensors, write_json
from awqdist.model.names import DiskTensor, disk_layout
from awqdist.model.skeleton import build_model, read_config
from awqdist.run.events import SourceRead, log_file, read_log
from awqdist.units import parse_bytes

_TENTHS = 10


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 58,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """Figures of /proc/PID/status, in bytes. resident: in physical memory; data: what the limit applies to."""

    second: float
    resident: int
    anonymous: int
    data: int


def main() -> int:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="awqdist-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        model = options.model or write_model(scratch / "model", options)
        files = sorted(model.glob("*.safetensors"))
        print(f"model: {sum(f.stat().st_size for f in files) / 1e9:.2f} GB in {len(files)} files")
        for level in options.offload:
            predicted = plan(options, model, level)
            measure(options, model, scratch / f"output-{level}", level, predicted)
            shutil.rmtree(scratch / f"output-{level}", ignore_errors=True)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--model", type=Path, help="use this model instead of a random one")
    parser.add_argument("--limit", type=parse_bytes, default=parse_bytes("1.5GB"), help="in bytes; 0 for no limit")
    parser.add_argument("--offload", nargs="+", default=["disk"], choices=("cpu", "disk", "nvme"))
    parser.add_argument("--config", type=Path, help="config.json of the random model")
    parser.add_argument("--num-layers", type=int, help="override the number of layers")
    parser.add_argument("--verify", action="store_true", help="verify the result against the model")
    parser.add_argument("--shard", type=parse_bytes, default=parse_bytes("2GB"))
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--scratch", type=Path, help="folder with enough space for the model and its output")
    parser.add_argument(
        "--further", nargs="*", default=[], help="further options of `quantize`, without dashes: name=value"
    )
    return parser.parse_args(arguments)


def write_model(folder: Path, options: argparse.Namespace) -> Path:
    """Writes a random model with a tokenizer trained on the text. At most one tensor is in memory."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    fields = json.loads(options.config.read_text()) if options.config else LLAMA
    if options.num_layers:
        fields["num_hidden_layers"] = options.num_layers
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**fields, "bos_token_id": 0, "eos_token_id": 1}))
    tokenizer = ByteLevelBPETokenizer()
    lines = options.calibration.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(
        lines, vocab_size=fields["vocab_size"], special_tokens=["<s>", "</s>"], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    layout = disk_layout(build_model(read_config(folder)))
    write_shards(folder, [random_tensor(name, layout[name]) for name in layout], options.shard)
    return folder


def random_tensor(name: str, stored: DiskTensor) -> LazyTensor:
    def values() -> torch.Tensor:
        tensor = torch.empty(stored.shape).normal_()
        if len(stored.shape) > 1:
            scale = 3.0 if name.endswith("gate.weight") else 1.0  # clear routing decisions
            tensor *= 1.0 if "embed" in name else scale * stored.shape[-1] ** -0.5
        else:
            tensor = tensor.mul_(0.1).add_(1.0 if "norm" in name else 0.0)
        return tensor.to(stored.dtype)

    like = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    return lazy_tensor(name, like, values)


def write_shards(folder: Path, tensors: list[LazyTensor], shard_bytes: int) -> None:
    shards: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), file.name))
        stream_safetensors(file, shard)
        drop_cache(file)
    total = sum(tensor.num_bytes for tensor in tensors)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def drop_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached_bytes(files: list[Path]) -> int:
    """Returns how many bytes of the files are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    return sum(map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


def calibration(options: argparse.Namespace) -> list[str]:
    return ["--num-samples", str(options.num_samples), "--seq-len", str(options.seq_len), "--device", "cpu"]


def plan(options: argparse.Namespace, model: Path, level: str) -> dict[str, int]:
    command = [sys.executable, "-m", "awqdist", "plan", str(model), "--json", "--offload", level, *calibration(options)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    estimate: dict[str, int] = found.get("estimate", found)
    return estimate


def measure(options: argparse.Namespace, model: Path, output: Path, level: str, predicted: dict[str, int]) -> None:
    """Runs under the limit and prints the measurements."""
    command = [sys.executable, "-m", "awqdist", "quantize", str(model), str(output), "--offload", level]
    command += [*calibration(options), "--calibration", str(options.calibration), "--threads", "1"]
    command += ["--progress", "plain"]

    def limit() -> None:
        if options.limit:
            resource.setrlimit(resource.RLIMIT_DATA, (options.limit, options.limit))

    start = time.monotonic()
    with (output.parent / "log.txt").open("w+") as log:
        child = subprocess.Popen(command, preexec_fn=limit, stdout=log, stderr=subprocess.STDOUT)
        samples, peak = watch(child, start)
        log.seek(0)
        print(*log.read().splitlines()[-4:], sep="\n")
    print(
        f"\n--offload {level}, limit {options.limit / 1e9:.2f} GB: exit status {child.returncode}, {samples[-1].second:.0f} s"
    )
    show_samples(samples)
    print(f"of the model in the system's cache: {cached_bytes(sorted(model.glob('*.safetensors'))) / 1e6:.1f} MB")
    if child.returncode == 0:
        compare(output, predicted, peak)
        if options.verify:
            verified = [sys.executable, "-m", "awqdist", "verify", str(output), "--source", str(model)]
            print(subprocess.run(verified, check=False, capture_output=True, text=True).stdout)


def watch(child: subprocess.Popen[bytes], start: float) -> tuple[list[Sample], int]:
    """Returns a sample per second, and the peak of resident memory in bytes."""
    samples, peak = [Sample(0, 0, 0, 0)], 0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            break
        sizes = {
            key: int(rest.split()[0]) * 1024 for key, rest in (line.split(":", 1) for line in lines) if "kB" in rest
        }
        if "VmRSS" in sizes:
            peak = max(peak, sizes["VmHWM"])
            samples.append(Sample(time.monotonic() - start, sizes["VmRSS"], sizes["RssAnon"], sizes["VmData"]))
        time.sleep(1)
    child.wait()
    return samples[1:], peak


def show_samples(samples: list[Sample]) -> None:
    print(f"{'part of the run':>16}{'resident, mean':>16}{'most':>8}{'anonymous':>11}{'data':>8}   MB")
    for tenth in range(_TENTHS):
        part = samples[len(samples) * tenth // _TENTHS : len(samples) * (tenth + 1) // _TENTHS]
        if part:
            mean = sum(s.resident for s in part) / len(part)
            most = [max(getattr(s, field) for s in part) for field in ("resident", "anonymous", "data")]
            figures = [f"{size / 1e6:.0f}" for size in (mean, *most)]
            print(f"{f'{tenth + 1}0 %':>16}{figures[0]:>16}{figures[1]:>8}{figures[2]:>11}{figures[3]:>8}")


def compare(output: Path, predicted: dict[str, int], peak: int) -> None:
    events = (message.event for message in read_log(log_file(output)).messages)
    read = sum(event.num_bytes for event in events if isinstance(event, SourceRead))
    written = json.loads((output / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    print(f"{'MB':>16}{'predicted':>12}{'measured':>12}")
    for label, key, found in (
        ("peak of memory", "peak_host_bytes", peak),
        ("read", "read_bytes", read),
        ("written", "written_bytes", written),
    ):
        print(f"{label:>16}{predicted[key] / 1e6:12.1f}{found / 1e6:12.1f}{predicted[key] / found - 1:+9.1%}")


if __name__ == "__main__":
    sys.exit(main())
