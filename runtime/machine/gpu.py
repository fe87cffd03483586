"""What the NVIDIA driver says of its GPUs, and whether a model fits one.

The driver's libraries are asked through ctypes, so nothing has to be installed beside the driver: libcuda.so.1 (the CUDA Driver
API, https://docs.nvidia.com/cuda/cuda-driver-api) is on desktops and on Jetson, libnvidia-ml.so.1 (NVML,
https://docs.nvidia.com/deploy/nvml-api) mostly on desktops. Where a library or a function is missing, or answers with an error,
there is no answer: None, or an empty list.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CUDA = "libcuda.so.1"
NVML = "libnvidia-ml.so.1"

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
CAPABILITY = (75, 76)
NAME_BYTES = 256
# More compute processes than share a GPU in practice; NVML refuses a shorter table than it needs.
PROCESSES = 256
NVML_VALUE_NOT_AVAILABLE = 2**64 - 1

# Bytes kept for CUDA's libraries and their workspaces, beside weights and cache.
WORKSPACE = 400_000_000
# Size of a model's weights at a precision, relative to fp16; the scales of quantised blocks are in it.
WEIGHTS = {"fp32": 2.0, "fp16": 1.0, "int8": 0.53, "int4": 0.28}
# An estimate of weights that were not exported yet is multiplied by this: what some models keep in fp16 differs.
ALLOWANCE = 1.05


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: As the driver calls it, such as `NVIDIA H200`.
        memory: All of its memory, in bytes; on Jetson that of the system, which it shares.
        capability: Its compute capability (major, minor), such as (9, 0).
    """

    name: str
    memory: int
    capability: tuple[int, int]

    @property
    def sm(self) -> int:
        """Its compute capability as one number, such as 90."""
        return 10 * self.capability[0] + self.capability[1]


