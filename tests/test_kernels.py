"""Which GPUs a library has kernels for: files laid out here by hand, and a library of NVIDIA's."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanvlm.runtime.backends import cuda
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.machine.gpu import Gpu
from leanvlm.runtime.machine.kernels import CUDA_PROVIDER, Kernels, kernels, without_kernels

ORIN, THOR, SPARK = Gpu("Orin", 64 * 10**9, (8, 7)), Gpu("Thor", 128 * 10**9, (11, 0)), Gpu("GB10", 128 * 10**9, (12, 1))
PTX, SASS = 1, 2
# What the wheel of onnxruntime-gpu 1.31.1 for aarch64 holds.
AARCH64 = [(SASS, 89), (SASS, 90), (SASS, 120), (SASS, 121)]


def container(entries: list[tuple[int, int]], magic: int = 0xBA55ED50, entry_header: int = 64) -> bytes:
    """Kernels as CUDA's compiler packs them, with padding behind; the payload is of no interest, the magic in it neither."""
    body = b""
    for kind, sm in entries:
        payload = struct.pack("<I", magic) * 10
        fields = struct.pack("<HHIQIIHHI", kind, 0x101, entry_header, len(payload), 0, 0, 7, 1, sm)
        body += fields.ljust(64, b"\0") + payload
    return struct.pack("<IHHQ", magic, 1, 16, len(body)) + body + bytes(24)


def library(path: Path, section: bytes, name: bytes = b".nv_fatbin") -> Path:
    """An ELF file of 64 bits with one section, and one for the sections' names."""
    names = b"\0" + name + b"\0.shstrtab\0"
    start = 64 + len(section)
    heads = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 64, len(section)), (2 + len(name), 3, 0, 0, start, len(names))]
    table = b"".join(struct.pack("<IIQQQQ", *head).ljust(64, b"\0") for head in heads)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 183, 1, 0, 0, start + len(names), 0, 64, 56, 0, 64, 3, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + section + names + table)
    return path


def installed(folder: Path, entries: list[tuple[int, int]]) -> Any:
    """An ONNX Runtime whose provider for CUDA holds these kernels."""
    library(folder / "capi" / CUDA_PROVIDER, container(entries))
    return SimpleNamespace(__file__=str(folder / "__init__.py"))


def test_every_container_and_entry_is_read(tmp_path: Path) -> None:
    section = container([(SASS, 75), (SASS, 90)]) + bytes(40) + container([(PTX, 90), (SASS, 120)])
    assert kernels(library(tmp_path / "lib.so", section)) == Kernels(frozenset({75, 90, 120}), frozenset({90}))


@pytest.mark.parametrize(
    ("sass", "ptx", "sm", "runs"),
    [
        ({89, 90, 120, 121}, set(), 87, False),
        ({89, 90, 120, 121}, set(), 110, False),
        ({89, 90, 120, 121}, set(), 121, True),
        ({80, 90}, set(), 86, True),
        ({86}, set(), 80, False),
        ({90}, set(), 100, False),
        ({90}, {90}, 100, True),
        (set(), {90}, 89, False),
    ],
)
def test_machine_code_runs_within_its_generation_and_ptx_on_later_ones(
    sass: set[int], ptx: set[int], sm: int, runs: bool
) -> None:
    assert Kernels(frozenset(sass), frozenset(ptx)).run_on(sm) is runs


def test_what_is_no_library_with_kernels_gives_no_answer(tmp_path: Path) -> None:
    good = library(tmp_path / "good.so", container(AARCH64)).read_bytes()
    files = {"empty": b"", "text": b"#!/bin/sh\n" * 20, "32 bits": good[:4] + b"\x01" + good[5:], "cut": good[: len(good) // 2]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert kernels(tmp_path / name) is None
    assert kernels(tmp_path / "absent") is None
    assert kernels(library(tmp_path / "other", container(AARCH64), b".data")) is None
    assert kernels(library(tmp_path / "another", container(AARCH64, magic=0x12345678))) is None
    assert kernels(library(tmp_path / "endless", container(AARCH64, entry_header=0))) is None


@pytest.mark.skipif(not find_spec("tensorrt_rtx_libs"), reason="TensorRT-RTX is not installed")
def test_a_library_of_nvidias() -> None:
    """TensorRT-RTX: kernels for every GPU that it says it builds for, and for none that CUDA 13 has dropped."""
    from leanvlm.runtime.engines.library import LIBRARIES, known_sms, load_library

    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    found = kernels(next(Path(spec.origin).parent.glob("libtensorrt_rtx.so*")))
    assert found is not None
    assert all(found.run_on(sm) for sm in known_sms(load_library(LIBRARIES["tensorrt-rtx"])))
    assert not any(found.run_on(sm) for sm in (52, 61, 70))


def test_a_board_without_kernels_is_named(tmp_path: Path) -> None:
    ort = installed(tmp_path, AARCH64)
    assert without_kernels(ort, ORIN) == (
        "this onnxruntime-gpu has no kernels for Orin (compute capability 8.7), only for 8.9, 9.0, 12.0, 12.1; "
        "install a build that has, or export with --target tensorrt"
    )
    assert "Thor (compute capability 11.0)" in str(without_kernels(ort, THOR))
    assert without_kernels(ort, SPARK) is None
    assert without_kernels(SimpleNamespace(__file__="/nowhere/__init__.py"), ORIN) is None


def test_a_bundle_for_cuda_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = object.__new__(cuda.CudaBackend)
    backend.ort = installed(tmp_path, AARCH64)
    monkeypatch.setattr(cuda, "gpus", lambda: [ORIN])
    with pytest.raises(BackendError, match=r"no kernels for Orin .* --target tensorrt, or pass --device cpu$"):
        backend._check_kernels()
    for here in ([SPARK], [SPARK, ORIN], []):
        monkeypatch.setattr(cuda, "gpus", lambda here=here: here)
        backend._check_kernels()
