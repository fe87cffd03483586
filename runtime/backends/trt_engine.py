"""One TensorRT engine: its file, its contexts, and the rules that its tensors have to keep.

TensorRT reports most mistakes as one line in a log and a false result. So what can be checked is checked before: shapes against
the profile, an address for every tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanvlm.runtime.backends.cuda_memory import Buffer, Device
from leanvlm.runtime.bundle import check_link, inside
from leanvlm.runtime.engines.build import KERNELS, write_whole
from leanvlm.runtime.engines.library import LIBRARIES, number
from leanvlm.runtime.errors import BackendError
from leanvlm.runtime.specs import EngineSpec

Shape = tuple[int, ...]


class TrtEngine:
    """An engine file of a bundle, deserialised.

    Args:
        folder: The bundle.
        spec: The engine's entry in the manifest.
        module: The library's module.
        logger: Its logger.
        complaints: Where that logger keeps errors.

    Raises:
        BackendError: The file is missing, damaged or of another version, or the library refuses it.
    """

    def __init__(self, folder: Path, spec: EngineSpec, module: Any, logger: Any, complaints: list[str]) -> None:
        self.spec = spec
        self.complaints = complaints
        self._path = _checked(folder, spec, module)
        self._runtime = module.Runtime(logger)
        if spec.version_compatible and spec.engine == "tensorrt":
            # Such an engine brings the runtime of its own version with it.
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if self.engine is None:
            reason = complaints[-1] if complaints else "it does not say why"
            raise BackendError(f"{LIBRARIES[spec.engine].title} refuses {spec.file}: {reason[:200]}; {rebuild(spec)}")
        self._config, self._kernels = self._runtime_config()

    def context(self, profile: int, device: Device) -> TrtContext:
        """Return a new context that runs one of the engine's profiles."""
        made = self.engine.create_execution_context(*([] if self._config is None else [self._config]))
        if made is None:
            reason = self.complaints[-1] if self.complaints else "is there enough memory on the GPU?"
            raise BackendError(f"{self.spec.file} cannot run here: {reason[:200]}")
        return TrtContext(self, made, profile, device)

    def _runtime_config(self) -> tuple[Any, Any]:
        """Return TensorRT-RTX's settings with its cache of kernels, which are compiled when an engine first runs."""
        if not hasattr(self.engine, "create_runtime_config") or self.spec.engine != "tensorrt-rtx":
            return None, None
        config = self.engine.create_runtime_config()
        cache = config.create_runtime_cache()
        path = self._path.with_suffix(KERNELS)
        if path.is_file():
            cache.deserialize(path.read_bytes())
        config.set_runtime_cache(cache)
        return config, cache

    def keep_kernels(self) -> None:
        """Write the compiled kernels beside the engine, for the next start; a folder that cannot be written is no error."""
        if self._kernels is not None:
            with contextlib.suppress(OSError):
                write_whole(self._path.with_suffix(KERNELS), memoryview(self._kernels.serialize()))


def _checked(folder: Path, spec: EngineSpec, module: Any) -> Path:
    path, title = inside(folder, spec.file), LIBRARIES[spec.engine].title
    if not path.is_file():
        raise BackendError(f"{spec.file} is missing from the bundle: {rebuild(spec)}")
    size = path.stat().st_size
    if size != spec.bytes:
        found = f"{spec.file} has {size} bytes where the manifest says {spec.bytes}"
        raise BackendError(f"{found}: copy it again, or {rebuild(spec)}")
    check_link(folder, spec.file, spec.sha256)
    built, here = number(spec.version), number(module.__version__)
    later = spec.version_compatible and built[0] == here[0] and built <= here
    if built != here and not later:
        raise BackendError(
            f"{spec.file} was built with {title} {spec.version} and {module.__version__} is installed: {rebuild(spec)}"
        )
    return path


def rebuild(spec: EngineSpec) -> str:
    """Return what builds an engine anew, as the end of a message."""
    which = f" --sm {spec.sm}" if spec.engine == "tensorrt-rtx" else ""
    return f"build it again with leanvlm build BUNDLE --engine {spec.engine}{which}"


class TrtContext:
    """One profile of an engine, with a buffer for every tensor.

    Attributes:
        binding: What shapes and addresses were set to last, in words of whoever sets them: a step would set hundreds anew.
    """

    def __init__(self, engine: TrtEngine, context: Any, profile: int, device: Device) -> None:
        self._engine = engine
        self._context = context
        self._device = device
        self._profile = engine.spec.profiles[profile]
        self.binding: tuple[int, ...] = ()
        self._bound: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        # Shapes that were run: each may have kernels of its own.
        self._known: set[tuple[Shape, ...]] = set()
        self._graph: Any = None
        self._runs = 0
        self._capturing = True
        if profile and not context.set_optimization_profile_async(profile, device.stream):
            raise BackendError(f"{engine.spec.file} has no profile {profile}: {rebuild(engine.spec)}")

    def shape(self, name: str, shape: Shape) -> None:
        """Set an input's shape; a captured graph holds shapes, so a new one ends it.

        Raises:
            BackendError: It is outside the profile that the engine was built with.
        """
        self.check(name, shape)
        if not self._context.set_input_shape(name, shape):
            raise BackendError(f"{self._engine.spec.file} refuses {name} of shape {list(shape)}")
        if self._shapes.get(name) != shape:
            self._shapes[name], self._graph, self._runs = shape, None, 0

    def check(self, name: str, shape: Shape) -> None:
        """Raise BackendError if an input's shape is outside the profile that the engine was built with."""
        if name in self._profile:
            least, _, most = self._profile[name]
            if len(shape) != len(least) or not all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True)):
                raise BackendError(
                    f"{self._engine.spec.file} takes {name} from {list(least)} to {list(most)}, not {list(shape)}: "
                    "build it again with other --max-images, --max-prompt or --max-positions"
                )

    def bind(self, name: str, address: int) -> None:
        """Say where a tensor lies; a captured graph holds addresses, so a new one ends it."""
        if self._bound.get(name) != address:
            self._bound[name], self._graph, self._runs = address, None, 0
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"{self._engine.spec.file} has no tensor {name}")

    def run(self, *, replayed: bool) -> None:
        """Run on what is bound. With `replayed`, a run after the first is captured as a CUDA graph and later ones replay it."""
        unbound = [t.name for t in (*self._engine.spec.inputs, *self._engine.spec.outputs) if t.name not in self._bound]
        if unbound:
            raise BackendError(f"{self._engine.spec.file}: nothing is bound to {unbound[0]}")
        self._runs += 1
        if replayed and self._graph is None and self._runs > 1 and self._capturing and self._capturable():
            self._graph = self._device.capture(self._enqueue)
            # What cannot be captured once is not tried again.
            self._capturing = self._graph is not None
        if replayed and self._graph is not None:
            self._device.launch(self._graph)
        else:
            self._enqueue()
        if self._runs == 1 and (shapes := tuple(self._shapes.values())) not in self._known:
            self._known.add(shapes)
            self._device.synchronize()
            self._engine.keep_kernels()

    def _capturable(self) -> bool:
        """Ask TensorRT-RTX, whose kernels may still be compiling; TensorRT's always can be captured after a run."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(self._device.stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            reason = self._engine.complaints[-1] if self._engine.complaints else "it does not say why"
            raise BackendError(f"{self._engine.spec.file} failed: {reason[:200]}")


def bind_all(context: TrtContext, buffers: Mapping[str, Buffer]) -> None:
    """Bind buffers under their tensors' names."""
    for name, buffer in buffers.items():
        context.bind(name, buffer.address)
