"""The demo in headless Chromium, as a person uses it: files, tasks, two people, the keyboard, a screen reader's needs.

One server and one browser for all; the browser can resolve no other host. SPCXR_SCREENSHOTS=FOLDER keeps pictures.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spcxr_hf import SpcxrForImageClassification, SpcxrForPreTraining, SpcxrForSemanticSegmentation
from spcxr_hf.app.server import running
from spcxr_hf.app.session import MAX_BYTES, Session, list_choices, load_index, made_radiograph, read_example
from spcxr_hf.errors import SpcxrError
from spcxr_hf.inference.demo import example_radiograph
from spcxr_hf.inference.pipeline import Job, Source, load_model
from spcxr_hf.inference.tasks import embed
from tests.inference.test_pipeline import save_model

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow

SECONDS = 60
POINTS = {"bacterial + viral": {"youden": 0.0}, "viral": {"youden": 1.0}}
EVIL = "${7*7}{{7*7}}<img src=x onerror=document.title=1>.png"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[SimpleNamespace]:
    pytest.importorskip("gradio", reason="the extra app is not installed")
    cards, uploads = tmp_path_factory.mktemp("cards"), tmp_path_factory.mktemp("uploads")
    save_model(SpcxrForPreTraining, cards / "base")
    save_model(SpcxrForSemanticSegmentation, cards / "lung-segmentation", id2label={0: "background", 1: "lung"})
    save_model(SpcxrForImageClassification, cards / "pneumonia", operating_points=POINTS, operating_point="youden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(uploads))
        with running(Session(list_choices(cards), device="cpu")) as address:
            yield SimpleNamespace(address=address, uploads=uploads, cards=cards)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.add_argument("--window-size=1300,1400")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture
def page(server, browser) -> "Person":
    return Person(browser, server.address)


class Person:
    """One tab, and what can be done in it."""

    def __init__(self, browser, address: str) -> None:
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("#spcxr-upload button.upload-container[aria-label^=Radiographs]"))
        self.wait(lambda: self.find("#spcxr-ask") and self.find("#spcxr-answers section"))  # the first screen is filled
        self.tab = browser.current_window_handle

    def find(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)

    def wait(self, condition: Callable) -> None:
        WebDriverWait(self.browser, SECONDS, 0.1).until(lambda _: condition())

    def drop(self, *paths: Path) -> str:
        """The list of files, once all of them stand there."""
        self.find("#spcxr-upload input[type=file]")[0].send_keys("\n".join(map(str, paths)))
        self.wait(lambda: all(path.name in self.text("#spcxr-files") for path in paths))
        return self.text("#spcxr-files")

    def choose(self, task: str) -> None:
        self.find(f"#spcxr-task input[value={task}]")[0].click()

    def ask(self) -> str:
        """The answers to a new question; old ones are wiped first, so that none of them is taken for the new ones."""
        self.browser.execute_script("document.querySelector('#spcxr-answers .spcxr').replaceChildren()")
        self.find("#spcxr-ask")[0].click()
        self.wait(lambda: self.find("#spcxr-answers .spcxr > *"))
        return self.text("#spcxr-answers")

    def keep(self, name: str) -> None:
        if folder := os.environ.get("SPCXR_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def save_made(path: Path) -> Path:
    made_radiograph().image.save(path)
    return path


def public_radiograph(path: Path) -> Path:
    try:
        return shutil.copy(example_radiograph(), path)
    except SpcxrError as error:
        pytest.skip(str(error))


def test_a_study_of_two_pages_png_and_dicom(page, server, tmp_path):
    files = [save_made(tmp_path / "first.png"), public_radiograph(tmp_path / "second.dcm")]
    listed = page.drop(*files)
    assert "2 radiographs read" in listed
    assert "1841 × 1955, 16 bits" in listed
    page.choose("pneumonia")
    answer = page.ask()
    assert [section.get_attribute("aria-label") for section in page.find("#spcxr-answers section")] == [
        "first.png",
        "second.dcm",
    ]
    for words in ("bacterial + viral", "operating point youden", "above", "inside the lungs", "Lung mask: "):
        assert answer.count(words) >= 2, words
    page.keep("pneumonia")
    left = [path for path in server.uploads.rglob("*") if path.is_file()]
    assert left == []


def test_the_note_stays_in_view(page):
    page.find("#spcxr-made")[0].click()
    page.wait(lambda: "made-radiograph.png" in page.text("#spcxr-files"))
    page.choose("base")
    answer = page.ask()
    assert "No index is loaded" in answer
    page.browser.set_window_size(500, 800)
    try:
        page.browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
        page.keep("narrow")
        note = page.find(".spcxr-note")[0]
        top = page.browser.execute_script("return arguments[0].getBoundingClientRect().top", note)
        assert "not for clinical use" in note.text
        assert 0 <= top < 60
        wide = """const most = document.documentElement.clientWidth + 1;
            return [...document.querySelectorAll("body *")].filter((one) => !one.closest("pre")
                && one.getBoundingClientRect().right > most).map((one) => one.outerHTML.slice(0, 120))"""
        assert page.browser.execute_script(wide) == []
    finally:
        page.browser.set_window_size(1300, 1400)


def test_what_is_no_picture_and_what_is_no_radiograph(page, server, tmp_path):
    text, plain, evil = tmp_path / "text.png", tmp_path / "plain.png", tmp_path / EVIL
    text.write_text("no picture")
    Image.fromarray(np.full((64, 64), 80, np.uint8)).save(plain)
    save_made(evil)
    page.browser.find_element("css selector", "#spcxr-upload input[type=file]").send_keys(f"{text}\n{plain}\n{evil}")
    page.wait(lambda: "2 radiographs read" in page.text("#spcxr-files"))
    assert "text.png: not a PNG, JPEG, TIFF, WebP, BMP or DICOM file" in page.text("#spcxr-files")
    answer = page.ask()
    assert "This file cannot be used: not a PNG" in answer
    assert "No answer is given. This image: a constant image" in answer
    assert str(server.uploads) not in answer
    # A name is a name: it is neither computed nor run.
    assert "49" not in page.text("#spcxr-answers h2:last-of-type")
    assert page.find("img[src='x']") == []
    page.keep("refused")


@pytest.mark.parametrize(("rows", "outcome"), [(6250, "8000 × 6250"), (6300, "the image is too large: 8000 x 6300")])
def test_fifty_megapixels(page, tmp_path, rows, outcome):
    grey = np.asarray(made_radiograph().image.resize((8000, rows)))
    Image.fromarray(grey).save(tmp_path / "large.png", compress_level=1)
    started = time.monotonic()
    assert outcome in page.drop(tmp_path / "large.png")
    page.choose("lung-segmentation")
    answer = page.ask()
    assert ("Lung mask: " in answer) == (rows == 6250)
    page.keep(f"fifty_megapixels_{rows}")
    assert time.monotonic() - started < 30  # some seconds; the rest is for a busy machine


def test_a_file_beyond_the_limit(page, server, tmp_path):
    large = tmp_path / "large.dcm"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    page.find("#spcxr-upload input[type=file]")[0].send_keys(str(large))
    page.wait(lambda: "Not taken: larger than 64 MB" in page.text("#spcxr-upload"))
    page.keep("too_large")
    assert [path for path in server.uploads.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_two_people_at_once(server, browser, tmp_path):
    """Each sees the own files alone, the one that both drop at the same moment included."""
    first = Person(browser, server.address)
    browser.switch_to.new_window("tab")
    second = Person(browser, server.address)
    both = save_made(tmp_path / "both.png")
    own = [save_made(tmp_path / "mine.png"), save_made(tmp_path / "yours.png")]
    try:
        for person, file in zip((first, second), own, strict=True):
            browser.switch_to.window(person.tab)
            person.find("#spcxr-upload input[type=file]")[0].send_keys(f"{file}\n{both}")
        for person in (first, second):
            browser.switch_to.window(person.tab)
            person.wait(lambda who=person: "2 radiographs read" in who.text("#spcxr-files"))
            person.find("#spcxr-ask")[0].click()
        for person, file in zip((first, second), own, strict=True):
            browser.switch_to.window(person.tab)
            person.wait(lambda who=person: len(who.find("#spcxr-answers section")) == 2)
            names = [section.get_attribute("aria-label") for section in person.find("#spcxr-answers section")]
            assert names == [file.name, "both.png"]
            person.keep(f"two_people_{file.stem}")
    finally:
        browser.switch_to.window(second.tab)
        browser.close()
        browser.switch_to.window(first.tab)


def test_by_the_keyboard_alone(page):
    """Tab comes by the place for files, the examples, the tasks and the button; the keys do what a click does."""
    order = []
    for _ in range(14):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached = page.browser.switch_to.active_element
        order.append(page.browser.execute_script("return arguments[0].closest('[id^=spcxr]')?.id || ''", reached))
        if order[-1] == "spcxr-made":
            reached.send_keys(Keys.ENTER)
            page.wait(lambda: "made-radiograph.png" in page.text("#spcxr-files"))
        elif order[-1] == "spcxr-task" and order.count("spcxr-task") == 2:
            reached.send_keys(Keys.SPACE)  # each task is a stop
        elif order[-1] == "spcxr-ask":
            reached.send_keys(Keys.ENTER)
            break
    wanted = ["spcxr-upload", "spcxr-example", "spcxr-made", "spcxr-task", "spcxr-ask"]
    assert [name for name in dict.fromkeys(order) if name in wanted] == wanted
    page.wait(lambda: page.find("#spcxr-answers section"))
    assert "Pneumonia: bacterial or viral?" in page.text("#spcxr-answers")


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    if not shutil.which("npm"):
        pytest.skip("npm is missing")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "axe-core@4"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot install axe-core: {' '.join(done.stderr.split())[-200:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_finding_of_axe(page, axe, scheme, tmp_path):
    emulated = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    try:
        page.__init__(page.browser, page.browser.current_url)
        (tmp_path / "text.png").write_text("no picture")
        page.drop(save_made(tmp_path / "good.png"), tmp_path / "text.png")
        page.choose("pneumonia")
        page.ask()
        page.keep(f"axe_{scheme}")
        assert serious_findings(page, axe) == []
    finally:
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def serious_findings(page: Person, axe: str) -> list[tuple]:
    page.browser.execute_script(axe)
    run = "const done = arguments[0]; axe.run(document).then((found) => done(found.violations))"
    found = page.browser.execute_async_script(run)
    bad = [one for one in found if one["impact"] in ("serious", "critical")]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in bad]


def test_the_nearest_neighbors_are_shown(server, browser, axe, tmp_path):
    """Of an index that `spcxr embed` wrote: those whose files are there, as pictures."""
    grey = np.asarray(made_radiograph().image)
    paths = [tmp_path / f"{name}.png" for name in ("same", "darker", "gone")]
    for path, times in zip(paths, (1, 0.8, 0.6), strict=True):
        Image.fromarray((grey * times).astype(grey.dtype)).save(path)
    loaded = load_model("embedding", str(server.cards / "base"), "cpu")
    Job([Source(path, path.name) for path in paths], tmp_path / "index.safetensors").run(loaded, embed)
    paths[2].unlink()
    session = Session(list_choices(server.cards), load_index(tmp_path / "index.safetensors"), "cpu")
    with running(session) as address:
        page = Person(browser, address)
        page.find("#spcxr-made")[0].click()
        page.wait(lambda: "made-radiograph.png" in page.text("#spcxr-files"))
        page.choose("base")
        answer = page.ask()
        page.keep("neighbors")
        assert f"1: {paths[0]}, similarity 1.000" in answer
        shown = page.find("#spcxr-answers img[alt^=Neighbor]")
        assert [int(one.get_property("naturalWidth")) > 0 for one in shown] == [True, True]
        assert str(paths[2]) in answer
        assert serious_findings(page, axe) == []


def test_no_other_host_is_asked(page):
    assert read_example().name  # the public radiograph is on this machine
    page.browser.get_log("browser")
    page.find("#spcxr-made")[0].click()
    page.wait(lambda: "made-radiograph.png" in page.text("#spcxr-files"))
    page.ask()
    asked = page.browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [url for url in asked if not url.startswith((page.browser.current_url, "data:", "blob:"))] == []
    assert [one for one in page.browser.get_log("browser") if "ERR_NAME_NOT_RESOLVED" in one["message"]] == []
