"""Which GPUs a library has kernels for, read from its file: a wheel may install and import where it cannot run.

CUDA's compiler puts kernels into a section of their own, in containers with one entry for each compute capability: machine code
(SASS), or PTX, which the driver compiles for later GPUs. NVIDIA documents the tool that lists them, `cuobjdump --list-elf
--list-ptx` (https://docs.nvidia.com/cuda/cuda-binary-utilities), and which entry runs where ("Binary Compatibility" and "PTX
Compatibility" in the CUDA C++ Programming Guide), but not the headers' layout, which is that of libraries compiled by CUDA 13.
Only headers are read, in a few milliseconds. Where a file is laid out otherwise, there is no answer.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.machine.gpu import Gpu

SECTION = b".nv_fatbin\0"
ELF64 = b"\x7fELF\x02\x01"
# A container begins with its magic number, version, header's size and the size of what follows.
MAGIC, CONTAINER = struct.pack("<I", 0xBA55ED50), struct.Struct("<4sHHQ")
# An entry begins with its kind, version, header's size, size of what follows; the capability stands 12 bytes further.
ENTRY = struct.Struct("<HHIQ12xI")
PTX, SASS = 1, 2
CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"


@dataclass(frozen=True)
class Kernels:
    """Compute capabilities, such as 89, that a library has machine code for, and PTX for."""

    sass: frozenset[int]
    ptx: frozenset[int]

    def run_on(self, sm: int) -> bool:
        """Whether a GPU of compute capability `sm` finds kernels: its own, an earlier minor one's, or PTX."""
        return any(code // 10 == sm // 10 and code <= sm for code in self.sass) or any(code <= sm for code in self.ptx)


def kernels(path: Path) -> Kernels | None:
    """Read which kernels a shared library holds; None where it has none, or is not laid out as described above."""
    found: dict[int, set[int]] = {PTX: set(), SASS: set()}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for kind, sm in _entries(data, *_section(data)):
                found.setdefault(kind, set()).add(sm)
    except (OSError, ValueError, struct.error):
        return None
    return Kernels(frozenset(found[SASS]), frozenset(found[PTX])) if found[SASS] or found[PTX] else None


def _section(data: mmap.mmap) -> tuple[int, int]:
    """Return where the section with kernels begins and ends, from the headers of an ELF file of 64 bits; raises ValueError."""
    if data[:6] != ELF64:
        raise ValueError("not an ELF file of 64 bits")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
    strings = headers[names][4] if names < count else 0
    for name, _, _, _, offset, length in headers:
        if data[strings + name : strings + name + len(SECTION)] == SECTION:
            return offset, min(offset + length, len(data))
    raise ValueError("no kernels")


def _entries(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield kind and compute capability of every entry of every container."""
    while (begin := data.find(MAGIC, begin, end)) >= 0:
        _, _, header, size = CONTAINER.unpack_from(data, begin)
        at, begin = begin + header, begin + header + size
        while at < min(begin, end):
            kind, _, entry, payload, sm = ENTRY.unpack_from(data, at)
            if entry < ENTRY.size:
                raise ValueError("not an entry")
            yield kind, sm
            at += entry + payload


def without_kernels(ort: Any, gpu: Gpu) -> str | None:
    """Say that an ONNX Runtime has no kernels for a GPU, and what would help; None where it has some, or nobody knows.

    Args:
        ort: The imported module.
        gpu: The GPU.
    """
    found = kernels(Path(ort.__file__).parent / "capi" / CUDA_PROVIDER)
    if found is None or found.run_on(gpu.sm):
        return None
    known = ", ".join(f"{sm // 10}.{sm % 10}" for sm in sorted(found.sass | found.ptx))
    major, minor = gpu.capability
    return (
        f"this onnxruntime-gpu has no kernels for {gpu.name} (compute capability {major}.{minor}), only for {known}; "
        "install a build that has, or export with --target tensorrt"
    )
