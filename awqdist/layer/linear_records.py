"""The records of rounded linears. Where what one reads is known by a sketch, they are made of that, and of some of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from awqdist.layer.drafts import Draft
from awqdist.layer.plan import Linear
from awqdist.layer.records import LinearRecord
from awqdist.quant.grid import QuantizedWeight, grouped, rounding_difference
from awqdist.quant.moments import quadratic_form, rough_quadratic_form
from awqdist.quant.search import sampled_rows

_JUDGED_ROWS = 64  # of a linear whose input is known by a sketch, that its record is made of


def linear_errors(draft: Draft, result: QuantizedWeight, sizes: Sequence[int]) -> Tensor:
    """Of every linear its output, its output error if it were not smoothed and rounded to nearest, and that of the result to its target,
    squared and summed over the tokens: (n, 3) float64. sizes: rows of the n linears. Where it is compensated over outputs, all three are
    of what counts of them; of an expert's, of the outputs themselves."""
    gram = draft.site.gram
    if gram is None or draft.site.moments.has_prior:
        judged = list(_judged_rows(draft, sizes))
        found = _sampled_row_errors(draft, result, torch.cat([rows for rows, _ in judged]))
        each = found.split([rows.shape[0] for rows, _ in judged], 1)
        return torch.stack([errors @ counts for errors, (_, counts) in zip(each, judged, strict=True)])
    weighted = draft.site.outputs.weighted if draft.site.outputs else _unchanged
    nearest = _nearest(draft, draft.weight / draft.site.scales).mul_(draft.site.scales)
    signal = rough_quadratic_form(weighted(draft.weight), gram), rough_quadratic_form(weighted(nearest), gram)
    difference = weighted(result.dequantize().sub_(draft.target))
    found = torch.stack([*signal, quadratic_form(difference, gram)])  # (3, ΣO)
    return torch.stack([errors.sum(1) for errors in found.split(list(sizes), 1)])


def _unchanged(difference: Tensor) -> Tensor:
    return difference


def _judged_rows(draft: Draft, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each linear that its record is made of, (r,) int64, and how many rows each stands for, (r,) float64."""
    energy = (draft.site.moments.mean_abs / draft.site.scales).square()
    carried = grouped(energy, draft.scheme).sum(-1)  # (G,)
    importance = draft.weight_scale.float().square() @ carried  # (ΣO,)
    first = 0
    for size in sizes:
        rows, counts = sampled_rows(importance[first : first + size].unsqueeze(0), _JUDGED_ROWS)
        yield rows[0] + first, counts
        first += size


def _sampled_row_errors(draft: Draft, result: QuantizedWeight, rows: Tensor) -> Tensor:
    """(3, r) float64 of some rows (r,), as a sketch tells them."""
    scales, weight = draft.site.scales, draft.weight[rows]
    written = QuantizedWeight(result.codes[rows], result.weight_scale[rows], result.zero_point[rows], result.scheme)
    difference = written.dequantize().sub_(draft.target[rows]).div_(scales)
    original = weight.div_(scales)
    stacked = torch.cat([original, _nearest(draft, original), difference])
    return draft.site.moments.form(rough=True).errors(stacked.unsqueeze(0)).view(3, -1)


def _nearest(draft: Draft, original: Tensor) -> Tensor:
    """What rounding to nearest would change of weights that are not smoothed, (r, I)."""
    return rounding_difference(original, torch.ones_like(draft.site.scales), draft.scheme, draft.site.grid_dtype)


def linear_record(linear: Linear, draft: Draft, errors: Tensor) -> LinearRecord:
    """errors: (3,), see `linear_errors`."""
    signal, nearest, found = errors.tolist()
    signal = max(signal, 1e-30)
    return LinearRecord(
        name=linear.disk_name,
        shape=linear.shape,
        num_bits=draft.scheme.num_bits,
        group_size=draft.scheme.group_size,
        symmetric=draft.scheme.symmetric,
        relative_error_nearest=nearest / signal,
        relative_error=found / signal,
        clipped_share=draft.clipped,
        num_dead_inputs=draft.site.num_dead_inputs,
    )
