"""The page of `leanvlm serve` in headless Chromium, against the command with the built-in model.

Needs Chromium and its driver (Debian: `chromium chromium-driver`) and the Python package `selenium`; `make test-slow` runs it.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import leanvlm
from leanvlm.runtime.commands.overlay import DIM

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    DRIVER = None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium, chromedriver and the package selenium"),
    # Of selenium, whose sockets are closed with the driver.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

QUESTION, ANSWER = "What is below the green ring?", "a yellow hexagon"
SECONDS = 30
# Violations of the policy, and questions that were sent, both noted before the page's own code runs.
SPY = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
    window.sent = [];
    const fetched = window.fetch;
    window.fetch = (path, options) => {
        if (options?.body) sent.push(JSON.parse(options.body));
        return fetched(path, options);
    };
    window.cameras = 0;
    const given = navigator.mediaDevices?.getUserMedia.bind(navigator.mediaDevices);
    if (given) navigator.mediaDevices.getUserMedia = (wanted) => (cameras += 1, given(wanted));
"""
# Hands a file over as dragging or pasting it does.
HAND_OVER = """
    const [kind, name, text] = arguments;
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: "image/png" }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
    document.getElementById("place").dispatchEvent(event);
"""
# The mean level of each of the canvas's cells.
LEVELS = """
    const canvas = document.getElementById("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const sums = Array.from({ length: 576 }, () => 0);
    for (let y = 0; y < canvas.height; y += 1) for (let x = 0; x < canvas.width; x += 1) {
        const at = 4 * (y * canvas.width + x);
        const cell = 24 * Math.floor((24 * y) / canvas.height) + Math.floor((24 * x) / canvas.width);
        sums[cell] += data[at] + data[at + 1] + data[at + 2];
    }
    return sums;
"""


class Reader:
    """Someone in front of the page, and what the browser noted meanwhile."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        self.address = address

    def open(self) -> None:
        """Go to the page, as if for the first time."""
        self.driver.get(self.address)

    def run(self, script: str, *arguments: object) -> Any:
        """Return what a script of the page returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """Return an element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: str, *arguments: object) -> None:
        """Wait until a condition in the page holds."""
        WebDriverWait(self.driver, SECONDS, 0.05).until(
            lambda _: self.run(f"return Boolean({condition})", *arguments), condition
        )

    def ready(self) -> None:
        """Wait until the page knows the model."""
        self.wait("document.querySelector('#budget').options.length")

    def show(self, picture: Path, kind: str = "drop") -> None:
        """Drop or paste a picture."""
        self.run(HAND_OVER, kind, picture.name, base64.b64encode(picture.read_bytes()).decode())
        self.wait(
            "!document.querySelector('#figure').hidden && document.querySelector('#said').textContent.includes(arguments[0])",
            picture.name,
        )

    def ask(self, question: str) -> str:
        """Ask, wait for the end, and return the newest answer."""
        before = len(self.run("return sent"))
        self.find("#question").send_keys(question, Keys.ENTER)
        self.wait("sent.length > arguments[0] && document.querySelector('#stop').hidden", before)
        return str(self.texts(".text")[-1])

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements that a selector finds."""
        return self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)  # type: ignore[no-any-return]

    def levels(self) -> npt.NDArray[np.float64]:
        """Return how bright each cell of the canvas is drawn."""
        return np.array(self.run(LEVELS))

    def view(self, name: str) -> None:
        """Choose what is drawn."""
        self.run("document.querySelector(`[value=${arguments[0]}]`).click()", name)

    def complaints(self) -> list[str]:
        """Return what the console and the policy said since the last call."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")] + self.run("return violations")
        # Chromium's advice about what `levels` does.
        return [message for message in messages if "willReadFrequently" not in message]

    def hosts(self) -> set[str]:
        """Return the beginnings of all addresses that were asked for since the last call, with what holds its own data."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {re.match(r"(data|blob):|[a-z-]+://[^/]*/", url)[0] for url in sent}  # type: ignore[index]


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """Run the command until the block ends; gives its address."""
    command = [sys.executable, "-m", "leanvlm", "serve", *map(str, arguments), "--port", "0", "--grace", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"http://[\d.:]+", line):
                    yield f"{found[0]}/"
                    return
            pytest.fail("the command said no address")
        finally:
            process.terminate()
            process.stderr.read()


