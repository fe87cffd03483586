"""The manifest of a bundle: what `leanvlm.json` says, read and written in one place.

A bundle is a folder; its manifest is the only link between exporting and running. Reading one checks its schema and that
every file it names is inside the folder, present and of the stated size; `verify_files` compares the sha256 sums too.

A file may be a link, as in the Hub's cache, git-annex or on a second disk; a folder in the bundle may not lead out of it. A
link that leads out counts only if it leads to a regular file that is known by its sum: the file's own name holds the sha256
that the manifest states, as such stores name their files, or its content has it. So nothing is read through a foreign
bundle but what its author already had.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from leanvlm.runtime.console import check_utf8
from leanvlm.runtime.errors import BundleError, InputError, ManifestError
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Between, Count, Size, load_json, plain, read, shorten

SCHEMA = 1
MANIFEST = "leanvlm.json"
Target = Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"]
Positions = Literal["compact", "original"]
Engine = Literal["tensorrt-rtx", "tensorrt"]
FloatType = Literal["float16", "float32"]
TARGETS: tuple[str, ...] = get_args(Target)
POSITIONS: tuple[str, ...] = get_args(Positions)
# The model builder gives other pairs an attention op without the shared cache, so they are not offered.
PRECISIONS = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}
# Outputs of a vision graph with a row for each kept token: (B, K, …).
PER_TOKEN = ("image_features", "keep_indices")
VISION_OUTPUTS = (*PER_TOKEN, "effective_rank", "num_selected", "converged", "feature_sum", "attention")
# Read from a bundle by their names, whether the manifest lists them or not.
READ_BY_NAME = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "generation_config.json",
)


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
class DecoderSpec:
    """The decoder graph and its key-value cache, laid out (B, kv_heads, S, head_dim) for each layer.

    The `kv_heads` axis is not repeated for grouped queries.

    Attributes:
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

    def __post_init__(self) -> None:
        """Check the numbers against the graph's inputs and outputs; raises ManifestError."""
        _check_names(self.graph, ("inputs_embeds",), ("logits",))
        layer = re.compile(r"past_key_values\.(0|[1-9][0-9]{0,3})\.(key|value)")
        caches = {tensor.name: tensor for tensor in self.graph.inputs if layer.fullmatch(tensor.name)}
        wanted = {f"past_key_values.{at}.{part}" for at in range(self.layers) for part in ("key", "value")}
        if set(caches) != wanted:
            raise ManifestError(
                f"{self.layers} layers do not fit the {len(caches)} caches among the inputs of {self.graph.file}"
            )
        for cache in caches.values():
            if cache.dtype != self.kv_dtype or not _fits(cache.shape, (None, self.kv_heads, None, self.head_dim)):
                raise ManifestError(
                    f"{cache.name} is {cache.dtype} {list(cache.shape)}, which does not fit {self.kv_dtype}, "
                    f"{self.kv_heads} heads and {self.head_dim} numbers a head"
                )
        prefix = "present" if self.cache == "shared" else "new_key_values"
        _check_names(self.graph, (), tuple(name.replace("past_key_values", prefix) for name in sorted(wanted)))
        sizes = {"inputs_embeds": self.hidden_size, "logits": self.vocab_size}
        for tensor in (*self.graph.inputs, *self.graph.outputs):
            if tensor.name in sizes and not _fits(tensor.shape, (None, None, sizes[tensor.name])):
                raise ManifestError(f"{tensor.name} is {list(tensor.shape)}, which does not end in {sizes[tensor.name]}")


