"""A checkpoint's programs, its template and its tokenizer, are bounded in time and memory, and work as everywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_fallback import llama_like
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils.chat_template_utils import render_jinja_template

from leanvlm.runtime.errors import BundleError, InputError, LeanVLMError
from leanvlm.runtime.sandbox import sandbox
from leanvlm.runtime.text import Template, TextTokenizer
from leanvlm.runtime.tokenizer_rules import PATTERNS, decodes_safely, encodes_safely, loads_safely

Chat = list[dict[str, Any]]
CHAT: Chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
DOUBLED = "{% set l0 = 'a' %}" + "".join(f"{{% set l{n + 1} = [l{n}, l{n}] %}}" for n in range(60))
OTHERS = DOUBLED.replace("set l", "set m").replace("[l", "[m").replace(", l", ", m")
HOSTILE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a product of a variable": "{{ messages[0].role * 10**10 }}",
    "a list": "{{ [messages] * 10**9 }}",
    "a power": "{{ 9**(9**(9**9)) }}",
    "sums": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "a format": "{{ '{:>99999999999}'.format(1) }}",
    "a filter": "{{ 'a' | center(10**10) }}",
    "a replacement": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "a list in lists, written": DOUBLED + "{{ l60 }}",
    "a list in lists, compared": DOUBLED + OTHERS + "{{ l60 == m60 }}",
    "words": "{{ lipsum(n=99999) }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "brackets": "{{ " + "[" * 99999,
    "a macro": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "an error": "{{ raise_exception('a' * 10**8) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_is_one_line_soon(source: str) -> None:
    begin = time.monotonic()
    with pytest.raises(LeanVLMError, match=r"^the chat template ") as caught:
        Template(source).render(CHAT)
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert Template("{{ messages[0].role }}").render(CHAT) == "user"


# The devices of published templates: of Qwen's, Llama 3's, Gemma's and Mistral's.
TEMPLATES = {
    "chatml": "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "headers": "{{- bos_token }}\n{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b') %}"
    "{%- endif %}"
    "\n{%- set image_ns = namespace(has_images=false) %}{%- for message in messages %}{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{%- set image_ns.has_images = true %}{%- endif %}{%- endfor %}{%- endfor %}"
    "{{- 'Today Date: ' + date_string + '\n' if image_ns.has_images }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{%- for content in message['content'] %}"
    "{{- '<|image|>' if content['type'] == 'image' else content['text'] | trim }}{%- endfor %}{{- '<|eot_id|>' }}{%- endfor %}",
    "turns": "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set loop_messages = messages[1:] -%}{%- else -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' ~ ('model' if message['role'] == 'assistant' else message['role']) }}\n"
    "{%- for item in message['content'] -%}{{ '<start_of_image>' if item.type == 'image' else item.text|trim }}{%- endfor -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}",
    "macros": "{% macro parts(content) %}{% for c in content | selectattr('text', 'defined') | list %}"
    "{{ c.text.split('</think>')[-1].lstrip('\n') }}{% endfor %}{% endmacro %}{% for m in messages[::-1] %}"
    "{{ parts(m.content) }}|{{ m | tojson(indent=2) }}"
    "{{ m.content | map(attribute='type') | join(',') | upper }}{{ m.items() | list | length }}{{ '%s' % m.role }}{% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_as_published_render_as_in_transformers(source: str) -> None:
    chat: Chat = [
        *CHAT,
        {"role": "assistant", "content": [{"type": "text", "text": "<think>so</think>\n A cat. ✓\u2028"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": " \ud83d half, 12.50 & 1e-7 "}],
            "n": [1, 2.5, None, True, 1e300],
        },
    ]
    wanted, _ = render_jinja_template(
        conversations=[chat], chat_template=source, add_generation_prompt=True, bos_token="<s>", tools=None, documents=None
    )
    assert Template(source, {"bos_token": "<s>"}).render(chat) == wanted[0]


def test_a_template_costs_less_than_a_millisecond() -> None:
    template, times = Template(TEMPLATES["chatml"]), []
    for _ in range(50):
        begin = time.perf_counter()
        template.render(CHAT)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 4] < 1e-3


def test_what_json_does_not_have_is_in_a_message_as_its_text() -> None:
    message = {"role": "user", "content": [{"type": "image", "image": Path("a.png"), "size": (3, 4)}]}
    assert Template("{{ messages[0].content[0].image }}{{ messages[0].content[0].size[1] }}").render([message]) == "a.png4"
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError, match="cannot be passed to the chat template"):
        Template("").render([{"role": "user", "content": loop}])


# ------------------------------------------------------------------------------------------------------ the process


def test_it_is_one_process_that_comes_back_when_it_was_ended() -> None:
    template = Template("{{ messages[0].role }}")
    process = sandbox()._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render(CHAT) == "user"
    assert sandbox()._process is not process
    assert process.stdin is not None
    assert process.stdin.closed


def _render(answers: Any) -> None:
    answers.put((Template("{{ messages[0].role }}").render(CHAT), os.getpid()))


def test_a_forked_process_has_its_own_and_leaves_ours() -> None:
    template = Template("{{ messages[0].role }}")
    ours = sandbox()._process
    context = multiprocessing.get_context("spawn" if sys.version_info >= (3, 12) else "fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_render, args=(answers,))
    child.start()
    assert answers.get()[0] == "user"
    child.join()
    assert template.render(CHAT) == "user"
    assert sandbox()._process is ours


def test_threads_get_their_own_answers() -> None:
    template, wrong = Template("{{ messages[0].role }}"), []

    def render(name: str) -> None:
        if any(template.render([{"role": name, "content": "x"}]) != name for _ in range(50)):
            wrong.append(name)

    threads = [threading.Thread(target=render, args=(str(number) * 9999,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_interrupted_request_leaves_no_answer_for_the_next() -> None:
    template, process = Template("{{ messages[0].role }}"), sandbox()._process
    assert process is not None
    assert process.stdout is not None

    def interrupt() -> bytes:
        raise KeyboardInterrupt

    pipe = process.stdout
    process.stdout = type("Pipe", (), {"readline": staticmethod(interrupt), "close": staticmethod(pipe.close)})()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "first", "content": "x"}])
    assert template.render([{"role": "second", "content": "x"}]) == "second"


def test_it_ends_with_whoever_started_it() -> None:
    code = (
        "import os, sys; from leanvlm.runtime.sandbox import sandbox\n"
        "sandbox().ask('render', 'a', {}); print(sandbox()._process.pid, flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)"
    )
    for end in ("returns", "killed"):
        result = subprocess.run([sys.executable, "-c", code, end], capture_output=True, text=True, check=False)
        pid, deadline = int(result.stdout), time.monotonic() + 10
        while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():  # Ended, and not yet waited for.
                break
            time.sleep(0.05)
        else:
            assert time.monotonic() < deadline
        assert result.stderr == ""


# -------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_with(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a tokenizer of Llama's kind that was changed."""
    data = json.loads(llama_like().to_str())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def split(regex: str) -> Callable[[dict[str, Any]], object]:
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return lambda data: data.update(pre_tokenizer=step)


