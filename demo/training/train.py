"""`python -m leanvlm.demo.training.train`: train the built-in model from nothing, on a GPU in minutes.

The output folder becomes a Hugging Face checkpoint, with the run's record in `training.json`; `state.pt` is there while a run
is not finished, for `--resume`. A line of JSON on standard output tells of every 100 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from leanvlm.demo.scenes import FAMILIES
from leanvlm.demo.training.batches import Batch, Script, drawn
from leanvlm.demo.training.canvas import PATCHES, Canvas, to_device
from leanvlm.demo.training.checkpoint import read_folder, write_folder, write_json
from leanvlm.demo.training.examine import examine
from leanvlm.demo.training.muon import Muon
from leanvlm.demo.training.network import SIZES, Twin
from leanvlm.demo.training.objective import LOSSES, Objective, Tokens, choose
from leanvlm.demo.training.recipe import Recipe, smoke
from leanvlm.runtime.console import one_line_errors, stderr_console
from leanvlm.runtime.errors import InputError

STATE = "state.pt"
RECORD = "training.json"
REPORT_EVERY = 100


@dataclass(frozen=True)
class Options:
    """How a run is carried out; the result depends on none of it.

    Attributes:
        output: Folder to write.
        workers: Processes that draw scenes; 0 draws between the steps.
        resume: Go on from the state in the output folder.
        save_every: Steps between saved states.
        time_limit: Seconds after which to save and stop; None for no limit.
        device: Where to train.
        compiled: Whether to compile.
    """

    output: Path
    workers: int = 0
    resume: bool = False
    save_every: int = 500
    time_limit: float | None = None
    device: str = "cpu"
    compiled: bool = False


class Tally:
    """Losses and right answers since the last report, kept on the device: reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        # Without and with dropped tokens.
        self._right, self._asked = (torch.zeros(2, len(FAMILIES), device=device) for _ in range(2))
        self._loss = torch.zeros((), device=device)
        # The parts, and the gradients' norm, of steps that drop nothing.
        self._parts = torch.zeros(len(LOSSES) + 1, device=device)
        self._steps = self._whole = 0

    def add(self, loss: Tensor, parts: Tensor, right: Tensor, families: Tensor, dropped: bool) -> None:
        """Add one step: its loss (), parts (7,), which slots were right (B, 9), and their families (B, 9)."""
        family, asked = families.clamp(min=0).flatten(), (families >= 0).flatten()
        self._right[int(dropped)].index_add_(0, family, (right.flatten() & asked).float())
        self._asked[int(dropped)].index_add_(0, family, asked.float())
        self._loss += loss
        self._steps += 1
        if not dropped:
            self._parts += parts
            self._whole += 1

    def take(self) -> dict[str, Any]:
        """Return the means, and begin anew."""
        shares = (self._right / self._asked.clamp(min=1)).tolist()
        whole, dropped = ({family: round(x, 4) for family, x in zip(FAMILIES, row, strict=True)} for row in shares)
        parts = (self._parts / max(self._whole, 1)).tolist()
        taken = {
            "loss": round(self._loss.item() / max(self._steps, 1), 4),
            **{name: round(x, 4) for name, x in zip((*LOSSES, "gradient"), parts, strict=True)},
            "right": whole,
            "right_dropped": dropped,
        }
        for total in (self._right, self._asked, self._loss, self._parts):
            total.zero_()
        self._steps = self._whole = 0
        return taken


