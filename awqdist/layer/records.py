"""What a finished layer leaves behind besides its tensors: the lines of the journal and the data of the report.

All records are frozen, hold plain Python values only and go to JSON and back without loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

STAGES = ("read", "forward", "search", "round", "check", "write")
FEW_TOKENS = 64  # of an expert: below, it is mostly fitted to the tokens of the whole layer


@dataclass(frozen=True, slots=True)
class MappingRecord:
    """The outcome of one scale search. Errors are ‖X·Dᵀ‖²_F over the calibration tokens, summed over `balance_layers`; under GPTQ what
    its compensation is expected to leave of them. Estimates where inputs are known by a sketch: of experts, and wide ones of plain AWQ."""

    smooth_layer: str
    balance_layers: tuple[str, ...]
    ratio: float | None  # None: the identity was best
    duo_scaling: bool
    error_before: float  # round-to-nearest without smoothing
    error_after: float  # round-to-nearest with the chosen scales
    num_nonfinite_candidates: int


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """The outcome of one quantized linear. Errors are relative, ‖X·Dᵀ‖²_F / ‖X·Wᵀ‖²_F, to about three digits; estimates, to about a
    tenth, where the input is known by a sketch."""

    name: str
    shape: tuple[int, int]  # (O, I)
    num_bits: int
    group_size: int
    symmetric: bool
    relative_error_nearest: float  # round-to-nearest without smoothing of its inputs
    relative_error: float  # what was written; both of what counts where outputs are compensated (`linear_errors`)
    clipped_share: float  # share of groups whose range was shrunk
    num_dead_inputs: int  # input channels that were always zero


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """The activations that one or more linears read."""

    linears: tuple[str, ...]
    num_tokens: int
    max_over_median: float  # largest mean |x| of a channel over the median channel's: how strong the outliers are
    expert: int | None = None  # whose rows these are; None: all tokens of the layer


@dataclass(frozen=True, slots=True)
class SkippedMapping:
    """A mapping that was not applied in a layer, and why."""

    mapping: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One journal line: everything known of a finished decoder layer."""

    layer: int
    file: str
    num_bytes: int
    sha256: str
    source_crc32: int
    smoothing_error: float  # relative change of the layer's output by smoothing alone, in float32
    mappings: tuple[MappingRecord, ...]
    linears: tuple[LinearRecord, ...]
    sites: tuple[SiteRecord, ...]
    skipped: tuple[SkippedMapping, ...]
    seconds: dict[str, float]  # by stage of STAGES
    peak_memory_bytes: int
    source_sample: int = (
        0  # checksum of a few bytes of each of the layer's tensors: read at no cost when the run is resumed
    )


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A whole run, for the table at its end and for the report."""

    model: str
    output: str
    architecture: str
    device: str
    recipe: str  # YAML
    num_calibration_samples: int
    sequence_length: int
    num_workers: int
    layers: tuple[LayerRecord, ...]
    seconds: dict[str, float]  # whole stages outside the layers: "start", "embed", "merge"; and "total"
    source_bytes: int  # on disk
    output_bytes: int
    ignored: tuple[str, ...]  # linears left in full precision
    warnings: tuple[str, ...]
    bytes_read: dict[int | None, int] = field(
        default_factory=dict
    )  # of the source, by worker, all runs together; None: by the leader, which copies what is in no layer

    @property
    def floor_seconds(self) -> float:
        """Time that no method can do without: read the weights once, one forward pass, one write; shared by all workers."""
        stages = ("read", "forward", "write")
        return sum(record.seconds.get(stage, 0.0) for record in self.layers for stage in stages) / self.num_workers


@dataclass(frozen=True, slots=True)
class BlockTokens:
    """Calibration tokens of experts. block: on-disk name of the module that holds them; tokens: by expert."""

    layer: int
    block: str
    tokens: dict[int, int]

    @property
    def fewest(self) -> int:
        """Returns the tokens of the least used expert."""
        return min(self.tokens.values())

    @property
    def median(self) -> float:
        """Returns the median over the experts."""
        return median(self.tokens.values())

    @property
    def most(self) -> int:
        """Returns the tokens of the most used expert."""
        return max(self.tokens.values())

    @property
    def few_token_experts(self) -> dict[int, int]:
        """Returns the experts with fewer than FEW_TOKENS, and their tokens. They are mostly fitted to the tokens of the whole layer."""
        return {expert: count for expert, count in sorted(self.tokens.items()) if count < FEW_TOKENS}

    def named_few(self, at_most: int) -> str:
        """Returns `2 (0), 3 (17) and 4 more`."""
        few = self.few_token_experts
        named = ", ".join(f"{expert} ({count})" for expert, count in list(few.items())[:at_most])
        return named + (f" and {len(few) - at_most} more" if len(few) > at_most else "")


def tokens_of_experts(layers: Iterable[LayerRecord]) -> list[BlockTokens]:
    """Returns the tokens of every block with experts, in the order of the layers. All linears of an expert see the same tokens."""
    found = []
    for record in layers:
        blocks: dict[str, dict[int, int]] = {}
        for site in record.sites:
            if site.expert is not None:
                block = site.linears[0].rpartition(f".{site.expert}.")[0]
                blocks.setdefault(block, {})[site.expert] = site.num_tokens
        found += [BlockTokens(record.layer, block, tokens) for block, tokens in blocks.items()]
    return found
