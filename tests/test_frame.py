"""What a family is made of, where its checkpoint's names may stand, and what is said of it to users."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from tokenize import COMMENT, generate_tokens
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
from leanvlm.exporter.decoders import DECODERS, ORDINARY
from leanvlm.exporter.families import ARCHITECTURES, FAMILIES, family_for
from leanvlm.exporter.targets import TARGETS
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
    for shape, save in tiny.EVERY.items():
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
        source = file.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(source)))
        texts = [node.value if isinstance(node, ast.Constant) else getattr(node, "name", None) for node in nodes]
        comments = [token.string for token in generate_tokens(io.StringIO(source).readline) if token.type == COMMENT]
        for text in (*texts, *comments):
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
    assert {name.split("/")[0] for name in tiny.EVERY} == set(FAMILIES)
    assert set(ARCHITECTURES.values()) == set(FAMILIES)


def test_every_decoder_has_a_tiny_checkpoint(tmp_path: Path) -> None:
    for shape, save in tiny.EVERY.items():
        save(tmp_path / shape)
    configs = [json.loads((tmp_path / shape / "config.json").read_text()) for shape in tiny.EVERY]
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
        texts: Any = family_for(family).texts  # type: ignore[attr-defined]
        assert set(texts) <= set(re.findall(r"`([\w]+)`", cells[2])) or cells[2] == "those of LLaVA", family
        assert cells[2] != "those of LLaVA" or texts == ORDINARY
    assert set(ORDINARY) <= set(re.findall(r"`([\w]+)`", rows()["llava"][2]))


def test_a_family_serves_transformers_own_class() -> None:
    """What `model_type` names there is what is exported here."""
    from transformers import CONFIG_MAPPING

    for family in FAMILIES:
        assert CONFIG_MAPPING[family] in AutoModelForImageTextToText._model_mapping
