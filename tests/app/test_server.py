"""The browser demo without a browser: choices, uploads, answers, HTML, the server."""

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
)
from spcxr_hf.app import server, session
from spcxr_hf.app.session import (
    Choice,
    Radiograph,
    Session,
    list_choices,
    load_index,
    made_radiograph,
    read_upload,
)
from spcxr_hf.data.table import read_table
from spcxr_hf.images.plausibility import quality_warnings
from spcxr_hf.inference.intended_use import AgeAndView
from spcxr_hf.inference.neighbors import build_index
from spcxr_hf.inference.pipeline import Batch, Job, Source, load_model, prepare
from spcxr_hf.inference.tasks import Predictor, embed
from spcxr_hf.models.encoders import load_encoder
from tests.inference.test_pipeline import save_model
from tests.made_up import picture

POINTS = {"bacterial + viral": {"youden": 0.0}, "viral": {"youden": 1.0}}
SPACE = Path(server.__file__).parents[1] / "space"


@pytest.fixture(scope="module")
def cards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    save_model(SpcxrForPreTraining, folder / "base")
    save_model(SpcxrForSemanticSegmentation, folder / "lung-segmentation", id2label={0: "background", 1: "lung"})
    save_model(SpcxrForImageClassification, folder / "pneumonia", operating_points=POINTS, operating_point="youden")
    save_model(SpcxrForImageClassification, folder / "covid", intended_use={"population": "adults", "ages": [18, None]})
    return folder


@pytest.fixture(scope="module")
def app(cards) -> Session:
    return Session(list_choices(cards), device="cpu")


def save_made(path: Path) -> Path:
    made_radiograph().image.save(path)
    return path


# ---- choices -----------------------------------------------------------------------------------------------------


def test_a_choice_for_each_checkpoint(cards, tmp_path):
    found = [(choice.name, choice.task, choice.title) for choice in list_choices(cards)]
    assert found == [
        ("lung-segmentation", "segmentation", "Where are the lungs?"),
        ("covid", "classification", "COVID-19 or another pneumonia?"),
        ("pneumonia", "classification", "Pneumonia: bacterial or viral?"),
        ("base", "embedding", "Embedding: which radiographs are alike?"),
    ]
    own = save_model(SpcxrForPreTraining, tmp_path / "cards" / "large")
    (own / "README.md").write_text("---\nlicense: other\n---\n\n# My <model>\n")
    for name, config in (("foreign", '{"architectures": ["ViTModel"]}'), ("unfinished", None)):
        (tmp_path / "cards" / name).mkdir()
        if config:
            (tmp_path / "cards" / name / "config.json").write_text(config)
    (choice,) = list_choices(tmp_path / "cards")
    assert (choice.title, choice.card) == ("large", "# My <model>")
    assert "My &lt;model&gt;" in server.answer(Session([choice], device="cpu"), [made_radiograph()], "large", False)


def test_ids_that_nobody_has_are_left_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SpcxrError, match="no checkpoint that the demo can show among nobody/nothing"):
        list_choices(models=["nobody/nothing"])


# ---- uploads -----------------------------------------------------------------------------------------------------


def test_files_are_read_and_removed(tmp_path, app):
    good, text = save_made(tmp_path / "good.png"), tmp_path / "text.png"
    text.write_text("no picture")
    found = app.read([good, text])
    assert [(one.name, one.cause is None) for one in found] == [("good.png", True), ("text.png", False)]
    assert "not a PNG" in found[1].cause
    assert str(tmp_path) not in found[1].cause
    assert list(tmp_path.iterdir()) == []


def test_the_same_file_from_two_people_at_once(tmp_path, app):
    path = save_made(tmp_path / "same.png")
    (first,) = app.read([path])
    (second,) = app.read([path])  # the upload of the second fell on the first's, which is gone
    assert second is first
    del first, second
    assert "drop it again" in app.read([path])[0].cause


