"""The summary of a run, from its job and its journal."""

from __future__ import annotations

from torch import Tensor

from awqdist.run.job import Job
from awqdist.run.journal import JournalEntries
from awqdist.run.records import LayerRecord, RunSummary


def summarize(
    job: Job,
    entries: JournalEntries,
    samples: Tensor,
    seconds: dict[str, float],
    output_bytes: int,
    num_workers: int,
) -> RunSummary:
    """samples: (N, L); seconds: of the stages outside the layers, "total" among them."""
    layers = tuple(entries.layers[layer] for layer in sorted(entries.layers))
    return RunSummary(
        model=str(job.settings.model),
        output=str(job.settings.output),
        architecture=job.plan.architecture,
        device=str(job.device),
        recipe=job.recipe.to_yaml(),
        num_calibration_samples=samples.shape[0],
        sequence_length=samples.shape[1],
        num_workers=num_workers,
        layers=layers,
        seconds=seconds,
        source_bytes=job.index.num_bytes,
        output_bytes=output_bytes,
        ignored=job.plan.ignored,
        warnings=warnings_of(job, layers),
    )


def warnings_of(job: Job, layers: tuple[LayerRecord, ...]) -> tuple[str, ...]:
    """What a user should know although the run succeeded."""
    found = []
    if job.plan.inferred:
        found.append(
            f"{job.plan.architecture} is not in the registry: its mappings were inferred from its structure and verified"
        )
    if job.skeleton.unknown:
        names = ", ".join(job.skeleton.unknown[:3])
        found.append(
            f"{len(job.skeleton.unknown)} tensors that the model does not have were copied unchanged: {names}, …"
        )
    nonfinite = sum(mapping.num_nonfinite_candidates for record in layers for mapping in record.mappings)
    if nonfinite:
        found.append(f"{nonfinite} candidates of the scale searches were not finite and were left out")
    for record in layers:
        for linear in record.linears:
            if linear.num_dead_inputs:
                found.append(f"{linear.name}: {linear.num_dead_inputs} inputs were zero on the whole calibration text")
            if linear.relative_error > linear.relative_error_nearest:
                found.append(f"{linear.name}: its own output error is above that of rounding to nearest")
    return tuple(found)
