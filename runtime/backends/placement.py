"""Which nodes of a profiled run fell back to another provider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leanvlm.runtime.backends.ort import PROVIDERS

# A node on the processor that makes no more integers than this computes a shape.
SHAPE_ELEMENTS = 64
INTEGERS = ("int64", "int32", "bool")


def misplaced_nodes(events: Sequence[Mapping[str, Any]], provider: str) -> list[str]:
    """Return the nodes of a profile that another provider ran, as `name (op on provider)`, each once.

    Shape arithmetic belongs on the processor: nodes that make a few integers.
    """
    found = {}
    for event in events:
        args = event["args"]
        where = args.get("provider", provider)
        if where == provider or (where == PROVIDERS["cpu"] and _makes_shapes(args)):
            continue
        name = event["name"].removesuffix("_kernel_time")
        found[name] = f"{name} ({args.get('op_name')} on {where.removesuffix('ExecutionProvider')})"
    return list(found.values())


def _makes_shapes(args: Mapping[str, Any]) -> bool:
    outputs = [item for output in args.get("output_type_shape", []) for item in output.items()]
    return all(dtype in INTEGERS and int(np.prod(shape)) <= SHAPE_ELEMENTS for dtype, shape in outputs)
