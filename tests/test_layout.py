"""What images become in a prompt, against transformers' own processors and models, and against slow lists of lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import original
import pytest
import tiny_tiles
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, open_checkpoint
from leanvlm.exporter.tokenizer import named_token
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.crops import Arrangement, CropShape, arrange
from leanvlm.runtime.errors import ManifestError, UnsupportedModelError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, ImageRun, Layout, image_runs, image_tokens, least_positions
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.prompt import Prompt, assemble, compose
from leanvlm.runtime.records import plain, read

WIDTH, IMAGE, LINE_END = 5, 3, 9999
MOSAICS = ("llava_next", "llava_next/even", "llava_onevision", "llava_onevision/shrunk")
SHAPES = (*MOSAICS, "internvl", "smolvlm", "smolvlm/whole", "idefics3")
# Also ones of which unpadding leaves no line or no column, a line, and all.
SIZES = [
    (1, 1),
    (1, 1000),
    (1000, 1),
    (7, 1000),
    (900, 5),
    (140, 70),
    (210, 70),
    (100, 333),
    (480, 640),
    (333, 250),
    (280, 280),
]
# Of which a product of floats would be cut to one less, if it were not rounded first.
SIZES += [(77, 77), (245, 49), (147, 245), (616, 462), (49, 245), (103, 515), (98, 490), (618, 515)]
SIDES = st.integers(1, 30) | st.integers(1, 1200)
ROOM = st.tuples(SIDES, SIDES)
Kept = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint, with its model's structure."""

    checkpoint: Checkpoint
    model: Any

    @property
    def layout(self) -> Layout:
        """What an image becomes."""
        return self.checkpoint.frame.layout

    @property
    def shape(self) -> CropShape:
        """The shape of its crops."""
        return self.checkpoint.frame.crops.shapes[0]

    def arrange(self, size: tuple[int, int], among: int = 1) -> Arrangement:
        """Say how an image is cut."""
        return arrange(size, self.checkpoint.frame.crops, among)

    def kept(self, arrangement: Arrangement, budget: int, seed: int = 0) -> Kept:
        """Draw which tokens of each crop are kept."""
        random, budget = np.random.default_rng(seed), min(budget, self.shape.tokens)
        return [sorted(random.permutation(self.shape.tokens)[:budget].tolist()) for _ in range(arrangement.crops)]

    def encoded(self, arrangement: Arrangement, kept: Kept, features: np.ndarray) -> ImageFeatures:
        """Return crops of which some tokens are kept, as the encoder does."""
        crops = []
        for rows, tokens in zip(kept, features, strict=True):
            scores = np.zeros(self.shape.tokens, np.float32)
            pruning = Pruning(len(rows), None, len(rows), True, np.array(rows, np.int64), scores, self.shape)
            crops.append(CropFeatures(tokens[rows], pruning))
        return ImageFeatures(tuple(crops), arrangement)

    def image(self, size: tuple[int, int], budget: int = 10**6, seed: int = 0, among: int = 1) -> ImageFeatures:
        """Return an encoded image."""
        arrangement = self.arrange(size, among)
        return self.encoded(arrangement, self.kept(arrangement, budget, seed), self.features(arrangement, seed))

    def features(self, arrangement: Arrangement, seed: int = 0) -> np.ndarray:
        """Draw features (C, N, D)."""
        return np.random.default_rng(seed + 1).normal(size=(arrangement.crops, self.shape.tokens, WIDTH)).astype(np.float32)

    def packed(self, features: np.ndarray, size: tuple[int, int], newline: np.ndarray, limit: int | None = None) -> np.ndarray:
        """Return the rows (S, D) that the model itself makes of the features of an image (height, width)."""
        options: dict[str, Any] = {"vision_feature_select_strategy": "default"}
        if self.layout.limit is not None:
            options = {"vision_aspect_ratio": f"anyres_max_{limit or self.layout.limit}"}
        given = [torch.from_numpy(features)], torch.tensor([size])
        (rows,), _ = self.model.model.pack_image_features(*given, image_newline=torch.from_numpy(newline), **options)
        return np.asarray(rows)

    def numbered(self, arrangement: Arrangement, size: tuple[int, int]) -> list[tuple[int, int] | None]:
        """Return an unpruned and never shrunk image's tokens as (crop, token) in their order, None where a line ends."""
        count = self.shape.tokens
        numbers = np.arange(arrangement.crops * count, dtype=np.float64).reshape(arrangement.crops, count, 1)
        if not self.layout.mosaic:
            return [divmod(int(number), count) for number in numbers.flatten()]
        order = self.packed(numbers, size, np.array([-1.0]), 999)[:, 0]
        return [divmod(int(number), count) if number >= 0 else None for number in order]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A function that opens a tiny checkpoint."""

    @cache
    def opened(shape: str) -> Case:
        folder = tiny_tiles.TINY[shape.removesuffix("/even")](tmp_path_factory.mktemp("layout") / "checkpoint")
        if shape.endswith("/even"):
            make_even(folder)
        checkpoint = open_checkpoint(ExportConfig(str(folder), (1,), folder / "bundle"))
        return Case(checkpoint, checkpoint.family.empty(checkpoint.config))

    return opened


def make_even(folder: Path) -> None:
    """Give a checkpoint tiles of 4 x 4 patches, not 5 x 5: of an even number of lines none may be left."""
    sizes = [[size // 5 * 4 for size in pair] for pair in tiny_tiles.NEXT_SIZES]
    tile = tiny_tiles.TILE // 5 * 4
    given = {"size": {"shortest_edge": tile}, "crop_size": {"height": tile, "width": tile}}
    for name in ("config.json", "preprocessor_config.json"):
        data = json.loads((folder / name).read_text(encoding="utf-8")) | {"image_grid_pinpoints": sizes}
        if name == "config.json":
            data["vision_config"]["image_size"] = tile
        else:
            data |= given
        (folder / name).write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture(scope="module")
def processor(case: Callable[[str], Case]) -> Callable[[str], Any]:
    """A function that opens a tiny checkpoint's own processor."""
    return cache(lambda shape: original.open_processor(case(shape).checkpoint.folder, case(shape).checkpoint.config))


