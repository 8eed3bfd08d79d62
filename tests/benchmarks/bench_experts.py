"""awqdist against llm-compressor 0.14 on a mixture of experts with random weights: Qwen3-MoE, hidden 1024, 128 experts of which 8 read a
token, intermediate 384, 2 layers.

    python tests/benchmarks/bench_experts.py --peer-python PEER/bin/python --calibration TEXT

Plain AWQ on both sides, one run each, whole process to whole process; ours comes first. The peer takes every token through every expert
once per candidate: minutes. After `--peer-limit-s` it is stopped, and the ratios are what it is slower at least. Without the peer the
benchmark says so and ends well. Run it on an idle machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_llm_compressor import Job, Times, describe, run_ours, run_peer, why_no_peer, write_tokenizer, write_tokens


def main() -> int:
    options = parse(sys.argv[1:])
    reason = why_no_peer(options.peer_python)
    if reason:
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="awqdist-bench-") as name:
        scratch = Path(name)
        model = write_random_qwen3_moe(scratch / "random-qwen3-moe", options.calibration, options.num_layers)
        job = Job(
            model=model,
            calibration=options.calibration,
            num_samples=options.num_samples,
            seq_len=options.seq_len,
            recipe="awq",
            peer_rounding="nearest",
            peer_python=options.peer_python,
            threads=options.threads,
        )
        tokens = write_tokens(job, scratch / "tokens.json")
        print(describe(job), flush=True)
        ours, peer = Times(), Times()
        run_ours(job, scratch / "ours", ours)
        try:
            run_peer(job, tokens, scratch / "peer", peer, limit_s=options.peer_limit_s)
        except subprocess.TimeoutExpired:
            print(f"llm-compressor was stopped after {options.peer_limit_s} s")
            print(f"whole process: more than {options.peer_limit_s / ours.process_s[0]:.1f}x")
            return 0
        print(f"whole process: {peer.process_s[0] / ours.process_s[0]:.1f}x")
        print(f"quantization alone: {peer.quantize_s[0] / ours.quantize_s[0]:.1f}x ({ours.quantize_s[0]:.1f} s)")
        print(f"over the floor of {ours.floor_s[0]:.1f} s: {ours.quantize_s[0] / ours.floor_s[0]:.1f}x")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    peer = os.environ.get("AWQDIST_PEER_PYTHON")
    parser.add_argument("--peer-python", default=peer, help="Python with llm-compressor")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-limit-s", type=float, default=3600, help="stop the peer after this many seconds")
    return parser.parse_args(arguments)


def write_random_qwen3_moe(folder: Path, text: Path, num_layers: int) -> Path:
    """A random Qwen3-MoE in bf16, with a tokenizer trained on the text."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    write_tokenizer(folder, text)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=384,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
