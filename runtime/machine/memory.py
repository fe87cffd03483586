"""How much memory a machine has left."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Return the memory that programs can still have, swap included, in bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * (found["MemAvailable"] + found["SwapFree"])
    except (OSError, KeyError, ValueError, IndexError):
        return None