def test_files_beyond_the_most_are_removed_too(tmp_path, app):
    paths = [save_made(tmp_path / f"{number}.png") for number in range(session.MAX_FILES + 2)]
    assert len(app.read(paths)) == session.MAX_FILES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "value", "complaint"), [("MAX_BYTES", 1000, "larger than"), ("MAX_PIXELS", 1000, "too much at once")]
)
def test_too_large(tmp_path, app, monkeypatch, limit, value, complaint):
    monkeypatch.setattr(session, limit, value)
    (large,) = app.read([save_made(tmp_path / "large.png")])
    assert complaint in large.cause
    assert large.image is None


def test_pictures_are_small_and_of_eight_bits():
    deep = Image.fromarray((np.arange(2000 * 1000, dtype=np.uint32).reshape(2000, 1000) % 65536).astype(np.uint16))
    small = Radiograph("deep.png", deep).shown
    assert (small.mode, small.size) == ("L", (384, 768))
    assert abs(np.asarray(small).mean() - 127) < 2


def test_the_drawn_radiograph_is_plausible():
    assert quality_warnings(made_radiograph().image) == []


def test_the_public_radiograph():
    pytest.importorskip("pydicom")
    found = session.read_example()
    assert (found.cause, found.quality_warnings, found.image.mode) == (None, [], "I;16")


# ---- answers -----------------------------------------------------------------------------------------------------


def test_probabilities_are_the_command_line_s(tmp_path, cards, app):
    path = save_made(tmp_path / "one.png")
    answer = app.answer(read_upload(path), "pneumonia")
    loaded = load_model("classification", cards / "pneumonia", "cpu")
    expected = Predictor(loaded)(loaded, Batch([prepare(Source(path, "one.png"), loaded.processor)], []))[0]
    assert answer.prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
    decisions = {target: found["decision"] for target, found in answer.prediction["targets"].items()}
    assert decisions == {"bacterial + viral": "above", "viral": "below"}
    probable = max(expected["probabilities"], key=expected["probabilities"].get)
    assert [one.target for one in answer.maps] == list(dict.fromkeys([probable, "bacterial + viral"]))
    assert all(0 <= one.share <= 1 for one in answer.maps)


def test_embedding_and_lungs(cards, app):
    page = made_radiograph()
    answer = app.answer(page, "base")
    loaded = load_model("embedding", cards / "base", "cpu")
    with torch.no_grad():
        expected = loaded.model(loaded.processor(page.image, return_tensors="pt").pixel_values).pooler_output[0]
    torch.testing.assert_close(answer.embedding, expected)
    assert [one.target for one in answer.maps] == [None]
    lungs = app.answer(page, "lung-segmentation")
    assert (lungs.embedding, lungs.maps, lungs.prediction) == (None, (), None)
    assert lungs.lungs[1] == answer.lungs[1]


def test_anatomy(cards, tmp_path, app):
    names = {0: "left lung", 1: "right lung", 2: "heart"}
    save_model(
        SpcxrForSemanticSegmentation,
        tmp_path / "anatomy",
        id2label=names,
        problem_type="multi_label_classification",
    )
    both = [*list_choices(tmp_path), *list_choices(cards)]
    page, session = made_radiograph(), Session(both, device="cpu")
    answer = session.answer(page, "anatomy")
    ratio = answer.cardiothoracic_ratio
    shown = server.HTML.answers([{"radiograph": page, "answer": answer}])
    assert ("Cardiothoracic ratio" in shown) is (ratio is not None)
    assert answer.lungs[0].size == page.shown.size
    lungs = session.answer(page, "lung-segmentation")
    assert lungs.lungs[1] == app.answer(page, "lung-segmentation").lungs[1]
    assert lungs.cardiothoracic_ratio is None


def test_without_a_lung_checkpoint_there_is_no_share(cards):
    alone = Session([Choice("covid", "classification", str(cards / "covid"))], device="cpu")
    answer = alone.answer(made_radiograph(), "covid")
    assert (answer.lungs, answer.neighbors, answer.embedding) == (None, None, None)
    assert answer.maps[0].share is None
    assert "names no operating point" in server.HTML.answers([{"radiograph": made_radiograph(), "answer": answer}])


