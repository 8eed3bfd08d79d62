"""What the search keeps of the calibration activations: per input site a mean and a Gram matrix.

For a candidate weight W' = W + D of a linear that reads X (T, I), the output error over all tokens is

    ‖X·W'ᵀ - X·Wᵀ‖²_F = ‖X·Dᵀ‖²_F = Σ (D·XᵀX) ∘ D

so XᵀX (I, I) is all that is needed, whatever T is. Where there are fewer tokens than inputs the rows X themselves are smaller
and cheaper, and are kept instead. Both are exact; sums are float32 and additive over chunks.

To rank candidates a sketch of X does as well where X is wide (`sketch.py`). Where nobody asks for more, as under plain AWQ, a wide
input is its sketch, which is kept like rows.

Gram matrices that do not fit the device lie in host memory. A tile of one, all rows below some columns' place on the diagonal, is lent to
the device for each sum, and for each error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from awqdist.quant.lending import HOST, HostMemory, Lend
from awqdist.quant.precision import exact_for, has_fast_bfloat16
from awqdist.quant.sketch import SKETCH_ROWS, Sketch, is_sketched

_SAMPLED_TOKENS = 64
_CACHED_ROWS = 512  # of a chunk: what is made of so many stays in a CPU's cache
_BLOCK = 256  # columns per block of a Gram matrix; only the blocks on and below its diagonal are multiplied


class Statistics(Protocol):
    """What the search asks of an input site."""

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel."""

    @property
    def is_sketch(self) -> bool:
        """Whether errors are estimates, so that those of some rows tell as much as those of all."""

    def row_errors(self, difference: Tensor) -> Tensor:
        """The output error of every row of difference (O, I) float32: (O,) float64."""

    def rough_row_errors(self, difference: Tensor) -> Tensor:
        """`row_errors` to about three digits: to rank, not to report."""

    def hold(self) -> AbstractContextManager[None]:
        """Within it, what is needed for an answer is made once."""


