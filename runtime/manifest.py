"""The manifest of a bundle: what `leanvlm.json` says, read and written in one place.

A bundle is a folder; its manifest is the only link between exporting and running. Reading one checks its schema and that
every file it names is inside the folder, present and of the stated size; `verify_files` compares the sha256 sums too.

A file may be a link, as in the Hub's cache, git-annex or on a second disk; a folder in the bundle may not lead out of it. A
link that leads out counts only if it leads to a regular file that is known by its sum: the file's own name holds the sha256
that the manifest states, as such stores name their files, or its content has it. So nothing is read through a foreign
bundle but what its author already had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from leanvlm.runtime.console import check_utf8
from leanvlm.runtime.errors import BundleError, InputError, ManifestError
from leanvlm.runtime.preprocess import ImageSpec

SCHEMA = 1
MANIFEST = "leanvlm.json"
TARGETS = ("cpu", "cuda", "tensorrt-rtx", "tensorrt")
POSITIONS = ("compact", "original")
# The model builder gives other pairs an attention op without the shared cache, so they are not offered.
PRECISIONS = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}
# Outputs of a vision graph with a row for each kept token: (B, K, …).
PER_TOKEN = ("image_features", "keep_indices")
KV_DTYPES = ("float16", "float32")
CACHES = ("shared", "appended")
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

Record = TypeVar("Record")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph: `shape` holds sizes, or names where a size is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


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
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    context_length: int
    kv_dtype: str
    cache: str = "shared"


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
    engine: str
    version: str
    sm: int
    precision: str
    graph: str
    budget: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    hardware: str
    version_compatible: bool
    bytes: int
    sha256: str
    seconds: float


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and sha256 of one file of the bundle."""

    bytes: int
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
    budgets: tuple[int, ...]
    tokens_per_crop: int
    grid: tuple[int, int]
    target: str
    precision: str
    vision: Mapping[int, GraphSpec]
    decoder: DecoderSpec
    embed_tokens: str
    image: ImageSpec
    image_token_id: int
    positions: str
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
        data = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        data["image"] = self.image.to_dict()
        return {"schema": data.pop("schema"), **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read the JSON form.

        Raises:
            ManifestError: An unknown schema, or a key that is missing or not of its type.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if schema != SCHEMA:
            raise ManifestError(f"{MANIFEST} has schema {schema!r}; this version of leanvlm reads schema {SCHEMA}")
        try:
            manifest = cls(
                source=_record(SourceSpec, data["source"]),
                family=str(data["family"]),
                pruner=_pruner(data["pruner"]),
                budgets=tuple(int(b) for b in data["budgets"]),
                tokens_per_crop=int(data["tokens_per_crop"]),
                grid=(int(data["grid"][0]), int(data["grid"][1])),
                target=str(data["target"]),
                precision=str(data["precision"]),
                vision={int(budget): _graph(graph) for budget, graph in data["vision"].items()},
                decoder=_record(DecoderSpec, {**data["decoder"], "graph": _graph(data["decoder"]["graph"])}),
                embed_tokens=str(data["embed_tokens"]),
                image=ImageSpec.from_dict(data["image"]),
                image_token_id=int(data["image_token_id"]),
                positions=str(data["positions"]),
                min_onnxruntime=str(data["min_onnxruntime"]),
                versions=dict(data["versions"]),
                files={str(name): _record(FileSpec, spec) for name, spec in data["files"].items()},
                stages={str(stage): _graph(graph) for stage, graph in data.get("stages", {}).items()},
                splice=None if data.get("splice") is None else _graph(data["splice"]),
                verification=dict(data.get("verification", {})),
                engines=tuple(_engine(engine) for engine in data.get("engines", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ManifestError(f"{MANIFEST} is not a valid manifest: {type(error).__name__}: {error}") from error
        manifest._check_consistency()
        return manifest

    def _check_consistency(self) -> None:
        if self.target not in TARGETS or self.decoder.kv_dtype not in KV_DTYPES:
            raise ManifestError(f"{MANIFEST}: target {self.target!r} or kv_dtype {self.decoder.kv_dtype!r} is not known")
        if self.decoder.cache not in CACHES:
            raise ManifestError(f"{MANIFEST}: a decoder with a cache {self.decoder.cache!r} is not known")
        if self.grid[0] * self.grid[1] != self.tokens_per_crop:
            raise ManifestError(f"{MANIFEST}: a grid of {list(self.grid)} has not {self.tokens_per_crop} tokens")
        if set(self.budgets) != set(self.vision) or self.tokens_per_crop not in self.vision:
            raise ManifestError(f"{MANIFEST}: budgets {list(self.budgets)} and vision graphs do not match")
        self._check_kept()
        used = [*self.vision.values(), *self.stages.values(), self.decoder.graph, *([self.splice] if self.splice else [])]
        graphs = [*(graph.file for graph in used), self.embed_tokens]
        unlisted = [file for file in graphs if file not in self.files]
        if unlisted:
            raise ManifestError(f"{MANIFEST}: {unlisted[0]} is used but not listed under files")

    def _check_kept(self) -> None:
        """Check that every vision graph is declared to return as many tokens as its budget says."""
        for budget, graph in self.vision.items():
            for output in graph.outputs:
                if output.name in PER_TOKEN and output.shape[1:2] != (budget,):
                    raise ManifestError(
                        f"{MANIFEST}: {graph.file} is listed at budget {budget}, but its {output.name} has the shape "
                        f"{list(output.shape)}"
                    )


def _plain(value: Any) -> Any:
    """Turn dataclasses, tuples and mappings into what JSON holds."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _record(cls: type[Record], data: Mapping[str, Any]) -> Record:
    """Make a dataclass whose every value is of its field's type; TypeError otherwise."""
    record = cls(**data)
    for name, kind in get_type_hints(cls).items():
        if not isinstance(getattr(record, name), kind):
            raise TypeError(f"{name} is {getattr(record, name)!r}")
    return record


def _graph(data: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(str(data["file"]), _tensors(data["inputs"]), _tensors(data["outputs"]))


def _tensors(items: list[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(str(i["name"]), str(i["dtype"]), tuple(i["shape"])) for i in items)


def _engine(data: Mapping[str, Any]) -> EngineSpec:
    profiles = tuple(
        {str(name): tuple(tuple(int(size) for size in shape) for shape in shapes) for name, shapes in profile.items()}
        for profile in data["profiles"]
    )
    return EngineSpec(
        **{key: str(data[key]) for key in ("file", "engine", "version", "precision", "graph", "hardware", "sha256")},
        sm=int(data["sm"]),
        budget=None if data["budget"] is None else int(data["budget"]),
        inputs=_tensors(data["inputs"]),
        outputs=_tensors(data["outputs"]),
        profiles=profiles,
        version_compatible=bool(data["version_compatible"]),
        bytes=int(data["bytes"]),
        seconds=float(data["seconds"]),
    )


def _pruner(data: Mapping[str, Any]) -> PrunerSpec:
    gate = data.get("gate")
    return PrunerSpec(str(data["name"]), dict(data["params"]), None if gate is None else dict(gate))


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    manifest = Manifest.from_dict(data)
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
