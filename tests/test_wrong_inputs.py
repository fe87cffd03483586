"""Every mistake that a user can make: exit status 2, one line that says what is wrong, nothing left behind."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from leanvlm.exporter import ExportConfig
from leanvlm.runtime.manifest import MANIFEST

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, where what is left behind shows."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return folder


def refusal(result: subprocess.CompletedProcess[str], status: int = 2) -> str:
    """Return the one line that a command ended with."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("leanvlm: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("export", "Missing option '--model'"),
        ("export --model demo --frobnicate", "No such option: --frobnicate"),
        ("export --model demo --budget", "--budget"),
        ("run", "Missing argument 'bundle'"),
        ("run here --max-new-tokens many", "'--max-new-tokens'"),
        ("run here --json", "--json needs --prompt"),
        ("run here --raw-prompt", "--raw-prompt needs --prompt"),
        ("run here --prompt '?' --suppress-tokens many", "--suppress-tokens 'many' is not a list of token ids, such as 5,6"),
        ("run here --prompt '?' --bad-words-ids 5,", "--bad-words-ids '5,' is not a list"),
        ("run here --threads 0 --prompt '?'", "'--threads'"),
        ("profile here --runs 0", "'--runs'"),
        ("inspect here --overlay kept.png", "--overlay needs --image"),
    ],
)
def test_wrong_command_lines(leanvlm: Command, arguments: str, words: str) -> None:
    assert words in refusal(leanvlm(*shlex.split(arguments)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 0", "budget 0 is not possible"),
        ("--budget -5", "budget -5 is not possible"),
        ("--budget 100000", "more than the 576 image tokens"),
        ("--budget abc", "'abc' is not a number"),
        ("--budget 64,", "'64,' is not a number"),
        ("--budget ''", "'' is not a number"),
        ("--budget 64,64", "64,64 name one twice"),
        ("--budget 0/5", "budget 0/5 is not possible; a share is of 1 to all image tokens, such as 320/2880"),
        ("--budget 6/5", "budget 6/5 is not possible"),
        ("--budget 1/0", "budget 1/0 is not possible"),
        ("--budget=-1/-2", "budget -1/-2 is not possible"),
        ("--budget a/b", "'a/b' is not a number of image tokens, such as 64, 64,128, 320/2880 or 25%"),
        ("--budget 1/2/3", "'1/2/3' is not a number"),
        ("--budget 1/", "'1/' is not a number"),
        ("--budget 1/9,1/9", "1/9,1/9 name one twice"),
        ("--budget 320/2880,64", "budgets 320/2880,64 are 64,64 of a crop's 576 image tokens, which names one twice"),
        ("--pruner scissors", "'scissors' is not known; known: agile"),
        ("--pruner agile:blade=2", "no parameter 'blade'"),
        ("--pruner agile:step", "step has no value; write step="),
        ("--pruner agile:step=long", "step='long' is not a valid float"),
        ("--pruner agile:gate=garden", "gate='garden' is not one of erank"),
        ("--pruner agile:keep=10", "give the number as --budget only"),
        ("--pruner none", "keeps all 576 image tokens"),
        ("--target abacus", "'abacus' is not known; known: cpu"),
        ("--precision fp16", "'fp16' does not go with target 'cpu'"),
        ("--target cuda --precision fp32", "'fp32' does not go with target 'cuda'"),
        ("--precision fp8", "'fp8' does not go with target 'cpu'"),
        ("--output ''", "does not name a folder"),
        ("--output .", "does not name a folder"),
        ("--template nowhere.jinja", "--template nowhere.jinja cannot be read: No such file or directory"),
        ("--template ''", "--template is empty; give a file with a chat template, or none to export without one"),
        ("--template .", "--template . cannot be read: Is a directory"),
    ],
)
def test_wrong_export_options(leanvlm: Command, workplace: Path, options: str, words: str) -> None:
    assert words in refusal(leanvlm("export", "--model", "demo", *shlex.split(options)))
    assert not list(workplace.iterdir())


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit(name: str, **values: Any) -> Change:
    """Set keys of a JSON file; `a__b` is the key b inside of a, `a__0` the first of a list."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        for path, value in values.items():
            *outer, key = path.split("__")
            record = data
            for step in outer:
                record = record[int(step) if isinstance(record, list) else step]
            record[key] = value
        (folder / name).write_text(json.dumps(data), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("tokenizer.json"), "has no tokenizer.json"),
        (remove("model.safetensors"), "has no .safetensors weights"),
        (remove("preprocessor_config.json", "processor_config.json"), "has no preprocessor_config.json"),
        (remove("chat_template.jinja"), "has no chat template; give one that takes images with --template FILE"),
        (write("chat_template.jinja", "{{ 'USER: ' + messages[0]['content'] }}"), "refuses this conversation: can only conc"),
        (write("chat_template.jinja", "{{ messages[0]['content'] | trim }}"), "writes 0 image tokens for 1 images, so"),
        (write("chat_template.jinja", "<image>{{ messages[0]['content'] }}"), "writes 1 image tokens for 0 images"),
        (write("chat_template.jinja", "{% if messages[0]['content'][1] %}<image>{% endif %}"), "leaves the text out"),
        (edit("config.json", text_config__vocab_size=200), "tokens up to 259 ('Ń'), its model embeds 200; save it after"),
        (edit("config.json", image_token_id=270, image_token_index=270), "token 270 stands for an image, which its tokenizer"),
        (edit("generation_config.json", eos_token_id=[2, 400]), "eos_token_id 400 is beyond its model's 260 tokens"),
        (edit("generation_config.json", bad_words_ids=[[260]]), "bad_words_ids names token 260"),
        (edit("generation_config.json", num_beams=4), "sets num_beams = 4, which the runtime does not do; remove it"),
        (edit("generation_config.json", repetition_penalty=-1), "repetition_penalty must be a number above 0, not -1"),
        (write("generation_config.json", "[]"), "generation_config.json cannot be read"),
        (write("config.json", "{"), "config.json cannot be read"),
        (write("config.json", "[]"), "config.json does not hold a JSON object"),
        (write("config.json", "[" * 100_000), "config.json cannot be read"),
        (edit("config.json", model_type="mamba"), "model_type 'mamba' is not supported; supported: gemma3, idefics3, internvl"),
        (edit("config.json", text_config__hidden_size="wide"), "config.json is not a valid configuration"),
        (edit("config.json", text_config__model_type="mamba"), "'mamba' decoder is not supported"),
        (edit("config.json", vision_config__patch_size=0), "patch_size is 0; it must be from 1 to 4096"),
        (edit("config.json", vision_config__image_size=336), "the tower takes (336, 336)"),
        (write("tokenizer.json", "{"), "tokenizer.json cannot be read"),
        (write("chat_template.jinja", "{% if %}"), "chat template is not valid"),
        (write("processor_config.json", "?"), "processor_config.json cannot be read"),
        (edit("processor_config.json", image_processor__image_mean=["a", "b", "c"]), 'image_mean[0] is "a"'),
        (cut("model.safetensors", 5), "cannot be read as safetensors"),
        (cut("model.safetensors", 100_000), "cannot be read as safetensors"),
    ],
)  # fmt: skip
def test_broken_checkpoints(
    leanvlm: Command, tiny_llava: Path, tmp_path: Path, workplace: Path, change: Change, words: str
) -> None:
    checkpoint = shutil.copytree(tiny_llava, tmp_path / "checkpoint")
    change(checkpoint)
    assert words in refusal(leanvlm("export", "--model", checkpoint, "--budget", 16))
    assert not list(workplace.iterdir())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("", "--model is empty"),
        ("./nowhere", "nowhere is not a folder"),
        ("nowhere", "'nowhere' is not a folder here and could not be fetched"),
        ("nobody/nothing", "'nobody/nothing' is not a folder here and could not be fetched"),
        ("not a name", "neither a folder nor a Hub id"),
        (__file__, "is not a folder"),
    ],
)
def test_models_that_are_not_there(leanvlm: Command, workplace: Path, model: str, words: str) -> None:
    assert words in refusal(leanvlm("export", "--model", model, "--offline"))
    assert not list(workplace.iterdir())


def test_the_token_is_never_shown(leanvlm: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"
    monkeypatch.setenv("HF_TOKEN", secret)
    results = [
        leanvlm("export", "--help"),
        leanvlm("export", "--model", "nobody/nothing", "--offline"),
        leanvlm("export", "--model", "nobody/nothing", "--offline", "--token", secret),
        leanvlm("export", "--model", "demo", "--dry-run", "--token", secret),
    ]
    assert [result.returncode for result in results] == [0, 2, 2, 0]
    assert not [result for result in results if secret in result.stdout + result.stderr]
    assert secret not in repr(ExportConfig("demo", token=secret))


def test_an_existing_output_is_kept(leanvlm: Command, workplace: Path) -> None:
    (workplace / "demo-64").mkdir()
    assert "demo-64 exists; choose another -o, or pass --force" in refusal(leanvlm("export", "--model", "demo"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_replaces_only_bundles(leanvlm: Command, workplace: Path, kind: str) -> None:
    output = workplace / "mine"
    if kind == "folder":
        output.mkdir()
    thesis = output / "thesis.tex" if kind == "folder" else output
    thesis.write_text("years of work", encoding="utf-8")
    result = leanvlm("export", "--model", "demo", "-o", output, "--force")
    assert "is not a bundle; --force replaces only bundles" in refusal(result)
    assert thesis.read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["plain", "forced"])
@pytest.mark.parametrize("target", ["elsewhere/none", "real", "file"])
def test_an_output_that_is_a_link_is_left_alone(leanvlm: Command, workplace: Path, target: str, options: list[str]) -> None:
    """Before the work, also where it leads to a bundle: neither the link nor the bundle is lost."""
    (workplace / "real").mkdir()
    (workplace / "real" / MANIFEST).write_text("older", encoding="utf-8")
    (workplace / "file").write_text("text", encoding="utf-8")
    output = workplace / "linked"
    output.symlink_to(target)
    words = refusal(leanvlm("export", "--model", "demo", "-o", output, *options))
    assert f"linked is a link to {workplace / target}" in words
    assert ("which does not exist" in words) == (target == "elsewhere/none")
    assert output.is_symlink()
    assert sorted(path.name for path in workplace.iterdir()) == ["file", "linked", "real"]
    assert (workplace / "real" / MANIFEST).read_text(encoding="utf-8") == "older"


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the built-in model's bundle, to damage."""
    return shutil.copytree(demo_bundle, tmp_path / "bundle")