@dataclass(frozen=True)
class EngineSpec:
    """A TensorRT engine that `leanvlm build` made of one of the bundle's graphs.

    Attributes:
        file: Its place in the bundle, `engines/<sm>/<graph>.engine`.
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
    """Where the weights came from: `id` is a Hub name or the folder's name, `sha256` one sum over the weight files."""

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


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know of a bundle (schema 1).

    Attributes:
        budgets: Image tokens kept per crop, one vision graph each; the first is the default, the last is N (unpruned).
        tokens_per_crop: N, the image tokens of one crop before pruning.
        grid: Rows and columns of the patch grid; rows * columns = N.
        vision: Budget to vision graph.
        stages: Stage to the vision graph that ends with it, where those of the whole are timed so.
        engines: What `leanvlm build` added. Their files are checked when one is opened, not with the bundle's own.
        splice: The graph that puts a prompt together on a GPU; None where the processor does.
        embed_tokens: File of the token table, one tensor named `embed_tokens.weight`, (vocab_size, D).
        image: How an image becomes pixel values.
        image_token_id: The token that stands for one image in the prompt.
        positions: `compact` numbers the kept tokens in a row; `original` keeps their places in the full sequence.
        verification: What the export measured against the checkpoint, per stage and per budget.
    """

    source: SourceSpec
    family: str
    pruner: PrunerSpec
    budgets: tuple[Size, ...]
    tokens_per_crop: Size
    grid: tuple[Size, Size]
    target: Target
    precision: str
    vision: Mapping[int, GraphSpec]
    decoder: DecoderSpec
    embed_tokens: str
    image: ImageSpec
    image_token_id: Count
    positions: Positions
    min_onnxruntime: str
    versions: Mapping[str, str]
    files: Mapping[str, FileSpec]
    splice: GraphSpec | None = None
    stages: Mapping[str, GraphSpec] = field(default_factory=dict)
    engines: tuple[EngineSpec, ...] = ()
    verification: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def default_budget(self) -> int:
        """The budget used when none is asked for: the first that the export named."""
        return self.budgets[0]

    def budget(self, asked: int | None) -> int:
        """Return the budget to use for `asked` (image tokens per crop), or the default for None.

        Raises:
            InputError: The bundle holds no vision graph of that budget.
        """
        budget = self.default_budget if asked is None else asked
        if budget not in self.vision:
            held = ", ".join(str(b) for b in sorted(self.vision))
            raise InputError(f"budget {budget} is not in this bundle; it holds {held}")
        return budget

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which `from_dict` reads back to an equal manifest."""
        data: dict[str, Any] = plain(self)
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Read the JSON form.

        Raises:
            ManifestError: An unknown schema, or a key that is missing, unknown, not of its type or out of its range.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int or schema != SCHEMA:
            raise ManifestError(
                f"{MANIFEST} has schema {shorten(schema)}; this version of leanvlm reads schema {SCHEMA}: export it again"
            )
        manifest = read(cls, data, MANIFEST, ManifestError)
        manifest._check_consistency()
        return manifest

    def _check_consistency(self) -> None:
        if self.precision not in PRECISIONS[self.target]:
            raise ManifestError(f"{MANIFEST}: precision {shorten(self.precision)} is not one for {self.target}")
        if self.grid[0] * self.grid[1] != self.tokens_per_crop:
            raise ManifestError(f"{MANIFEST}: a grid of {list(self.grid)} has not {self.tokens_per_crop} tokens")
        if set(self.budgets) != set(self.vision) or self.tokens_per_crop not in self.vision:
            raise ManifestError(f"{MANIFEST}: budgets {list(self.budgets)} and vision graphs do not match")
        if len(self.budgets) != len(self.vision) or max(self.budgets) > self.tokens_per_crop:
            raise ManifestError(f"{MANIFEST}: budgets {list(self.budgets)} must differ, and be {self.tokens_per_crop} at most")
        if self.image_token_id >= self.decoder.vocab_size:
            raise ManifestError(f"{MANIFEST}: image_token_id {self.image_token_id} is beyond {self.decoder.vocab_size} tokens")
        self._check_kept()
        used = [*self.vision.values(), *self.stages.values(), self.decoder.graph, *([self.splice] if self.splice else [])]
        graphs = [*(graph.file for graph in used), self.embed_tokens]
        unlisted = [file for file in graphs if file not in self.files]
        if unlisted:
            raise ManifestError(f"{MANIFEST}: {shorten(unlisted[0])} is used but not listed under files")

    def _check_kept(self) -> None:
        """Check that every vision graph takes the images that are made and returns as many tokens as its budget says."""
        for budget, graph in self.vision.items():
            _check_names(graph, ("pixel_values",), VISION_OUTPUTS)
            for tensor in (*graph.inputs, *graph.outputs):
                wanted: tuple[int | None, ...] = (None, *[None] * (len(tensor.shape) - 1))
                if tensor.name == "pixel_values":
                    wanted = (None, 3, *self.image.size)
                elif tensor.name in PER_TOKEN:
                    wanted = (None, budget, self.decoder.hidden_size)[: 3 if tensor.name == PER_TOKEN[0] else 2]
                if not _fits(tensor.shape, wanted, free=tensor.name == "pixel_values"):
                    raise ManifestError(
                        f"{MANIFEST}: {graph.file} is listed at budget {budget}, but its {tensor.name} has the shape "
                        f"{list(tensor.shape)}"
                    )


