"""The exported classifier in a static page, in headless Chromium, by Transformers.js: the same probabilities.

The page and its library come from a loopback server; the browser can resolve no other host.
"""

import functools
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from spcxr_hf import SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.hub.export_onnx import export_onnx, quantize_int8
from tests.common import SIDE, build, tiny_config
from tests.made_up import picture

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PAGE = Path(__file__).parents[1] / "browser"
PROCESSOR = SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})
MODELS = {
    "cls": {"pooling": "cls"},
    "mean": {"pooling": "mean", "problem_type": "multi_label_classification"},
}
PICTURES = {"native.png": (SIDE, SIDE), "large.png": (211, 150), "small.png": (20, 27)}

pytestmark = pytest.mark.slow


class LoggedRequests(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # module scripts need it
    failed: list[str] = []

    def log_request(self, code="-", size="-"):
        if str(int(code)) >= "400":
            self.failed.append(f"{int(code)} {self.path}")

    def log_error(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> SimpleNamespace:
    """The folder that is served: the page, its library, two classifiers, pictures."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    if not (shutil.which("npm") and shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("npm, chromium or chromedriver is missing")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional", "--no-package-lock"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm cannot install the library: {' '.join(done.stderr.split())[-200:]}")
    models = {}
    for name, settings in MODELS.items():
        models[name] = build(SpcxrForImageClassification, tiny_config(**settings))
        quantize_int8(export_onnx(models[name], folder / "models" / name, processor=PROCESSOR))
    for name, (height, width) in PICTURES.items():
        side = max(height, width)
        Image.fromarray(picture(3, side)[0][:height, :width]).save(folder / name)
    return SimpleNamespace(folder=folder, models=models)


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(LoggedRequests, directory=str(site.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def ask(browser, address: str, model: str, call: str, dtype: str = "fp32") -> dict[str, float]:
    """What the page says; `call` is a call of `window.spcxr`."""
    browser.get(f"{address}/index.html?model={model}&dtype={dtype}")
    script = f"""
        const done = arguments[0];
        const wait = () => window.spcxr ? window.spcxr.{call}.then(done, (error) => done({{error: String(error)}}))
                                        : setTimeout(wait, 50);
        wait();
    """
    try:
        return browser.execute_async_script(script)
    except Exception as error:
        pytest.fail(f"{error}; the browser says {browser.get_log('browser')}")


def expected(site, model: str, name: str) -> dict[str, float]:
    network = site.models[model]
    with Image.open(site.folder / name) as image, torch.no_grad():
        logits = network(**PROCESSOR(image, return_tensors="pt")).logits[0]
    multi_label = network.config.problem_type == "multi_label_classification"
    values = logits.sigmoid() if multi_label else logits.softmax(dim=0)
    return {network.config.id2label[index]: value for index, value in enumerate(values.tolist())}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("model", MODELS)
def test_same_probabilities(site, address, browser, model, name):
    assert ask(browser, address, model, f"classify('{name}')") == pytest.approx(expected(site, model, name), abs=1e-3)


def test_eight_bits_in_the_browser(site, address, browser):
    found = ask(browser, address, "cls", "classify('large.png')", dtype="q8")
    assert found == pytest.approx(expected(site, "cls", "large.png"), abs=0.05)
    assert found != pytest.approx(expected(site, "cls", "large.png"), abs=1e-7)


def test_the_library_s_own_pipeline(site, address, browser):
    """At the native size nothing is resized, and its processor gives what ours does."""
    found = ask(browser, address, "cls", "classifyByPipeline('native.png')")
    assert found == pytest.approx(expected(site, "cls", "native.png"), abs=1e-3)


def test_a_person_chooses_a_file(site, address, browser):
    browser.get(f"{address}/index.html?model=cls")
    WebDriverWait(browser, 60).until(lambda page: page.find_element("id", "picture").is_enabled())
    browser.find_element("id", "picture").send_keys(str(site.folder / "large.png"))
    WebDriverWait(browser, 60).until(lambda page: page.find_elements("css selector", "#answer td"))
    cells = [cell.text for cell in browser.find_elements("css selector", "#answer td")]
    shown = dict(zip(cells[::2], map(float, cells[1::2]), strict=True))
    assert shown == pytest.approx(expected(site, "cls", "large.png"), abs=2e-3)
    assert "not for clinical use" in browser.find_element("id", "state").text


def test_only_this_server_is_asked(site, address, browser):
    browser.get_log("browser")
    assert "error" not in ask(browser, address, "cls", "classify('large.png')")
    asked = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    outside = [url for url in asked if not url.startswith((address, "blob:", "data:"))]
    assert any(url.endswith(".wasm") for url in asked)
    assert any(url.endswith("model.onnx") for url in asked)
    assert outside == []
    assert [entry for entry in browser.get_log("browser") if "ERR_NAME_NOT_RESOLVED" in entry["message"]] == []
    # What is not there: a tokenizer, which the pipeline looks for.
    assert [line for line in LoggedRequests.failed if "tokenizer" not in line] == []
