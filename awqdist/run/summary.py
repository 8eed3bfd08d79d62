"""The summary of a run, from its job and its journal."""

from __future__ import annotations

from torch import Tensor

from awqdist.layer.records import LayerRecord, RunSummary
from awqdist.run.expert_tokens import FEW_TOKENS, BlockTokens, tokens_of_experts
from awqdist.run.job import Job
from awqdist.run.journal import JournalEntries


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
            f"{job.plan.architecture} is not in the registry: its mappings were inferred from its structure and verified;"
            " `awqdist mappings MODEL --as-recipe` prints them as a recipe to keep"
        )
    found += _source_warnings(job)
    nonfinite = sum(mapping.num_nonfinite_candidates for record in layers for mapping in record.mappings)
    if nonfinite:
        found.append(f"{nonfinite} candidates of the scale searches were not finite and were left out")
    found += [_few_tokens(block) for block in tokens_of_experts(layers) if block.few_token_experts]
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
            packed.setdefault(entry.quantized.format, []).append(entry.dtype)
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


def _few_tokens(block: BlockTokens) -> str:
    """Returns a warning that names the experts with few calibration tokens."""
    return (
        f"{block.block}: {len(block.few_token_experts)} of {len(block.tokens)} experts received fewer than {FEW_TOKENS} tokens:"
        f" {block.named_few(8)}; they are fitted to all tokens of the layer instead; use more calibration text, or text"
        " that resembles your real traffic"
    )