class Trainer:
    """The model, its optimizers, and one step of training."""

    def __init__(self, recipe: Recipe, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(recipe.seed)
        self._recipe, self._device = recipe, device
        self._half = device.type == "cuda"
        head = Script().head
        dtype = torch.bfloat16 if self._half else torch.float32
        self.objective = Objective(Twin(SIZES[recipe.size]), recipe, head, dtype).to(device)
        self._forward: Any = torch.compile(self.objective, dynamic=False) if compiled else self.objective
        self._canvas, self._tokens = Canvas(device, compiled), Tokens(len(head), device)
        self._parameters = list(self.objective.parameters())
        self._generator = torch.Generator(device)
        self.tally = Tally(device)
        matrices, decayed, others = _split_parameters(self.objective)
        self._muon = Muon(matrices, recipe.momentum, recipe.matrix_decay, compiled)
        groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), eps=1e-8, fused=self._half)

    def step(self, number: int, batch: Batch) -> None:
        """Take step `number`, counted from 0; on a GPU, only ask for it."""
        recipe, device = self._recipe, self._device
        images, labels = self._canvas.images(batch.scenes), self._canvas.labels(batch.scenes)
        kept = recipe.kept_at(number)
        self._generator.manual_seed(recipe.seed * 1_000_003 + number)
        tokens = self._tokens.keep(choose(labels, self._generator), kept or PATCHES)
        contents, digits, ids, targets, families = (
            to_device(array, device) for array in (batch.contents, batch.digits, batch.ids, batch.targets, batch.families)
        )
        patch_weight = torch.full((), recipe.patch_weight_at(number), device=device)
        through = torch.full((), float(kept is None), device=device, dtype=self.objective.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            loss, parts, right = self._forward(
                images,
                (labels.shapes, labels.colors, labels.digits, labels.centers),
                (contents, digits),
                (ids, targets),
                tokens,
                patch_weight,
                through,
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, recipe.clip, foreach=True)
        self._update(recipe.rate_at(number))
        self.tally.add(loss.detach(), torch.cat([parts, norm[None]]), right, families, kept is not None)

    def _update(self, rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self._muon.step(rate)
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on."""
        weights, adam = self.objective.state_dict(), self._adam.state_dict()
        return {"weights": weights, "adam": adam, "muon": self._muon.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.objective.load_state_dict(state["weights"])
        self._adam.load_state_dict(state["adam"])
        self._muon.load_state_dict(state["muon"])


Parameters = list[nn.Parameter]


def _split_parameters(module: nn.Module) -> tuple[list[tuple[nn.Parameter, int]], Parameters, Parameters]:
    """Matrices of the layers and the projector for Muon, with their parts; other matrices; all that does not decay."""
    matrices: list[tuple[nn.Parameter, int]] = []
    decayed: Parameters = []
    others: Parameters = []
    for name, parameter in module.named_parameters():
        if parameter.dim() != 2 or "positions" in name or "embed" in name:
            others.append(parameter)
        elif ".blocks." in name or ".projector" in name:
            matrices.append((parameter, 3 if "qkv" in name else 2 if "gate_up" in name else 1))
        else:
            decayed.append(parameter)
    return matrices, decayed, others


@dataclass
class Progress:
    """How far a run is: steps done, seconds spent in all its parts, lines reported."""

    steps: int
    seconds: float
    lines: list[dict[str, Any]]


def train(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train, and write the output folder; what was reached is also written when the run is interrupted.

    Returns:
        The record, as `training.json` has it.

    Raises:
        InputError: There is no state to resume, it is another recipe's, or one is there and not to be resumed.
    """
    began, device = time.monotonic(), torch.device(options.device)
    saved = _saved_state(recipe, options, device)
    trainer = Trainer(recipe, device, options.compiled)
    progress = Progress(0, 0.0, [])
    if saved is not None:
        trainer.restore(saved["trainer"])
        progress = Progress(saved["steps"], saved["seconds"], saved["lines"])
    options.output.mkdir(parents=True, exist_ok=True)
    before = progress.seconds
    try:
        for _ in _steps(trainer, recipe, options, progress, began):
            progress.seconds = before + time.monotonic() - began
            if progress.steps % options.save_every == 0 and progress.steps < recipe.steps:
                _save_state(trainer, recipe, options, progress)
            if options.time_limit is not None and time.monotonic() - began > options.time_limit:
                break
    except BaseException:
        _finish(trainer, recipe, options, progress, check=False)
        raise
    return _finish(trainer, recipe, options, progress, check=True)


def _steps(trainer: Trainer, recipe: Recipe, options: Options, progress: Progress, began: float) -> Iterator[None]:
    """Take the steps that remain, reporting every so often; yield after each."""
    every = min(REPORT_EVERY, max(1, recipe.steps // 6))
    first = progress.steps
    drawing = drawn(recipe.mixture, recipe.seed, range(first, recipe.steps), options.workers)
    since, at, waited = time.monotonic(), first, 0.0
    with closing(drawing) as batches, _bar(recipe.steps, first) as advance:
        for number in range(first, recipe.steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            trainer.step(number, batch)
            progress.steps = number + 1
            advance()
            if progress.steps % every == 0 or progress.steps == recipe.steps:
                line = {"step": progress.steps, "rate": round(recipe.rate_at(number), 6), **trainer.tally.take()}
                now, steps = time.monotonic(), max(progress.steps - at, 1)
                line |= {
                    "seconds": round(now - began, 1),
                    "step_ms": round(1000 * (now - since) / steps, 1),
                    "wait_ms": round(1000 * waited / steps, 1),
                }
                progress.lines.append(line)
                print(json.dumps(line), flush=True)
                since, at, waited = time.monotonic(), progress.steps, 0.0
            elif number == first:
                # Compiling belongs to the first step alone.
                _wait(trainer)
                print(json.dumps({"first_step_seconds": round(time.monotonic() - began, 1)}), flush=True)
                since, at, waited = time.monotonic(), progress.steps, 0.0
            yield


def _wait(trainer: Trainer) -> None:
    next(trainer.objective.parameters()).sum().item()


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    """A progress bar where standard error is a terminal; yields what to call after each step."""
    if not os.isatty(2):
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)


def _recipe_text(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe))


def _saved_state(recipe: Recipe, options: Options, device: torch.device) -> dict[str, Any] | None:
    file = options.output / STATE
    if not options.resume:
        if file.exists():
            raise InputError(f"--output {options.output} holds a run that is not finished; add --resume, or remove {STATE}")
        return None
    if not file.exists():
        raise InputError(f"--resume: there is no {STATE} in {options.output}")
    saved: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    if saved["recipe"] != _recipe_text(recipe):
        raise InputError(f"--resume: the run in {options.output} has other options; it was started with {saved['recipe']}")
    return saved


def _save_state(trainer: Trainer, recipe: Recipe, options: Options, progress: Progress) -> None:
    partial = options.output / f".{STATE}"
    torch.save({"recipe": _recipe_text(recipe), "trainer": trainer.state(), **asdict(progress)}, partial)
    os.replace(partial, options.output / STATE)


def _finish(trainer: Trainer, recipe: Recipe, options: Options, progress: Progress, check: bool) -> dict[str, Any]:
    """Write the folder and the record; the state too, unless the run is complete."""
    complete = progress.steps == recipe.steps
    if complete:
        (options.output / STATE).unlink(missing_ok=True)
    else:
        _save_state(trainer, recipe, options, progress)
    twin = trainer.objective.twin
    write_folder(twin, options.output)
    images = progress.steps * recipe.mixture.images
    record = {
        "recipe": asdict(recipe),
        "steps": progress.steps,
        "complete": complete,
        "parameters": sum(parameter.numel() for parameter in twin.parameters()),
        "images": images,
        "seconds": round(progress.seconds, 1),
        "images_per_second": round(images / max(progress.seconds, 1e-3), 1),
        "machine": _machine(options),
        "curve": progress.lines,
    }
    if check:
        device = torch.device(options.device)
        record["held_out"] = examine(read_folder(options.output).to(device), recipe.checked, device)
    write_json(options.output / RECORD, record)
    return record


def _machine(options: Options) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else "none"
    cuda = torch.version.cuda or "none"
    versions = {"torch": torch.__version__, "numpy": np.__version__, "tokenizers": tokenizers.__version__}
    return {"device": options.device, "gpu": gpu, "cuda": cuda, "python": platform.python_version(), **versions}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m leanvlm.demo.training.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="base: 14 MiB of weights; small: 3 MiB")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that draw scenes (default: 6; with --smoke 0)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saved states (default: %(default)s)")
    parser.add_argument("--time-limit", type=float, help="seconds after which to save and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    parser.add_argument("--smoke", action="store_true", help="a run of a minute on the CPU, with a tiny model")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile, several times slower")
    args = parser.parse_args()
    with one_line_errors():
        workers: int = (0 if args.smoke else 6) if args.workers is None else args.workers
        if workers < 0 or args.save_every < 1:
            raise InputError("--workers must be at least 0 and --save-every at least 1")
        if args.smoke:
            recipe, device = smoke(args.seed), "cpu"
        elif torch.cuda.is_available():
            recipe, device = Recipe(size=args.size, steps=args.steps, seed=args.seed), "cuda"
        else:
            raise InputError("training needs a CUDA device; --smoke tries it on the CPU")
        torch.set_float32_matmul_precision("high")
        compiled = device == "cuda" and not args.no_compile
        record = train(
            recipe,
            Options(args.output, workers, args.resume, args.save_every, args.time_limit, device, compiled),
        )
        state = "complete" if record["complete"] else f"stopped after {record['steps']} steps; --resume goes on"
        print(json.dumps({"output": str(args.output), "state": state, "held_out": record["held_out"]}), flush=True)


if __name__ == "__main__":
    main()
