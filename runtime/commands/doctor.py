"""`leanvlm doctor`: what this machine has, what is missing for which work, and the line that mends it."""

from __future__ import annotations

import ctypes
import io
import platform
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanvlm.runtime.engines.library import LIBRARIES, known_sms, load_library, this_sm, unsupported
from leanvlm.runtime.machine import gpu
from leanvlm.runtime.machine.cpu import cpu_flags
from leanvlm.runtime.machine.kernels import CUDA_PROVIDER, without_kernels
from leanvlm.runtime.optional import require

EXPORT = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-genai", "optimum")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
# Each build of onnxruntime-genai, and the onnxruntime that it brings.
GENAIS = {"onnxruntime-genai": "onnxruntime", "onnxruntime-genai-cuda": "onnxruntime-gpu"}

JETSON = Path("/etc/nv_tegra_release")
# The provider opens it only when a graph needs it.
CUDNN = "libcudnn.so.9"
# What the extras of onnxruntime-gpu bring.
CUDA_LIBRARIES = ("libcublas", "libcudart", "libcudnn", "libcufft", "libcurand", "libnvrtc", "libnvJitLink")
NO_DRIVER = f"! the NVIDIA driver ({gpu.CUDA}) is not installed, or not visible in this container: docker run --gpus all"


def report() -> str:
    """Return the findings, one a line; a line beginning with `!` is something to mend."""
    number = installed("leanvlm") or "(not installed)"
    lines = [f"leanvlm {number} on Python {platform.python_version()}, {platform.platform()}"]
    lines += _runtimes()
    lines += _openvino()
    lines += _genais()
    lines += _gpus()
    lines += _export()
    lines += _tensorrt()
    return "\n".join(lines)


def installed(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dlopen(library: str) -> None:
    """Load a shared library, by its name or path, for all that are loaded after it; raises OSError."""
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _runtimes() -> list[str]:
    found = {name: v for name in ONNXRUNTIMES if (v := installed(name))}
    if not found and JETSON.is_file() and find_spec("tensorrt"):
        return ["no ONNX Runtime: engines run without it, bundles for cpu need pip install 'leanvlm[cpu]'"]
    if not found:
        return ["! running needs ONNX Runtime: pip install 'leanvlm[cpu]', or 'leanvlm[gpu]' for an NVIDIA GPU"]
    lines = [f"{name} {number}" for name, number in found.items()]
    if len(found) > 1:
        lines.append(
            "! onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall -y "
            "onnxruntime onnxruntime-gpu, then install one"
        )
    try:
        lines.append(f"providers: {', '.join(_onnxruntime().get_available_providers())}")
    except Exception as error:  # A package whose files were half overwritten fails in ways of its own.
        lines.append(f"! onnxruntime does not load: {_one_line(error)}")
    return lines


def _openvino() -> list[str]:
    """Say whether OpenVINO is there, what it has, and which provider is the faster one for bundles for cpu."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    flags = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "amx_int8"})
    has = f"this processor has {', '.join(flags)}" if flags else "this processor has no bfloat16 and no VNNI"
    number = installed("openvino")
    if number is None:
        gain = f"{has}: with pip install 'leanvlm[openvino]', --provider openvino brings the first token sooner"
        return [gain] if {"avx512_bf16", "amx_bf16"} & set(flags) else []
    try:
        devices = require("openvino", "openvino").Core().available_devices
    except Exception as error:  # As above.
        return [f"! openvino does not load: {_one_line(error)}"]
    sooner = "--provider openvino brings the first token sooner here"
    unclear = (
        "without bfloat16 neither provider was clearly the faster; `leanvlm profile --provider onnxruntime,openvino` tells"
    )
    return [
        f"openvino {number}: devices {', '.join(devices)}; {has}",
        f"bundles for cpu: {sooner if {'avx512_bf16', 'amx_bf16'} & set(flags) else unclear}",
    ]


def _genais() -> list[str]:
    found = [name for name in GENAIS if installed(name)]
    if len(found) > 1:
        return [f"! {' and '.join(found)} overwrite each other's files: pip uninstall -y {' '.join(found)}, then install one"]
    wrong = [(name, other) for name in found for other in ONNXRUNTIMES if other != GENAIS[name] and installed(other)]
    return [
        f"! {name} brings {GENAIS[name]}, which does not go with {other}: pip uninstall -y {name} {' '.join(ONNXRUNTIMES)}, "
        f"then pip install 'leanvlm[gpu-export]'"
        for name, other in wrong
    ]


def _gpus() -> list[str]:
    found = gpu.gpus()
    wheel = installed("onnxruntime-gpu") is not None
    if JETSON.is_file():
        release = JETSON.read_text(encoding="utf-8").partition("\n")[0]
        return [f"Jetson: {release.lstrip('# ')}", *(_kernel_problems(found) if wheel else [])]
    problems = _cuda_problems() + _kernel_problems(found) if wheel else []
    start = "bundles for cuda run on" if wheel and not problems else "GPU:"
    seen = [f"{start} {_describe(one)}" for one in found]
    lines = seen or _nvidia_smi()
    if not wheel and any(line.startswith("GPU:") for line in lines):
        lines.append("! this GPU is not used: pip uninstall -y onnxruntime, then pip install 'leanvlm[gpu]'")
    return list(dict.fromkeys(lines + problems))


def _describe(one: gpu.Gpu) -> str:
    major, minor = one.capability
    return f"{one.name} ({one.memory / 1e9:.1f} GB, compute capability {major}.{minor})"


def _kernel_problems(found: list[gpu.Gpu]) -> list[str]:
    """Say for which GPUs the installed onnxruntime-gpu was not compiled: it would fail at the first node of a graph."""
    try:
        ort = _onnxruntime()
        problems = [without_kernels(ort, one) for one in found]
    except Exception:  # As above.
        return []
    return [f"! {line}" for line in problems if line]


def _nvidia_smi() -> list[str]:
    """Say why CUDA sees no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["no NVIDIA GPU seen (nvidia-smi is not there); bundles for cpu run"]
    query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"! nvidia-smi fails: {_one_line(error)}"]
    if done.returncode:
        return [f"! nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())}"]
    lines = [f"GPU: {line.strip()}" for line in done.stdout.splitlines()]
    unseen = "! CUDA sees none of the GPUs of nvidia-smi: mend CUDA_VISIBLE_DEVICES, or restart after an update of the driver"
    return [*lines, NO_DRIVER if gpu.library(gpu.CUDA) is None else unseen]


