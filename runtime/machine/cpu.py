"""What the processor can do."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_flags() -> set[str]:
    """Return the names of the processor's instruction sets as Linux spells them, such as `avx512_bf16`; none where unknown."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
