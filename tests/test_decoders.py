"""Every decoder against transformers: the portable one as a module, the built one with positions of its own; and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.exporter.decoders import DECODERS, check_decoder, kv_heads, token_rows
from leanvlm.exporter.decoders.genai import build_decoder
from leanvlm.exporter.decoders.portable import PortableDecoder
from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.targets import TARGETS
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.positions import PositionRule

LENGTH = 20


@pytest.fixture(scope="module", params=[*tiny.TINY, "mistral3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    """A tiny checkpoint, and its decoder."""
    folder = tiny.EVERY[request.param](tmp_path_factory.mktemp("decoder") / "checkpoint")
    checkpoint = open_checkpoint(ExportConfig(str(folder)))
    return checkpoint, checkpoint.family.parts(load_model(checkpoint)).decoder


def embeddings(decoder: Any) -> torch.Tensor:
    return torch.randn(1, LENGTH, decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))


def positions() -> torch.Tensor:
    """Ascending, with gaps, as original positions are."""
    return torch.arange(LENGTH)[None] * 2 + 3


@torch.no_grad()
def wanted(decoder: Any, positions: torch.Tensor) -> np.ndarray[Any, Any]:
    # Without a mask transformers reads gaps in the positions as the borders of packed sequences.
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    given = {"inputs_embeds": embeddings(decoder), "position_ids": positions, "attention_mask": mask}
    out = decoder(**given, use_cache=False, logits_to_keep=1)
    found: np.ndarray[Any, Any] = out.logits[0, 0].numpy()
    return found


def test_the_portable_decoder_equals_the_model_or_is_refused(loaded: tuple[Checkpoint, Any]) -> None:
    checkpoint, decoder = loaded
    text = checkpoint.config.text_config
    if not DECODERS[text.model_type].is_portable:
        with pytest.raises(
            UnsupportedModelError, match=rf"a '{text.model_type}' decoder is not written for tensorrt; .*: cpu, cuda"
        ):
            check_decoder(text, "tensorrt")
        return
    check_decoder(text, "tensorrt")
    portable = PortableDecoder(decoder, fused=False)
    caches = [torch.zeros(1, kv_heads(text), 0, 16)] * (2 * text.num_hidden_layers)
    with torch.no_grad():
        logits, *_ = portable(embeddings(decoder), positions(), torch.tensor([0]), torch.tensor([LENGTH - 1]), *caches)
    assert relative_difference(logits[0, 0].numpy(), wanted(decoder, positions())) < tolerances.TINY_LOGITS


def test_the_built_decoder_equals_the_model_at_original_positions(loaded: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    checkpoint, decoder = loaded
    expected = wanted(decoder, positions())
    assert relative_difference(built(checkpoint, decoder, tmp_path), expected) < tolerances.TINY_LOGITS


def built(checkpoint: Checkpoint, decoder: Any, folder: Path) -> Any:
    """Build a decoder for the processor in fp32 and return its logits at original positions."""
    path = build_decoder(
        decoder,
        checkpoint,
        target="cpu",
        precision="fp32",
        positions=PositionRule("original"),
        folder=folder,
        scratch=folder / "scratch",
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    text = checkpoint.config.text_config
    shape = (1, kv_heads(text), 0, text.head_dim)
    caches = {i.name: np.zeros(shape, np.float32) for i in session.get_inputs() if i.name.startswith("past_key")}
    given = {"inputs_embeds": embeddings(decoder).numpy(), "attention_mask": np.ones((1, LENGTH), np.int64)}
    return session.run(["logits"], {**given, "position_ids": positions().numpy(), **caches})[0][0, -1]


@pytest.mark.parametrize("shape", ["llava/layers", "llava/gemma2", "llava/gemma3", "llava"])
def test_weights_of_half_precision_are_those_of_a_wider_model(shape: str, tmp_path: Path) -> None:
    """Norms of 1 + w too: in bfloat16 the sum would be rounded to 8 bits."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.EVERY[shape](tmp_path / "checkpoint"))))
    decoder: Any = checkpoint.family.parts(load_model(checkpoint)).decoder
    for weight in decoder.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    found = built(checkpoint, decoder, tmp_path)
    for weight in decoder.parameters():
        weight.data = weight.data.float()
    assert relative_difference(found, wanted(decoder, positions())) < tolerances.TINY_LOGITS


def test_token_rows_are_what_the_model_embeds(loaded: tuple[Checkpoint, Any]) -> None:
    _, decoder = loaded
    ids = torch.tensor([5, 0, 9, 5])
    with torch.no_grad():
        expected = decoder.get_input_embeddings()(ids)
    assert torch.equal(token_rows(decoder, ids), expected)
    assert torch.equal(token_rows(decoder)[ids], expected)


def test_the_head_size_that_is_possible_is_the_targets(tiny_llava: Path) -> None:
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    text.head_dim = 24
    for target, record in TARGETS.items():
        if record.decoder == "portable":
            check_decoder(text, target)
        else:
            words = f"the decoder's heads are 24 wide; the attention of {target} wants a multiple of 16"
            with pytest.raises(UnsupportedModelError, match=words):
                check_decoder(text, target)


def test_numbers_that_a_configuration_leaves_out(tiny_llava: Path) -> None:
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    assert kv_heads(text) == 4
    text.num_key_value_heads = None
    assert kv_heads(text) == text.num_attention_heads == 8


def test_an_unknown_decoder_is_refused_with_those_that_there_are(tiny_llava: Path) -> None:
    text = open_checkpoint(ExportConfig(str(tiny_llava))).config.text_config
    text.model_type = "opt"
    with pytest.raises(
        UnsupportedModelError, match="a 'opt' decoder is not supported; supported: gemma, gemma2, gemma3_text, llama"
    ):
        check_decoder(text, "cpu")