class InputStatistics:
    """Statistics of one input site.

    num_inputs: I; num_tokens: how many tokens will be added in all, which decides the representation; device: where the activations
    are; host: if the matrix or the rows are to lie in host memory; exact: if a sketch will not do.
    """

    def __init__(
        self,
        num_inputs: int,
        num_tokens: int,
        device: torch.device,
        host: HostMemory | None = None,
        *,
        exact: bool = True,
    ) -> None:
        self.num_inputs = num_inputs
        self.num_tokens = 0
        self._host, self._home = host, device if host is None else HOST
        self._dtype = torch.float32  # of the activations
        self._sum_abs = torch.zeros(num_inputs, dtype=torch.float32, device=device)
        sketched = is_sketched(num_inputs, num_tokens, exact=exact)
        has_gram = num_tokens >= num_inputs and not sketched
        self._gram = torch.zeros(num_inputs, num_inputs, device=self._home) if has_gram else None
        self._symmetric = True  # whether the blocks above the diagonal are filled in
        self._stride = max(1, num_tokens // _SAMPLED_TOKENS)
        self._sample: list[Tensor] = []
        has_sketch = sketched or (has_gram and num_inputs >= 2 * SKETCH_ROWS)
        self._sketch = Sketch(num_inputs, num_tokens, device) if has_sketch else None
        self._rows = [self._sketch.rows] if sketched and self._sketch else []
        self._rough: Tensor | None = None  # the sketch, or else the Gram matrix, in bfloat16

    def add(self, activations: Tensor) -> None:
        """Adds a chunk. activations: (..., I), any float dtype."""
        rows = activations.detach().reshape(-1, self.num_inputs)  # (T_chunk, I)
        first_token = self.num_tokens
        self._sample.append(rows[-first_token % self._stride :: self._stride].float())
        self.num_tokens += rows.shape[0]
        self._dtype = rows.dtype
        for part in rows.split(rows.shape[0] if rows.is_cuda else _CACHED_ROWS):
            self._add_rows(part, first_token)
            first_token += part.shape[0]

    def _add_rows(self, rows: Tensor, first_token: int) -> None:
        keeps_rows = self._gram is None and self._sketch is None
        wide = rows.to(torch.float32, copy=keeps_rows)  # what is kept is ours: the layer may go on to overwrite its own
        self._sum_abs += wide.abs().sum(0)
        if keeps_rows:
            self._rows.append(wide.to(self._home))
        if self._sketch is not None:
            self._sketch.add(wide, first_token)
        if self._gram is not None:
            self._add_product(self._gram, wide)

    @property
    def is_sketch(self) -> bool:
        """Whether a sketch is all that is kept."""
        return self._gram is None and self._sketch is not None

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel."""
        return self._sum_abs / max(self.num_tokens, 1)

    def gram(self) -> Tensor:
        """XᵀX, (I, I) float32, on the device, or in host memory if it does not fit there whole. Not to be written to."""
        whole = self._host is None or self._host.whole_matrices
        return self.gram_at_hand() if whole else self._resting_gram()

    def gram_at_hand(self) -> Tensor:
        """XᵀX, (I, I) float32, on the device. Not to be written to."""
        return self._lent(self._resting_gram())

    def _resting_gram(self) -> Tensor:
        if self._gram is not None:
            self._mirror(self._gram)
            return self._gram
        gram = torch.zeros(self.num_inputs, self.num_inputs, device=self._home)
        for rows in self._rows:
            self._add_product(gram, self._lent(rows))
        self._mirror(gram)
        return gram

    def _add_product(self, gram: Tensor, rows: Tensor) -> None:
        """Adds rows.T @ rows of rows (T, I) float32 to the blocks of `gram` (I, I) on and below its diagonal."""
        self._symmetric = False
        with exact_for(self._dtype):
            for start in range(0, self.num_inputs, _BLOCK):
                tile = gram[start:, start : start + _BLOCK]
                lent = self._lent(tile)
                lent.addmm_(rows[:, start:].T, rows[:, start : start + _BLOCK])
                if lent is not tile:
                    tile.copy_(lent)
                del lent  # before the next one comes

    def _lent(self, tensor: Tensor) -> Tensor:
        return tensor if self._host is None else self._host.lend(tensor)

    def take_smoothed_gram(self, scales: Tensor) -> Tensor:
        """The Gram matrix of the input divided by scales (I,), (I, I) float32. It is taken out: errors cannot be asked for any more.

        It lies on the device, or in host memory if it does not fit there.
        """
        gram = self.gram()
        self.release()
        scales = scales.to(gram.device)
        return gram.div_(scales.unsqueeze(0)).div_(scales.unsqueeze(1))

    def release(self) -> None:
        """Gives up all but the means."""
        self._gram = self._sketch = self._rough = None
        self._rows = []

    def rows(self) -> Tensor:
        """X, (T, I) float32, where the rows are what is kept; or their sketch."""
        return torch.cat(self._rows) if self._rows else self._sum_abs.new_zeros(0, self.num_inputs)

    def sample(self) -> Tensor:
        """Some of the rows, (m, I) float32: every n-th of all tokens, however they were cut into chunks."""
        return torch.cat(self._sample) if self._sample else self._sum_abs.new_zeros(0, self.num_inputs)

    def _mirror(self, gram: Tensor) -> None:
        """Fills in the blocks above the diagonal."""
        for start in range(0, 0 if self._symmetric else self.num_inputs, _BLOCK):
            stop = start + _BLOCK
            gram[start:stop, stop:] = gram[stop:, start:stop].T
        self._symmetric = True

    def output_error(self, difference: Tensor) -> float:
        """‖X·Dᵀ‖²_F of difference (O, I) float32, exact in float32."""
        return float(self.row_errors(difference).sum())

    def row_errors(self, difference: Tensor) -> Tensor:
        """The output error of every row of difference (O, I) float32: (O,) float64."""
        if self.is_sketch:
            return self.rough_row_errors(difference)
        if self._gram is None:
            total = torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
            for rows in self._rows:
                total += (self._lent(rows) @ difference.T).square_().sum(0, dtype=torch.float64)
            return total
        return quadratic_form_rows(difference, self._gram, self._lent)

    def rough_row_errors(self, difference: Tensor) -> Tensor:
        """`row_errors` of a sketch of the input, or else to about three digits: to rank, not to report. bfloat16 products where fast."""
        is_fast = has_fast_bfloat16(difference.device)
        if self._sketch is not None:
            if self._rough is None:
                self._rough = self._sketch.rows.bfloat16() if is_fast else self._sketch.rows
            return (difference.to(self._rough.dtype) @ self._rough.T).float().square_().sum(1).double()
        if self._gram is None or not is_fast:
            return self.row_errors(difference)
        if self._rough is None:
            self._rough = self.gram_at_hand().bfloat16()
        return rough_form_rows(difference, self._rough)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps what is made for several questions; here that is kept anyway."""
        yield

    def is_finite(self) -> bool:
        """Whether every activation that was added was finite."""
        return bool(torch.isfinite(self._sum_abs).all())


def rough_form(difference: Tensor, gram: Tensor) -> Tensor:
    """`quadratic_form_rows` to about three digits where bfloat16 is fast and the matrix at hand, else exact."""
    if not has_fast_bfloat16(difference.device) or gram.device != difference.device:
        return quadratic_form_rows(difference, gram)
    return rough_form_rows(difference, gram.bfloat16())


def rough_form_rows(difference: Tensor, rough_gram: Tensor) -> Tensor:
    """`quadratic_form_rows` in bfloat16 products. difference: (O, I) float32; rough_gram: (I, I) bfloat16. Returns (O,) float64."""
    return (difference.bfloat16() @ rough_gram).float().mul_(difference).sum(1).double()


def quadratic_form_rows(difference: Tensor, gram: Tensor, lend: Lend | None = None) -> Tensor:
    """d·G·dᵀ of every row d of D (O, I): (O,) float64, on D's device. G's symmetry saves nearly half of the product.

    G may lie elsewhere: `lend` brings its tiles to D, by a plain copy if it is None.
    """
    total = torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
    for start in range(0, gram.shape[0], _BLOCK):
        stop = min(start + _BLOCK, gram.shape[0])
        tile = gram[start:stop, :stop]  # (block, stop)
        tile = tile.to(difference.device) if lend is None else lend(tile)
        columns = difference[:, start:stop]
        if start:  # a block below the diagonal stands for itself and for its mirror image
            projected = difference[:, :start] @ tile[:, :start].T  # (O, block)
            total += 2 * projected.mul_(columns).sum(1)
        projected = columns @ tile[:, start:]
        total += projected.mul_(columns).sum(1)
    return total
