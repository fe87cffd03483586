"""Templates and tokenizer against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_fallback import LLAMA, llama_like
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from leanvlm.calibration.study import split_on_image
from leanvlm.demo import MODEL_DIR
from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.text import Template, TextTokenizer, check_image_tokens

# Image parts first, `generation` around the assistant's text: the shape of LLaVA-1.5's template.
LLAVA_LIKE = """{% for m in messages %}{{ m['role'].upper() + ': ' }}
{%- for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in m['content'] | selectattr('type', 'equalto', 'text') %}
    {%- if m['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}
    {%- else %}{{ part['text'] + ' ' }}{% endif %}
{%- endfor %}
{%- endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# Every name and whitespace rule that templates rely on.
BUSY = """{{ bos_token }}{% for m in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
  <{{ m.role }}>{{ m.content | tojson }}{{ m.content[0] | tojson(indent=2) }}
{% endfor %}
{{ strftime_now('%%') }}{% if tools is none and documents is none %}{{ eos_token }}{% endif %}
"""

CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Wie groß <ist> \"das\" & 'dies'?"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two\nlines\u2028✓"}]},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    {"role": "user", "content": [{"type": "text", "text": "Never reached."}]},
]


DEMO = TextTokenizer.from_folder(MODEL_DIR)


def processor_with(template: str) -> LlavaProcessor:
    """The Hugging Face processor of a LLaVA whose tokenizer is `LLAMA`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama_like(), bos_token="<s>", eos_token="</s>")
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)


# ---------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("source", [LLAVA_LIKE, BUSY, (MODEL_DIR / "chat_template.jinja").read_text()])
def test_prompts_equal_the_processor(source: str, add_generation_prompt: bool) -> None:
    expected = processor_with(source).apply_chat_template(CONVERSATION, add_generation_prompt=add_generation_prompt)
    template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(CONVERSATION, add_generation_prompt=add_generation_prompt) == expected


def test_a_string_is_one_text_part() -> None:
    template = Template(LLAVA_LIKE)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert template.render([{"role": "user", "content": "Hi"}]) == template.render(parts) == "USER: Hi ASSISTANT:"


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "Hi"}, {"role": "user", "content": 3}])
def test_malformed_messages_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needs a role and a content"):
        Template(LLAVA_LIKE).render([message])


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must\nalternate') }}", "{{ messages[0].role + 1 }}", "{{ messages.pop() }}"]
)
def test_a_refused_conversation_is_one_line(source: str) -> None:
    with pytest.raises(InputError, match=r"template refuses this conversation: .") as caught:
        Template(source).render(CONVERSATION)
    assert "\n" not in str(caught.value)


def test_an_invalid_template_is_the_bundles_fault() -> None:
    with pytest.raises(BundleError, match="line 2"):
        Template("fine\n{% for %}")


@pytest.mark.parametrize(
    ("files", "prompt"),
    [
        ({"chat_template.jinja": "{{ bos_token }}jinja", "chat_template.json": {"chat_template": "json"}}, "<s>jinja"),
        ({"chat_template.json": {"chat_template": "json{{ eos_token }}"}}, "json</s>"),
        ({"processor_config.json": {"chat_template": "{{ add_bos_token }}processor"}}, "processor"),
        ({"tokenizer_config.json": {"chat_template": "config"}}, "config"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "named"}]}}, "named"),
    ],
)
def test_a_template_is_found_in_every_place(tmp_path: Path, files: dict[str, Any], prompt: str) -> None:
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True}
    for name, content in ({"tokenizer_config.json": {}} | files).items():
        content = special | content if name == "tokenizer_config.json" else content
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert Template.from_folder(tmp_path).render([]) == prompt


# ---------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", ["", "USER: <image>\nIs there a red circle? ASSISTANT:", "12 ✓ naïve 日本", "<s>twice"])
def test_demo_token_ids_equal_transformers(text: str) -> None:
    reference = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = DEMO.encode(text)
    assert ids == reference(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
    assert DEMO.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("source", [LLAVA_LIKE, "{{ bos_token }}" + LLAVA_LIKE])
def test_the_first_token_stands_once_as_in_the_processor(source: str) -> None:
    conversation = [{"role": "user", "content": [{"type": "text", "text": "in the ✓"}]}]
    ids = LLAMA.encode(Template(source, {"bos_token": "<s>"}).render(conversation))
    expected = processor_with(source).apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert ids == expected[0]
    assert ids.count(1) == 1


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = llama_like()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.from_folder(tmp_path).encode("abcdefgh") == LLAMA.encode("abcdefgh")


def test_a_lone_surrogate_is_an_input_error() -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        DEMO.encode("half \ud83d of one")


def no_files(folder: Path) -> None:
    """Leave the folder as it is."""


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def no_config(folder: Path) -> None:
    LLAMA.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(no_files, "tokenizer.json is missing"), (no_tokenizer, "cannot be read"), (no_config, "cannot be read as JSON")],
)
def test_damaged_files_are_the_bundles_fault(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(tmp_path)
    with pytest.raises(BundleError, match=reason):
        TextTokenizer.from_folder(tmp_path)


def test_a_missing_template_is_the_bundles_fault(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no chat template"):
        Template.from_folder(tmp_path)


# ------------------------------------------------------------------------------------------- image placeholders


@pytest.mark.parametrize(
    ("ids", "segments"),
    [([], [[]]), ([1, 2], [[1, 2]]), ([9], [[], []]), ([1, 9, 2, 9, 9, 3], [[1], [2], [], [3]])],
)
def test_prompts_are_cut_at_images(ids: list[int], segments: list[list[int]]) -> None:
    assert split_on_image(ids, 9) == segments


@pytest.mark.parametrize(("typed", "images", "reason"), [("<image> ", 1, "2 image .* 1 images: leave"), ("", 2, "drops")])
def test_image_tokens_must_match_the_images(typed: str, images: int, reason: str) -> None:
    image_token_id = DEMO.tokenizer.token_to_id("<image>")
    content = [{"type": "image"}, {"type": "text", "text": typed + "How many?"}]
    ids = DEMO.encode(Template.from_folder(MODEL_DIR).render([{"role": "user", "content": content}]))
    found = ids.count(image_token_id)
    check_image_tokens(found, found)
    with pytest.raises(InputError, match=reason):
        check_image_tokens(found, images)
