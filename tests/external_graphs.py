"""Small graphs with numbers that are in a file, in each place where a graph can have some."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, helper

FLOAT = TensorProto.FLOAT


def weight(location: str, **entries: str) -> TensorProto:
    """Return 16 numbers that are in a file."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def value(name: str) -> Any:
    return helper.make_tensor_value_info(name, FLOAT, [16])


def model(nodes: list[Any], initializers: list[Any] = [], **parts: Any) -> ModelProto:  # noqa: B006
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, **parts)


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def an_initializer(tensor: TensorProto) -> ModelProto:
    return model([ADD], [tensor])


def a_constant(tensor: TensorProto) -> ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=tensor), ADD])


def a_branch(tensor: TensorProto) -> ModelProto:
    branch = helper.make_graph([helper.make_node("Add", ["x", "w"], ["z"])], "b", [], [value("z")], [tensor])
    inner = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)], "i", [], [value("z")]
    )
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    return model([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)], [condition])


def a_function(tensor: TensorProto) -> ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), ADD]
    function = helper.make_function("own", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 20)])
    return model([helper.make_node("F", ["x"], ["y"], domain="own")], functions=[function])


def a_sparse_tensor(tensor: TensorProto) -> ModelProto:
    indices = helper.make_tensor("i", TensorProto.INT64, [16], list(range(16)))
    sparse = helper.make_sparse_tensor(tensor, indices, [16])
    return model([helper.make_node("Constant", [], ["w"], sparse_value=sparse), ADD])


def a_list_of_tensors(tensor: TensorProto) -> ModelProto:
    return model([helper.make_node("Own", ["x"], ["y"], domain="own", values=[tensor, tensor])])


PLACES = (an_initializer, a_constant, a_branch, a_function, a_sparse_tensor, a_list_of_tensors)
