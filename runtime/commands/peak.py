"""The process that `profile` starts to measure memory: open one budget, answer, print the peaks in bytes as JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from leanvlm.runtime.commands.profile import answer_once, read_image
from leanvlm.runtime.machine.gpu import process_memory
from leanvlm.runtime.session import load


def main() -> None:
    """Read the request from the first argument, as JSON."""
    asked = json.loads(sys.argv[1])
    image = read_image(Path(asked["image"]) if asked["image"] else None)
    options = {key: asked[key] for key in ("device", "provider", "threads")}
    with load(asked["bundle"], cache_mb=0, **options) as session:
        answer_once(session, asked["prompt"], image, asked["budget"], asked["max_new_tokens"])
        # ONNX Runtime's arena gives nothing back, so what is taken now is the most that was.
        device = process_memory() if session.backend.device != "cpu" else None
    print(json.dumps({"resident": peak_resident_bytes(), "device": device}))


def peak_resident_bytes() -> int:
    """Return this process's peak resident memory.

    `getrusage` would count what the parent held when it forked, so Linux's own figure of the new program comes first.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
