"""What `leanvlm doctor` finds on machines that are described here, line by line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from leanvlm.runtime.commands import doctor
from leanvlm.runtime.machine import gpu
from leanvlm.runtime.machine.gpu import Gpu

H200 = Gpu("NVIDIA H200", 150_754_820_096, (9, 0))
A2000 = Gpu("NVIDIA RTX A2000", 6_225_002_496, (8, 6))
CUDA_RUNS = "bundles for cuda run on NVIDIA H200 (150.8 GB, compute capability 9.0)"
NO_GPU = "no NVIDIA GPU seen (nvidia-smi is not there); bundles for cpu run"
NO_DRIVER = "! the NVIDIA driver (libcuda.so.1) is not installed, or not visible in this container: docker run --gpus all"
UNUSED = "! this GPU is not used: pip uninstall -y onnxruntime, then pip install 'leanvlm[gpu]'"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
GPU_WHEEL = {"onnxruntime-gpu": "1.31.1"}
PROVIDER = "/env/onnxruntime/capi/libonnxruntime_providers_cuda.so"

Machine = Callable[..., list[str]]


def lacks(name: str) -> str:
    return f"! onnxruntime-gpu lacks {name}: pip install 'onnxruntime-gpu[cuda,cudnn]', which is part of 'leanvlm[gpu]'"


def not_found(name: str) -> str:
    """What the loader of glibc says."""
    return f"{name}: cannot open shared object file: No such file or directory"


def onnxruntime(providers: list[str] | None, built: str = "13.0") -> ModuleType:
    """A module in the place of onnxruntime; providers None: its files are half overwritten."""
    module = ModuleType("onnxruntime")
    module.__file__ = "/env/onnxruntime/__init__.py"
    if providers is not None:
        module.get_available_providers = lambda: providers  # type: ignore[attr-defined]
        module.cuda_version = built  # type: ignore[attr-defined]
        module.preload_dlls = lambda: print("Failed to load libcublasLt.so.13")  # type: ignore[attr-defined]
    return module


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A function that describes a machine and returns the report's lines about ONNX Runtime and GPUs."""

    def report(
        packages: dict[str, str],
        *,
        ort: ModuleType | None = None,
        gpus: tuple[Gpu, ...] = (),
        driver: tuple[int, int] | None = (13, 0),
        failures: dict[str, str] | None = None,
        smi: Callable[..., Any] | None = None,
        jetson: str | None = None,
        modules: tuple[str, ...] = (),
        part: str = "running",
        flags: tuple[str, ...] = (),
    ) -> list[str]:
        reasons = failures or {}

        def dlopen(library: str) -> None:
            if library in reasons:
                raise OSError(reasons[library])

        release = tmp_path / "nv_tegra_release"
        if jetson is not None:
            release.write_text(jetson, encoding="utf-8")
        monkeypatch.setitem(sys.modules, "onnxruntime", ort)
        monkeypatch.setattr(doctor, "installed", packages.get)
        monkeypatch.setattr(doctor, "dlopen", dlopen)
        monkeypatch.setattr(doctor, "cpu_flags", lambda: set(flags))
        monkeypatch.setattr(doctor, "JETSON", release)
        # Their modules stay as they are: others use them meanwhile.
        monkeypatch.setattr(doctor, "shutil", SimpleNamespace(which=lambda name: f"/usr/bin/{name}" if smi else None))
        monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=smi, TimeoutExpired=subprocess.TimeoutExpired))
        monkeypatch.setattr(gpu, "gpus", lambda: list(gpus))
        monkeypatch.setattr(gpu, "driver_cuda", lambda: driver)
        monkeypatch.setattr(gpu, "library", lambda name: None if name in reasons else SimpleNamespace())
        monkeypatch.setattr(doctor, "find_spec", lambda name: name if name in modules else None)
        lines = doctor.report().splitlines()
        assert lines[0].startswith("leanvlm ")
        (exporting,) = (number for number, line in enumerate(lines) if line.startswith("exporting"))
        return lines[1:exporting] if part == "running" else lines[exporting + 1 :]

    return report