def _cuda_problems() -> list[str]:
    """Return what keeps the installed onnxruntime-gpu from CUDA, one finding a line."""
    try:
        ort = _onnxruntime()
        offered = "CUDAExecutionProvider" in ort.get_available_providers()
    except Exception:  # As above.
        offered = False
    if not offered:
        # With both wheels installed, what mends it has been said.
        mend = "" if installed("onnxruntime") else ": pip install --force-reinstall --no-deps onnxruntime-gpu"
        return [f"! the onnxruntime that loads does not offer CUDA{mend}"]
    # It prints what it does not find, and versions before 1.21 lack it.
    with redirect_stdout(io.StringIO()), suppress(Exception):
        ort.preload_dlls()
    provider = Path(ort.__file__).parent / "capi" / CUDA_PROVIDER
    return _unloadable(gpu.CUDA, str(provider), CUDNN) + _old_driver(str(getattr(ort, "cuda_version", "")))


def _unloadable(*libraries: str) -> list[str]:
    """Load libraries, and return a line for each cause of failure."""
    lines = []
    for library in libraries:
        try:
            dlopen(library)
        except OSError as error:
            lines.append(_mend(_one_line(error)))
    return list(dict.fromkeys(lines))


def _mend(reason: str) -> str:
    """Turn the loader's reason, such as `libcudart.so.13: cannot open shared object file: …`, into a line."""
    found = re.match(r"(lib[^/:]+): cannot open shared object file", reason)
    name = found[1] if found else ""
    if name == gpu.CUDA:
        return NO_DRIVER
    if name.startswith(CUDA_LIBRARIES):
        return f"! onnxruntime-gpu lacks {name}: pip install 'onnxruntime-gpu[cuda,cudnn]', which is part of 'leanvlm[gpu]'"
    return f"! onnxruntime-gpu does not load: {reason}"


def _old_driver(built: str) -> list[str]:
    """Compare the CUDA version that onnxruntime-gpu was built for, such as `13.0`, with the driver's."""
    supported, needed = gpu.driver_cuda(), re.match(r"\d+", built)
    if supported is None or needed is None or int(needed[0]) <= supported[0]:
        return []
    major, minor = supported
    return [f"! onnxruntime-gpu is built for CUDA {built}, the driver supports {major}.{minor}: update the NVIDIA driver"]


def _export() -> list[str]:
    absent = [name for name in EXPORT if installed(name) is None and not (name in GENAIS and any(map(installed, GENAIS)))]
    if sys.version_info < (3, 11):
        return ["exporting needs Python 3.11 or newer; running does not"]
    if absent:
        return [f"exporting is not set up ({', '.join(absent)} missing): pip install 'leanvlm[export]'"]
    names = dict.fromkeys((*EXPORT, *GENAIS))
    return ["exporting: " + ", ".join(f"{name} {number}" for name in names if (number := installed(name)))]


def _tensorrt() -> list[str]:
    found = [known for known in LIBRARIES.values() if find_spec(known.module)]
    if not found:
        # On Jetson the package is the system's; an environment sees it only if it is made so.
        mend = "sudo apt install python3-libnvinfer, and make the environment with --system-site-packages"
        return [f"no TensorRT: {mend}" if JETSON.is_file() else "no TensorRT: pip install 'leanvlm[rtx]' adds RTX"]
    lines = ["engines: " + ", ".join(f"{known.title} {_version_of(known.module)}" for known in found)]
    if not _importable("cuda.bindings") and not _importable("cuda.cudart"):
        lines.append("building works; running engines also needs cuda-python: pip install 'leanvlm[trt]'")
    elif gpu.library(gpu.CUDA) is None:
        lines.append("building works; running engines needs an NVIDIA GPU with its driver")
    return lines + _engine_problems([known.name for known in found])


def _engine_problems(libraries: list[str]) -> list[str]:
    """Compare this machine's GPU with what the installed libraries build engines for."""
    sm = this_sm()
    if sm is None:
        return []
    number = _version_of("tensorrt")
    lines = [line] if "tensorrt" in libraries and (line := unsupported(number, sm)) else []
    if "tensorrt-rtx" in libraries:
        with suppress(Exception):  # As above.
            known = known_sms(load_library(LIBRARIES["tensorrt-rtx"]))
            if sm not in known:
                lines.append(f"TensorRT-RTX builds no engines for sm {sm}, only for {', '.join(map(str, known))}")
    return [f"! {line}" for line in lines]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # Of its parent.
        return False


def _version_of(module: str) -> str:
    # A distribution's name and its module's are spelled alike; the system's packages may have no distribution.
    return installed(module) or "of the system"


def _onnxruntime() -> Any:
    return require("onnxruntime", "cpu")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
