"""Original position ids: the decoder with gaps in them, against transformers given the same ids and a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import LlavaForConditionalGeneration

from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import Session, load
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.errors import ContextOverflowError
from leanvlm.runtime.manifest import read_manifest
from leanvlm.runtime.session import user_message
from leanvlm.runtime.splice import ImageFeatures, splice

NEW_TOKENS = 16
BUDGET = 16


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("positions") / "original"
    export(ExportConfig(str(tiny_llava), (BUDGET,), output, positions="original"))
    return output


def _image(kept: list[int], total: int, width: int) -> ImageFeatures:
    pruning = Pruning(len(kept), total, 1.0, len(kept), True, np.array(kept), np.zeros(total, np.float32))
    return ImageFeatures(np.full((len(kept), width), 7.0, np.float32), pruning)


def test_positions_of_two_images_and_text() -> None:
    text = [np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32), np.zeros((2, 3), np.float32)]
    images = [_image([0, 4], 5, 3), _image([1], 5, 3)]
    original = splice(text, images, "original")
    assert original.positions.tolist() == [0, 1, 2, 6, 7, 9, 13, 14]
    assert original.next_position == 15
    compact = splice(text, images, "compact")
    assert compact.positions.tolist() == list(range(8))
    assert compact.next_position == 8
    np.testing.assert_array_equal(original.embeddings(), compact.embeddings())


@pytest.mark.parametrize("prompt", ["What is on the table?", "Count the red cups, please."])
def test_greedy_tokens_equal_transformers_with_the_same_ids(bundle: Path, tiny_llava: Path, prompt: str) -> None:
    assert read_manifest(bundle).positions == "original"
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    with load(bundle) as session:
        answer = session.generate(prompt, image, max_new_tokens=NEW_TOKENS, ignore_end=True)
        ids = session.prompt_ids([user_message(prompt, 1)], 1)
        spliced = session.splice(ids, session.encode_images([image], BUDGET))
    assert (np.diff(spliced.positions) > 1).any(), "nothing was pruned, so nothing is tested"
    assert list(answer.token_ids) == _greedy(model, spliced.embeddings(), spliced.positions, spliced.next_position)
    compact = _greedy(model, spliced.embeddings(), np.arange(len(spliced.positions)), len(spliced.positions))
    assert list(answer.token_ids) != compact, "positions made no difference, so the test cannot tell them apart"


@torch.no_grad()
def _greedy(model: Any, embeddings: Any, positions: Any, following: int) -> list[int]:
    """Decode without a cache: one pass over the whole sequence for every token."""
    sequence, places, tokens = torch.from_numpy(embeddings), list(positions), []
    table = model.get_input_embeddings()
    for step in range(NEW_TOKENS):
        out = model.model.language_model(
            inputs_embeds=sequence[None], position_ids=torch.tensor([places]), use_cache=False,
            attention_mask=torch.ones(1, len(places), dtype=torch.long),
        )  # fmt: skip
        tokens.append(int(model.lm_head(out.last_hidden_state[0, -1]).argmax()))
        sequence = torch.cat([sequence, table(torch.tensor([tokens[-1]]))])
        places.append(following + step)
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
