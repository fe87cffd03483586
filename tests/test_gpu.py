"""Questions to the NVIDIA driver, answered by functions with the C prototypes of cuda.h and nvml.h; and what fits a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
from collections.abc import Callable
from ctypes import POINTER, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from types import SimpleNamespace
from typing import Any

import pytest

from leanvlm.runtime.machine import gpu
from leanvlm.runtime.machine.gpu import Gpu, misfit

# Of cuda.h 13.0, with the names that its macros give: CUdevice and CUdevice_attribute are int, CUcontext a pointer.
CUDA_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
}
NVML_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlShutdown": (),
    "nvmlDeviceGetHandleByIndex_v2": (c_uint, POINTER(c_void_p)),
    "nvmlDeviceGetComputeRunningProcesses_v3": (c_void_p, POINTER(c_uint), c_void_p),
}
INVALID_DEVICE = 101
CONTEXT, HANDLE = 0xC0DE, 0xBEEF
CARDS = [("NVIDIA H200", 150_754_820_096, (9, 0)), ("NVIDIA RTX A2000", 6_225_002_496, (8, 6))]
FREE = 123_456_789_012

Library = SimpleNamespace


def library(prototypes: dict[str, tuple[Any, ...]], functions: dict[str, Callable[..., int]], fail: str | None) -> Library:
    """Return a library of C functions; `fail` is the one that returns an error. `calls` lists the names, in order."""
    fake = SimpleNamespace(calls=[])

    def compiled(name: str) -> Any:
        def called(*arguments: Any) -> int:
            fake.calls.append(name)
            return 999 if name == fail else functions[name](*arguments)

        return ctypes.CFUNCTYPE(c_int, *prototypes[name])(called)

    for name in prototypes:
        setattr(fake, name, compiled(name))
    return fake


def fake_cuda(fail: str | None = None) -> Library:
    """A driver with the GPUs of CARDS, whose device handles are 10 and 11."""

    def write(pointer: Any, value: int) -> int:
        pointer[0] = value
        return 0

    def device(pointer: Any, ordinal: int) -> int:
        return write(pointer, ordinal + 10) if 0 <= ordinal < len(CARDS) else INVALID_DEVICE

    def name(buffer: int, size: int, handle: int) -> int:
        text = CARDS[handle - 10][0].encode() + b"\0"
        assert len(text) <= size
        ctypes.memmove(buffer, text, len(text))
        return 0

    def memory(free: Any, total: Any) -> int:
        assert fake.calls[-2:] == ["cuCtxPushCurrent_v2", "cuMemGetInfo_v2"]
        return write(free, FREE) + write(total, CARDS[0][1])

    functions: dict[str, Callable[..., int]] = {
        "cuInit": lambda flags: flags,
        "cuDriverGetVersion": lambda version: write(version, 12090),
        "cuDeviceGet": device,
        "cuDeviceGetCount": lambda count: write(count, len(CARDS)),
        "cuDeviceGetName": name,
        "cuDeviceTotalMem_v2": lambda size, handle: write(size, CARDS[handle - 10][1]),
        "cuDeviceGetAttribute": lambda value, which, handle: write(value, CARDS[handle - 10][2][which - 75]),
        "cuDevicePrimaryCtxRetain": lambda context, handle: write(context, CONTEXT),
        "cuDevicePrimaryCtxRelease_v2": lambda handle: 0 if handle >= 10 else INVALID_DEVICE,
        "cuCtxPushCurrent_v2": lambda context: 0 if context == CONTEXT else 201,
        "cuCtxPopCurrent_v2": lambda context: write(context, CONTEXT),
        "cuMemGetInfo_v2": memory,
    }
    fake = library(CUDA_PROTOTYPES, functions, fail)
    return fake


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t as nvml.h lays it out: 24 bytes, 4 of them padding after the pid."""

    _fields_ = (("pid", c_uint), ("padding", c_uint), ("used", c_ulonglong), ("instances", c_uint * 2))


