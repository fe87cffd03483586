"""`python -m bench.startup`: how long the command takes to start, of several installations turn by turn.

    python -m bench.startup --bundle out/demo-64 --output FILE before=OLD/.venv/bin/leanvlm after=.venv/bin/leanvlm

Python itself says how long each import statement took (`-X importtime`); a run's figure is their sum, the interpreter's own
included. Beside it are the whole command's time, and what the processors worked for it, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.errors import InputError

QUESTION = "What is below the green ring?"
SELF_TIME = re.compile(r"^import time: +(\d+) \|", re.MULTILINE)
TIMES = ("imports_ms", "whole_ms", "processors_ms")
TOOLS = ("typer", "rich", "numpy", "pillow", "jinja2", "tokenizers", "onnxruntime")


@dataclass(frozen=True)
class StartupOptions:
    """What is measured: `installations` are names and scripts, `runs` those that count, after one that does not."""

    installations: dict[str, Path]
    bundle: Path
    output: Path
    runs: int

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        """What is started, as the record names it, and its arguments."""
        asked = ("run", str(self.bundle), "--image", str(SAMPLES_DIR / "complex-9003.png"), "--prompt", QUESTION)
        return {"--help": ("--help",), "run --help": ("run", "--help"), "run": asked}


def measure_startup(options: StartupOptions) -> Path:
    """Time each command's imports, and the command as a whole, in each installation; write all samples."""
    samples: dict[str, Any] = {}
    before = os.getloadavg()[0]
    for turn in range(options.runs + 1):
        for name, arguments in options.commands.items():
            for installation, script in options.installations.items():
                cell = samples.setdefault(name, {}).setdefault(installation, {"modules": 0, **{key: [] for key in TIMES}})
                imports, cell["modules"] = _imports(script, arguments)
                if turn:
                    for key, value in zip(TIMES, (imports, *_whole(script, arguments)), strict=True):
                        cell[key].append(round(value, 1))
    record = {
        "kind": "startup",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
        "versions": {"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
        "runs": options.runs,
        "samples": samples,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, cells in samples.items():
        for installation, cell in cells.items():
            middle = ", ".join(f"{key} {statistics.median(cell[key]):.0f} (least {min(cell[key]):.0f})" for key in TIMES)
            print(f"{name}, {installation}: {cell['modules']} modules, {middle}")
    return options.output


def _imports(script: Path, arguments: Sequence[str]) -> tuple[float, int]:
    """Return the milliseconds of all imports of a command, and their number."""
    command = [script.with_name("python"), "-X", "importtime", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [int(self_time) for self_time in SELF_TIME.findall(done.stderr)]
    return sum(found) / 1000, len(found)


def _whole(script: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Return the milliseconds of a command, on the clock and of the processors."""
    began, worked = time.perf_counter(), _worked()
    subprocess.run([script, *arguments], capture_output=True, check=True)
    return 1000 * (time.perf_counter() - began), 1000 * (_worked() - worked)


def _worked() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("installations", nargs="+", metavar="NAME=SCRIPT", help="a name, and the script `leanvlm`")
    parser.add_argument("--bundle", type=Path, required=True, help="of the built-in model")
    parser.add_argument("--runs", type=int, default=15, help="counted runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    with one_line_errors():
        pairs = [pair.partition("=") for pair in args.installations]
        if wrong := [name for name, _, script in pairs if not Path(script).is_file()]:
            raise InputError(f"{wrong[0]} names no script; give NAME=SCRIPT, such as now=.venv/bin/leanvlm")
        scripts = {name: Path(script).absolute() for name, _, script in pairs}
        print(measure_startup(StartupOptions(scripts, args.bundle, args.output, args.runs)))


if __name__ == "__main__":
    main()
