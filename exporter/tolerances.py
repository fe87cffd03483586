"""How far a graph may be from the model it was made from. Every number has its reason; tests and exports use the same.

Differences are relative to the largest magnitude of the reference tensor, so that they do not depend on a model's scale.
"""

from __future__ import annotations

# Largest |graph - reference| / max |reference| of image features, by the precision of the vision graph.
# fp32: two implementations sum in different orders; 24 blocks gave 2e-6 at most, five times that is allowed for other CPUs.
# fp16: the graph computes in half precision (11 bits), the reference in fp32; one rounding is 5e-4 and they add up.
FEATURES = {"fp32": 1e-5, "fp16": 2e-2}

# In fp32 a model's own conditioning decides more than its depth: where the logits of the attention reach tens, a rounding error
# of 6e-8 in them is one of 1e-6 in every weight. So a graph over FEATURES is judged by what fp32 costs this model: how far the
# reference's features are from its own in double precision, relative as above. The graph sums in another order, so it is off by
# as much in its own way, or by twice that in the largest of many values; with the reference's own error that is three times.
# Measured on 20 random tiny models, graph against reference: 4.0e-6 to 1.23e-5, four over FEATURES; that is 0.80 to 1.69 of the
# reference's own 3.8e-6 to 1.0e-5, the same to the last bit for 1 to 4 threads, idle or loaded, and within a third for other
# instruction sets. A single number of a weight wrong by 1 % is 3e-5 to 1e-3 there.
ROUNDING = 3.0

# What the rounding may make of FEATURES at most: beyond, fp32 is not enough for the model, or double precision ran another one.
FEATURES_MOST = 1e-4

# Features of an image as the runtime puts them together against the checkpoint's own: the same numbers in another order, or
# interpolated in another order of sums.
LAYOUT = 1e-6

# As FEATURES for merged tokens: sums weighted by attention carry its rounding too, exponentials of scores of order 10
# (1.3e-5 on random weights).
MERGED = {"fp32": 1e-4, "fp16": 5e-2}

# Image features of one image alone and in a batch, likewise relative: kernels cut their sums elsewhere, which may turn the last
# bit of half precision; that of the largest magnitude is 2^-10 of it at most. int8: the same may turn a rounded activation
# by one level, 2^-7 of its block's largest, one of a hundred and more in a sum (1e-6 on a tiny model, where none turned).
BATCHED = {"fp16": 1e-3, "int8": 5e-3}

# Least share of kept tokens that agree with the reference's choice (a tie broken by a rounding error swaps a token).
KEPT_OVERLAP = {"fp32": 0.98, "fp16": 0.90}

# Largest |logits - reference| / max |reference| at the first position, by the precision that the decoder computes in. Quantised
# weights are no exception: the reference's are quantised alike (`exporter/rounding.py`).
LOGITS = {"fp32": 1e-4, "fp16": 3e-2}

# Least cosine between first-position logits and the reference's. A tiny random model quantised to int4 gives 0.9999999 in fp32;
# against the unquantised weights it is 0.81 to 0.91: what quantisation costs a model is reported, and no bound judges it.
LOGITS_COSINE = {"fp32": 0.99999, "fp16": 0.999}

# Greedy tokens must be the reference's, unless the two best logits of the reference are nearer to each other than this share of
# max |logits|: then either is right.
TOKEN_MARGIN = {"fp32": 2e-4, "fp16": 5e-2}

# Estimated effective rank against the exact one, relative: more is worth a warning, for at 1 % the kept tokens are still 99 %
# the same. On LLaVA-like features the estimate is within 0.5 %.
RANK = 0.02

# Preprocessing against the checkpoint's processor, in levels of 255 before normalisation: libraries round a resized
# pixel up or down.
PIXEL_LEVELS = 1.0

# Rotary, softmax and norm kernels of the two runtimes on a tiny random decoder, absolute on logits of order 1.
TINY_LOGITS = 2e-4

# The class token's attention, fused blocks against eager ones, relative: a softmax turns a rounding error of its logits into
# a relative error of the same size, and the tiny random model's logits reach tens (24 bits of them is 1e-5).
ATTENTION = 1e-4


# Largest |OpenVINO - ONNX Runtime| / max |ONNX Runtime| of logits, both in fp32, at any of 20 positions, by the weights.
# fp32: sums in another order, in the tower too: 4.2e-5 measured on a tiny random model with logits of tens; five times that.
# int8, int4: both round activations to 8 bits too, each over its own groups of columns: 5.3e-2 and 4.9e-2 measured; twice that.
OPENVINO_LOGITS = {"fp32": 2e-4, "int8": 0.1, "int4": 0.1}

# Least share of kept tokens that are fp32's where OpenVINO computes the tower in bfloat16 (8 bits), as a mean over pictures.
OPENVINO_BF16_KEPT = 0.95


def features_limit(precision: str, rounding: float) -> float:
    """Return what image features may differ by, from how far the reference itself is off in fp32."""
    limit = FEATURES[precision]
    return max(limit, min(ROUNDING * rounding, FEATURES_MOST))


def kept_least(precision: str, budget: int) -> float:
    """Return how many of a crop's kept tokens must be the reference's, at least.

    A share, but in half precision one token may differ from 4 on: of 6 or 9 a single near tie is more than a tenth, and a tiny
    random SmolVLM and LLaVA-NeXT each lost one so, with all other figures as usual.
    """
    share = KEPT_OVERLAP[precision] * budget
    return min(share, budget - 1) if precision == "fp16" and budget >= 4 else share
