"""Images whose lines of tokens have a token between them, against slow lists of lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.crops import Arrangement, CropShape
from leanvlm.runtime.errors import ManifestError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, ImageRun, Layout, image_runs, image_tokens, least_positions
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.prompt import Prompt, assemble, compose

IMAGE, BREAK, END, TEXT = 3, 4, 5, 9
LAYOUT = Layout(after="[E]", line_break="[B]")


class Table:
    """Rows that are their own ids."""

    def rows(self, ids: Any) -> Any:
        """Return (T, 1)."""
        return np.array(ids, np.float32)[:, None]


def image(grid: tuple[int, int], kept: list[int]) -> ImageFeatures:
    """Return an encoded image whose tokens are 1000 and more."""
    shape = CropShape((14 * grid[0], 14 * grid[1]), grid)
    pruning = Pruning(len(kept), None, len(kept), True, np.array(kept, np.int64), np.zeros(shape.tokens, np.float32), shape)
    return ImageFeatures((CropFeatures(1000 + np.array(kept, np.float32)[:, None], pruning),))


def planned(images: list[ImageFeatures], rule: PositionRule) -> Prompt:
    """Return the prompt of some images, text before, between and behind them."""
    ids = [TEXT, *[IMAGE, END, TEXT] * len(images)]
    return assemble(compose(ids, IMAGE, images, LAYOUT), Table(), rule, IMAGE, BREAK)


@st.composite
def pruned(draw: st.DrawFn) -> tuple[tuple[int, int], list[int]]:
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    count = grid[0] * grid[1]
    return grid, sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count)))


@given(st.lists(pruned(), min_size=1, max_size=3))
def test_breaks_stand_between_lines_of_which_something_is_kept(drawn: list[tuple[tuple[int, int], list[int]]]) -> None:
    whole: list[int] = [TEXT]
    rows: list[float] = [TEXT]
    places: list[int] = [0]
    for (height, width), kept in drawn:
        lines = [[at for at in kept if at // width == line] for line in range(height)]
        filled = [line for line in range(height) if lines[line]]
        for line in filled:
            start = len(whole) + line * (width + 1)
            rows += [1000 + at for at in lines[line]]
            places += [start + at % width for at in lines[line]]
            if line != filled[-1]:
                rows.append(BREAK)
                places.append(start + width)
        whole += ([IMAGE] * width + [BREAK]) * height
        whole[-1] = END
        rows += [END, TEXT]
        places += [len(whole) - 1, len(whole)]
        whole.append(TEXT)
    images = [image(*one) for one in drawn]
    for rule, expected in ((PositionRule("compact"), list(range(len(rows)))), (PositionRule("original"), places)):
        prompt = planned(images, rule)
        assert list(prompt.ids) == whole
        assert prompt.embeddings()[:, 0].tolist() == rows
        assert prompt.positions[0].tolist() == expected
        assert prompt.next_position == (len(rows) if rule.kept == "compact" else len(whole))


@given(pruned())
def test_the_least_positions_are_reached_and_never_undercut(drawn: tuple[tuple[int, int], list[int]]) -> None:
    grid, kept = drawn
    shape = CropShape((14 * grid[0], 14 * grid[1]), grid)
    runs: list[list[ImageRun]] = [image_runs(image(grid, tokens), LAYOUT) for tokens in (kept, list(range(len(kept))))]
    drawn_rows, first_rows = (len(run.rows) for (run,) in runs)
    least = least_positions(Arrangement(), LAYOUT, shape, len(kept), "compact")
    assert least == first_rows <= drawn_rows
    whole = least_positions(Arrangement(), LAYOUT, shape, len(kept), "original")
    assert whole == least_positions(Arrangement(), LAYOUT, shape, shape.tokens, "compact") == grid[0] * (grid[1] + 1) - 1


def test_breaks_are_not_counted_among_an_images_tokens() -> None:
    tokens = image_tokens(image((3, 2), [0, 1, 5]), LAYOUT)
    assert (tokens.kept, tokens.total) == (3, 6)
    tokens = image_tokens(image((3, 2), list(range(6))), LAYOUT)
    assert (tokens.kept, tokens.total) == (6, 6)


@pytest.mark.parametrize("changes", [{"mosaic": True}, {"row_end": "line"}])
def test_lines_end_in_one_way(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="line_break is for crops by themselves"):
        Layout(line_break="[B]", **changes)
