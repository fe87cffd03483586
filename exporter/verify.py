"""Does the bundle do what the checkpoint does? Measured at every export, with the runtime that will run it.

Per budget: the image features and the kept tokens of two probe images in one batch, against the unmodified checkpoint. For the
decoder: first-position logits. For the whole chain: greedy tokens, by one pass of the checkpoint over the same sequence,
which is the same event as decoding greedily step by step. A decoder with quantised weights is judged by the checkpoint with
its weights quantised alike, and what quantisation costs against the checkpoint as it is, is measured beside it. So are vision
graphs in int8. The figures go into the manifest; a failure leaves no bundle.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from leanvlm.exporter import tolerances
from leanvlm.exporter.graphs import VisionPlan
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock, VisionTokens, choose, gather_tokens
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.exporter.reference import Reference, cosine, relative_difference
from leanvlm.exporter.rounding import BITS
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.crops import PIXELS, VALID, CropRule, crop
from leanvlm.runtime.cuts import Uncut
from leanvlm.runtime.encoder import in_parts
from leanvlm.runtime.errors import LeanVLMWarning, VerificationError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, image_runs
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.prompt import assemble, compose
from leanvlm.runtime.session import Session, user_message
from leanvlm.runtime.specs import GraphSpec, VisionSpec
from leanvlm.runtime.text import Message

Array = npt.NDArray[Any]
# A graph's dtype to the precision that it computes in. Dequantised weights are exact numbers of it.
COMPUTED = {"float16": "fp16", "float32": "fp32"}
PROMPT = "Describe the image."
NEW_TOKENS = 8


def verify(
    session: Session,
    reference: Reference,
    planned: Sequence[VisionPlan],
    on_step: Callable[[str], None] = lambda step: None,
    raw: bool = False,
) -> dict[str, Any]:
    """Compare a finished bundle with its checkpoint.

    Args:
        session: The bundle, open.
        reference: The checkpoint.
        planned: The vision graphs, as exported.
        on_step: Told what is being compared, for a progress display.
        raw: Ask without the chat template, which the bundle may not have.

    Returns:
        The measured differences, for the manifest.

    Raises:
        VerificationError: A difference is over its tolerance, a value is not finite, or a selection did not converge.
    """
    with reference.vision_rounded() if session.manifest.vision_precision == "int8" else contextlib.nullcontext():
        return _verify(session, reference, planned, on_step, raw)


def _verify(
    session: Session, reference: Reference, planned: Sequence[VisionPlan], on_step: Callable[[str], None], raw: bool
) -> dict[str, Any]:
    """Do what `verify` does, with the reference's weights as they are now."""
    manifest = session.manifest
    results: dict[str, Any] = {"device": session.backend.device, "vision": {}, "tokens": {}}
    views = {}
    for shape in range(len(manifest.crops.shapes)):
        views[shape] = view = look(session, reference, shape, {graph.pruner.scored_block for graph in planned})
        _check_layout(session, reference, view.images[0], view.whole, view.packed)
        _check_resizing(session, shape, view)
    # Each graph once, whatever it serves.
    for graph in {graph.file: graph for graph in planned}.values():
        on_step(f"verify {Path(graph.file).stem.replace('_', ' ')}")
        results["vision"][called(graph, manifest)] = _verify_vision(session, reference, graph, views[graph.shape])
    on_step("verify decoder")
    question = f"{session.image_token}\n{PROMPT}" if raw else [user_message(PROMPT, 1)]
    # With the smallest shape, whose rows and columns differ where those of any do.
    shape = max(views, key=lambda at: (len(set(manifest.crops.shapes[at].grid)), at))
    for graph in (graph for graph in planned if graph.shape == shape):
        merges = results["vision"][called(graph, manifest)]["merged"]
        view = views[shape]
        measured = _compare_chain(session, reference, view.images[0], question, None if merges else view.whole, graph.budget)
        results["tokens"][str(graph.budget)] = measured
        _check_chain(graph.budget, measured, COMPUTED[manifest.decoder.kv_dtype])
    return {**results, "images": len(views[0].images), "crops": len(views[0].inputs[PIXELS])}