def test_the_nearest_neighbor_of_an_indexed_image_is_itself(tmp_path, cards):
    (tmp_path / "images").mkdir()
    for seed in range(4):
        Image.fromarray(picture(seed, 64, opacity=30 * seed)[0]).save(tmp_path / "images" / f"{seed}.png")
    made_radiograph().image.save(tmp_path / "images" / "made.png")
    index = build_index(load_encoder(str(cards / "base")), read_table(tmp_path / "images"), "tiny")
    index.save(tmp_path / "index" / "radiographs.safetensors")
    app = Session(list_choices(cards), load_index(tmp_path / "index"), "cpu")
    first, shown = app.answer(made_radiograph(), "base").neighbors[0]
    assert first.id.endswith("made.png")
    assert first.similarity > 0.98
    assert shown is None  # the index calls it by its name inside the folder, which is no place of a file


def test_what_the_command_line_embeds_is_an_index(tmp_path, cards):
    paths = [tmp_path / f"{name}.png" for name in ("<b>made", "gone")]
    for path in paths:
        made_radiograph().image.save(path)
    loaded = load_model("embedding", str(cards / "base"), "cpu")
    output = tmp_path / "index" / "radiographs.safetensors"
    output.parent.mkdir()
    Job([Source(path, path.name) for path in paths], output).run(loaded, embed)
    paths[1].unlink()
    app = Session(list_choices(cards), load_index(output.parent), "cpu")
    answer = app.answer(made_radiograph(), "base")
    assert {one.id: picture is not None for one, picture in answer.neighbors} == {
        str(paths[0]): True,
        str(paths[1]): False,
    }
    assert all(one.similarity == pytest.approx(1, abs=1e-5) for one, _ in answer.neighbors)
    section = server.HTML.answers([{"radiograph": made_radiograph(), "answer": answer}])
    assert section.count('alt="Neighbor') == 1 and "<b>made" not in section


@pytest.mark.parametrize("count", [0, 2])
def test_an_index_folder_holds_one_file(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number}.safetensors").touch()
    with pytest.raises(SpcxrError, match=f"{count} safetensors files"):
        load_index(tmp_path)


@pytest.mark.slow
def test_two_people_at_once(app):
    """Their answers are those that each would have alone."""
    images = {"made": made_radiograph(), "flipped": Radiograph("flipped", made_radiograph().image.rotate(180))}
    alone = {name: app.answer(image, "pneumonia").prediction for name, image in images.items()}
    found: dict[str, list] = {name: [] for name in images}

    def work(name):
        for _ in range(3):
            found[name].append(app.answer(images[name], "pneumonia").prediction)

    threads = [threading.Thread(target=work, args=(name,)) for name in images]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert alone["made"] != alone["flipped"]
    assert found == {name: [alone[name]] * 3 for name in images}


# ---- HTML --------------------------------------------------------------------------------------------------------


def test_names_are_escaped(app):
    evil = Radiograph("<script>x</script>.png", made_radiograph().image, ["<b>odd</b>"])
    broken = Radiograph("<script>x</script>", cause="<script>x</script>")
    for text in (
        *(server.answer(app, [evil, broken], "pneumonia", in_spite) for in_spite in (False, True)),
        server.HTML.radiographs([evil, broken]),
        server.HTML.message("<script>x</script>"),
    ):
        assert "&lt;script&gt;x" in text
        assert "<script" not in text
        assert "<b>" not in text


def test_every_picture_has_a_text_and_no_address_is_another_host_s(app):
    text = "".join(server.answer(app, [made_radiograph()], name, False) for name in app.choices)
    assert len(re.findall(r'<img alt="[^"]+"\s+src="data:image/jpeg;base64,', text)) == text.count("<img") > 8
    assert "http" not in text
    for words in ("operating point youden", "inside the\nlungs", "no diagnosis", "× the average"):
        assert words in text


def test_labels_come_in_the_order_of_their_probability(app):
    text = server.answer(app, [made_radiograph()], "pneumonia", False)
    found = [
        float(value) for value in re.findall(r'scope="row">[^<]+</th><td>([\d.]+)</td>\n<td><div class="bar"', text)
    ]
    assert len(found) == 3 and found == sorted(found, reverse=True)


