"""Reading a checkpoint: find its folder, read its configuration, load its safetensors without a second copy.

Weights are mapped from the files, not read, and assigned to a model that was built without memory; so loading costs little
more than the pages that the export then touches. Every weight must find its place, by name and shape, and every place its
weight: some transformers versions leave a tower random and only log it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from leanvlm.demo import BUILT_IN
from leanvlm.exporter.config import ALIASES, DEFAULT_ERANK_REF, ExportConfig
from leanvlm.exporter.models import Family, FamilySpec, family_for
from leanvlm.runtime.errors import CheckpointError, LeanVLMError
from leanvlm.runtime.manifest import SourceSpec, file_sha256
from leanvlm.runtime.preprocess import ImageSpec

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")
# Where checkpoints keep the image processor: newer transformers versions write the second only.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "LICENSE*", "LICENCE*", "USE_POLICY.md", "README.md")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what its configuration says; the weights are not loaded yet.

    Attributes:
        folder: Where the files are.
        name: How the manifest names the source: a Hub id, or the folder's name.
        revision: The Hub's commit, where known.
        config: The transformers configuration.
        family: The family that handles it.
        spec: The family's numbers.
        image_spec: The image processor as data.
        erank_ref: Reference effective rank declared for this model.
    """

    folder: Path
    name: str
    revision: str | None
    config: Any
    family: Family
    spec: FamilySpec
    image_spec: ImageSpec
    erank_ref: float

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files in bytes."""
        return sum(file.stat().st_size for file in self.weight_files)

    def source(self) -> SourceSpec:
        """Return the manifest's record of this checkpoint; reads every weight file once for its sum."""
        digest = hashlib.sha256("".join(file_sha256(file) for file in self.weight_files).encode())
        return SourceSpec(self.name, self.revision, digest.hexdigest(), _licence(self.folder), self.licence_file)

    @property
    def licence_file(self) -> str | None:
        """Name of the checkpoint's licence file, if it has one."""
        return next((name for name in LICENCE_FILES if (self.folder / name).is_file()), None)


def open_checkpoint(config: ExportConfig) -> Checkpoint:
    """Find the checkpoint that an export names and read its configuration.

    Raises:
        CheckpointError: It is not there, or has no safetensors weights or no readable configuration.
        UnsupportedModelError: No family handles it.
    """
    if config.model in BUILT_IN:
        folder, erank_ref = BUILT_IN[config.model]
        return _read(folder, f"leanvlm-{config.model}", None, erank_ref)
    folder = Path(config.model).expanduser()
    if folder.exists() or config.model.startswith((".", "/", "~")):
        return _read(folder, folder.resolve().name, None, DEFAULT_ERANK_REF)
    name = ALIASES.get(config.model, config.model)
    folder = _download(name, config)
    revision = folder.name if folder.parent.name == "snapshots" else config.revision
    return _read(folder, name, revision, DEFAULT_ERANK_REF)


def _download(name: str, config: ExportConfig) -> Path:
    """Fetch a Hub repository's safetensors and small files, or find them in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            name,
            revision=config.revision,
            token=config.token,
            local_files_only=config.offline,
            allow_patterns=list(HUB_FILES),
        )
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id such as llava-hf/llava-1.5-7b-hf") from error
    except (OSError, ValueError, RuntimeError) as error:
        why = _one_line(error)
        raise CheckpointError(f"{name!r} is not a folder here and could not be fetched from the Hub: {why}") from error
    return Path(folder)


def _read(folder: Path, name: str, revision: str | None, erank_ref: float) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model takes demo, an alias, a Hub id or a checkpoint folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json, so it is not a Hugging Face checkpoint")
    family = family_for(str(_json(folder / "config.json").get("model_type", "")))
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; save the checkpoint's tokenizer there")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has no .safetensors weights; convert the checkpoint (pickled weights are not read)")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        spec = family.spec(config)
    except LeanVLMError:
        raise
    except Exception as error:  # A configuration's own checks raise nearly anything.
        raise CheckpointError(f"{folder / 'config.json'} is not a valid configuration: {_one_line(error)}") from error
    return Checkpoint(folder, name, revision, config, family, spec, _image_spec(folder, spec), erank_ref)


def _image_spec(folder: Path, spec: FamilySpec) -> ImageSpec:
    """Read the image processor and compare its size with the tower's."""
    path = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has no {PROCESSOR_FILES[0]}; save the checkpoint's image processor there")
    try:
        image = ImageSpec.from_processor_config(_json(path))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a valid image processor: {_one_line(error)}") from error
    if image.size != spec.image_size:
        raise CheckpointError(f"the processor makes images of {image.size}, the tower takes {spec.image_size}")
    return image


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def settle_maths() -> None:
    """Let torch choose its kernels for elementary functions while one thread calls them.

    MKL chooses at the first call; when several threads share that call, some of them may compute with 11 bits
    (pytorch issue 188792), which put errors of 1.5e-4 into a decoder's rotary table now and then. One element is never shared.
    """
    for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.erf, torch.tanh):
        function(torch.ones(1))


def load_model(checkpoint: Checkpoint, on_file: Callable[[Path], None] = lambda file: None) -> nn.Module:
    """Build the checkpoint's model around its mapped weights, in their own dtype, in evaluation mode.

    Args:
        checkpoint: What `open_checkpoint` returned.
        on_file: Called after each weight file, for a progress bar.

    Raises:
        CheckpointError: A weight that is missing, unexpected or of another shape; or a file that cannot be read.
    """
    settle_maths()
    family = checkpoint.family
    model = family.empty(checkpoint.config)
    places = {family.canonical_key(key): key for key in model.state_dict()}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for file in checkpoint.weight_files:
        for key, tensor in _tensors(file):
            place = places.get(family.canonical_key(key))
            if place is None:
                unexpected.append(key)
                continue
            if tuple(tensor.shape) != shapes[place]:
                raise CheckpointError(f"{file.name}: {key} has shape {list(tensor.shape)}, expected {list(shapes[place])}")
            loaded[place] = tensor
        on_file(file)
    _tie(model, loaded)
    missing = [place for place in shapes if place not in loaded]
    _refuse("misses", missing)
    _refuse("has unexpected", unexpected)
    model.load_state_dict(loaded, strict=True, assign=True)
    family.materialise_buffers(model)
    return model.requires_grad_(False).eval()


def _tensors(file: Path) -> Any:
    """Yield the names and mapped tensors of one safetensors file."""
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (not a dict)
                yield key, weights.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _tie(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    """Give the output head the token table where the configuration ties them and the files store one."""
    config: Any = model.config
    head, table = "lm_head.weight", next((k for k in loaded if k.endswith("embed_tokens.weight")), None)
    tied = getattr(config, "tie_word_embeddings", False) or config.text_config.tie_word_embeddings
    if tied and head not in loaded and table is not None:
        loaded[head] = loaded[table]


def _refuse(verb: str, keys: list[str]) -> None:
    if keys:
        shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise CheckpointError(f"the checkpoint {verb} {len(keys)} weight(s): {shown}")


def _licence(folder: Path) -> str | None:
    """Return the licence that the model card's front matter names, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
        key, colon, value = line.partition(":")
        if colon and key.strip() in ("license", "license_name"):
            return value.strip().strip("\"'") or None
    return None
