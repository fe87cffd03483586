"""The checkpoint itself, run unmodified by transformers in fp32: what an exported bundle is compared with.

A half-precision decoder is widened part by part while it runs, so the comparison needs no second copy of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.decoders import planes_of, token_rows
from leanvlm.exporter.families.base import Attention
from leanvlm.exporter.passes import rounded_products
from leanvlm.exporter.pruners.base import ScoredBlock, VisionTokens, widened
from leanvlm.exporter.rounding import weights_rounded
from leanvlm.exporter.towers.base import Seen, merged_cells
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.positions import as_input

Array = npt.NDArray[Any]
# What transformers knows the function by that tells keys and probabilities.
PROBE = "leanvlm_probe"


class Reference:
    """Runs a loaded checkpoint's own forward code.

    Attributes:
        checkpoint: Where the model came from.
        model: The transformers model; its tower and projector in fp32.
        parts: The same, taken apart by its family.
        device: Where it runs; what goes in and comes out is in the processor's memory.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.model: Any = model.to(device)
        self.device = device
        self.parts = checkpoint.family.parts(model)
        # Also what lies behind the cut of the exported tower, which runs here.
        self.parts.vision.to(torch.float32)
        self.parts.project.to(torch.float32)

    def vision(self, pixel_values: Array, scored: ScoredBlock = "feature", size: tuple[int, int] = (0, 0)) -> VisionTokens:
        """Return the unpruned tokens of crops; see `look`."""
        return self.look(pixel_values, scored, size)[0]

    @torch.no_grad()
    def look(self, pixel_values: Array, scored: ScoredBlock, size: tuple[int, int]) -> tuple[VisionTokens, Array]:
        """Run the model's own `get_image_features`.

        Args:
            pixel_values: (C, 3, H, W), the crops of one image in order; or of several, for a family that takes them whole.
            scored: Whose attention scores the tokens.
            size: (height, width) of the image before it was cut.

        Returns:
            The unpruned tokens of each crop, scored by eager attention's probabilities; and the image's features (S, D) as the
            model itself puts them together.
        """
        spec, parts, shape = self.checkpoint.spec, self.parts, self._shape(pixel_values)
        attention = parts.attention(spec.scored_block(scored))
        given = parts.inputs(torch.from_numpy(pixel_values).to(self.device), size)
        if attention.given is not None:
            return self._look_packed(given, attention, shape)
        assert attention.query is not None
        assert attention.keys is not None
        with (
            _computed_by(attention.config, "eager"),
            _returned(attention.module) as mixed,
            _returned(attention.query) as queries,
            _returned(attention.keys) as keys,
            _given(parts.entry or parts.project) as hidden,
            _returned(parts.project) as features,
        ):
            found = self.model.get_image_features(**given, return_dict=True)
        probabilities = mixed[0][1].float().mean(dim=1)  # (B, N, N)
        query, key = queries[0], keys[0]
        unsplit = None
        if spec.saliency == "class":
            saliency = probabilities[:, 0]
            unsplit = (torch.einsum("bd,bnd->bn", query[:, 0], key) / key.shape[2] ** 0.5).softmax(dim=1)
        else:
            saliency = probabilities.mean(dim=1)
        told = (None if part is None else part[:, parts.skipped :].cpu() for part in (key, saliency, unsplit))
        cell_keys, saliency, unsplit = (None if part is None else self._of_cells(part, shape) for part in told)
        assert cell_keys is not None
        seen = Seen(hidden[0].cpu(), cell_keys.reshape(*cell_keys.shape[:2], attention.heads, -1), saliency, unsplit)
        packed = torch.cat([one.reshape(-1, one.shape[-1]) for one in found.pooler_output])
        made = features[0] if parts.entry is None else found.pooler_output
        return VisionTokens(made.cpu(), seen, shape.grid, spec.leading), packed.cpu().numpy()

    def _look_packed(self, given: dict[str, Any], attention: Attention, shape: CropShape) -> tuple[VisionTokens, Array]:
        """Do what `look` does with a model that packs the patches of all crops into one sequence, in an order of its own."""
        parts, (rows, _) = self.parts, shape.grid
        assert parts.order is not None
        assert attention.given is not None
        with (
            _probed(attention) as seen,
            _given(attention.given) as hidden,
        ):
            found = self.model.get_image_features(**given, return_dict=True)
        order, packed = parts.order(shape), torch.cat(list(found.pooler_output)).cpu()
        states = hidden[0].cpu().reshape(-1, len(order), hidden[0].shape[-1])[:, order]
        keys = torch.cat([key.transpose(1, 2).reshape(-1, len(order), *key.shape[1::2]) for key, _ in seen]).cpu()[:, order]
        saliency = torch.cat([_own(attended, len(order)).float().mean(dim=(1, 2)) for _, attended in seen]).cpu()[:, order]
        planes = [plane.cpu() for plane in parts.planes(found)]
        told = Seen(
            merged_cells(states, rows * parts.cell, parts.cell),
            self._of_cells(keys.flatten(2), shape).reshape(-1, shape.tokens, *keys.shape[2:]),
            self._of_cells(saliency, shape),
            None,
            torch.cat(planes, dim=1).reshape(len(states), shape.tokens, -1) if planes else None,
        )
        tokens = VisionTokens(packed.reshape(len(states), shape.tokens, -1), told, shape.grid)
        return tokens, tokens.wide[0].numpy()

    def _shape(self, pixel_values: Array) -> CropShape:
        """Return the shape of crops."""
        shapes = self.checkpoint.frame.crops.shapes
        return next(shape for shape in shapes if shape.pixels == tuple(pixel_values.shape[2:]))

    def _of_cells(self, part: Tensor, shape: CropShape) -> Tensor:
        """Sum what patches have, (B, N) or (B, N, E), over those that become one token."""
        cell, (rows, columns) = self.parts.cell, shape.grid
        if cell == 1:
            return part
        order = torch.arange(part.shape[1]).view(rows, cell, columns, cell).transpose(1, 2).reshape(rows * columns, -1)
        return part[:, order].sum(dim=2)

    @torch.no_grad()
    def project(self, hidden: Tensor) -> Tensor:
        """Return the features (B, N, D) of hidden states (B, N, Dv) of the tower."""
        features: Tensor = self.parts.project(hidden.to(self.device))
        return features.cpu()

    @torch.no_grad()
    def rounding(self, pixel_values: Array, features: Array) -> float:
        """Return how far fp32 takes features (B, N, W) of pixel values (B, 3, H, W) from double precision, relative.

        Another graph of the same model is as far off in its own way: see `tolerances.ROUNDING`.
        """
        tower, project = self.parts.tower("feature", None, self._shape(pixel_values)), self.parts.project
        with computed_in(tower, torch.float64), computed_in(project, torch.float64):
            seen = tower(torch.from_numpy(pixel_values).to(self.device, torch.float64))
            exact: Array = widened(project(seen.hidden), seen.deep).cpu().numpy()
        return relative_difference(features, exact)

    @torch.no_grad()
    def rows(self, ids: Sequence[int]) -> Array:
        """Return rows (len(ids), W) of the token table in fp32: those of tokens, and behind them the extra ones."""
        wanted = torch.tensor(list(ids), dtype=torch.long)
        beyond = wanted - self.checkpoint.config.text_config.vocab_size
        rows = token_rows(self.parts.decoder, wanted.where(beyond < 0, 0).to(self.device)).float().cpu()
        for at, row in enumerate(self.parts.extra_rows.values()):
            rows[beyond == at] = row.float().cpu()
        planes = planes_of(self.parts.decoder)
        found: Array = functional.pad(rows, (0, planes * rows.shape[1])).numpy()
        return found

    @torch.no_grad()
    def logits(self, embeddings: Array, positions: Array, last: int, last_seen: Array | None = None) -> Array:
        """Return the logits (last, V) of the last of a sequence of embeddings (S, D).

        Args:
            embeddings: The sequence.
            positions: (axes, S), those of its elements.
            last: How many logits.
            last_seen: (S,), the last element that each sees; None: itself.
        """
        decoder: Any = self.parts.decoder
        with computed_in(decoder, torch.float32):
            out = decoder(
                inputs_embeds=torch.from_numpy(embeddings)[None].to(self.device),
                position_ids=torch.from_numpy(as_input(positions)).to(self.device),
                attention_mask=_mask(positions.shape[1], last_seen).to(self.device),
                use_cache=False,
                logits_to_keep=last,
            )
        result: Array = out.logits[0].float().cpu().numpy()
        return result

    @contextlib.contextmanager
    def weights_rounded(self, bits: int, dtype: torch.dtype) -> Iterator[None]:
        """Let `logits` compute with weights quantised to `bits`, as a graph that computes in `dtype` has them."""
        # Entered before the weights are widened, so that what comes back is what the checkpoint holds.
        with weights_rounded(self.parts.decoder, bits, dtype):
            yield

    @contextlib.contextmanager
    def vision_rounded(self) -> Iterator[None]:
        """Let `look` and `project` compute with weights of 8 bits, as the vision graphs of an int8 export have them."""
        with (
            weights_rounded(self.parts.vision, rounded_products.BITS, torch.float32, rounded_products.BLOCK),
            weights_rounded(self.parts.project, rounded_products.BITS, torch.float32, rounded_products.BLOCK),
        ):
            yield


