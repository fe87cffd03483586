"""Reading a checkpoint: find its folder, read what transformers reads of its configuration, refuse what cannot be done."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoImageProcessor

from leanvlm.exporter.config import ALIASES, DEFAULT_ERANK_REF, ExportConfig
from leanvlm.exporter.families import ARCHITECTURES, Description, Family, Frame, family_for
from leanvlm.exporter.image_processor import ProcessorError
from leanvlm.exporter.ladder import in_sizes
from leanvlm.exporter.weights import ADAPTER, adapter_alone, find_weights, load_weights
from leanvlm.runtime.bundle import file_sha256
from leanvlm.runtime.console import check_utf8
from leanvlm.runtime.errors import CheckpointError, LeanVLMError, LeanVLMWarning, ManifestError, UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import load_json, plain, read, shorten
from leanvlm.runtime.specs import SourceSpec

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")
PROCESSOR, IMAGE_PROCESSOR, TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"
# What marks weights that are stored quantised; the last is MLX's.
QUANTISED = ("quantization_config", "compression_config", "quantization")
PARTS = ("text_config", "vision_config")
# transformers makes a table of names from this number, whatever the model.
MAX_LABELS = 2**15
# Bytes of a model card that are looked through for its licence, which stands at the top.
CARD_BYTES = 2**16
# What is fetched from the Hub: first what says whether the export can be done, then what takes the time.
SMALL_FILES = ("*.json", "*.jinja", "LICENSE*", "LICENCE*", "USE_POLICY.md", "README.md")
WEIGHT_FILES = ("*.safetensors",)
# The same weights once more, in a format of Mistral's own.
NOT_FETCHED = ("consolidated*",)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what its configuration says; the weights are not loaded yet.

    Attributes:
        folder: Where the files are.
        name: How the manifest names the source: a Hub id, or the folder's name.
        revision: The Hub's commit, where known.
        config: The transformers configuration.
        family: The family that handles it.
        spec: What the family reads of it.
        frame: What its processors do, as data.
        erank_ref: Reference effective rank declared for this model.
        weight_files: The safetensors files that count, in order.
    """

    folder: Path
    name: str
    revision: str | None
    config: Any
    family: Family
    spec: Description
    frame: Frame
    erank_ref: float
    weight_files: tuple[Path, ...]

    @property
    def image_spec(self) -> ImageSpec:
        """How one crop becomes pixel values."""
        return self.frame.image

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum(file.stat().st_size for file in self.weight_files)

    def source(self) -> SourceSpec:
        """Return the manifest's record of this checkpoint; reads every weight file once for its checksum."""
        digest = hashlib.sha256("".join(file_sha256(file) for file in self.weight_files).encode())
        return SourceSpec(self.name, self.revision, digest.hexdigest(), _licence(self.folder), self.licence_file)

    @property
    def licence_file(self) -> str | None:
        """Name of the checkpoint's licence file, if it has one."""
        return next((name for name in LICENCE_FILES if (self.folder / name).is_file()), None)


def hub_id(config: ExportConfig) -> str | None:
    """Return the Hub's name of the model that an export names, or None for one that is known and for a folder."""
    model = config.model
    if config.known is not None or model.startswith((".", "/", "~")) or Path(model).exists():
        return None
    return ALIASES.get(model, model)


def open_checkpoint(config: ExportConfig, *, weights: bool = True) -> Checkpoint:
    """Find the checkpoint that an export names and read its configuration, for images of the sizes that it names.

    Args:
        config: The export.
        weights: Whether to fetch the weights of a Hub repository, once its small files have been checked; a folder has them.

    Raises:
        CheckpointError: It is not there, or has no safetensors weights or no readable configuration.
        UnsupportedModelError: No family handles it.
        InputError: Image sizes that the model does not take.
    """
    found = _find(config, weights=weights)
    spec, frame = in_sizes(found.spec, found.frame, config.image_sizes)
    return replace(found, spec=spec, frame=frame)


