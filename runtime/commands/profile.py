"""`leanvlm profile`: every stage timed, for a budget and for the unpruned model, turn by turn in one run.

So it is for several providers. Wall times: preprocess, the vision graph, splice, prefill, sample and decode. The vision
graph is one call, so its time is divided among vision, project and prune by their shares in a separate pass: with the node
profiler of ONNX Runtime or OpenVINO on the processor, with graphs that end before a stage on a GPU; those three are marked.
Peak memory is that of a fresh process that opens one budget only. On a Jetson the board's own figures come from a further
pass over each budget, so that reading them slows down nothing that is timed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leanvlm.runtime.answer import STAGES, Answer, Timings
from leanvlm.runtime.backends import processors
from leanvlm.runtime.crops import crop
from leanvlm.runtime.encoder import in_parts
from leanvlm.runtime.errors import BackendError, InputError
from leanvlm.runtime.machine import tegrastats
from leanvlm.runtime.machine.gpu import gpus
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.session import Session, load

SCHEMA = 1
SHARED_STAGES = ("vision", "project", "prune")
NODE_RUNS = 5


@dataclass(frozen=True)
class ProfileConfig:
    """What to measure.

    Attributes:
        bundle: The bundle's folder.
        image: Image file; None takes a built-in pattern as JPEG bytes.
        prompt: The question.
        runs: Measured runs of each budget.
        warmup: Runs before, not counted; they include the image.
        max_new_tokens: Tokens of each run; end tokens are passed over so that all runs are alike.
        budget: The pruned budget; None is the bundle's default.
        device: None is the bundle's own.
        provider: As `load` takes it; or several with commas between, which are timed turn by turn.
        threads: Processor threads.
    """

    bundle: Path
    image: Path | None = None
    prompt: str = "Describe the image."
    runs: int = 20
    warmup: int = 3
    max_new_tokens: int = 32
    budget: int | None = None
    device: str | None = None
    provider: str | None = None
    threads: int | None = None


def measure(config: ProfileConfig, on_step: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Run the measurement and return its figures, as `--json` writes them.

    Raises:
        LeanVLMError: The bundle, image or prompt cannot be used.
    """
    image = read_image(config.image)
    alone = [replace(config, provider=name) for name in _providers(config.provider)]
    with ExitStack() as opened:
        sessions = [opened.enter_context(_load(one)) for one in alone]
        manifest = sessions[0].manifest
        asked, whole = manifest.budget(config.budget), manifest.tokens_per_crop
        budgets = [asked] if asked == whole else [asked, whole]
        answers: list[dict[int, list[Answer]]] = [{budget: [] for budget in budgets} for _ in sessions]
        for run in range(-config.warmup, config.runs):
            on_step(f"run {run + 1} of {config.runs}" if run >= 0 else "warming up")
            for budget in budgets:
                for session, found in zip(sessions, answers, strict=True):
                    answer = answer_once(session, config.prompt, image, budget, config.max_new_tokens)
                    if run >= 0:
                        found[budget].append(answer)
        passes = [_passes(session, one, image, budgets, on_step) for session, one in zip(sessions, alone, strict=True)]
        conditions = [_conditions(one, session) for session, one in zip(sessions, alone, strict=True)]
    # The sessions are closed: their weights may leave no room for those of the process whose memory is measured.
    profiles: dict[str, dict[str, Any]] = {}
    for one, found, (shares, boards), about in zip(alone, answers, passes, conditions, strict=True):
        figures: dict[str, Any] = {}
        for budget in budgets:
            on_step(f"measuring the memory of budget {budget}")
            peak = peak_memory(one, budget)
            figures[str(budget)] = {**_figures(found[budget], shares[budget], peak), **boards[budget]}
        profiles[str(one.provider)] = {**about, "budgets": figures, "speedup": _speedup(figures, asked, whole)}
    first = next(iter(profiles.values()))
    # One provider's figures stand where they always stood; beside others, each has its own too.
    return first if len(profiles) == 1 else {**first, "providers": profiles}


def _providers(text: str | None) -> list[str | None]:
    """Return the providers to time, in order; raises InputError where one is named twice."""
    if text is None:
        return [None]
    names: list[str | None] = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--provider {text!r} has a name twice, or none; give such as onnxruntime,openvino")
    return names


def _load(config: ProfileConfig) -> Session:
    return load(config.bundle, device=config.device, provider=config.provider, threads=config.threads, cache_mb=0)


def _passes(
    session: Session, config: ProfileConfig, image: bytes, budgets: Sequence[int], on_step: Callable[[str], None]
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, Any]]]:
    """Return what passes of their own find out, by budget: the shares of the vision graph's stages, and a board's figures."""
    boards = {budget: _board(session, config, image, budget, on_step) for budget in budgets}
    # All crops of one image have one shape.
    ((shape, inputs),) = crop([image], session.manifest.image, session.manifest.crops).inputs.items()
    inputs = in_parts(inputs, session.backend.crops_at_once)[0]
    shares = {}
    for budget in budgets:
        on_step(f"profiling the nodes of budget {budget}")
        shares[budget] = session.backend.vision_shares(session.manifest.vision_graph(budget, shape), inputs, NODE_RUNS)
    return shares, boards


