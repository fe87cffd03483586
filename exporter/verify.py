"""Does the bundle do what the checkpoint does? Measured at every export, with the runtime that will run it.

Per budget: the image features and the kept tokens of two probe images in one batch, against the unmodified checkpoint. For the
decoder: first-position logits. For the whole chain: greedy tokens, by one pass of the checkpoint over the same sequence,
which is the same event as decoding greedily step by step. A decoder with quantised weights is judged by the checkpoint with
its weights quantised alike, and what quantisation costs against the checkpoint as it is, is measured beside it. The figures
go into the manifest; a failure leaves no bundle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from leanvlm.exporter import tolerances
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock, VisionTokens, choose
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.exporter.reference import Reference, cosine, relative_difference
from leanvlm.exporter.rounding import BITS
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.crops import PIXELS, VALID, CropRule, crop
from leanvlm.runtime.encoder import in_parts
from leanvlm.runtime.errors import LeanVLMWarning, VerificationError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, image_runs
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.prompt import assemble, compose
from leanvlm.runtime.session import Session, user_message
from leanvlm.runtime.specs import GraphSpec
from leanvlm.runtime.text import Message

Array = npt.NDArray[Any]
# A graph's dtype to the precision that it computes in. Dequantised weights are exact numbers of it.
COMPUTED = {"float16": "fp16", "float32": "fp32"}
PROMPT = "Describe the image."
NEW_TOKENS = 8


def verify(
    session: Session,
    reference: Reference,
    pruners: Mapping[int, Pruner],
    on_step: Callable[[str], None] = lambda step: None,
    raw: bool = False,
) -> dict[str, Any]:
    """Compare a finished bundle with its checkpoint.

    Args:
        session: The bundle, open.
        reference: The checkpoint.
        pruners: Budget to pruner, as exported.
        on_step: Told what is being compared, for a progress display.
        raw: Ask without the chat template, which the bundle may not have.

    Returns:
        The measured differences, for the manifest.

    Raises:
        VerificationError: A difference is over its tolerance, a value is not finite, or a selection did not converge.
    """
    manifest = session.manifest
    images = probe_images(manifest.crops)
    given = [_inputs(image, manifest, manifest.image) for image in images]
    inputs = {name: np.concatenate([one[name] for one in given]) for name in given[0]}
    # The checkpoint normalises in its own processor's steps, whatever the bundle folds.
    normal = [_inputs(image, manifest, replace(manifest.image, layout="float32"))[PIXELS] for image in images]
    views: dict[ScoredBlock, VisionTokens] = {}
    for where in {p.scored_block for p in pruners.values()}:
        looked = [reference.look(crops, where, image.size[::-1]) for crops, image in zip(normal, images, strict=True)]
        views[where], packed = joined([tokens for tokens, _ in looked], inputs.get(VALID)), looked[0][1]
    first = next(iter(views.values())).features.numpy()
    whole = first[: len(normal[0])]
    results: dict[str, Any] = {"images": len(images), "crops": len(inputs[PIXELS]), "device": session.backend.device}
    results |= {"vision": {}, "tokens": {}}
    _check_layout(session, reference, images[0], whole, packed)
    for budget, pruner in pruners.items():
        on_step(f"verify vision {budget}")
        outputs = _run(session, budget, inputs)
        _check_placement(budget, session.backend.misplaced(manifest.vision_graph(budget), in_parts(inputs, len(images))[0]))
        unpruned, precision = views[pruner.scored_block], _vision_precision(manifest.vision_graph(budget))
        measured = _judge_vision(outputs, reference, pruner, unpruned)
        if not measured["merged"] and precision == "fp32" and measured["features"] > tolerances.FEATURES[precision]:
            # A pass in double precision, only where it decides.
            measured["rounding"] = reference.rounding(np.concatenate(normal), unpruned.features.numpy())
        results["vision"][str(budget)] = measured
        _check_vision(budget, measured, precision)
        measured |= _compare_rank(outputs["effective_rank"], unpruned.shown.patches.features)
    on_step("verify decoder")
    question = f"{session.image_token}\n{PROMPT}" if raw else [user_message(PROMPT, 1)]
    for budget in pruners:
        merges = results["vision"][str(budget)]["merged"]
        measured = _compare_chain(session, reference, images[0], question, None if merges else whole, budget)
        results["tokens"][str(budget)] = measured
        _check_chain(budget, measured, COMPUTED[manifest.decoder.kv_dtype])
    return results


@torch.no_grad()
def _judge_vision(outputs: Mapping[str, Array], reference: Reference, pruner: Pruner, unpruned: VisionTokens) -> dict[str, Any]:
    """Compare one vision graph's outputs with what its pruner makes of the checkpoint's own tokens."""
    expected = choose(pruner, unpruned)
    merged = None if expected.hidden is None else reference.project(expected.hidden).numpy()
    return _compare_vision(outputs, unpruned.features.numpy(), expected.indices.numpy(), merged)


def _inputs(image: Image.Image, manifest: Manifest, spec: ImageSpec) -> Mapping[str, Array]:
    """Return what the vision graphs take of an image."""
    (inputs,) = crop([image], spec, manifest.crops).inputs.values()
    return inputs


def joined(tokens: Sequence[VisionTokens], valid: Array | None = None) -> VisionTokens:
    """Return the tokens of several images' crops as those of one batch, with what of them shows the images (C, N)."""
    first = tokens[0]
    hidden, *told = zip(*(one.seen for one in tokens), strict=True)
    seen = Seen(torch.cat(hidden), *(None if part[0] is None else torch.cat(part) for part in told))
    shows = None if valid is None else torch.from_numpy(valid)
    return VisionTokens(torch.cat([one.features for one in tokens]), seen, first.grid, first.leading, shows)


