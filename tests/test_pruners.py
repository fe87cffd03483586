"""Every pruner against slow loops over one crop, and what all of them promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import REFERENCE, Crop, outliers_of, release_grid

from leanvlm.exporter import verify
from leanvlm.exporter.pruners import PRUNERS, Kept, VisionTokens, parse
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.errors import UnsupportedPrunerError, VerificationError
from leanvlm.runtime.specs import VisionSpec

Array = npt.NDArray[Any]
# Their choice does not depend on where a token is, as long as no scores are equal. The others take even strides, constants, or,
# as divprune at its start, one of two tokens that are each other's nearest.
PLACELESS = ("agile", "attention", "hybrid", "scope", "vispruner")
CHOOSING = sorted(set(PRUNERS) - {"none"})


def random_tokens(batch: int, grid: tuple[int, int], seed: int, width: int = 64) -> VisionTokens:
    """Tokens around a few centres, with peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, count, *shape, generator=generator)

    centres = torch.randn(batch, 6, width, generator=generator)
    near = centres[:, torch.randint(0, 6, (count,), generator=generator)]
    return VisionTokens(
        features=near + 0.6 * normal(width),
        seen=Seen(
            hidden=near.flip(2) + 0.8 * normal(width),
            keys=normal(4, 8),
            saliency=(1.5 * normal()).softmax(dim=1),
            unsplit=(2.0 * normal()).softmax(dim=1),
        ),
        grid=grid,
    )