def fake_nvml(processes: dict[int, int], fail: str | None = None) -> Library:
    """A library whose device 1 runs these processes: pid to bytes."""

    def handle(index: int, pointer: Any) -> int:
        pointer[0] = HANDLE + index
        return 0

    def running(device: int, count: Any, infos: int) -> int:
        if device != HANDLE + 1 or count[0] < len(processes):
            return 7
        table = (ProcessInfo * len(processes)).from_address(infos)
        for row, (pid, used) in zip(table, processes.items(), strict=True):
            row.pid, row.used, row.instances[:] = pid, used, [0xFFFFFFFF] * 2
        count[0] = len(processes)
        return 0

    functions: dict[str, Callable[..., int]] = {
        "nvmlInit_v2": lambda: 0,
        "nvmlShutdown": lambda: 0,
        "nvmlDeviceGetHandleByIndex_v2": handle,
        "nvmlDeviceGetComputeRunningProcesses_v3": running,
    }
    return library(NVML_PROTOTYPES, functions, fail)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that puts libraries in the place of the machine's: soname to library; the others are not there."""

    def replace(libraries: dict[str, Library]) -> None:
        monkeypatch.setattr(gpu, "library", libraries.get)

    return replace


Install = Callable[[dict[str, Library]], None]


def test_gpus_are_listed(install: Install) -> None:
    install({"libcuda.so.1": fake_cuda()})
    assert gpu.gpus() == [Gpu(*card) for card in CARDS]
    assert gpu.driver_cuda() == (12, 9)


