"""Padding around an image: a pruner neither counts it nor keeps it while there is anything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference import REFERENCE, Crop

from leanvlm.exporter.pruners import PRUNERS, VisionTokens, parse
from leanvlm.exporter.pruners.base import choose
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.crops import Arrangement, CropShape, shown_tokens

ROWS, COLUMNS, KEEP = 6, 5, 8
COUNT = ROWS * COLUMNS
# Rows of the batch: most is shown, less than is kept, all, and nothing at all.
SHOWN = (19, 5, COUNT, 0)
SEES = [name for name in PRUNERS if name != "none"]


def tokens(seed: int = 0) -> VisionTokens:
    """Return random tokens; padding is what attracts most attention and differs most."""
    torch.manual_seed(seed)
    batch = len(SHOWN)
    valid = torch.zeros(batch, COUNT)
    for row, count in enumerate(SHOWN):
        valid[row, torch.randperm(COUNT)[:count]] = 1.0
    loud = (1 - valid)[:, :, None]
    hidden, keys = torch.randn(batch, COUNT, 12) + 5 * loud, torch.randn(batch, COUNT, 2, 6) + 5 * loud[..., None]
    scores = [(torch.rand(batch, COUNT) + 4 * loud[:, :, 0]) for _ in range(2)]
    features = torch.randn(batch, COUNT, 16) + 9 * torch.randn(batch, COUNT, 16) * loud
    seen = Seen(hidden, keys, *(score / score.sum(1, keepdim=True) for score in scores))
    return VisionTokens(features, seen, (ROWS, COLUMNS), 0, valid)


@pytest.mark.parametrize("name", SEES)
def test_padding_is_kept_only_where_nothing_else_is_left(name: str) -> None:
    given = tokens()
    kept = choose(parse(name, keep=KEEP), given)
    assert kept.indices.shape == (len(SHOWN), KEEP)
    assert (kept.indices.diff(dim=1) > 0).all()
    for row, count in enumerate(SHOWN):
        shows = int(given.valid[row, kept.indices[row]].sum())  # type: ignore[index]
        assert shows == min(count, KEEP)
    selected = kept.diagnostics.get("num_selected")
    assert selected is None or (selected <= torch.tensor([min(count, KEEP) for count in SHOWN])).all()


@pytest.mark.parametrize("name", ["agile:gate=none", "agile", "attention"])
def test_a_pruner_sees_what_is_shown_and_nothing_else(name: str) -> None:
    """The choice is that of the slow pruner among the other tokens alone; its gate measures them alone."""
    given = tokens(1)
    kept = choose(parse(name, keep=KEEP, erank_ref=9.0), given)
    shown = given.valid[0].nonzero()[:, 0]  # type: ignore[index]
    points = given.features[0, shown].double().numpy()
    scores = given.saliency[0, shown].double().numpy()
    crop = Crop(points, points, points[:, None], scores, scores)
    if name == "agile":
        rank = float(exact_effective_rank(given.features[:1, shown]))
        assert float(kept.diagnostics["effective_rank"][0]) == pytest.approx(rank, rel=0.02)
        chosen, _ = REFERENCE["agile"](crop, KEEP, float(kept.diagnostics["effective_rank"][0]) / 9.0)  # type: ignore[call-arg]
    else:
        chosen, _ = REFERENCE[name.partition(":")[0]](crop, KEEP)
    assert kept.indices[0].tolist() == [int(shown[index]) for index in chosen]


@pytest.mark.parametrize("name", SEES)
def test_a_crop_without_padding_is_pruned_as_before(name: str) -> None:
    given = replace(tokens(2), valid=torch.ones(len(SHOWN), COUNT))
    marked, plain = choose(parse(name, keep=KEEP), given), choose(parse(name, keep=KEEP), replace(given, valid=None))
    assert torch.equal(marked.indices, plain.indices)
    assert (marked.hidden is None) == (plain.hidden is None)
    if marked.hidden is not None and plain.hidden is not None:
        assert torch.equal(marked.hidden, plain.hidden)


def test_what_takes_the_place_of_padding_is_not_merged() -> None:
    """A merging pruner's rows stay with their tokens; a token that takes a padding's place is itself."""
    given = tokens(3)
    pruner = parse("visionzip", keep=KEEP)
    kept, before = choose(pruner, given), pruner(given.shown)
    assert kept.hidden is not None
    assert before.hidden is not None
    for row in range(len(SHOWN)):
        own = before.indices[row].tolist()
        for at, index in enumerate(kept.indices[row].tolist()):
            wanted = before.hidden[row, own.index(index)] if index in own else given.hidden[row, index]
            assert torch.equal(kept.hidden[row, at], wanted)


def test_a_leading_token_and_padding_do_not_meet() -> None:
    """No family has both, and a choice of padding would not be mended."""
    with pytest.raises(AssertionError, match="do not go together"):
        replace(tokens(4), leading=1)


def test_all_tokens_are_the_unpruned_model() -> None:
    """Padding included: it is left out behind the graph, as the model itself does."""
    given = tokens(4)
    kept = choose(parse("agile", keep=COUNT), given)
    assert kept.indices.tolist() == [list(range(COUNT))] * len(SHOWN)


@pytest.mark.parametrize("thumbnail", ["none", "first", "last"])
def test_shown_tokens_are_the_inner_part_of_the_tiles(thumbnail: Any) -> None:
    shape = CropShape((30, 20), (3, 2))
    found = shown_tokens(Arrangement((2, 3), thumbnail, (1, 5, 2, 4)), shape)
    slow = [
        [float(1 <= 3 * row + y < 5 and 2 <= 2 * column + x < 4) for y in range(3) for x in range(2)]
        for row in range(2)
        for column in range(3)
    ]
    whole = [[1.0] * 6]
    wanted = {"none": slow, "first": whole + slow, "last": slow + whole}[thumbnail]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))