class _Process(ctypes.Structure):
    """NVML's nvmlProcessInfo_t."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint),
        ("computeInstanceId", ctypes.c_uint),
    )


def library(soname: str) -> Any | None:
    """Return a shared library of the system, loaded with ctypes, or None if it is not there."""
    try:
        return ctypes.CDLL(soname)
    except OSError:
        return None


def gpus() -> list[Gpu]:
    """Return the GPUs that CUDA sees, in its order; `CUDA_VISIBLE_DEVICES` applies."""
    cuda, count = _cuda(), ctypes.c_int()
    if cuda is None or not _done(cuda, "cuDeviceGetCount", ctypes.byref(count)):
        return []
    return [found for ordinal in range(count.value) if (found := _gpu(cuda, ordinal))]


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version (major, minor) that the driver supports, such as (13, 0)."""
    cuda, version = library(CUDA), ctypes.c_int()
    if cuda is None or not _done(cuda, "cuDriverGetVersion", ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def free_memory(device: int = 0) -> tuple[int, int] | None:
    """Return a GPU's free and total memory, in bytes.

    CUDA answers within a context. This takes the device's primary one, which ONNX Runtime uses too; if nobody holds it yet,
    it is made for the question and dropped after, and its own few hundred MB count as used in the answer.

    Args:
        device: The GPU's number in CUDA's order, from 0.
    """
    cuda, handle, free, total = _cuda(), ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    if cuda is None or not _done(cuda, "cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device)):
        return None
    with _primary_context(cuda, handle) as current:
        known = current and _done(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return (free.value, total.value) if known else None


def process_memory(device: int = 0, pid: int | None = None) -> int | None:
    """Return the memory that a process holds on a GPU, in bytes: its allocations, contexts and loaded code.

    NVML counts processes by their numbers outside of containers. A process that is not among them is taken to be the one
    compute process on the device, if there is exactly one and nobody here has its number; so inside a container the answer is
    right while nothing else runs on the GPU. Where that one is another process of this machine, the answer is 0.

    Args:
        device: The GPU's number as nvidia-smi counts, from 0; `CUDA_VISIBLE_DEVICES` does not apply.
        pid: The process; None for this one.
    """
    nvml = library(NVML)
    if nvml is None or not _done(nvml, "nvmlInit_v2"):
        return None
    try:
        used = _used_memory(nvml, device)
    finally:
        _done(nvml, "nvmlShutdown")
    asked = os.getpid() if pid is None else pid
    found = used.get(asked)
    if found is None and len(used) == 1:
        (other,) = used
        found = 0 if Path(f"/proc/{other}").exists() else used[other]
    return None if found == NVML_VALUE_NOT_AVAILABLE else found


def misfit(weights: int, cache: int, free: int, precision: str) -> str | None:
    """Say that a bundle does not fit a GPU, and what would.

    Args:
        weights: Bytes of the bundle's weights, at its precision.
        cache: Bytes of the decoder's cache, which a lower precision of the weights leaves as it is.
        free: Bytes that the GPU has free.
        precision: The bundle's: fp32, fp16, int8 or int4.

    Returns:
        None if weights, cache and `WORKSPACE` fit; else one line that names the most precise export that would fit.
    """
    beside = cache + WORKSPACE
    if weights + beside <= free:
        return None
    needs = {
        name: weights / WEIGHTS[precision] * size * ALLOWANCE + beside
        for name, size in WEIGHTS.items()
        if size < WEIGHTS[precision]
    }
    parts = f"{_gb(weights)} weights, {_gb(cache)} cache, {_gb(WORKSPACE)} workspace"
    problem = f"this bundle needs {_gb(weights + beside)} GB of GPU memory ({parts}) and {_gb(free)} GB are free"
    for name, need in needs.items():
        if need <= free:
            return f"{problem}; exported with --precision {name} it would need about {_gb(need)} GB"
    least, need = list(needs.items())[-1] if needs else (precision, weights + beside)
    return f"{problem}; no precision fits: {least} needs the least, about {_gb(need)} GB"


def _done(library: Any, name: str, *arguments: Any) -> bool:
    """Call a library's function and say whether it succeeded; an old driver may lack it."""
    function = getattr(library, name, None)
    return function is not None and function(*arguments) == 0


def _cuda() -> Any | None:
    """Return the CUDA Driver API, initialised."""
    cuda = library(CUDA)
    return cuda if cuda is not None and _done(cuda, "cuInit", ctypes.c_uint(0)) else None


def _gpu(cuda: Any, ordinal: int) -> Gpu | None:
    handle, memory = ctypes.c_int(), ctypes.c_size_t()
    name, capability = ctypes.create_string_buffer(NAME_BYTES), (ctypes.c_int(), ctypes.c_int())
    known = (
        _done(cuda, "cuDeviceGet", ctypes.byref(handle), ctypes.c_int(ordinal))
        and _done(cuda, "cuDeviceGetName", name, ctypes.c_int(NAME_BYTES), handle)
        and _done(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
        and all(
            _done(cuda, "cuDeviceGetAttribute", ctypes.byref(part), ctypes.c_int(attribute), handle)
            for part, attribute in zip(capability, CAPABILITY, strict=True)
        )
    )
    major, minor = capability
    return Gpu(name.value.decode(errors="replace"), memory.value, (major.value, minor.value)) if known else None


@contextmanager
def _primary_context(cuda: Any, handle: ctypes.c_int) -> Iterator[bool]:
    """Make a device's primary context the thread's current one for a while; yields whether that worked."""
    context, popped = ctypes.c_void_p(), ctypes.c_void_p()
    if not _done(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle):
        yield False
        return
    try:
        current = _done(cuda, "cuCtxPushCurrent_v2", context)
        yield current
        if current:
            _done(cuda, "cuCtxPopCurrent_v2", ctypes.byref(popped))
    finally:
        _done(cuda, "cuDevicePrimaryCtxRelease_v2", handle)


def _used_memory(nvml: Any, device: int) -> dict[int, int]:
    """Return the bytes that each compute process holds on a device; empty if NVML does not tell."""
    handle, count, table = ctypes.c_void_p(), ctypes.c_uint(PROCESSES), (_Process * PROCESSES)()
    known = _done(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(device), ctypes.byref(handle)) and _done(
        nvml, "nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), table
    )
    return {process.pid: process.usedGpuMemory for process in table[: count.value]} if known else {}


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