def exact_tokens(batch: int, grid: tuple[int, int], seed: int, width: int = 64) -> VisionTokens:
    """Tokens whose cosines and products are exact in any precision, with many equal ones and many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    centres = torch.randint(0, 2, (batch, 5, width), generator=generator) * 2.0 - 1.0
    near = centres[:, torch.randint(0, 5, (count,), generator=generator)]
    flips = 1.0 - 2.0 * (torch.rand(batch, count, width, generator=generator) < 0.1)
    flips[:, ::3] = 1.0
    scores = torch.randint(1, 20, (batch, count), generator=generator) / 1024.0
    keys = torch.randn(batch, count, 2, 8, generator=generator)
    return VisionTokens(near * flips, Seen(near.flip(2) * flips, keys, scores, scores), grid)


def crops(tokens: VisionTokens) -> list[Crop]:
    """Split a batch into what the reference takes."""
    names = ("features", "hidden", "keys", "saliency", "unsplit")
    arrays = [getattr(tokens, name).double().numpy() for name in names]
    return [Crop(*(array[b] for array in arrays)) for b in range(len(arrays[0]))]


def row(tokens: VisionTokens, index: Any) -> VisionTokens:
    """Index all tensors alike."""
    return VisionTokens(tokens.features[index], Seen(*(part[index] for part in tokens.seen[:4])), tokens.grid)


def assert_equal(kept: Kept, tokens: VisionTokens, name: str, keep: int, **params: Any) -> None:
    for b, crop in enumerate(crops(tokens)):
        chosen, merged = REFERENCE[name](crop, keep, **params)
        assert kept.indices[b].tolist() == chosen
        assert (kept.hidden is None) == (merged is None)
        if kept.hidden is not None:
            np.testing.assert_allclose(kept.hidden[b].numpy(), merged, rtol=1e-4, atol=1e-5)


def test_every_pruner_has_a_reference() -> None:
    assert set(PRUNERS) == set(REFERENCE)


@pytest.mark.parametrize("make", [random_tokens, exact_tokens])
@pytest.mark.parametrize(("grid", "keep"), [((5, 5), 1), ((4, 7), 9), ((6, 8), 47), ((6, 8), 48), ((9, 11), 40)])
@pytest.mark.parametrize("name", CHOOSING)
def test_equals_the_slow_version(name: str, grid: tuple[int, int], keep: int, make: Any) -> None:
    tokens = make(2, grid, seed=keep)
    fixed = f"{name}:gate=none" if name == "agile" else name
    assert_equal(parse(fixed, keep=keep)(tokens), tokens, name, keep)


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        ("hybrid:share=0", {"share": 0.0}),
        ("hybrid:share=1", {"share": 1.0}),
        ("prumerge:neighbours=3", {"neighbours": 3}),
        ("prumerge:sample=release", {"sample": "release"}),
        ("prumerge:sample=release,share=0.7", {"sample": "release", "share": 0.7}),
        ("prumerge:sample=release,share=0.01", {"sample": "release", "share": 0.01}),
        ("random:seed=5", {"seed": 5}),
        ("scope:alpha=0.5", {"alpha": 0.5}),
        ("visionzip:contextual=0", {"contextual": 0.0}),
        ("visionzip:contextual=1", {"contextual": 1.0}),
        ("vispruner:ratio=0", {"ratio": 0.0}),
        ("vispruner:ratio=1", {"ratio": 1.0}),
        ("vispruner:ratio=0.75,drop=3", {"ratio": 0.75, "drop": 3}),
    ],
)
def test_parameters_mean_what_they_say(spec: str, params: dict[str, Any]) -> None:
    tokens = random_tokens(2, (7, 9), seed=1)
    assert_equal(parse(spec, keep=20)(tokens), tokens, spec.partition(":")[0], 20, **params)


@pytest.mark.parametrize(
    "spec",
    [
        "agile:erank_ref=0", "agile:sweeps=0", "agile:step=-1",
        "hybrid:share=1.5", "hybrid:least=0.8,most=0.2", "hybrid:erank_ref=0", "prumerge:neighbours=0", "prumerge:share=1.5",
        "random:seed=-1", "scope:alpha=-1", "visionzip:contextual=2",
        "vispruner:ratio=-0.1", "vispruner:drop=0", "vispruner:most=2",
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(spec: str) -> None:
    name, _, rest = spec.partition(":")
    with pytest.raises(UnsupportedPrunerError, match=f"{name}: .*{rest.split('=')[0]}"):
        parse(spec)


def test_more_outliers_than_tokens_go_by_attention() -> None:
    tokens = random_tokens(2, (6, 8), seed=2)
    tokens.unsplit[:, :10] = torch.arange(10.0) + 5.0
    kept = parse("prumerge", keep=4)(tokens)
    assert kept.indices.tolist() == [[6, 7, 8, 9]] * 2
    assert_equal(kept, tokens, "prumerge", 4)


def test_prumerge_keeps_what_its_release_keeps_where_that_is_k_tokens() -> None:
    """24 x 24 tokens of which 16 are outliers, none on the grid of 48 that the release lays for so many."""
    tokens = random_tokens(1, (24, 24), seed=5)
    tokens.unsplit[:] = torch.rand(1, 576, generator=torch.Generator().manual_seed(1)) + 1.0
    tokens.unsplit[0, 7:576:36] = 10.0 + torch.arange(16.0)
    outliers = outliers_of(crops(tokens)[0].unsplit_attention)
    released = sorted({*outliers, *release_grid(len(outliers), 576)})
    assert len(outliers) == 16
    assert len(released) == 64
    assert parse("prumerge:sample=release", keep=64)(tokens).indices[0].tolist() == released
    assert parse("prumerge", keep=64)(tokens).indices[0].tolist() != released


@pytest.mark.parametrize("keep", [2, 15, 29])
def test_prumerge_fills_up_where_the_grid_is_short(keep: int) -> None:
    """The most attended tokens stand on the grid, which has then too few points; and the rows differ in how many do."""
    tokens = random_tokens(2, (5, 6), seed=6)
    tokens.unsplit[0, ::5] += 1.0
    kept = parse("prumerge:sample=release,share=0.5", keep=keep)(tokens)
    assert_equal(kept, tokens, "prumerge", keep, sample="release", share=0.5)


@pytest.mark.parametrize("gate", ["erank", "entropy"])
def test_agile_follows_its_gate(gate: str) -> None:
    tokens = random_tokens(3, (9, 9), seed=3)
    tokens.features[1] += 6.0 * tokens.features[1, :1]
    tokens.saliency[2] = tokens.saliency[2] ** 3
    kept = parse(f"agile:gate={gate},erank_ref=20,entropy_ref=3", keep=24)(tokens)
    value = kept.diagnostics["effective_rank"] / 20 if gate == "erank" else kept.diagnostics["attention_entropy"] / 3
    for b, crop in enumerate(crops(tokens)):
        assert kept.indices[b].tolist() == REFERENCE["agile"](crop, 24, float(value[b]))[0]
    assert len({round(float(v), 2) for v in value}) > 1


@pytest.mark.parametrize("name", ["hybrid", "vispruner"])
def test_the_share_follows_the_effective_rank(name: str) -> None:
    """MatrixRows of one batch with a low, a middle and a high rank, each with a split of its own."""
    tokens = random_tokens(3, (9, 9), seed=4)
    tokens.features[0] = tokens.features[0] @ torch.outer(torch.ones(64), torch.ones(64)) + 0.1 * tokens.features[0]
    tokens.features[2] = torch.randn(81, 64, generator=torch.Generator().manual_seed(0))
    kept = parse(f"{name}:gate=erank,erank_ref=30,least=0.2,most=0.9", keep=30)(tokens)
    shares = [0.2 + 0.7 * min(max(float(v) / 30 - 0.5, 0.0), 1.0) for v in kept.diagnostics["effective_rank"]]
    assert shares[0] < shares[1] < shares[2]
    for b, crop in enumerate(crops(tokens)):
        share = {"share": shares[b]} if name == "hybrid" else {"ratio": 1.0 - shares[b]}
        assert kept.indices[b].tolist() == REFERENCE[name](crop, 30, **share)[0]


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(2, 6), columns=st.integers(2, 6), share=st.floats(0.0, 1.0), data=st.integers(0, 10**6))
def test_indices_are_unique_and_ascending(name: str, rows: int, columns: int, share: float, data: int) -> None:
    """Whatever the input: here many equal tokens and equal scores, or only equal ones."""
    tokens = exact_tokens(2, (rows, columns), data)
    if data % 3 == 0:
        tokens = VisionTokens(
            torch.ones_like(tokens.features),
            Seen(
                torch.zeros_like(tokens.hidden), torch.ones_like(tokens.keys), torch.ones_like(tokens.saliency),
                torch.zeros_like(tokens.saliency),
            ),
            tokens.grid,
        )  # fmt: skip
    keep = 1 + int(share * (rows * columns - 1))
    kept = parse(name, keep=keep)(tokens)
    assert kept.indices.shape == (2, keep)
    assert kept.indices.dtype == torch.int64
    assert (kept.indices.diff(dim=1) > 0).all()
    assert kept.indices.min() >= 0
    assert kept.indices.max() < rows * columns
    assert kept.hidden is None or torch.isfinite(kept.hidden).all()


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_keeping_all_changes_nothing(name: str, extra: int) -> None:
    kept = parse(name, keep=30 + extra)(random_tokens(2, (5, 6), seed=6))
    assert kept.hidden is None
    assert kept.indices.tolist() == [list(range(30))] * 2


@pytest.mark.parametrize("name", [*sorted(PRUNERS), "hybrid:gate=erank", "prumerge:sample=release", "vispruner:gate=erank"])
def test_rows_are_independent(name: str) -> None:
    tokens = random_tokens(3, (6, 7), seed=7)
    pruner = parse(name, keep=16)
    together = pruner(tokens)
    for b in range(3):
        alone = pruner(row(tokens, slice(b, b + 1)))
        assert torch.equal(together.indices[b], alone.indices[0])
        if together.hidden is not None and alone.hidden is not None:
            torch.testing.assert_close(together.hidden[b], alone.hidden[0])


@pytest.mark.parametrize("name", PLACELESS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_moving_tokens_moves_the_choice(name: str, seed: int) -> None:
    tokens = random_tokens(2, (6, 6), seed)
    moved = torch.randperm(36, generator=torch.Generator().manual_seed(seed))
    pruner = parse(name, keep=11)
    before, after = pruner(tokens).indices, pruner(row(tokens, (slice(None), moved))).indices
    for b in range(2):
        assert sorted(moved[after[b]].tolist()) == before[b].tolist()


GRAPH = VisionSpec("vision_8.onnx", (), (), shape=0, budget=8, kept=8)


@pytest.mark.parametrize("where", ["features", "attention"])
def test_nan_is_named_by_the_verification(where: str) -> None:
    tokens = random_tokens(2, (5, 6), seed=8)
    kept = parse("attention", keep=8)(tokens)
    outputs = {
        "image_features": np.take_along_axis(tokens.features.numpy(), kept.indices.numpy()[:, :, None], axis=1),
        "keep_indices": kept.indices.numpy(),
        "attention": tokens.saliency.numpy(),
        "num_selected": np.array([8, 8]),
        "converged": np.array([True, True]),
    }
    features, expected = tokens.features.numpy(), kept.indices.numpy()
    verify._check_vision(GRAPH, verify._compare_vision(outputs, features, expected, None), "fp32")
    outputs["image_features" if where == "features" else "attention"][1, 3] = np.nan
    with pytest.raises(VerificationError, match="NaN"):
        verify._check_vision(GRAPH, verify._compare_vision(outputs, features, expected, None), "fp32")
