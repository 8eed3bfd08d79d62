"""Statistics of one expert: the rows that it was sent, and a prior for those that were sent few.

With n rows X of its own, and Ḡ the average x·xᵀ of a token of the prior, an expert is searched and rounded under

    Ĝ = XᵀX + k·Ḡ,    k = PRIOR_TOKENS

as if k average tokens had been sent to it beside its own. Divided by n + k this is the weighted mean of its own second moment (weight
n / (n + k)) and of the prior's. So an expert that was sent nothing is fitted to the prior alone, one that was sent thousands of rows is
fitted to them, and nothing in between is singular or falls back to rounding to nearest. The prior of what reads the block's input is
all tokens of the layer; that of an inner linear is a sample of them, sent through this expert.

With `--all-experts` every expert is given all tokens of its block, and there is no prior: what reads the block's input shares its
statistics, and those of inner linears are like any other site's.

Rows are kept up to a cap, in the dtype that they came in; of more, the first stand for all. Gram matrices are made one expert at a time.
Where an error need not be exact none is made, but a CountSketch (`sketch.py`) of the expert's rows and of a sample of the prior's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from awqdist.quant.lending import HOST, HostMemory
from awqdist.quant.precision import exact_for, has_fast_bfloat16
from awqdist.quant.stats import InputStatistics, quadratic_form_rows

PRIOR_TOKENS = 32.0
SKETCHED_ROWS = 96  # that stand for what an expert reads, where an error need not be exact
_ROW_BUDGET_BYTES = 4 << 30  # of all experts' rows of one kind, unless that were less than _MIN_ROWS each
_MIN_ROWS = 512


def max_rows(num_experts: int, num_inputs: int, itemsize: int) -> int:
    """How many rows (I,) are kept of each expert."""
    return max(_MIN_ROWS, _ROW_BUDGET_BYTES // (num_experts * num_inputs * itemsize))


class SharedStatistics:
    """Statistics of an expert that is given all tokens of its block: those of the block's input, which stay as they are."""

    def __init__(self, block: InputStatistics) -> None:
        self.num_inputs = block.num_inputs
        self.block = block

    @property
    def num_tokens(self) -> int:
        """Of the block."""
        return self.block.num_tokens

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel."""
        return self.block.mean_abs

    @property
    def is_sketch(self) -> bool:
        """Whether a sketch of the block's input is all that is kept."""
        return self.block.is_sketch

    def hold(self) -> AbstractContextManager[None]:
        """Keeps what is made for several questions."""
        return self.block.hold()

    def take_smoothed_gram(self, scales: Tensor) -> Tensor:
        """The Gram matrix of the input divided by scales (I,), (I, I) float32, a new tensor."""
        return (self.block.gram() / scales.unsqueeze(0)).div_(scales.unsqueeze(1))

    def row_errors(self, difference: Tensor) -> Tensor:
        """The output error of every row of difference (O, I) float32: (O,) float64."""
        return self.block.row_errors(difference)

    def rough_row_errors(self, difference: Tensor) -> Tensor:
        """`row_errors` to about three digits."""
        return self.block.rough_row_errors(difference)

    def is_finite(self) -> bool:
        """Whether every activation of the block was finite."""
        return self.block.is_finite()


