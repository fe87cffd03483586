"""What every peer reads: one random checkpoint, the pictures, and the files that each peer makes of the checkpoint.

The model has the CLIP-L/336 tower of LLaVA-1.5 and a Llama of 12 layers and 1,024 columns, 525 million parameters: large enough
for arithmetic to decide, small enough for two cores. Everything is kept in the work folder and made once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from bench.checkpoint import SMALL, Sizes, make_checkpoint
from bench.photographs import FOLDER

SIZES = Sizes(layers=12, hidden=1024, intermediate=2816, heads=16, vocab=32064)
# Of the decoder's queries and keys. With 2.5 every second answer was still one token throughout, with 3.5 none.
SHARPER = 3.5
# Of these the first is for warming up and the last for the chat.
PHOTOGRAPHS = ("camera", "coffee", "chelsea", "rocket", "astronaut")
PICTURE = (1280, 960)
QUALITY = 90


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a file or folder, made under another name first, so that half of one is never taken for a whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.unfinished{path.suffix}")
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        make(unfinished)
        unfinished.rename(path)
    return path


def checkpoint(work: Path, small: bool = False) -> Path:
    """Return the checkpoint's folder; `small` is narrow, of two layers, to try the command."""

    def make(folder: Path) -> None:
        make_checkpoint(folder, SMALL if small else SIZES)
        _sharpen(folder / "model.safetensors")
        _name_every_token(folder)

    return once(work / "checkpoint", make)


def _sharpen(file: Path) -> None:
    """Make the decoder's attention choose.

    As drawn, each position averages all the others, and every answer is one token again and again, which would be equal
    whatever a peer did wrong.
    """
    tensors = load_file(file)
    for name, values in tensors.items():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = values * SHARPER
    save_file(tensors, file, {"format": "pt"})


def _name_every_token(folder: Path) -> None:
    """Give a name to each row of the table that the built-in tokenizer has none for: other programs decode whatever comes.

    No merge leads to them, so no text becomes one of them.
    """
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"]
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    known |= {f"unused{number}": number for number in range(vocabulary) if number not in taken}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def pictures(work: Path) -> list[Path]:
    """Return JPEG files of 1280 x 960 pixels, each of another photograph."""

    def make(name: str) -> Callable[[Path], None]:
        return lambda path: ImageOps.fit(Image.open(FOLDER / f"{name}.jpg").convert("RGB"), PICTURE).save(
            path, "JPEG", quality=QUALITY
        )

    return [once(work / "pictures" / f"{name}.jpg", make(name)) for name in PHOTOGRAPHS]
