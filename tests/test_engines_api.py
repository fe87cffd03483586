"""`leanvlm build` with TensorRT's Python API of each generation, by a stand-in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_builder import NAMES, Settings, tensorrt

from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.engines import jobs as planning
from leanvlm.runtime.engines.build import Builder, build_engines
from leanvlm.runtime.engines.jobs import BuildConfig, plan_build
from leanvlm.runtime.engines.library import network_flags, quiet_logger
from leanvlm.runtime.engines.profiles import Limits
from leanvlm.runtime.errors import BackendError, LeanVLMWarning


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
