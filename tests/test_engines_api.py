"""`leanvlm build` with TensorRT's Python API of each generation, by a stand-in that has the names of its bindings and no more.

The names are those that the modules in the wheels tensorrt-cu12-bindings 10.3.0, tensorrt-cu13-bindings 10.16.1.11 and
11.4.0.106 list.
"""
# ruff: noqa: D101, D102

from __future__ import annotations

import shutil
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.engines import plan as planning
from leanvlm.runtime.engines.build import Builder, build_engines
from leanvlm.runtime.engines.library import network_flags, quiet_logger
from leanvlm.runtime.engines.plan import BuildConfig, plan_build
from leanvlm.runtime.engines.profiles import Limits
from leanvlm.runtime.errors import BackendError, LeanVLMWarning

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

        def build_serialized_network(self, network: Network, settings: Settings) -> bytes:
            built.append((network.flags, settings))
            settings.progress_monitor.phase_start("build", None, 1)
            assert settings.progress_monitor.step_complete("build", 0)
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


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(planning, "this_sm", lambda: 86)
    return shutil.copytree(tensorrt_bundle, tmp_path / "bundle")


def build(bundle: Path, version: str, **options: Any) -> tuple[Any, list[tuple[int, Settings]]]:
    built: list[tuple[int, Settings]] = []
    module = tensorrt(version, built)
    config = BuildConfig(bundle, "tensorrt", limits=Limits(2, 700, 1000), **options)
    plan = plan_build(config, read_manifest(bundle), module)
    return build_engines(plan, Builder(module, quiet_logger(module, []), [])), built


@pytest.mark.parametrize("version", NAMES)
def test_every_generation_builds_strongly_typed_networks(version: str, bundle: Path) -> None:
    manifest, built = build(bundle, version, workspace=512, version_compatible=True, hardware="ampere+")
    assert {engine.version for engine in manifest.engines} == {version}
    assert len(built) == len(manifest.engines) == 3
    creation = NAMES[version][0]
    typed = 1 << creation.index("STRONGLY_TYPED") if "STRONGLY_TYPED" in creation else 0
    for flags, settings in built:
        assert flags == typed
        assert settings.flags == {"VERSION_COMPATIBLE"}
        assert settings.hardware_compatibility_level.name == "AMPERE_PLUS"
        assert settings.limits == {"WORKSPACE": 512 << 20}
    assert [len(settings.profiles) for _, settings in built] == [1, 1, 2]


def test_a_level_that_a_version_lacks_is_refused(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 has no --hardware-compatibility same"):
        build(bundle, "10.3.0", hardware="same")
    _, built = build(bundle, "11.4.0.106", hardware="same")
    assert built[0][1].hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"


def test_the_flag_is_worth_what_the_library_says() -> None:
    assert [network_flags(tensorrt(version, [])) for version in NAMES] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("version", "sm", "instead"),
    [
        ("10.13.3.9", 87, "install 10.3 of JetPack 6 or 10.16 of JetPack 7.2"),
        ("11.4.0.106", 87, "install 10.16 of JetPack 7.2, or 11.4.1 from JetPack 7.2.2 on"),
        ("11.3.0.99", 110, "11.4.1 from JetPack 7.2.2 on"),
        *((version, 87, None) for version in ("10.3.0", "10.16.2.10", "11.4.1.12", "11.5.0", "of the system")),
        ("10.13.3.9", 110, None),
        ("11.4.0.106", 86, None),
    ],
)
def test_versions_that_are_not_for_a_jetson(version: str, sm: int, instead: str | None) -> None:
    from leanvlm.runtime.engines.library import unsupported

    found = unsupported(version, sm)
    assert found is None if instead is None else str(found).endswith(instead)


def test_a_build_warns_of_such_a_version(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "this_sm", lambda: 87)
    monkeypatch.setitem(NAMES, "10.13.3.9", NAMES["10.3.0"])
    with pytest.warns(LeanVLMWarning, match=r"NVIDIA does not support TensorRT 10\.13\.3\.9 on sm 87; install 10\.3"):
        build(bundle, "10.13.3.9")