class ExpertStatistics:
    """See the module. num_inputs: I; prior: complete by the time that anything is asked for; host: if rows are to lie in host memory."""

    is_sketch = True  # where an error need not be exact

    def __init__(
        self,
        num_inputs: int,
        most_rows: int,
        prior: InputStatistics,
        device: torch.device,
        host: HostMemory | None = None,
    ) -> None:
        self.num_inputs = num_inputs
        self._host = host
        self.num_tokens = 0
        self._prior = prior
        self._most_rows = most_rows
        self._num_kept = 0
        self._rows: list[Tensor] = []
        self._sum_abs = torch.zeros(num_inputs, dtype=torch.float32, device=device)
        self._gram: Tensor | None = None
        self._sketch: Tensor | None = None

    def add(self, activations: Tensor) -> None:
        """Adds rows (n, I), any float dtype."""
        rows = activations.detach().reshape(-1, self.num_inputs)
        self.num_tokens += rows.shape[0]
        self._sketch = None
        self._sum_abs += rows.float().abs().sum(0)
        kept = rows[: self._most_rows - self._num_kept]
        if kept.shape[0]:
            self._rows.append(kept.clone() if self._host is None else kept.to(HOST, copy=True))
            self._num_kept += kept.shape[0]

    def _kept(self) -> Tensor:
        """(n, I), in the dtype that they came in."""
        rows = torch.cat(self._rows)
        return rows if self._host is None else self._host.lend(rows)

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel, the prior's tokens included."""
        return (self._sum_abs + PRIOR_TOKENS * self._prior.mean_abs) / (self.num_tokens + PRIOR_TOKENS)

    def gram(self) -> Tensor:
        """Ĝ, (I, I) float32, a new tensor unless it is held."""
        if self._gram is not None:
            return self._gram
        gram = self._prior.gram_at_hand() * (PRIOR_TOKENS / max(self._prior.num_tokens, 1))
        if self._rows:
            rows = self._kept()
            wide = rows.float()
            with exact_for(rows.dtype):
                gram.addmm_(wide.T, wide, alpha=self.num_tokens / self._num_kept)
        return gram

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Makes Ĝ once for all that is asked within."""
        self._gram = self.gram()
        try:
            yield
        finally:
            self._gram = None

    def take_smoothed_gram(self, scales: Tensor) -> Tensor:
        """Ĝ of the input divided by scales (I,), a new tensor."""
        gram = self.gram()
        return gram.div_(scales.unsqueeze(0)).div_(scales.unsqueeze(1))

    def row_errors(self, difference: Tensor) -> Tensor:
        """d·Ĝ·dᵀ of every row d of difference (O, I) float32: (O,) float64."""
        return quadratic_form_rows(difference, self.gram())

    def rough_row_errors(self, difference: Tensor) -> Tensor:
        """`row_errors` as the sketch tells it."""
        return StackedSketches.of([self]).row_errors(difference.unsqueeze(0))[0]

    def sketch(self) -> Tensor:
        """(SKETCHED_ROWS, I), in bfloat16 where the hardware multiplies that: rows Z with ‖Z·dᵀ‖² = d·Ĝ·dᵀ on average, for the prior as
        some of its tokens tell it. Where there are fewer rows than that, they are these themselves, and zeros."""
        if self._sketch is not None:
            return self._sketch
        prior = self._prior.sample()
        num_rows = self._num_kept + prior.shape[0]
        num_parts = max(-(-num_rows // SKETCHED_ROWS), 1)
        rows = self._sum_abs.new_empty(num_parts * SKETCHED_ROWS, self.num_inputs)
        start = 0
        for own in (*self._rows, prior):
            rows[start : start + own.shape[0]].copy_(own)
            start += own.shape[0]
        rows[num_rows:] = 0
        factors = _signs(num_parts, rows.device).clone()
        factors[: self._num_kept] *= (self.num_tokens / max(self._num_kept, 1)) ** 0.5
        factors[self._num_kept :] *= (PRIOR_TOKENS / max(prior.shape[0], 1)) ** 0.5
        sketch = rows.mul_(factors).view(num_parts, SKETCHED_ROWS, -1).sum(0)
        return sketch.bfloat16() if has_fast_bfloat16(rows.device) else sketch

    def keep_sketch(self) -> None:
        """Makes the sketch once for all that is asked later, unless rows are to lie in host memory."""
        self._sketch = self.sketch() if self._host is None else None

    def is_finite(self) -> bool:
        """Whether every activation that was added was finite."""
        return bool(torch.isfinite(self._sum_abs).all())


@cache
def _signs(num_parts: int, device: torch.device) -> Tensor:
    """(num_parts · SKETCHED_ROWS, 1) float32: 1 or -1 at random, the same for every expert."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (num_parts * SKETCHED_ROWS, 1), generator=generator)
    return signs.mul_(2).sub_(1).to(device, torch.float32)


@dataclass(frozen=True, slots=True)
class StackedSketches:
    """Of B experts. rows: (B, SKETCHED_ROWS, I), see `ExpertStatistics.sketch`."""

    rows: Tensor

    @classmethod
    def of(cls, experts: Sequence[ExpertStatistics]) -> StackedSketches:
        return cls(torch.stack([expert.sketch() for expert in experts]))

    def row_errors(self, difference: Tensor) -> Tensor:
        """Of difference (B, r, I), float: (B, r) float64."""
        outputs = difference.to(self.rows.dtype) @ self.rows.transpose(1, 2)  # (B, r, SKETCHED_ROWS)
        return outputs.float().square_().sum(2).double()
