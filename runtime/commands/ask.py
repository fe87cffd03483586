"""`leanvlm run` with a prompt: one question, one answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.answer import Answer, ImageTokens, Pruning
from leanvlm.runtime.commands.overlay import save_overlay
from leanvlm.runtime.console import is_utf8, stderr_console
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.outputs import check_outputs, check_picture
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.session import Session, load


@dataclass(frozen=True)
class Request:
    """What `leanvlm run` was asked; `options` are those of `Session.stream`."""

    bundle: Path
    images: tuple[Path, ...]
    prompt: str | None
    raw: bool
    budget: int | None
    device: str | None
    provider: str | None
    threads: int | None
    overlay: Path | None
    as_json: bool
    options: Mapping[str, Any]


def ask(request: Request) -> None:
    """Print the answer as it comes, or one JSON object; a summary goes to standard error."""
    assert request.prompt is not None
    check_picture("--overlay", request.overlay)
    check_outputs({"--overlay": request.overlay}, (request.bundle, *request.images))
    if request.overlay is not None and len(request.images) != 1:
        raise InputError("--overlay draws one image; give exactly one --image")
    with load(request.bundle, device=request.device, provider=request.provider, threads=request.threads) as session:
        asked = {"budget": request.budget, "raw": request.raw, **request.options}
        generation = session.stream(request.prompt, request.images, **asked)
        if not request.as_json:
            for piece in generation:
                print(piece, end="", flush=True)
            print()
        answer = generation.answer
        if request.as_json:
            print(json.dumps(answer_json(session, answer), ensure_ascii=not is_utf8(sys.stdout)))
        if request.overlay is not None:
            save_overlay(request.overlay, load_image(request.images[0]), answer.pruning, session.manifest)
        _summarise(answer)


def answer_json(session: Session, answer: Answer) -> dict[str, Any]:
    """Return an answer as the JSON object of `run --json`.

    With one image `pruning` holds its values; with several it holds the sums of kept and total, and `images` one entry each. An
    image of several crops has the sums of kept and total, its `tiles` (rows and columns), and `crops` with one entry each.
    """
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": answer.timings.to_dict(),
        "reused": {"images": answer.timings.reused_images, "positions": answer.timings.reused_positions},
        "pruning": _pruning_json(session.manifest.pruner.name, answer, session.manifest.tokens_per_crop),
    }


def _pruning_json(pruner: str, answer: Answer, total: int) -> dict[str, Any] | None:
    if not answer.images:
        return None
    name = "none" if answer.pruning[0].kept == total else pruner
    crops = iter(answer.pruning)
    images = [_image_json(image, [next(crops) for _ in range(image.crops)]) for image in answer.images]
    if len(images) == 1:
        return {"pruner": name, **images[0]}
    counts = {"kept": sum(i.kept for i in answer.images), "total": sum(i.total for i in answer.images)}
    return {"pruner": name, **counts, "images": images}


def _image_json(image: ImageTokens, crops: Sequence[Pruning]) -> dict[str, Any]:
    if image.crops == 1:
        return crops[0].to_dict()
    counts = {"kept": image.kept, "total": image.total, "tiles": list(image.tiles)}
    return {**counts, "crops": [crop.to_dict() for crop in crops]}


def _summarise(answer: Answer) -> None:
    kept = ", ".join(f"{image.kept} of {image.total} image tokens" for image in answer.images) or "no image"
    first = answer.timings.time_to_first_token
    stderr_console().print(f"[dim]{kept}; {len(answer.token_ids)} tokens, the first after {first:.0f} ms (with loading)[/dim]")
    warn_if_cut(answer)


def warn_if_cut(answer: Answer) -> None:
    """Say on standard error that an answer has no end of its own."""
    if answer.finish_reason == "length":
        count = len(answer.token_ids)
        stderr_console().print(f"cut at {count} {'token' if count == 1 else 'tokens'}: --max-new-tokens N goes on further")
