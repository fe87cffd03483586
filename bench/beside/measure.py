"""Rounds of processes: in each round every row is loaded in a process of its own, measured and ended, one after another.

Only one peer is in memory at a time, so none takes another's cache or memory, and what the machine does beside it comes to all
rows alike. The order of the rows turns by one with each round.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.beside.environments import python_of
from bench.beside.prepare import pictures
from bench.beside.rows import OURS, PEERS, REFERENCE, ROOT, Row
from bench.beside.worker import FIRST, SECOND, TURNS
from leanvlm.runtime.errors import InputError

# What reads them: OpenMP, MKL, OpenBLAS; OpenVINO, ONNX Runtime and llama.cpp are told by their own options.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ALL = 576


@dataclass(frozen=True)
class PeersOptions:
    """What is measured.

    Attributes:
        work: Folder for environments, checkpoint, bundles and conversions, 15 GB; kept for the next run.
        output: JSON file to write, after every round.
        rows: Names of `PEERS` and `OURS`; none are all.
        rounds: How often each row is loaded and measured.
        repeats: Pictures in each, with two questions about each.
        tokens: Of an answer.
        chat_tokens: Of an answer in the chat.
        threads: Of every peer.
        launcher: Put before each process, such as `taskset -c 0,1`.
    """

    work: Path
    output: Path
    rows: tuple[str, ...] = ()
    rounds: int = 3
    repeats: int = 2
    tokens: int = 16
    chat_tokens: int = 8
    threads: int = 2
    launcher: tuple[str, ...] = ()


def measure_peers(options: PeersOptions) -> Path:
    """Prepare what is missing, then measure; a row that fails is recorded with its error, and the others go on.

    Raises:
        InputError: A row that is not known.
    """
    known = {**PEERS, **OURS}
    names = list(options.rows or known)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no row is called {unknown[0]!r}; there are: {'; '.join(known)}")
    record = _conditions(options)
    jobs = {}
    for name in names:
        row = known[name]
        record["rows"][name] = {"module": row.module, "budget": row.budget, "exact": row.exact, "note": row.note, "rounds": []}
        try:
            jobs[name] = _job(row, options)
        except Exception as error:  # Whatever hinders one peer is a result.
            record["rows"][name]["error"] = f"{type(error).__name__}: {error}"
    for turn in range(options.rounds):
        order = list(jobs)
        for name in [*order[turn % len(order) :], *order[: turn % len(order)]]:
            _round(record["rows"][name], jobs[name], options)
            print(f"round {turn + 1}: {name}: {_line(record['rows'][name])}", file=sys.stderr, flush=True)
            _write(options.output, record)
    return options.output


def machine() -> dict[str, Any]:
    """Return the conditions that a command does not say: commit, date, processor and what of its instructions matters here."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    flags = _cpuinfo("flags").split()
    return {
        "commit": done.stdout.strip() or None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{_cpuinfo('model name') or platform.machine()}, {os.cpu_count()} cores",
        "flags": [flag for flag in ("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags],
    }


def _conditions(options: PeersOptions) -> dict[str, Any]:
    return {
        "kind": "peers",
        **machine(),
        "command": "python -m bench peers",
        "threads": options.threads,
        "environment": dict.fromkeys(THREADS, str(options.threads)),
        "rounds": options.rounds,
        "repeats": options.repeats,
        "tokens": options.tokens,
        "chat_tokens": options.chat_tokens,
        "model": "CLIP-L/336 tower, Llama of 12 layers and 1024 columns, random weights",
        "picture": "JPEG, 1280 x 960",
        "prompts": {"first": FIRST, "second": SECOND, "turns": TURNS},
        "reference": REFERENCE,
        "rows": {},
    }


def _job(row: Row, options: PeersOptions) -> tuple[list[str], str]:
    """Make what a row needs and return its process."""
    files = row.files(options.work, options.threads)
    given = {**row.options, row.files_as: str(files.absolute())}
    if row.module == "ours":
        given["budget"] = row.budget or ALL
    if row.module == "ort_genai":
        given["image_tokens"] = ALL
    else:
        given["threads"] = options.threads
    job = {
        "module": f"bench.beside.{row.module}",
        "options": given,
        "pictures": [str(path.absolute()) for path in pictures(options.work)],
        "tokens": options.tokens,
        "chat_tokens": options.chat_tokens,
        "repeats": options.repeats,
    }
    return [
        *options.launcher,
        str(python_of(row.environment, options.work).absolute()),
        "-m",
        "bench.beside.worker",
    ], json.dumps(job)


def _round(row: dict[str, Any], job: tuple[list[str], str], options: PeersOptions) -> None:
    command, text = job
    environment = {**os.environ, **dict.fromkeys(THREADS, str(options.threads))}
    done = subprocess.run([*command, text], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode or not done.stdout.strip():
        row["error"] = "\n".join(done.stderr.strip().splitlines()[-3:])[-600:] or f"exit status {done.returncode}"
    else:
        row["rounds"].append(json.loads(done.stdout.splitlines()[-1]))


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    last = row["rounds"][-1]
    first, second = ([q[which]["first_ms"] for q in last["questions"]] for which in ("first", "second"))
    return f"first {first[-1]:.0f} ms, second {second[-1]:.0f}, chat {[round(a['first_ms']) for a in last['chat']]}"


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def _cpuinfo(key: str) -> str:
    file = Path("/proc/cpuinfo")
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    return ""