class Rows:
    """A token table in which a token's row is its number."""

    def rows(self, ids: Sequence[int]) -> np.ndarray:
        """Return the rows (len(ids), D)."""
        return np.repeat(np.array(ids, np.float32).reshape(-1, 1), WIDTH, axis=1)


NEWLINE = Rows().rows([LINE_END])[0]


def rows_of(runs: list[ImageRun]) -> np.ndarray:
    """Return the embeddings (S, D) of runs, one behind another."""
    found = [np.empty((0, WIDTH), np.float32)]
    for run in runs:
        table = np.concatenate([*(np.asarray(crop.embeddings) for crop in run.crops), NEWLINE[None]])
        found.append(table[run.rows])  # -1 is the last.
    return np.concatenate(found)


def slow_pruned(case: Case, arrangement: Arrangement, size: tuple[int, int], kept: Kept) -> list[tuple[int, Any]]:
    """Return the kept tokens with their places in the unpruned image, line by line."""
    chosen = {(crop, token) for crop, tokens in enumerate(kept) for token in tokens}
    out: list[tuple[int, Any]] = []
    line: list[tuple[int, Any]] = []
    for place, token in enumerate(case.numbered(arrangement, size)):
        if token is None:
            # The whole image stands before the first line, and has no end.
            in_line = [one for one in line if one[1][0] > 0]
            out += [*line, (place, None)] if in_line else line
            line = []
        elif token in chosen:
            line.append((place, token))
    return out + line


def prompt_of(case: Case, ids: list[int], images: list[ImageFeatures], kept: str = "compact") -> Prompt:
    """Return the prompt of token ids and images."""
    rule = PositionRule(kept)  # type: ignore[arg-type]
    return assemble(compose(ids, IMAGE, images, case.layout), Rows(), rule, IMAGE, LINE_END)


@pytest.mark.parametrize("shape", MOSAICS)
def test_an_unpruned_picture_is_packed_as_the_model_does(case: Callable[[str], Case], shape: str) -> None:
    for size in SIZES:
        equals_the_model(case(shape), size)


