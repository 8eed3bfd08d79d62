"""Kernels that transformers takes from optional packages wherever those are installed, and that run on GPUs only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Lock

import torch

_PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")
_lock = Lock()
_num_users = 0
_is_exporting = torch.compiler.is_exporting


@contextmanager
def reference_kernels(device: torch.device) -> Iterator[None]:
    """transformers' own torch code in place of such kernels, if `device` is no GPU: the CPU, or meta.

    transformers falls back to it while a model is exported, and asks torch whether one is. Threads may be within this side by side.
    """
    global _num_users
    if device.type == "cuda" or not any(find_spec(package) for package in _PACKAGES):
        yield
        return
    with _lock:
        _num_users += 1
        torch.compiler.is_exporting = lambda: True
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if not _num_users:
                torch.compiler.is_exporting = _is_exporting
