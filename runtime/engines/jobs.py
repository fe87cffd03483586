"""What a build will do, checked before it starts: which engines, for which GPUs, with which shapes, and what they need."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanvlm.runtime.bundle import inside
from leanvlm.runtime.engines.library import FUSED, LIBRARIES, Library, known_sms, number, this_sm, unsupported
from leanvlm.runtime.engines.profiles import (
    Limits,
    Profile,
    decoder_profiles,
    shapes_text,
    usual_image,
    usual_limits,
    vision_profile,
    whole_profile,
)
from leanvlm.runtime.errors import InputError, LeanVLMWarning
from leanvlm.runtime.machine.memory import available_memory
from leanvlm.runtime.manifest import MANIFEST, Manifest
from leanvlm.runtime.outputs import check_folder
from leanvlm.runtime.specs import GraphSpec

TURING = 75
HARDWARE = ("none", "ampere+", "same")
# As trtexec spells them.
LEVELS = {"ampere+": "ampere+", "same": "sameComputeCapability"}
ENGINES = Path("engines")
# A build holds the weights as the file, the parser and the builder have them, and once and a half more for every profile, each
# of which packs its own; to that come the libraries. Measured with TensorRT-RTX 1.7: bench/results/build-memory.json.
COPIES, COPIES_A_PROFILE, BESIDE = 2.0, 1.5, 500_000_000
ENGINE_BESIDE = 25_000_000


@dataclass(frozen=True)
class BuildConfig:
    """What is asked for.

    Attributes:
        bundle: The bundle's folder.
        engine: `tensorrt-rtx` or `tensorrt`.
        sms: Compute capabilities, such as 89; empty for this machine's.
        budgets: Image tokens kept; empty for all of the bundle's.
        limits: The largest sizes.
        workspace: The most memory that a layer may use while it runs, in MB; None leaves it to the library.
        hardware: `none`, `ampere+` or `same`: let TensorRT engines run on other GPUs too, at some cost.
        version_compatible: Let later versions run the engines.
        single_profile: Build the decoder's engine with one profile for prompts and single tokens, which halves it.
        timing_cache: File that keeps what was timed, for the next build; None is the bundle's own.
        force: Build although less memory is free than the estimate says.
    """

    bundle: Path
    engine: str
    sms: tuple[int, ...] = ()
    budgets: tuple[int, ...] = ()
    limits: Limits = field(default_factory=Limits)
    workspace: int | None = None
    hardware: str = "none"
    version_compatible: bool = False
    single_profile: bool = False
    timing_cache: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.engine not in LIBRARIES:
            raise InputError(f"--engine {self.engine!r} is not known; known: {', '.join(LIBRARIES)}")
        if self.hardware not in HARDWARE:
            raise InputError(f"--hardware-compatibility {self.hardware!r} is not known; known: {', '.join(HARDWARE)}")
        if self.hardware != "none" and self.engine == "tensorrt-rtx":
            raise InputError("--hardware-compatibility is for --engine tensorrt; for TensorRT-RTX name the GPUs with --sm")
        if self.workspace is not None and self.workspace < 1:
            raise InputError(f"--workspace {self.workspace} is not possible; give megabytes, such as 512")

    @property
    def library(self) -> Library:
        """The library that builds."""
        return LIBRARIES[self.engine]


@dataclass(frozen=True)
class EngineJob:
    """One engine to build: a graph, its budget (None for the decoder), for which GPU and shapes, and where it goes."""

    graph: GraphSpec
    budget: int | None
    sm: int
    profiles: tuple[Profile, ...]
    file: Path

    @property
    def stages(self) -> str:
        """The stages that the graph serves."""
        return "prefill and decode" if self.budget is None else "vision"


@dataclass(frozen=True)
class BuildPlan:
    """The engines of a build, and what is needed for them: `memory` bytes at once, `disk` bytes in all."""

    config: BuildConfig
    manifest: Manifest
    jobs: tuple[EngineJob, ...]
    memory: int
    disk: int


def plan_build(config: BuildConfig, manifest: Manifest, module: Any) -> BuildPlan:
    """Check a request against the bundle, the library and this machine.

    Args:
        config: The request.
        manifest: The bundle's.
        module: The imported library.

    Raises:
        InputError: Anything that the build would fail on later and that can be known now.
    """
    _check_target(config, manifest, module)
    sms = _sms(config, module)
    limits = usual_limits(manifest, config.limits)
    budgets = [manifest.budget(budget) for budget in config.budgets] or list(manifest.budgets)
    jobs = []
    for sm in sms:
        folder = ENGINES / str(sm)
        # Graphs of one file are one, whatever budgets they serve.
        graphs = {graph.file: graph for budget in budgets for graph in manifest.vision if graph.budget == budget}
        for graph in graphs.values():
            file = folder / f"{Path(graph.file).stem}.engine"
            jobs.append(EngineJob(graph, graph.budget, sm, (vision_profile(graph, limits),), file))
        profiles = _decoder_profiles(config, manifest, limits)
        jobs.append(EngineJob(manifest.decoder.graph, None, sm, profiles, folder / "decoder.engine"))
    for job in jobs:
        inside(config.bundle, str(job.file))
    sizes = [(len(job.profiles), _weights(manifest, job.graph)) for job in jobs]
    memory = max(int((COPIES + COPIES_A_PROFILE * count) * size) for count, size in sizes) + BESIDE
    disk = sum(count * size + ENGINE_BESIDE for count, size in sizes)
    plan = BuildPlan(config, manifest, tuple(jobs), memory, disk)
    _check_paths(plan)
    _check_room(plan)
    return plan


def _decoder_profiles(config: BuildConfig, manifest: Manifest, limits: Limits) -> tuple[Profile, ...]:
    shapes = (manifest.decoder, limits, usual_image(manifest))
    return (whole_profile(*shapes),) if config.single_profile else decoder_profiles(*shapes)


def _check_target(config: BuildConfig, manifest: Manifest, module: Any) -> None:
    if manifest.target not in LIBRARIES:
        raise InputError(
            f"a bundle for {manifest.target} holds operators that TensorRT does not know; "
            f"export it with --target {config.engine}"
        )
    if manifest.target == "tensorrt-rtx" and config.engine == "tensorrt" and number(module.__version__)[:2] < FUSED:
        raise InputError(
            f"a bundle for tensorrt-rtx needs TensorRT 10.14 or newer and {module.__version__} is installed; "
            "export it with --target tensorrt"
        )


def _sms(config: BuildConfig, module: Any) -> tuple[int, ...]:
    here = this_sm()
    if config.engine == "tensorrt":
        if here is None:
            raise InputError("TensorRT builds engines on the GPU that they will run on, and this machine shows none")
        if config.sms not in ((), (here,)):
            raise InputError(f"TensorRT builds for the GPU that it runs on, which is sm {here}; leave --sm out")
        if problem := unsupported(module.__version__, here):
            warnings.warn(problem, LeanVLMWarning, stacklevel=3)
        return (here,)
    known = tuple(sm for sm in known_sms(module) if sm != TURING)
    names = ", ".join(map(str, known))
    if not config.sms and here is None:
        raise InputError(f"this machine shows no GPU; name those to build for with --sm, of {names}")
    sms = config.sms or (here or 0,)
    for sm in sms:
        if sm == TURING:
            raise InputError(
                "sm 75 (Turing) has no fp32 products in TensorRT-RTX, which choosing the tokens needs; known: " + names
            )
        if sm not in known:
            raise InputError(f"sm {sm} is not one that TensorRT-RTX {module.__version__} builds for; known: {names}")
    return tuple(dict.fromkeys(sms))


def _weights(manifest: Manifest, graph: GraphSpec) -> int:
    """Return the bytes of a graph's weights, which lie beside it; all vision graphs share one file."""
    data = "vision.data" if graph in manifest.vision else f"{graph.file}.data"
    return manifest.files[data].bytes


