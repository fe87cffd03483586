"""`leanvlm inspect`: what a bundle holds, and what its pruning does to an image, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leanvlm.runtime.answer import ImageTokens, Pruning
from leanvlm.runtime.commands.overlay import save_overlay
from leanvlm.runtime.engines.library import LIBRARIES
from leanvlm.runtime.layout import image_tokens
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.session import load


def describe(folder: Path, manifest: Manifest) -> str:
    """Return a bundle's contents as aligned lines."""
    source, decoder = manifest.source, manifest.decoder
    params = ", ".join(f"{key}={value}" for key, value in manifest.pruner.params.items() if value is not None)
    rows = {
        "bundle": f"{folder} (schema {manifest.schema}, {sum(f.bytes for f in manifest.files.values()) / 1e6:.1f} MB)",
        "source": f"{source.id}{f' at {source.revision}' if source.revision else ''}, sha256 {source.sha256[:16]}…",
        "licence": source.licence or "not stated by the checkpoint",
        "family": manifest.family,
        "target": f"{manifest.target}, {manifest.precision}{_vision_precision(manifest)}, ONNX Runtime "
        f"{manifest.min_onnxruntime} or newer",
        "budgets": _budgets(manifest),
        "pruner": f"{manifest.pruner.name}{f' ({params})' if params else ''}, positions {manifest.positions.kept}"
        + ("" if manifest.saliency == "class" else ", tokens ranked by the attention that they receive"),
        **_gate_file(manifest),
        **_cut(manifest),
        "decoder": f"{decoder.layers} layers, {decoder.kv_heads} KV heads of {decoder.head_dim}, "
        + (f"{len(decoder.states)} states of other layers, " if decoder.states else "")
        + f"context {decoder.context_length}",
        **_engines(manifest),
        "verified": _verified(manifest),
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items())


def _vision_precision(manifest: Manifest) -> str:
    """Say what tower and projector compute in, where it was chosen."""
    chosen = manifest.vision_precision
    return "" if chosen in (None, manifest.precision) else f" (vision {chosen})"


def _budgets(manifest: Manifest) -> str:
    """Say what each budget keeps, where crops differ in shape of which."""
    shapes = manifest.crops.shapes
    if len(shapes) == 1:
        return f"{', '.join(map(str, manifest.budgets))} of {manifest.tokens_per_crop} image tokens a crop"
    kept = {budget: [graph.kept for graph in manifest.vision if graph.budget == budget] for budget in manifest.budgets}
    said = [f"{budget} ({', '.join(map(str, counts))})" for budget, counts in kept.items()]
    return f"{', '.join(said)} of {', '.join(str(shape.tokens) for shape in shapes)} image tokens"


def _gate_file(manifest: Manifest) -> dict[str, str]:
    gate = manifest.pruner.gate
    return {} if gate is None else {"gate": f"{gate.get('file')}, from {gate.get('images')} {gate.get('source')}"}


def _cut(manifest: Manifest) -> dict[str, str]:
    """Say what an image is cut into, where it is cut."""
    rule = manifest.crops
    if rule.kind == "nearest":
        return {"images": f"brought to the nearest of {', '.join(shape.text for shape in rule.shapes)} pixels (height x width)"}
    height, width = rule.shapes[0].pixels
    alone = "; several images are one crop each" if rule.several == "square" else ""
    return {} if rule.kind == "whole" else {"crops": f"up to {rule.most} of {height} x {width} pixels an image{alone}"}


def _engines(manifest: Manifest) -> dict[str, str]:
    """Say for which GPUs there are engines, by which library and version."""
    held: dict[str, list[str]] = {}
    for engine in manifest.engines:
        sms = held.setdefault(f"{LIBRARIES[engine.engine].title} {engine.version}, sm", [])
        sms += [str(engine.sm)] if str(engine.sm) not in sms else []
    if not held:
        return {"engines": "none yet: leanvlm build"} if manifest.target in LIBRARIES else {}
    return {"engines": "; ".join(f"{title} {', '.join(sms)}" for title, sms in held.items())}


