"""`leanvlm inspect`: what a bundle holds, and what its pruning does to an image, in words."""

from __future__ import annotations

from pathlib import Path

from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.commands.overlay import save_overlay
from leanvlm.runtime.engines.library import LIBRARIES
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
        "target": f"{manifest.target}, {manifest.precision}, ONNX Runtime {manifest.min_onnxruntime} or newer",
        "budgets": f"{', '.join(map(str, manifest.budgets))} of {manifest.tokens_per_crop} image tokens a crop",
        "pruner": f"{manifest.pruner.name}{f' ({params})' if params else ''}, positions {manifest.positions.kept}"
        + ("" if manifest.saliency == "class" else ", tokens ranked by the attention that they receive"),
        **_gate_file(manifest),
        "decoder": f"{decoder.layers} layers, {decoder.kv_heads} KV heads of {decoder.head_dim}, "
        f"context {decoder.context_length}",
        **_engines(manifest),
        "verified": _verified(manifest),
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items())


def _gate_file(manifest: Manifest) -> dict[str, str]:
    gate = manifest.pruner.gate
    return {} if gate is None else {"gate": f"{gate.get('file')}, from {gate.get('images')} {gate.get('source')}"}


def _engines(manifest: Manifest) -> dict[str, str]:
    """Say for which GPUs there are engines, by which library and version."""
    held: dict[str, list[str]] = {}
    for engine in manifest.engines:
        sms = held.setdefault(f"{LIBRARIES[engine.engine].title} {engine.version}, sm", [])
        sms += [str(engine.sm)] if str(engine.sm) not in sms else []
    if not held:
        return {"engines": "none yet: leanvlm build"} if manifest.target in LIBRARIES else {}
    return {"engines": "; ".join(f"{title} {', '.join(sms)}" for title, sms in held.items())}


def inspect_image(folder: Path, image: Path, budget: int | None, overlay: Path | None, device: str | None = None) -> str:
    """Encode an image and return what pruning did to it; write the picture if asked for."""
    picture = load_image(image)
    with load(folder, device=device) as session:
        chosen = session.manifest.budget(budget)
        pruning = session.encode_images([image], chosen)[0].crops[0].pruning
        if overlay is not None:
            save_overlay(overlay, picture, pruning, session.manifest.image)
        return _explain(session.manifest, pruning, overlay)


def _explain(manifest: Manifest, pruning: Pruning, overlay: Path | None) -> str:
    rows = {
        "kept": f"{pruning.kept} of {pruning.total} image tokens",
        "on merit": f"{pruning.num_selected}; {pruning.kept - pruning.num_selected} filled up by attention"
        + ("" if pruning.converged else " (the selection did not converge)"),
        **({} if pruning.effective_rank is None else {"effective rank": f"{pruning.effective_rank:.2f}"}),
        "attention entropy": f"{pruning.attention_entropy:.3f} nats",
    }
    ratio = gate_ratio(manifest, pruning)
    if ratio is not None and pruning.kept < pruning.total:
        rows["gate"] = f"{manifest.pruner.params['gate']}, ratio {ratio:.3f}"
    if overlay is not None:
        rows["picture"] = str(overlay)
    return "\n".join(f"{name:<17} {text}" for name, text in rows.items())


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
