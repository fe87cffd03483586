"""What an export is asked to do, and which requests cannot be met."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.manifest import POSITIONS, PRECISIONS, TARGETS, VISION_PRECISIONS

ALIASES = {
    "cosmos-reason2-2b": "nvidia/Cosmos-Reason2-2B",
    "cosmos-reason2-8b": "nvidia/Cosmos-Reason2-8B",
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-12b": "google/gemma-3-12b-it",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "internvl3.5-1b": "OpenGVLab/InternVL3_5-1B-HF",
    "internvl3.5-2b": "OpenGVLab/InternVL3_5-2B-HF",
    "internvl3.5-4b": "OpenGVLab/InternVL3_5-4B-HF",
    "internvl3.5-8b": "OpenGVLab/InternVL3_5-8B-HF",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "bakllava": "llava-hf/bakLlava-v1-hf",
    "llava-llama3": "xtuner/llava-llama-3-8b-v1_1-transformers",
    "llava-next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-llama3": "llava-hf/llama3-llava-next-8b-hf",
    "llava-next-mistral": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-ov-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-ov-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    # The repositories without BF16 in their names hold fp8, which is not read.
    "ministral3-3b": "mistralai/Ministral-3-3B-Instruct-2512-BF16",
    "ministral3-8b": "mistralai/Ministral-3-8B-Instruct-2512-BF16",
    "paligemma-3b": "google/paligemma-3b-mix-224",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
ImageSize = tuple[int, int]
"""(height, width) in pixels."""

# The gate's reference is the mean effective rank of a model's training images, so it belongs to a model.
DEFAULT_ERANK_REF = 90.0
# As `template`: the bundle gets none.
NO_TEMPLATE = "none"
KNOWN = "leanvlm.checkpoints"


PERCENT = 100
# Each shape has its own vision graphs.
MAX_SIZES, MAX_SIDE = 16, 4096


@dataclass(frozen=True)
class Share:
    """A budget said as papers say it: so many of the image tokens of all crops together, such as 320/2880 or 25%.

    Attributes:
        kept: How many are kept.
        total: Of how many.

    Raises:
        InputError: Not 1 to all of them.
    """

    kept: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.total:
            raise InputError(f"budget {self} is not possible; a share is of 1 to all image tokens, such as 320/2880")

    def __str__(self) -> str:
        return f"{self.kept}%" if self.total == PERCENT else f"{self.kept}/{self.total}"

    def of(self, count: int) -> int:
        """Return the tokens kept of a crop of `count`: the nearest whole number, at least 1."""
        return max((2 * self.kept * count + self.total) // (2 * self.total), 1)


def parse_budgets(text: str) -> tuple[int | Share, ...]:
    """Read budgets such as `64`, `64,128`, `320/2880` or `25%`.

    Raises:
        InputError: Something that is neither a whole number nor a share.
    """
    try:
        return tuple(_budget(part.strip()) for part in text.split(","))
    except (ValueError, TypeError) as error:
        raise InputError(f"--budget {text!r} is not a number of image tokens, such as 64, 64,128, 320/2880 or 25%") from error


def _budget(text: str) -> int | Share:
    if text.endswith("%"):
        return Share(int(text[:-1]), PERCENT)
    return Share(*map(int, text.split("/"))) if "/" in text else int(text)


def parse_image_sizes(text: str | None) -> tuple[ImageSize, ...] | None:
    """Read sizes such as `448x448,448x616`, height first; None stays None.

    Raises:
        InputError: Something else.
    """
    if text is None:
        return None
    pairs = [part.strip().lower().split("x") for part in text.split(",")]
    if any(len(pair) != 2 or not all(side.isdecimal() for side in pair) for pair in pairs):
        raise InputError(f"--image-size {text!r} is not a list of heights and widths, such as 448x448,448x616")
    return tuple((int(height), int(width)) for height, width in pairs)


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint on this machine that a short name stands for, such as a built-in one.

    Attributes:
        name: How manifests name the source.
        folder: Where its files are.
        erank_ref: Mean effective rank over the images that it was trained on.
    """

    name: str
    folder: Path
    erank_ref: float


@cache
def known_checkpoints() -> dict[str, EntryPoint]:
    """Return the names that installed packages offer checkpoints under, each to where a `KnownCheckpoint` stands.

    They are entry points of the group `leanvlm.checkpoints`, so the exporter need not know who offers them.
    """
    return {found.name: found for found in entry_points(group=KNOWN)}


