"""DeepStack: planes of image tokens that a decoder adds behind its first layers, gathered with the kept tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sizes
import torch
from original_sizes import SizedOriginal, pictures

from leanvlm.exporter import ExportConfig, export, tolerances
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.reference import relative_difference
from leanvlm.runtime import load
from leanvlm.runtime.errors import ManifestError, UnsupportedModelError
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.session import Session, user_message

PLANES = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sizes.TINY["qwen3_vl"](tmp_path_factory.mktemp("deep") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "bundle"
    export(ExportConfig(str(checkpoint), (6,), folder, image_sizes=tiny_sizes.sizes(checkpoint)[:1]))
    return folder


def logits(session: Session, without: int | None = None) -> Any:
    """Return the first logits of an answer about an unpruned picture, or with one plane of its tokens made zeros."""
    (encoded,) = session.encode_images([pictures()[0]], max(session.manifest.budgets))
    if without is not None:
        rows, width = np.array(encoded.crops[0].embeddings), session.manifest.decoder.hidden_size
        rows[:, (1 + without) * width : (2 + without) * width] = 0.0
        encoded = replace(encoded, crops=(replace(encoded.crops[0], embeddings=rows),))
    prompt = session.prompt(session.prompt_ids([user_message("What is there?", 1)], 1), [encoded])
    sequence = session.decoder().sequence(len(prompt))
    sequence.load(prompt)
    return sequence.prefill().logits()


def test_logits_are_transformers_and_every_plane_counts(checkpoint: Path, bundle: Path) -> None:
    with load(bundle) as session:
        decoder = session.manifest.decoder
        assert (decoder.planes, decoder.row_width) == (PLANES, (1 + PLANES) * decoder.hidden_size)
        height, width = session.manifest.crops.shapes[0].pixels
        original = SizedOriginal.open(checkpoint)
        inputs = original.inputs("What is there?", pictures()[0].resize((width, height)))
        with torch.no_grad():
            wanted = original.model(**inputs, logits_to_keep=1).logits[0, 0].numpy()
        found = logits(session)
        assert relative_difference(found, wanted) < tolerances.LOGITS["fp32"]
        for plane in range(PLANES):
            assert relative_difference(logits(session, without=plane), wanted) > 100 * tolerances.LOGITS["fp32"]


def test_a_plane_that_the_decoder_drops_is_seen(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the model builder would drop all of them, without a word."""
    from leanvlm.exporter.decoders import genai
    from leanvlm.exporter.decoders.in_memory import in_memory
    from leanvlm.runtime.errors import VerificationError

    def dropping(*given: Any) -> type:
        made: Any = in_memory(*given)

        class Dropping(made):  # type: ignore[misc]
            def make_add(self, name: str, inputs: Any, *rest: Any, **more: Any) -> None:
                if name == "/model/planes/1/Add":
                    inputs = [inputs[0], "/model/planes/0"]
                super().make_add(name, inputs, *rest, **more)

        return Dropping

    monkeypatch.setattr(genai, "in_memory", dropping)
    config = ExportConfig(str(checkpoint), (6,), tmp_path / "out", image_sizes=tiny_sizes.sizes(checkpoint)[:1])
    with pytest.raises(VerificationError, match="decoder at budget"):
        export(config)


@pytest.mark.parametrize("listed", [[2, 0], [0, 4], [1, 1]])
def test_blocks_that_make_no_planes_are_refused(tmp_path: Path, listed: Any) -> None:
    opened = open_checkpoint(ExportConfig(str(tiny_sizes.TINY["qwen3_vl"](tmp_path / "checkpoint"))))
    opened.config.vision_config.deepstack_visual_indexes = listed
    with pytest.raises(UnsupportedModelError, match="deepstack_visual_indexes"):
        opened.family.describe(opened.config)


def test_a_manifest_whose_planes_do_not_fit_is_refused(bundle: Path) -> None:
    with load(bundle) as session:
        data = session.manifest.to_dict()
    data["decoder"]["planes"] = 1
    with pytest.raises(ManifestError, match="inputs_embeds is"):
        Manifest.from_dict(data)
