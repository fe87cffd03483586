"""The text files of a bundle against transformers, whichever of the ecosystem's files says it; no weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_fallback import llama_like
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.config import ExportConfig
from leanvlm.exporter.generation import HONOURED, IRRELEVANT, REFUSED, generation_config
from leanvlm.exporter.text_files import check_text, write_text_files
from leanvlm.runtime.errors import CheckpointError, LeanVLMError, UnsupportedModelError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.text import Template, TextTokenizer

Change = Callable[[Path], object]
TEXT = "a<|im_end|>b <|im_end|> c</s>d <tool> e <image>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ eos_token }}"
    "{{ pad_token }}{{ unk_token }}{{ tool_token }}{% endfor %}"
)
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
IM_END = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False, "special": True}


@pytest.fixture
def checkpoint(tiny_llava: Path, tmp_path: Path) -> Path:
    """A copy whose table has room for more tokens, with a template that writes special tokens."""
    folder = shutil.copytree(tiny_llava, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").touch()
    edit("config.json", lambda config: config["text_config"].update(vocab_size=320))(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def run(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.is_file() else {}
        change(data)
        path.write_text(json.dumps(data))

    return run


def set_all(name: str, **values: Any) -> Change:
    return edit(name, lambda data: data.update(values))


def moved(folder: Path) -> None:
    """Name the special tokens in special_tokens_map.json only."""
    edit("tokenizer_config.json", lambda data: [data.pop(key) for key in list(data) if key.endswith("_tokens")])(folder)
    edit("tokenizer_config.json", lambda data: [data.pop(key) for key in list(data) if key.endswith("_token")])(folder)
    set_all("special_tokens_map.json", bos_token="<s>", eos_token=IM_END, additional_special_tokens=["<image>", "<tool>"])(
        folder
    )


def not_special(folder: Path) -> None:
    """Have a token in tokenizer.json that only the configuration calls special."""
    token = {"id": 260, **IM_END, "rstrip": False, "special": False}
    edit("tokenizer.json", lambda data: data["added_tokens"].append(token))(folder)
    set_all("tokenizer_config.json", added_tokens_decoder={"260": {**IM_END, "rstrip": False}})(folder)


def of_llama(folder: Path, **flags: bool) -> None:
    """Give the checkpoint a tokenizer of Llama's class, which transformers builds anew."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    set_all("tokenizer_config.json", tokenizer_class="LlamaTokenizer", **flags)(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    edit("config.json", lambda config: config["text_config"].update(vocab_size=400))(folder)
    set_all("config.json", image_token_index=image, image_token_id=image)(folder)