def _find(config: ExportConfig, *, weights: bool) -> Checkpoint:
    """Find a checkpoint and read its configuration, as `open_checkpoint` says."""
    if config.known is not None:
        return _read(config.known.folder, config.known.name, None, config.known.erank_ref)
    name = hub_id(config)
    if name is None:
        folder = Path(config.model).expanduser()
        return _read(folder, folder.resolve().name, None, DEFAULT_ERANK_REF)
    folder = _download(name, config, SMALL_FILES)
    revision = folder.name if folder.parent.name == "snapshots" else config.revision
    checkpoint = _read(folder, name, revision, DEFAULT_ERANK_REF, weights=False)
    if not weights:
        return checkpoint
    # Of the same commit, should the branch move meanwhile.
    _download(name, replace(config, revision=revision), WEIGHT_FILES)
    if config.offline and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"the weights of {name!r} are not on this machine; export once without --offline")
    return _read(folder, name, revision, DEFAULT_ERANK_REF)


def _download(name: str, config: ExportConfig, patterns: tuple[str, ...]) -> Path:
    """Fetch a Hub repository's files of these names, or find them in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=config.revision,
            token=config.token,
            local_files_only=config.offline,
            allow_patterns=list(patterns),
            ignore_patterns=list(NOT_FETCHED),
        )
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id such as llava-hf/llava-1.5-7b-hf") from error
    except (OSError, ValueError, RuntimeError) as error:
        why = _one_line(error)
        raise CheckpointError(f"{name!r} is not a folder here and could not be fetched from the Hub: {why}") from error
    return Path(folder)


def _read(folder: Path, name: str, revision: str | None, erank_ref: float, *, weights: bool = True) -> Checkpoint:
    check_utf8(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model takes demo, an alias, a Hub id or a checkpoint folder")
    if not (folder / "config.json").is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(adapter_alone(folder))
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint")
    raw = _json(folder / "config.json")
    _refuse_other_kinds(folder, raw)
    family = family_for(_model_type(raw))
    family.check_parts(raw)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; save the checkpoint's tokenizer there")
    files = find_weights(folder, raw.get("transformers_weights")) if weights else ()
    if (folder / ADAPTER).is_file():
        message = f"the adapter in {folder} is left out; to have it in the bundle, merge it first (peft: merge_and_unload)"
        warnings.warn(message, LeanVLMWarning, stacklevel=2)
    config, spec = _configuration(folder, family)
    return Checkpoint(folder, name, revision, config, family, spec, _frame(folder, family, config), erank_ref, files)


def _refuse_other_kinds(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse configurations of another layout or kind, and what transformers would not come to an end with.

    Raises:
        UnsupportedModelError: The original LLaVA's own layout, quantised weights, or a configuration in another file.
        CheckpointError: More labels than a model has, or a dtype that is none.
    """
    if "mm_vision_tower" in raw or any(re.fullmatch("Llava.*ForCausalLM", name) for name in _architectures(raw)):
        raise UnsupportedModelError(
            f"{folder} is in the original LLaVA's layout, not in transformers': take its conversion on the Hub, such as "
            "llava-hf/llava-1.5-7b-hf, or convert it with convert_llava_weights_to_hf.py of transformers' repository"
        )
    if raw.get("configuration_files"):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} names configuration_files of other versions of transformers, which are not read; "
            "keep the one that counts as config.json"
        )
    for part in (raw, *(raw.get(name) for name in PARTS)):
        if not isinstance(part, dict):
            continue
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None:
                _check_dtype(folder / "config.json", part[key])
        labels = part.get("num_labels")
        if isinstance(labels, int) and labels > MAX_LABELS:
            raise CheckpointError(f"{folder / 'config.json'}: num_labels is {shorten(labels)}, over {MAX_LABELS}; remove it")
        found = {key: part[key] for key in QUANTISED if part.get(key)}
        for key, value in found.items():
            method = f": {shorten(value['quant_method'])}" if isinstance(value, dict) and "quant_method" in value else ""
            raise UnsupportedModelError(
                f"{folder} holds quantised weights ({key}{method}), which are not read: take the unquantised checkpoint, "
                "or dequantise it first; --precision int4 or int8 rounds at export"
            )


