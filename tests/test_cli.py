"""The commands as a user types them: what they print, where, and that the figures agree with each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from PIL import Image

from leanvlm.demo import ERANK_REF
from leanvlm.runtime import Session
from leanvlm.runtime.answer import STAGES
from leanvlm.runtime.backends.ort import OrtGraph
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.commands import doctor
from leanvlm.runtime.text import Message

ROOT = Path(__file__).parents[1]
QUESTION = "What is below the green ring?"
ANSWER = "a yellow hexagon"


def test_run_json_is_one_object(leanvlm: Command, demo_bundle: Path, sample_image: Path) -> None:
    result = leanvlm("run", demo_bundle, "--image", sample_image, "--prompt", QUESTION, "--json")
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert {"text", "token_ids", "prompt_tokens", "timings_ms", "pruning"} <= set(answer)
    assert answer["text"] == ANSWER
    assert answer["finish_reason"] == "stop"
    pruning = answer["pruning"]
    assert (pruning["pruner"], pruning["kept"], pruning["total"]) == ("agile", 64, 576)
    assert {"effective_rank", "attention_entropy", "num_selected"} <= set(pruning)
    assert 0 < pruning["num_selected"] <= 64
    assert all(time >= 0 for time in answer["timings_ms"].values())


def test_streamed_text_is_the_text_of_the_json(leanvlm: Command, demo_bundle: Path, sample_image: Path) -> None:
    command = ["run", demo_bundle, "--image", sample_image, "--prompt", QUESTION]
    streamed, whole = leanvlm(*command), leanvlm(*command, "--json")
    assert streamed.stdout == json.loads(whole.stdout)["text"] + "\n"
    assert streamed.stderr.startswith("64 of 576 image tokens; ")


def test_the_unpruned_variant_says_so(leanvlm: Command, demo_bundle: Path, sample_image: Path) -> None:
    command = ["run", demo_bundle, "--image", sample_image, "--prompt", QUESTION, "--budget", 576, "--json"]
    answer = json.loads(leanvlm(*command).stdout)
    assert (answer["pruning"]["pruner"], answer["pruning"]["kept"]) == ("none", 576)
    # 64 image tokens and 13 of text; so 512 more.
    assert answer["prompt_tokens"] == json.loads(leanvlm(*command, "--budget", 64).stdout)["prompt_tokens"] + 512


def test_several_images_and_none(leanvlm: Command, demo_bundle: Path, sample_image: Path) -> None:
    images = ["--image", sample_image, "--image", sample_image]
    two = json.loads(leanvlm("run", demo_bundle, *images, "--prompt", QUESTION, "--json").stdout)
    none = json.loads(leanvlm("run", demo_bundle, "--prompt", QUESTION, "--json").stdout)
    assert (two["pruning"]["kept"], len(two["pruning"]["images"])) == (128, 2)
    assert none["pruning"] is None


def test_a_seed_repeats_an_answer_and_stop_ends_it(leanvlm: Command, demo_bundle: Path, sample_image: Path) -> None:
    command = ["run", demo_bundle, "--image", sample_image, "--prompt", QUESTION]
    hot = [*command, "--temperature", 5, "--seed", 11, "--max-new-tokens", 8]
    assert leanvlm(*hot).stdout == leanvlm(*hot).stdout != leanvlm(*hot, "--seed", 12).stdout
    assert leanvlm(*command, "--stop", " hex").stdout == "a yellow\n"
    assert json.loads(leanvlm(*command, "--max-new-tokens", 1, "--json").stdout)["finish_reason"] == "length"


def test_the_overlay_is_a_picture(leanvlm: Command, demo_bundle: Path, sample_image: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kept.png"
    result = leanvlm("run", demo_bundle, "--image", sample_image, "--prompt", QUESTION, "--overlay", picture)
    assert result.returncode == 0
    with Image.open(picture) as image:
        assert (image.format, image.height) == ("PNG", 672)
        left = np.asarray(image)[:, :672].reshape(24, 28, 24, 28, 3).mean(axis=(1, 3, 4))
    # The background is light: its patches are bright where they were kept and dark where they were dropped.
    assert (left < 100).sum() >= 576 - 64


class Spy:
    """Notes the conversations that a chat hands to the model, and how often an image is encoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.conversations: list[list[Message]] = []
        self.encoded = 0
        respond, run = Session.respond, OrtGraph.run

        def noted_respond(session: Session, messages: Any, *arguments: Any, **options: Any) -> Any:
            self.conversations.append(list(messages))
            return respond(session, messages, *arguments, **options)

        def noted_run(graph: OrtGraph, inputs: Any) -> Any:
            self.encoded += len(inputs["pixel_values"])
            return run(graph, inputs)

        monkeypatch.setattr(Session, "respond", noted_respond)
        monkeypatch.setattr(OrtGraph, "run", noted_run)


