"""Quantizes a model with llm-compressor, as its own examples do; run by `bench_llm_compressor.py` in the peer's Python.

    python llm_compressor_driver.py MODEL OUTPUT TOKENS.json {nearest,gptq}

Needs nothing of awqdist. TOKENS.json is a list of token-id lists of one length. The last line on stdout is a JSON
object of seconds: import, load, quantize (the `oneshot` call alone), save.
"""

import json
import sys
import time
from pathlib import Path


def main(model_folder: str, output: str, tokens_file: str, rounding: str) -> None:
    marks = [time.perf_counter()]
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # 0.14 pins memory always, which fails without an accelerator
        IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None

    marks.append(time.perf_counter())
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    samples = json.loads(Path(tokens_file).read_text())
    rows = {"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]}

    marks.append(time.perf_counter())
    scheme = {"ignore": ["lm_head"], "scheme": "W4A16_ASYM", "targets": ["Linear"]}
    last = GPTQModifier(**scheme) if rounding == "gptq" else QuantizationModifier(**scheme)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[AWQModifier(), last],
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
    )

    marks.append(time.perf_counter())
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    marks.append(time.perf_counter())
    stages = ("import", "load", "quantize", "save")
    print(json.dumps({stage: marks[i + 1] - marks[i] for i, stage in enumerate(stages)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