def smi(output: str, status: int = 0) -> Callable[..., Any]:
    """An nvidia-smi that prints this."""
    return lambda command, **options: subprocess.CompletedProcess(command, status, output, "")


def test_nothing_is_installed(machine: Machine) -> None:
    assert machine({}, failures={"libcuda.so.1": not_found("libcuda.so.1")}) == [
        "! running needs ONNX Runtime: pip install 'leanvlm[cpu]', or 'leanvlm[gpu]' for an NVIDIA GPU",
        NO_GPU,
    ]


def test_openvino_and_what_the_processor_has(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("openvino")
    module.Core = lambda: SimpleNamespace(available_devices=["CPU"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    packages, here = {"onnxruntime": "1.32.0", "openvino": "2026.4.1"}, ("avx512_bf16", "avx512_vnni", "sse2")
    lines = machine(packages, ort=onnxruntime([CPU]), flags=here)
    assert "openvino 2026.4.1: devices CPU; this processor has avx512_bf16, avx512_vnni" in lines
    assert "bundles for cpu: --provider openvino brings the first token sooner here" in lines
    assert any("neither provider was clearly the faster" in line for line in machine(packages, ort=onnxruntime([CPU])))
    assert any("pip install 'leanvlm[openvino]'" in line for line in machine({"onnxruntime": "1.32.0"}, flags=here))


def test_a_processor_alone(machine: Machine) -> None:
    assert machine({"onnxruntime": "1.32.0"}, ort=onnxruntime([CPU])) == [
        "onnxruntime 1.32.0",
        "providers: CPUExecutionProvider",
        NO_GPU,
    ]


def test_a_gpu_that_the_installed_wheel_does_not_use(machine: Machine) -> None:
    assert machine({"onnxruntime": "1.32.0"}, ort=onnxruntime([CPU]), gpus=(H200, A2000)) == [
        "onnxruntime 1.32.0",
        "providers: CPUExecutionProvider",
        "GPU: NVIDIA H200 (150.8 GB, compute capability 9.0)",
        "GPU: NVIDIA RTX A2000 (6.2 GB, compute capability 8.6)",
        UNUSED,
    ]


def test_all_is_there(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU]), gpus=(H200,)) == [
        "onnxruntime-gpu 1.31.1",
        "providers: CUDAExecutionProvider, CPUExecutionProvider",
        CUDA_RUNS,
    ]
    assert capsys.readouterr().out == ""


def test_a_wheel_without_preload_dlls(machine: Machine) -> None:
    """ONNX Runtime before 1.21."""
    old = onnxruntime([CUDA, CPU])
    del old.preload_dlls, old.cuda_version
    assert machine(GPU_WHEEL, ort=old, gpus=(H200,))[-1] == CUDA_RUNS


@pytest.mark.parametrize(
    ("failures", "lines"),
    [
        ({PROVIDER: not_found("libcublasLt.so.13")}, [lacks("libcublasLt.so.13")]),
        ({PROVIDER: not_found("libcudart.so.12")}, [lacks("libcudart.so.12")]),
        ({PROVIDER: not_found("libcurand.so.10")}, [lacks("libcurand.so.10")]),
        ({PROVIDER: not_found("libcufft.so.11")}, [lacks("libcufft.so.11")]),
        ({"libcudnn.so.9": not_found("libcudnn.so.9")}, [lacks("libcudnn.so.9")]),
        (
            {PROVIDER: not_found("libcublasLt.so.13"), "libcudnn.so.9": not_found("libcudnn.so.9")},
            [lacks("libcublasLt.so.13"), lacks("libcudnn.so.9")],
        ),
        (
            {PROVIDER: f"{PROVIDER}: undefined symbol:\n Provider_GetHost"},
            [f"! onnxruntime-gpu does not load: {PROVIDER}: undefined symbol: Provider_GetHost"],
        ),
        (
            {PROVIDER: not_found("libnuma.so.1")},
            [f"! onnxruntime-gpu does not load: {not_found('libnuma.so.1')}"],
        ),
        (
            {PROVIDER: not_found(PROVIDER)},
            [f"! onnxruntime-gpu does not load: {not_found(PROVIDER)}"],
        ),
    ],
    ids=["cublasLt", "cudart of CUDA 12", "curand", "cufft", "cudnn", "CUDA and cudnn", "symbol", "other", "provider"],
)
def test_a_library_is_missing(failures: dict[str, str], lines: list[str], machine: Machine) -> None:
    found = machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU]), gpus=(H200,), failures=failures)
    assert found[2:] == ["GPU: NVIDIA H200 (150.8 GB, compute capability 9.0)", *lines]


