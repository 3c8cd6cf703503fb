"""The preview page in a real browser: lists, searches, plays, shows tokens, and never runs what a text says."""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.format.index import fingerprint, rows_to_table, write_index
from shards.format.writer import TarWriter, add_video
from shards.inspect.preview import PreviewServer, serve
from shards.inspect.preview_catalog import Catalog
from shards.media.video import probe
from shards.schema import Manifest, Segment
from tests.unit.shards.making import mp4, pictures, save_tokenizer

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
# A browser takes seconds to start and has its own opinion about the machine: CI asks for it, a desk does not.
pytestmark = [
    pytest.mark.skipif(os.environ.get("SLT_BROWSER_TESTS") != "1", reason="set SLT_BROWSER_TESTS=1 to run a browser"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian packages)"),
]
webdriver: Any = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install selenium)")

SAMPLES, FRAMES = 60, 50
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & 'quoted'"
WAIT_SECONDS = 15.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreviewServer]:
    """Sixty samples of real H.264 on two pages; the text of sample 3 is an attack."""
    folder = tmp_path_factory.mktemp("browser")
    videos = [mp4(pictures(FRAMES, seed=seed, width=96, height=64)) for seed in range(4)]
    rows = []
    with TarWriter(folder / "train-000000.tar") as tar:
        for number in range(SAMPLES):
            text = EVIL if number == 3 else f"satz nummer {number} mit regen und wind"
            split = "dev" if number >= 50 else "train"
            segment = Segment(
                "wetter", f"clip{number:03d}", split, text, None, "de", "gsg", f"signer{number % 3}", f"REGEN{number}"
            )
            rows.append(add_video(tar, segment, videos[number % 4], probe(videos[number % 4])))
    shards = [{"name": tar.path.name, "samples": SAMPLES, "size": tar.size, "sha256": tar.digest.hexdigest()}]
    table = rows_to_table(rows)
    manifest = Manifest("video", shards=shards, splits={"dev": 10, "train": 50}, fingerprint=fingerprint(shards, table))
    write_index(folder, table, manifest)
    running = serve(Catalog(folder, save_tokenizer(folder / "tokenizer")), "127.0.0.1", 0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join(timeout=5)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page as a user has it: what is shown, and waiting until it is."""

    def __init__(self, browser: Any, server: PreviewServer) -> None:
        self.browser, self.server = browser, server

    def open(self, query: str = "", width: int = 1280, height: int = 800, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.browser.get(self.server.url + query)
        self.until(lambda: self.run("return document.querySelectorAll('#rows li').length > 0"), "rows")

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, WAIT_SECONDS, 0.05).until(lambda _: condition(), f"waited for {what}")

    def texts(self) -> list[str]:
        script = "[...document.querySelectorAll('#rows .words p:first-child')].map(p => p.textContent)"
        return list(self.run(f"return {script}"))

    def video(self, expression: str) -> Any:
        """A property of the large player; None while there is no player."""
        return self.run(f"return document.getElementById('player')?.{expression}" if "=" not in expression else
                        f"document.getElementById('player').{expression}")  # fmt: skip

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()

    def url(self) -> str:
        return str(self.browser.current_url).removeprefix(self.server.url)

    def picture(self) -> Image.Image:
        return Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")


@pytest.fixture
def page(chromium: Any, server: PreviewServer) -> Iterator[Page]:
    """A page; afterwards the browser must have had nothing to complain about."""
    yield Page(chromium, server)
    complaints = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert complaints == []


def test_rows_pages_and_summary(page: Page) -> None:
    page.open()
    assert len(page.texts()) == 50 and page.texts()[0] == "satz nummer 0 mit regen und wind"
    summary = page.run("return document.getElementById('summary').textContent")
    assert "video set · 60 samples" in summary
    page.press("n")
    page.until(lambda: len(page.texts()) == 10, "the second page")
    assert page.url() == "?page=2"
    page.browser.back()
    page.until(lambda: len(page.texts()) == 50, "the first page again")


def test_search_and_filters_narrow_and_stay_in_the_url(page: Page) -> None:
    page.open()
    page.press("/", *"nummer 59")
    page.until(lambda: page.texts() == ["satz nummer 59 mit regen und wind"], "one match")
    assert page.url() == "?q=nummer+59"
    page.open("?split=dev&sort=-length&signer=signer1")
    assert len(page.texts()) == 3 and page.run("return document.getElementById('split').value") == "dev"
    page.run("document.getElementById('clear').click()")
    page.until(lambda: len(page.texts()) == 50, "all samples")
    assert page.url() == "?sort=-length"
    page.press("/", *"no such words")
    page.until(lambda: page.texts() == [] and page.run("return !document.getElementById('empty').hidden"), "no match")


def test_a_video_really_plays(page: Page) -> None:
    page.open()
    page.press("j", "j")
    page.until(lambda: page.video("readyState") and page.video("readyState") >= 3, "decoded frames")
    assert page.url() == "?sample=1"
    page.video("play()")
    began = page.video("currentTime")
    page.until(lambda: page.video("currentTime") > began + 0.2, "time passing")
    assert [page.video(name) for name in ("videoWidth", "videoHeight", "error")] == [96, 64, None]
    assert abs(page.video("duration") - FRAMES / 25) < 0.05
    page.press(" ")
    page.until(lambda: page.video("paused"), "pause")
    page.video("currentTime = 0.5")
    page.press(".", ".")
    clock = "return document.querySelector('.clock').textContent"
    page.until(lambda: page.run(clock) == "frame 15 of 50", "two frames on")
    page.press("s")
    assert page.video("playbackRate") == 0.5


def test_thumbnails_load_only_when_seen(page: Page) -> None:
    page.open()
    page.until(lambda: page.run("return document.querySelectorAll('#rows video').length > 3"), "thumbnails")
    assert page.run("return document.querySelectorAll('#rows video').length") < 25


def test_details_and_tokens(page: Page) -> None:
    page.open("?sample=7")
    page.until(lambda: page.run("return document.querySelectorAll('#tokens .piece').length == 9"), "tokens")
    pieces = page.run("return [...document.querySelectorAll('#tokens b')].map(b => b.textContent)")
    assert pieces == ["<s>", "<unk>", "<unk>", "<unk>", "<unk>", "regen", "und", "wind", "</s>"]
    shown = page.run("return document.getElementById('sample').innerText")
    for part in ("clip007", "REGEN7", "signer1", "50 at 25 fps", "96 × 64", "✓ matches", "train-000000.tar : clip007"):
        assert part in shown


def test_texts_are_never_markup(page: Page) -> None:
    page.open("?sample=3")
    page.until(lambda: page.run("return document.querySelector('.said') !== null"), "the sample")
    assert page.run("return document.querySelector('.said').textContent") == EVIL
    assert page.texts()[3] == EVIL and "owned" not in page.browser.title
    assert page.run("return document.querySelectorAll('main img, main script').length") == 0


def test_dark_and_narrow(page: Page, tmp_path: Path) -> None:
    page.open(dark=False)
    light = page.picture().getpixel((5, 5))
    page.open("?sample=2", dark=True)
    page.until(lambda: page.run("return document.querySelector('#player') !== null"), "the sample")
    dark = page.picture().getpixel((5, 5))
    assert min(light) > 200 and max(dark) < 60  # type: ignore[type-var]
    page.press("t")
    assert page.run("return document.documentElement.dataset.theme") == "light"
    page.run("localStorage.clear()")
    page.open(width=390, height=844)
    assert page.run("return document.documentElement.scrollWidth") == 390
    page.run("document.querySelector('#rows li').click()")
    page.until(lambda: page.run("return document.querySelector('#back')?.checkVisibility()"), "the sample in full")
    assert page.run("return document.documentElement.scrollWidth") == 390
    page.press("\ue00c")
    page.until(lambda: page.run("return !document.body.classList.contains('open')"), "the list again")