def _run(session: Session, budget: int, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a vision graph on crops, as many at once as the backend takes."""
    graph = session.vision(budget)
    parts = [fetched(graph.run(part)) for part in in_parts(inputs, session.backend.crops_at_once)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_layout(session: Session, reference: Reference, image: Image.Image, whole: Array, packed: Array) -> None:
    """Compare how the runtime puts an unpruned image's tokens together with how the checkpoint does.

    Args:
        session: The bundle.
        reference: The checkpoint.
        image: The image.
        whole: The checkpoint's features (C, N, D) of its crops.
        packed: The checkpoint's features (S, D) of the image, put together.

    Raises:
        VerificationError: Something stands elsewhere, or is missing.
    """
    manifest = session.manifest
    arrangement = crop([image], manifest.image, manifest.crops).images[0].arrangement
    shape = manifest.crops.shapes[0]
    every, nothing = np.arange(shape.tokens), np.zeros(shape.tokens, np.float32)
    pruning = Pruning(shape.tokens, None, shape.tokens, True, every, nothing, shape)
    features = ImageFeatures(tuple(CropFeatures(rows, pruning) for rows in whole), arrangement)
    runs = image_runs(features, manifest.layout)
    prompt = assemble(runs, reference, manifest.positions, manifest.image_token_id, manifest.line_end)
    found = prompt.embeddings()
    if found.shape != packed.shape:
        raise VerificationError(f"an unpruned image takes {len(found)} places in a prompt, the checkpoint's {len(packed)}")
    difference = relative_difference(found, packed)
    if not difference <= tolerances.LAYOUT:
        raise VerificationError(
            f"an unpruned image's tokens are not the checkpoint's: they differ by {difference:.2g} of their range"
        )


def fetched(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return a vision graph's outputs as arrays, its features in fp32."""
    features = outputs["image_features"]
    rows = np.stack([np.asarray(features[row], dtype=np.float32) for row in range(len(outputs["keep_indices"]))])
    return {**outputs, "image_features": rows}


def _check_placement(budget: int, misplaced: Sequence[str]) -> None:
    """Refuse a graph that the device runs only in part.

    Raises:
        VerificationError: Nodes that fell to another provider, by name.
    """
    if misplaced:
        shown = ", ".join(misplaced[:5]) + (f" and {len(misplaced) - 5} more" if len(misplaced) > 5 else "")
        raise VerificationError(f"budget {budget}: {len(misplaced)} nodes do not run on the device: {shown}")


def probe_images(rule: CropRule | None = None) -> list[Image.Image]:
    """Return two fixed images, of different size and content: smooth gradients, and patches of noise and lines.

    Args:
        rule: How they will be cut. For tiles the first is wide and the second tall, so that they are few.
    """
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[0:300, 0:420] / 300.0
    smooth = np.stack([rows, columns / 1.4, 1 - rows], axis=2) * 200 + 25
    smooth[90:180, 60:150] = (220, 40, 40)
    busy = np.kron(rng.uniform(0, 255, (30, 24, 3)), np.ones((16, 16, 1)))
    busy[::11] = 0
    busy += rng.normal(0, 12, busy.shape)
    if rule is not None and rule.kind == "tiles":
        smooth, busy = smooth[60:170], busy[:, 100:260]
    return [Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)) for a in (smooth, busy)]