def called(graph: VisionPlan, manifest: Manifest) -> str:
    """Return what the results call a graph: its budget, where crops differ in shape the tokens it keeps of which."""
    if len(manifest.crops.shapes) == 1:
        return str(graph.budget)
    return f"{graph.kept} of {manifest.crops.shapes[graph.shape].text}"


@dataclass(frozen=True)
class View:
    """What the checkpoint itself makes of two images whose crops have one shape.

    Attributes:
        images: The images.
        inputs: What the vision graphs take of them.
        normal: Pixel values (C, 3, H, W) of each, as the checkpoint's processor normalises them.
        tokens: Whose attention scores them, to the unpruned tokens of all crops.
        packed: The features (S, D) of the first image, put together.
    """

    images: list[Image.Image]
    inputs: Mapping[str, Array]
    normal: list[Array]
    tokens: Mapping[ScoredBlock, VisionTokens]
    packed: Array

    @property
    def whole(self) -> Array:
        """The features (C, N, W) of the first image's crops."""
        features: Array = next(iter(self.tokens.values())).wide.numpy()
        return features[: len(self.normal[0])]


def look(session: Session, reference: Reference, shape: int, blocks: Collection[ScoredBlock]) -> View:
    """Show the checkpoint two images that become crops of a shape."""
    manifest = session.manifest
    images = probe_images(manifest.crops, shape)
    given = [_inputs(image, manifest, manifest.image) for image in images]
    inputs = {name: np.concatenate([one[name] for one in given]) for name in given[0]}
    # The checkpoint normalises in its own processor's steps, whatever the bundle folds.
    normal = [_inputs(image, manifest, replace(manifest.image, layout="float32"))[PIXELS] for image in images]
    tokens: dict[ScoredBlock, VisionTokens] = {}
    for where in blocks:
        looked = [reference.look(crops, where, image.size[::-1]) for crops, image in zip(normal, images, strict=True)]
        tokens[where], packed = joined([found for found, _ in looked], inputs.get(VALID)), looked[0][1]
    return View(images, inputs, normal, tokens, packed)


def _verify_vision(session: Session, reference: Reference, planned: VisionPlan, view: View) -> dict[str, Any]:
    """Compare one vision graph with what the checkpoint and the graph's pruner make of two images; raises VerificationError."""
    graph = session.manifest.vision_graph(planned.budget, planned.shape)
    inputs, unpruned = view.inputs, view.tokens[planned.pruner.scored_block]
    outputs = run_graph(session, graph, inputs)
    _check_placement(graph.file, session.backend.misplaced(graph, in_parts(inputs, len(view.images))[0]))
    precision = _vision_precision(graph)
    measured = judge_vision(outputs, reference, planned.pruner, unpruned)
    if not measured["merged"] and precision == "fp32" and measured["features"] > tolerances.FEATURES[precision]:
        # A pass in double precision, only where it decides.
        measured["rounding"] = reference.rounding(np.concatenate(view.normal), unpruned.wide.numpy())
    _check_vision(graph, measured, precision)
    return measured | _compare_rank(outputs["effective_rank"], unpruned.shown.patches.features)


@torch.no_grad()
def judge_vision(outputs: Mapping[str, Array], reference: Reference, pruner: Pruner, unpruned: VisionTokens) -> dict[str, Any]:
    """Compare one vision graph's outputs with what its pruner makes of the checkpoint's own tokens."""
    expected = choose(pruner, unpruned)
    merged = None if expected.hidden is None else reference.project(expected.hidden).numpy()
    if merged is not None and unpruned.seen.deep is not None:
        planes = gather_tokens(unpruned.seen.deep, expected.indices).numpy()
        merged = np.concatenate([merged, planes], axis=2)
    return _compare_vision(outputs, unpruned.wide.numpy(), expected.indices.numpy(), merged)


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