CHANGES: dict[str, Change] = {
    "as it is": lambda folder: None,
    "added_tokens_decoder": set_all("tokenizer_config.json", added_tokens_decoder={"260": IM_END}),
    "added_tokens.json": set_all("added_tokens.json", **{"<|im_end|>": 260, "<tool>": 261}),
    "extra_special_tokens": set_all("tokenizer_config.json", extra_special_tokens=["<image>", "<|im_end|>"]),
    "named extra tokens": set_all("tokenizer_config.json", extra_special_tokens={"tool_token": "<tool>"}),
    "additional_special_tokens": set_all(
        "tokenizer_config.json", additional_special_tokens=["<image>", "<|im_end|>", "<tool>"]
    ),
    "eos_token": set_all("tokenizer_config.json", eos_token={"__type": "AddedToken", **IM_END}, unk_token="<pad>"),
    "special_tokens_map.json": moved,
    "map beside the config": set_all("special_tokens_map.json", eos_token="<|im_end|>", unk_token="<pad>"),
    "special by configuration": not_special,
    "custom class": set_all("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}),
    "flags": set_all("tokenizer_config.json", add_bos_token=False, add_eos_token=True),
    "llama": of_llama,
    "llama without bos": lambda folder: of_llama(folder, add_bos_token=False),
    "llama with eos": lambda folder: of_llama(folder, add_bos_token=True, add_eos_token=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tokens_and_prompts_equal_transformers(checkpoint: Path, tmp_path: Path, change: Change) -> None:
    change(checkpoint)
    config = ExportConfig(str(checkpoint))
    opened, bundle = open_checkpoint(config), tmp_path / "bundle"
    check_text(config, opened)
    bundle.mkdir()
    write_text_files(config, opened, bundle)
    theirs, ours = AutoTokenizer.from_pretrained(checkpoint), TextTokenizer.from_folder(bundle)
    for text in (TEXT, "  two  <tool>  <|im_end|>  spaces", *theirs.get_added_vocab()):
        ids = theirs(text)["input_ids"]
        assert ours.tokenizer.encode(text).ids == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert Template.from_folder(bundle).render(CHAT, add_generation_prompt=False) == processor.apply_chat_template(CHAT)
    assert "auto_map" not in json.loads((bundle / "tokenizer_config.json").read_text())


def test_a_template_of_the_users_own(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    mine = tmp_path / "mine.jinja"
    mine.write_text("Q {% for c in messages[0]['content'] %}{{ c['text'] or '<image>' }}{% endfor %}")
    config = ExportConfig(str(checkpoint), template=mine)
    check_text(config, open_checkpoint(config))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_text_files(config, open_checkpoint(config), bundle)
    assert Template.from_folder(bundle).render(CHAT) == "Q <image>Hi"
    mine.write_text("Q {{ messages }}")
    with pytest.raises(
        UnsupportedModelError, match=r"writes 0 image tokens .* --template FILE, or export with --template none"
    ):
        check_text(config, open_checkpoint(config))


@pytest.mark.parametrize("change", [CHANGES["added_tokens_decoder"], CHANGES["added_tokens.json"]])
def test_an_added_token_beyond_the_table_is_refused(checkpoint: Path, change: Change) -> None:
    change(checkpoint)
    edit("config.json", lambda config: config["text_config"].update(vocab_size=260))(checkpoint)
    config = ExportConfig(str(checkpoint))
    with pytest.raises(CheckpointError, match=r"its model embeds 260; save it after model.resize_token_embeddings"):
        check_text(config, open_checkpoint(config))


# --------------------------------------------------------------------------------------------- generation settings


def test_every_field_of_transformers_is_sorted() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tables = [set(HONOURED), set(IRRELEVANT), set(REFUSED)]
    assert fields <= set.union(*tables)
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_the_defaults_of_transformers_are_accepted(checkpoint: Path) -> None:
    defaults = GenerationConfig._get_default_generation_params()
    (checkpoint / "generation_config.json").write_text(json.dumps(defaults))
    opened = open_checkpoint(ExportConfig(str(checkpoint)))
    assert generation_config(checkpoint, opened.config) == defaults
    assert not GenerationSettings.from_dict(defaults).logits.active


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("forced_eos_token_id", 2),
        ("encoder_repetition_penalty", 1.1),
        ("exponential_decay_length_penalty", [5, 1.1]),
        ("sequence_bias", [[[5], 2.0]]),
        ("typical_p", 0.9),
    ],
)
def test_what_the_runtime_does_not_do_is_refused_by_name(checkpoint: Path, name: str, value: Any) -> None:
    set_all("generation_config.json", **{name: value})(checkpoint)
    opened = open_checkpoint(ExportConfig(str(checkpoint)))
    with pytest.raises(UnsupportedModelError, match=f"sets {name} = .* remove it there"):
        generation_config(checkpoint, opened.config)


def test_fields_that_transformers_does_not_know_are_ignored_as_it_does(checkpoint: Path) -> None:
    set_all("generation_config.json", chat_format="chatml", repetition_penalty=None)(checkpoint)
    opened = open_checkpoint(ExportConfig(str(checkpoint)))
    assert not GenerationSettings.from_dict(generation_config(checkpoint, opened.config)).logits.active


def test_without_a_file_the_configuration_counts_as_for_transformers(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    opened = open_checkpoint(ExportConfig(str(checkpoint)))
    theirs = GenerationConfig.from_pretrained(checkpoint, config_file_name="config.json", _from_model_config=True)
    settings = GenerationSettings.from_dict(generation_config(checkpoint, opened.config))
    assert settings.end_ids == {theirs.eos_token_id} == {2}


def in_folder(folder: Path) -> None:
    """Keep the template where several of them are kept."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "default.jinja")


def in_processor_config(folder: Path) -> None:
    set_all("processor_config.json", chat_template="processor" + TEMPLATE)(folder)


def in_json(folder: Path) -> None:
    set_all("chat_template.json", chat_template="json" + TEMPLATE)(folder)


# transformers leaves the files of that folder open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "changes",
    [[in_json], [in_processor_config], [in_processor_config, in_json], [in_folder]],
    ids=lambda changes: changes[-1].__name__,
)
def test_of_several_templates_the_one_of_transformers_counts(checkpoint: Path, tmp_path: Path, changes: list[Change]) -> None:
    for change in changes:
        change(checkpoint)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    config = ExportConfig(str(checkpoint))
    write_text_files(config, open_checkpoint(config), bundle)
    wanted = AutoProcessor.from_pretrained(checkpoint).apply_chat_template(CHAT, add_generation_prompt=True)
    assert Template.from_folder(bundle).render(CHAT) == wanted


def test_a_template_that_transformers_cannot_read_is_one_line(checkpoint: Path) -> None:
    in_json(checkpoint)
    in_folder(checkpoint)
    config = ExportConfig(str(checkpoint))
    with pytest.raises(
        CheckpointError, match="cannot read the chat template: Cannot load chat template due to conflicting files"
    ):
        check_text(config, open_checkpoint(config))


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 / 0 }}", "no image"])
def test_a_template_that_is_given_is_named_and_not_the_checkpoint(checkpoint: Path, source: str) -> None:
    given = checkpoint / "own.jinja"
    given.write_text(source)
    config = ExportConfig(str(checkpoint), template=given)
    with pytest.raises(LeanVLMError, match=f"^--template {given}: the chat template "):
        check_text(config, open_checkpoint(config))


@pytest.mark.parametrize("source", ["{{ 'a' * 10**10 }}", "{% for i in messages * 99999 %}{{ i * 99999 }}{% endfor %}"])
def test_a_template_without_end_is_refused_with_a_way_out(checkpoint: Path, source: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(source)
    config = ExportConfig(str(checkpoint))
    with pytest.raises(LeanVLMError, match=r"the chat template .*; give one that takes images with --template FILE"):
        check_text(config, open_checkpoint(config))


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Split", "pattern": {"Regex": r"(?:.|\n|.\n|..)+(?<=~)"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    ],
)
def test_a_tokenizer_without_end_is_refused_before_transformers_reads_it(
    checkpoint: Path, step: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    set_all("tokenizer.json", pre_tokenizer=step)(checkpoint)
    config = ExportConfig(str(checkpoint))
    opened = open_checkpoint(config)
    capfd.readouterr()
    with pytest.raises(LeanVLMError, match=r"tokenizer.json (cannot be|takes too long)"):
        check_text(config, opened)
    assert capfd.readouterr() == ("", "")


def test_a_context_too_short_for_an_image_is_refused(checkpoint: Path) -> None:
    edit("config.json", lambda config: config["text_config"].update(max_position_embeddings=64))(checkpoint)
    config = ExportConfig(str(checkpoint))
    with pytest.raises(CheckpointError, match=r"context of 64 tokens \(max_position_embeddings\) does not hold an image of"):
        check_text(config, open_checkpoint(config))
