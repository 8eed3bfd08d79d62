"""Counts what torch operations take: memory, floating-point operations, bytes moved and kernels, on tensors without data.

Inside a `Meter` tensors are fake: they have a shape, a dtype and a device, and no values. Every operation that the code
carries out passes through the meter, so that what is counted is the code itself. Integers whose values are known, such as
positions and the routing of experts, are computed beside the fake tensors, since shapes depend on them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from math import prod
from typing import Any

import torch
from compressed_tensors.quantization.utils.helpers import _calculate_range
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry, sdpa_flop

from awqdist.quant.gptq import SUB_BLOCK
from awqdist.quant.moments import _cached_signs
from awqdist.quant.precision import replayed_by

_aten = torch.ops.aten
_CPU, _META = torch.device("cpu"), torch.device("meta")
_MOST_KNOWN = 1 << 25  # elements of an integer tensor whose values are computed
_CREATING = (_aten.arange, _aten.zeros, _aten.ones, _aten.full)
_GATHERING = (_aten.index, _aten.index_select, _aten.gather, _aten.embedding)
_WITHOUT_KERNEL = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)


def _sdpa_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    found: int = sdpa_flop(query.shape, key.shape, value.shape)
    return found


# what torch's counter leaves out: products in place, and attention on a CPU
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation on the device.

    kind: the dtype that products are multiplied in ("float32", "tfloat32", "bfloat16", "float16"), "attention", "factor"
    (a factorisation or triangular solve), "copy" (between host and device) or "values" (element by element).
    """

    kind: str
    flops: int
    num_bytes: int  # read and written


Kernels = Counter[Kernel]


@dataclass(slots=True)
class Memory:
    """Bytes that are alive now, and the most that were, by type of device."""

    now: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)

    def add(self, device: str, num_bytes: int) -> None:
        """Counts bytes that were allocated (or, if negative, freed) on a type of device."""
        self.now[device] += num_bytes
        self.peak[device] = max(self.peak[device], self.now[device])


