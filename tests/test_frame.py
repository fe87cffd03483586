"""What a family is made of, where its checkpoint's names may stand, and what is said of it to users."""

from __future__ import annotations

import ast
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn
from transformers import AutoModelForImageTextToText

import leanvlm.calibration
import leanvlm.exporter
import leanvlm.runtime
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.config import ALIASES
from leanvlm.exporter.decoders import DECODERS, context_length
from leanvlm.exporter.families import ARCHITECTURES, FAMILIES
from leanvlm.exporter.plan import plan
from leanvlm.exporter.targets import TARGETS
from leanvlm.runtime.errors import LeanVLMWarning
from leanvlm.runtime.manifest import PRECISIONS
from leanvlm.runtime.manifest import TARGETS as NAMES

README = Path(__file__).parents[1] / "README.md"
# Only these may name what a checkpoint calls its parts.
FREE = ("families", "towers")
FAMILY_LINES = 250


def sources() -> list[Path]:
    """Return the files that work for every family alike."""
    roots = [Path(part.__path__[0]) for part in (leanvlm.calibration, leanvlm.exporter, leanvlm.runtime)]
    files = [file for root in roots for file in sorted(root.rglob("*.py")) if file.parent.name not in FREE]
    assert len(files) > 60
    return files


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the tiny checkpoints call the parts that are no decoder's; single words that mean other things too left out."""
    found: set[str] = set()
    decoders: set[str] = set()
    for shape, save in tiny.TINY.items():
        checkpoint = open_checkpoint(ExportConfig(str(save(tmp_path_factory.mktemp("names") / shape.replace("/", "-")))))
        model = checkpoint.family.empty(checkpoint.config)
        found |= _parts_of(model)
        decoders |= _parts_of(checkpoint.family.parts(model).decoder)
    return {name for name in found - decoders if "_" in name} | {"encoder.layers"}


def _parts_of(module: nn.Module) -> set[str]:
    paths = [*dict(module.named_modules()), *dict(module.named_parameters())]
    return {part for path in paths for part in path.split(".") if not part.isdigit()} - {"weight", "bias", "model", "lm_head"}


