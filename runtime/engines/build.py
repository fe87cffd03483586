"""Build the engines of a plan, one after the other, and put each in its place when it is whole.

The builder's own progress reports go to a callback. Ctrl-C, SIGTERM or SIGHUP ends a build at its next step; what was finished
stays. An engine and its entry in the manifest come together, under the bundle's lock: so builds that run at once, for other
GPUs or budgets, keep one another's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

from leanvlm.runtime.bundle import read_manifest, write_manifest
from leanvlm.runtime.engines.jobs import ENGINES, BuildConfig, BuildPlan, EngineJob
from leanvlm.runtime.engines.library import load_library, network_flags, quiet_logger
from leanvlm.runtime.engines.profiles import Profile
from leanvlm.runtime.errors import BackendError, BundleError, GraphError, InputError, LeanVLMWarning
from leanvlm.runtime.graph_files import graph_path
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.signals import deferred_signals
from leanvlm.runtime.specs import EngineSpec, GraphSpec, TensorSpec

TIMING_CACHE = ENGINES / "timing.cache"
# Beside an engine of TensorRT-RTX: its kernels, compiled where it first ran.
KERNELS = ".kernels"
# Of the library's types, those that the inputs and outputs of our graphs have.
DTYPES = {"HALF": "float16", "FLOAT": "float32", "INT64": "int64", "INT32": "int32", "BOOL": "bool", "UINT8": "uint8"}

# What is built, which of its phases, and the share of it that is done, 0 to 1.
OnProgress = Callable[[EngineJob, str, float], None]


@dataclass(frozen=True)
class Builder:
    """A library ready to build: its module and what it complained of."""

    module: Any
    logger: Any
    complaints: list[str]

    @classmethod
    def of(cls, config: BuildConfig) -> Builder:
        """Load the library of a request; raises MissingExtraError or BackendError."""
        complaints: list[str] = []
        module: Any = load_library(config.library)
        return cls(module, quiet_logger(module, complaints), complaints)


def build_engines(plan: BuildPlan, builder: Builder, on_progress: OnProgress = lambda job, phase, share: None) -> Manifest:
    """Build a plan's engines and return the bundle's new manifest.

    Raises:
        GraphError: The parser refuses a node, or the network's inputs and outputs are not the manifest's.
        BackendError: The builder failed.
    """
    manifest = plan.manifest
    _remove_left_over(plan.config.bundle)
    for job in plan.jobs:
        manifest = _build(job, plan, builder, lambda phase, share, job=job: on_progress(job, phase, share))  # type: ignore[misc]
    return manifest


def _build(job: EngineJob, plan: BuildPlan, builder: Builder, on_progress: Callable[[str, float], None]) -> Manifest:
    module, config, begin = builder.module, plan.config, perf_counter()
    maker = module.Builder(builder.logger)
    network = maker.create_network(network_flags(module))
    parser = module.OnnxParser(network, builder.logger)
    _parse(parser, graph_path(config.bundle, job.graph.file, plan.manifest.files), job)
    _check_locations(network, job)
    inputs = tuple(_spec(network.get_input(index), job.graph.inputs) for index in range(network.num_inputs))
    outputs = tuple(_spec(network.get_output(index), job.graph.outputs) for index in range(network.num_outputs))
    check_ends(job.graph, inputs, outputs)
    settings = maker.create_builder_config()
    _configure(settings, job, config, module)
    profiles = tuple(_add_profile(maker, settings, profile, network) for profile in job.profiles)
    cache = _timing_cache(settings, config)
    builder.complaints.clear()
    # An exception must not pass through the library.
    with deferred_signals() as interrupted:
        settings.progress_monitor = _monitor(module, on_progress, interrupted)
        plan_bytes = maker.build_serialized_network(network, settings)
    if plan_bytes is None:
        reason = builder.complaints[-1] if builder.complaints else "it does not say why"
        raise BackendError(f"{config.library.title} cannot build {job.graph.file} for sm {job.sm}: {reason[:300]}")
    data = memoryview(plan_bytes)
    spec = EngineSpec(
        file=str(job.file),
        engine=config.library.name,
        version=module.__version__,
        sm=job.sm,
        precision=plan.manifest.precision,
        graph=job.graph.file,
        budget=job.budget,
        inputs=inputs,
        outputs=outputs,
        profiles=profiles,
        hardware=config.hardware,
        version_compatible=config.version_compatible,
        bytes=data.nbytes,
        sha256=sha256(data).hexdigest(),
        seconds=round(perf_counter() - begin, 2),
    )
    manifest = _add(plan, spec, data)
    if cache is not None:
        write_whole(_cache_path(config), memoryview(settings.get_timing_cache().serialize()))
    return manifest


def _add(plan: BuildPlan, spec: EngineSpec, data: memoryview) -> Manifest:
    """Put an engine into the bundle, instead of one of its name, and return the bundle's manifest as it is then.

    Raises:
        BundleError: The bundle is another one by now.
    """
    bundle = plan.config.bundle
    path = bundle / spec.file
    with _locked(bundle), _unfinished(bundle / path.name) as new:
        new.write_bytes(data)
        found = read_manifest(bundle)
        if replace(found, engines=()) != replace(plan.manifest, engines=()):
            raise BundleError(f"{bundle} was exported again while {spec.file} was built from the older graphs; build it again")
        manifest = replace(found, engines=(*(engine for engine in found.engines if engine.file != spec.file), spec))
        with deferred_signals():
            path.parent.mkdir(parents=True, exist_ok=True)
            # First what may find the disk full.
            write_manifest(bundle, manifest)
            new.replace(path)
            path.with_suffix(KERNELS).unlink(missing_ok=True)
    return manifest


def _remove_left_over(bundle: Path) -> None:
    """Remove what builds that were killed left, and say so; none is writing while the lock is ours."""
    with _locked(bundle) as held:
        for path in bundle.glob(".*.engine.new") if held else ():
            size = path.stat().st_size / 1e6
            path.unlink()
            warnings.warn(f"removed {path} ({size:.1f} MB), left of a build that was killed", LeanVLMWarning, stacklevel=3)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Wait for a folder's lock and hold it, at most as long as the process lives; yields False where there are no locks."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        held = True
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held
    finally:
        os.close(number)


def _parse(parser: Any, path: Path, job: EngineJob) -> None:
    """Read a graph file; raises GraphError with the node, its stage and its operator where the parser refuses one."""
    if parser.parse_from_file(str(path)):
        return
    error = parser.get_error(0)
    name, operator = error.node_name(), error.node_operator()
    first = name.lstrip("/").split("/")[0]
    stage = first if first in ("vision", "project", "prune") else job.stages
    raise GraphError(
        f"{job.graph.file}: the parser refuses {operator} {name} (stage {stage}): {' '.join(error.desc().split())}"
    )


def _check_locations(network: Any, job: EngineJob) -> None:
    """Refuse a network that would want an input in the processor's memory, as TensorRT wants what shapes are made of."""
    wanted = [tensor.name for index in range(network.num_inputs) if (tensor := network.get_input(index)).is_shape_tensor]
    if wanted:
        raise GraphError(f"{job.graph.file}: the parser takes {wanted[0]} for a shape; export the bundle again")


