"""The files of the page that `leanvlm serve` shows: what they hold, without a browser; test_page_browser.py has one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from leanvlm.runtime.answer import Timings
from leanvlm.runtime.commands.overlay import COLOURS, DIM

FOLDER = Path(str(files("leanvlm.runtime.serving"))) / "page"
SCRIPTS = sorted(FOLDER.glob("*.js"))
FILE_LINES = 400
# WCAG 2.2 AA: of text, and of the edges of fields, bars and marks of focus.
TEXT, EDGE = 4.5, 3.0
ON_GROUND = [("--ink", TEXT), ("--soft", TEXT), ("--accent", EDGE), ("--edge", EDGE), ("--lean", EDGE), ("--full", EDGE)]
CONTRASTS = [
    *((colour, ground, least) for ground in ("--ground", "--raised") for colour, least in ON_GROUND),
    ("--on-accent", "--accent", TEXT),
    ("--wrong", "--wrong-ground", TEXT),
    ("--live", "--raised", TEXT),
]
needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="needs node, which runs the page's modules without a browser"
)


class Page(HTMLParser):
    """The elements of a page, each with its attributes, and the text inside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.code = ""
        self.open: list[str] = []
        self.feed(read("index.html"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Forget it, and what was not closed inside."""
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Note what stands in scripts and styles."""
        if self.open and self.open[-1] in ("script", "style"):
            self.code += data

    def all(self, attribute: str) -> list[str]:
        """Return every value of an attribute."""
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.fixture
def node(tmp_path: Path) -> Callable[[str, str], Any]:
    """A function that runs a script with a module's names in `page`, and returns what it prints, as JSON."""
    shutil.copytree(FOLDER, tmp_path / "page")
    (tmp_path / "package.json").write_text('{"type": "module"}', encoding="utf-8")

    def run(module: str, script: str) -> Any:
        main = tmp_path / "main.js"
        main.write_text(f'import * as page from "./page/{module}";\n{script}', encoding="utf-8")
        result = subprocess.run(["node", main], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def variables(scheme: str) -> dict[str, tuple[float, float, float]]:
    """Return the colours of the light or dark scheme, each channel in 0..1."""
    light, dark = re.split(r"@media \(prefers-color-scheme: dark\)", read("page.css"), maxsplit=1)
    text = light if scheme == "light" else dark[: dark.index("}")]
    found = re.findall(r"(--[\w-]+): #(\w\w)(\w\w)(\w\w);", text)
    return {name: (int(red, 16) / 255, int(green, 16) / 255, int(blue, 16) / 255) for name, red, green, blue in found}


def luminance(colour: tuple[float, float, float]) -> float:
    """Return the relative luminance of WCAG 2.2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_files_are_there_and_short() -> None:
    assert {"index.html", "page.css", "page.js"} <= {file.name for file in FOLDER.iterdir()}
    for file in FOLDER.iterdir():
        lines = [line.strip() for line in read(file.name).splitlines()]
        code = [line for line in lines if line and not line.startswith(("//", "/*", "*"))]
        assert len(code) <= FILE_LINES, file.name
        assert file.suffix == ".html" or max(map(len, read(file.name).splitlines())) <= 128, file.name


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    page = Page()
    assert not page.code.strip()
    assert not [name for _, attributes in page.elements for name in attributes if name == "style" or name.startswith("on")]
    links = [*page.all("src"), *page.all("href")]
    local = [link for link in links if not link.startswith("data:image/svg+xml,")]
    assert len(links) - len(local) == 1
    assert local
    assert all(re.fullmatch(r"[\w.]+", link) and (FOLDER / link).is_file() for link in local)
    for file in FOLDER.iterdir():
        text = read(file.name).replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\bhttps?://|[\"'(]//\w|@import|url\(|\beval\b|innerHTML|outerHTML|insertAdjacentHTML", text), (
            file.name
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_imports_and_ids_exist(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    imports = re.findall(r"^import \{ (.+) \} from \"\./(\w+\.js)\";$", text, re.MULTILINE)
    assert len(imports) == text.count("import ")
    for names, name in imports:
        for one in names.split(", "):
            assert re.search(rf"^export (async )?(const|function\*?|class) {one.split()[0]}\b", read(name), re.MULTILINE), one
    assert {*re.findall(r"\bby\(\"([\w-]+)\"\)", text)} <= {*Page().all("id")}


def test_everything_has_a_name_that_is_read_out() -> None:
    page = Page()
    ids = page.all("id")
    assert len(ids) == len({*ids})
    named = [one for attribute in ("for", "aria-labelledby", "aria-describedby") for one in page.all(attribute)]
    assert {*named} <= {*ids}
    assert dict(page.elements)["html"]["lang"] == "en"
    # A field in a label has that for a name.
    inside = {
        one for label in re.findall(r"<label>.*?</label>", read("index.html")) for one in re.findall(r'id="([\w-]+)"', label)
    }
    for tag, attributes in page.elements:
        if tag in ("input", "select", "textarea") and attributes.get("type") != "radio":
            assert attributes["id"] in {*page.all("for")} | inside, attributes
        if tag in ("canvas", "video"):
            assert attributes["aria-label"]
        if tag == "button":
            assert attributes["type"] in ("button", "submit")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa(scheme: str) -> None:
    colours = variables(scheme)
    assert variables("light").keys() == variables("dark").keys()
    for front, back, least in CONTRASTS:
        low, high = sorted((luminance(colours[front]), luminance(colours[back])))
        assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_colours_and_stages_are_those_of_the_command() -> None:
    text = read("overlay.js")
    dim = re.search(r"DIM = ([\d.]+);", text)
    assert dim is not None
    assert float(dim[1]) == DIM
    stops = re.findall(r"\[([\d.]+), \[(\d+), (\d+), (\d+)\]\],", text)
    assert tuple((float(stop), (int(red), int(green), int(blue))) for stop, red, green, blue in stops) == COLOURS
    listed = re.search(r"STAGES = \{(.*?)\};", read("times.js"), re.DOTALL)
    assert listed is not None
    assert re.findall(r"(\w+): \"", listed[1]) == [*Timings().to_dict()]


@needs_node
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse(script: Path, tmp_path: Path) -> None:
    module = tmp_path / "script.mjs"
    module.write_text(script.read_text(encoding="utf-8"), encoding="utf-8")
    result = subprocess.run(["node", "--check", module], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_node
def test_events_come_whole_whatever_pieces_they_arrive_in(node: Callable[[str, str], Any]) -> None:
    sent = ': ping\r\n\r\ndata: {"a": "é"}\n\ndata:two\rdata: lines\r\rdata: 1\r\ndata: 2\r\n\r\nevent: x\nid: 3\n\n'
    sent += "data: [DONE]\r\n\r\ndata: never ended"
    pieces = """
        const bytes = new TextEncoder().encode(SENT);
        const all = [];
        for (let size = 1; size <= bytes.length; size += 1) {
            const stream = new ReadableStream({ start(sink) {
                for (let at = 0; at < bytes.length; at += size) sink.enqueue(bytes.slice(at, at + size));
                sink.close();
            } });
            const found = [];
            for await (const data of page.events(stream)) found.push(data);
            all.push(found);
        }
        console.log(JSON.stringify(all));
    """
    found = node("client.js", f"const SENT = {json.dumps(sent)};{pieces}")
    assert len(found) == len(sent.encode())
    assert all(events == ['{"a": "é"}', "two\nlines", "1\n2", "[DONE]"] for events in found)


@needs_node
def test_tiles_are_placed_apart_from_the_whole_picture(node: Callable[[str, str], Any]) -> None:
    halves = [{"grid": [2, 2], "box": [0, 0, 0.5, 1.2], "kept": [0]}, {"grid": [2, 2], "box": [0.499, 0, 1, 1.2], "kept": []}]
    whole = {"grid": [1, 1], "box": [0, 0, 1, 1], "kept": [0]}
    script = f"""
        const crops = {json.dumps([whole, *halves])};
        const places = page.layers(crops).map((layer) => layer.map((crop) => crops.indexOf(crop)));
        console.log(JSON.stringify([places, page.cells(crops[1], 100, 50), page.isCut(crops), page.isCut([crops[1]]),
            page.words({{ kept: 2, total: 9, crops }}), page.words({{ kept: 9, total: 9, crops }})]));
    """
    places, cells, cut, half, words, everything = node("overlay.js", script)
    assert places == [[1, 2], [0]]
    assert cells == [[0, 0, 25, 30], [25, 0, 50, 30], [0, 30, 25, 60], [25, 30, 50, 60]]
    assert (cut, half) == (False, True)
    assert words.startswith("2 of 9 image tokens kept, 22\xa0%. Most of them: top left 100\xa0%.")
    assert everything == "All 9 image tokens kept."
