"""Original position ids: the decoder with gaps in them, against transformers given the same ids and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLModel

from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import Session, load
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.crops import Arrangement, CropShape
from leanvlm.runtime.errors import ContextOverflowError, ManifestError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, Layout
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.prompt import Prompt, assemble, compose
from leanvlm.runtime.session import user_message

NEW_TOKENS = 16
BUDGET = 16


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("positions") / "original"
    export(ExportConfig(str(tiny_llava), (BUDGET,), output, positions="original"))
    return output


SHAPE = CropShape((28, 42), (2, 3))


class Rows:
    """A token table in which a token's row is its number."""

    def rows(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the rows (len(ids), 3)."""
        return np.repeat(np.array(ids, np.float32)[:, None], 3, axis=1)


def _image(kept: list[int], shape: CropShape = SHAPE) -> ImageFeatures:
    attention = np.zeros(shape.tokens, np.float32)
    pruning = Pruning(len(kept), 1.0, len(kept), True, np.array(kept), attention, shape)
    return ImageFeatures((CropFeatures(np.full((len(kept), 3), 100.0, np.float32) + np.array(kept)[:, None], pruning),))


def _prompt(rule: PositionRule) -> Prompt:
    return assemble(compose([5, 6, 1, 7, 1, 8, 9], 1, [_image([0, 4]), _image([1])], Layout()), Rows(), rule, 1)


def test_positions_of_two_images_and_text() -> None:
    original, compact = _prompt(PositionRule("original")), _prompt(PositionRule("compact"))
    assert original.positions.tolist() == [[0, 1, 2, 6, 8, 10, 15, 16]]
    assert original.next_position == 17
    assert compact.positions.tolist() == [list(range(8))]
    assert compact.next_position == 8
    for prompt in (original, compact):
        assert prompt.embeddings()[:, 0].tolist() == [5, 6, 100, 104, 7, 101, 8, 9]
        assert list(prompt.ids) == [5, 6, *[1] * 6, 7, *[1] * 6, 8, 9]


def test_an_image_stands_between_what_its_layout_says() -> None:
    layout = Layout(before="<[", after=">")
    text = layout.expand("ab*c*de", "*", [Arrangement()] * 2)
    assert text == "ab<[*>c<[*>de"
    ids = {"a": 5, "b": 6, "<": 20, "[": 21, "*": 1, ">": 22, "c": 7, "d": 8, "e": 9}
    runs = compose([ids[letter] for letter in text], 1, [_image([0, 4]), _image([1])], layout)
    prompt = assemble(runs, Rows(), PositionRule("compact"), 1)
    assert prompt.embeddings()[:, 0].tolist() == [5, 6, 20, 21, 100, 104, 22, 7, 20, 21, 101, 22, 8, 9]
    assert list(prompt.ids) == [5, 6, 20, 21, *[1] * 6, 22, 7, 20, 21, *[1] * 6, 22, 8, 9]
    nothing = assemble(compose([], 1, [], Layout()), Rows(), PositionRule("compact"), 1)
    assert (len(nothing), nothing.next_position) == (0, 0)


def test_a_token_before_the_grid_counts_as_one() -> None:
    shape = CropShape((28, 42), (2, 3), leading=1)
    assert shape.tokens == 7
    prompt = assemble(compose([1, 5], 1, [_image([0, 3], shape)], Layout()), Rows(), PositionRule("original"), 1)
    assert prompt.positions.tolist() == [[0, 3, 7]]


def test_three_axes_are_those_of_qwen2_vl() -> None:
    """Two images of different grids, unpruned, against transformers; then some of their tokens."""
    shapes = [CropShape((56, 84), (2, 3)), CropShape((112, 56), (4, 2))]
    config = Qwen2VLConfig(text_config={"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 2000},
                           vision_config={"depth": 1, "embed_dim": 8, "num_heads": 1}, image_token_id=1)  # fmt: skip
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    images = [_image(list(range(shape.tokens)), shape) for shape in shapes]
    rule = PositionRule("original", axes=3, image="grid")
    whole = assemble(compose([5, 6, 1, 7, 1, 8, 9], 1, images, Layout()), Rows(), rule, 1)
    ids = torch.tensor([whole.ids])
    grids = torch.tensor([[1, 2 * shape.grid[0], 2 * shape.grid[1]] for shape in shapes])
    wanted, delta = model.get_rope_index(ids, mm_token_type_ids=(ids == 1).int(), image_grid_thw=grids)
    assert whole.positions.tolist() == wanted[:, 0].tolist()
    assert whole.next_position == len(whole) + int(delta)
    kept = [[1, 5], [0, 3, 6]]
    some = [_image(indices, shape) for indices, shape in zip(kept, shapes, strict=True)]
    pruned = assemble(compose([5, 6, 1, 7, 1, 8, 9], 1, some, Layout()), Rows(), rule, 1)
    stays = [0, 1, 3, 7, 8, 9, 12, 15, 17, 18]
    assert pruned.positions.tolist() == wanted[:, 0, stays].tolist()
    assert pruned.next_position == whole.next_position


@pytest.mark.parametrize("fields", [("compact", 3, "grid"), ("original", 1, "grid"), ("original", 3, "line")])
def test_rules_that_mean_nothing_are_refused(fields: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ManifestError, match="do not go together"):
        PositionRule(*fields)


@pytest.mark.parametrize("prompt", ["What is on the table?", "Count the red cups, please."])
def test_greedy_tokens_equal_transformers_with_the_same_ids(bundle: Path, tiny_llava: Path, prompt: str) -> None:
    assert read_manifest(bundle).positions == PositionRule("original")
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    with load(bundle) as session:
        answer = session.generate(prompt, image, max_new_tokens=NEW_TOKENS, ignore_end=True)
        ids = session.prompt_ids([user_message(prompt, 1)], 1)
        spliced = session.prompt(ids, session.encode_images([image], BUDGET))
    assert (np.diff(spliced.positions[0]) > 1).any(), "nothing was pruned, so nothing is tested"
    assert list(answer.token_ids) == _greedy(model, spliced.embeddings(), spliced.positions[0], spliced.next_position)
    compact = _greedy(model, spliced.embeddings(), np.arange(len(spliced.positions[0])), len(spliced.positions[0]))
    assert list(answer.token_ids) != compact, "positions made no difference, so the test cannot tell them apart"


@torch.no_grad()
def _greedy(model: Any, embeddings: Any, positions: Any, following: int) -> list[int]:
    """Decode without a cache: one pass over the whole sequence for every token."""
    sequence, taken, tokens = torch.from_numpy(embeddings), list(positions), []
    table = model.get_input_embeddings()
    for step in range(NEW_TOKENS):
        out = model.model.language_model(
            inputs_embeds=sequence[None], position_ids=torch.tensor([taken]), use_cache=False,
            attention_mask=torch.ones(1, len(taken), dtype=torch.long),
        )  # fmt: skip
        tokens.append(int(model.lm_head(out.last_hidden_state[0, -1]).argmax()))
        sequence = torch.cat([sequence, table(torch.tensor([tokens[-1]]))])
        taken.append(following + step)
    return tokens


def test_full_budget_equals_compact_positions(bundle: Path, tiny_llava: Path, tmp_path: Path) -> None:
    export(ExportConfig(str(tiny_llava), (BUDGET,), tmp_path / "compact"))
    image = np.random.default_rng(2).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    answers = []
    for folder in (bundle, tmp_path / "compact"):
        with load(folder) as session:
            answers.append(_ids(session, image))
    assert answers[0] == answers[1]


def _ids(session: Session, image: Any) -> tuple[int, ...]:
    return session.generate("Why?", image, budget=tiny.TOKENS, max_new_tokens=NEW_TOKENS, ignore_end=True).token_ids


def test_context_counts_positions_not_cache_entries(bundle: Path) -> None:
    """The rotary table ends at the context length, so dropped tokens still count."""
    image = np.zeros((50, 50, 3), np.uint8)
    with load(bundle) as session:
        ids = session.prompt_ids([user_message("Why?", 1)], 1)
        room = 1024 - (len(ids) - 1 + tiny.TOKENS)
        assert len(session.generate("Why?", image, max_new_tokens=room, ignore_end=True).token_ids) == room
        with pytest.raises(ContextOverflowError, match="1025"):
            session.generate("Why?", image, max_new_tokens=room + 1)