def inspect_image(
    folder: Path,
    image: Path,
    budget: int | None,
    overlay: Path | None,
    device: str | None = None,
    provider: str | None = None,
) -> str:
    """Encode an image and return what pruning did to it; write the picture if asked for."""
    picture = load_image(image)
    with load(folder, device=device, provider=provider) as session:
        chosen = session.manifest.budget(budget)
        features = session.encode_images([image], chosen)[0]
        pruning = [crop.pruning for crop in features.crops]
        if overlay is not None:
            save_overlay(overlay, picture, pruning, session.manifest)
        return _explain(session.manifest, pruning, image_tokens(features, session.manifest.layout), overlay)


def _explain(manifest: Manifest, crops: Sequence[Pruning], image: ImageTokens, overlay: Path | None) -> str:
    """Say in words what pruning did to an image; of several crops the values from the least to the most."""
    pruned = crops[0].kept < crops[0].total
    ranks = [crop.effective_rank for crop in crops if crop.effective_rank is not None]
    rows = {
        **({} if image.crops == 1 else {"crops": _crops(image)}),
        **({"brought to": f"{crops[0].shape.text} pixels (height x width)"} if manifest.crops.kind == "nearest" else {}),
        "kept": f"{image.kept} of {image.total} image tokens",
        **({"on merit": _merit(crops, image)} if pruned else {}),
        **({"effective rank": _span(ranks, ".2f")} if ranks else {}),
        "attention entropy": f"{_span([crop.attention_entropy for crop in crops], '.3f')} nats",
    }
    ratios = [ratio for crop in crops if (ratio := gate_ratio(manifest, crop)) is not None]
    if ratios and pruned:
        rows["gate"] = f"{manifest.pruner.params['gate']}, ratio {_span(ratios, '.3f')}"
    if overlay is not None:
        rows["picture"] = str(overlay)
    return "\n".join(f"{name:<17} {text}" for name, text in rows.items())


def _merit(crops: Sequence[Pruning], image: ImageTokens) -> str:
    kept, selected = sum(crop.kept for crop in crops), sum(crop.num_selected for crop in crops)
    padding = f"; {kept - image.kept} were padding" if kept > image.kept else ""
    problem = "" if all(crop.converged for crop in crops) else " (the selection did not converge)"
    return f"{selected}; {kept - selected} filled up by attention{padding}{problem}"


def _crops(image: ImageTokens) -> str:
    rows, columns = image.tiles
    whole = " and the whole image" if image.crops > rows * columns else ""
    return f"{image.crops}: {rows} x {columns} tiles (rows x columns){whole}"


def _span(values: Sequence[float], form: str) -> str:
    """Return the least and the most of some values, or the one that they are."""
    least, most = (format(end(values), form) for end in (min, max))
    return least if least == most else f"{least} to {most}"


def gate_ratio(manifest: Manifest, pruning: Pruning) -> float | None:
    """Return the image's complexity over the gate's reference, or None for a pruner without a gate."""
    gate = str(manifest.pruner.params.get("gate"))
    measured = {"erank": pruning.effective_rank, "entropy": pruning.attention_entropy}.get(gate)
    reference = manifest.pruner.params.get(f"{gate}_ref")
    if measured is None or not isinstance(reference, int | float) or reference <= 0:
        return None
    return measured / reference


def _verified(manifest: Manifest) -> str:
    tokens = manifest.verification.get("tokens", {})
    if not tokens:
        return "no"
    try:
        worst = max(float(v["features"]) for v in manifest.verification["vision"].values())
        equal = ", ".join(f"{t['equal']} of {t['compared']} at {budget}" for budget, t in tokens.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        return "the record cannot be read"
    where = manifest.verification.get("device")
    alike = " with its weights quantised alike" if any("unrounded" in t for t in tokens.values()) else ""
    prefix = f"on {where}: " if where else ""
    return f"{prefix}features within {worst:.1e}; greedy tokens equal to the checkpoint's{alike}: {equal}"
