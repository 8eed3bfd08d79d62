"""Keeps what the search and the rounding need of a linear's input: mean magnitudes, and second moments in one of three forms.

For a candidate weight W' = W + D of a linear that reads X (T, I), the output error over all tokens is

    ‖X·W'ᵀ - X·Wᵀ‖²_F = ‖X·Dᵀ‖²_F = Σ (D·XᵀX) ∘ D

so the Gram matrix XᵀX (I, I) is enough, whatever T is. Where there are fewer tokens than inputs the rows X themselves are smaller, and are
kept instead. Both are exact; sums are float32 and additive over chunks. A CountSketch (arXiv 1207.6365) estimates the same error from a few
rows: row b is the sum of every 256th token from the b-th on, each under a random sign. All candidates are measured with one sketch, so they
are ranked better than each is measured.

An expert may be sent few tokens. Its moments are blended with a prior: with n rows X of its own, and Ḡ the average x·xᵀ of a prior's token,

    Ĝ = XᵀX + k·Ḡ,    k = PRIOR_TOKENS

as if k average tokens had been sent to it beside its own. An expert that was sent nothing is fitted to the prior alone, one that was sent
thousands of rows is fitted to them, and no matrix in between is singular. Its rows are kept up to a cap; of more, the first stand for all.

Gram matrices that do not fit the device are kept in host memory. One tile at a time is copied to the device for each sum and each error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from awqdist.quant.offload import HOST, HostMemory, ToDevice
from awqdist.quant.precision import has_data, has_fast_bfloat16, low_precision_if_exact, repeatable

PRIOR_TOKENS = 32.0
SKETCH_ROWS = 256
EXPERT_SKETCH_ROWS = 96
_SAMPLED_TOKENS = 64
_CACHED_ROWS = 512  # of a chunk: what is made of so many stays in a CPU's cache
_BLOCK = 256  # columns per block of a Gram matrix; only the blocks on and below its diagonal are multiplied
_ROW_BUDGET_BYTES = 4 << 30  # of all experts' rows of one kind, unless that were less than _MIN_ROWS each
_MIN_ROWS = 512


@dataclass(frozen=True, slots=True)
class Gram:
    """Gives errors under Gram matrices (I, I), one for each of B problems; they may be in host memory. In bfloat16 they only rank."""

    matrices: Sequence[Tensor]
    to_device: ToDevice | None = None

    def errors(self, difference: Tensor) -> Tensor:
        """Returns d·G·dᵀ of every row d of difference (B, r, I) float32, as (B, r) float64."""
        pairs = list(zip(difference, self.matrices, strict=True))
        return torch.stack(
            [
                _rough_form(d, gram) if gram.dtype == torch.bfloat16 else quadratic_form(d, gram, self.to_device)
                for d, gram in pairs
            ]
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Gives errors from the rows X of one input, kept in parts (n, I) float32."""

    parts: Sequence[Tensor]
    to_device: ToDevice | None = None

    def errors(self, difference: Tensor) -> Tensor:
        """Returns ‖X·dᵀ‖² of every row d of difference (1, r, I) float32, as (1, r) float64."""
        (only,) = difference
        total = torch.zeros(only.shape[0], dtype=torch.float64, device=only.device)
        for rows in self.parts:
            total += (
                ((rows if self.to_device is None else self.to_device(rows)) @ only.T)
                .square_()
                .sum(0, dtype=torch.float64)
            )
        return total.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Estimates errors from sketches: rows (n, I) of one input, or (B, n, I), float32 or bfloat16."""

    rows: Tensor

    def errors(self, difference: Tensor) -> Tensor:
        """Returns ‖S·dᵀ‖² of every row d of difference (B, r, I) float32, as (B, r) float64."""
        if self.rows.ndim == 2:
            outputs = (difference[0].to(self.rows.dtype) @ self.rows.T).unsqueeze(0)  # (1, r, n)
        else:
            outputs = difference.to(self.rows.dtype) @ self.rows.transpose(1, 2)  # (B, r, n)
        return outputs.float().square_().sum(2).double()


@dataclass(frozen=True, slots=True)
class Diagonal:
    """Gives errors where the inputs are independent, of second moments (B, I) float32."""

    variances: Tensor

    def errors(self, difference: Tensor) -> Tensor:
        """Returns Σ d²·v of every row d of difference (B, r, I) float32, as (B, r) float64."""
        return (difference.square() @ self.variances.unsqueeze(2)).squeeze(2).double()


Form = Gram | Rows | Sketch | Diagonal


class Moments:
    """Keeps the moments of one input.

    Args:
        num_inputs: I.
        num_tokens: How many tokens will be added in all, which decides what is kept.
        device: Where the activations are.
        host: Given if the matrix or the rows are to be kept in host memory.
        exact: Whether a sketch alone will not do.
        prior: Given for an expert: the moments to blend with, complete by the time that anything is asked for.
        most_rows: How many rows of an expert are kept.
    """

    def __init__(
        self,
        num_inputs: int,
        num_tokens: int,
        device: torch.device,
        host: HostMemory | None = None,
        *,
        exact: bool = True,
        prior: Moments | None = None,
        most_rows: int = 0,
    ) -> None:
        self.num_inputs = num_inputs
        self.num_tokens = 0
        self._host, self._kept_on = host, device if host is None else HOST
        self._dtype = torch.float32  # of the activations
        self._sum_abs = torch.zeros(num_inputs, dtype=torch.float32, device=device)
        self._prior, self._most_rows, self._num_kept = prior, most_rows, 0
        self._stride = max(1, num_tokens // _SAMPLED_TOKENS)
        self._sample: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._symmetric = True  # whether the blocks above the diagonal are filled in
        self._sketch: Tensor | None = None
        self._signs: Tensor | None = None
        self._rough: Tensor | None = None  # the sketch, or else the Gram matrix, as errors are ranked with it
        if prior is not None:
            return
        sketched = is_sketched(num_inputs, num_tokens, exact=exact)
        if num_tokens >= num_inputs and not sketched:
            self._gram = torch.zeros(num_inputs, num_inputs, device=self._kept_on)
        if sketched or (self._gram is not None and num_inputs >= 2 * SKETCH_ROWS):
            self._sketch = torch.zeros(SKETCH_ROWS, num_inputs, device=device)
            self._signs = _signs(num_tokens, device)

    def add(self, activations: Tensor) -> None:
        """Adds a chunk of activations (..., I), any float dtype."""
        rows = activations.detach().reshape(-1, self.num_inputs)  # (T_chunk, I)
        first_token = self.num_tokens
        self.num_tokens += rows.shape[0]
        self._dtype = rows.dtype
        if self._prior is not None:
            self._rough = None
            self._sum_abs += rows.float().abs().sum(0)
            self._keep(rows[: self._most_rows - self._num_kept])
            return
        self._sample.append(rows[-first_token % self._stride :: self._stride].to(torch.float32, copy=True))
        whole = rows.is_cuda or not has_data(rows)
        for part in rows.split(rows.shape[0] if whole else _CACHED_ROWS):
            self._add_part(part, first_token)
            first_token += part.shape[0]

    def _keep(self, rows: Tensor) -> None:
        """Keeps a copy of some of an expert's rows, in their own dtype."""
        if rows.shape[0]:
            self._rows.append(rows.clone() if self._host is None else rows.to(HOST, copy=True))
            self._num_kept += rows.shape[0]

    def _add_part(self, rows: Tensor, first_token: int) -> None:
        keeps_rows = self._gram is None and self._sketch is None
        wide = rows.to(torch.float32, copy=keeps_rows)  # what is kept is ours: the layer may go on to overwrite its own
        self._sum_abs += wide.abs().sum(0)
        if keeps_rows:
            self._rows.append(wide.to(self._kept_on))
        if self._sketch is not None and self._signs is not None:
            _add_to_sketch(self._sketch, self._signs, wide, first_token)
        if self._gram is not None:
            self._add_product(self._gram, wide)

    @property
    def has_prior(self) -> bool:
        """Whether these are an expert's own moments, blended with a prior."""
        return self._prior is not None

    @property
    def is_sketch(self) -> bool:
        """Whether errors are estimates wherever they may be, so that those of some rows tell as much as those of all."""
        return self.has_prior or (self._gram is None and self._sketch is not None)

    @property
    def mean_abs(self) -> Tensor:
        """(I,) float32: mean |x| of every channel, the prior's tokens included."""
        if self._prior is None:
            return self._sum_abs / max(self.num_tokens, 1)
        return (self._sum_abs + PRIOR_TOKENS * self._prior.mean_abs) / (self.num_tokens + PRIOR_TOKENS)

    def is_finite(self) -> bool:
        """Returns whether every activation that was added was finite."""
        return bool(torch.isfinite(self._sum_abs).all())

    def gram(self) -> Tensor:
        """Returns XᵀX or Ĝ, (I, I) float32, on the device, or in host memory if it does not fit there whole. Not to be written to."""
        if self._prior is not None:
            return self._blended(self._prior)
        gram = self._kept_gram()
        return self._to_device(gram) if self._host is None or self._host.whole_matrices else gram

    def _blended(self, prior: Moments) -> Tensor:
        gram = prior._to_device(prior._kept_gram()) * (PRIOR_TOKENS / max(prior.num_tokens, 1))
        if self._rows:
            rows = self._to_device(torch.cat(self._rows))
            wide = rows.float()
            with low_precision_if_exact(rows.dtype):
                gram.addmm_(wide.T, wide, alpha=self.num_tokens / self._num_kept)
        return gram

    def _kept_gram(self) -> Tensor:
        """(I, I) float32 where it is kept, with both triangles."""
        if self._gram is not None:
            self._mirror(self._gram)
            return self._gram
        gram = torch.zeros(self.num_inputs, self.num_inputs, device=self._kept_on)
        for rows in self._kept_rows():
            self._add_product(gram, self._to_device(rows))
        self._mirror(gram)
        return gram

    def _kept_rows(self) -> Iterator[Tensor]:
        yield from self._rows
        if self._sketch is not None and self._gram is None:
            yield self._sketch

    def _add_product(self, gram: Tensor, rows: Tensor) -> None:
        """Adds rows.T @ rows of rows (T, I) float32 to the blocks of `gram` (I, I) on and below its diagonal."""
        self._symmetric = False
        with low_precision_if_exact(self._dtype):
            for start in range(0, self.num_inputs, _BLOCK):
                tile = gram[start:, start : start + _BLOCK]
                moved = self._to_device(tile)
                moved.addmm_(rows[:, start:].T, rows[:, start : start + _BLOCK])
                if moved is not tile:
                    tile.copy_(moved)
                del moved  # before the next one comes

    def _mirror(self, gram: Tensor) -> None:
        """Fills in the blocks above the diagonal."""
        for start in range(0, 0 if self._symmetric else self.num_inputs, _BLOCK):
            stop = start + _BLOCK
            gram[start:stop, stop:] = gram[stop:, start:stop].T
        self._symmetric = True

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if self._host is None else self._host.to_device(tensor)

    def take_smoothed_gram(self, scales: Tensor) -> Tensor:
        """Returns the Gram matrix of the input divided by scales (I,), as (I, I) float32 where `gram` gives it.

        It is taken out, so exact errors cannot be asked for any more.
        """
        gram = self.gram()
        if self._prior is None:
            self.release()
        scales = scales.to(gram.device)
        return gram.div_(scales.unsqueeze(0)).div_(scales.unsqueeze(1))

    def release(self) -> None:
        """Gives up all but the means."""
        self._gram = self._sketch = self._rough = None
        self._rows = []

    def form(self, *, rough: bool = False) -> Form:
        """Returns what tells the errors of changes (1, r, I). rough: to about three digits or as a sketch tells them, to rank."""
        if self._prior is not None:
            return Sketch(self.expert_sketch().unsqueeze(0)) if rough else Gram([self.gram()])
        is_fast = has_fast_bfloat16(self._sum_abs.device)
        if self._sketch is not None and (rough or self._gram is None):
            if self._rough is None:
                self._rough = self._sketch.bfloat16() if is_fast else self._sketch
            return Sketch(self._rough)
        if self._gram is None:
            return Rows(self._rows, self._to_device)
        if not rough or not is_fast:
            return Gram([self._gram], self._to_device)
        if self._rough is None:
            self._rough = self._to_device(self._kept_gram()).bfloat16()
        return Gram([self._rough])

    def expert_sketch(self) -> Tensor:
        """Returns rows Z (EXPERT_SKETCH_ROWS, I) with ‖Z·dᵀ‖² = d·Ĝ·dᵀ on average, for the prior as some of its tokens tell it.

        They are bfloat16 where the hardware multiplies that. Fewer rows than that are returned themselves, followed by zeros.
        """
        if self._rough is not None:
            return self._rough
        assert self._prior is not None
        prior = self._prior.sample()
        num_rows = self._num_kept + prior.shape[0]
        num_parts = max(-(-num_rows // EXPERT_SKETCH_ROWS), 1)
        rows = self._sum_abs.new_empty(num_parts * EXPERT_SKETCH_ROWS, self.num_inputs)
        start = 0
        for own in (*self._rows, prior):
            rows[start : start + own.shape[0]].copy_(own)
            start += own.shape[0]
        rows[num_rows:] = 0
        factors = _cached_signs(num_parts * EXPERT_SKETCH_ROWS, rows.device).clone()
        factors[: self._num_kept] *= (self.num_tokens / max(self._num_kept, 1)) ** 0.5
        factors[self._num_kept :] *= (PRIOR_TOKENS / max(prior.shape[0], 1)) ** 0.5
        sketch = rows.mul_(factors).view(num_parts, EXPERT_SKETCH_ROWS, -1).sum(0)
        return sketch.bfloat16() if has_fast_bfloat16(rows.device) else sketch

    def keep_sketch(self) -> None:
        """Makes an expert's sketch once for all that is asked later, unless its rows are kept in host memory."""
        self._rough = self.expert_sketch() if self._host is None else None

    def sample(self) -> Tensor:
        """Returns some of the rows, (m, I) float32: every n-th of all tokens, however they were cut into chunks."""
        return torch.cat(self._sample) if self._sample else self._sum_abs.new_zeros(0, self.num_inputs)


def form_of(moments: Sequence[Moments], *, rough: bool = False) -> Form:
    """Returns what tells the errors of changes (B, r, I) of B inputs, which are experts' or one."""
    if not moments[0].has_prior:
        (only,) = moments
        return only.form(rough=rough)
    if not rough:
        return Gram([expert.gram() for expert in moments])
    for expert in moments:
        expert.keep_sketch()
    return Sketch(torch.stack([expert.expert_sketch() for expert in moments]))


def max_rows(num_experts: int, num_inputs: int, itemsize: int) -> int:
    """Returns how many rows (I,) are kept of each expert."""
    return max(_MIN_ROWS, _ROW_BUDGET_BYTES // (num_experts * num_inputs * itemsize))


def is_sketched(num_inputs: int, num_tokens: int, *, exact: bool) -> bool:
    """Returns whether only a sketch is kept of an input: if it may be, and is smaller than the rows and the Gram matrix."""
    return num_held_rows(num_inputs, num_tokens, exact=exact) < min(num_inputs, num_tokens)


def num_held_rows(num_inputs: int, num_tokens: int, *, exact: bool) -> int:
    """Returns how many rows of I values are kept of an input: of the activations, of their Gram matrix or of their sketch."""
    return min(num_inputs, num_tokens) if exact else min(num_inputs, num_tokens, SKETCH_ROWS)


@repeatable
def quadratic_form(difference: Tensor, gram: Tensor, to_device: ToDevice | None = None) -> Tensor:
    """Returns d·G·dᵀ of every row d of difference (O, I) float32, as (O,) float64. G's symmetry saves nearly half of the product.

    Args:
        difference: (O, I) float32.
        gram: (I, I) float32, of which the blocks above the diagonal are not read; it may be on another device.
        to_device: Brings tiles of `gram` to the device of `difference`; None: by a plain copy.
    """
    total = torch.zeros(difference.shape[0], dtype=torch.float64, device=difference.device)
    for start in range(0, gram.shape[0], _BLOCK):
        stop = min(start + _BLOCK, gram.shape[0])
        tile = gram[start:stop, :stop]  # (block, stop)
        tile = tile.to(difference.device) if to_device is None else to_device(tile)
        columns = difference[:, start:stop]
        if start:  # a block below the diagonal stands for itself and for its mirror image
            projected = difference[:, :start] @ tile[:, :start].T  # (O, block)
            total += 2 * projected.mul_(columns).sum(1)
        projected = columns @ tile[:, start:]
        total += projected.mul_(columns).sum(1)
    return total


def rough_quadratic_form(difference: Tensor, gram: Tensor) -> Tensor:
    """Returns `quadratic_form` to about three digits where bfloat16 is fast and the matrix is on the device, else exactly."""
    if not has_fast_bfloat16(difference.device) or gram.device != difference.device:
        return quadratic_form(difference, gram)
    return _rough_form(difference, gram.bfloat16())


def _rough_form(difference: Tensor, gram: Tensor) -> Tensor:
    """`quadratic_form` in products of bfloat16. difference: (O, I) float32; gram: (I, I) bfloat16."""
    return (difference.bfloat16() @ gram).float().mul_(difference).sum(1).double()


def _add_to_sketch(sketch: Tensor, signs: Tensor, rows: Tensor, first_token: int) -> None:
    """Adds token t of rows (T, I) to row t mod SKETCH_ROWS of the sketch, under the sign of t. first_token: t of the first row."""
    start = 0
    while start < rows.shape[0]:
        token = first_token + start
        bucket = token % SKETCH_ROWS
        length = min(SKETCH_ROWS - bucket, rows.shape[0] - start)
        sketch[bucket : bucket + length].addcmul_(rows[start : start + length], signs[token : token + length])
        start += length


def _signs(count: int, device: torch.device) -> Tensor:
    """(count, 1) float32: 1 or -1 at random, the same each time."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (count, 1), generator=generator)
    return signs.mul_(2).sub_(1).to(device, torch.float32)


_cached_signs = cache(_signs)
