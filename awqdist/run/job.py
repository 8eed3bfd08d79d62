"""A run before its first layer: source opened and checked, plan made. All refusals of a source that need no tensor happen here."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import PretrainedConfig

from awqdist.checkpoint.index import DTYPES, CheckpointIndex
from awqdist.checkpoint.reader import sample_checksum
from awqdist.checkpoint.sources import read_source
from awqdist.errors import AwqdistError, CheckpointError, OutputError
from awqdist.export.formats import Format, output_format
from awqdist.layer.records import LayerRecord
from awqdist.model.skeleton import Skeleton, build_skeleton, read_config
from awqdist.recipe import Recipe
from awqdist.run.device import choose_device, compute_dtype
from awqdist.run.journal import read_journal
from awqdist.run.layer_plans import Plan, make_plan
from awqdist.settings import RunSettings

_COMPUTED = ("BF16", "F16", "F32")
_LIBRARIES = ("awqdist", "torch", "transformers", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a worker needs to know of a run."""

    plan: Plan
    skeleton: Skeleton
    index: CheckpointIndex
    recipe: Recipe
    settings: RunSettings
    format: Format
    device: torch.device

    @property
    def compensates_outputs(self) -> bool:
        """Whether GPTQ rounds something that is written to the residual stream, whose directions lm_head weighs."""
        is_written = any(site.to_residual and site.quantized for task in self.plan.layers for site in task.sites)
        return self.recipe.rounding.method == "gptq" and is_written

    def head_names(self) -> dict[str, str]:
        """Parameter name in the model -> on-disk name of lm_head's weight, where it has to be read and is not that of the embeddings."""
        name = self.skeleton.head_weight
        is_read = self.compensates_outputs and name in self.skeleton.on_disk
        return {name: self.skeleton.on_disk[name]} if is_read else {}

    def shared_names(self) -> list[str]:
        """On-disk names of what every worker reads: what is in no layer of the decoder, and lm_head if it has to be read."""
        return [*self.skeleton.outside_names().values(), *self.head_names().values()]

    def source_sample(self, disk_names: Iterable[str]) -> int:
        """Checksum of a few bytes of each of the tensors."""
        return sample_checksum([self.index.entries[name] for name in sorted(disk_names)])


def prepare(recipe: Recipe, settings: RunSettings) -> Job:
    """Opens the source and plans the run. Raises AwqdistError for whatever is wrong with either; reads headers only."""
    device = choose_device(settings.device)
    check_budget(settings, device)
    output_format(settings.format).check(recipe)
    index = read_source(settings.model)
    skeleton = build_skeleton(_with_dtype(read_config(settings.model), index), index.entries)
    _check_shapes(skeleton, index)
    skeleton, index = _without_aliases(skeleton, index)
    return planned(skeleton, index, recipe, settings, device)


def check_budget(settings: RunSettings, device: torch.device) -> None:
    """Raises AwqdistError for a --gpu-memory that no GPU is there to keep."""
    if settings.gpu_memory is not None and device.type == "cpu":
        raise AwqdistError("--gpu-memory is given, but the layers are worked on by the CPU; give --cpu-memory instead")


def planned(
    skeleton: Skeleton, index: CheckpointIndex, recipe: Recipe, settings: RunSettings, device: torch.device
) -> Job:
    """Plans all layers of an opened source. Raises RecipeError or ModelError for what cannot work."""
    layout = output_format(settings.format)
    plan = make_plan(skeleton, index, recipe)
    layout.check_linears({q.disk_name: q.shape for task in plan.tasks for q in task.quantized})
    return Job(plan, skeleton, index, recipe, settings, layout, device)


