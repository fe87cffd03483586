"""Name every node by its stage, as a path: `node_matmul_3` becomes `/prune/MatMul_3`.

The exporter keeps a node's module path in its metadata and writes a flat name; a profiler only shows the name. A node
without a scope (shape arithmetic of the traced inputs) takes the stage of the first stage, `vision`.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

STAGES = ("vision", "project", "prune")
SCOPES = "pkg.torch.onnx.name_scopes"


def name_by_stage(model: ir.Model) -> int:
    """Rename the nodes of a vision graph in place; return how many were renamed."""
    count: Counter[str] = Counter()
    for node in model.graph:
        path = "/".join(["", *_scope(node), node.op_type])
        node.name = f"{path}_{count[path]}" if count[path] else path
        count[path] += 1
    return sum(count.values())


def _scope(node: ir.Node) -> list[str]:
    """Return the parts of a node's module path, beginning with its stage."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    modules = [scope for scope in scopes[:-1] if scope.split(".")[0] in STAGES]
    return modules[-1].split(".") if modules else [STAGES[0]]