def _compare_vision(
    outputs: Mapping[str, Array], features: Array, expected: Array, merged: Array | None = None
) -> dict[str, Any]:
    """Compare one vision graph's outputs with the reference.

    Args:
        outputs: Name to array, as the graph returned them.
        features: The reference's unpruned features (B, N, D).
        expected: The reference's choice (B, K).
        merged: The reference's merged features (B, K, D), where the pruner merges; tokens that both kept are compared.
    """
    found = outputs["keep_indices"]
    batch, kept = found.shape
    overlap = [len(np.intersect1d(found[b], expected[b])) / kept for b in range(batch)]
    shown, wanted = outputs["image_features"], np.take_along_axis(features, found[:, :, None], axis=1)
    if merged is not None:
        shown = np.concatenate([shown[b][np.isin(found[b], expected[b])] for b in range(batch)])
        wanted = np.concatenate([merged[b][np.isin(expected[b], found[b])] for b in range(batch)])
    return {
        "features": relative_difference(shown, wanted) if shown.size else float("inf"),
        "merged": merged is not None,
        "kept_overlap": min(overlap),
        "finite": all(bool(np.isfinite(v).all()) for v in outputs.values() if v.dtype.kind == "f"),
        "converged": bool(outputs["converged"].all()),
        "ascending": bool((np.diff(found, axis=1) > 0).all()) if kept > 1 else True,
        "num_selected": [int(n) for n in outputs["num_selected"]],
    }


def _compare_rank(estimated: Array, features: torch.Tensor) -> dict[str, Any]:
    """Compare a graph's effective ranks (B,), if its gate wants any, with the exact ones of the reference's features."""
    if not estimated.any():
        return {}
    exact = exact_effective_rank(features).numpy()
    error = float(np.abs(estimated / exact - 1).max())
    if error > tolerances.RANK:
        warnings.warn(
            f"the graph's effective rank is off by {error:.2%} on a probe picture, over {tolerances.RANK:.0%}: the gate may "
            f"keep other tokens than the exact rank would; compare with --pruner agile:gate=entropy",
            LeanVLMWarning,
            stacklevel=2,
        )
    return {"effective_rank": {"estimated": estimated.tolist(), "exact": exact.tolist(), "error": error}}


def _vision_precision(graph: GraphSpec) -> str:
    """Return the precision of a vision graph; a decoder with quantised weights has an ordinary one beside it."""
    dtype = next(tensor.dtype for tensor in graph.outputs if tensor.name == "image_features")
    return COMPUTED[dtype]


def _check_vision(budget: int, measured: Mapping[str, Any], precision: str) -> None:
    """Judge what the comparison measured.

    Raises:
        VerificationError: Values that are not finite, a selection that did not converge or is no ascending set, or a
            difference over its tolerance.
    """
    where = f"vision graph of budget {budget}"
    if not measured["finite"]:
        raise VerificationError(f"{where}: values that are not finite (NaN or infinity)")
    if not measured["converged"]:
        raise VerificationError(f"{where}: the selection did not converge; give the pruner more sweeps")
    if not measured["ascending"]:
        raise VerificationError(f"{where}: kept indices are not unique and ascending")
    share, least = measured["kept_overlap"], tolerances.kept_least(precision, budget)
    if round(share * budget) < least:
        raise VerificationError(f"{where}: keeps {share:.1%} of the checkpoint's choice, less than {least / budget:.0%}")
    rounding = measured.get("rounding", 0.0)
    limit = tolerances.MERGED[precision] if measured["merged"] else tolerances.features_limit(precision, rounding)
    if not measured["features"] <= limit:
        raise VerificationError(f"{where}: features differ by {measured['features']:.2g} of their range, over {limit:.2g}")