@pytest.fixture(scope="module")
def address(demo_bundle: Path) -> Iterator[str]:
    with served(demo_bundle) as found:
        yield found


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = ("headless=new", "no-sandbox", "disable-gpu", "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream")
    for switch in (*switches, "window-size=1200,900"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPY})
    yield found
    found.quit()


@pytest.fixture
def reader(driver: Any, address: str) -> Reader:
    found = Reader(driver, address)
    driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    found.open()
    found.complaints()
    found.hosts()
    found.open()
    found.ready()
    return found


def test_a_dropped_picture_is_answered_and_its_kept_tokens_are_drawn(
    reader: Reader, demo_bundle: Path, sample_image: Path
) -> None:
    reader.show(sample_image)
    plain = reader.levels()
    assert reader.ask(QUESTION) == ANSWER
    drawn = reader.levels()
    with leanvlm.load(demo_bundle) as vlm:
        (pruning,) = vlm.generate(QUESTION, images=[sample_image]).pruning
    kept = np.zeros(576, bool)
    kept[pruning.indices] = True
    assert np.array_equal(drawn[kept], plain[kept])
    # Levels are whole numbers.
    assert np.allclose(drawn[~kept] / plain[~kept], DIM, atol=0.03)
    label = reader.find("#canvas").get_attribute("aria-label")
    assert "64 of 576 image tokens kept, 11\xa0%" in label
    reader.view("attention")
    assert int(np.argmax(reader.levels())) == int(np.argmax(pruning.attention))
    reader.view("picture")
    assert np.array_equal(reader.levels(), plain)
    # Its bytes as they are, and no word of it but in the page.
    (sent,) = reader.run("return sent")
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == sample_image.read_bytes()
    assert reader.run("return document.cookie + Object.keys(localStorage) + Object.keys(sessionStorage)") == ""
    hosts = reader.hosts()
    assert reader.address in hosts
    assert hosts <= {reader.address, "data:"}
    assert reader.complaints() == []


def test_a_conversation_goes_on_until_there_is_another_picture(reader: Reader, sample_image: Path) -> None:
    reader.show(sample_image, "paste")
    assert reader.ask(QUESTION) == ANSWER
    reader.ask("How many shapes are there?")
    first, second = reader.run("return sent")
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][:2] == [first["messages"][0], {"role": "assistant", "content": ANSWER}]
    reader.show(sample_image.with_name("simple-9001.png"))
    assert reader.texts(".turn") == []
    reader.ask("How many shapes do you see?")
    assert len(reader.run("return sent.at(-1).messages")) == 1
    assert reader.complaints() == []


def test_a_budget_is_chosen_and_compared(reader: Reader, sample_image: Path) -> None:
    reader.show(sample_image)
    reader.ask(QUESTION)
    # What is changed meanwhile counts from the next question on.
    reader.run("document.querySelector('#most').value = 2")
    reader.find(".compare").click()
    reader.wait("document.querySelectorAll('.answer').length === 2 && document.querySelector('#stop').hidden")
    assert reader.texts(".answer h4") == ["64 of 576 tokens", "576 of 576 tokens"]
    first, second = reader.run("return sent")
    assert (first.pop("budget"), second.pop("budget")) == (64, 576)
    assert first == second
    rows = [row.split() for row in reader.texts("tbody tr")]
    assert len(reader.texts("tbody tr")) == 7
    assert rows[-1][0].startswith("first")
    assert re.search(r"\d\D$", reader.texts("tbody tr:last-child td")[-1])
    assert "64 of 576" in reader.find("#caption").text
    reader.find("#budget").send_keys("all")
    reader.ask(QUESTION)
    assert reader.run("return sent.at(-1).budget") == 576
    assert reader.find("#caption").text == "All 576 image tokens kept."
    assert not reader.find(".turn:last-child .compare").is_displayed()
    assert reader.complaints() == []