def test_a_chat_remembers(leanvlm: Command, demo_bundle: Path, sample_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    result = leanvlm("run", demo_bundle, stdin=f"/image {sample_image}\n{QUESTION}\n\nHow many shapes are there?\n")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] == ANSWER
    assert len(result.stdout.splitlines()) == 2
    first, second = spy.conversations
    assert second[: len(first)] == first
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"][0]["text"] == ANSWER
    assert spy.encoded == 1


def test_a_chat_survives_mistakes_and_forgets_on_reset(
    leanvlm: Command, demo_bundle: Path, sample_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    lines = ["/imagine", "/image [/no].png", QUESTION, "/reset", f"/image {sample_image}", QUESTION, "/exit", "unheard"]
    result = leanvlm("run", demo_bundle, "--image", sample_image, stdin="\n".join(lines))
    assert result.returncode == 0
    assert result.stdout == f"{ANSWER}\n{ANSWER}\n"
    assert "leanvlm: /imagine is not known; /image FILE adds" in result.stderr
    assert "leanvlm: image '[/no].png' does not exist" in result.stderr
    assert [len(conversation) for conversation in spy.conversations] == [1, 1]
    assert spy.encoded == 2


def test_a_failed_turn_leaves_the_chat_as_it_was(
    leanvlm: Command, demo_bundle: Path, sample_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    lines = [QUESTION, "<image> is one too many", "How many shapes are there?"]
    result = leanvlm("run", demo_bundle, "--image", sample_image, stdin="\n".join(lines))
    assert "leave the image token out of the text" in result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert "too many" not in str(spy.conversations[-1])


@pytest.mark.parametrize("options", [["--prompt", QUESTION], []], ids=["answer", "chat"])
def test_ctrl_c_ends_a_run(leanvlm: Command, demo_bundle: Path, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "decoder", interrupted)
    result = leanvlm("run", demo_bundle, *options, stdin="Hello?\n")
    assert result.returncode == 130
    assert result.stderr.endswith("leanvlm: interrupted\n")
    assert "Traceback" not in result.stderr


def test_a_reader_that_is_gone_is_no_error(demo_bundle: Path) -> None:
    command = [sys.executable, "-m", "leanvlm", "inspect", str(demo_bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


@pytest.fixture(scope="module")
def figures(leanvlm_process: Command, demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `profile` measured; the page and what was printed are under keys of their own."""
    folder = tmp_path_factory.mktemp("profile")
    options = ["--runs", 7, "--warmup", 2, "--max-new-tokens", 4]
    files = ["--json", folder / "figures.json", "--html", folder / "figures.html"]
    result = leanvlm_process("profile", demo_bundle, *options, *files)
    assert result.returncode == 0, result.stderr
    data = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return {**data, "page": (folder / "figures.html").read_text(encoding="utf-8"), "printed": result.stdout}


def test_a_profile_has_every_figure(figures: dict[str, Any]) -> None:
    assert {"schema", "bundle", "device", "versions", "threads", "budgets", "speedup"} <= set(figures)
    assert {"leanvlm", "python", "onnxruntime"} <= set(figures["versions"])
    assert set(figures["budgets"]) == {"64", "576"}
    for budget, values in figures["budgets"].items():
        assert set(values["stages_ms"]) == set(STAGES)
        assert all(0 <= stage["p50"] <= stage["p90"] for stage in values["stages_ms"].values())
        assert values["image_tokens"] == {"total": 576, "kept": int(budget)}
        assert values["output_tokens_per_s"] > 0
        # More than the weights, and less than a process with torch would take.
        assert 40e6 < values["peak_memory_bytes"] < 600e6


def test_pruning_brings_the_first_token_sooner(figures: dict[str, Any]) -> None:
    pruned, whole = (figures["budgets"][key]["time_to_first_token_ms"] for key in ("64", "576"))
    assert pruned < whole
    assert figures["speedup"] == pytest.approx(whole / pruned)


def test_the_stages_add_up_to_the_first_token(figures: dict[str, Any]) -> None:
    for values in figures["budgets"].values():
        stages = values["first_token_stages_ms"]
        assert tuple(stages) == STAGES[:-1]
        assert sum(stages.values()) == pytest.approx(values["time_to_first_token_ms"], rel=0.03)
        # Medians of single stages do not add up exactly: on a busy machine each is of another run.
        medians = sum(values["stages_ms"][stage]["p50"] for stage in stages)
        assert medians == pytest.approx(values["time_to_first_token_ms"], rel=0.3)


def test_the_profile_is_printed(figures: dict[str, Any]) -> None:
    assert all(stage in figures["printed"] for stage in STAGES)
    assert f"{figures['speedup']:.2f} times sooner than unpruned" in figures["printed"]


def test_the_page_is_self_contained(figures: dict[str, Any]) -> None:
    assert not re.search(r"https?://|<script|<link|src=|url\(|@import", figures["page"])
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%', figures["page"])]
    assert len(widths) == 2 * len(STAGES[:-1])
    # The slower bar takes the whole width, up to what no stage accounts for.
    assert sum(widths[7:]) == pytest.approx(100, abs=3)


def test_inspect_describes_the_bundle(leanvlm: Command, demo_bundle: Path) -> None:
    lines = leanvlm("inspect", demo_bundle).stdout.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    assert found["budgets"] == "64, 576 of 576 image tokens a crop"
    assert found["pruner"].startswith(f"agile (gate=erank, erank_ref={ERANK_REF}")
    assert "greedy tokens equal to the checkpoint's: 8 of 8 at 64, 8 of 8 at 576" in found["verified"]


def test_inspect_explains_an_image(leanvlm: Command, demo_bundle: Path, sample_image: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kept.png"
    result = leanvlm("inspect", demo_bundle, "--image", sample_image, "--overlay", picture)
    answer = json.loads(leanvlm("run", demo_bundle, "--image", sample_image, "--prompt", "?", "--json").stdout)
    assert "kept              64 of 576 image tokens" in result.stdout
    assert f"effective rank    {answer['pruning']['effective_rank']:.2f}" in result.stdout
    assert f"gate              erank, ratio {answer['pruning']['effective_rank'] / ERANK_REF:.3f}" in result.stdout
    assert picture.is_file()


@pytest.mark.parametrize("name", ["vision.data", "decoder.onnx.data", "tokenizer.json"])
def test_verify_sees_a_flipped_bit(leanvlm: Command, demo_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")
    assert leanvlm("inspect", bundle, "--verify").returncode == 0
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    result = leanvlm("inspect", bundle, "--verify")
    assert result.returncode == 2
    assert result.stderr == f"leanvlm: {name} does not match its sha256 in leanvlm.json: copy or export the bundle again\n"


def test_doctor_says_what_is_there(leanvlm: Command) -> None:
    import onnxruntime

    result = leanvlm("doctor")
    assert result.returncode == 0
    assert f"onnxruntime {onnxruntime.__version__}" in result.stdout.splitlines()
    assert "CPUExecutionProvider" in result.stdout


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({}, "! running needs ONNX Runtime: pip install 'leanvlm[cpu]'"),
        ({"onnxruntime": "1.30", "onnxruntime-gpu": "1.30"}, "! onnxruntime and onnxruntime-gpu overwrite each other's"),
        ({"onnxruntime": "1.30", "torch": "2.9"}, "exporting is not set up (transformers, onnx, onnxscript"),
    ],
    ids=["nothing", "both", "half of export"],
)
def test_doctor_says_what_is_missing(there: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", there.get)
    assert any(line.startswith(words) for line in doctor.report().splitlines())


def test_version(leanvlm: Command) -> None:
    from importlib.metadata import version

    assert leanvlm("--version").stdout == f"{version('leanvlm')}\n"


def test_dry_run_writes_nothing_and_estimates_well(
    leanvlm: Command, demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = leanvlm("export", "--model", "demo", "--budget", 64, "--dry-run")
    assert result.returncode == 0
    assert not list(tmp_path.iterdir())
    stated = {name: float(size) * 1e6 for name, size in re.findall(r"^ +(\S+) +about ([\d.]+) MB", result.stdout, re.M)}
    real = {name: spec.bytes for name, spec in read_manifest(demo_bundle).files.items()}
    assert stated["together"] == pytest.approx(sum(real.values()), rel=0.2)
    large = {name for name, size in real.items() if size > 200_000}
    assert large <= set(stated)
    assert {name: stated[name] for name in large} == pytest.approx({name: real[name] for name in large}, rel=0.2)


def test_the_readme_names_every_command(leanvlm: Command) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*leanvlm ([a-z]+)", readme, re.M))
    listing = leanvlm("--help").stdout.partition("Commands:")[2]
    assert named == set(re.findall(r"^  ([a-z]+) ", listing, re.M))


ORDER = ["export", "run", "serve", "batch", "profile", "inspect", "build", "calibrate", "eval", "doctor"]


@pytest.mark.parametrize("command", [*ORDER, "calibrate gate"])
def test_every_command_has_help(leanvlm: Command, command: str) -> None:
    result, short = leanvlm(*command.split(), "--help"), leanvlm(*command.split(), "-h")
    assert result.returncode == short.returncode == 0
    assert result.stdout == short.stdout
    assert result.stdout.startswith(f"Usage: leanvlm {command}")


@pytest.mark.parametrize("command", ["", "calibrate"])
def test_a_command_without_more_prints_its_help_as_it_is(leanvlm: Command, command: str) -> None:
    bare, asked = leanvlm(*command.split()), leanvlm(*command.split(), "-h")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert bare.stdout == asked.stdout
    assert bare.stdout.startswith("Usage: leanvlm")
    assert len(bare.stdout.splitlines()) > 5


def test_commands_are_listed_in_the_order_of_use(leanvlm: Command) -> None:
    assert re.findall(r"^  ([a-z]+) ", leanvlm("-h").stdout.partition("Commands:")[2], re.M) == ORDER


@pytest.mark.parametrize(
    ("words", "offered"),
    [("leanvlm ex", ["export"]), ("leanvlm calibrate ", ["gate"]), ("leanvlm export --dry", ["--dry-run"])],
)
def test_a_shell_completes_commands_and_options(words: str, offered: list[str]) -> None:
    line = {"_LEANVLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    command = [sys.executable, "-m", "leanvlm"]
    done = subprocess.run(command, env={**os.environ, **line}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == offered
    assert done.stderr == ""


def optimum(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "leanvlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_optimum_exports_the_same_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo-64"
    result = optimum("--model", "demo", "--budget", 64, output)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{output}\n"
    ours, theirs = read_manifest(demo_bundle).files, read_manifest(output).files
    assert theirs == ours


def test_optimum_takes_the_options_of_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, with their defaults, to the same request."""
    import inspect
    from argparse import ArgumentParser
    from importlib import import_module

    import typer

    from leanvlm import export_command as cli

    registered: Any = import_module("optimum.commands.register.leanvlm").LeanVLMExportCommand
    parser = ArgumentParser(add_help=False)
    registered.parse_args(parser)
    app = typer.Typer(add_completion=False)
    app.command()(cli.export_command)
    ours: Any = typer.main.get_command(app)
    theirs = [action for action in parser._actions if action.option_strings]
    assert {name for action in theirs for name in action.option_strings} == {name for p in ours.params for name in p.opts}
    defaults = {name: p.default for name, p in inspect.signature(cli.export_command).parameters.items() if name != "model"}
    assert {action.dest: action.default for action in theirs if action.dest != "model"} == defaults

    requests: list[Any] = []
    monkeypatch.setattr(cli, "run_export", lambda config, *, dry_run: requests.append((config, dry_run)))
    words = [
        "--model",
        "m",
        "--budget",
        "9,8",
        "--pruner",
        "scope",
        "--gate-file",
        "g",
        "--target",
        "cuda",
        "--precision",
        "int8",
    ]
    words += ["--positions", "original", "--force", "--dry-run", "--revision", "r", "--token", "t", "--offline"]
    for arguments in (["--model", "m"], [*words, "-o", "out"]):
        requests.clear()
        ours.main(args=arguments, standalone_mode=False)
        for written in (arguments, ["out", *arguments[:-2]]) if "-o" in arguments else (arguments,):
            command = object.__new__(registered)
            command.args = parser.parse_args(written)
            command.run()
        assert all(request == requests[0] for request in requests)
        assert len(requests) > 1


def test_optimum_refuses_two_outputs(tmp_path: Path) -> None:
    result = optimum("--model", "demo", tmp_path / "one", "-o", tmp_path / "two")
    assert result.returncode == 2
    assert result.stderr.startswith("leanvlm: the output is given twice, as ")
    assert result.stderr.count("\n") == 1


def test_optimum_refuses_in_one_line(tmp_path: Path) -> None:
    result = optimum("--model", "demo", "--budget", "0", "-o", tmp_path / "demo")
    assert result.returncode == 2
    assert result.stderr == "leanvlm: budget 0 is not possible; a budget is at least 1 image token\n"
    assert not list(tmp_path.iterdir())