@settings(max_examples=150, deadline=None)
@given(shape=st.sampled_from(MOSAICS), size=ROOM)
def test_an_unpruned_picture_of_any_size(case: Callable[[str], Case], shape: str, size: tuple[int, int]) -> None:
    equals_the_model(case(shape), size)


def equals_the_model(one: Case, size: tuple[int, int]) -> None:
    arrangement = one.arrange(size)
    features, image = one.features(arrangement), one.image(size)
    expected, runs = one.packed(features, size, NEWLINE), image_runs(image, one.layout)
    found = rows_of(runs)
    assert found.shape == expected.shape
    shrunk = len(expected) != len(one.numbered(arrangement, size))
    atol = tolerances.LAYOUT * np.abs(features).max() if shrunk else 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    ends = int((expected == NEWLINE).all(axis=1).sum())
    assert image_tokens(image, one.layout).kept == image_tokens(image, one.layout).total == len(expected) - ends
    for kept in ("compact", "original"):
        prompt = prompt_of(one, [1, *[IMAGE] * len(runs), 2], [image], kept)
        assert prompt.positions.tolist() == [list(range(len(expected) + 2))]
        np.testing.assert_array_equal(prompt.embeddings()[1:-1], found)
        assert least_positions(arrangement, one.layout, one.shape, one.shape.tokens, kept) == len(expected)


def test_some_pictures_are_shrunk_and_some_have_no_line(case: Callable[[str], Case]) -> None:
    """Or the tests above would show nothing of these."""
    one = case("llava_onevision/shrunk")
    assert image_tokens(one.image((640, 480)), one.layout).total < len(one.numbered(one.arrange((640, 480)), (640, 480)))
    inner = [case(shape).arrange(size).inner for shape in MOSAICS for size in [*SIZES, (1, 60)]]
    assert any(part and part[0] == part[1] for part in inner)
    assert any(part and part[2] == part[3] for part in inner)


def test_a_picture_shrinks_to_a_line_at_least() -> None:
    """Of a line that is longer than its limit allows the model could make none."""
    shape = CropShape((14, 14), (1, 1))
    tiles = [CropFeatures(np.full((1, WIDTH), at, np.float32), Pruning(1, None, 1, True, np.array([0]), np.zeros(1, np.float32),
             shape)) for at in range(6)]  # fmt: skip
    image = ImageFeatures(tuple(tiles), Arrangement((1, 6)))
    (run,) = image_runs(image, Layout(mosaic=True, row_end="end", limit=1))
    assert rows_of([run])[:, 0].tolist() == [1.0, 4.0, LINE_END]


