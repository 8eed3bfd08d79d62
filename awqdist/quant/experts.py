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
Where an error need not be exact none is made: mostly an expert has fewer rows than inputs, and ‖X·Dᵀ‖² takes less than D·Ĝ·Dᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from awqdist.quant.lending import HOST, HostMemory
from awqdist.quant.precision import exact_for, has_fast_bfloat16
from awqdist.quant.stats import InputStatistics, quadratic_form_rows

PRIOR_TOKENS = 32.0
_ROUGH_ROWS = 1024  # of an expert that are multiplied for a rough error, or as many as there are inputs
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

    def add(self, activations: Tensor) -> None:
        """Adds rows (n, I), any float dtype."""
        rows = activations.detach().reshape(-1, self.num_inputs)
        self.num_tokens += rows.shape[0]
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
        """`row_errors` to about three digits, but with the prior as some of its tokens tell it."""
        return StackedRows.of([self]).row_errors(difference.unsqueeze(0))[0]

    def weighted_rows(self) -> tuple[Tensor, Tensor]:
        """Rows (m, I) and how many tokens each stands for, (m,) float32: a sample of its own, and one of the prior's."""
        prior = self._prior.sample()
        own = self._kept() if self._rows else prior[:0]
        own = own[:: -(-own.shape[0] // max(_ROUGH_ROWS, self.num_inputs)) or 1]
        counts = self._sum_abs.new_full((own.shape[0] + prior.shape[0],), PRIOR_TOKENS / max(prior.shape[0], 1))
        counts[: own.shape[0]] = self.num_tokens / max(own.shape[0], 1)
        return torch.cat([own, prior.to(own.dtype)]), counts

    def is_finite(self) -> bool:
        """Whether every activation that was added was finite."""
        return bool(torch.isfinite(self._sum_abs).all())


@dataclass(frozen=True, slots=True)
class StackedRows:
    """Rows of B experts that stand for what they read. rows: (B, m, I), short ones filled up; counts: (B, m) float32, tokens per row."""

    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, experts: Sequence[ExpertStatistics]) -> StackedRows:
        """In bfloat16 where the hardware multiplies that."""
        found = [expert.weighted_rows() for expert in experts]
        rows = pad_sequence([rows for rows, _ in found], batch_first=True)
        dtype = torch.bfloat16 if has_fast_bfloat16(rows.device) else torch.float32
        return cls(rows.to(dtype), pad_sequence([counts for _, counts in found], batch_first=True))

    def row_errors(self, difference: Tensor) -> Tensor:
        """Of difference (B, r, I) float32: (B, r) float64."""
        outputs = (difference.to(self.rows.dtype) @ self.rows.transpose(1, 2)).float()  # (B, r, m)
        return (outputs.square_() @ self.counts.unsqueeze(2)).squeeze(2).double()