def replaced(step: str, **pattern: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update({step: {"type": "Replace", "pattern": pattern, "content": "b"}})


def doubled(data: dict[str, Any]) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [double] * 60}


def mapped(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}  # A table of 4 GB, it says.


def prefixed(data: dict[str, Any]) -> None:
    data["model"]["continuing_subword_prefix"] = "##########"


def unnamed(data: dict[str, Any]) -> None:
    single = [{"SpecialToken": {"id": "<none>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}


@pytest.mark.parametrize(
    "change",
    [
        split("(a+)+$"),
        split("a(?=(?:a+a+a+a+)b)|a|!|."),
        split("(?:a(?=(?:a+a+a+)c))|a|."),
        replaced("normalizer", Regex="(a|aa)+$"),
        replaced("decoder", Regex="(a|aa)+$"),
        doubled,
        mapped,
        prefixed,
        unnamed,
    ],
)
def test_a_tokenizer_without_end_is_one_line_soon(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], capfd: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    with pytest.raises(BundleError, match=r"tokenizer.json ") as caught:
        TextTokenizer.from_folder(tokenizer_with(tmp_path, change)).encode("a" * 400 + "!")
    assert time.monotonic() - begin < 10
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # What tokenizers says of a panic is not for the user.


def test_a_regular_expression_of_its_own_gives_the_same_tokens(tmp_path: Path) -> None:
    text = "the a in 12 the\n\nthe ✓ <s>"
    ours = TextTokenizer.from_folder(tokenizer_with(tmp_path, split(r"[a-z]{1,7}|\d|\s+|.")))
    assert not encodes_safely(ours.tokenizer)
    assert ours.encode(text) == ours.tokenizer.encode(text).ids
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    changed = TextTokenizer.from_folder(tmp_path)
    assert changed.encode(text) == changed.tokenizer.encode(text).ids


def test_steps_of_published_tokenizers_are_known() -> None:
    tokenizer = Tokenizer(models.BPE())
    for pattern in PATTERNS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
        )
        tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel()
        assert encodes_safely(tokenizer)
        assert decodes_safely(tokenizer)
        for text in ("a" * 99999, " " * 99999, "\n " * 49999, "Aa" * 49999):
            begin = time.monotonic()
            tokenizer.encode(text)
            assert time.monotonic() - begin < 5
    assert encodes_safely(llama_like())
    assert decodes_safely(llama_like())


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ('{"vocab": {"Precompiled": 3, "continuing_subword_prefix": 4, "\\u0120a": 5, "\\u0000": 6}}', True),
        ('{"continuing_subword_prefix": "", "continuing_subword_prefix": null}', True),
        ('{"type":\n"Precompiled"}', False),
        ('{"type": "\\u0050recompiled"}', False),
        ('{"continuing_subword_prefix": "##"}', False),
    ],
)
def test_what_is_read_without_a_check_is_seen_before(text: str, safe: bool) -> None:
    assert loads_safely(text.encode()) is safe


# -------------------------------------------------------------------------------------------------- the whole command


def test_a_hostile_bundle_ends_a_command_with_one_line(tiny_bundle: Path, tmp_path: Path, leanvlm_process: Any) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "leanvlm.json").read_text())
    for name, content, reason in (
        ("chat_template.jinja", HOSTILE["loops"], "the chat template takes too long"),
        ("chat_template.jinja", HOSTILE["a product of a variable"], "the chat template needs more than 1024 MB"),
        ("tokenizer.json", None, "tokenizer.json cannot be used: Onig: Regex search error"),
    ):
        before = (bundle / name).read_bytes()
        if content is None:
            data = json.loads(before)
            split("(.+)+$\\n|(.*)*!")(data)
            content = json.dumps(data)
        (bundle / name).write_text(content)
        manifest["files"][name]["bytes"] = len(content)
        (bundle / "leanvlm.json").write_text(json.dumps(manifest))
        begin = time.monotonic()
        result = leanvlm_process("run", bundle, "--prompt", "Hi " * 99, "--image", "none.png")
        assert time.monotonic() - begin < 10
        assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
        assert reason in result.stderr
        (bundle / name).write_bytes(before)
        manifest["files"][name]["bytes"] = len(before)