@dataclass(frozen=True)
class ExportConfig:
    """One export, as the command line's options spell it.

    Attributes:
        model: `demo`, `demo-small` or another name that an installed package offers (`known_checkpoints`), an alias, a Hub id
            or a folder with a Hugging Face checkpoint.
        budgets: Image tokens kept per crop, at least 1, or a share of them; the first is the bundle's default. N is always
            added. Where crops differ in shape, a number is kept of each that has as many, and a share is one of each.
        output: Folder to write; None means `<model's name>-<budgets>` in the current folder.
        pruner: Spec string, such as `agile:gate=entropy`.
        target: What the graphs are written for.
        precision: Of the decoder, and where `vision_precision` has no say of the vision graphs too; None takes the target's
            default.
        vision_precision: Of tower and projector, for `cpu`: `int8`, or `fp32`, which None takes.
        positions: `compact` numbers the kept tokens in a row, as the method was published; `original` keeps the positions that
            they have in the unpruned sequence (arXiv 2506.21873 found grounding lost without them). None is compact, or
            original for a model whose image tokens have rows and columns for positions, which knows no other.
        force: Replace an existing output folder.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        offline: Use only what is already on this machine.
        gate_file: What `leanvlm calibrate gate` wrote for this model; sets the gate's references where `pruner` does not.
        template: File with a chat template (jinja) to use instead of the checkpoint's; `none` exports without one, for prompts
            that are written whole.
        image_sizes: (height, width) of the shapes that images are brought to, for a model whose images may have any; None takes
            a usual ladder.
        here: The folder that a relative `output` is in, whatever the current folder becomes.

    Raises:
        InputError: A value that no export can have.
    """

    model: str
    budgets: tuple[int | Share, ...] = (64,)
    output: str | Path | None = None
    pruner: str = "agile"
    target: Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"] = "cpu"
    precision: str | None = None
    vision_precision: str | None = None
    positions: Literal["compact", "original"] | None = None
    force: bool = False
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    gate_file: Path | None = None
    template: str | Path | None = None
    image_sizes: tuple[ImageSize, ...] | None = None
    here: Path = field(default_factory=Path.cwd, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise InputError("--model is empty; give demo, llava, a Hub id or a folder")
        if self.named_output.name in ("", ".."):
            raise InputError(f"--output {str(self.output)!r} does not name a folder; give one to write, such as llava-64")
        if self.template is not None and not str(self.template).strip():
            raise InputError(f"--template is empty; give a file with a chat template, or {NO_TEMPLATE} to export without one")
        if not self.budgets:
            raise InputError("--budget is empty; give one or more numbers of image tokens, such as 64 or 64,128")
        for budget in self.budgets:
            if isinstance(budget, int) and budget < 1:
                raise InputError(f"budget {budget} is not possible; a budget is at least 1 image token")
        self._check_sizes()
        if len(set(self.budgets)) != len(self.budgets):
            raise InputError(f"budgets {','.join(map(str, self.budgets))} name one twice")
        if self.target not in TARGETS:
            raise InputError(f"target {self.target!r} is not known; known: {', '.join(TARGETS)}")
        if self.positions is not None and self.positions not in POSITIONS:
            raise InputError(f"positions {self.positions!r} are not known; known: {', '.join(POSITIONS)}")
        if self.precision is not None and self.precision not in PRECISIONS[self.target]:
            known = ", ".join(PRECISIONS[self.target])
            raise InputError(f"precision {self.precision!r} does not go with target {self.target!r}; it has: {known}")
        self._check_vision_precision()

    def _check_vision_precision(self) -> None:
        if self.vision_precision is None:
            return
        known = VISION_PRECISIONS.get(self.target)
        if known is None:
            able = ", ".join(VISION_PRECISIONS)
            raise InputError(f"--vision-precision does not go with target {self.target!r}; it is for {able}: leave it out")
        if self.vision_precision not in known:
            raise InputError(f"vision precision {self.vision_precision!r} is not known; known: {', '.join(known)}")

    def _check_sizes(self) -> None:
        sizes = self.image_sizes
        if sizes is None:
            return
        if not sizes or len(sizes) > MAX_SIZES or len(set(sizes)) != len(sizes):
            raise InputError(f"image sizes must be 1 to {MAX_SIZES}, and none of them named twice")
        for height, width in sizes:
            if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
                raise InputError(f"image size {height}x{width} is not possible; a side is 1 to {MAX_SIDE} pixels")

    def resolved(self, count: int) -> ExportConfig:
        """Return the same export with every budget as a number, for crops of `count` image tokens.

        Raises:
            InputError: Two budgets are one number.
        """
        counts = tuple(budget.of(count) if isinstance(budget, Share) else budget for budget in self.budgets)
        if len(set(counts)) != len(counts):
            asked, kept = (",".join(map(str, budgets)) for budgets in (self.budgets, counts))
            raise InputError(f"budgets {asked} are {kept} of a crop's {count} image tokens, which names one twice")
        return self if counts == self.budgets else replace(self, budgets=counts, output=self.named_output)

    @property
    def counts(self) -> tuple[int, ...]:
        """The budgets of an export that is resolved, as numbers."""
        counts = tuple(budget for budget in self.budgets if isinstance(budget, int))
        assert len(counts) == len(self.budgets), "resolved comes first"
        return counts

    @property
    def known(self) -> KnownCheckpoint | None:
        """The checkpoint that an installed package offers under the model's name, if one does."""
        offered = known_checkpoints()
        return offered[self.model].load() if self.model in offered else None

    @property
    def resolved_precision(self) -> str:
        """The precision to use: the one asked for, else the target's default."""
        return self.precision or PRECISIONS[self.target][0]

    @property
    def resolved_vision_precision(self) -> str | None:
        """Of tower and projector: the one asked for, else the target's default; None where a target leaves no choice."""
        return self.vision_precision or next(iter(VISION_PRECISIONS.get(self.target, ())), None)

    @property
    def output_folder(self) -> Path:
        """The folder to write, as an absolute path; only its last part may be a link."""
        path = self.here / self.named_output
        # Unlike Path.resolve, this leaves a link that leads to itself for whoever opens it.
        return Path(os.path.realpath(path.parent), path.name)

    @property
    def named_output(self) -> Path:
        """The folder to write, as the request names it."""
        if self.output is not None:
            return Path(self.output)
        name = Path(self.model.rstrip("/")).name or "bundle"
        return Path(f"{name}-{'-'.join(str(budget).replace('/', 'of').replace('%', 'pct') for budget in self.budgets)}")