@settings(max_examples=200, deadline=None)
@given(shape=st.sampled_from(SHAPES), size=st.sampled_from(SIZES) | ROOM, budget=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_pruned_image_equals_the_slow_lists(
    case: Callable[[str], Case], shape: str, size: tuple[int, int], budget: int, seed: int
) -> None:
    one = case(shape)
    budget = min(budget, one.shape.tokens - 1)
    arrangement, image = one.arrange(size), one.image(size, budget, seed)
    expected = slow_pruned(one, arrangement, size, one.kept(arrangement, budget, seed))
    features, runs = one.features(arrangement, seed), image_runs(image, one.layout)
    wanted = [NEWLINE if token is None else features[token] for _, token in expected]
    tokens = [11, *[IMAGE] * len(runs), 12]
    compact, given_places = prompt_of(one, tokens, [image]), prompt_of(one, tokens, [image], "original")
    np.testing.assert_array_equal(compact.embeddings()[1:-1], np.array(wanted, np.float32).reshape(-1, WIDTH))
    np.testing.assert_array_equal(given_places.embeddings(), compact.embeddings())
    count = len(one.numbered(arrangement, size))
    assert compact.positions.tolist() == [list(range(len(expected) + 2))]
    assert given_places.positions.tolist() == [[0, *(1 + place for place, _ in expected), count + 1]]
    assert given_places.next_position == count + 2
    written = least_positions(arrangement, one.layout, one.shape, one.shape.tokens, "compact")
    assert compact.ids == given_places.ids == (11, *[IMAGE] * written, 12)
    assert image_tokens(image, one.layout).kept == sum(token is not None for _, token in expected)
    assert least_positions(arrangement, one.layout, one.shape, budget, "original") == count


@settings(max_examples=100, deadline=None)
@given(shape=st.sampled_from(MOSAICS), size=ROOM, budget=st.integers(1, 24), seed=st.integers(0, 99))
def test_the_least_is_all_but_the_ends_of_lines(
    case: Callable[[str], Case], shape: str, size: tuple[int, int], budget: int, seed: int
) -> None:
    """Since padding is kept only where a tile has nothing else."""
    one = case(shape)
    budget, arrangement = min(budget, one.shape.tokens - 1), one.arrange(size)
    shown = {token for token in one.numbered(arrangement, size) if token is not None}
    every = np.random.default_rng(seed).permutation(one.shape.tokens).tolist()
    order = [sorted(every, key=lambda token, at=at: (at, token) not in shown) for at in range(arrangement.crops)]
    image = one.encoded(arrangement, [sorted(tokens[:budget]) for tokens in order], one.features(arrangement))
    least = least_positions(arrangement, one.layout, one.shape, budget, "compact")
    assert least == image_tokens(image, one.layout).kept
    assert budget <= least  # The whole image is never padded.


@pytest.mark.parametrize("shape", MOSAICS)
def test_several_images_of_a_prompt(case: Callable[[str], Case], shape: str) -> None:
    """Those of a OneVision are one crop each, with the end of a line."""
    one, sizes = case(shape), [(100, 333), (90, 90)]
    for budget in (4, one.shape.tokens):
        images = [one.image(size, budget, seed, among=2) for seed, size in enumerate(sizes)]
        runs = [len(image_runs(image, one.layout)) for image in images]
        ids = [11, *[IMAGE] * runs[0], 12, *[IMAGE] * runs[1], 13]
        prompt, rows = prompt_of(one, ids, images), [rows_of(image_runs(image, one.layout)) for image in images]
        text = Rows().rows([11, 12, 13])
        wanted = [text[:1], rows[0], text[1:2], rows[1], text[2:]]
        np.testing.assert_array_equal(prompt.embeddings(), np.concatenate(wanted))
        if not shape.startswith("llava_onevision"):
            continue
        assert runs == [1, 1]
        assert [len(found) for found in rows] == [budget + 1, budget + 1]
        if budget == one.shape.tokens:
            for image, size, found in zip(images, sizes, rows, strict=True):
                tokens = np.asarray(image.crops[0].embeddings)[None]
                np.testing.assert_array_equal(found, one.packed(tokens, size, NEWLINE))
        single = prompt_of(one, ids, images, "original")
        assert single.next_position == 3 + 2 * (one.shape.tokens + 1)
        least = [least_positions(image.arrangement, one.layout, one.shape, budget, "compact") for image in images]
        assert least == [budget + 1, budget + 1]


@pytest.mark.parametrize("size", [(84, 84), (60, 250), (250, 60), (200, 250), (1, 1)])
@pytest.mark.parametrize("shape", ["internvl", "smolvlm", "smolvlm/whole", "idefics3"])
def test_the_text_of_an_image_is_the_processors(
    case: Callable[[str], Case], processor: Callable[[str], Any], shape: str, size: tuple[int, int]
) -> None:
    """With one image token for each run, instead of one for each token."""
    one, theirs = case(shape), processor(shape)
    arrangement = one.arrange(size)
    holder = SimpleNamespace(**{name: value for name, value in vars(theirs).items() if isinstance(value, str)})
    holder.image_seq_len = holder.image_seq_length = 1
    given = {"rows": [[arrangement.tiles[0]]], "cols": [[arrangement.tiles[1]]], "num_patches": [arrangement.crops]}
    expected = type(theirs).replace_image_token(holder, given, 0)
    assert one.layout.text(arrangement, theirs.image_token) == expected
    assert expected.count(theirs.image_token) == len(image_runs(one.image(size), one.layout)) == arrangement.crops


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ids_of_a_prompt_are_the_processors(
    case: Callable[[str], Case], processor: Callable[[str], Any], shape: str
) -> None:
    """Of the whole way: text, seams and all placeholders. In the SmolVLM's tokenizer two line breaks are one token."""
    one, theirs = case(shape), processor(shape)
    tokenizer = Tokenizer.from_file(str(one.checkpoint.folder / "tokenizer.json"))
    for sizes in ([(140, 300)], [(300, 90)], [(84, 84)], [(200, 90), (50, 50)]):
        text = "USER: " + "".join(f"\n<image>\n\n{at}" for at in range(len(sizes))) + "\n\nWhat?"
        pictures = [Image.new("RGB", size[::-1]) for size in sizes]
        expected = theirs(text=[text], images=[pictures], return_tensors="np")["input_ids"][0]
        images = [one.image(size, among=len(sizes)) for size in sizes]
        ids = tokenizer.encode(one.layout.expand(text, "<image>", [image.arrangement for image in images])).ids
        assert prompt_of(one, ids, images).ids == tuple(expected)
        assert len(prompt_of(one, ids, images)) == len(expected)
    if shape in ("smolvlm", "idefics3"):
        assert tokenizer.token_to_id("ĊĊ") in expected


def test_a_layout_with_everything() -> None:
    layout = Layout("<", ">", "[{row},{column}]", "/", "thumb:", "whole:", row_end="end")
    assert layout.text(Arrangement(), "I") == "<whole:I>"
    assert layout.text(Arrangement((2, 2)), "I") == "<[1,1]I[1,2]I/[2,1]I[2,2]I/>"
    assert layout.text(Arrangement((1, 2), "first"), "I") == "<thumb:I[1,1]I[1,2]I/>"
    assert layout.text(Arrangement((1, 2), "last"), "I") == "<[1,1]I[1,2]I/thumb:I>"
    assert replace(layout, mosaic=True).text(Arrangement((2, 2), "last"), "I") == "<Ithumb:I>"
    assert layout.expand("a I b I c", "I", [Arrangement(), Arrangement((1, 1))]) == "a <whole:I> b <[1,1]I/> c"


@pytest.mark.parametrize(
    "text", ["{row.__class__}", "{row!r:>99999999}", "{0}", "{", "{column}{row}{row}", "%s", "\\1", "{{row}}"]
)
def test_hostile_texts_of_a_layout_are_text(text: str) -> None:
    names = ("before", "after", "before_tile", "after_row", "before_thumbnail", "before_whole")
    layout = read(Layout, dict.fromkeys(names, text), "manifest", ManifestError)
    filled = text.replace("{row}", "1").replace("{column}", "1")
    assert layout.text(Arrangement((1, 1), "last"), "I") == f"{text}{filled}I{text}{text}I{text}"
    assert layout.text(Arrangement(), "I") == f"{text}{text}I{text}"
    assert read(Layout, json.loads(json.dumps(plain(layout))), "manifest", ManifestError) == layout


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"before": None}, "before is null; it must be a string"),
        ({"mosaic": 1}, "mosaic is 1; it must be true or false"),
        ({"limit": 0}, "limit is 0; it must be from 1"),
        ({"limit": 1.5}, "limit is 1.5"),
        ({"row_end": 5}, "row_end is 5"),
        ({"between": ""}, 'it has the key "between"'),
    ],
)
def test_layouts_that_are_none_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        read(Layout, plain(Layout()) | changes, "manifest", ManifestError)


@pytest.mark.parametrize(
    "changes",
    [
        {"start_image_token": "<v>"},
        {"extra_special_tokens": {"start_image_token": "<v>"}},
        {"extra_special_tokens": {"start_image_token": "<v>"}, "start_image_token": "<img>"},
        {"start_image_token": {"__type": "AddedToken", "content": "<v>", "special": True, "lstrip": False, "rstrip": False,
                               "normalized": False, "single_word": False}},
    ],
)  # fmt: skip
def test_marks_are_read_as_transformers_does(case: Callable[[str], Case], tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = case("internvl").checkpoint.folder
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert named_token(config, "start_image_token", "<img>") == theirs.start_image_token == "<v>"
    assert named_token(config, "nobodys_token", "<img>") == "<img>"
    with pytest.raises(UnsupportedModelError, match="must be a text"):
        named_token({"start_image_token": 7}, "start_image_token", "<img>")
