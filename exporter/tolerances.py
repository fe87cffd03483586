"""How far a graph may be from the model it was made from. Every number has its reason; tests and exports use the same.

Differences are relative to the largest magnitude of the reference tensor, so that they do not depend on a model's scale.
"""

from __future__ import annotations

# Largest |graph - reference| / max |reference| of image features, by the precision of the vision graph.
# fp32: two implementations sum in different orders; 24 blocks gave 2e-6 at most, five times that is allowed for other CPUs.
# fp16: the graph computes in half precision (11 bits), the reference in fp32; one rounding is 5e-4 and they add up.
FEATURES = {"fp32": 1e-5, "fp16": 2e-2}

# The same for merged tokens: sums weighted by attention carry its rounding too, exponentials of scores of order 10
# (1.3e-5 on random weights).
MERGED = {"fp32": 1e-4, "fp16": 5e-2}

# Least share of kept tokens that agree with the reference's choice (a tie broken by a rounding error swaps a token).
KEPT_OVERLAP = {"fp32": 0.98, "fp16": 0.90}

# Largest |logits - reference| / max |reference| at the first position. With rounded weights the reference's are rounded alike
# (`exporter/rounding.py`), so this is again about sums and activations: on the CPU int8 differs by 5e-4 and int4 by 3e-3 (their
# kernels round activations too), in half precision by 7e-3 and 2.4e-2: a scale kept in 11 bits moves a whole block.
LOGITS = {"fp32": 1e-4, "fp16": 3e-2, "int8": 3e-2, "int4": 1e-1}

# Least cosine between first-position logits and the reference's, rounded alike. Measured on random weights, the hardest case:
# int8 0.99998, int4 0.9997, both in half precision. Against weights that were not rounded it is 0.999 and 0.81 to 0.91: that is
# what rounding costs a model, which an export reports and no bound judges.
LOGITS_COSINE = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.999, "int4": 0.995}

# Greedy tokens must be the reference's, unless the two best logits of the reference are nearer to each other than this share of
# max |logits|: then either is right.
TOKEN_MARGIN = {"fp32": 2e-4, "fp16": 5e-2, "int8": 5e-2, "int4": 1e-1}

# Preprocessing against the checkpoint's processor, in levels of 255 before normalisation: libraries round a resized
# pixel up or down.
PIXEL_LEVELS = 1.0

# Rotary, softmax and norm kernels of the two runtimes on a tiny random decoder, absolute on logits of order 1.
TINY_LOGITS = 2e-4

# The class token's attention, fused blocks against eager ones, relative: a softmax turns a rounding error of its logits into
# a relative error of the same size, and the tiny random model's logits reach tens (24 bits of them is 1e-5).
ATTENTION = 1e-4