def test_the_driver_is_missing(machine: Machine) -> None:
    reason = not_found("libcuda.so.1")
    found = machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU]), driver=None, failures={"libcuda.so.1": reason, PROVIDER: reason})
    assert found[2:] == [NO_GPU, NO_DRIVER]


def test_the_driver_and_cuda_are_missing(machine: Machine) -> None:
    failures = {"libcuda.so.1": not_found("libcuda.so.1"), PROVIDER: not_found("libcublasLt.so.13")}
    found = machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU]), driver=None, failures=failures)
    assert found[2:] == [NO_GPU, NO_DRIVER, lacks("libcublasLt.so.13")]


@pytest.mark.parametrize(("built", "runs"), [("12.8", True), ("13.0", False)])
def test_the_driver_is_older_than_the_wheel(built: str, runs: bool, machine: Machine) -> None:
    found = machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU], built), gpus=(H200,), driver=(12, 4))
    line = "! onnxruntime-gpu is built for CUDA 13.0, the driver supports 12.4: update the NVIDIA driver"
    assert found[2:] == ([CUDA_RUNS] if runs else ["GPU: NVIDIA H200 (150.8 GB, compute capability 9.0)", line])


def test_two_wheels_of_onnxruntime(machine: Machine) -> None:
    found = machine({"onnxruntime": "1.32.0", **GPU_WHEEL}, ort=onnxruntime([CPU]), gpus=(H200,))
    assert found == [
        "onnxruntime 1.32.0",
        "onnxruntime-gpu 1.31.1",
        "! onnxruntime and onnxruntime-gpu overwrite each other's files: "
        "pip uninstall -y onnxruntime onnxruntime-gpu, then install one",
        "providers: CPUExecutionProvider",
        "GPU: NVIDIA H200 (150.8 GB, compute capability 9.0)",
        "! the onnxruntime that loads does not offer CUDA",
    ]


def test_what_is_left_of_a_wheel_after_the_other_was_uninstalled(machine: Machine) -> None:
    found = machine(GPU_WHEEL, ort=onnxruntime(None))
    assert found == [
        "onnxruntime-gpu 1.31.1",
        "! onnxruntime does not load: module 'onnxruntime' has no attribute 'get_available_providers'",
        NO_GPU,
        "! the onnxruntime that loads does not offer CUDA: pip install --force-reinstall --no-deps onnxruntime-gpu",
    ]