def _mask(count: int, last_seen: Array | None) -> Tensor:
    """Return what transformers is told of who sees whom: (1, S) ones, or what is added to the scores (1, 1, S, S)."""
    if last_seen is None or (last_seen == np.arange(count)).all():
        # Without a mask transformers reads gaps in the positions as the borders of packed sequences.
        return torch.ones(1, count, dtype=torch.long)
    hidden = torch.arange(count) > torch.from_numpy(last_seen)[:, None]
    return torch.zeros(count, count).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


@contextlib.contextmanager
def computed_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Bring a module's parameters to a wider dtype, those of each part only while it runs.

    A module with parameters of its own may read those of modules inside it without calling them, so all of them are widened.
    """
    handles = []
    for leaf in module.modules():
        own = any(True for _ in leaf.parameters(recurse=False))
        narrow = {k: p.data for k, p in leaf.named_parameters() if p.dtype != dtype} if own else {}
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
        for parameter in leaf.parameters():
            parameter.data = parameter.data.to(dtype)

    return hook


def _restore(narrow: dict[str, Tensor]) -> Any:
    def hook(leaf: nn.Module, args: Any, output: Any) -> None:
        for name, data in narrow.items():
            leaf.get_parameter(name).data = data

    return hook


@contextlib.contextmanager
def _returned(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module returns, in the order of its calls."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _given(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of a module, in the order of its calls."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _probed(attention: Attention) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect keys (B, H, N, d) and probabilities (B, H, N, N) of an attention, as it computes with them, call by call."""
    seen: list[tuple[Tensor, Tensor]] = []

    def compute(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if module is not attention.module:
            mixed = functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
            return mixed.transpose(1, 2), None
        scores = query @ key.transpose(2, 3) * scaling
        probabilities = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
        seen.append((key, probabilities))
        return (probabilities @ value).transpose(1, 2), None

    AttentionInterface.register(PROBE, compute)
    with _computed_by(attention.config, PROBE):
        yield seen


def _own(probabilities: Tensor, count: int) -> Tensor:
    """Return of probabilities (1, H, C * N, C * N), of crops that do not see each other, those of each (C, H, N, N)."""
    crops = probabilities.shape[2] // count
    return probabilities.reshape(-1, crops, count, crops, count).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)


@contextlib.contextmanager
def _computed_by(config: Any, name: str) -> Iterator[None]:
    """Let attention of a configuration be computed by one of transformers' functions, such as eager with its probabilities."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def relative_difference(found: Array, expected: Array) -> float:
    """Return max |found - expected| over max |expected|."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def cosine(a: Array, b: Array) -> float:
    """Return the cosine between two vectors."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
