"""The least time that a graph can take on a device: the roofline model of Williams, Waterman and Patterson (CACM 52(4), 2009).

What a graph must read crosses the memory bus once, what it must compute passes through the arithmetic units once, and both
go on at the same time: the floor is the larger of the two times. Both rates are measured on the same device, with a copy and
with a product of large fp16 matrices, so a floor asks for nothing that the device was not seen to do.

Only products with weights and attention's own products count, a multiplication with its addition as two operations. Biases,
norms, softmax, the patch embedding and the prune stage are left out, as are the activations' and the key-value cache's bytes:
each is small, and leaving it out lowers the floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

FP16_BYTES = 2


@dataclass(frozen=True)
class Shapes:
    """The sizes of a LLaVA-type model, with as many key-value heads as query heads.

    Attributes:
        layers: Of the decoder.
        hidden: Width of the decoder.
        intermediate: Width inside the decoder's gated MLP.
        vocab: Rows of the decoder's head.
        vision_blocks: Blocks of the tower that are computed.
        vision_width: Width of the tower.
        vision_intermediate: Width inside the tower's MLP.
        vision_tokens: Tokens in the tower, the class token included.
        image_tokens: N, tokens that the projector takes.
        prompt_tokens: S, tokens of the prompt after pruning, those of its text included.
    """

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    vision_blocks: int
    vision_width: int
    vision_intermediate: int
    vision_tokens: int
    image_tokens: int
    prompt_tokens: int

    @classmethod
    def from_dict(cls, data: Mapping[str, int]) -> Shapes:
        """Take the fields from a mapping that may hold more."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


class Work(NamedTuple):
    """What one run of a graph cannot do without.

    Attributes:
        moved: Bytes of weights that it reads.
        flops: Floating-point operations.
    """

    moved: int
    flops: int


def layer_weights(shapes: Shapes) -> int:
    """Return the weights of all decoder layers: L (4 D² + 3 D I), for the four projections of attention and a gated MLP."""
    return shapes.layers * (4 * shapes.hidden**2 + 3 * shapes.hidden * shapes.intermediate)


def decoder_flops(shapes: Shapes, tokens: int) -> int:
    """Return the operations of a prefill of S tokens that gives the logits of the last one.

    2 S weights, as each weight takes part in one multiplication and one addition a token; 2 D vocab for the one row of the
    head; and 2 L D S (S + 1) for causal attention, in which token i forms i scores and i summands of width D, 4 i D operations.
    The counts are those of Kaplan et al. (arXiv 2001.08361, table 1), with the decoder's gated MLP.

    Args:
        shapes: The model.
        tokens: S; 1 for a decode step, whose reading of the cache is left out.
    """
    products = 2 * tokens * layer_weights(shapes) + 2 * shapes.hidden * shapes.vocab
    return products + 2 * shapes.layers * shapes.hidden * tokens * (tokens + 1)


def vision_weights(shapes: Shapes) -> tuple[int, int]:
    """Return the weights of the tower, B (4 W² + 2 W I), and those of the two-layer projector, W D + D²."""
    width, hidden = shapes.vision_width, shapes.hidden
    tower = shapes.vision_blocks * (4 * width**2 + 2 * width * shapes.vision_intermediate)
    return tower, width * hidden + hidden**2


def vision_flops(shapes: Shapes) -> int:
    """Return the operations of tower and projector for one image.

    2 T weights of the tower, 4 B T² W for attention without a mask over T tokens, and 2 N weights of the projector.
    """
    tower, projector = vision_weights(shapes)
    attention = 4 * shapes.vision_blocks * shapes.vision_tokens**2 * shapes.vision_width
    return 2 * shapes.vision_tokens * tower + attention + 2 * shapes.image_tokens * projector


def memory_ms(moved: float, bandwidth: float) -> float:
    """Return moved / bandwidth in ms.

    Args:
        moved: Bytes.
        bandwidth: Bytes read and bytes written, together, in a second of copying.
    """
    return 1e3 * moved / bandwidth


def arithmetic_ms(flops: float, rate: float) -> float:
    """Return flops / rate in ms.

    Args:
        flops: Operations.
        rate: Operations in a second of multiplying large fp16 matrices.
    """
    return 1e3 * flops / rate


def floor_ms(moved: float, flops: float, bandwidth: float, rate: float) -> float:
    """Return the larger of `memory_ms` and `arithmetic_ms`."""
    return max(memory_ms(moved, bandwidth), arithmetic_ms(flops, rate))


def work(shapes: Shapes, decoder_weights_bytes: Mapping[str, int]) -> dict[str, Work]:
    """Return what each graph that has a floor must read and compute, by the floor's name.

    Args:
        shapes: The model.
        decoder_weights_bytes: What one decode step reads, by precision (`fp16`, `int4`).
    """
    found = {"vision": Work(FP16_BYTES * sum(vision_weights(shapes)), vision_flops(shapes))}
    if "fp16" in decoder_weights_bytes:
        found["prefill_104_fp16"] = Work(decoder_weights_bytes["fp16"], decoder_flops(shapes, shapes.prompt_tokens))
    for precision, size in decoder_weights_bytes.items():
        found[f"decode_{precision}"] = Work(size, decoder_flops(shapes, 1))
    return found


def floors(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the floors of a latency measurement in ms, by name.

    That of the vision graph is the larger time. Those of the decoder's graphs are their weights once through memory, and no
    more: so the bounds on them are defined, and at one token or a hundred the arithmetic of a large GPU takes less.

    Args:
        data: With `shapes`, `decoder_weights_bytes`, `copy_bandwidth_bytes_per_s` and `matmul_flop_per_s`.
    """
    bandwidth, rate = data["copy_bandwidth_bytes_per_s"], data["matmul_flop_per_s"]
    graphs = work(Shapes.from_dict(data["shapes"]), data["decoder_weights_bytes"])
    found = {name: memory_ms(graph.moved, bandwidth) for name, graph in graphs.items()}
    found["vision"] = floor_ms(*graphs["vision"], bandwidth, rate)
    return found