def resize(name: str) -> Change:
    """Make the manifest state the size that a damaged file now has, so that only what reads it can notice."""
    return lambda folder: edit(MANIFEST, **{f"files__{name}__bytes": (folder / name).stat().st_size})(folder)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def listed(name: str) -> Change:
    return edit(MANIFEST, **{f"files__{name}": {"bytes": 1, "sha256": ""}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "is not a folder"),
        (remove(MANIFEST), "is not a bundle: it has no leanvlm.json"),
        (write(MANIFEST, "{"), "leanvlm.json cannot be read"),
        (write(MANIFEST, "[1]"), "has schema None"),
        (edit(MANIFEST, schema=99), "has schema 99, of a newer leanvlm than this: install that one"),
        (edit(MANIFEST, schema=1), "has schema 1; this version of leanvlm reads schema 2: export it again"),
        (edit(MANIFEST, decoder=None), "leanvlm.json: decoder is null; it must be an object"),
        (edit(MANIFEST, target="tensorrt", vision_precision=None), "this bundle has no engines yet: run leanvlm build"),
        (edit(MANIFEST, min_onnxruntime="99.0"), "needs ONNX Runtime 99.0 or newer"),
        (listed("../secret"), "'../secret', which is outside the bundle"),
        (listed("/etc/passwd"), "'/etc/passwd', which is outside the bundle"),
        (listed("a\0b"), "outside the bundle"),
        (listed("absent.bin"), "absent.bin is missing"),
        (remove("vision.data"), "vision.data is missing"),
        (cut("vision_64.onnx", 1000), "vision_64.onnx has 1000 bytes"),
        (both(cut("vision_64.onnx", 1000), resize("vision_64.onnx")), "vision_64.onnx cannot be read"),
        (both(cut("vision.data", 1000), resize("vision.data")), "vision_64.onnx cannot be opened"),
        (both(cut("decoder.onnx", 1000), resize("decoder.onnx")), "decoder.onnx cannot be read"),
        (both(cut("decoder.onnx.data", 9), resize("decoder.onnx.data")), "decoder.onnx cannot be opened"),
        (both(cut("embed_tokens.safetensors", 9), resize("embed_tokens.safetensors")), "safetensors cannot be read"),
        (both(cut("tokenizer.json", 9), resize("tokenizer.json")), "tokenizer.json cannot be read"),
        (both(cut("generation_config.json", 9), resize("generation_config.json")), "config.json cannot be read"),
        (edit(MANIFEST, vision__0__file="decoder.onnx"), "decoder.onnx has no pixel_values"),
        (edit(MANIFEST, vision__0__file="vision_576.onnx"), "vision_576.onnx is tensor(float) ['B', 576, 256], where"),
        (edit(MANIFEST, decoder__layers=5), "decoder: 5 layers do not fit 6 keys and 6 values"),
    ],
)  # fmt: skip
def test_broken_bundles(leanvlm: Command, bundle: Path, sample_image: Path, change: Change, words: str) -> None:
    change(bundle)
    assert words in refusal(leanvlm("run", bundle, "--image", sample_image, "--prompt", "What is it?"))