def _check_names(graph: GraphSpec, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Check that a graph has the inputs and outputs that whoever runs it uses; raises ManifestError."""
    for kind, wanted, tensors in (("input", inputs, graph.inputs), ("output", outputs, graph.outputs)):
        found = [tensor.name for tensor in tensors]
        absent = next((name for name in wanted if name not in found), None)
        if absent is not None or len(set(found)) < len(found):
            raise ManifestError(f"{shorten(graph.file)} has no {kind} {absent}" if absent else f"two {kind}s of one name")


def _fits(shape: tuple[int | str, ...], wanted: tuple[int | None, ...], free: bool = True) -> bool:
    """Return whether a declared shape can be the one wanted, where None is any size; `free`: names fit every size."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(
        size is None or found == size or (free and isinstance(found, str)) for found, size in pairs
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `leanvlm.json` into a bundle folder."""
    text = json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False)
    # Renamed when it is whole, so that a full disk leaves the old one.
    new = folder / f".{MANIFEST}.new"
    try:
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(folder / MANIFEST)
    finally:
        new.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a bundle and check that its files are there, inside the folder and of the stated sizes.

    Raises:
        BundleError: The folder is not a bundle, or a file is missing or has another size.
        ManifestError: The manifest cannot be read, or names a path outside the folder.
        InputError: The folder's name is not UTF-8.
    """
    check_utf8(folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder that `leanvlm export` wrote")
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}")
    manifest = Manifest.from_dict(load_json(path, ManifestError))
    for name, spec in manifest.files.items():
        _check_file(folder, name, spec)
    for name in READ_BY_NAME:
        if name not in manifest.files and leads_out(folder, folder / name):
            raise ManifestError(f"{name} is a link out of the bundle and {MANIFEST} does not list it: remove it")
    return manifest


def _check_file(folder: Path, name: str, spec: FileSpec) -> None:
    path = inside(folder, name)
    if not path.is_file():
        raise BundleError(f"the bundle is incomplete: {name} is missing from {folder}, or is no regular file")
    size = path.stat().st_size
    if size != spec.bytes:
        raise BundleError(f"{name} has {size} bytes where {MANIFEST} says {spec.bytes}: copy or export the bundle again")
    check_link(folder, name, spec.sha256)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that the manifest names; raise ManifestError where that is outside the bundle's folder.

    The file itself may be a link; where it leads is for `check_link`.
    """
    path = folder / name
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or leads_out(folder, path.parent):
        raise ManifestError(f"{MANIFEST} names {name!r}, which is outside the bundle")
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a path in a bundle is in truth somewhere else, links followed."""
    return not path.resolve().is_relative_to(folder.resolve())


def check_link(folder: Path, name: str, sha256: str) -> None:
    """Check that a file of the bundle, where a link leads out to it, is the one whose sum the manifest states.

    Raises:
        BundleError: It is another file.
    """
    path = folder / name
    if not leads_out(folder, path):
        return
    real = path.resolve()
    named = re.fullmatch("[0-9a-f]{64}", sha256) is not None and sha256 in real.name
    if not named and file_sha256(real) != sha256:
        raise BundleError(f"{name} is a link to {real}, which is not the file whose sha256 {MANIFEST} states: copy it again")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare the sha256 of every file of the bundle, and of the engines that are there, with the manifest.

    Raises:
        BundleError: A file differs.
    """
    for name, spec in manifest.files.items():
        if file_sha256(folder / name) != spec.sha256:
            raise BundleError(f"{name} does not match its sha256 in {MANIFEST}: copy or export the bundle again")
    for engine in manifest.engines:
        path = inside(folder, engine.file)
        if path.is_file() and file_sha256(path) != engine.sha256:
            raise BundleError(f"{engine.file} does not match its sha256 in {MANIFEST}: copy or build it again")


def parse_budgets(text: str) -> tuple[int, ...]:
    """Read `64` or `64,128`.

    Raises:
        InputError: Something that is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--budget {text!r} is not a number of image tokens, such as 64 or 64,128") from error