def test_what_is_no_radiograph_gets_no_answer_unless_asked_for(app):
    image = Image.fromarray(np.full((64, 64), 80, np.uint8))
    odd = Radiograph("odd.png", image, quality_warnings(image))
    withheld, given = (server.answer(app, [odd], "pneumonia", in_spite) for in_spite in (False, True))
    assert "No answer is given" in withheld
    assert "a constant image" in withheld
    assert "Probabilities" not in withheld
    assert "Not to be relied on" in given
    assert "Probabilities" in given


def test_the_example_is_shown_for_the_lungs_and_not_for_what_its_masses_hide(app):
    image = made_radiograph().image
    example = Radiograph("example.dcm", image, hides=session.EXAMPLE_HIDES)
    assert "No answer is given. This image: round masses" in server.answer(app, [example], "covid", False)
    for name in ("lung-segmentation", "base"):
        assert "Lung mask: " in server.answer(app, [example], name, False)


@pytest.mark.slow
def test_the_population_is_shown_and_another_age_gets_no_answer(app):
    """Of the models made for other ages alone; the age itself is not repeated."""
    child = Radiograph("child.dcm", made_radiograph().image, header=AgeAndView(7.0, "PA"))
    text = server.answer(app, [child], "covid", False)
    assert "No answer is given. This image: this model was made for adults, and the header gives another age" in text
    assert "7" not in re.sub(r"data:image[^\"]+", "", text)
    assert "Made for adults." in server.answer(app, [made_radiograph()], "covid", False)
    assert "Probabilities" in server.answer(app, [child], "pneumonia", False)
    assert "COVID-19 or another pneumonia? (adults)" in str(server.build_page(app).config)


@pytest.mark.parametrize("radiographs", [None, []])
def test_asking_without_a_radiograph(app, radiographs):
    assert "drop a file" in server.answer(app, radiographs, "lung-segmentation", False)


def test_a_checkpoint_that_cannot_be_used_is_told(tmp_path):
    broken = Session([Choice("lung-segmentation", "segmentation", str(tmp_path))], device="cpu")
    assert "no config.json in this folder" in server.answer(broken, [made_radiograph()], "lung-segmentation", False)


# ---- the server --------------------------------------------------------------------------------------------------


def test_served_on_loopback_and_nothing_left(app, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server, "MAX_BYTES", 2**20)
    before = dict(os.environ)
    with server.running(app) as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert "Research use only" in page
        assert "fonts.googleapis" not in page
        rebound = urllib.request.Request(address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(rebound)
        assert refused.value.code == 400
        boundary = "b0"
        body = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
            + b"x" * (server.MAX_BYTES + 1)
            + f"\r\n--{boundary}--\r\n".encode()
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 413
        assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []
    assert list(tmp_path.iterdir()) == []
    assert {name: os.environ.get(name) for name in before} == before
    assert "GRADIO_TEMP_DIR" not in os.environ


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
def test_terminated_it_leaves_nothing(cards, tmp_path):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "spcxr_hf.cli", "demo", "--serve", "--port", "0", "--checkpoints", str(cards)]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cards / ".torch")}  # PyTorch's own, which stays
    environment = {**os.environ, **caches, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert "http://127.0.0.1:" in process.stderr.readline()
        assert [path.name[:11] for path in tmp_path.iterdir()] == ["spcxr-demo-"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_told(app):
    pytest.importorskip("gradio")
    with server.running(app) as address, pytest.raises(SpcxrError, match="cannot be listened on"):  # noqa: SIM117
        with server.running(app, port=int(address.rstrip("/").rpartition(":")[2])):
            pass


def test_without_gradio_the_extra_is_named(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SpcxrError, match=r'pip install "spcxr-hf\[app\]"'):
        server.build_page(app)


def test_the_space_is_ready_to_push():
    assert sorted(path.name for path in SPACE.iterdir() if path.is_file()) == [
        "README.md",
        "app.py",
        "requirements.txt",
    ]
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    lines = (SPACE / "requirements.txt").read_text().split()
    assert lines == ["spcxr-hf[app]"]
    compile((SPACE / "app.py").read_text(), "app.py", "exec")
