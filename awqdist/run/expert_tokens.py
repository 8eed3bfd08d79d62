"""Counts the calibration tokens that each expert received, from the record of its layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from awqdist.layer.records import LayerRecord

FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class BlockTokens:
    """block: on-disk name of the module that holds the experts; tokens: by expert."""

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
