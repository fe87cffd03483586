"""`leanvlm doctor`: what this machine has, what is missing for which work, and the line that mends it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

EXPORT = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-genai", "optimum")
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
GENAIS = ("onnxruntime-genai", "onnxruntime-genai-cuda")


def report() -> str:
    """Return the findings, one a line; a line beginning with `!` is something to mend."""
    lines = [f"leanvlm {version('leanvlm')} on Python {platform.python_version()}, {platform.platform()}"]
    lines += _runtimes()
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


def _runtimes() -> list[str]:
    found = {name: v for name in ONNXRUNTIMES if (v := installed(name))}
    if not found:
        return ["! running needs ONNX Runtime: pip install 'leanvlm[cpu]', or 'leanvlm[gpu]' for an NVIDIA GPU"]
    lines = [f"{name} {number}" for name, number in found.items()]
    if len(found) > 1:
        lines.append(
            "! onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall -y "
            "onnxruntime onnxruntime-gpu, then install one"
        )
    try:
        import onnxruntime

        lines.append(f"providers: {', '.join(onnxruntime.get_available_providers())}")
    except ImportError as error:
        lines.append(f"! onnxruntime does not load: {error}")
    return lines


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if Path("/etc/nv_tegra_release").is_file():
        release = Path("/etc/nv_tegra_release").read_text(encoding="utf-8").splitlines()[0]
        return [f"Jetson: {release.lstrip('# ')}"]
    if tool is None:
        return ["no NVIDIA GPU seen (nvidia-smi is not there); bundles for cpu run"]
    query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"! nvidia-smi fails: {error}"]
    if done.returncode:
        return [f"! nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())}"]
    lines = [f"GPU: {line.strip()}" for line in done.stdout.splitlines()]
    if installed("onnxruntime-gpu") is None:
        lines.append("! this GPU is not used: pip uninstall -y onnxruntime, then pip install 'leanvlm[gpu]'")
    return lines


def _export() -> list[str]:
    absent = [name for name in EXPORT if installed(name) is None and not (name in GENAIS and any(map(installed, GENAIS)))]
    if sys.version_info < (3, 11):
        return ["exporting needs Python 3.11 or newer; running does not"]
    if absent:
        return [f"exporting is not set up ({', '.join(absent)} missing): pip install 'leanvlm[export]'"]
    return ["exporting: " + ", ".join(f"{name} {installed(name)}" for name in EXPORT if installed(name))]


def _tensorrt() -> list[str]:
    names = [name for name in ("tensorrt_rtx", "tensorrt") if find_spec(name)]
    return [f"TensorRT modules: {', '.join(names)}"] if names else ["no TensorRT: pip install 'leanvlm[rtx]' adds RTX"]
