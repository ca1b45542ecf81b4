"""Makes an ONNX graph easier to hold in 8 bits, which computes the same: what GELU gives is centred beforehand.

Most of GELU's values lie close below zero and hardly change from image to image. Rounded to 8 bits as they are, each is
off by the same amount in every token, and no mean over tokens takes that away. So the expected value of each hidden
unit is taken off before the layer that follows, and what the layer would have made of it goes into that layer's bias.
The expected values come from the weights alone: what a LayerNorm gives is taken as normally distributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

NODES = 33  # of the Gauss-Hermite rule; the mean of GELU is exact to six digits


def centre_hidden_units(proto: Any) -> int:
    """Centre the input of every linear layer that follows LayerNorm, linear layer and GELU, in place.

    Args:
        proto: An `onnx.ModelProto` as torch's exporter writes it: `MatMul` and `Add` with initializers.

    Returns:
        How many layers there were.
    """
    from onnx import helper, numpy_helper

    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    centred: list[Any] = []
    nodes: list[Any] = []
    for node in graph.node:
        first = _layer_before_gelu(node, producers, weights)
        bias = first and _bias_after(node, graph, weights)
        if first and bias:
            mean = _mean_of_gelu(*(numpy_helper.to_array(weights[name]).astype(np.float64) for name in first))
            shift = mean @ numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
            moved = numpy_helper.to_array(weights[bias]).astype(np.float64) + shift
            weights[bias].CopyFrom(numpy_helper.from_array(moved.astype(np.float32), bias))
            name = f"{node.name}_centre"
            centred.append(numpy_helper.from_array(mean.astype(np.float32), name))
            nodes.append(helper.make_node("Sub", [node.input[0], name], [f"{name}d"], name=name))
            node.input[0] = f"{name}d"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(centred)
    return len(centred)


def _layer_before_gelu(node: Any, producers: dict[str, Any], weights: dict[str, Any]) -> list[str] | None:
    """Scale and shift of the LayerNorm, weight and bias of the linear layer, whose GELU this MatMul reads; or None."""
    if node.op_type != "MatMul" or node.input[1] not in weights:
        return None
    seen: set[str] = set()
    left = [node.input[0]]
    while left:
        behind = producers.get(left.pop())
        if behind is None:  # a weight or a constant
            continue
        if behind.op_type == "Add" and (layer := _linear_after_norm(behind, producers, weights)):
            return layer if {"Erf", "Gelu"} & seen else None
        seen.add(behind.op_type)
        if behind.op_type not in ("Mul", "Add", "Div", "Erf", "Gelu", "Constant"):
            return None
        left.extend(behind.input)
    return None


def _linear_after_norm(add: Any, producers: dict[str, Any], weights: dict[str, Any]) -> list[str] | None:
    """The names of scale, shift, weight and bias where this Add ends a linear layer after a LayerNorm."""
    bias = [name for name in add.input if name in weights]
    product = next((producers[name] for name in add.input if name in producers), None)
    if not bias or product is None or product.op_type != "MatMul" or product.input[1] not in weights:
        return None
    norm = producers.get(product.input[0])
    if norm is None or norm.op_type != "LayerNormalization":
        return None
    return [norm.input[1], norm.input[2], product.input[1], bias[0]]


def _bias_after(node: Any, graph: Any, weights: dict[str, Any]) -> str | None:
    """The bias that is added to a MatMul, and to it alone."""
    users = [user for user in graph.node if node.output[0] in user.input]
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    bias = next((name for name in users[0].input if name in weights), None)
    return bias if bias and sum(bias in user.input for user in graph.node) == 1 else None


def _mean_of_gelu(scale: np.ndarray, shift: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """E[GELU((z * scale + shift) @ weight + bias)] over z of independent standard normals, by hidden unit."""
    centre, spread = shift @ weight + bias, np.sqrt(((scale[:, None] * weight) ** 2).sum(axis=0))
    points, shares = np.polynomial.hermite_e.hermegauss(NODES)
    values = torch.nn.functional.gelu(torch.from_numpy(centre[:, None] + spread[:, None] * points)).numpy()
    return (values * (shares / shares.sum())).sum(axis=1)


__all__ = ["centre_hidden_units"]
