"""A stand-in for TensorRT's builder, of each generation of its Python API: it has the names of the bindings and no more.

The names are those that the modules in the wheels tensorrt-cu12-bindings 10.3.0, tensorrt-cu13-bindings 10.16.1.11 and
11.4.0.106 list.
"""
# ruff: noqa: D101, D102

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir

WEAK = ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
KEPT = ("TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "DIRECT_IO")
AOT = ("PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS")
# Version to the members of NetworkDefinitionCreationFlag, BuilderFlag (those of precision, and some others) and
# HardwareCompatibilityLevel. The last is no release: TensorRT 11 ignores STRONGLY_TYPED, so a later one may lack it.
NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "10.3.0": (("EXPLICIT_BATCH", "STRONGLY_TYPED"), WEAK + KEPT, ("NONE", "AMPERE_PLUS")),
    "10.16.1.11": (
        ("EXPLICIT_BATCH", "STRONGLY_TYPED", *AOT),
        (*WEAK, "FP4", *KEPT),
        ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
    ),
    "11.4.0.106": (("STRONGLY_TYPED", *AOT), KEPT, ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")),
    "12.0.0": (AOT, KEPT, ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")),
}
DTYPES = {"FLOAT16": "HALF"}


class Network:
    def __init__(self, flags: int) -> None:
        self.flags, self.inputs, self.outputs = flags, [], []  # type: ignore[var-annotated]

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class Parser:
    __slots__ = ("network",)

    def __init__(self, network: Network, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        graph = ir.load(path).graph
        self.network.inputs, self.network.outputs = ([_tensor(v) for v in values] for values in (graph.inputs, graph.outputs))
        return True


def _tensor(value: Any) -> Any:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    dtype = SimpleNamespace(name=DTYPES.get(value.dtype.name, value.dtype.name))
    return SimpleNamespace(name=value.name, shape=shape, dtype=dtype, is_shape_tensor=False)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes

    def get_shape(self, name: str) -> Any:
        return self.shapes[name]


class Settings:
    # As in the bindings, an attribute that does not exist cannot be set.
    __slots__ = ("flags", "hardware_compatibility_level", "limits", "profiles", "progress_monitor")

    def __init__(self) -> None:
        self.flags, self.limits, self.profiles = set(), {}, []  # type: ignore[var-annotated]

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool.name] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        return True

    def get_timing_cache(self) -> Any:
        return self.create_timing_cache(b"")


def tensorrt(version: str, built: list[tuple[int, Settings]]) -> Any:
    """What `import tensorrt` gives in a version; `built` lists each network's flags and the settings that it was built with."""
    creation, flags, levels = NAMES[version]

    class Maker:
        def __init__(self, logger: Any) -> None:
            pass

        def create_network(self, flags: int = 0) -> Network:
            return Network(flags)

        create_builder_config = staticmethod(Settings)
        create_optimization_profile = staticmethod(Profile)

        def build_serialized_network(self, network: Network, settings: Settings) -> bytes | None:
            built.append((network.flags, settings))
            settings.progress_monitor.phase_start("build", None, 1)
            if not settings.progress_monitor.step_complete("build", 0):
                return None
            settings.progress_monitor.phase_finish("build")
            return b"engine"

    def enum(name: str, members: tuple[str, ...]) -> Any:
        return IntEnum(name, [(member, at) for at, member in enumerate(members)])

    return SimpleNamespace(
        __version__=version,
        Builder=Maker,
        OnnxParser=Parser,
        IProgressMonitor=type("IProgressMonitor", (), {}),
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}),
        NetworkDefinitionCreationFlag=enum("NetworkDefinitionCreationFlag", creation),
        BuilderFlag=enum("BuilderFlag", flags),
        HardwareCompatibilityLevel=enum("HardwareCompatibilityLevel", levels),
        MemoryPoolType=enum("MemoryPoolType", ("WORKSPACE", "TACTIC_DRAM")),
    )
