"""The summary of a run, from its job and its journal."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from awqdist.run.job import Job
from awqdist.run.journal import JournalEntries
from awqdist.run.records import LayerRecord, RunSummary

FEW_TOKENS = 64


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
        source_bytes=job.index.stored_bytes,
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
    found += _source_warnings(job)
    nonfinite = sum(mapping.num_nonfinite_candidates for record in layers for mapping in record.mappings)
    if nonfinite:
        found.append(f"{nonfinite} candidates of the scale searches were not finite and were left out")
    found += [warning for record in layers for warning in _starved(record)]
    for record in layers:
        for linear in record.linears:
            if linear.num_dead_inputs:
                found.append(f"{linear.name}: {linear.num_dead_inputs} inputs were zero on the whole calibration text")
            if linear.relative_error > linear.relative_error_nearest:
                found.append(f"{linear.name}: its own output error is above that of rounding to nearest")
    return tuple(found)


def _source_warnings(job: Job) -> list[str]:
    """What is in the output otherwise than in the source, and what is in it although the model knows nothing of it."""
    found = []
    entries, unknown = job.index.entries, job.skeleton.unknown
    packed: dict[str, list[str]] = {}  # kind -> dtypes
    for entry in entries.values():
        if entry.quantized:
            packed.setdefault(entry.quantized.kind, []).append(entry.dtype)
    for kind, became in packed.items():
        dtypes = ", ".join(sorted(set(became)))
        found.append(f"{len(became)} {kind} weights of the source were dequantized to {dtypes} as they were read")
    if job.index.left_out:
        names = _some(job.index.left_out)
        found.append(f"{len(job.index.left_out)} scales of the source's activations and caches were left out: {names}")
    if unknown:
        widened = sum(entries[name].quantized is not None for name in unknown)
        how = f"were copied, {widened} of them dequantized" if widened else "were copied unchanged"
        found.append(f"{len(unknown)} tensors that the model does not have {how}: {_some(unknown)}")
    return found


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _starved(record: LayerRecord) -> Iterator[str]:
    """Names the experts that the calibration text hardly reached: what they are fitted to is mostly the prior."""
    tokens: dict[str, dict[int, int]] = {}  # by the block's module, then by expert
    for site in record.sites:
        if site.expert is not None:
            block = site.linears[0].rpartition(f".{site.expert}.")[0]
            tokens.setdefault(block, {})[site.expert] = site.num_tokens
    for block, by_expert in tokens.items():
        few = {expert: count for expert, count in sorted(by_expert.items()) if count < FEW_TOKENS}
        if few:
            named = ", ".join(f"{expert} ({count})" for expert, count in list(few.items())[:8])
            more = f" and {len(few) - 8} more" if len(few) > 8 else ""
            yield (
                f"{block}: {len(few)} of {len(by_expert)} experts were sent fewer than {FEW_TOKENS} tokens: {named}{more}; they are"
                " fitted to all tokens of the layer instead; calibrate on more text, or on text like that which they are for"
            )