def test_free_memory_takes_the_primary_context_and_gives_it_back(install: Install) -> None:
    cuda = fake_cuda()
    install({"libcuda.so.1": cuda})
    assert gpu.free_memory() == (FREE, CARDS[0][1])
    assert cuda.calls == [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuMemGetInfo_v2",
        "cuCtxPopCurrent_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ]


def test_a_gpu_that_is_not_there_has_no_memory(install: Install) -> None:
    install({"libcuda.so.1": fake_cuda()})
    assert gpu.free_memory(len(CARDS)) is None


@pytest.mark.parametrize(
    "name", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"]
)
def test_an_error_while_asking_for_free_memory_is_no_answer(name: str, install: Install) -> None:
    cuda = fake_cuda(fail=name)
    install({"libcuda.so.1": cuda})
    assert gpu.free_memory() is None
    held = "cuDevicePrimaryCtxRetain" in cuda.calls[:-1]
    assert cuda.calls[-1] == ("cuDevicePrimaryCtxRelease_v2" if held else name)
    assert ("cuCtxPopCurrent_v2" in cuda.calls) == (name == "cuMemGetInfo_v2")


@pytest.mark.parametrize(
    "name",
    ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute"],
)
def test_an_error_while_listing_gives_no_gpu(name: str, install: Install) -> None:
    install({"libcuda.so.1": fake_cuda(fail=name)})
    assert gpu.gpus() == []


def test_an_error_of_the_driver_version_is_no_answer(install: Install) -> None:
    install({"libcuda.so.1": fake_cuda(fail="cuDriverGetVersion")})
    assert gpu.driver_cuda() is None


def test_without_the_libraries_there_is_no_answer(install: Install) -> None:
    install({})
    assert gpu.gpus() == []
    assert gpu.driver_cuda() is None
    assert gpu.free_memory() is None
    assert gpu.process_memory() is None


def test_functions_that_an_old_driver_lacks_are_no_answer(install: Install) -> None:
    old = SimpleNamespace(cuInit=lambda flags: 0, nvmlInit_v2=lambda: 0)
    install({"libcuda.so.1": old, "libnvidia-ml.so.1": old})
    assert gpu.gpus() == []
    assert gpu.driver_cuda() is None
    assert gpu.free_memory() is None
    assert gpu.process_memory() is None


def test_a_library_is_loaded_by_its_name() -> None:
    assert gpu.library("libnothing-of-this-name.so.1") is None
    here = gpu.library(ctypes.util.find_library("c") or "libc.so.6")
    assert here is not None
    assert here.abs(-3) == 3


@pytest.mark.parametrize(
    ("processes", "pid", "expected"),
    [
        ({7: 70, os.getpid(): 5_000_000_000, 9: 90}, None, 5_000_000_000),
        ({7: 70, 9: 90}, 9, 90),
        ({2**31: 70}, None, 70),
        ({1: 70}, None, 0),
        ({7: 70, 9: 90}, None, None),
        ({}, None, None),
        ({7: 2**64 - 1, 9: 90}, 7, None),
        ({pid: pid for pid in range(1, 257)}, 200, 200),
        ({pid: pid for pid in range(1, 258)}, 200, None),
    ],
    ids=[
        "this one",
        "another",
        "the only one",
        "another of this machine",
        "not among several",
        "none",
        "not told",
        "a full table",
        "too many",
    ],
)
def test_the_memory_of_a_process(processes: dict[int, int], pid: int | None, expected: int | None, install: Install) -> None:
    nvml = fake_nvml(processes)
    install({"libnvidia-ml.so.1": nvml})
    assert gpu.process_memory(1, pid) == expected
    assert nvml.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize("name", [name for name in NVML_PROTOTYPES if name != "nvmlShutdown"])
def test_an_error_while_asking_for_a_process_is_no_answer(name: str, install: Install) -> None:
    nvml = fake_nvml({os.getpid(): 70}, fail=name)
    install({"libnvidia-ml.so.1": nvml})
    assert gpu.process_memory(1) is None
    assert nvml.calls[-1] == (name if name == "nvmlInit_v2" else "nvmlShutdown")


def test_what_fits_is_not_a_misfit() -> None:
    assert misfit(14_100_000_000, 100_000_000, 14_600_000_000, "fp16") is None
    assert misfit(14_100_000_000, 100_000_000, 14_599_999_999, "fp16") is not None


@pytest.mark.parametrize(
    ("weights", "precision", "free", "line"),
    [
        (
            14.1,
            "fp16",
            8.0,
            "this bundle needs 14.6 GB of GPU memory (14.1 weights, 0.1 cache, 0.4 workspace) and 8.0 GB are free; "
            "exported with --precision int4 it would need about 4.6 GB",
        ),
        (
            14.1,
            "fp16",
            12.0,
            "this bundle needs 14.6 GB of GPU memory (14.1 weights, 0.1 cache, 0.4 workspace) and 12.0 GB are free; "
            "exported with --precision int8 it would need about 8.3 GB",
        ),
        (
            28.2,
            "fp32",
            16.0,
            "this bundle needs 28.7 GB of GPU memory (28.2 weights, 0.1 cache, 0.4 workspace) and 16.0 GB are free; "
            "exported with --precision fp16 it would need about 15.3 GB",
        ),
        (
            14.1,
            "fp16",
            4.0,
            "this bundle needs 14.6 GB of GPU memory (14.1 weights, 0.1 cache, 0.4 workspace) and 4.0 GB are free; "
            "no precision fits: int4 needs the least, about 4.6 GB",
        ),
        (
            3.9,
            "int4",
            4.0,
            "this bundle needs 4.4 GB of GPU memory (3.9 weights, 0.1 cache, 0.4 workspace) and 4.0 GB are free; "
            "no precision fits: int4 needs the least, about 4.4 GB",
        ),
    ],
    ids=["int4 fits", "int8 fits", "fp16 fits", "none fits", "the least does not fit"],
)
def test_a_misfit_says_what_would_fit(weights: float, precision: str, free: float, line: str) -> None:
    assert misfit(round(weights * 1e9), 100_000_000, round(free * 1e9), precision) == line


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_is_suggested_fits(precision: str) -> None:
    """The bundle that the line asks for, of the size that its precision has, is no misfit."""
    for free in range(5_000_000_000, 14_000_000_000, 250_000_000):
        weights = round(14_000_000_000 * gpu.WEIGHTS[precision])
        line = misfit(weights, 0, free, precision)
        if line is not None and (suggested := re.search(r"--precision (\w+)", line)):
            assert misfit(round(14_000_000_000 * gpu.WEIGHTS[suggested[1]]), 0, free, suggested[1]) is None


@pytest.mark.gpu
def test_a_real_gpu_answers() -> None:
    """What the driver says agrees with itself."""
    first = gpu.gpus()[0]
    found = gpu.free_memory()
    assert found is not None
    free, total = found
    assert 0 < free < total
    assert total == pytest.approx(first.memory, rel=0.02)
    assert first.name
    assert first.capability >= (5, 0)
    assert (gpu.driver_cuda() or (0, 0)) >= (11, 0)
