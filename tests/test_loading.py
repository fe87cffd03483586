"""What is read of a checkpoint's folder, against transformers' own loading of the same folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import Checkpoint, load_model, open_checkpoint
from leanvlm.runtime.errors import CheckpointError, LeanVLMWarning, UnsupportedModelError
from leanvlm.runtime.preprocess import preprocess

Weights = dict[str, Tensor]
Change = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_llava: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to change."""
    return shutil.copytree(tiny_llava, tmp_path / "checkpoint")


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ExportConfig(str(folder)))


def weights(folder: Path) -> Weights:
    return {key: value.clone() for key, value in load_file(folder / SINGLE).items()}


def save(path: Path, tensors: Weights) -> None:
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata={"format": "pt"})


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def others(folder: Path) -> Weights:
    """The same names with other values: whoever reads them is found out."""
    return {key: value + 1 for key, value in weights(folder).items()}


def shard(folder: Path, tensors: Weights, count: int, *, index: bool = True) -> None:
    """Write shards, as a large checkpoint is saved, and the index that names them."""
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def sharded(folder: Path) -> None:
    found = weights(folder)
    (folder / SINGLE).unlink()
    shard(folder, found, 3)


def with_stale_shards(folder: Path) -> None:
    stale = others(folder)
    sharded(folder)
    shard(folder, stale, 2, index=False)
    save(folder / "model-00002-of-00004.safetensors", stale)