def named(source: str, names: set[str]) -> Iterator[str]:
    """Yield each of `names` that a program uses, as an attribute or in a text that is no docstring."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            used = node.value
        else:
            continue
        yield from (name for name in names if re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", used))


def test_a_checkpoints_names_stand_in_its_family_and_tower_alone(names: set[str]) -> None:
    assert {"vision_tower", "multi_modal_projector", "language_model", "patch_embedding", "pre_layrnorm"} <= names
    found = {(file.name, name) for file in sources() for name in named(file.read_text(encoding="utf-8"), names)}
    assert not found


def test_the_runtime_knows_no_model() -> None:
    """What it does for one is data in the manifest."""
    known = re.compile("|".join({*FAMILIES, *DECODERS, "siglip", "CLIP"}), re.IGNORECASE)
    wrong = set()
    for file in Path(leanvlm.runtime.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else getattr(node, "name", None)
            if isinstance(text, str) and known.search(text.replace("clip", "")):
                wrong.add(f"{file.name}: {text[:40]}")
    assert not wrong


@pytest.mark.parametrize(
    "planted",
    [
        "hidden = core.vision_tower(pixels)",
        "features = getattr(model, 'multi_modal_projector')(hidden)",
        "block = next(m for n, m in tower.named_modules() if n.endswith(f'encoder.layers.{block}.self_attn'))",
        "embedded = tower.embeddings.patch_embedding(pixels)",
        "decoder = model.model.language_model.layers[0]",
    ],
)
def test_a_name_that_is_planted_is_found(names: set[str], planted: str) -> None:
    assert set(named(planted, names))
    assert not set(named(f'"""{planted}"""', names))


def test_family_files_are_short() -> None:
    folder = Path(leanvlm.exporter.__path__[0]) / "families"
    lengths = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in folder.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > FAMILY_LINES} == {}


def test_every_family_has_a_tiny_checkpoint_and_an_architecture() -> None:
    assert {name.split("/")[0] for name in tiny.TINY} == set(FAMILIES)
    assert set(ARCHITECTURES.values()) == set(FAMILIES)


def test_every_decoder_has_a_tiny_checkpoint(tmp_path: Path) -> None:
    for shape, save in tiny.TINY.items():
        save(tmp_path / shape)
    configs = [json.loads((tmp_path / shape / "config.json").read_text()) for shape in tiny.TINY]
    assert {config["text_config"]["model_type"] for config in configs} == set(DECODERS)


def test_every_target_has_a_record() -> None:
    assert tuple(TARGETS) == NAMES
    assert set(TARGETS) == set(PRECISIONS)


def rows() -> dict[str, list[str]]:
    """Return the README's table of families: `model_type` to its cells."""
    table = README.read_text(encoding="utf-8").partition("| family |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {re.findall(r"`([\w]+)`", row[0])[0]: row for row in cells}


def test_every_family_has_a_row_with_aliases_and_a_word_on_licences() -> None:
    found = rows()
    assert set(found) == set(FAMILIES)
    for family, cells in found.items():
        assert len(cells) == 5
        assert all(cells), family
        assert "licen" in cells[4].lower(), family
    listed = [alias for cells in found.values() for alias in re.findall(r"`([\w.-]+)`", cells[3])]
    assert sorted(listed) == sorted(ALIASES)
    assert all(re.findall(r"`([\w.-]+)`", cells[3]) for cells in found.values())


def test_every_decoder_is_in_the_readme() -> None:
    for family, cells in rows().items():
        assert set(DECODERS) <= set(re.findall(r"`([\w]+)`", cells[2])), family


# Sizes of the checkpoints behind the aliases: hidden, inner, layers, heads, key and value heads, context, tokens and what else.
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064, "rms_norm_eps": 1e-5}
SIZES: dict[str, dict[str, Any]] = {
    "llava": VICUNA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llava-13b": VICUNA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "bakllava": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
        "vocab_size": 32064,
    },
    "llava-llama3": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
        "vocab_size": 128_320,
    },
}  # fmt: skip
SIZES["llava-7b"] = SIZES["llava"]
PARAMETERS = {"llava": 6.6e9, "llava-7b": 6.6e9, "llava-13b": 12.9e9, "bakllava": 7.1e9, "llava-llama3": 7.5e9}
CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
def test_what_an_alias_names_is_configuration_only(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sizes are planned, with no code of their own and no memory: what the decoder will weigh is known."""
    folder = tiny.llava(tmp_path / "checkpoint")
    tiny.image_processor(336).save_pretrained(folder)
    tiny.processor(tiny.byte_tokenizer(), tiny.image_processor(336)).save_pretrained(folder)
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 3,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "dtype": "float16",
        "text_config": SIZES[alias], "vision_config": CLIP_LARGE,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    # As on the Hub: its headers are compared when the weights are here.
    monkeypatch.setattr("leanvlm.exporter.plan.match_weights", lambda *arguments: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LeanVLMWarning)
        request = plan(ExportConfig(str(folder), (64,), tmp_path / "bundle"))
    window = "the bundle's context is 4096 tokens, the checkpoint's 32768"
    assert [str(one.message).partition(":")[0] for one in said] == [window] * (alias == "bakllava")
    assert list(request.pruners) == [64, 576]
    assert request.sizes["decoder.onnx.data"] / 4 == pytest.approx(PARAMETERS[alias], rel=0.02)
    text = request.checkpoint.config.text_config
    assert context_length(text) == {"llava-llama3": 8192}.get(alias, 4096)


def test_a_family_serves_transformers_own_class() -> None:
    """What `model_type` names there is what is exported here."""
    from transformers import CONFIG_MAPPING

    for family in FAMILIES:
        assert CONFIG_MAPPING[family] in AutoModelForImageTextToText._model_mapping
