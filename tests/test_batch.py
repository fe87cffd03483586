"""`leanvlm batch`: every row of an input is answered once, whatever happens to the run; a bad row is an error in its place."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime.batch import local, run
from leanvlm.runtime.batch.parts import Parts
from leanvlm.runtime.batch.run import BatchConfig, run_batch
from leanvlm.runtime.batch.source import ANSWER_COLUMNS, Row
from leanvlm.runtime.batch.work import BROKEN, Job, Outcome, Worker
from leanvlm.runtime.errors import BackendError, InputError
from leanvlm.runtime.session import Session, load

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

QUESTION = "What is below the green ring?"
SCENE = SAMPLES_DIR / "complex-9003.png"
PHOTOGRAPHS_DIR = SAMPLES_DIR.with_name("photographs")


def table(path: Path) -> list[dict[str, Any]]:
    """Return a parquet file's rows."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def lines(path: Path, records: Sequence[object]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- Answers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Session:
    return load(demo_bundle)


def test_a_folder_is_answered_as_run_answers(leanvlm: Command, demo_bundle: Path, session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("b.png", "deep/er/a.PNG", ".hidden.png", ".hidden/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SCENE, folder / name)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    (folder / "broken.jpg").write_bytes(b"no image")
    output = tmp_path / "out.parquet"
    done = leanvlm("batch", folder, "--bundle", demo_bundle, "--prompt", QUESTION, "-o", output)
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    assert done.stderr.startswith("3 rows; 1 errors; ")
    assert done.stderr.count("\n") == 1
    rows = table(output)
    assert [row["id"] for row in rows] == [row["image"] for row in rows] == ["b.png", "broken.jpg", "deep/er/a.PNG"]
    asked = json.loads(leanvlm("run", demo_bundle, "--image", SCENE, "--prompt", QUESTION, "--json").stdout)
    for row in (rows[0], rows[2]):
        assert row["error"] is None
        assert row["text"] == asked["text"] == "a yellow hexagon"
        assert (row["finish_reason"], row["prompt_tokens"]) == (asked["finish_reason"], asked["prompt_tokens"])
        assert row["completion_tokens"] == len(asked["token_ids"])
        assert (row["kept"], row["total"]) == (asked["pruning"]["kept"], asked["pruning"]["total"]) == (64, 576)
        assert row["time_to_first_token_ms"] > 0
    assert "broken.jpg" in rows[1]["error"]
    assert [rows[1][name] for name in ANSWER_COLUMNS if name != "error"] == [None] * 7
    assert not (tmp_path / "out.parquet.parts").exists()


def test_lines_carry_their_columns(demo_bundle: Path, session: Session, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(SCENE, tmp_path / "in" / "scene.png")
    other = PHOTOGRAPHS_DIR / "coffee.jpg"
    source = lines(
        tmp_path / "in" / "rows.jsonl",
        [
            {
                "image": "scene.png",
                "prompt": QUESTION,
                "label": "yellow",
                "score": 1,
                "big": 2**60,
                "mixed": 1,
                "nested": {"a": 1},
            },
            {"images": [str(other), "scene.png"], "score": 0.5, "big": 1, "mixed": "é", "id": None},
            {"image": "missing.png", "label": None, "flag": True},
        ],
    )
    run_batch(BatchConfig(source, demo_bundle, tmp_path / "out.parquet", prompt="What is it?", budget=576, part_rows=2))
    rows = table(tmp_path / "out.parquet")
    texts = [
        session.generate(QUESTION, [SCENE], budget=576).text,
        session.generate("What is it?", [other, SCENE], budget=576).text,
        None,
    ]
    assert [row["text"] for row in rows] == texts
    assert [row["kept"] for row in rows] == [576, 1152, None]
    assert "missing.png" in rows[2]["error"]
    carried = [{name: value for name, value in row.items() if name not in ANSWER_COLUMNS} for row in rows]
    empty = dict.fromkeys(("prompt", "label", "score", "big", "mixed", "nested", "images", "image", "flag", "id"))
    assert carried == [
        {**empty, "image": "scene.png", "prompt": QUESTION, "label": "yellow", "score": 1.0, "big": 2**60, "mixed": "1",
         "nested": '{"a": 1}'},
        {**empty, "images": [str(other), "scene.png"], "score": 0.5, "big": 1, "mixed": '"é"'},
        {**empty, "image": "missing.png", "flag": True},
    ]  # fmt: skip


def scene_table(images: Any, **columns: Any) -> Any:
    return pa.table({"image": images, **columns})


def test_parquet_with_bytes_keeps_the_other_columns_as_they_are(
    leanvlm: Command, demo_bundle: Path, session: Session, tmp_path: Path
) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901)
    images = [{"bytes": SCENE.read_bytes(), "path": "a.png"}, {"bytes": b"no image", "path": None}, None]
    given = scene_table(
        pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        prompt=[QUESTION, None, QUESTION],
        when=pa.array([moment] * 3, pa.timestamp("ns", "UTC")),
        tags=[["x"], [], None],
    )
    pq.write_table(given, tmp_path / "in.parquet", row_group_size=2)
    # Two processes, and the second row's question from the command.
    command = ("batch", tmp_path / "in.parquet", "--bundle", demo_bundle, "--workers", 2, "--threads", 1)
    done = leanvlm(*command, "--prompt", "Why?", "-o", tmp_path / "out.parquet")
    assert done.returncode == 0, done.stderr
    written = pq.read_table(tmp_path / "out.parquet")
    assert written.schema.names == ["id", "image", "prompt", "when", "tags", *ANSWER_COLUMNS]
    for name in ("prompt", "when", "tags"):
        assert written[name].combine_chunks() == given[name].combine_chunks()
    assert written["id"].to_pylist() == [0, 1, 2]
    assert written["image"].to_pylist() == ["a.png", None, None]
    assert written["text"].to_pylist() == [session.generate(QUESTION, [SCENE]).text, None, None]
    errors = written["error"].to_pylist()
    assert errors[0] is None
    assert "image" in errors[1]
    assert errors[2] == "the row has no image"


@pytest.mark.parametrize("workers", [1, 2])
def test_several_answers_at_once_are_each_what_they_are_alone(demo_bundle: Path, tmp_path: Path, workers: int) -> None:
    images = [SCENE, *sorted(PHOTOGRAPHS_DIR.glob("*.jpg"))[:4], Path("missing.png")]
    source = lines(tmp_path / "in.jsonl", [{"image": str(images[n % 6]), "number": n} for n in range(20)])
    alone = BatchConfig(source, demo_bundle, tmp_path / "alone.parquet", prompt=QUESTION)
    together = BatchConfig(source, demo_bundle, tmp_path / "out.parquet", prompt=QUESTION, rows=3, workers=workers, part_rows=7)
    run_batch(alone)
    assert run_batch(together).errors == 3
    same = ("number", "text", "finish_reason", "prompt_tokens", "completion_tokens", "kept", "total", "error")
    first, second = ([[row[name] for name in same] for row in table(config.output)] for config in (alone, together))
    assert first == second


# --- Rows of each kind of input ----------------------------------------------------------------------------------------


class Stub(Worker):
    """A worker without a bundle: it answers with what it was asked, and knows how often."""

    asked: list[Row]
    fails: Callable[[Row], bool]

    def __init__(self, job: Job) -> None:
        pass

    def answers(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Say what was asked, or fail."""
        return map(self.answer, rows)

    def answer(self, row: Row) -> Outcome:
        """Say what a row asks, or fail."""
        type(self).asked.append(row)
        if type(self).fails(row):
            raise BackendError("the device is lost")
        return (
            Outcome(error=row.error) if row.error else Outcome(text=f"{row.prompt} {[_named(image) for image in row.images]}")
        )

    def close(self) -> None:
        """Close nothing."""


def _named(image: Path | bytes) -> str:
    return image.name if isinstance(image, Path) else image.decode()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    """Answer with a stub in place of a session."""
    monkeypatch.setattr(local, "Worker", Stub)
    monkeypatch.setattr(Stub, "asked", [], raising=False)
    monkeypatch.setattr(Stub, "fails", staticmethod(lambda row: False), raising=False)
    return Stub


@pytest.mark.parametrize("part_rows", [1, 3, 4, 64])
@pytest.mark.parametrize("group", [1, 2, 5, 100])
def test_parts_and_row_groups_of_any_size(
    stub: type[Stub], tiny_bundle: Path, tmp_path: Path, part_rows: int, group: int
) -> None:
    count = 40
    images = [[b"a%d" % n, b"b"][: 1 + n % 2] for n in range(count)]
    given = pa.table({"images": images, "prompt": [f"p{n}" for n in range(count)], "id": [f"row {n}" for n in range(count)]})
    pq.write_table(given, tmp_path / "in.parquet", row_group_size=group)
    run_batch(BatchConfig(tmp_path / "in.parquet", tiny_bundle, tmp_path / "out.parquet", part_rows=part_rows))
    rows = table(tmp_path / "out.parquet")
    assert [(row["id"], row["prompt"], row["text"]) for row in rows] == [
        (f"row {n}", f"p{n}", f"p{n} {[f'a{n}', 'b'][: 1 + n % 2]}") for n in range(count)
    ]
    assert "images" not in rows[0]


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array(["x.png", "", None]), ["x.png", None, None]),
        (pa.array(["x.png", "", None], pa.large_string()), ["x.png", None, None]),
        (pa.array([b"x", b"", None], pa.large_binary()), ["x", None, None]),
        (pa.array([{"path": "x.png"}, {"path": None}, None]), ["x.png", None, None]),
        (pa.array([{"bytes": b"x"}, {"bytes": b""}, None]), ["x", None, None]),
    ],
    ids=["paths", "long paths", "bytes", "records of paths", "records of bytes"],
)
def test_images_in_every_column(
    stub: type[Stub], tiny_bundle: Path, tmp_path: Path, column: Any, names: list[str | None]
) -> None:
    pq.write_table(pa.table({"image": column}), tmp_path / "in.parquet")
    run_batch(BatchConfig(tmp_path / "in.parquet", tiny_bundle, tmp_path / "out.parquet", prompt="?"))
    expected = [(f"? ['{name}']", None) if name else (None, "the row has no image") for name in names]
    assert [(row["text"], row["error"]) for row in table(tmp_path / "out.parquet")] == expected


def test_names_that_are_no_text(stub: type[Stub], tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"\xff.png")).touch()
    run_batch(BatchConfig(tmp_path / "in", tiny_bundle, tmp_path / "out.parquet", prompt="?"))
    assert table(tmp_path / "out.parquet")[0]["id"] == "\\xff.png"
    assert os.fsencode(stub.asked[0].images[0]).endswith(b"/\xff.png")  # type: ignore[arg-type]


# --- Mistakes -----------------------------------------------------------------------------------------------------------

GOOD = b'{"image": "a.png", "prompt": "What?"}\n\n'
BAD_LINES = {
    "no JSON": (GOOD + b'{"image": ', "line 3 cannot be read as JSON"),
    "no UTF-8": (GOOD + b'{"image": "\xff"}', "line 3 cannot be read as JSON"),
    "half a character": (GOOD + b'{"image": "a", "prompt": "\\ud800"}', "line 3 cannot be read as JSON"),
    "nested": (GOOD + b"[" * 100_000, "line 3 cannot be read as JSON"),
    "no number": (GOOD + b'{"image": "a", "prompt": "b", "x": NaN}', "line 3 cannot be read as JSON"),
    "no object": (GOOD + b"[]", "line 3 is no object"),
    "no image": (GOOD + b'{"prompt": "b"}', "line 3 needs image"),
    "two images": (GOOD + b'{"image": "a", "images": ["a"], "prompt": "b"}', "line 3 needs image"),
    "a number": (GOOD + b'{"image": 5, "prompt": "b"}', "line 3: 5 is no path"),
    "a null byte": (GOOD + b'{"image": "a\\u0000", "prompt": "b"}', "is no path of an image"),
    "a text": (GOOD + b'{"images": "a.png", "prompt": "b"}', "line 3: images is no list"),
    "no images": (GOOD + b'{"images": [], "prompt": "b"}', "line 3: images is no list"),
    "no prompt": (GOOD + b'{"image": "a.png"}', "line 3 has no prompt"),
    "a list": (GOOD + b'{"image": "a.png", "prompt": ["b"]}', "line 3: prompt is no text"),
    "a column of ours": (GOOD + b'{"image": "a.png", "prompt": "b", "kept": 1}', "has a column 'kept'"),
    "nothing": (b"\n \n", "has no lines in it"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(leanvlm: Command, tiny_bundle: Path, tmp_path: Path, case: str) -> None:
    content, words = BAD_LINES[case]
    (tmp_path / "in.jsonl").write_bytes(content)
    refused(leanvlm, tmp_path, ("in.jsonl", "--bundle", tiny_bundle, "-o", "out.parquet"), words)


def refused(leanvlm: Command, folder: Path, arguments: Sequence[object], words: str) -> None:
    """Check that a batch says this in one line, and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    paths = {"in.jsonl", "in.parquet", "in", "out.parquet", "nowhere.jsonl", "in/out.parquet"}
    done = leanvlm("batch", *(folder / str(part) if str(part) in paths else part for part in arguments))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert sorted(folder.rglob("*")) == before


BAD_TABLES = {
    "no images": ({"prompt": ["a"]}, "needs a column image"),
    "numbers": ({"image": [1]}, "the column image has int64"),
    "a record of others": ({"image": [{"bytes": b"", "x": 1}]}, "the column image has struct"),
    "no lists": ({"images": ["a.png"]}, "the column images has string"),
    "lists of numbers": ({"images": [[1]]}, "the column images has int64"),
    "prompts of numbers": ({"image": ["a"], "prompt": [1]}, "the column prompt has int64"),
    "a column of ours": ({"image": ["a"], "text": ["b"]}, "has a column 'text'"),
    "no rows": ({"image": pa.array([], pa.string())}, "has no rows in it"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(leanvlm: Command, tiny_bundle: Path, tmp_path: Path, case: str) -> None:
    columns, words = BAD_TABLES[case]
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    refused(leanvlm, tmp_path, ("in.parquet", "--bundle", tiny_bundle, "-o", "out.parquet", "--prompt", "?"), words)


def test_other_mistakes(leanvlm: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    good = ("--bundle", tiny_bundle, "-o", "out.parquet")
    (tmp_path / "in").mkdir()
    refused(leanvlm, tmp_path, ("in", *good), "give --prompt")
    refused(leanvlm, tmp_path, ("in", *good, "--prompt", "?"), "has no images in it")
    shutil.copy(SCENE, tmp_path / "in" / "a.png")
    asked = ("in", *good, "--prompt", "?")
    refused(leanvlm, tmp_path, ("nowhere.jsonl", *good), "nowhere.jsonl does not exist")
    refused(leanvlm, tmp_path, (*asked, "--engine", "spark"), "--engine spark is not one of local, ray")
    refused(leanvlm, tmp_path, (*asked, "--gpus", 1), "--gpus goes with --engine ray")
    refused(leanvlm, tmp_path, (*asked, "--budget", 7), "7")
    refused(leanvlm, tmp_path, (*asked, "--max-new-tokens", 0), "max_new_tokens 0")
    refused(leanvlm, tmp_path, (*asked, "--device", "abacus"), "abacus")
    refused(leanvlm, tmp_path, (*asked, "--device", "abacus", "--workers", 2), "abacus")
    refused(
        leanvlm, tmp_path, ("in", "--bundle", tmp_path / "no bundle", "-o", "out.parquet", "--prompt", "?"), "is not a folder"
    )
    refused(
        leanvlm, tmp_path, ("in", "--bundle", tiny_bundle, "-o", "in/out.parquet", "--prompt", "?"), "which the command reads"
    )
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no table PAR1")
    refused(leanvlm, tmp_path, ("in.parquet", *good), "cannot be read as parquet")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    refused(leanvlm, tmp_path, (tmp_path / "notes.txt", *good), "does not end in")


def test_without_pyarrow(leanvlm: Command, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(leanvlm, tmp_path, (PHOTOGRAPHS_DIR, "--bundle", tiny_bundle, "-o", "out.parquet"), "pip install 'leanvlm[scale]'")


# --- Runs that are stopped ------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> BatchConfig:
    """A batch of ten rows in parts of three."""
    source = lines(tmp_path / "in.jsonl", [{"image": f"{n}.png"} for n in range(10)])
    return BatchConfig(source, tiny_bundle, tmp_path / "out.parquet", prompt="?", part_rows=3)


def parts_of(config: BatchConfig) -> list[str]:
    return sorted(path.name for path in config.output.with_name("out.parquet.parts").glob("*.parquet"))


def stopped_at(config: BatchConfig, stub: type[Stub], number: int) -> None:
    """Run a batch whose device is lost at a row."""
    stub.fails = staticmethod(lambda row: row.images[0] == config.source.parent / f"{number}.png")
    with pytest.raises(BackendError, match="the device is lost"):
        run_batch(config)
    stub.fails = staticmethod(lambda row: False)
    stub.asked.clear()


def other(config: BatchConfig, **changes: Any) -> BatchConfig:
    return BatchConfig(**{**vars(config), **changes})


def test_a_stopped_run_goes_on(stub: type[Stub], config: BatchConfig) -> None:
    stopped_at(config, stub, 7)
    assert parts_of(config) == ["part-00000.parquet", "part-00001.parquet"]
    assert not config.output.exists()
    seen: list[tuple[int, int, int]] = []
    summary = run_batch(config, lambda *state: seen.append(state))
    assert [row.images[0].name for row in stub.asked] == [f"{n}.png" for n in range(6, 10)]  # type: ignore[union-attr]
    assert (summary.rows, summary.found, summary.errors) == (10, 6, 0)
    assert seen == [(10, done, 0) for done in range(6, 11)]
    assert [row["id"] for row in table(config.output)] == list(range(10))
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["in.jsonl", "out.parquet"]


def test_parts_that_are_lost_or_cut_short_are_made_again(stub: type[Stub], config: BatchConfig) -> None:
    stopped_at(config, stub, 9)
    folder = config.output.with_name("out.parquet.parts")
    (folder / "part-00000.parquet").unlink()
    whole = (folder / "part-00001.parquet").read_bytes()
    (folder / "part-00001.parquet").write_bytes(whole[:-100])
    (folder / ".part-00003.parquet.new").write_bytes(b"half")
    assert run_batch(config).found == 3
    assert [row["text"] for row in table(config.output)] == [f"? ['{n}.png']" for n in range(10)]


def test_other_settings_are_refused(stub: type[Stub], config: BatchConfig, tiny_llava: Path) -> None:
    stopped_at(config, stub, 7)
    for changed, words in (
        ({"prompt": "Why?"}, "prompt"),
        ({"budget": 121}, "budget"),
        ({"part_rows": 4}, "part_rows"),
        ({"options": {"temperature": 0.5}}, "options"),
    ):
        with pytest.raises(InputError, match=rf"parts of other settings \({words}\); repeat its command, or give --restart"):
            run_batch(other(config, **changed))
    lines(config.source, [{"image": f"{n}.png"} for n in range(9)])
    with pytest.raises(InputError, match=r"parts of other settings \(input\)"):
        run_batch(config)
    assert not stub.asked
    assert run_batch(other(config, restart=True)).found == 0
    assert len(table(config.output)) == len(stub.asked) == 9


def test_workers_and_threads_may_change(stub: type[Stub], config: BatchConfig) -> None:
    stopped_at(config, stub, 7)
    assert run_batch(other(config, threads=1)).found == 6


def test_an_output_is_replaced_only_when_asked(stub: type[Stub], config: BatchConfig) -> None:
    config.output.write_text("mine", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(InputError, match="no batch of ours wrote it"):
            run_batch(other(config, force=force))
    pq.write_table(pa.table({"mine": [1]}), config.output)
    with pytest.raises(InputError, match="no batch of ours wrote it"):
        run_batch(other(config, force=True))
    config.output.unlink()
    run_batch(config)
    with pytest.raises(InputError, match="is there; give another name, or --force"):
        run_batch(config)
    stub.asked.clear()
    run_batch(other(config, force=True))
    assert len(stub.asked) == 10
    # The older output is there until the new one is whole.
    stopped_at(other(config, force=True, prompt="Why?"), stub, 7)
    assert table(config.output)[0]["text"] == "? ['0.png']"
    assert run_batch(other(config, force=True, prompt="Why?")).found == 6
    assert table(config.output)[9]["text"] == "Why? ['9.png']"


def test_killed_between_the_last_two_steps(stub: type[Stub], config: BatchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "_remove", lambda parts: None)
        run_batch(config)
    assert len(parts_of(config)) == 4
    stub.asked.clear()
    assert run_batch(config).found == 10
    assert (len(table(config.output)), stub.asked, parts_of(config)) == (10, [], [])


@pytest.mark.parametrize("left", range(5))
def test_killed_while_parts_are_removed(
    stub: type[Stub], config: BatchConfig, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """What says whose they are goes last, in whatever order a folder lists its files."""
    unlinked = count()

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-") and next(unlinked) == 4 - left:
            raise KeyboardInterrupt
        os.unlink(path)

    def rmtree(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            run_batch(config)
    assert len(parts_of(config)) == left
    stub.asked.clear()
    assert run_batch(config).found == 10
    assert (len(table(config.output)), stub.asked) == (10, [])
    assert not config.output.with_name("out.parquet.parts").exists()


def test_options_that_no_row_could_be_answered_with(stub: type[Stub], config: BatchConfig) -> None:
    for options, words in (({"max_new_tokens": 10**6}, "leaves no room"), ({"stop": ""}, "must not be empty")):
        with pytest.raises(InputError, match=words):
            run_batch(other(config, options=options))
    assert not config.output.with_name("out.parquet.parts").exists()
    assert not stub.asked


def test_two_runs_are_not_one(stub: type[Stub], config: BatchConfig) -> None:
    stopped_at(config, stub, 7)
    with (config.output.with_name("out.parquet.parts") / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            run_batch(config)
    run_batch(config)


def test_a_folder_of_another_is_left_alone(stub: type[Stub], config: BatchConfig) -> None:
    folder = config.output.with_name("out.parquet.parts")
    folder.mkdir()
    (folder / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"letter.txt and no run.json: it is no batch's"):
        run_batch(config)


def test_a_lost_device_ends_the_run(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's own failure is its error; so many in a row are not theirs."""
    source = lines(tmp_path / "in.jsonl", [{"image": str(SCENE)} for _ in range(BROKEN + 2)])
    config = BatchConfig(source, demo_bundle, tmp_path / "out.parquet", prompt="?", part_rows=4)
    failing = {0: "once"}
    asked: list[int] = []

    def generate(self: Session, *arguments: object, **options: object) -> None:
        asked.append(len(asked))
        if asked[-1] in failing or len(failing) > 1:
            raise RuntimeError("out of\nmemory")
        raise InputError("its own")

    monkeypatch.setattr(Session, "generate", generate)
    run_batch(config)
    errors = [row["error"] for row in table(config.output)]
    assert errors == ["RuntimeError: out of memory", *["its own"] * (BROKEN + 1)]
    failing[1] = "always"
    with pytest.raises(
        BackendError, match=f"{BROKEN} rows failed one after another, the last with RuntimeError: out of memory"
    ):
        run_batch(other(config, force=True))
    assert len(parts_of(config)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_process_costs_a_part_at_most(tiny_bundle: Path, tmp_path: Path, workers: int) -> None:
    """After a `kill -9` the same command makes each row once, with the answers of a run that was left alone."""
    count = 30
    pictures = [SCENE, *sorted(PHOTOGRAPHS_DIR.glob("*.jpg"))]
    records = [{"image": str(pictures[n % len(pictures)]), "number": n} for n in range(count)]
    source, output = lines(tmp_path / "in.jsonl", records), tmp_path / "out.parquet"
    folder = tmp_path / "out.parquet.parts"
    options = ("--prompt", "What is it?", "--part-rows", "2", "--workers", str(workers), "--max-new-tokens", "16")
    command = [sys.executable, "-m", "leanvlm", "batch", source, "--bundle", tiny_bundle, "-o", output, *options]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: len(list(folder.glob("part-*"))) >= 2)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not output.exists()
    # Workers end with it.
    until(lambda: not members(started.pid))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = int(done.stderr.partition("rows, ")[2].partition(" of")[0])
    assert 4 <= found < count
    rows = table(output)
    assert [row["number"] for row in rows] == list(range(count))
    alone = tmp_path / "alone.parquet"
    run_batch(BatchConfig(source, tiny_bundle, alone, prompt="What is it?", options={"max_new_tokens": 16}))
    assert [row["text"] for row in rows] == [row["text"] for row in table(alone)]


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def members(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(path.parent.name)
    return found


def test_a_worker_that_dies_ends_the_run(
    demo_bundle: Path, tmp_path: Path, config: BatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out: one line, and no process is left."""
    folder = lines(tmp_path / "many.jsonl", [{"image": str(SCENE)} for _ in range(40)])
    killed: list[int] = []

    def kill(rows: int, done: int, errors: int) -> None:
        import multiprocessing

        if done == 2 and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid or 0)
            child.kill()

    asked = BatchConfig(folder, demo_bundle, tmp_path / "out.parquet", prompt="?", workers=2, threads=1, part_rows=2)
    with pytest.raises(BackendError, match="a worker's process has ended"):
        run_batch(asked, kill)
    assert killed
    assert run_batch(other(asked, workers=1)).found >= 2


def test_engines_have_a_name() -> None:
    assert {*run.ENGINES} == {"local", "ray"}