def run_graph(session: Session, spec: VisionSpec, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a vision graph on crops, as many at once as the backend takes."""
    graph = session.encoder.graph(spec.budget, spec.shape)
    parts = [fetched(graph.run(part)) for part in in_parts(inputs, session.backend.crops_at_once)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_resizing(session: Session, shape: int, view: View) -> None:
    """Compare the levels of images that the device resizes with the processor's; raises VerificationError."""
    manifest, resizer = session.manifest, session.backend.resizer
    if resizer is None:
        return
    graph: Any = session.encoder.graph(manifest.default_budget, shape)
    inputs = crop(view.images, manifest.image, manifest.crops, 1, resizer).inputs[shape]
    if not isinstance(inputs[PIXELS], Uncut):
        return
    found = []
    with session.backend.lock, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", LeanVLMWarning)
        for part in in_parts(inputs, session.backend.crops_at_once):
            buffer = graph.pixels(len(part[PIXELS]))
            resizer.fill(buffer, part[PIXELS])
            found.append(buffer.numpy())
    if told:
        raise VerificationError(f"pictures cannot be resized on {session.backend.device}: {told[0].message}")
    wrong = int((np.concatenate(found) != view.inputs[PIXELS]).sum())
    if wrong:
        raise VerificationError(f"{wrong} levels of a picture resized on {session.backend.device} are not the processor's")


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
    shape = manifest.crops.shapes[arrangement.shape]
    every, nothing = np.arange(shape.tokens), np.zeros(shape.tokens, np.float32)
    pruning = Pruning(shape.tokens, None, shape.tokens, True, every, nothing, shape)
    features = ImageFeatures(tuple(CropFeatures(rows, pruning) for rows in whole), arrangement)
    # Breaks are text, which the model's own features are without.
    runs = image_runs(features, replace(manifest.layout, line_break=""))
    prompt = assemble(runs, reference, manifest.positions, manifest.image_token_id, session.line_end)
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


def _check_placement(file: str, misplaced: Sequence[str]) -> None:
    """Refuse a graph that the device runs only in part.

    Raises:
        VerificationError: Nodes that fell to another provider, by name.
    """
    if misplaced:
        shown = ", ".join(misplaced[:5]) + (f" and {len(misplaced) - 5} more" if len(misplaced) > 5 else "")
        raise VerificationError(f"{file}: {len(misplaced)} nodes do not run on the device: {shown}")


def probe_images(rule: CropRule | None = None, shape: int = 0) -> list[Image.Image]:
    """Return two fixed images, of different size and content: smooth gradients, and patches of noise and lines.

    Args:
        rule: How they will be cut. For tiles the first is wide and the second tall, so that they are few.
        shape: Which of the nearest shapes they shall have.
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
    images = [Image.fromarray(np.clip(a, 0, 255).astype(np.uint8)) for a in (smooth, busy)]
    if rule is not None and rule.kind == "nearest":
        height, width = rule.shapes[shape].pixels
        return [image.resize((width, height)) for image in images]
    return images


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


def _check_vision(graph: VisionSpec, measured: Mapping[str, Any], precision: str) -> None:
    """Judge what the comparison measured.

    Raises:
        VerificationError: Values that are not finite, a selection that did not converge or is no ascending set, or a
            difference over its tolerance.
    """
    where, kept = f"vision graph of budget {graph.budget}", graph.kept
    if not measured["finite"]:
        raise VerificationError(f"{where}: values that are not finite (NaN or infinity)")
    if not measured["converged"]:
        raise VerificationError(f"{where}: the selection did not converge; give the pruner more sweeps")
    if not measured["ascending"]:
        raise VerificationError(f"{where}: kept indices are not unique and ascending")
    share, least = measured["kept_overlap"], tolerances.kept_least(precision, kept)
    if round(share * kept) < least:
        raise VerificationError(f"{where}: keeps {share:.1%} of the checkpoint's choice, less than {least / kept:.0%}")
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
    prompt = assemble(runs, reference, manifest.positions, manifest.image_token_id, session.line_end)
    sequence = np.concatenate([prompt.embeddings(), reference.rows(answer[:-1])])
    more = manifest.positions.text(prompt.next_position, len(answer) - 1)
    positions = np.concatenate([prompt.positions, more], axis=1)
    seen = np.concatenate([prompt.last_seen, np.arange(len(prompt), len(sequence))])
    return reference.logits(sequence, positions, len(answer), seen)


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
