"""Reads, once per worker, what weights the errors of outputs written to the residual stream: lm_head and the final norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awqdist.model.structure import final_norm
from awqdist.quant.gptq import OutputOrder, logit_weighting
from awqdist.run.events import Emit, SourceRead
from awqdist.run.job import Job
from awqdist.run.layer_io import check_named, read_named


def output_order(job: Job, samples: Tensor, outside: Mapping[str, Tensor], emit: Emit) -> OutputOrder | None:
    """Returns how GPTQ compensates over outputs that are written to the residual stream, or None where it does not.

    Args:
        job: what is quantized.
        samples: (N, L) int64, the calibration tokens.
        outside: parameters of the decoder that are in no layer, by name.
        emit: is told how much was read.

    Raises:
        CheckpointError: lm_head is missing or damaged.
    """
    if not job.compensates_outputs:
        return None
    names = job.head_names()
    if names:
        tensors, reading = read_named(job, names, lambda: None)
        emit(SourceRead(None, reading.num_bytes))
        check_named(tensors, names, "lm_head")
        head = next(iter(tensors.values())).to(job.device)
    else:
        start = job.skeleton.prefix.rpartition(".")[0]
        tied = job.skeleton.model.all_tied_weights_keys.get(job.skeleton.head_weight, "")
        head = outside.get(tied.removeprefix(f"{start}."), torch.empty(0, 0))
    norm, unit_offset = final_norm(job.skeleton.decoder)
    weight = outside.get(f"{norm}.weight")
    if weight is not None and unit_offset:
        weight = weight.float() + 1
    if head.shape[1] != job.skeleton.model.config.get_text_config(decoder=True).hidden_size:
        return None  # a projection stands between the residual stream and the logits, or there are none
    counts = torch.bincount(samples.flatten(), minlength=head.shape[0]).to(head.device)
    return OutputOrder.from_weighting(logit_weighting(head, counts, weight))