@pytest.mark.parametrize(
    ("packages", "line"),
    [
        (
            {"onnxruntime-genai": "0.18.0", "onnxruntime-genai-cuda": "0.18.0", **GPU_WHEEL},
            "! onnxruntime-genai and onnxruntime-genai-cuda overwrite each other's files: "
            "pip uninstall -y onnxruntime-genai onnxruntime-genai-cuda, then install one",
        ),
        (
            {"onnxruntime-genai": "0.18.0", **GPU_WHEEL},
            "! onnxruntime-genai brings onnxruntime, which does not go with onnxruntime-gpu: pip uninstall -y "
            "onnxruntime-genai onnxruntime onnxruntime-gpu, then pip install 'leanvlm[gpu-export]'",
        ),
        (
            {"onnxruntime-genai-cuda": "0.18.0", "onnxruntime": "1.32.0"},
            "! onnxruntime-genai-cuda brings onnxruntime-gpu, which does not go with onnxruntime: pip uninstall -y "
            "onnxruntime-genai-cuda onnxruntime onnxruntime-gpu, then pip install 'leanvlm[gpu-export]'",
        ),
        ({"onnxruntime-genai-cuda": "0.18.0", **GPU_WHEEL}, None),
        ({"onnxruntime-genai": "0.18.0", "onnxruntime": "1.32.0"}, None),
    ],
    ids=["both", "genai with onnxruntime-gpu", "genai-cuda with onnxruntime", "for CUDA", "for the CPU"],
)
def test_builds_of_genai(packages: dict[str, str], line: str | None, machine: Machine) -> None:
    found = [entry for entry in machine(packages, ort=onnxruntime([CUDA, CPU])) if "genai" in entry]
    assert found == ([] if line is None else [line])


@pytest.mark.parametrize(
    ("packages", "failures", "lines"),
    [
        ({"onnxruntime": "1.32.0"}, {"libcuda.so.1": not_found("libcuda.so.1")}, [NO_DRIVER, UNUSED]),
        (GPU_WHEEL, {"libcuda.so.1": not_found("libcuda.so.1")}, [NO_DRIVER]),
        (
            GPU_WHEEL,
            {},
            ["! CUDA sees none of the GPUs of nvidia-smi: mend CUDA_VISIBLE_DEVICES, or restart after an update of the driver"],
        ),
    ],
    ids=["no driver library, no wheel", "no driver library", "hidden"],
)
def test_a_gpu_that_only_nvidia_smi_sees(
    packages: dict[str, str], failures: dict[str, str], lines: list[str], machine: Machine
) -> None:
    tool = smi("NVIDIA H200, 143771 MiB, 580.159.04, 9.0\n")
    found = machine(packages, ort=onnxruntime([CUDA, CPU]), failures=failures, smi=tool)
    assert found[2:] == ["GPU: NVIDIA H200, 143771 MiB, 580.159.04, 9.0", *lines]


def refused(command: list[str], **options: Any) -> Any:
    raise subprocess.TimeoutExpired(command[0], 20)


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        (
            smi("Failed to initialize NVML:\nDriver/library version mismatch\n", 18),
            "! nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch",
        ),
        (refused, "! nvidia-smi fails: Command '/usr/bin/nvidia-smi' timed out after 20 seconds"),
    ],
    ids=["an error", "no answer"],
)
def test_nvidia_smi_fails(tool: Callable[..., Any], line: str, machine: Machine) -> None:
    assert machine({"onnxruntime": "1.32.0"}, ort=onnxruntime([CPU]), smi=tool)[2:] == [line]


@pytest.mark.parametrize("release", ["# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n# more\n", ""])
def test_a_jetson(release: str, machine: Machine) -> None:
    found = machine(GPU_WHEEL, ort=onnxruntime([CUDA, CPU]), gpus=(H200,), jetson=release)
    assert found[2:] == [f"Jetson: {release.splitlines()[0][2:] if release else ''}"]


@pytest.mark.parametrize("jetson", ["# R39 (release), REVISION: 2.0\n", None], ids=["on a Jetson", "elsewhere"])
def test_a_wheel_without_kernels_for_the_gpu(jetson: str | None, machine: Machine, tmp_path: Path) -> None:
    """The wheel of PyPI for aarch64 installs on a Jetson."""
    from test_kernels import AARCH64, ORIN, THOR, installed

    ort = onnxruntime([CUDA, CPU])
    ort.__file__ = installed(tmp_path, AARCH64).__file__
    for here, capability in ((ORIN, "8.7"), (THOR, "11.0")):
        found = machine(GPU_WHEEL, ort=ort, gpus=(here,), jetson=jetson)
        assert found[-1] == (
            f"! this onnxruntime-gpu has no kernels for {here.name} (compute capability {capability}), only for 8.9, 9.0, "
            "12.0, 12.1; install a build that has, or export with --target tensorrt"
        )
        assert not any("bundles for cuda run on" in line for line in found)
    if jetson is None:
        assert machine(GPU_WHEEL, ort=ort, gpus=(H200,))[-1] == CUDA_RUNS


