"""What an export is asked to do, and which requests cannot be met."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.manifest import POSITIONS, PRECISIONS, TARGETS
from leanvlm.runtime.manifest import parse_budgets as parse_budgets

ALIASES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "bakllava": "llava-hf/bakLlava-v1-hf",
    "llava-llama3": "xtuner/llava-llama-3-8b-v1_1-transformers",
}
# The gate's reference is the mean effective rank of a model's training images, so it belongs to a model.
DEFAULT_ERANK_REF = 90.0
# As `template`: the bundle gets none.
NO_TEMPLATE = "none"
KNOWN = "leanvlm.checkpoints"


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
        budgets: Image tokens kept per crop, at least 1; the first is the bundle's default. N is always added.
        output: Folder to write; None means `<model's name>-<budgets>` in the current folder.
        pruner: Spec string, such as `agile:gate=entropy`.
        target: What the graphs are written for.
        precision: None takes the target's default.
        positions: `compact` numbers the kept tokens in a row, as the method was published; `original` keeps the positions that
            they have in the unpruned sequence (arXiv 2506.21873 found grounding lost without them).
        force: Replace an existing output folder.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.
        offline: Use only what is already on this machine.
        gate_file: What `leanvlm calibrate gate` wrote for this model; sets the gate's references where `pruner` does not.
        template: File with a chat template (jinja) to use instead of the checkpoint's; `none` exports without one, for prompts
            that are written whole.
        here: The folder that a relative `output` is in, whatever the current folder becomes.

    Raises:
        InputError: A value that no export can have.
    """

    model: str
    budgets: tuple[int, ...] = (64,)
    output: str | Path | None = None
    pruner: str = "agile"
    target: Literal["cpu", "cuda", "tensorrt-rtx", "tensorrt"] = "cpu"
    precision: str | None = None
    positions: Literal["compact", "original"] = "compact"
    force: bool = False
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    gate_file: Path | None = None
    template: str | Path | None = None
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
            if budget < 1:
                raise InputError(f"budget {budget} is not possible; a budget is at least 1 image token")
        if len(set(self.budgets)) != len(self.budgets):
            raise InputError(f"budgets {','.join(map(str, self.budgets))} name one twice")
        if self.target not in TARGETS:
            raise InputError(f"target {self.target!r} is not known; known: {', '.join(TARGETS)}")
        if self.positions not in POSITIONS:
            raise InputError(f"positions {self.positions!r} are not known; known: {', '.join(POSITIONS)}")
        if self.precision is not None and self.precision not in PRECISIONS[self.target]:
            known = ", ".join(PRECISIONS[self.target])
            raise InputError(f"precision {self.precision!r} does not go with target {self.target!r}; it has: {known}")

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
        return Path(f"{name}-{'-'.join(map(str, self.budgets))}")
