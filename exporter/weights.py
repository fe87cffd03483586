"""The weights of a checkpoint: which files count, and a model around them without a second copy.

Weights are mapped from the files, not read, and assigned to a model that was built without memory; so loading costs little
more than the pages that the export then touches. Every weight must find its place, by name and shape, and every place its
weight: some transformers versions leave a tower random and only log it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leanvlm.exporter.families import Family
from leanvlm.runtime.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Buffers that older savers wrote and that are computed instead: `_adjust_missing_and_unexpected_keys` of transformers.
OLD_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")


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
    try:
        shards = sorted(set(json.loads(source.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} is not a valid index of weights: {type(error).__name__}: {error}") from error
    files = tuple(_file(folder, str(shard)) for shard in shards)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"{missing[0]}, which is missing from {folder}" if missing else "no file"
        raise CheckpointError(f"{name} names {what}; download the checkpoint again")
    return files


def _file(folder: Path, name: str) -> Path:
    """Return the path of a file of weights that a checkpoint names, which must not leave its folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{folder} names {name!r} as weights; supported: .safetensors files inside the folder")
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


def load_weights(
    family: Family, config: Any, files: Sequence[Path], on_file: Callable[[Path], None] = lambda file: None
) -> nn.Module:
    """Build a checkpoint's model around its mapped weights, in their own dtype, in evaluation mode.

    Args:
        family: The family that handles it.
        config: Its transformers configuration.
        files: What `find_weights` returned; of a name that stands in several, the last counts.
        on_file: Called after each weight file, for a progress bar.

    Raises:
        CheckpointError: A weight that is missing, unexpected or of another shape; or a file that cannot be read.
    """
    settle_maths()
    model = family.empty(config)
    places = {family.canonical_key(key): key for key in model.state_dict()}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unexpected: list[str] = []
    for file in files:
        for key, tensor in _tensors(file):
            place = places.get(family.canonical_key(key))
            if place is None:
                unexpected.append(key)
                continue
            _check(file, key, tensor, shapes[place])
            if names.setdefault(place, key) != key:
                raise CheckpointError(f"the checkpoint stores one weight under two names: {names[place]} and {key}")
            loaded[place] = tensor
        on_file(file)
    _tie(model, loaded)
    _refuse("misses", [place for place in shapes if place not in loaded])
    _refuse("has unexpected", [key for key in unexpected if not OLD_BUFFERS.search(key)])
    model.load_state_dict(loaded, strict=True, assign=True)
    family.finish(model)
    return model.requires_grad_(False).eval()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and mapped tensors of one safetensors file."""
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                yield key, weights.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _check(file: Path, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a stored weight is of the shape that the configuration gives it, and of numbers that are not rounded."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{file.name}: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file.name}: {key} is {dtype}; quantised weights are not read, take the checkpoint in 16 or 32 bits"
        )


def _tie(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    """Give the output head the token table, or the table the head, where they are tied and the files store one.

    Where they store both, both count: so transformers does, which ties only what is equal.
    """
    config: Any = model.config
    if not (getattr(config, "tie_word_embeddings", False) or config.text_config.tie_word_embeddings):
        return
    head = "lm_head.weight"
    table = next(key for key in model.state_dict() if key.endswith("embed_tokens.weight"))
    for absent, stored in ((head, table), (table, head)):
        if absent not in loaded and stored in loaded:
            loaded[absent] = loaded[stored]


def _refuse(verb: str, keys: list[str]) -> None:
    if keys:
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise CheckpointError(f"the checkpoint {verb} {len(keys)} weight(s): {shown}")
