"""How numbers are computed: float32 products at the lowest precision that loses nothing, and tensors read back to Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_replay: list[Callable[..., Any]] = []  # of the meters that are running, the innermost last


@contextmanager
def replayed_by(replay: Callable[..., Any]) -> Iterator[None]:
    """Lets `replay` (function, args, kwargs) stand in for calls of functions that are `repeatable`."""
    _replay.append(replay)
    try:
        yield
    finally:
        _replay.pop()


def repeatable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Marks a function of tensors that changes none of its arguments, so that a meter need run it once for arguments of one shape."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return _replay[-1](function, args, kwargs) if _replay else function(*args, **kwargs)

    return call


def has_data(tensor: Tensor) -> bool:
    """Returns whether a tensor has values; those that a layer is measured on have none (`layer/meter.py`)."""
    return getattr(tensor, "has_data", True)


def read_value(tensor: Tensor, assumed: float) -> float:
    """Returns the value of a tensor with one element, or `assumed` if it has no data, as when a layer is measured."""
    return tensor.item() if has_data(tensor) else assumed


def read_values(tensor: Tensor, assumed: float) -> list[float]:
    """Returns the values of a tensor (n,) as `read_value` does."""
    values: list[float] = tensor.tolist() if has_data(tensor) else [assumed] * tensor.shape[0]
    return values


@cache
def has_fast_bfloat16(device: torch.device) -> bool:
    """Returns whether the hardware multiplies bfloat16. CPUs that do not emulate it, slower than float32."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cuda" or any(capabilities.get(unit) for unit in ("amx_bf16", "avx512_bf16"))


@contextmanager
def low_precision_if_exact(dtype: torch.dtype) -> Iterator[None]:
    """Lets float32 products of values that came in `dtype` run on reduced-precision units where that loses nothing.

    bfloat16 values have 8 significant bits: a bfloat16 (CPU) or TF32 (CUDA) multiplier takes them unrounded, and the sums are
    float32 all the same. float16 fits TF32 only. Other dtypes are multiplied in full float32. torch has one such setting for the whole
    process: threads that overlap in here share it, and the last to leave restores what the first one found.
    """
    with ExitStack() as stack:
        if dtype == torch.bfloat16:
            stack.enter_context(_CPU_BF16)
        if dtype in (torch.bfloat16, torch.float16):
            stack.enter_context(_CUDA_TF32)
        yield


class _Lowered:
    """Lowers a process-wide precision while any thread is in this context."""

    def __init__(self, backend: Any, precision: str) -> None:
        self._backend, self._precision = backend, precision
        self._lock, self._num_inside, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._before = self._backend.fp32_precision
                self._backend.fp32_precision = self._precision
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._backend.fp32_precision = self._before


_CPU_BF16 = _Lowered(torch.backends.mkldnn.matmul, "bf16")  # type: ignore[attr-defined]
_CUDA_TF32 = _Lowered(torch.backends.cuda.matmul, "tf32")
