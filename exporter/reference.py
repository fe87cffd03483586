"""The checkpoint itself, run unmodified by transformers in fp32: what an exported bundle is compared with.

A half-precision decoder is widened one leaf module at a time while it runs, so the comparison needs no second copy of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.pruners.base import ScoredBlock, VisionTokens
from leanvlm.exporter.rounding import weights_rounded

Array = npt.NDArray[Any]


class Reference:
    """Runs a loaded checkpoint's own forward code.

    Attributes:
        checkpoint: Where the model came from.
        model: The transformers model; its tower and projector in fp32.
        device: Where it runs; what goes in and comes out is in the processor's memory.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.model: Any = model.to(device)
        self.device = device

    @torch.no_grad()
    def vision(self, pixel_values: Array, scored: ScoredBlock = "feature") -> VisionTokens:
        """Return the unpruned tokens of pixel values (B, 3, H, W), with eager attention for the class token's row."""
        spec, core = self.checkpoint.spec, self.model.model
        block = spec.scored_block(scored)
        attn = next(m for n, m in core.vision_tower.named_modules() if n.endswith(f"encoder.layers.{block}.self_attn"))
        # The blocks behind the cut are still in the checkpoint's dtype.
        with (
            _eager_attention(core.vision_tower),
            computed_in(core.vision_tower, torch.float32),
            _output(attn.q_proj) as query,
            _output(attn.k_proj) as keys,
        ):
            pixels = torch.from_numpy(pixel_values).to(self.device)
            out = core.vision_tower(pixels, output_hidden_states=True, output_attentions=True, return_dict=True)
        hidden = out.hidden_states[spec.feature_layer][:, 1:]
        attention = out.attentions[block].float().mean(dim=1)[:, 0, 1:]
        whole = torch.einsum("bd,bnd->bn", query[0][:, 0], keys[0]) / keys[0].shape[2] ** 0.5
        split = keys[0][:, 1:].reshape(*hidden.shape[:2], attn.num_heads, -1)
        unsplit = whole.softmax(dim=1)[:, 1:]
        return VisionTokens(self.project(hidden), hidden.cpu(), split.cpu(), attention.cpu(), unsplit.cpu(), spec.grid)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Return the features (B, N, D) of hidden states (B, N, Dv) of the tower."""
        features: Tensor = self.model.model.multi_modal_projector(hidden.to(self.device))
        return features.cpu()

    @torch.no_grad()
    def rounding(self, pixel_values: Array, features: Array) -> float:
        """Return how far fp32 takes features (B, N, D) of pixel values (B, 3, H, W) from double precision, relative.

        Another graph of the same model is as far off in its own way: see `tolerances.ROUNDING`.
        """
        family = self.checkpoint.family
        tower, projector = family.tower(self.model), family.projector(self.model)
        with computed_in(tower, torch.float64), computed_in(projector, torch.float64):
            hidden = tower(torch.from_numpy(pixel_values).to(self.device, torch.float64))[0]
            exact: Array = projector(hidden).cpu().numpy()
        return relative_difference(features, exact)

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Array:
        """Return the token table's rows (len(ids), D) in fp32."""
        table = self.checkpoint.family.embed_tokens(self.model)
        rows: Array = table[torch.tensor(list(ids), dtype=torch.long, device=self.device)].float().cpu().numpy()
        return rows

    @torch.no_grad()
    def logits(self, embeddings: Array, positions: Array, last: int) -> Array:
        """Return the logits (last, V) of the last of a sequence of embeddings (S, D) at positions (S,)."""
        decoder: Any = self.checkpoint.family.decoder(self.model)
        with computed_in(decoder, torch.float32):
            out = decoder(
                inputs_embeds=torch.from_numpy(embeddings)[None].to(self.device),
                position_ids=torch.from_numpy(positions)[None].to(self.device),
                # Without a mask transformers reads gaps in the positions as the borders of packed sequences.
                attention_mask=torch.ones(1, len(positions), dtype=torch.long, device=self.device),
                use_cache=False,
                logits_to_keep=last,
            )
        result: Array = out.logits[0].float().cpu().numpy()
        return result

    @contextlib.contextmanager
    def weights_rounded(self, bits: int, dtype: torch.dtype) -> Iterator[None]:
        """Let `logits` compute with weights rounded to `bits`, as a graph that computes in `dtype` has them."""
        # Entered before the weights are widened, so that what comes back is what the checkpoint holds.
        with weights_rounded(self.checkpoint.family.decoder(self.model), bits, dtype):
            yield


@contextlib.contextmanager
def computed_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Bring each leaf module's parameters to a wider dtype only while it runs."""
    handles = []
    for leaf in module.modules():
        narrow = {k: p.data for k, p in leaf.named_parameters(recurse=False) if p.dtype != dtype}
        if narrow:
            handles.append(leaf.register_forward_pre_hook(_widen(dtype)))
            handles.append(leaf.register_forward_hook(_restore(narrow)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(dtype: torch.dtype) -> Any:
    def hook(leaf: nn.Module, args: Any) -> None:
        for parameter in leaf.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    return hook


def _restore(narrow: dict[str, Tensor]) -> Any:
    def hook(leaf: nn.Module, args: Any, output: Any) -> None:
        for name, data in narrow.items():
            leaf.get_parameter(name).data = data

    return hook


@contextlib.contextmanager
def _output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns, in the order of its calls."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _eager_attention(tower: Any) -> Iterator[None]:
    """Let a tower return attention probabilities, which fused kernels do not."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


def relative_difference(found: Array, expected: Array) -> float:
    """Return max |found - expected| over max |expected|."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def cosine(a: Array, b: Array) -> float:
    """Return the cosine between two vectors."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
