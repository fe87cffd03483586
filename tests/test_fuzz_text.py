"""Thousands of damaged text files: each is read and used, or refused with an error of ours, in bounded time and memory.

The examples run in a process of their own, so that one that ends its process is found too.
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

EXAMPLES, ALL_EXAMPLES = 250, 2000
SECONDS, MEGABYTES = 10, 2048
SIZE, WIDTH = 300, 16
TABLE = "embed_tokens.safetensors"
JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{% endfor %}{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ 'ASSISTANT:' * 1 }}"
)
SNIPPETS = (
    "{{ 'a' * 10**10 }}", "{{ 9**9**9**9 }}", "{{ '%9999999999d' % 1 }}", "{{ 'a'|center(10**10) }}", "{{ [1] * 10**9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{% for i in range(99999) %}",
    "{% for i in range(70) %}{% set ns.n = ns.n ~ ns.n %}{% endfor %}", "{% endfor %}", "{{", "%}", "\0",
    "{{ raise_exception(1) }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "<image>", "{{ undefined.name }}",
)  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 2, 2.5, 1e308, 2**31, 2**63, 10**30, "", "a" * 3000, "\ud800", [], {}, [[2]], [2, -1], {"a": None},
]  # fmt: skip
REGEX = ("(a+)+$", "a(?=(a+)+b)|(a|aa)+$|.", "(.*)*$", "", "\\p{L}+", "(", "(?<=a)b", "^", "\\G")
STEPS: list[Any] = [
    *({"type": "Replace", "pattern": {"Regex": regex}, "content": "b"} for regex in REGEX),
    *({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in REGEX),
    {"type": "Replace", "pattern": {"String": ""}, "content": "aa"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    *(
        {"type": "Sequence", name: [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
        for name in ("normalizers", "decoders")
    ),
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Precompiled", "precompiled_charsmap": None},
    {"type": "Prepend", "prepend": "a" * 1000},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 2**62, "stop": 2**62},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "FixedLength", "length": 0}, {"type": "FixedLength", "length": 1}, {"type": "BPEDecoder", "suffix": ""},
    {"type": "RobertaProcessing", "sep": ["", 2**31], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": False},
    {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3000,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    },
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [999999], "tokens": ["<s>"]}},
    },
]  # fmt: skip
MODELS: list[Any] = [
    {"type": "Unigram", "unk_id": 0, "vocab": [["<pad>", 0.0], ["<image>", 0.0], ["a", -1.0]], "byte_fallback": False},
    {"type": "Unigram", "unk_id": None, "vocab": [["", 0.0], ["<image>", 1e308]], "byte_fallback": True},
    {"type": "WordLevel", "vocab": {"<pad>": 0, "a": 2**32 - 1}, "unk_token": "<pad>"},
    {"type": "WordPiece", "vocab": {"<pad>": 0}, "unk_token": "none", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 9},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]], "dropout": 2.0},
    {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a"], "unk_token": "none", "continuing_subword_prefix": "a" * 999},
    {"type": "BPE", "vocab": {}, "merges": []}, {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
]  # fmt: skip
NUMBERS = ("NaN", "Infinity", "9" * 5000, "-0", "1e999", "[" * 3000)


def write_texts(folder: Path) -> None:
    """Write the text side of a bundle; only one template file counts, the others are there to be read or passed over."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {symbol: index for index, symbol in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data |= {
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(special)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Replace", "pattern": {"String": "~"}, "content": "-"}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\p{N}|[^\p{N}]+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    configs: dict[str, Any] = {
        "tokenizer.json": data,
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": {"content": "</s>", **flags},
            "chat_template": [{"name": "default", "template": TEMPLATE}],
        },
        "generation_config.json": {
            "eos_token_id": [2], "top_k": 50, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3,
            "bad_words_ids": [[5, 6], [7]], "suppress_tokens": [8], "begin_suppress_tokens": [9], "min_new_tokens": 1,
            "min_length": 2, "temperature": 0.7, "do_sample": True,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "processor_config.json": {"chat_template": TEMPLATE, "patch_size": 14},
        "special_tokens_map.json": {"bos_token": "<s>"},
        "added_tokens.json": {"<image>": 3},
    }  # fmt: skip
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    header = json.dumps(
        {"embed_tokens.weight": {"dtype": "F16", "shape": [SIZE, WIDTH], "data_offsets": [0, 2 * SIZE * WIDTH]}}
    )
    rows = np.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(np.float16).tobytes()
    (folder / TABLE).write_bytes(len(header).to_bytes(8, "little") + header.encode() + rows)