def test_everything_is_reached_with_the_keyboard(reader: Reader, sample_image: Path) -> None:
    def focused() -> str:
        return str(reader.run("return document.activeElement.id"))

    def press(*keys: str) -> None:
        webdriver.ActionChains(reader.driver).send_keys(*keys).perform()

    def press_with_shift(key: str) -> None:
        webdriver.ActionChains(reader.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    found = []
    for _ in range(7):
        press(Keys.TAB)
        found.append(focused())
        outline = "const one = document.activeElement; const shown = one.id === 'file' ? one.nextElementSibling : one;"
        assert reader.run(f"{outline} return getComputedStyle(shown).outlineStyle") == "solid", found
    assert found[:6] == ["afresh", "file", "camera", "question", "ask", "budget"]
    reader.find("#file").send_keys(str(sample_image))
    reader.wait("document.activeElement.id === 'question'")
    press("What is below")
    press_with_shift(Keys.ENTER)
    press("the green ring?", Keys.ENTER)
    reader.wait("document.querySelector('.compare') && !document.querySelector('.compare').hidden")
    assert reader.run("return sent[0].messages[0].content[1].text") == "What is below\nthe green ring?"
    assert focused() == "question"
    # Back to what is drawn, which arrows choose.
    for _ in range(20):
        press_with_shift(Keys.TAB)
        if reader.run("return document.activeElement.name") == "view":
            break
    press(Keys.ARROW_RIGHT)
    assert reader.run("return document.querySelector('[name=view]:checked').value") == "attention"
    assert reader.find("#scale").is_displayed()
    assert reader.complaints() == []


@pytest.mark.parametrize("key", ["ESCAPE", "ENTER"])
def test_an_answer_is_stopped(reader: Reader, key: str) -> None:
    # One that never ends.
    reader.run("""
        window.fetch = (path, { signal }) => Promise.resolve(new Response(new ReadableStream({ start(sink) {
            const chunk = { choices: [{ delta: { content: "a long" }, finish_reason: null }] };
            sink.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(chunk)}\\n\\n`));
            signal.addEventListener("abort", () => { window.stopped = true; sink.error(signal.reason); });
        } })));
    """)
    reader.find("#question").send_keys("Why?")
    reader.find("#ask").send_keys(Keys.ENTER)
    reader.wait("document.querySelector('.text')?.textContent === 'a long'")
    # Not read out word for word.
    assert reader.texts("#said") == [""]
    assert reader.run("return document.activeElement.id") == "stop"
    reader.find("#stop").send_keys(getattr(Keys, key))
    reader.wait("window.stopped && document.querySelector('#stop').hidden")
    assert reader.texts(".facts") == ["stopped"]
    assert reader.texts("#said") == ["Stopped."]
    assert reader.run("return document.activeElement.id") in ("question", "ask")


def test_errors_are_shown_as_the_server_says_them(reader: Reader, sample_image: Path) -> None:
    reader.show(sample_image)
    reader.run("document.querySelector('#most').value = 100000")
    reader.ask(QUESTION)
    (shown,) = reader.texts(".error")
    said = reader.run("""
        const options = { method: "POST", body: JSON.stringify(sent[0]), headers: { "Content-Type": "application/json" } };
        const response = await fetched("v1/chat/completions", options);
        return { status: response.status, ...(await response.json()).error };
    """)
    assert shown == f"{said['status']} {said['type']}: {said['message']}"
    assert said["status"] == 400
    # It can be asked again, and what failed is no part of the conversation.
    assert reader.find("#question").get_attribute("value") == QUESTION
    reader.run("document.querySelector('#most').value = 16")
    assert reader.ask("") == ANSWER
    assert len(reader.run("return sent.at(-1).messages")) == 1


def test_a_key_is_asked_for_and_kept_in_the_tab(driver: Any, demo_bundle: Path, sample_image: Path, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("open-sesame\n")
    file.chmod(0o600)
    with served(demo_bundle, "--api-key-file", file) as address:
        reader = Reader(driver, address)
        reader.open()
        for key in ("wrong", "open-sesame"):
            reader.wait("document.querySelector('#locked').open && document.querySelector('#refused').textContent")
            assert "Bearer" in reader.find("#refused").text
            reader.run("document.querySelector('#refused').textContent = ''")
            reader.find("#key").send_keys(key, Keys.ENTER)
        reader.ready()
        assert reader.run("return [JSON.stringify(sessionStorage), JSON.stringify(localStorage)]") == [
            '{"leanvlm-key":"open-sesame"}',
            "{}",
        ]
        reader.show(sample_image)
        assert reader.ask(QUESTION) == ANSWER
        reader.run("sessionStorage.clear()")
        reader.open()
        reader.wait("document.querySelector('#locked').open")
        reader.find("#without").click()
        reader.wait("!document.querySelector('#notice').hidden")
        assert reader.find("#served").text == "Not connected"
        assert "401" in reader.find("#notice").text


def test_the_camera_is_off_until_asked_and_when_the_page_is_hidden(reader: Reader) -> None:
    assert reader.run("return cameras") == 0
    reader.find("#camera").click()
    reader.wait("!document.querySelector('#live').hidden")
    assert reader.run("return [cameras, sent.length]") == [1, 0]
    assert reader.find("#camera-state").text == "The camera is on. A frame is sent when you ask."
    reader.ask("How many shapes do you see?")
    reader.run("document.querySelector('#interval').value = 1")
    reader.find("#question").send_keys("How many shapes do you see?")
    reader.find("#watch").click()
    reader.wait("sent.length >= 3")
    assert reader.find("#camera-state").text == "The camera is on. A frame is sent every 1 s."
    urls = reader.run("return sent.map((one) => one.messages[0].content[0].image_url.url)")
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    assert len({*urls}) == len(urls)
    own = reader.driver.current_window_handle
    reader.driver.switch_to.new_window("tab")
    reader.driver.close()
    reader.driver.switch_to.window(own)
    reader.wait("document.querySelector('#video').srcObject === null")
    assert reader.find("#notice").text == "The camera is off: the page was hidden."
    reader.wait("document.querySelector('#stop').hidden")
    before = reader.run("return sent.length")
    reader.run("await new Promise((done) => setTimeout(done, 1500))")
    assert reader.run("return sent.length") == before
    assert reader.texts("#watch") == ["Ask at an interval"]
    assert reader.complaints() == []


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1600)])
def test_nothing_is_wider_than_the_page(reader: Reader, sample_image: Path, scheme: str, width: int) -> None:
    command = reader.driver.execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    command("Emulation.setEmulatedMedia", {"features": features})
    try:
        reader.show(sample_image)
        reader.ask(QUESTION)
        reader.find(".compare").click()
        reader.wait("document.querySelectorAll('.answer').length === 2 && document.querySelector('#stop').hidden")
        assert reader.run("return innerWidth") == width
        page, screen = reader.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert page == screen
        ground = reader.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


def test_tiles_stand_where_they_were_cut(driver: Any, tile_bundle: Callable[[str], Path], sample_image: Path) -> None:
    with served(tile_bundle("llava_next")) as address:
        reader = Reader(driver, address)
        reader.open()
        reader.ready()
        reader.show(sample_image)
        reader.ask("Why?")
        tiles, whole = reader.texts("#layers label")
        assert re.fullmatch(r"\d+ tiles", tiles)
        assert whole == "Whole picture"
        drawn = reader.levels()
        reader.find("#layers label:last-of-type").click()
        assert not np.array_equal(drawn, reader.levels())
