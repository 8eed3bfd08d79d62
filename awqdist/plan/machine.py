"""The measured rates of a machine, as `awqdist doctor` writes them and predictions of run time read them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from awqdist.checkpoint.writer import write_json
from awqdist.errors import AwqdistError

_KIND = "awqdist machine profile 2"


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """Holds the rates of one machine. A copy of n bytes within memory counts as 2n bytes: n read and n written.

    Attributes:
        host: name of the machine.
        device: "cpu", or the name of the GPU.
        threads: number of CPU threads that the rates were measured with.
        read_bytes_per_s: reading from disk.
        write_bytes_per_s: writing to disk, including fsync.
        checksum_bytes_per_s: CRC-32 in one thread.
        hash_bytes_per_s: SHA-256 in one thread.
        dequantized_per_s: FP8 values dequantized.
        host_memory_bytes_per_s: reading and writing of host memory.
        memory_bytes_per_s: reading and writing of the device's memory.
        operation_s: one small operation on a row of a matrix.
        host_to_device_bytes_per_s: copies to the GPU; None without a GPU.
        device_memory_bytes: size of the GPU's memory; None without a GPU.
        network_bytes_per_s: from worker to worker; None where not measured, which one machine alone cannot do.
        matmul_flops_per_s: by dtype, with 2·m·n·k operations for a product of (m, k) and (k, n); "tfloat32" is float32 in
            TensorFloat-32 mode.
    """

    host: str
    device: str
    threads: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    checksum_bytes_per_s: float
    hash_bytes_per_s: float
    dequantized_per_s: float
    host_memory_bytes_per_s: float
    memory_bytes_per_s: float
    operation_s: float
    host_to_device_bytes_per_s: float | None
    device_memory_bytes: int | None
    network_bytes_per_s: float | None = None
    matmul_flops_per_s: dict[str, float] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes the profile as JSON, synced to disk. Raises OutputError."""
        write_json(file, {"kind": _KIND, **asdict(self)})

    @classmethod
    def load(cls, file: Path) -> MachineProfile:
        """Reads a file that `save` wrote. Raises AwqdistError for anything else."""
        try:
            data = json.loads(file.read_text())
            if data.pop("kind") != _KIND or set(data) != {field.name for field in fields(cls)}:
                raise ValueError("the file has other fields or another version")
            return cls(**data)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise AwqdistError(
                f"{file} is not a machine profile ({error}); create one with `awqdist doctor --profile {file}`"
            ) from None