def peak_memory(config: ProfileConfig, budget: int) -> dict[str, int | None]:
    """Return the peak memory of a fresh process that answers once at one budget, in bytes.

    Returns:
        `resident`, the processor's; and `device`, the GPU's with its context, None without one or where no one tells.
    """
    arguments = {
        "bundle": str(config.bundle),
        "image": str(config.image) if config.image else None,
        "prompt": config.prompt,
        "max_new_tokens": config.max_new_tokens,
        "budget": budget,
        "device": config.device,
        "provider": config.provider,
        "threads": config.threads,
    }
    command = [sys.executable, "-m", "leanvlm.runtime.commands.peak", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"the memory measurement failed: {' '.join(done.stderr.split())[-300:]}")
    peaks: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def answer_once(session: Session, prompt: str, image: bytes, budget: int, max_new_tokens: int) -> Answer:
    """Answer once, greedily, with all `max_new_tokens`."""
    return session.generate(prompt, [image], budget=budget, max_new_tokens=max_new_tokens, ignore_end=True)


def read_image(path: Path | None) -> bytes:
    """Return the bytes of an image file, checked, or of a built-in pattern as JPEG."""
    if path is not None:
        load_image(path)
        return path.read_bytes()
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (24, 32, 3)).astype(np.uint8)
    pattern = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    pattern.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _board(
    session: Session, config: ProfileConfig, image: bytes, budget: int, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Return a Jetson's own figures while it answers, under `board`; nothing on other machines."""
    if not tegrastats.available():
        return {}
    on_step(f"reading the board's sensors at budget {budget}")
    board = tegrastats.watch(partial(answer_once, session, config.prompt, image, budget, config.max_new_tokens))
    return {"board": asdict(board)} if board else {}


def _figures(answers: Sequence[Answer], shares: dict[str, float], peak: dict[str, int | None]) -> dict[str, Any]:
    timings = [answer.timings for answer in answers]
    graph = [t.vision for t in timings]
    samples = {
        "preprocess": [t.preprocess for t in timings],
        **{stage: [share * t for t in graph] for stage, share in shares.items()},
        "splice": [t.splice for t in timings],
        "prefill": [t.prefill for t in timings],
        "sample": [s for t in timings for s in t.sample],
        "decode": [d for t in timings for d in t.decode],
    }
    between = [d + s for t in timings for d, s in zip(t.decode, t.sample[1:], strict=True)]
    first = [t.time_to_first_token for t in timings]
    # Medians do not add up; the stages of one run do: that of the median (of two, the sooner).
    median = sorted(timings, key=lambda t: t.time_to_first_token)[(len(timings) - 1) // 2]
    (image,) = answers[0].images
    return {
        "stages_ms": {stage: _quantiles(samples[stage]) for stage in STAGES if stage in samples},
        "first_token_stages_ms": _until_first_token(median, shares),
        "vision_graph_ms": _quantiles(graph),
        "shares_of_vision_graph": shares,
        "time_to_first_token_ms": median.time_to_first_token,
        "time_to_first_token_p90_ms": float(np.quantile(first, 0.9)),
        "inter_token_latency_ms": float(np.median(between)),
        "output_tokens_per_s": float(1e3 * len(between) / sum(between)),
        "peak_memory_bytes": peak["resident"],
        "peak_device_bytes": peak["device"],
        "image_tokens": {"total": image.total, "kept": image.kept},
        "crops": image.crops,
        "prompt_tokens": answers[0].prompt_tokens,
    }


def _until_first_token(timings: Timings, shares: dict[str, float]) -> dict[str, float]:
    """Return what each stage took of one run's time to first token."""
    return {
        "preprocess": timings.preprocess,
        **{stage: share * timings.vision for stage, share in shares.items()},
        "splice": timings.splice,
        "prefill": timings.prefill,
        "sample": timings.sample[0],
    }


def _quantiles(samples: Sequence[float]) -> dict[str, float]:
    return {"p50": float(np.median(samples)), "p90": float(np.quantile(samples, 0.9))}


def _speedup(figures: dict[str, Any], asked: int, whole: int) -> float:
    """Return how many times sooner the first token comes than unpruned."""
    key = "time_to_first_token_ms"
    return float(figures[str(whole)][key] / figures[str(asked)][key])


def _conditions(config: ProfileConfig, session: Session) -> dict[str, Any]:
    """Return what a figure is worth nothing without."""
    mode = tegrastats.power_mode()
    versions = {"leanvlm": version("leanvlm"), "python": platform.python_version(), **session.backend.versions()}
    return {
        "schema": SCHEMA,
        "bundle": str(config.bundle),
        "device": f"{session.backend.device}: {_device(session.backend.device)}",
        "versions": versions,
        "threads": min(config.threads or processors(), processors()),
        "runs": config.runs,
        "warmup": config.warmup,
        "max_new_tokens": config.max_new_tokens,
        "pruner": session.manifest.pruner.name,
        "precision": session.manifest.precision,
        **({"power_mode": mode} if mode else {}),
    }


def _device(device: str) -> str:
    """Return the name of the GPU, with the processor that drives it, or of the processor alone."""
    found = gpus() if device != "cpu" else []
    return f"{found[0].name}, {_processor()}" if found else _processor()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