def _spec(tensor: Any, declared: tuple[TensorSpec, ...]) -> TensorSpec:
    """Return a network's end as a TensorSpec, free sizes by the names that the manifest gives them."""
    names = next((spec.shape for spec in declared if spec.name == tensor.name), ())
    sizes = tuple(int(size) for size in tensor.shape)
    if len(names) == len(sizes):
        sizes = tuple(name if size == -1 and isinstance(name, str) else size for name, size in zip(names, sizes, strict=True))  # type: ignore[misc]
    dtype = tensor.dtype.name
    return TensorSpec(tensor.name, DTYPES.get(dtype, dtype.lower()), sizes)


def check_ends(graph: GraphSpec, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Compare a network's inputs and outputs with the manifest's graph.

    Raises:
        GraphError: A name, dtype or shape differs.
    """
    for declared, found in ((graph.inputs, inputs), (graph.outputs, outputs)):
        there = {tensor.name: tensor for tensor in found}
        for tensor in declared:
            if there.get(tensor.name) != tensor:
                raise GraphError(f"{graph.file}: {tensor} was parsed as {there.get(tensor.name)}; export the bundle again")
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        raise GraphError(f"{graph.file}: the parser found other inputs or outputs than the manifest; export the bundle again")


def _configure(settings: Any, job: EngineJob, config: BuildConfig, module: Any) -> None:
    if config.engine == "tensorrt-rtx":
        settings.num_compute_capabilities = 1
        settings.set_compute_capability(getattr(module.ComputeCapability, f"SM{job.sm}"), 0)
    if config.workspace is not None:
        settings.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, config.workspace << 20)
    if config.version_compatible:
        settings.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    level = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}.get(config.hardware)
    if level is not None:
        if not hasattr(module.HardwareCompatibilityLevel, level):
            raise BackendError(f"TensorRT {module.__version__} has no --hardware-compatibility {config.hardware}")
        settings.hardware_compatibility_level = getattr(module.HardwareCompatibilityLevel, level)


def _add_profile(maker: Any, settings: Any, profile: Profile, network: Any) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Add a profile and return it as the builder gives it back; raises BackendError where that differs."""
    added = maker.create_optimization_profile()
    for name, shapes in profile.items():
        added.set_shape(name, *shapes)
    if settings.add_optimization_profile(added) < 0:
        raise BackendError(f"the builder refuses the shapes {dict(profile)}")
    found = {name: tuple(tuple(int(size) for size in shape) for shape in added.get_shape(name)) for name in profile}
    if found != dict(profile):
        raise BackendError(f"the builder took other shapes than {dict(profile)}: {found}")
    free = {tensor.name for index in range(network.num_inputs) if -1 in tuple((tensor := network.get_input(index)).shape)}
    if free != set(profile):
        raise BackendError(f"no shapes are known for {', '.join(sorted(free - set(profile)))}")
    return found


def _monitor(module: Any, on_progress: Callable[[str, float], None], interrupted: threading.Event) -> Any:
    """Return the library's progress monitor, which tells the outermost phase's progress and stops the build if asked to."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = max(steps, 1)
                on_progress(phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                on_progress(phase, min((step + 1) / self.steps[phase], 1.0))
            return not interrupted.is_set()

        def phase_finish(self, phase: str) -> None:
            if self.steps.pop(phase, None) is not None:
                on_progress(phase, 1.0)

    return Monitor()


def _cache_path(config: BuildConfig) -> Path:
    return config.timing_cache or config.bundle / TIMING_CACHE


def _timing_cache(settings: Any, config: BuildConfig) -> Any:
    """Give the builder what earlier builds timed; TensorRT-RTX builds ahead of any GPU and times nothing."""
    if config.engine != "tensorrt":
        return None
    path = _cache_path(config)
    cache = settings.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=False):
        return cache
    if config.timing_cache is not None:
        raise InputError(f"--timing-cache {path} is of another version or GPU, or is none; give another file, or move it")
    # The bundle's own begins anew.
    cache = settings.create_timing_cache(b"")
    settings.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def write_whole(path: Path, data: memoryview) -> None:
    """Write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(path) as new:
        new.write_bytes(data)
        new.replace(path)


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
    finally:
        new.unlink(missing_ok=True)
