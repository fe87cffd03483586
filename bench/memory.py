"""How much of a GPU's memory a bundle takes: its process's at the peak, less that of a process with a CUDA context alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from leanvlm.runtime.machine.gpu import free_memory, process_memory

PERIOD_S = 0.01
PROMPT, NEW_TOKENS = "What is in the image?", 32


def bundle_memory(bundle: Path, budget: int) -> dict[str, Any]:
    """Measure in two fresh processes.

    Returns:
        `device_bytes`, and the two readings with where they are from (`nvml`, or the device's whole use where NVML does not
        tell processes apart).
    """
    context, used = _child("context", bundle, budget), _child("bundle", bundle, budget)
    return {"device_bytes": used["bytes"] - context["bytes"], "context": context, "process": used}


def _child(what: str, bundle: Path, budget: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", what, str(bundle), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed: {done.stderr[-500:]}")
    reading: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reading


def _reading() -> tuple[int, str]:
    """Return the bytes in use now and their source."""
    own = process_memory()
    if own is not None:
        return own, "nvml"
    found = free_memory()
    return (found[1] - found[0] if found else 0), "device"


class Peak(threading.Thread):
    """Reads the memory in use again and again until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.source = _reading()
        self._done = threading.Event()

    def run(self) -> None:
        """Keep the highest reading."""
        while not self._done.wait(PERIOD_S):
            self.bytes = max(self.bytes, _reading()[0])

    def stop(self) -> dict[str, Any]:
        """Stop and return the peak."""
        self._done.set()
        self.join()
        return {"bytes": max(self.bytes, _reading()[0]), "source": self.source}


def main() -> None:
    """Run one of the two processes and print its reading as JSON."""
    what, bundle, budget = sys.argv[1:4]
    if what == "context":
        import torch

        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        print(json.dumps(dict(zip(("bytes", "source"), _reading(), strict=True))))
        return
    import numpy as np

    from leanvlm.runtime.session import load

    image = np.random.default_rng(0).integers(0, 256, (960, 1280, 3)).astype(np.uint8)
    with load(bundle, cache_mb=0) as session:
        peak = Peak()
        peak.start()
        for _ in range(2):
            session.generate(PROMPT, [image], budget=int(budget), max_new_tokens=NEW_TOKENS, ignore_end=True)
        print(json.dumps(peak.stop()))


if __name__ == "__main__":
    main()