def test_a_tensorrt_that_is_not_for_this_gpu(machine: Machine) -> None:
    from test_kernels import ORIN, THOR

    modules = ("tensorrt", "cuda.bindings")
    found = machine({"tensorrt": "10.13.3.9"}, gpus=(ORIN,), modules=modules, part="engines")
    assert found[1:] == [
        "! NVIDIA does not support TensorRT 10.13.3.9 on sm 87; install 10.3 of JetPack 6 or 10.16 of JetPack 7.2"
    ]
    assert machine({"tensorrt": "10.13.3.9"}, gpus=(THOR,), modules=modules, part="engines")[1:] == []


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
def test_a_gpu_that_tensorrt_rtx_does_not_know(machine: Machine) -> None:
    modules = ("tensorrt_rtx", "cuda.bindings")
    found = machine({"tensorrt_rtx": "1.7.1"}, gpus=(H200,), modules=modules, part="engines")
    assert found[1].startswith("! TensorRT-RTX builds no engines for sm 90, only for 75, 80, 86, 89, 120")
    assert machine({"tensorrt_rtx": "1.7.1"}, gpus=(A2000,), modules=modules, part="engines")[1:] == []


def test_exporting_lists_the_build_of_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch", "transformers", "onnx", "onnxscript", "optimum", "onnxruntime-genai-cuda", "onnxruntime-gpu")
    monkeypatch.setattr(doctor, "installed", dict.fromkeys(names, "1.0").get)
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    assert (
        "exporting: torch 1.0, transformers 1.0, onnx 1.0, onnxscript 1.0, optimum 1.0, onnxruntime-genai-cuda 1.0"
        in doctor.report().splitlines()
    )


def test_a_library_that_is_not_there_is_an_error() -> None:
    with pytest.raises(OSError, match="libnothing-of-this-name"):
        doctor.dlopen("libnothing-of-this-name.so.1")


def test_engines_and_what_they_lack(machine: Machine) -> None:
    nothing = {"libcuda.so.1": not_found("libcuda.so.1")}
    assert machine({}, part="engines") == ["no TensorRT: pip install 'leanvlm[rtx]' adds RTX"]
    built = machine({"tensorrt_rtx": "1.7.1"}, modules=("tensorrt_rtx",), part="engines")
    assert built == [
        "engines: TensorRT-RTX 1.7.1",
        "building works; running engines also needs cuda-python: pip install 'leanvlm[trt]'",
    ]
    modules = ("tensorrt_rtx", "cuda.bindings")
    driverless = machine({"tensorrt_rtx": "1.7.1"}, modules=modules, failures=nothing, part="engines")
    assert driverless[1:] == ["building works; running engines needs an NVIDIA GPU with its driver"]
    assert machine({"tensorrt_rtx": "1.7.1"}, modules=modules, part="engines") == ["engines: TensorRT-RTX 1.7.1"]


def test_a_jetson_needs_the_systems_tensorrt_and_no_onnxruntime(machine: Machine) -> None:
    release = "# R36 (release), REVISION: 4.3\n"
    (line,) = machine({}, jetson=release, part="engines")
    assert "sudo apt install python3-libnvinfer" in line
    assert "--system-site-packages" in line
    running = machine({}, jetson=release, modules=("tensorrt", "cuda.cudart"))
    assert running == [
        "no ONNX Runtime: engines run without it, bundles for cpu need pip install 'leanvlm[cpu]'",
        "Jetson: R36 (release), REVISION: 4.3",
    ]
    found = machine({}, jetson=release, modules=("tensorrt", "cuda.cudart"), part="engines")
    assert found == ["engines: TensorRT of the system"]
