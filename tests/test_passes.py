"""Graph passes on a traced tower: where each fires, and equal outputs throughout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_models import assert_equal, run, types
from torch import Tensor, nn
from towers import (
    ATTENTION,
    BATCHES,
    BLOCKS,
    CHANGES,
    FOLDED,
    IMAGE_SIZE,
    MULTI_HEAD,
    QUICK_GELU,
    SHARED,
    SKIP_NORM,
    apply,
    clip,
    pixels,
)

from leanvlm.exporter.passes.bias_column import COLUMNS
from leanvlm.exporter.passes.pattern import CONTRIB
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.towers.clip import ClipTower
from leanvlm.exporter.trace import trace

TOWER_OUTPUTS = ("hidden", "keys", "attention", "unsplit")


class TowerAlone(nn.Module):
    """A tower as the stage `vision` and nothing behind it, so that its four results are outputs."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision = tower

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the tower."""
        found: tuple[Tensor, ...] = self.vision(pixel_values)
        return found


@pytest.fixture(scope="module", params=[FOLDED, SHARED], ids=["keys computed twice", "keys shared"])
def tower(request: pytest.FixtureRequest) -> tuple[int, ir.Model]:
    """The width and the traced tower of three blocks, the last of them scored; no test may change it."""
    module = TowerAlone(ClipTower(clip(request.param), (BLOCKS,), BLOCKS - 1)).eval()
    example = {"pixel_values": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    return request.param, trace(module, example, output_names=TOWER_OUTPUTS, opset=TARGETS["cuda"].opset)


# What is left of each kind of node, by pass and width.
LEFT: dict[tuple[str, int], dict[str, int]] = {
    ("quick_gelu", FOLDED): {QUICK_GELU: 3, "Sigmoid": 0},
    ("quick_gelu", SHARED): {QUICK_GELU: 3, "Sigmoid": 0},
    ("attention", FOLDED): {ATTENTION: 3, MULTI_HEAD: 0, "Attention": 0},
    ("attention", SHARED): {ATTENTION: 2, MULTI_HEAD: 1, "Attention": 0},
    ("skip_layer_norm", FOLDED): {SKIP_NORM: 6, "LayerNormalization": 1},
    ("skip_layer_norm", SHARED): {SKIP_NORM: 6, "LayerNormalization": 1},
    ("bias_column", FOLDED): {QUICK_GELU: 3, "Pad": 3},
    ("bias_column", SHARED): {QUICK_GELU: 3, "Pad": 3},
}


def prepared(tower: ir.Model, name: str) -> tuple[ir.Model, ir.Model]:
    """Return copies of a traced tower as it is before a pass of the list, and after it."""
    names = list(TARGETS["cuda"].passes)
    before, after = tower.clone(), tower.clone()
    apply(before, names[: names.index(name)])
    apply(after, names[: names.index(name)])
    return before, after


@pytest.mark.parametrize("name", CHANGES)
def test_pass_fires_on_a_traced_tower(tower: tuple[int, ir.Model], name: str) -> None:
    width, traced = tower
    before, after = prepared(traced, name)
    assert TARGETS["cuda"].passes[name](after) == CHANGES[name]
    left = types(after)
    assert {key: left[key] for key in LEFT[name, width]} == LEFT[name, width]
    assert after.graph.opset_imports[CONTRIB] == 1
    names = [node.name or "" for node in after.graph]
    assert all(path.split("/")[:2] == ["", "vision"] for path in names)
    assert len(set(names)) == len(names)
    for batch in BATCHES:
        assert_equal(run(after, pixels(batch)), run(before, pixels(batch)))


@pytest.mark.parametrize("name", CHANGES)
def test_pass_finds_nothing_more_the_second_time(tower: tuple[int, ir.Model], name: str) -> None:
    _, after = prepared(tower[1], name)
    TARGETS["cuda"].passes[name](after)
    written = ir.to_proto(after).SerializeToString(deterministic=True)
    assert TARGETS["cuda"].passes[name](after) == 0
    assert ir.to_proto(after).SerializeToString(deterministic=True) == written


def test_names_and_metadata(tower: tuple[int, ir.Model]) -> None:
    """The passes that every target has change no result; each node gets a name, and no note of the exporter's is left."""
    plain = tower[1].clone()
    done = apply(plain, ["stage_names", "strip_metadata"])
    assert done["stage_names"] == len(plain.graph)
    assert done["strip_metadata"] > len(plain.graph)
    assert not any(node.metadata_props or node.doc_string for node in plain.graph)
    assert_equal(run(plain, pixels(3)), run(tower[1], pixels(3)))


def test_packed_weights_hold_the_projections(tower: tuple[int, ir.Model]) -> None:
    """Query, key and value side by side, and the bias under the weights of an activation, with zeros below."""
    width, traced = tower
    after, module = traced.clone(), clip(tower[0])
    apply(after)
    weights = {name: value.const_value.numpy() for name, value in after.graph.initializers.items() if value.const_value}
    attn, mlp = module.encoder.layers[0].self_attn, module.encoder.layers[0].mlp
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    packed = torch.cat([part.weight.T for part in parts], dim=1).numpy()
    np.testing.assert_array_equal(weights["/vision/blocks/0/self_attn/Attention/weight"], packed)
    biases = torch.cat([part.bias for part in parts]).numpy()
    np.testing.assert_array_equal(weights["/vision/blocks/0/self_attn/Attention/bias"], biases)
    widened = weights["/vision/blocks/0/mlp/fc1/MatMul/weight"]
    np.testing.assert_array_equal(widened[:width], mlp.fc1.weight.T.numpy())
    np.testing.assert_array_equal(widened[width], mlp.fc1.bias.numpy())
    assert widened.shape == (width + COLUMNS, width + 64)
    assert not widened[width + 1 :].any()
