"""Records of a bundle's manifest: graphs with their inputs and outputs, the decoder, engines, files and their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from leanvlm.runtime.errors import ManifestError
from leanvlm.runtime.records import Between, Count, Size, shorten

Engine = Literal["tensorrt-rtx", "tensorrt"]
FloatType = Literal["float16", "float32"]
Role = Literal["embeddings", "mask", "positions", "last_seen", "past_length", "last_position", "key", "value", "state"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` holds sizes, or names where a size is free."""

    name: str
    dtype: str
    shape: tuple[Size | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file of the bundle and what goes in and out of it."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class VisionSpec(GraphSpec):
    """A vision graph.

    Attributes:
        shape: Index of the crop shape that it takes.
        budget: The bundle's budget that it serves.
        kept: K, the image tokens that it keeps of a crop: the budget, or where a budget is a share of the tokens, as many of
            this shape's.
    """

    shape: Count
    budget: Size
    kept: Size


@dataclass(frozen=True)
class StageSpec(GraphSpec):
    """A vision graph that ends with a stage.

    Attributes:
        shape: Index of the crop shape that it takes.
        stage: `vision` or `project`.
    """

    shape: Count
    stage: Literal["vision", "project"]


@dataclass(frozen=True)
class ResizeSpec(GraphSpec):
    """A graph that resizes and cuts a picture.

    Attributes:
        first: The axis that it resizes before the other.
    """

    first: Literal["width", "height"]


RESIZE_INPUTS = (
    "levels",
    "size",
    "grid",
    *(f"{axis}_{kind}" for axis in ("rows", "columns") for kind in ("shape", "index", "weights")),
)


@dataclass(frozen=True)
class DecoderSpec:
    """The decoder graph and its key-value cache, laid out (B, kv_heads, S, head_dim) for each layer that has one.

    The `kv_heads` axis is not repeated for grouped queries. Layers without a cache may have states, whose size does not depend
    on how many positions were read: a run reads them and returns what replaces them.

    Attributes:
        layers: Those with keys and values.
        planes: Further planes of an image token, each as wide as an embedding, that the decoder adds behind its first blocks.
            They stand behind the embedding in its row, and are 0 in the rows of text.
        roles: What each of the graph's inputs is for.
        extra_rows: Rows of the token table behind the vocabulary that a family learned, by name.
        cache: `shared`: past and present are one buffer, to which the graph appends. `appended`: the graph returns the new
            rows by themselves, and whoever runs it appends them.
    """

    graph: GraphSpec
    layers: Annotated[int, Between(1, 1024)]
    kv_heads: Annotated[int, Between(1, 1024)]
    head_dim: Annotated[int, Between(1, 1024)]
    hidden_size: Size
    vocab_size: Size
    context_length: Size
    kv_dtype: FloatType
    cache: Literal["shared", "appended"] = "shared"
    planes: Annotated[int, Between(0, 64)] = 0
    roles: Mapping[str, Role] = field(default_factory=dict)
    extra_rows: Mapping[str, Count] = field(default_factory=dict)

    def named(self, role: Role) -> tuple[str, ...]:
        """Return the names of the inputs of a role, in the graph's order."""
        return tuple(tensor.name for tensor in self.graph.inputs if self.roles[tensor.name] == role)

    @property
    def axes(self) -> int:
        """How many coordinates a position has that the decoder is told: 1 or 3."""
        given = (tensor.shape for tensor in self.graph.inputs if self.roles[tensor.name] == "positions")
        return 3 if any(len(shape) == 3 for shape in given) else 1

    @property
    def caches(self) -> dict[str, str]:
        """The inputs that hold keys and values, in the graph's order, to the outputs with their new rows."""
        prefix = "present" if self.cache == "shared" else "new_key_values"
        names = [tensor.name for tensor in self.graph.inputs if self.roles[tensor.name] in ("key", "value")]
        return {name: name.replace("past_key_values", prefix) for name in names}

    @property
    def states(self) -> dict[str, str]:
        """The inputs that hold states, in the graph's order, to the outputs that replace them."""
        return {name: name.replace("past", "present", 1) for name in self.named("state")}

    def state_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a state of one sequence: (1, …)."""
        tensor = next(tensor for tensor in self.graph.inputs if tensor.name == name)
        return (1, *(size for size in tensor.shape[1:] if isinstance(size, int)))

    @property
    def row_width(self) -> int:
        """Width of what the decoder reads for one position: the embedding and its planes."""
        return self.hidden_size * (1 + self.planes)

    @property
    def table_rows(self) -> int:
        """Rows of the token table."""
        return self.vocab_size + len(self.extra_rows)

    def __post_init__(self) -> None:
        """Check the numbers against the graph's inputs and outputs; raises ManifestError."""
        names = {tensor.name for tensor in self.graph.inputs}
        if set(self.roles) != names:
            raise ManifestError(f"roles must name the inputs of {shorten(self.graph.file)}, all and no others")
        keys, values = self.named("key"), self.named("value")
        if len(keys) != self.layers or len(values) != self.layers or len(self.named("embeddings")) != 1:
            raise ManifestError(f"{self.layers} layers do not fit {len(keys)} keys and {len(values)} values among the inputs")
        if list(self.extra_rows.values()) != list(range(self.vocab_size, self.table_rows)):
            raise ManifestError(f"extra_rows must be numbered from {self.vocab_size} on")
        check_names(self.graph, (), ("logits", *self.caches.values(), *self.states.values()))
        sizes: dict[str, tuple[int | None, ...]] = {"logits": (None, None, self.vocab_size)}
        sizes |= dict.fromkeys((*keys, *values), (None, self.kv_heads, None, self.head_dim))
        sizes |= dict.fromkeys(self.named("embeddings"), (None, None, self.row_width))
        sizes |= dict.fromkeys(self.named("last_seen"), (None, None))
        for name, output in self.states.items():
            # Whatever it is, all but the batch is known, and its successor is of the same shape.
            sizes |= dict.fromkeys((name, output), (None, *self.state_shape(name)[1:]))
            batch = next(tensor.shape[:1] for tensor in self.graph.inputs if tensor.name == name)
            if batch and batch[0] != 1 and not isinstance(batch[0], str):
                raise ManifestError(f"{name} has {batch[0]} sequences; a state has one")
        sizes |= dict.fromkeys(self.named("positions"), (3, None, None) if self.axes == 3 else (None, None))
        for tensor in (*self.graph.inputs, *self.graph.outputs):
            dtype = self.kv_dtype if tensor.name in (*self.caches, *self.states) else tensor.dtype
            if not fits(tensor.shape, sizes.get(tensor.name)) or tensor.dtype != dtype:
                wanted = f"{shorten(dtype)} {[size or 'any' for size in sizes.get(tensor.name, ())]}"
                raise ManifestError(f"{tensor.name} is {shorten(tensor.dtype)} {list(tensor.shape)}; it must be {wanted}")


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT engine that `leanvlm build` made of one of the bundle's graphs.

    Attributes:
        file: Its path in the bundle, `engines/<sm>/<graph>.engine`.
        engine: `tensorrt-rtx` or `tensorrt`.
        version: Of the library that built it.
        sm: Compute capability that it is for, such as 89 for 8.9.
        precision: Of the graph.
        graph: The graph's file.
        budget: Image tokens kept; None for the decoder.
        inputs: As they were on the parsed network.
        outputs: As they were on the parsed network.
        profiles: One or more; input to its least, usual and largest shape, for inputs with free sizes.
        hardware: `none`, `ampere+` or `same`: the other GPUs that it may run on.
        version_compatible: Whether later versions may run it.
        bytes: Its size.
        sha256: Of the file.
        seconds: How long the build took.
    """

    file: str
    engine: Engine
    version: str
    sm: Annotated[int, Between(10, 999)]
    precision: str
    graph: str
    budget: Size | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, tuple[tuple[Count, ...], ...]], ...]
    hardware: str
    version_compatible: bool
    bytes: Count
    sha256: str
    seconds: float


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and sha256 of one file of the bundle."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class SourceSpec:
    """Where the weights came from: `id` is a Hub name or the folder's name, `sha256` one checksum over the weight files."""

    id: str
    revision: str | None
    sha256: str
    licence: str | None = None
    licence_file: str | None = None


@dataclass(frozen=True)
class PrunerSpec:
    """The pruner by name, with every parameter that was in force, and the gate file that set some of them, if one did."""

    name: str
    params: Mapping[str, Any]
    gate: Mapping[str, Any] | None = None


def check_names(graph: GraphSpec, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Check that a graph has the inputs and outputs that whoever runs it uses; raises ManifestError."""
    for kind, wanted, tensors in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        found = [tensor.name for tensor in tensors]
        absent = next((name for name in wanted if name not in found), None)
        if absent is not None or len(set(found)) < len(found):
            raise ManifestError(f"{shorten(graph.file)} has no {kind} {absent}" if absent else f"two {kind}s of one name")


def fits(shape: tuple[int | str, ...], wanted: tuple[int | None, ...] | None, free: bool = True) -> bool:
    """Return whether a declared shape can be the one wanted.

    Args:
        shape: Sizes, and names where a size is free.
        wanted: Sizes, or None where any will do; None takes every shape.
        free: Whether a name fits every size.
    """
    if wanted is None:
        return True
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(
        size is None or found == size or (free and isinstance(found, str)) for found, size in pairs
    )
