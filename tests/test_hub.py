"""A checkpoint of the Hub: what is fetched, in which order, and what is refused before the weights are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import Command

import leanvlm.exporter.pipeline as pipeline
from leanvlm.exporter import ExportConfig, export
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.plan import Plan, plan
from leanvlm.runtime.errors import CheckpointError, InputError, LeanVLMError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-llava"


class Hub:
    """Stands in for `snapshot_download`: a repository that is a folder, and a cache that fills as files are asked for."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "snapshots" / COMMIT
        self.calls: list[tuple[str | None, bool]] = []

    def snapshot_download(self, name: str, *, allow_patterns: list[str], local_files_only: bool, **options: Any) -> str:
        """Copy the files of these names, as the Hub's client downloads them."""
        assert name == NAME
        files = [f for f in self.repository.iterdir() if any(fnmatch(f.name, pattern) for pattern in allow_patterns)]
        files = [f for f in files if not any(fnmatch(f.name, pattern) for pattern in options["ignore_patterns"])]
        self.calls.append((options["revision"], any(file.suffix == ".safetensors" for file in files)))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        if not local_files_only:
            for file in files:
                shutil.copyfile(file, self.snapshot / file.name)
        return str(self.snapshot)

    @property
    def weights(self) -> list[Path]:
        """Weights that were fetched."""
        return list(self.snapshot.glob("*.safetensors"))


@pytest.fixture
def hub(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(shutil.copytree(tiny_llava, tmp_path / "repository"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that come to be carried out; the work itself is tested elsewhere."""
    plans: list[Plan] = []

    def carried_out(request: Plan, on_step: Callable[[str], None]) -> None:
        plans.append(request)
        raise InputError("as far as this test goes")

    monkeypatch.setattr(pipeline, "export_plan", carried_out)
    return plans


def test_a_dry_run_fetches_no_weights_and_says_the_same_sizes(hub: Hub, tiny_llava: Path, leanvlm: Command) -> None:
    options = ["--budget", 16, "--dry-run", "-o", "bundle"]
    remote, local = leanvlm("export", "--model", NAME, *options), leanvlm("export", "--model", tiny_llava, *options)
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout.splitlines()[1:] == local.stdout.splitlines()[1:]
    assert remote.stdout.startswith(f"{NAME} (llava) to bundle:\n")
    assert hub.calls == [(None, False)]
    assert not hub.weights


@pytest.mark.parametrize("command", [True, False], ids=["command", "library"])
def test_an_export_fetches_weights_last_and_of_the_same_commit(
    command: bool, hub: Hub, exported: list[Plan], leanvlm: Command
) -> None:
    if command:
        assert leanvlm("export", "--model", NAME, "--budget", 16).returncode == 2
    else:
        with pytest.raises(InputError, match="as far as"):
            export(ExportConfig(NAME, (16,)))
    assert hub.calls[0] == (None, False)
    assert {revision for revision, _ in hub.calls[1:]} == {COMMIT}
    assert [with_weights for _, with_weights in hub.calls].count(True) == 1
    (request,) = exported
    assert [file.name for file in request.checkpoint.weight_files] == ["model.safetensors"]
    assert request.checkpoint.revision == COMMIT
    assert request.steps == plan(ExportConfig(str(hub.repository), (16,))).steps


def test_weights_in_a_format_of_their_makers_are_not_fetched(hub: Hub, exported: list[Plan]) -> None:
    shutil.copyfile(hub.repository / "model.safetensors", hub.repository / "consolidated.safetensors")
    with pytest.raises(InputError, match="as far as"):
        export(ExportConfig(NAME, (16,)))
    assert [file.name for file in hub.weights] == ["model.safetensors"]


def broken_template(repository: Path) -> None:
    (repository / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")


def other_size(repository: Path) -> None:
    path = next(repository / n for n in ("processor_config.json", "preprocessor_config.json") if (repository / n).is_file())
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    image = data.get("image_processor", data)
    image["crop_size"] = {"height": 8, "width": 8}
    path.write_text(json.dumps(data), encoding="utf-8")


def no_tokenizer(repository: Path) -> None:
    (repository / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [broken_template, other_size, no_tokenizer])
def test_what_the_small_files_say_is_refused_before_the_weights(damage: Callable[[Path], None], hub: Hub) -> None:
    damage(hub.repository)
    with pytest.raises(LeanVLMError):
        export(ExportConfig(NAME, (16,)))
    assert hub.calls == [(None, False)]


@pytest.mark.parametrize("options", [{"budgets": (10_000,)}, {"budgets": (16,), "pruner": "none"}], ids=["budget", "pruner"])
def test_a_wrong_request_is_refused_before_the_weights(options: dict[str, Any], hub: Hub) -> None:
    with pytest.raises(LeanVLMError):
        export(ExportConfig(NAME, **options))
    assert hub.calls == [(None, False)]


def test_a_gate_file_of_other_weights_is_refused_once_they_are_here(
    hub: Hub, tmp_path: Path, exported: list[Plan], tiny_llava: Path
) -> None:
    from leanvlm.exporter.gate_file import GateFile

    sha256 = open_checkpoint(ExportConfig(str(tiny_llava))).source().sha256
    for name, sum_of_weights, message in (("wrong.json", "0" * 64, "wrong.json"), ("right.json", sha256, "as far as")):
        (tmp_path / name).write_bytes(GateFile(NAME, sum_of_weights, 8, "test", 60.0, 5.5).to_bytes())
        with pytest.raises(InputError, match=message):
            export(ExportConfig(NAME, (16,), gate_file=tmp_path / name))
    assert len(exported) == 1


def test_offline_after_a_dry_run_says_what_is_missing(hub: Hub) -> None:
    plan(ExportConfig(NAME, (16,)))
    with pytest.raises(CheckpointError, match=r"the weights of 'someone/tiny-llava' are not on this machine; .*--offline"):
        export(ExportConfig(NAME, (16,), offline=True))


def test_a_repository_of_pickles_is_refused(hub: Hub) -> None:
    next(hub.repository.glob("*.safetensors")).rename(hub.repository / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights"):
        export(ExportConfig(NAME, (16,)))