def _model_type(raw: dict[str, Any]) -> str:
    """Return a configuration's `model_type`, or where it has none that of the architecture that it names."""
    known = (ARCHITECTURES[name] for name in _architectures(raw) if name in ARCHITECTURES)
    return str(raw.get("model_type") or next(known, ""))


def _architectures(raw: dict[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _configuration(folder: Path, family: Family) -> tuple[Any, Description]:
    """Read `config.json` as transformers does, and the family's numbers from it."""
    try:
        config: Any = CONFIG_MAPPING[family.model_type].from_pretrained(folder, local_files_only=True)
        # Which kernel computes attention is ours to choose, and one that is named may not be installed.
        config._attn_implementation = None
        return config, family.describe(config)
    except LeanVLMError:
        raise
    except Exception as error:  # A configuration's own checks raise nearly anything.
        raise CheckpointError(f"{folder / 'config.json'} is not a valid configuration: {_one_line(error)}") from error


def _check_dtype(path: Path, value: object) -> None:
    """Check that what a configuration calls its dtype is one: transformers takes any attribute of torch by its name.

    Raises:
        CheckpointError: It is none, or none that weights of a model that is not quantised have.
    """
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise CheckpointError(f"{path}: dtype is {shorten(repr(value))}; it must be float32, float16 or bfloat16")


def _frame(folder: Path, family: Family, config: Any) -> Frame:
    """Read the processors as transformers does.

    What `processor_config.json` nests counts before `preprocessor_config.json`.
    """
    nested = folder / PROCESSOR
    path = nested if nested.is_file() and _json(nested).get("image_processor") is not None else folder / IMAGE_PROCESSOR
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {IMAGE_PROCESSOR}; save the checkpoint's image processor there")
    _json(path)
    tokens = folder / TOKENIZER
    tokenizer = _json(tokens) if tokens.is_file() else {}
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # As JSON, where the libraries' enumerations are numbers.
        return _checked(family.frame(config, json.loads(processor.to_json_string()), tokenizer))
    except (UnsupportedModelError, ManifestError) as error:
        # What is read together with the processor may be wrong in another of the files.
        where = path if isinstance(error, ProcessorError) else folder
        raise UnsupportedModelError(f"{where}: {error}") from error
    except Exception as error:  # An image processor's own checks raise nearly anything.
        raise CheckpointError(f"{path} is not a valid image processor: {_one_line(error)}") from error


def _checked(frame: Frame) -> Frame:
    """Refuse what the bundle's manifest could not hold, such as sizes out of range; raises UnsupportedModelError."""
    for record in (frame.image, frame.crops, frame.layout):
        read(type(record), plain(record), "the processors' settings", UnsupportedModelError)
    return frame


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    data = load_json(path, CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def _one_line(error: Exception) -> str:
    return shorten(error) or type(error).__name__


def load_model(checkpoint: Checkpoint, on_file: Callable[[Path], None] = lambda file: None) -> nn.Module:
    """Build the checkpoint's model around its mapped weights, in their own dtype, in evaluation mode.

    Args:
        checkpoint: What `open_checkpoint` returned.
        on_file: Called after each weight file, for a progress bar.

    Raises:
        CheckpointError: A weight that is missing, unexpected or of another shape; or a file that cannot be read.
    """
    return load_weights(checkpoint.family, checkpoint.config, checkpoint.weight_files, on_file)


def _licence(folder: Path) -> str | None:
    """Return the licence that the model card's front matter names, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        top = file.read(CARD_BYTES)
    for line in top.splitlines()[:60]:
        key, colon, value = line.partition(":")
        if colon and key.strip() in ("license", "license_name"):
            return value.strip().strip("\"'") or None
    return None