def _check_paths(plan: BuildPlan) -> None:
    """Check that engines and timings can be written."""
    bundle, cache = plan.config.bundle, plan.config.timing_cache
    check_folder(bundle, "engines")
    for folder in {bundle / job.file.parent for job in plan.jobs}:
        check_folder(next(path for path in (folder, *folder.parents) if path.exists()), "engines")
    if cache is None:
        return
    if cache.is_dir() or not cache.absolute().parent.is_dir():
        raise InputError(f"--timing-cache {cache} is a folder, or in none; give a file")
    if any(cache.resolve() == (bundle / name).resolve() for name in (MANIFEST, *plan.manifest.files)):
        raise InputError(f"--timing-cache {cache} is a file of the bundle, which would be lost; give another")
    check_folder(cache.absolute().parent, f"--timing-cache {cache}")


def _check_room(plan: BuildPlan) -> None:
    free = shutil.disk_usage(plan.config.bundle).free
    if plan.disk > free:
        raise InputError(f"the engines need about {_gb(plan.disk)} GB and {plan.config.bundle} has {_gb(free)} GB free")
    available = available_memory()
    if available is not None and plan.memory > available and not plan.config.force:
        raise InputError(
            f"the build needs about {_gb(plan.memory)} GB of memory and {_gb(available)} GB are free: close programs or "
            "add swap, or pass --force to try"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def command_line(job: EngineJob, config: BuildConfig) -> str:
    """Return the library's own program with the arguments that build the same engine.

    TensorRT's is `trtexec`; that of TensorRT-RTX takes the same ones and `--computeCapabilities`.
    """
    parts = [config.library.tool, f"--onnx={job.graph.file}", f"--saveEngine={job.file}"]
    if config.engine == "tensorrt":
        parts.append("--stronglyTyped")
        parts += ["--versionCompatible"] if config.version_compatible else []
        parts += [f"--hardwareCompatibilityLevel={LEVELS[config.hardware]}"] if config.hardware != "none" else []
    else:
        parts.append(f"--computeCapabilities={job.sm}")
    if config.workspace is not None:
        parts.append(f"--memPoolSize=workspace:{config.workspace}")
    for index, profile in enumerate(job.profiles):
        parts += [f"--profile={index}"] if len(job.profiles) > 1 else []
        parts += [f"--{name}Shapes={shapes_text(profile, at)}" for at, name in enumerate(("min", "opt", "max"))]
    return " ".join(parts)


def parse_sms(text: str | None) -> tuple[int, ...]:
    """Read `86,89` or `sm_86`; None is empty.

    Raises:
        InputError: Something that is not a compute capability.
    """
    if text is None:
        return ()
    try:
        return tuple(int(part.strip().lower().removeprefix("sm").lstrip("_").replace(".", "")) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--sm {text!r} does not name compute capabilities, such as 86 or 86,89") from error
