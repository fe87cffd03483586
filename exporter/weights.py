"""The weights of a checkpoint: which files count, and a model around them without a second copy.

Weights are mapped from the files, not read, and assigned to a model that was built without memory; so loading costs little
more than the pages that the export then touches. Every weight must find its place, by name and shape, and every place its
weight: some transformers versions leave a tower random and only log it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leanvlm.exporter.families import Family
from leanvlm.runtime.errors import CheckpointError
from leanvlm.runtime.records import load_json, read, shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a file; systems allow no more.
MAX_NAME = 255
ADAPTER = "adapter_config.json"
# Buffers that older savers wrote and that are computed instead: `_adjust_missing_and_unexpected_keys` of transformers.
OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")
# Bytes of a file's header. 700 weights have 0.1 MB, and one byte takes some of memory when it is parsed.
MAX_HEADER = 4 << 20
# Not float8 and less, which are quantised with scales of their own; as safetensors spells them.
DTYPES = ("F64", "F32", "F16", "BF16")
LORA = re.compile(r"\blora_|\.base_layer\.|^base_model\.")
NOT_ONE_SAVE = (
    "its config.json and its weights, or its shards and their index, are not of one save: "
    "download it again, or save it with save_pretrained"
)


@dataclass(frozen=True)
class WeightIndex:
    """What counts of a `model.safetensors.index.json`: weight to file."""

    weight_map: Mapping[str, str]


@dataclass(frozen=True)
class Stored:
    """Where a weight is stored: the file, and its name there."""

    file: Path
    key: str


def find_weights(folder: Path, named: object = None) -> tuple[Path, ...]:
    """Return the files that transformers loads a checkpoint's weights from, in its order; others beside them do not count.

    That is `model.safetensors`, or where there is none the shards that `model.safetensors.index.json` names.

    Args:
        folder: The checkpoint.
        named: The configuration's `transformers_weights`: the file or the index to take instead.

    Raises:
        CheckpointError: There are no such files, or one that is named is missing.
    """
    name = str(named or (SINGLE if (folder / SINGLE).is_file() or not (folder / INDEX).is_file() else INDEX))
    source = _file(folder, name)
    if not source.is_file():
        raise CheckpointError(_no_weights(folder, name))
    if not name.endswith(".index.json"):
        return (source,)
    data = load_json(source, CheckpointError)
    known = {"weight_map": data["weight_map"]} if isinstance(data, dict) and "weight_map" in data else {}
    index = read(WeightIndex, known, f"{source} is not a valid index of weights", CheckpointError)
    files = tuple(_file(folder, shard) for shard in sorted(set(index.weight_map.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]}, which is missing from {folder}" if missing else "no file"
        raise CheckpointError(f"{name} names {what}; download the checkpoint again")
    return files


def _file(folder: Path, name: str) -> Path:
    """Return the path of a file of weights that a checkpoint names, which must not leave its folder."""
    outside = Path(name).is_absolute() or ".." in Path(name).parts or len(name) > MAX_NAME
    if outside or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{folder} names {name[:MAX_NAME]!r} as weights; supported: .safetensors files inside the folder")
    return folder / name


def _no_weights(folder: Path, wanted: str) -> str:
    """Say why a folder has no weights that can be read, and what to do."""
    if (folder / ADAPTER).is_file():
        return adapter_alone(folder)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".gguf"))
    if not found:
        return f"{folder} has no .safetensors weights: no {SINGLE} and no {INDEX}; download or save them there"
    if any(name.endswith(".safetensors") for name in found):
        return f"{folder} has {found[0]} but no {wanted}, so it has no .safetensors weights that transformers would load"
    return (
        f"{folder} has no .safetensors weights, only {found[0]}, which is not read (loading pickled weights runs code): load "
        "the checkpoint with transformers and save it again with save_pretrained"
    )


def adapter_alone(folder: Path) -> str:
    """Say that a folder holds only an adapter, and how to make a checkpoint of it."""
    return (
        f"{folder} holds an adapter without the model it belongs to: merge it first (peft: model.merge_and_unload(), then "
        "save_pretrained) and export the result"
    )


def settle_maths() -> None:
    """Let torch choose its kernels for elementary functions while one thread calls them.

    MKL chooses at the first call; when several threads share that call, some of them may compute with 11 bits
    (pytorch issue 188792), which put errors of 1.5e-4 into a decoder's rotary table now and then. One element is never shared.
    """
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.erf, torch.tanh):
        function(torch.ones(1))


def outline(family: Family, config: Any) -> nn.Module:
    """Build a checkpoint's model without its weights: names, shapes and structure, and what is computed from numbers only.

    Raises:
        CheckpointError: transformers cannot build it, or computes NaN or infinity.
    """
    try:
        model = family.empty(config)
        family.finish(model)
        family.parts(model)  # Whose decoder has a shell of its own.
    except Exception as error:  # A configuration can be wrong in any way.
        why = shorten(error) or type(error).__name__
        raise CheckpointError(f"transformers cannot build the model that config.json describes: {why}") from error
    for name, buffer in model.named_buffers():
        if buffer.is_meta or not buffer.isfinite().all():
            raise CheckpointError(f"config.json describes a model whose {name} cannot be computed; see what it is made from")
    return model


def match_weights(family: Family, model: nn.Module, files: Sequence[Path]) -> dict[str, Stored]:
    """Find every weight of a model in the headers of its files, by name, shape and dtype; nothing else is read.

    Args:
        family: The family that handles it.
        model: What `outline` returned.
        files: What `find_weights` returned; of a name that stands in several, the last counts.

    Returns:
        Name in the model to where it is stored.

    Raises:
        CheckpointError: A weight that is missing, unexpected or of another shape; or a file that cannot be read.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    names = {family.canonical_key(key): key for key in shapes}
    found: dict[str, Stored] = {}
    unexpected: list[str] = []
    for file in files:
        for key, shape, dtype in _header(file):
            name = names.get(family.canonical_key(key))
            if name is None:
                unexpected.append(key)
                continue
            _check(file, key, shape, dtype, shapes[name])
            if name in found and found[name].key != key:
                raise CheckpointError(f"the checkpoint stores one weight under two names: {found[name].key} and {key}")
            found[name] = Stored(file, key)
    _tie(model, found)
    _refuse("misses", [name for name in shapes if name not in found])
    # What transformers passes over as well, such as the layers with which some checkpoints guess several tokens at once.
    passed = [OLD_BUFFERS, *map(re.compile, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    _refuse("has unexpected", [key for key in unexpected if not any(pattern.search(key) for pattern in passed)])
    return found


def load_weights(
    family: Family, config: Any, files: Sequence[Path], on_file: Callable[[Path], None] = lambda file: None
) -> nn.Module:
    """Build a checkpoint's model around its mapped weights, in their own dtype, in evaluation mode.

    Args:
        family: The family that handles it.
        config: Its transformers configuration.
        files: What `find_weights` returned.
        on_file: Called after each weight file, for a progress bar.

    Raises:
        CheckpointError: What `match_weights` raises.
    """
    settle_maths()
    model = outline(family, config)
    found = match_weights(family, model, files)
    tensors: dict[Stored, Tensor] = {}
    for file in files:
        with _opened(file) as weights:
            tensors |= {stored: weights.get_tensor(stored.key) for stored in found.values() if stored.file == file}
        on_file(file)
    model.load_state_dict({name: tensors[stored] for name, stored in found.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _header(file: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape and dtype of the tensors of one safetensors file."""
    with _opened(file) as weights:
        for key in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_slice(key)
            yield key, tuple(tensor.get_shape()), str(tensor.get_dtype())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Map a safetensors file, whose header the library holds to its size."""
    try:
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(f"{file} cannot be read as safetensors: a header of {length} bytes, over {MAX_HEADER}")
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {shorten(error)}; download it again") from error


def _check(file: Path, key: str, shape: tuple[int, ...], dtype: str, expected: tuple[int, ...]) -> None:
    """Check that a stored weight is of the shape that the configuration gives it, and not quantised."""
    if shape != expected:
        raise CheckpointError(f"{file.name}: {key} has shape {shorten(list(shape))}, expected {list(expected)}; {NOT_ONE_SAVE}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file.name}: {key} is {dtype}; quantised weights are not read, take the checkpoint in 16 or 32 bits"
        )


def _tie(model: nn.Module, found: dict[str, Stored]) -> None:
    """Give the output head the token table, or the table the head, where they are tied and the files store one.

    Where they store both, both count: so transformers does, which ties only what is equal.
    """
    config: Any = model.config
    if not any(getattr(part, "tie_word_embeddings", False) for part in (config, config.text_config)):
        return
    head = "lm_head.weight"
    table = next(key for key in model.state_dict() if key.endswith("embed_tokens.weight"))
    for absent, stored in ((head, table), (table, head)):
        if absent not in found and stored in found:
            found[absent] = found[stored]


def _refuse(verb: str, keys: list[str]) -> None:
    """Refuse weights that have no counterpart, and say what to do."""
    if not keys:
        return
    shown = ", ".join(shorten(key) for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    way_out = NOT_ONE_SAVE
    if any(LORA.search(key) for key in keys):
        way_out = "these are an adapter's: merge it first (peft: model.merge_and_unload(), then save_pretrained)"
    raise CheckpointError(f"the checkpoint {verb} {len(keys)} weight(s): {shown}; {way_out}")