def use(folder: Path) -> None:
    """Do with the files what a session does: read them, make a prompt, choose a token and show it."""
    from leanvlm.runtime.embeddings import TokenTable
    from leanvlm.runtime.generation import Chooser, GenerationSettings
    from leanvlm.runtime.session import user_message
    from leanvlm.runtime.streaming import AnswerText
    from leanvlm.runtime.text import Template, TextTokenizer, check_image_tokens

    template, tokenizer = Template.from_folder(folder), TextTokenizer.from_folder(folder)
    tokenizer.check(SIZE, 3)
    table = TokenTable(folder / TABLE, SIZE, WIDTH)
    chosen = GenerationSettings.from_folder(folder)
    chosen.check(SIZE)
    ids = tokenizer.encode(template.render([user_message("What is aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa~ 12?", 1)]))
    check_image_tokens(ids.count(3), 1)
    table.rows(ids)
    scores = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    chooser = Chooser(chosen.options(temperature=0.5, seed=1), ids, chosen.end_ids)
    tokens = [chooser.choose(Given(scores)) for _ in range(3)]
    text = AnswerText(tokenizer)
    for token in (*tokens, *ids[:50]):
        text.push(token)
    text.flush()


class Given:
    """Scores that are there."""

    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def greedy(self) -> int:
        """Return the best."""
        return int(self._scores.argmax())

    def logits(self) -> Any:
        """Return them."""
        return self._scores


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return one of the files with what is to stand in it."""
    files = originals()
    kind = draw(st.sampled_from(("json", "json", "tokenizer", "tokenizer", "template", "bytes")))
    if kind == "template":
        text = TEMPLATE
        for _ in range(draw(st.integers(1, 3))):
            borders = [at for at in range(len(text)) if text.startswith(("{%", "{{"), at)]
            start = draw(st.one_of(st.sampled_from([*borders, len(text)]), st.integers(0, len(text))))
            text = text[:start] + draw(st.sampled_from(("", *SNIPPETS))) + text[start + draw(st.sampled_from((0, 0, 1, 8))) :]
        return "chat_template.jinja", text.encode()
    if kind == "tokenizer":
        data = json.loads(files["tokenizer.json"])
        for _ in range(draw(st.integers(1, 2))):
            part = draw(st.sampled_from(("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")))
            data[part] = copy.deepcopy(draw(st.sampled_from(MODELS if part == "model" else STEPS)))
            if draw(st.booleans()):
                _change(draw, data[part])
        return "tokenizer.json", json.dumps(data).encode()
    if kind == "bytes":
        name = draw(st.sampled_from(sorted(files)))
        return name, _damaged(draw, files[name])
    name = draw(st.sampled_from((*JSON_FILES[:3], *JSON_FILES)))
    data = json.loads(files[name])
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, data)
    text = json.dumps(data)
    if draw(st.integers(0, 9)) == 0:  # What Python's JSON does not write.
        text = text.replace(draw(st.sampled_from(("2", "true", "null", '"<s>"'))), draw(st.sampled_from(NUMBERS)), 1)
    return name, text.encode()


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 4))):
        # Near the beginning there is structure.
        at = draw(st.integers(0, min(len(content), draw(st.sampled_from((16, 400, 1 << 20))))))
        how = draw(st.sampled_from(("flip", "cut", "insert", "remove")))
        if how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "insert":
            content = content[:at] + draw(st.binary(max_size=8)) + content[at:]
        else:
            content = content[:at] + content[at + draw(st.integers(1, 30)) :]
    return content


def _change(draw: st.DrawFn, data: Any) -> None:
    """Change one place of a JSON object, in place."""
    owner, key = data, None
    while isinstance(owner, dict | list) and owner:
        keys = sorted(owner) if isinstance(owner, dict) else range(len(owner))
        key = draw(st.sampled_from(keys[:60]))
        if not isinstance(owner[key], dict | list) or not owner[key] or draw(st.integers(0, 3)) == 0:
            break
        owner = owner[key]
    if key is None or not owner:
        return
    how = draw(st.sampled_from(("value", "value", "value", "delete", "rename", "repeat", "wrap", "swap")))
    if how == "delete":
        del owner[key]
    elif how == "rename" and isinstance(owner, dict):
        owner[f"{key}x"] = owner.pop(key)
    elif how == "repeat" and isinstance(owner, list):
        owner[key:key] = [copy.deepcopy(owner[key]) for _ in range(draw(st.sampled_from((1, 40, 1000))))]
    elif how == "wrap":
        owner[key] = [owner[key]]
    elif how == "swap":
        other = draw(st.sampled_from(sorted(data)))
        owner[key] = copy.deepcopy(data.get(other))
    else:
        owner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))


FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
ORIGINALS: dict[str, bytes] = {}


def originals() -> dict[str, bytes]:
    """Return the undamaged files."""
    if not ORIGINALS:
        ORIGINALS.update({path.name: path.read_bytes() for path in FOLDER.iterdir()})
    return ORIGINALS


@contextmanager
def damaged(folder: Path, name: str, content: bytes) -> Iterator[None]:
    """Put something else in a file for a while; a template that is not in its own file needs that one away."""
    aside = folder / "chat_template.jinja"
    if name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        aside.unlink()
    if name in ("processor_config.json", "tokenizer_config.json"):
        (folder / "chat_template.json").unlink()
    if name == "tokenizer_config.json":
        (folder / "processor_config.json").unlink()
    (folder / name).write_bytes(content)
    try:
        yield
    finally:
        for other, original in originals().items():
            (folder / other).write_bytes(original)


def main(folder: Path, examples: int) -> None:
    """Run the examples, and print the longest time of one and how many were refused."""
    from leanvlm.runtime.errors import LeanVLMError
    from leanvlm.runtime.sandbox import sandbox

    worst, refused, count = 0.0, 0, 0
    use(folder)

    @settings(max_examples=examples, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damage())
    def run(case: tuple[str, bytes]) -> None:
        nonlocal worst, refused, count
        begin = time.monotonic()
        with damaged(folder, *case):
            message = ""
            try:
                use(folder)
            except LeanVLMError as error:
                message = str(error)
                refused += 1
            assert "\n" not in message
            assert len(message) < 2000, message
        count += 1
        spent = time.monotonic() - begin
        assert spent < SECONDS, f"{spent} s"
        worst = max(worst, spent)

    run()
    sandbox().stop()  # The kernel counts a child's memory when it has ended.
    # Not `ru_maxrss` of this process, which begins with that of the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    peaks = [int(status["VmHWM"].split()[0]) // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024]
    print(json.dumps({"examples": count, "refused": refused, "seconds": worst, "megabytes": peaks}))


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(ALL_EXAMPLES, marks=pytest.mark.slow)])
def test_damaged_text_files_are_refused_or_work(tmp_path: Path, examples: int) -> None:
    write_texts(tmp_path)
    command = [sys.executable, __file__, str(tmp_path), str(examples)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    figures = json.loads(result.stdout.splitlines()[-1])
    print(figures)
    assert figures["examples"] >= examples * 0.8
    assert sum(figures["megabytes"]) < MEGABYTES
    assert "panicked" not in result.stderr, result.stderr  # tokenizers prints so much before it raises.


if __name__ == "__main__":
    main(FOLDER, int(sys.argv[2]))
