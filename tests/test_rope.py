"""Rotary scalings: both decoders against transformers, out to the last position of the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.exporter.decoders import ROPE_TYPES, check_decoder, context_length
from leanvlm.exporter.decoders.genai import build_decoder
from leanvlm.exporter.decoders.portable import PortableDecoder
from leanvlm.exporter.reference import relative_difference
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.positions import PositionRule

CONTEXT = 512
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT // 4},
    "longrope": {
        "short_factor": [1.0 + 0.1 * index for index in range(8)], "long_factor": [2.0 + index for index in range(8)],
        "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": CONTEXT // 8,
    },
}  # fmt: skip


def test_every_scaling_that_is_let_through_is_tested() -> None:
    assert set(ROPES) == set(ROPE_TYPES)


def scaled(tiny_llava: Path, rope: str) -> tuple[Checkpoint, Any]:
    """The tiny checkpoint with a scaling, and its decoder."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    text = checkpoint.config.text_config
    text.max_position_embeddings = CONTEXT
    text.rope_parameters = {"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]}
    return checkpoint, checkpoint.family.parts(load_model(checkpoint)).decoder


@torch.no_grad()
def run(decoder: Any, embeddings: Any) -> Any:
    return decoder(inputs_embeds=torch.from_numpy(embeddings)[None], use_cache=False, logits_to_keep=1).logits[0, 0].numpy()


def lengths(checkpoint: Checkpoint) -> tuple[int, ...]:
    context = context_length(checkpoint.config.text_config)
    return 3, CONTEXT // 4, context


def sequence(length: int) -> Any:
    return np.random.default_rng(length).normal(size=(length, 128)).astype(np.float32)


@pytest.mark.parametrize("rope", ROPES)
def test_the_built_decoder_turns_as_transformers_does(tiny_llava: Path, tmp_path: Path, rope: str) -> None:
    checkpoint, decoder = scaled(tiny_llava, rope)
    check_decoder(checkpoint.config.text_config, "cpu")
    path = build_decoder(
        decoder,
        checkpoint,
        target="cpu",
        precision="fp32",
        positions=PositionRule("compact"),
        folder=tmp_path,
        scratch=tmp_path / "scratch",
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for length in lengths(checkpoint):
        embeddings = sequence(length)
        caches = {i.name: np.zeros((1, 4, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past_key")}
        given = {"inputs_embeds": embeddings[None], "attention_mask": np.ones((1, length), np.int64), **caches}
        found = session.run(["logits"], given)[0][0, -1]
        assert relative_difference(found, run(decoder, embeddings)) < tolerances.TINY_LOGITS, length


@pytest.mark.parametrize("rope", ROPES)
def test_the_portable_decoder_turns_as_transformers_does(tiny_llava: Path, rope: str) -> None:
    """As a module: that its trace computes the same is the matter of test_portable."""
    checkpoint, decoder = scaled(tiny_llava, rope)
    portable = PortableDecoder(decoder, fused=False)
    caches = [torch.zeros(1, 4, 0, 16)] * (2 * checkpoint.config.text_config.num_hidden_layers)
    for length in lengths(checkpoint):
        embeddings = sequence(length)
        given = torch.arange(length)[None], torch.tensor([0]), torch.tensor([length - 1])
        with torch.no_grad():
            found = portable(torch.from_numpy(embeddings)[None], *given, *caches)[0][0, 0].numpy()
        assert relative_difference(found, run(decoder, embeddings)) < tolerances.TINY_LOGITS, length


def test_angles_keep_their_precision_in_a_narrow_decoder(tiny_llava: Path) -> None:
    """Half precision has 11 bits: at position 500 a frequency so rounded is off by a tenth of a radian."""
    _, decoder = scaled(tiny_llava, "default")
    positions = torch.tensor([[CONTEXT - 1]])
    wide = PortableDecoder(decoder, fused=False).rotation(positions, torch.float32)
    narrow = PortableDecoder(decoder.half(), fused=False).rotation(positions, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(wide, narrow, strict=True))


@pytest.mark.parametrize("rope", ["proportional", "su"])
def test_other_scalings_are_refused_by_name(tiny_llava: Path, rope: str) -> None:
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    text.rope_parameters = {"rope_type": rope, "rope_theta": 10_000.0}
    with pytest.raises(UnsupportedModelError, match=f"rope type '{rope}' is not supported; supported: default, linear"):
        check_decoder(text, "cpu")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"sliding_window": "wide"}, "sliding_window 'wide' is not a number of tokens"),
        ({"attention_chunk_size": 0}, "attention_chunk_size 0 is not a number of tokens"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported; supported: silu"),
    ],
)
def test_what_a_decoder_does_not_do_is_refused_by_name(tiny_llava: Path, changed: dict[str, Any], words: str) -> None:
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    with pytest.raises(UnsupportedModelError, match=words):
        check_decoder(type(text)(**text.to_dict() | changed), "cpu")


def test_a_context_ends_where_a_decoder_would_forget(tiny_llava: Path) -> None:
    """A Llama's cache in transformers forgets what is behind a window; one as long as the context forgets nothing."""
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    kinds = {"layer_types": ["full_attention"] * 3}
    for changed, wanted in (
        ({}, 1024),
        ({"sliding_window": 2048}, 1024),
        ({"sliding_window": 300}, 300),
        ({"sliding_window": 300, **kinds}, 1024),
        ({"attention_chunk_size": 200, "sliding_window": 300}, 200),
    ):
        assert context_length(type(text)(**text.to_dict() | changed)) == wanted
