"""Spreads a model that is larger than one GPU over the ranks of a launcher, by DeepSpeed's ZeRO-3 inference.

Every rank holds a part of each weight, and a whole module while it computes. The windows are shared out among the ranks, which all take
the same number of steps because each step needs all of them. The first rank reads the weights a decoder layer at a time and sends them
module by module; transformers' own loading under ZeRO-3 would hold the whole model in the memory of each process.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from awqdist.checkpoint.sources import model_folder
from awqdist.errors import AwqdistError, CheckpointError
from awqdist.eval.weights import FloatWeights
from awqdist.model.experts import fuse_experts
from awqdist.model.skeleton import Skeleton, build_skeleton, load_config, read_config
from awqdist.run.device import launcher_value

_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0},
}


class Ranks:
    """Tells which of the ranks that evaluate one model this process is. By default it is the only one."""

    def __init__(self, number: int = 0, count: int = 1) -> None:
        self.number, self.count = number, count

    def totals(self, values: list[float]) -> list[float]:
        """Returns each value summed over all ranks."""
        if self.count == 1:
            return values
        on = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=on)
        torch.distributed.all_reduce(sums)
        return [float(value) for value in sums]


def join_ranks() -> Ranks:
    """Joins the launcher's ranks. Raises AwqdistError without a launcher, or without DeepSpeed."""
    rank, size = launcher_value("RANK"), launcher_value("WORLD_SIZE")
    if rank is None or size is None:
        raise AwqdistError(
            "--shard zero3 needs several processes: torchrun --nproc-per-node N -m awqdist eval … --shard zero3"
        )
    with _quiet() as deepspeed:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(launcher_value("LOCAL_RANK") or 0))
        else:  # it would compile an operator for sums in shared memory, a minute long, that nothing here needs
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return Ranks(int(rank), int(size))


def load_sharded(name: str, ranks: Ranks) -> Any:
    """Returns the model in float32, its weights spread over the ranks, ready to run. Raises CheckpointError or ModelError."""
    folder = model_folder(name)
    found = getattr(load_config(folder, local_files_only=True), "quantization_config", None)
    weights = FloatWeights(folder, found if isinstance(found, dict) else None)
    config = read_config(folder)
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = torch.float32
    skeleton = build_skeleton(config, weights.names)
    skeleton.model.tie_weights()  # on meta each name has a parameter of its own
    with _quiet() as deepspeed, torch.no_grad():
        for module, prefix, tensors in _pieces(skeleton, weights, is_first=ranks.number == 0):
            _fill(module, prefix, tensors, deepspeed)
        engine = deepspeed.initialize(model=skeleton.model, config=_CONFIG)[0]
    engine.eval()
    return engine


def _pieces(
    skeleton: Skeleton, weights: FloatWeights, *, is_first: bool
) -> Iterator[tuple[nn.Module, str, Mapping[str, Tensor]]]:
    """Yields the decoder layers, then the whole model: each with its prefix and its tensors by their names in it. Only the first rank
    reads parameters; all read buffers."""
    state = skeleton.model.state_dict()
    buffers = {name for name, _ in skeleton.model.named_buffers()}

    def read(names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
        return {n: weights.read(disk) for n, disk in names.items() if is_first or prefix + n in buffers}

    for number, layer in enumerate(skeleton.layers):
        prefix = f"{skeleton.prefix}.{number}."
        tensors = read(skeleton.layer_names(number), prefix)
        yield layer, prefix, fuse_experts(skeleton.layer_experts(number), tensors) if is_first else tensors
    outside = {n: disk for n, disk in skeleton.on_disk.items() if not n.startswith(f"{skeleton.prefix}.")}
    tied = skeleton.model.all_tied_weights_keys
    tensors = read({n: disk for n, disk in outside.items() if n in state and n not in tied}, "")
    yield skeleton.model, "", tensors


def _fill(root: nn.Module, prefix: str, tensors: Mapping[str, Tensor], deepspeed: Any) -> None:
    """Gives values to the parameters of `root` that are still on meta, and spreads them over the ranks."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter has several names, of which one may give its value
    named = root.named_parameters(remove_duplicate=False)
    values = {parameter: tensors[name] for name, parameter in named if name in tensors}
    for path, module in reversed(list(root.named_modules())):
        start = f"{path}." if path else ""
        for name, buffer in module._buffers.items():
            if buffer is not None and start + name in tensors:
                module._buffers[name] = tensors[start + name].to(buffer.dtype)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in filled:
                value = values.get(parameter)
                shape = parameter.shape
                if value is not None and value.shape != shape:
                    raise CheckpointError(
                        f"{prefix}{start}{name} has shape {tuple(value.shape)}, config.json asks for {tuple(shape)}"
                    )
                value = torch.empty(shape) if value is None else value.float().contiguous()
                filled[parameter] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = filled[parameter]
        if module._parameters:
            deepspeed.zero.Init(module=module, config_dict_or_path=_CONFIG)


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yields DeepSpeed, whose prints go to stderr meanwhile. Raises AwqdistError if it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    with redirect_stdout(sys.stderr):
        try:
            import deepspeed
        except ImportError as error:
            raise AwqdistError(f"--shard zero3 needs DeepSpeed, which does not import: {error}") from None
        yield deepspeed