class Shape(Tensor):
    """A tensor without data on a device that need not be there. inner: the same on torch's meta device; views share its storage."""

    inner: Any
    place: torch.device
    has_data = False
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(inner: Tensor, device: torch.device) -> Shape:
        """Wraps a tensor on the meta device."""
        made: Shape = Tensor._make_wrapper_subclass(
            Shape,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_CPU,  # to torch: a GPU would have to be there
        )
        made.inner, made.place = inner, device
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that is meant."""
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """Whether a GPU is meant."""
        return self.place.type == "cuda"

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """Returns the tensor on another device or in another dtype."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if not copy and device in (None, self.place) and dtype in (None, self.dtype):
            return self
        result: Tensor = _aten._to_copy.default(self, dtype=dtype, device=device)
        return result

    def cpu(self, *args: Any) -> Tensor:
        """Returns the tensor in host memory."""
        return self.to(_CPU)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Returns the storage, which has a size and an identity, and no bytes."""
        storage: torch.UntypedStorage = self.inner.untyped_storage()
        return storage

    def tolist(self) -> Any:
        """Returns the values that are known or assumed."""
        return self.item() if not self.ndim else [part.tolist() for part in self.unbind()]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a tensor without data was used outside of the meter that made it")


@dataclass(frozen=True, slots=True)
class _Given:
    """In place of a tensor that a function was given."""

    number: int


@dataclass(frozen=True, slots=True)
class _New:
    """In place of a tensor that a function made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What a repeatable function did. rise: of memory above what was held; result: with stand-ins for tensors."""

    kernels: Kernels
    blocks: Counter[Any]
    repeats: Counter[Any]
    rise: Counter[str]
    result: Any


class Meter(TorchDispatchMode):
    """Makes all tensors `Shape`s within its context, and counts.

    Args:
        fraction_routed: The share of a batch of experts' rows that are routed to an expert, where rows are not known.
    """

    def __init__(self, fraction_routed: float = 1.0) -> None:
        super().__init__(_dispatch_key=None)  # type: ignore[no-untyped-call]
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # no device is initialised
        self.memory = Memory()
        self.kernels: dict[str, Kernels] = {}  # by stage
        self._counts, self._stage = True, "forward"
        self._blocks: Counter[tuple[str, tuple[int, ...]]] = (
            Counter()
        )  # of inputs that GPTQ rounded, by stage and shape
        self._fraction = fraction_routed
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._recorded: dict[object, _Recorded] = {}  # calls of repeatable functions
        self._repeats: Counter[tuple[str, object]] = Counter()  # of these, by stage
        self._results: dict[object, tuple[Any, list[tuple[Any, ...]]]] = {}  # what operations that are no views return

    def __enter__(self) -> Meter:
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._replaying = replayed_by(self._replay)
        self._replaying.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._replaying.__exit__(None, None, None)
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _calculate_range.cache_clear()  # which may have kept tensors without data
        _cached_signs.cache_clear()
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts kernels under a stage's name."""
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = before

    piece = stage

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Counts only what is still alive at the end."""
        self._counts, peak = False, self.memory.peak.copy()
        try:
            yield
        finally:
            self._counts = True
            self.memory.peak = peak | self.memory.now

    def total(self, stage: str) -> Kernels:
        """Returns the kernels of a stage, those within GPTQ's blocks and repeated calls among them."""
        found: Kernels = Counter()
        self._add(found, self.kernels.get(stage, Counter()), self._blocks_of(stage), self._repeats_of(stage), 1)
        return found

    def _add(self, found: Kernels, kernels: Kernels, blocks: Any, repeats: Any, times: int) -> None:
        for kernel, count in kernels.items():
            found[kernel] += count * times
        for shape, count in blocks.items():
            for kernel, each in round_block_kernels(*shape).items():
                found[kernel] += each * count * times
        for key, count in repeats.items():
            recorded = self._recorded[key]
            self._add(found, recorded.kernels, recorded.blocks, recorded.repeats, count * times)

    def _blocks_of(self, stage: str) -> Counter[Any]:
        return Counter({shape: count for (of_stage, shape), count in self._blocks.items() if of_stage == stage})

    def _repeats_of(self, stage: str) -> Counter[Any]:
        return Counter({key: count for (of_stage, key), count in self._repeats.items() if of_stage == stage})

    def _replay(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a repeatable function, or returns what it returned for arguments of the same shapes."""
        given: list[Tensor] = []
        key: object = (function, _shape_of(args, given), _shape_of(tuple(kwargs.items()), given))
        recorded = self._recorded.get(key)
        if recorded is None:
            kernels, blocks, repeats = self.kernels, self._blocks, self._repeats
            now, peak = self.memory.now.copy(), self.memory.peak
            self.kernels, self._blocks, self._repeats = {}, Counter(), Counter()
            self.memory.peak = now.copy()
            try:
                result = function(*args, **kwargs)
            finally:
                stage = self._stage
                own = self.kernels.get(stage, Counter()), self._blocks_of(stage), self._repeats_of(stage)
                self.kernels, self._blocks, self._repeats = kernels, blocks, repeats
                rise = Counter({d: self.memory.peak[d] - now[d] for d in self.memory.peak})
                self.memory.peak = peak | self.memory.peak
            recorded = self._recorded[key] = _Recorded(*own, rise, _template(result, given))
        else:
            for device, num_bytes in recorded.rise.items():
                self.memory.peak[device] = max(self.memory.peak[device], self.memory.now[device] + num_bytes)
            result = self._made(recorded.result, given)
        if self._counts:
            self._repeats[self._stage, key] += 1
        return result

    def _made(self, template: Any, given: list[Tensor]) -> Any:
        """Returns a new result of a repeatable function."""
        if isinstance(template, _Given):
            return given[template.number]
        if isinstance(template, _New):
            with _disable_current_modes():
                inner = torch.empty_strided(template.shape, template.stride, dtype=template.dtype, device="meta")
            made = Shape.of(inner, template.device)
            self._track(made)
            return made
        if isinstance(template, (tuple, list)):
            return type(template)(self._made(part, given) for part in template)
        if isinstance(template, dict):
            return {name: self._made(part, given) for name, part in template.items()}
        if is_dataclass(template) and not isinstance(template, type):
            names = [f.name for f in fields(template)]
            return replace(template, **{name: self._made(getattr(template, name), given) for name in names})
        return template

    def know(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Lets an integer tensor have the values that `make` returns."""
        with _disable_current_modes():
            tensor.known = make()  # type: ignore[attr-defined]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _collect(args, tensors)
        _collect(tuple(kwargs.values()), tensors)
        packet = func._overloadpacket
        if packet is _aten._fused_sdp_choice:
            return 1 if tensors[0].device.type == "cpu" else 2  # flash on a CPU, memory-efficient on a GPU
        values = self._values(func, packet, tensors, args, kwargs)
        if values is not None and not isinstance(values, (Tensor, tuple, list)):
            return values  # a number
        if packet is _aten._local_scalar_dense:
            return _assumed(args[0].dtype)
        if packet is _aten.equal:
            return True
        result = self._result(func, packet, args, kwargs, tensors, values)
        outputs: list[Tensor] = []
        _collect((result,), outputs)
        if values is not None:
            known: list[Tensor] = []
            _collect((values,), known)
            for tensor, value in zip(outputs, known, strict=True):
                if value.numel() <= _MOST_KNOWN and isinstance(tensor, Shape):
                    tensor.known = value  # type: ignore[attr-defined]
        if not func.is_view:
            for output in outputs:
                self._track(output)
        if self._counts and not func.is_view and packet not in _WITHOUT_KERNEL:
            found = self.kernels.setdefault(self._stage, Counter())
            if packet.__name__ == "round_block":
                self._blocks[self._stage, tuple(args[0].shape)] += 1
            else:
                found[_kernel(func, args, kwargs, tensors, outputs, result)] += 1
        return result

    def _values(self, func: Any, packet: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Returns what an operation gives whose inputs are all known, if that is integers; else None."""
        if tensors:
            if any(isinstance(tensor, Shape) and not hasattr(tensor, "known") for tensor in tensors):
                return None
            if any(tensor.is_floating_point() for tensor in tensors):
                return None
        elif packet not in _CREATING or _is_floating(packet, args, kwargs):
            return None

        def known(value: Any) -> Any:
            if isinstance(value, Shape):
                return value.known  # type: ignore[attr-defined]
            if isinstance(value, (tuple, list)):
                return type(value)(known(part) for part in value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        values = func(*known(args), **{name: known(value) for name, value in kwargs.items() if name != "pin_memory"})
        return None if isinstance(values, Tensor) and values.is_floating_point() else values

    def _result(self, func: Any, packet: Any, args: Any, kwargs: Any, tensors: list[Tensor], values: Any) -> Any:
        """Carries out an operation on shapes. Where the shape depends on values these are known, or it is assumed."""
        schema = func._schema
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and schema.returns and packet not in (_aten.resize_, _aten.set_):
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            found = [given[a.name] for a in written]
            if all(isinstance(value, Tensor) for value in found) and schema.returns[0].alias_info is not None:
                return found[0] if len(found) == 1 else tuple(found)
        device = next((torch.device(d) for d in (kwargs.get("device"),) if d is not None), None)
        device = device or next((t.device for t in tensors if t.ndim), tensors[0].device if tensors else _CPU)
        if packet is _aten.nonzero and values is not None:
            return Shape.of(torch.empty(values.shape, dtype=torch.int64, device="meta"), device)
        if packet is _aten.index and _is_mask(args[1]):
            source, mask = args[0], args[1][0]
            share = float(mask.known.float().mean()) if hasattr(mask, "known") else self._fraction
            shape = (round(mask.numel() * share), *source.shape[mask.ndim :])
            return Shape.of(torch.empty(shape, dtype=source.dtype, device="meta"), device)
        key = None if func.is_view else (func, _key(args), _key(tuple(kwargs.items())))
        known = self._results.get(key) if key is not None else None
        if known is None:
            inner_kwargs = {name: _inner(value) for name, value in kwargs.items() if name != "pin_memory"}
            inner = func(*_inner(args), **(inner_kwargs if tensors else inner_kwargs | {"device": _META}))
            if isinstance(inner, (Tensor, tuple, list)):
                parts = [inner] if isinstance(inner, Tensor) else list(inner)
                if key is not None and all(isinstance(part, Tensor) for part in parts):
                    self._results[key] = type(inner), [(p.shape, p.stride(), p.dtype) for p in parts]
                shapes = [Shape.of(part, device) if isinstance(part, Tensor) else part for part in parts]
                return shapes[0] if isinstance(inner, Tensor) else type(inner)(shapes)
            return inner
        kind, sizes = known
        shapes = [
            Shape.of(torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)
            for size, stride, dtype in sizes
        ]
        return kind(shapes) if kind in (tuple, list) else shapes[0]

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, device, num_bytes = storage._cdata, tensor.device.type, storage.nbytes()
        if key not in self._alive:
            self.memory.add(device, num_bytes)
            self._alive[key] = weakref.ref(storage, partial(self._free, key, device, num_bytes))

    def _free(self, key: int, device: str, num_bytes: int, storage: object) -> None:
        del self._alive[key]
        self.memory.now[device] -= num_bytes


def _shape_of(value: Any, given: list[Tensor]) -> Any:
    """Returns what a repeatable function's work depends on, as something hashable, and adds its tensors to `given`."""
    if isinstance(value, Tensor):
        same = next((number for number, tensor in enumerate(given) if tensor is value), len(given))
        given.append(value)
        return value.shape, value.stride(), value.dtype, value.device, same
    if isinstance(value, (tuple, list)):
        return tuple(_shape_of(part, given) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_shape_of(getattr(value, f.name), given) for f in fields(value))
    return value


def _template(value: Any, given: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        number = next((number for number, tensor in enumerate(given) if tensor is value), None)
        return _New(tuple(value.shape), value.stride(), value.dtype, value.device) if number is None else _Given(number)
    if isinstance(value, (tuple, list)):
        return type(value)(_template(part, given) for part in value)
    if isinstance(value, dict):
        return {name: _template(part, given) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _template(getattr(value, f.name), given) for f in fields(value)})
    return value


def _collect(values: Any, found: list[Tensor]) -> None:
    """Adds the tensors among nested tuples and lists to `found`."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)


def _inner(value: Any) -> Any:
    """Replaces tensors by those on the meta device, and devices by it, in nested tuples and lists."""
    if isinstance(value, Shape):
        return value.inner
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(map(_inner, value))
    if isinstance(value, torch.device):
        return _META
    return None if isinstance(value, torch.Generator) else value


def _key(value: Any) -> Any:
    """Returns what the shape of a result depends on, as something hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _kernel(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor], result: Any) -> Kernel:
    packet, num_out = func._overloadpacket, sum(map(_num_bytes, outputs))
    num_bytes = num_out + sum(map(_num_bytes, inputs))
    if packet in _GATHERING:
        num_bytes = 2 * num_out
    if packet in (_aten._to_copy, _aten.copy_) and len({tensor.device for tensor in (*inputs, *outputs)}) > 1:
        return Kernel("copy", 0, num_out)
    formula = FLOP_FORMULAS.get(packet) or flop_registry.get(packet)
    if formula is None:
        flops = _factor_flops(func, inputs)
        return Kernel("factor" if flops else "values", flops, num_bytes)
    flops = int(formula(*args, **kwargs, out_val=result))
    return Kernel("attention" if "attention" in str(packet) else _product_kind(inputs), flops, num_bytes)


def _product_kind(inputs: list[Tensor]) -> str:
    """Returns the precision in which a product is multiplied, as torch is set now."""
    dtype, device = inputs[-1].dtype, inputs[-1].device.type
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    if device == "cuda":
        return "tfloat32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    return "bfloat16" if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else "float32"  # type: ignore[attr-defined]


def _factor_flops(func: Any, inputs: list[Tensor]) -> int:
    name = func._overloadpacket.__name__
    if "cholesky_ex" in name:
        return inputs[0].shape[-1] ** 3 // 3
    if "solve_triangular" in name:
        return inputs[0].shape[-1] * inputs[1].numel()
    if "cholesky_solve" in name:
        return 2 * inputs[1].shape[-1] * inputs[0].numel()
    return 0


@cache
def round_block_kernels(num_problems: int, num_inputs: int, num_outputs: int) -> Kernels:
    """Returns the kernels in `quant.gptq.round_block`, which is one operator to torch."""
    values = 4 * num_problems * num_outputs  # bytes of one column of all problems
    found: Kernels = Counter()
    for start in range(0, num_inputs, SUB_BLOCK):
        size = min(SUB_BLOCK, num_inputs - start)
        for before in range(1, size):  # columns of the sub-block whose errors are applied first
            flops = 2 * num_problems * before * num_outputs
            found[Kernel("float32", flops, (before + 1) * values)] += 1
        found[Kernel("values", 0, 3 * values)] += 4 * size - 1  # less what is pushed, code - zero, times scale, error
        found[Kernel("values", 0, 4 * values)] += size  # column / scale + zero
        found[Kernel("values", 0, 2 * values)] += 3 * size  # rounded, clamped, divided by the pivot
        behind = num_inputs - start - size
        found[Kernel("float32", 2 * num_problems * size * behind * num_outputs, (2 * behind + size) * values)] += 1
    found[Kernel("values", 0, 5 * values // 4 * num_inputs)] += 1
    return found


def _num_bytes(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _is_floating(packet: Any, args: Any, kwargs: Any) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        dtype = torch.int64 if packet is _aten.arange and _integers(args) else torch.float32
    return bool(dtype.is_floating_point)


def _integers(args: Any) -> bool:
    return all(isinstance(value, int) for value in args)


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _assumed(dtype: torch.dtype) -> float | int | bool:
    """Returns the value of a single number that is not known: true or positive."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0 if dtype == torch.int32 else 1
