"""Which of ONNX Runtime's attention kernels a decoder's steps run with, where it offers a choice by environment only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from leanvlm.runtime.machine.gpu import Gpu
from leanvlm.runtime.specs import DecoderSpec

# Read when a session is opened; 0 leaves steps to cuDNN where it has a kernel.
XQA = "ORT_ENABLE_XQA"
HOPPER = 90


@contextmanager
def step_kernels(spec: DecoderSpec, gpu: Gpu | None) -> Iterator[None]:
    """Open a decoder's session in here: its steps then run with the kernels that measured best; who set the variable decides.

    On an H100 a step of 7B weights in fp16 takes 5.70 ms with cuDNN's kernel and 5.90 with ONNX Runtime's XQA, which it
    prefers. XQA was written for heads that share keys; with them, and on other GPUs, its own choice stays.
    """
    # Whether each head has keys of its own.
    alone = spec.kv_heads * spec.head_dim == spec.hidden_size
    if gpu is None or gpu.sm != HOPPER or not alone or XQA in os.environ:
        yield
        return
    os.environ[XQA] = "0"
    try:
        yield
    finally:
        del os.environ[XQA]
