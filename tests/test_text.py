"""Templates, tokenizer and streaming against transformers and against decoding everything at once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from leanvlm.demo import MODEL_DIR
from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.text import (
    MAX_PENDING,
    UNDECODED,
    StopStrings,
    StreamDecoder,
    Template,
    TextTokenizer,
    check_image_tokens,
    split_on_image,
)

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


def llama_like() -> Tokenizer:
    """A tokenizer of Llama's kind: a word begins with ▁, and unknown characters are spelt in UTF-8 bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!?0123456789\nABISTUV"]
    merges = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("▁▁", "▁▁")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *letters, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (*pieces[:3], "<image>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


LLAMA = TextTokenizer(llama_like(), "<s>")
DEMO = TextTokenizer.from_folder(MODEL_DIR)
BOTH = pytest.mark.parametrize("tokenizer", [LLAMA, DEMO], ids=["byte-fallback", "byte-level"])


def processor_with(template: str) -> LlavaProcessor:
    """The Hugging Face processor of a LLaVA whose tokenizer is `LLAMA`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama_like(), bos_token="<s>", eos_token="</s>")
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14, chat_template=template)


def pieces_of(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


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
    [(no_files, "tokenizer.json is missing"), (no_tokenizer, "cannot be read"), (no_config, "is not valid JSON")],
)
def test_damaged_files_are_the_bundles_fault(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(tmp_path)
    with pytest.raises(BundleError, match=reason):
        TextTokenizer.from_folder(tmp_path)


def test_a_missing_template_is_the_bundles_fault(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no chat template"):
        Template.from_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------- streaming

UNICODE = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁abth 🎉👩‍👩‍👧日é\ufffd\n")))


@BOTH
@given(text=UNICODE)
def test_pieces_join_to_the_full_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    # A character that came in halves would have shown up as a replacement character.
    assert "".join(pieces).count(UNDECODED) == text.count(UNDECODED)


@given(ids=st.lists(st.integers(0, DEMO.tokenizer.get_vocab_size() - 1), max_size=MAX_PENDING - 1))
def test_pieces_of_any_byte_level_tokens_join_to_the_full_text(ids: list[int]) -> None:
    assert "".join(pieces_of(DEMO, ids)) == DEMO.decode(ids)


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["▁the", "▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "s"], ["the", " ", "", "", "", "🎉", "s", ""]),
        (["▁a", "</s>", "▁the", "<image>", "▁▁", "b"], ["a", "", " the", "", "  ", "b", ""]),
        (["<0xFF>", "a"], ["", "\ufffda", ""]),
        (["<0xC3>", "<0xA9>", "<0xFF>", "a"], ["", "é", "", "\ufffda", ""]),
        (["a", "<0xE2>", "<0x9C>"], ["a", "", "", "\ufffd\ufffd"]),
        (["</s>"], ["", ""]),
    ],
)
def test_pieces_come_as_soon_as_they_are_whole(tokens: list[str], pieces: list[str]) -> None:
    assert pieces_of(LLAMA, [LLAMA.tokenizer.token_to_id(token) for token in tokens]) == pieces


def test_a_flushed_stream_starts_anew() -> None:
    ids = LLAMA.tokenizer.encode("the a", add_special_tokens=False).ids
    stream = LLAMA.stream()
    texts = ["".join([*(stream.push(token_id) for token_id in ids), stream.flush()]) for _ in range(2)]
    assert texts == ["the a", "the a"]


class CountingTokenizer(TextTokenizer):
    """Notes the longest list that it is asked to decode."""

    longest = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode, and note how many."""
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("tokens", [["a"], ["▁the", "▁"], ["<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"], ["<0xFF>"]])
def test_the_work_per_token_is_bounded(tokens: list[str]) -> None:
    tokenizer = CountingTokenizer(llama_like())
    stream = StreamDecoder(tokenizer)
    text = "".join(stream.push(tokenizer.tokenizer.token_to_id(token)) for token in tokens * 300)
    assert tokenizer.longest <= 2 * MAX_PENDING
    assert len(text) >= 300 - MAX_PENDING


# ------------------------------------------------------------------------------------------------- stop strings


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is shown of `text`, by looking at every beginning of it in turn."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    stop = StopStrings(stops)
    shown = "".join([*map(stop.push, pieces), stop.flush()])
    assert (shown, stop.stopped) == until_stop("".join(pieces), stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    stop = StopStrings(["\nUSER:", "###"])
    assert [stop.push(piece) for piece in ("Yes.", "\nUS", "A", "#", "##!", "more")] == [
        "Yes.",
        "",
        "\nUSA",
        "",
        "",
        "",
    ]
    assert stop.stopped
    assert stop.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        StopStrings(["a", ""])


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
    check_image_tokens(ids, image_token_id, ids.count(image_token_id))
    with pytest.raises(InputError, match=reason):
        check_image_tokens(ids, image_token_id, images)