def fingerprint(job: Job, samples: Tensor) -> dict[str, str]:
    """Everything that decides the bytes of the result, each under a name that a user understands."""
    return {
        "recipe": job.recipe.to_yaml(),
        "format": job.format.name,
        "source": job.index.fingerprint()[:16],
        "source embeddings": f"{job.source_sample(job.shared_names()):08x}",
        "source config": _hash((job.settings.model / "config.json").read_bytes()),
        "calibration samples": f"{tuple(samples.shape)} {_hash(samples.numpy().tobytes())}",
        "chunk tokens": str(job.settings.chunk_tokens),
        "mappings": _hash(repr([task.mappings for task in job.plan.tasks]).encode()),
        "device": f"{job.device.type} {compute_dtype(job.device, job.skeleton.dtype)}",
        **({"threads": str(job.settings.threads or torch.get_num_threads())} if job.device.type == "cpu" else {}),
        "versions": json.dumps({name: version(name) for name in _LIBRARIES}),
    }


def with_threads(settings: RunSettings, num_cores: int) -> RunSettings:
    """The settings with the number of threads settled: as given, or that of the run that is resumed, or one for each core."""
    if settings.threads is not None:
        return settings
    entries = read_journal(settings.output)
    earlier = entries.fingerprint.get("threads") if entries.layers else None
    return replace(settings, threads=int(earlier) if earlier else num_cores)


def token_chunks(settings: RunSettings, samples: Tensor) -> list[Tensor]:
    """The calibration samples (N, L) in the pieces (B, L) that go through a layer at once."""
    return list(samples.split(max(1, settings.chunk_tokens // samples.shape[1])))


def check_sources(job: Job, finished: Mapping[int, LayerRecord]) -> None:
    """Raises OutputError if a finished layer was made from other weights than the source holds now, as far as samples of them tell."""
    for task in job.plan.tasks:
        if task.index in finished and finished[task.index].source_sample != job.source_sample(task.tensors.values()):
            raise other_weights(job, task.index)


def other_weights(job: Job, layer: int) -> OutputError:
    return OutputError(
        f"layer {layer} of {job.settings.output} was made from other weights than {job.settings.model} holds now;"
        " use another output folder, or remove this one to begin anew"
    )


def _with_dtype(config: PretrainedConfig, index: CheckpointIndex) -> PretrainedConfig:
    """The configuration with the dtype of most of the checkpoint's values, where it names none (openai/gpt-oss)."""
    if config.dtype is None and config.get_text_config(decoder=True).dtype is None:
        sizes: Counter[str] = Counter()
        for entry in index.entries.values():
            sizes[entry.dtype] += entry.num_bytes
        likely = [DTYPES[name] for name, _ in sizes.most_common() if name in _COMPUTED]
        config.dtype = next(iter(likely), None)
    return config


def _check_shapes(skeleton: Skeleton, index: CheckpointIndex) -> None:
    expected = skeleton.shapes()
    for name, disk in skeleton.on_disk.items():
        if index.entries[disk].shape != expected[name]:
            raise CheckpointError(
                f"{index.entries[disk].file}: tensor {disk} has shape {index.entries[disk].shape}, config.json asks for"
                f" {expected[name]}; config.json and weights are not of one model"
            )


def _without_aliases(skeleton: Skeleton, index: CheckpointIndex) -> tuple[Skeleton, CheckpointIndex]:
    """Leaves out tied weights that are the very bytes of another, as torch's pickles name them; safetensors hold each tensor once."""

    def place(disk: str) -> tuple[object, ...]:
        entry = index.entries[disk]
        return entry.file, entry.start, entry.stop, entry.shape, entry.strides

    tied = {
        name: disk
        for name, disk in skeleton.on_disk.items()
        if (source := skeleton.on_disk.get(skeleton.model.all_tied_weights_keys.get(name, ""))) not in (None, disk)
        and place(disk) == place(str(source))
    }
    on_disk = {name: disk for name, disk in skeleton.on_disk.items() if name not in tied}
    entries = {disk: entry for disk, entry in index.entries.items() if disk not in tied.values()}
    return replace(skeleton, on_disk=on_disk), replace(index, entries=entries)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