def one_key_in_two_shards(folder: Path) -> None:
    found = weights(folder)
    sharded(folder)
    first, last = (folder / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    for path, shift in ((first, 5), (last, 7)):
        save(path, load_file(path) | {HEAD: found[HEAD] + shift})


def index_and_single_file(folder: Path) -> None:
    shard(folder, others(folder), 2)


def with_strays(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "a.safetensors", "model.fp16.safetensors"):
        save(folder / name, others(folder))


def named_by_the_configuration(folder: Path) -> None:
    save(folder / "weights.safetensors", others(folder))
    edit(folder / "config.json", lambda data: data.update(transformers_weights="weights.safetensors"))


def old_buffers(folder: Path) -> None:
    extra = {f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    extra["language_model.model.rotary_emb.inv_freq"] = torch.ones(8)
    extra["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(7)[None]
    save(folder / SINGLE, weights(folder) | extra)


def tied(part: str | None, *, keep: tuple[str, ...], equal: bool = False) -> Change:
    """Tie the token table and the head in a part of the configuration, and store only some of them."""

    def change(folder: Path) -> None:
        def set_flag(data: dict[str, Any]) -> None:
            for record in (data, data["text_config"]):
                record.pop("tie_word_embeddings", None)
            (data if part is None else data[part])["tie_word_embeddings"] = True

        edit(folder / "config.json", set_flag)
        found = weights(folder)
        if equal:
            found[HEAD] = found[TABLE].clone()
        save(folder / SINGLE, {key: value for key, value in found.items() if key not in (HEAD, TABLE) or key in keep})

    return change


def renamed(*pairs: tuple[str, str]) -> Change:
    """Write the weights under other names, from the layout without prefixes."""

    def change(folder: Path) -> None:
        found = {}
        for key, value in weights(folder).items():
            flat = key.replace("vision_model.", "").replace("language_model.model.", "language_model.")
            flat = flat.replace("language_model.lm_head", "lm_head")
            for old, new in pairs:
                flat = flat.replace(old, new, 1) if flat.startswith(old) else flat
            found[flat] = value
        save(folder / SINGLE, found)

    return change


def hub_cache(folder: Path) -> None:
    """Lay the folder out as the Hub's cache does: links into a folder of blobs."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:04d}")
        path.symlink_to(os.path.join("..", "blobs", f"{number:04d}"))


CORE = ("vision_tower", "language_model", "multi_modal_projector")
LAYOUTS: dict[str, Change] = {
    "one file": lambda folder: None,
    "sharded": sharded,
    "sharded, with shards of older saves": with_stale_shards,
    "sharded, one weight twice": one_key_in_two_shards,
    "an index beside the one file": index_and_single_file,
    "other files beside it": with_strays,
    "a file that the configuration names": named_by_the_configuration,
    "buffers of older savers": old_buffers,
    "links": hub_cache,
    "tied at the top, no head": tied(None, keep=(TABLE,)),
    "tied at the top, no table": tied(None, keep=(HEAD,)),
    "tied in the text, no head": tied("text_config", keep=(TABLE,)),
    "tied in the text, no table": tied("text_config", keep=(HEAD,)),
    "tied, both stored, different": tied("text_config", keep=(TABLE, HEAD)),
    "tied, both stored, equal": tied(None, keep=(TABLE, HEAD), equal=True),
    "keys without a prefix": renamed(),
    "keys of the model within": renamed(*((f"{part}.", f"model.{part}.") for part in CORE)),
    "keys all prefixed": renamed(("", "model.")),
    "keys of the first versions": renamed(
        ("vision_tower.", "vision_tower.vision_model."), ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "keys of the versions between": renamed(
        ("vision_tower.", "model.vision_tower.vision_model."), ("language_model.", "model.language_model."),
        ("multi_modal", "model.multi_modal"),
    ),
}  # fmt: skip


def state(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()
    yield from model.named_buffers()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_those_that_transformers_loads(folder: Path, layout: str) -> None:
    LAYOUTS[layout](folder)
    ours = dict(state(load_model(opened(folder))))
    theirs = dict(state(LlavaForConditionalGeneration.from_pretrained(folder)))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [name for name in theirs if ours[name].dtype != theirs[name].dtype] == []


def test_only_the_files_that_count_are_counted(folder: Path) -> None:
    with_stale_shards(folder)
    checkpoint = opened(folder)
    assert [path.name for path in checkpoint.weight_files] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    before = checkpoint.source().sha256
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in checkpoint.weight_files)
    (folder / "model-00002-of-00004.safetensors").unlink()
    assert opened(folder).source().sha256 == before


def test_an_adapter_beside_the_weights_is_left_out_aloud(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.warns(LeanVLMWarning, match="the adapter in .* is left out"):
        opened(folder)


def drop(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def only(name: str) -> Change:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def set_in(name: str, **values: Any) -> Change:
    return lambda folder: edit(folder / name, lambda data: data.update(values))


def lone_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    save(folder / "adapter_model.safetensors", {"a": torch.zeros(2)})
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}', encoding="utf-8")


def adapter_with_configuration(folder: Path) -> None:
    only("adapter_model.safetensors")(folder)
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def index(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(text, encoding="utf-8")

    return change


def absent_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lone_adapter, "adapter without the model it belongs to: merge it first"),
        (adapter_with_configuration, "adapter without the model it belongs to: merge it first"),
        (drop(SINGLE), "no model.safetensors and no model.safetensors.index.json"),
        (only("pytorch_model.bin"), "only pytorch_model.bin, which is not read.* save it again with save_pretrained"),
        (only("model-00001-of-00002.safetensors"), "has model-00001-of-00002.safetensors but no model.safetensors"),
        (absent_shard, "index.json names model-00002-of-00003.safetensors, which is missing"),
        (index("{}"), "not a valid index of weights"),
        (index('{"weight_map": {}}'), "names no file"),
        (index('{"weight_map": {"a": "../a.safetensors"}}'), "supported: .safetensors files inside the folder"),
        (set_in("config.json", transformers_weights="weights.bin"), "supported: .safetensors files inside the folder"),
    ],
)  # fmt: skip
def test_folders_without_weights_say_what_to_do(folder: Path, change: Change, words: str) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        opened(folder)


ORIGINAL = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "config.json").write_text(json.dumps(ORIGINAL)), "original LLaVA's layout.*convert_llava"),
        (set_in("config.json", architectures=["LlavaMistralForCausalLM"]), "original LLaVA's layout.*llava-hf"),
        (set_in("config.json", quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes.*unquantised checkpoint"),
        (set_in("config.json", quantization={"group_size": 64, "bits": 4}), "quantised weights .quantization.*dequantise"),
        (lambda f: edit(f / "config.json", lambda d: d["text_config"].update(quantization_config={"bits": 4})), "quantised"),
    ],
)  # fmt: skip
def test_other_kinds_of_checkpoints_are_named(folder: Path, change: Change, words: str) -> None:
    """Before their other files are looked for: they have others."""
    change(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=words):
        opened(folder)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_rounded_without_a_word_are_refused(folder: Path, dtype: torch.dtype) -> None:
    found = weights(folder)
    save(folder / SINGLE, found | {HEAD: torch.zeros(found[HEAD].shape, dtype=dtype)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is .*; quantised weights are not read"):
        load_model(opened(folder))


def test_one_weight_under_two_names_is_refused(folder: Path) -> None:
    found = weights(folder)
    save(folder / SINGLE, found | {"lm_head.weight": found[HEAD]})
    with pytest.raises(CheckpointError, match=r"one weight under two names: language_model\.lm_head\.weight and lm_head"):
        load_model(opened(folder))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_named_attention_kernel_is_not_needed(folder: Path, key: str, part: str | None) -> None:
    edit(folder / "config.json", lambda data: (data[part] if part else data).update({key: "flash_attention_2"}))
    checkpoint = opened(folder)
    model: Any = checkpoint.family.empty(checkpoint.config)
    assert {module.config._attn_implementation for module in (model, model.model.language_model)} == {"sdpa"}


def forget(part: str | None, key: str) -> Change:
    return lambda folder: edit(folder / "config.json", lambda data: (data[part] if part else data).pop(key))


@pytest.mark.parametrize(
    "change",
    [
        forget(None, "model_type"),
        forget("text_config", "model_type"),
        forget("vision_config", "model_type"),
        set_in("config.json", vision_feature_layer=[-2]),
        lambda folder: edit(folder / "config.json", lambda d: d.update(image_token_id=d.pop("image_token_index"))),
    ],
    ids=["no type", "no type of the text", "no type of the tower", "a list of one layer", "image_token_id"],
)
def test_spellings_that_transformers_resolves(tiny_llava: Path, folder: Path, change: Change) -> None:
    change(folder)
    checkpoint = opened(folder)
    assert checkpoint.spec == opened(tiny_llava).spec
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    pixels = torch.randn(1, 3, *checkpoint.spec.image_size, generator=torch.Generator().manual_seed(0))
    model = load_model(checkpoint)
    with torch.no_grad():
        parts = checkpoint.family.parts(model)
        ours = parts.project(parts.tower("feature", None, checkpoint.spec.shape)(pixels).hidden)
        wanted = torch.stack(list(theirs.model.get_image_features(pixels, return_dict=True).pooler_output))
    assert torch.equal(ours, wanted)


# As in test_preprocess.
ROUNDING = 1e-6
PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"


def nested(**values: Any) -> Change:
    return lambda folder: edit(folder / PROCESSOR, lambda data: data["image_processor"].update(values))


def alone(**values: Any) -> Change:
    """Only the older file, with some values; None takes a key out."""

    def change(folder: Path) -> None:
        (folder / PROCESSOR).unlink()
        kept = {key: value for key, value in values.items() if value is not None}
        edit(folder / IMAGE_PROCESSOR, lambda data: ([data.pop(key) for key in values if key in data], data.update(kept)))

    return change


def without_nested(folder: Path) -> None:
    edit(folder / PROCESSOR, lambda data: data.pop("image_processor"))
    set_in(IMAGE_PROCESSOR, image_mean=[0.3, 0.4, 0.5])(folder)


@pytest.mark.parametrize(
    "change",
    [
        set_in(IMAGE_PROCESSOR, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        nested(image_mean=[0.1, 0.2, 0.3]),
        without_nested,
        set_in(PROCESSOR, image_processor=None),
        drop(IMAGE_PROCESSOR),
        alone(image_mean=[0.1, 0.2, 0.3]),
        alone(image_processor_type=None),
        alone(image_processor_type=None, feature_extractor_type="CLIPFeatureExtractor"),
        alone(image_processor_type="CLIPImageProcessorFast"),
        alone(size=154, crop_size=154),
        alone(size={"height": 154, "width": 154}, do_center_crop=False),
        alone(size=[154, 154], crop_size=[154, 154]),
        alone(use_square_size=True, do_rescale=False),
        alone(resample=None, image_std=None, do_normalize=None, rescale_factor=None),
    ],
    ids=[
        "the older file differs", "the nested one differs", "none nested", "null nested", "nested alone", "the older alone",
        "no type", "an extractor's type", "a fast type", "numbers", "a fixed size", "lists", "a square size", "defaults",
    ],
)  # fmt: skip
def test_images_are_prepared_as_transformers_prepares_them(folder: Path, change: Change) -> None:
    change(folder)
    picture = np.random.default_rng(0).integers(0, 256, (170, 200, 3)).astype(np.uint8)
    theirs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="np")["pixel_values"]
    ours = preprocess([picture], opened(folder).image_spec)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


def test_the_processor_that_counts_must_be_readable(folder: Path) -> None:
    (folder / IMAGE_PROCESSOR).write_text("?", encoding="utf-8")
    opened(folder)
    nested(image_mean=["a", "b", "c"])(folder)
    with pytest.raises(UnsupportedModelError, match=r"/processor_config\.json: the image processor: image_mean\[0\] is \"a\""):
        opened(folder)
    (folder / PROCESSOR).write_text("?", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"/processor_config\.json cannot be read"):
        opened(folder)
