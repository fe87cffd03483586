"""Token tables, tokenizers and generation settings of another model, or with values that are none: one line before the work."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_fallback import llama_like
from safetensors.numpy import save_file

from leanvlm.runtime.embeddings import TENSOR, TokenTable
from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.text import Template, TextTokenizer

ROWS, WIDTH = 6, 8


def table(path: Path, rows: int = ROWS, dtype: Any = np.float16, name: str = TENSOR, **more: Any) -> None:
    save_file({name: np.ones((rows, WIDTH), dtype), **more}, path)


def header(path: Path, **changes: Any) -> None:
    """Write a table whose header says something else."""
    entry = {"dtype": "F16", "shape": [ROWS, WIDTH], "data_offsets": [0, 2 * ROWS * WIDTH], **changes}
    text = json.dumps({TENSOR: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(2 * ROWS * WIDTH))


def long_header(path: Path) -> None:
    text = json.dumps({TENSOR: {}, "__metadata__": {"a": "b" * (1 << 21)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: table(path, rows=7), r"its shape is \[7, 8\], where the model's is \[6, 8\]"),
        (lambda path: table(path, dtype=np.float64), "its dtype is F64, which is none of F16, F32"),
        (lambda path: table(path, dtype=np.int16), "its dtype is I16"),
        (lambda path: table(path, name="other"), "it does not hold embed_tokens.weight alone"),
        (lambda path: table(path, more=np.ones(1)), "it does not hold embed_tokens.weight alone"),
        (lambda path: header(path, shape=[10**6, 10**6]), "Error while deserializing header"),
        (lambda path: header(path, shape=[10**6, 10**6], data_offsets=[0, 2 * 10**12]), "Error while deserializing header"),
        (lambda path: header(path, shape=[ROWS * WIDTH]), r"its shape is \[48\]"),
        (lambda path: header(path, shape=[0, WIDTH], data_offsets=[0, 0]), "Error while deserializing header"),
        (lambda path: header(path, dtype="X9"), "Error while deserializing header"),
        (long_header, "its header has 2097206 bytes"),
        (lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "its header has 18446744073709551615 bytes"),
        (lambda path: path.write_bytes(b""), "header too small"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_a_token_table_of_another_model_is_refused_before_it_is_read(tmp_path: Path, write: Any, reason: str) -> None:
    path = tmp_path / "embed_tokens.safetensors"
    write(path)
    tracemalloc.start()
    with pytest.raises(BundleError, match=rf"^the token table embed_tokens.safetensors cannot be read: .*{reason}") as caught:
        TokenTable(path, ROWS, WIDTH)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_table_are_the_tokenizers_fault(tmp_path: Path) -> None:
    table(tmp_path / "table")
    rows = TokenTable(tmp_path / "table", ROWS, WIDTH)
    assert rows.rows([ROWS - 1]).shape == (1, WIDTH)
    with pytest.raises(BundleError, match="ends at 5, and the prompt has token 6: the tokenizer is another model's"):
        rows.rows([0, 6])


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(llama_like())
    count, image = tokenizer.tokenizer.get_vocab_size(), tokenizer.tokenizer.token_to_id("<image>")
    tokenizer.check(count, image)
    with pytest.raises(BundleError, match=f"tokens up to {count - 1}, the model {count - 1}: it is another model's"):
        tokenizer.check(count - 1, image)
    with pytest.raises(BundleError, match=f"does not know the image's token {count}: it is another model's"):
        tokenizer.check(count + 1, count)


@pytest.mark.parametrize("value", [2.5, [[2]], True, [True], "2", {"id": 2}, [None], 260, [2, 10**30]])
def test_end_tokens_that_are_none_are_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BundleError, match=r"generation_config.json: eos_token_id "):
        GenerationSettings.from_folder(tmp_path).check(260)


@pytest.mark.parametrize("value", [2, [2, 259], [], None, -1])
def test_end_tokens_of_transformers_are_taken(tmp_path: Path, value: Any) -> None:
    """-1 is how its users say that nothing ends an answer."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value, "temperature": "hot"}))
    settings = GenerationSettings.from_folder(tmp_path)
    settings.check(260)
    assert settings.end_ids == set(value if isinstance(value, list) else [] if value is None else [value])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"top_k": 1.5}', "top_k must be a whole number"),
        ('{"top_p": NaN}', "NaN is not a number"),
        ('{"min_p": 1e999}', "min_p must be from 0 to 1"),
        ('{"top_p": [' + "1," * 10**6 + "1]}", "top_p must be a number, not "),
        ('{"suppress_tokens": [9223372036854775808]}', "suppress_tokens must be a list of token ids"),
        ('{"repetition_penalty": 1' + "0" * 400 + "}", "repetition_penalty must be a number above 0"),
        ('{"bad_words_ids": ' + "[" * 600 + "]" * 600 + "}", "bad_words_ids must be a list|nested without end"),
        ('{"bad_words_ids": ' + "[" * 10**5 + "]" * 10**5 + "}", "cannot be read"),
        ('{"top_k": 1' + "0" * 5000 + "}", "cannot be read"),
        ("[]", "is not a JSON object"),
        ("", "cannot be read"),
        ('{"a": "' + "b" * (17 << 20) + '"}', "bytes"),
    ],
)
def test_settings_that_are_none_are_one_short_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(BundleError, match=reason) as caught:
        GenerationSettings.from_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_without_end_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    llama_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("")
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 33)
    tracemalloc.start()
    with pytest.raises(BundleError, match=rf"{name} has (more than|\d+ bytes)"):
        _ = Template.from_folder(tmp_path), TextTokenizer.from_folder(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": [{"name": ["default"]}, "x", {"name": "default", "template": 3}]},
        {"chat_template": {"name": "default"}},
        {"chat_template": 2.5},
        {"chat_template": []},
    ],
)
def test_a_template_that_is_none_is_missing(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="holds no chat template"):
        Template.from_folder(tmp_path)


def test_special_tokens_of_any_type_are_passed_over(tmp_path: Path) -> None:
    config = {
        "bos_token": [1],
        "eos_token": {"content": 3},
        "a b_token": "x",
        "unk_token": None,
        "chat_template": "{{ bos_token }}!",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Template.from_folder(tmp_path).render([]) == "!"
    llama_like().save(str(tmp_path / "tokenizer.json"))
    assert TextTokenizer.from_folder(tmp_path).bos_token is None


def test_a_prompt_longer_than_any_context_is_refused_before_the_work() -> None:
    with pytest.raises(InputError, match="has 4194305 characters, of 4194304 at most"):
        TextTokenizer(llama_like()).encode("a" * ((1 << 22) + 1))
