"""Virtual environments of the peers, made from pinned files in `requirements/`, below the work folder; nothing else is touched.

What our own environment has already (transformers, onnxruntime-genai, ourselves) runs in it; `constraints.txt` pins that.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from bench.beside.prepare import once
from leanvlm.runtime.errors import LeanVLMError

REQUIREMENTS = Path(__file__).parent / "requirements"
OWN = "ours"
ENVIRONMENTS: dict[str, str | None] = {
    OWN: None,
    "openvino-genai": "openvino-genai.txt",
    "optimum-intel": "optimum-intel.txt",
    "llama-cpp": "llama-cpp.txt",
}


def python_of(environment: str, work: Path) -> Path:
    """Return the interpreter of an environment, which is made the first time.

    Raises:
        LeanVLMError: pip could not install it.
    """
    file = ENVIRONMENTS[environment]
    if file is None:
        return Path(sys.executable)
    # A venv holds its own path, so it is made in its place; this mark says that it is whole.
    folder = work / "environments" / environment
    python = folder / "bin" / "python"
    once(folder / "whole.txt", lambda mark: _make(folder, python, REQUIREMENTS / file, mark))
    return python


def _make(folder: Path, python: Path, requirements: Path, mark: Path) -> None:
    print(f"making {folder}", file=sys.stderr)
    venv.create(folder, with_pip=True, clear=True)
    # The files name every package, so that pip need not, and shall not, look for others.
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-r", str(requirements)], check=False)
    if done.returncode:
        raise LeanVLMError(f"pip could not install {requirements.name}; see above")
    mark.write_text(requirements.read_text(encoding="utf-8"), encoding="utf-8")
