"""The two libraries that build and run engines, which share one Python API: TensorRT and TensorRT for RTX."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from leanvlm.runtime.errors import BackendError, InputError, MissingExtraError
from leanvlm.runtime.machine import gpu
from leanvlm.runtime.optional import require
from leanvlm.runtime.specs import Engine

# The first whose Python API has strongly typed networks, int64 tensors and progress monitors together: JetPack 6.2's.
LEAST = (10, 3)
# A tenth of the library's size, without a builder.
LEAN = "tensorrt_lean"
# The parser of an older one does not know opset 23's attention.
FUSED = (10, 14)


@dataclass(frozen=True)
class Gap:
    """Versions of TensorRT, from `first` to before `until`, that NVIDIA does not support on a Jetson's compute capabilities."""

    first: tuple[int, ...]
    until: tuple[int, ...]
    sms: tuple[int, ...]
    instead: str


# Of NVIDIA-ISAAC-ROS/isaac-ros-cli issue 22 and the release notes of TensorRT 10.16.1; and of "Migrating TensorRT from 10.x to
# 11.x on Jetson/JetPack" in the documentation of 11.2.1, 11.3.0, 11.4.0 and 11.4.1.
GAPS = (
    Gap((10, 13), (10, 16), (87,), "10.3 of JetPack 6 or 10.16 of JetPack 7.2"),
    Gap((11, 2), (11, 4, 1), (87, 110), "10.16 of JetPack 7.2, or 11.4.1 from JetPack 7.2.2 on"),
)


@dataclass(frozen=True)
class Library:
    """One of the libraries.

    Attributes:
        name: As `--engine` and the manifest spell it.
        title: As its users do.
        module: What Python imports.
        extra: What installs it, or what it needs beside.
        tool: Its own program that builds engines.
    """

    name: Engine
    title: str
    module: str
    extra: str
    tool: str


LIBRARIES = {
    "tensorrt-rtx": Library("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "rtx", "tensorrt_rtx"),
    "tensorrt": Library("tensorrt", "TensorRT", "tensorrt", "trt", "trtexec"),
}


def library(name: str) -> Library:
    """Return the library of an engine's kind; raise InputError for an unknown one."""
    if name not in LIBRARIES:
        raise InputError(f"--engine {name!r} is not known; known: {', '.join(LIBRARIES)}")
    return LIBRARIES[name]


def load_library(wanted: Library) -> ModuleType:
    """Import a library.

    Raises:
        MissingExtraError: It is not installed.
        BackendError: It is too old.
    """
    try:
        module = require(wanted.module, wanted.extra)
    except MissingExtraError as error:
        if wanted.name != "tensorrt":
            raise
        raise MissingExtraError(
            "TensorRT is not installed: on Jetson it comes with JetPack (make the environment with --system-site-packages), "
            "elsewhere pip install tensorrt; TensorRT-RTX is --engine tensorrt-rtx"
        ) from error
    if wanted.name == "tensorrt" and number(module.__version__)[:2] < LEAST:
        raise BackendError(f"TensorRT {module.__version__} is too old; 10.3 (JetPack 6.2) or newer is needed")
    return module


def load_runtime(wanted: Library, version_compatible: bool) -> ModuleType:
    """Import what runs a library's engines: itself, or TensorRT's lean runtime where that suffices.

    Args:
        wanted: The library.
        version_compatible: Whether the engines were built to be run by later versions, which the lean runtime asks for.

    Raises:
        MissingExtraError: Neither is installed.
    """
    if wanted.name == "tensorrt" and version_compatible and find_spec(wanted.module) is None and find_spec(LEAN):
        return require(LEAN, wanted.extra)
    return load_library(wanted)


def number(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, such as (10, 3, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def unsupported(version: str, sm: int) -> str | None:
    """Say that a version of TensorRT is not for a Jetson's GPU, and which is; None where nothing is known against it."""
    found = next((gap for gap in GAPS if sm in gap.sms and gap.first <= number(version) < gap.until), None)
    return None if found is None else f"NVIDIA does not support TensorRT {version} on sm {sm}; install {found.instead}"


def network_flags(module: Any) -> int:
    """Return the flags of a network whose dtypes are those written in its graph: the only kind from TensorRT 11 on.

    11.4 still has the name, and ignores it; what comes after may not.
    """
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def quiet_logger(module: Any, lines: list[str]) -> Any:
    """Return a logger of the library that keeps its errors in `lines` instead of printing them."""

    class Kept(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                lines.append(" ".join(text.split()))

    return Kept()


def known_sms(module: Any) -> tuple[int, ...]:
    """Return the compute capabilities that TensorRT-RTX builds for, such as (80, 86, 89, 120)."""
    names = [name for name in dir(module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return tuple(sorted(int(name[2:]) for name in names))


def this_sm() -> int | None:
    """Return the compute capability of this machine's first GPU, such as 87, or None without one."""
    found = gpu.gpus()
    return found[0].sm if found else None