def test_a_file_is_not_a_bundle(leanvlm: Command) -> None:
    assert "is not a folder" in refusal(leanvlm("run", __file__, "--prompt", "What is it?"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budget 63", "budget 63 is not in this bundle; it holds 64, 576"),
        ("--max-new-tokens 100000", "together 100077; the model's context holds 2048"),
        ("--max-new-tokens 0", "max_new_tokens 0 is not possible"),
        ("--temperature -1", "temperature must be a number of at least 0"),
        ("--temperature nan", "temperature must be a number of at least 0"),
        ("--top-p 0", "top_p must be above 0"),
        ("--top-p 1.5", "top_p must be above 0"),
        ("--top-k -1", "top_k must be at least 0"),
        ("--min-p 2", "min_p must be from 0 to 1"),
        ("--repetition-penalty 0", "repetition_penalty must be a number above 0"),
        ("--no-repeat-ngram-size -1", "no_repeat_ngram_size must be a whole number"),
        ("--bad-words-ids 5,100000", "bad_words_ids names token 100000"),
        ("--raw-prompt", "the prompt has 0 image tokens for 1 images: write <image> once for each image"),
        ("--raw-prompt --prompt ' '", "a raw prompt is a text that is not empty"),
        ("--seed -3", "seed must be at least 0"),
        ("--stop ''", "a stop string must not be empty"),
        ("--device abacus", "device 'abacus' is not known"),
        ("--overlay nowhere/kept.png", "the folder nowhere does not exist"),
        ("--overlay kept.jpg", "must end in .png"),
        ("--prompt ''", "the prompt is empty"),
        ("--prompt '   '", "the prompt is empty"),
        ("--prompt '<image> What?'", "leave the image token out of the text"),
        ("--image 'missing[/].png'", "image 'missing[/].png' does not exist"),
        ("--image ../notes.txt", "not an image in a format that Pillow reads"),
        ("--image .", "image '.' is not a file"),
    ],
)
def test_wrong_run_options(
    leanvlm: Command, demo_bundle: Path, sample_image: Path, workplace: Path, options: str, words: str
) -> None:
    (workplace.parent / "notes.txt").write_text("no image", encoding="utf-8")
    basic = ["--prompt", "How many shapes are there?", "--image", sample_image]
    assert words in refusal(leanvlm("run", demo_bundle, *basic, *shlex.split(options)))
    assert not list(workplace.iterdir())


def png(width: int, height: int, rows: int) -> bytes:
    """Return a grey PNG of the stated size that holds only so many rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (width + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png(10_000, 10_000, 1), "has 10000 x 10000 pixels; at most 64 megapixels"),
        (png(30_000, 30_000, 1), "more than 64 megapixels"),
        (png(200, 200, 3)[:-20], "cannot be decoded"),
        (b"", "not an image in a format that Pillow reads"),
    ],
    ids=["100 megapixels", "900 megapixels", "truncated", "empty"],
)
def test_images_that_cannot_be_used(leanvlm: Command, demo_bundle: Path, tmp_path: Path, content: bytes, words: str) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(content)
    for command in (["run", "--prompt", "What?"], ["profile"], ["inspect"]):
        result = leanvlm(command[0], demo_bundle, "--image", image, *command[1:])
        assert words in (refusal(result) if command[0] != "inspect" else result.stderr)