def _compare_chain(
    session: Session,
    reference: Reference,
    image: Image.Image,
    question: str | Sequence[Message],
    features: Array | None,
    budget: int,
) -> dict[str, Any]:
    """Generate greedily with the bundle; let the checkpoint judge every token from its own features of the kept tokens.

    Args:
        session: The bundle.
        reference: The checkpoint.
        image: The image to ask about.
        question: What to ask.
        features: The checkpoint's own features of its crops (C, N, D); None where tokens were merged, which exist in the bundle
            only and have been compared before.
        budget: The budget to use.

    Returns:
        Differences of the first logits, and how many tokens are equal or wrong; `unrounded` holds the same against the
        checkpoint's own weights, where the bundle's are quantised.
    """
    encoded = session.encode_images([image], budget)[0]
    # The most probable tokens, whatever the checkpoint's generation settings would make of the logits.
    answer = session.respond(question, [encoded], GenerateOptions(NEW_TOKENS, ignore_end=True)).answer
    ids = session.prompt_ids(question, [encoded.arrangement])
    prompt = session.prompt(ids, [encoded])
    precision, dtype = session.manifest.precision, session.manifest.decoder.kv_dtype
    expected = exact = _judged(reference, session, ids, encoded, features, answer.token_ids)
    if precision in BITS:
        with reference.weights_rounded(BITS[precision], getattr(torch, dtype)):
            expected = _judged(reference, session, ids, encoded, features, answer.token_ids)
    sequence = session.decoder().sequence(len(prompt))
    sequence.load(prompt)
    first = sequence.prefill().logits()
    sequence.close()
    near = tolerances.TOKEN_MARGIN[COMPUTED[dtype]] * np.abs(expected).max()
    gaps = expected.max(axis=1) - expected[np.arange(NEW_TOKENS), list(answer.token_ids)]
    measured = _agreement(first, answer.token_ids, expected) | {"compared": NEW_TOKENS, "wrong": int((gaps > near).sum())}
    return measured | ({"unrounded": _agreement(first, answer.token_ids, exact)} if precision in BITS else {})


def _agreement(first: Array, answer: Sequence[int], expected: Array) -> dict[str, Any]:
    """Return how near the first logits (V,) and an answer are to expected logits (len(answer), V)."""
    return {
        "logits": relative_difference(first, expected[0]),
        "cosine": cosine(first, expected[0]),
        "equal": int((expected.argmax(axis=1) == np.asarray(answer)).sum()),
    }


def _judged(
    reference: Reference,
    session: Session,
    ids: Sequence[int],
    encoded: ImageFeatures,
    features: Array | None,
    answer: Sequence[int],
) -> Array:
    """Return the checkpoint's logits (len(answer), V) for every token of an answer, from its own embeddings."""
    crops = encoded.crops
    if features is not None:
        pairs = zip(crops, features, strict=True)
        crops = tuple(replace(one, embeddings=rows[one.pruning.indices]) for one, rows in pairs)
    manifest = session.manifest
    runs = compose(ids, manifest.image_token_id, [replace(encoded, crops=crops)], manifest.layout)
    prompt = assemble(runs, reference, manifest.positions, manifest.image_token_id, manifest.line_end)
    sequence = np.concatenate([prompt.embeddings(), reference.rows(answer[:-1])])
    positions = np.concatenate([prompt.positions[0], prompt.next_position + np.arange(len(answer) - 1)])
    return reference.logits(sequence, positions, len(answer))


def _check_chain(budget: int, measured: Mapping[str, Any], precision: str) -> None:
    where = f"decoder at budget {budget}"
    limit = tolerances.LOGITS[precision]
    if not measured["logits"] <= limit:
        raise VerificationError(f"{where}: logits differ by {measured['logits']:.2g} of their range, over {limit:g}")
    least = tolerances.LOGITS_COSINE[precision]
    if not measured["cosine"] >= least:
        raise VerificationError(f"{where}: logits have cosine {measured['cosine']:.4f} with the checkpoint's, under {least}")
    if measured["wrong"]:
        counts = f"{measured['wrong']} of {measured['compared']}"
        raise VerificationError(f"{where}: {counts} greedy tokens are not the checkpoint's")
