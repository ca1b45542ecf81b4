"""From files to answers: what is found, read ahead, refused; and that the answers are the model's own."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from spcxr_hf import (
    SpcxrError,
    SpcxrForImageClassification,
    SpcxrForPreTraining,
    SpcxrForSemanticSegmentation,
    SpcxrImageProcessor,
    read_radiograph,
)
from spcxr_hf.inference import pipeline, tasks
from spcxr_hf.inference.pipeline import (
    Failed,
    Source,
    answers,
    find_sources,
    load_model,
    prepare,
    read_batches,
)
from spcxr_hf.models.lungs import measure_lungs
from spcxr_hf.transforms.group_masking import GroupMasking
from tests.common import SIDE, build, tiny_config
from tests.made_up import picture

LABELS = {0: "normal", 1: "bacterial", 2: "viral"}
POINTS = {"bacterial + viral": {"youden": 0.0, "strict": 1.0}, "viral": {"youden": 1.0, "strict": 1.0}}


def save_model(model_class, folder: Path, **overrides) -> Path:
    names = overrides.pop("id2label", LABELS)
    config = tiny_config(
        id2label=names,
        label2id={name: index for index, name in names.items()},
        num_labels=len(names),
        **{"problem_type": "single_label_classification", **overrides},
    )
    build(model_class, config).save_pretrained(folder)
    SpcxrImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    options = {"operating_points": POINTS, "operating_point": "youden"}
    return save_model(SpcxrForImageClassification, tmp_path_factory.mktemp("classifier"), **options)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> Path:
    names = {0: "background", 1: "lung"}
    return save_model(SpcxrForSemanticSegmentation, tmp_path_factory.mktemp("segmenter"), id2label=names)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return save_model(SpcxrForPreTraining, tmp_path_factory.mktemp("pretrained"))


def save_pictures(folder: Path, count: int = 5) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(picture(number, size=40 + number)[0]).save(path)
    return paths


# Files


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    save_pictures(tmp_path / "scans" / "sub", 2)
    (tmp_path / "scans" / ".hidden.png").touch()
    (tmp_path / "scans" / "notes.txt").touch()
    (tmp_path / "scans" / "1.2.840.10008").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "scans" / "LICENSE").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in find_sources(["scans"])] == ["1.2.840.10008", "sub/0.png", "sub/1.png"]
    assert find_sources(["scans/**/*.png"])[1] == Source(Path("scans/sub/1.png"), "sub/1.png")
    assert [source.name for source in find_sources(["scans/notes.txt", "scans/notes.txt"])] == ["notes.txt"]
    with pytest.raises(SpcxrError, match=r"no file has such a name"):
        find_sources(["scans/*.bmp"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpcxrError, match="empty: no images in this folder"):
        find_sources(["empty"])


def test_broken_files_are_told_and_the_others_go_on(tmp_path):
    paths = save_pictures(tmp_path, 4)
    paths[1].write_bytes(b"no picture")
    sources = [*(Source(path, path.name) for path in paths), Source(tmp_path / "gone.png", "gone.png")]
    batches = list(read_batches(sources, SpcxrImageProcessor(size={"height": SIDE, "width": SIDE}), 2, workers=2))
    assert [[image.source.name for image in batch.images] for batch in batches] == [["0.png", "2.png"], ["3.png"]]
    failed = [one.cause for batch in batches for one in batch.failed]
    assert len(failed) == 2
    assert failed[0].startswith(f"{paths[1]}: not a PNG")
    assert failed[1].startswith(f"{tmp_path / 'gone.png'}: No such file")


def test_reading_ahead_is_bounded(monkeypatch):
    made, lock = [0], threading.Lock()

    def count(source, processor):
        with lock:
            made[0] += 1
        return Failed(source, "")

    monkeypatch.setattr(pipeline, "prepare", count)
    sources = [Source(Path(str(number)), str(number)) for number in range(200)]
    ahead = pipeline.map_ahead(lambda source: pipeline.prepare(source, None), sources, 8, 2)
    for taken in range(1, 101):
        assert next(ahead).source.name == str(taken - 1)
        assert made[0] <= taken + 8
    ahead.close()


def test_what_is_odd_about_an_image_is_said(tmp_path):
    Image.fromarray(np.full((60, 60), 9, dtype=np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "c.png")
    processor = SpcxrImageProcessor(size={"height": SIDE, "width": SIDE})
    flat, colour = (prepare(Source(tmp_path / name, name), processor) for name in ("flat.png", "c.png"))
    assert "constant image" in flat.warnings[0]
    assert "a colour picture" in colour.warnings[0]


# Models


def test_a_model_for_another_task_is_refused(pretrained):
    with pytest.raises(
        SpcxrError,
        match=r"no weights for 2 parameters of SpcxrForImageClassification: classifier\.bias, classifier\.weight",
    ):
        load_model("classification", pretrained)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("no such/id/at all", "no such folder, and no Hub id is like that"),
        ("spcxr/unheard-of", "spcxr install` puts the bundled checkpoints there; --model takes a folder, too$"),
        ("spcxr/pneumona", r"takes a folder, too\. Did you mean spcxr/pneumonia\?$"),
    ],
)
def test_a_missing_model_is_told(tmp_path, monkeypatch, model, complaint):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpcxrError, match=complaint):
        load_model("embedding", model)


def test_a_missing_config_a_foreign_model_and_device_are_told(tmp_path, pretrained):
    with pytest.raises(SpcxrError, match=r"no config\.json in this folder"):
        load_model("embedding", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SpcxrError, match="of the type vit"):
        load_model("embedding", tmp_path)
    with pytest.raises(SpcxrError, match="no device 'toaster'"):
        load_model("embedding", pretrained, "toaster")


# Answers


def records(loaded, paths, answer, batch_size=2) -> list[dict]:
    steps = answers(loaded, [Source(path, path.name) for path in paths], answer, batch_size, workers=2)
    return [record for step in steps for record in step.records]


def beside(folder: Path):
    """A place for the picture of each source."""
    return lambda source: folder / "pictures" / source.path.name


def expected_pixels(loaded, path) -> torch.Tensor:
    return loaded.processor(read_radiograph(path, strict=None), return_tensors="pt").pixel_values


def test_probabilities_are_those_of_the_model(tmp_path, classifier):
    paths, loaded = save_pictures(tmp_path), load_model("classification", classifier, "cpu")
    for path, record in zip(paths, records(loaded, paths, tasks.Predictor(loaded)), strict=True):
        expected = loaded.model(expected_pixels(loaded, path)).logits.softmax(dim=1)[0].tolist()
        assert record["path"] == str(path)
        assert list(record["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert record["label"] == LABELS[int(np.argmax(expected))]
        both = record["targets"]["bacterial + viral"]
        assert both["probability"] == pytest.approx(expected[1] + expected[2], abs=1e-5)
        assert (both["decision"], record["targets"]["viral"]["decision"]) == ("above", "below")
        assert record["operating_point"] == "youden"
        assert record["note"] == "research use only, not for clinical use"


@pytest.mark.parametrize(
    ("problem", "labels"),
    [("multi_label_classification", LABELS), (None, {0: "abnormal"})],
)
def test_labels_that_may_hold_together_have_a_probability_each(tmp_path, problem, labels):
    """So does the only label of a model that has one."""
    folder = save_model(SpcxrForImageClassification, tmp_path / "model", id2label=labels, problem_type=problem)
    paths, loaded = save_pictures(tmp_path / "images", 2), load_model("classification", folder, "cpu")
    for path, record in zip(paths, records(loaded, paths, tasks.Predictor(loaded)), strict=True):
        expected = loaded.model(expected_pixels(loaded, path)).logits.sigmoid()[0].tolist()
        assert list(record["probabilities"]) == list(labels.values()) and "label" not in record
        assert list(record["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


def test_the_notice_is_printed_once(tmp_path, classifier, capsys):
    save_pictures(tmp_path / "images", 1)
    loaded = load_model("classification", classifier, "cpu")
    for name, printed in (("answers.txt", 0), ("answers.jsonl", 1)):
        pipeline.Job(find_sources([tmp_path / "images"]), tmp_path / name).run(loaded, tasks.Predictor(loaded))
        assert capsys.readouterr().err.count("Research use only") == printed
        assert (tmp_path / name).read_text().count("research use only") == 1


def test_operating_points(classifier):
    loaded = load_model("classification", classifier, "cpu")
    assert tasks.Predictor(loaded, "strict").thresholds == {"bacterial + viral": 1.0, "viral": 1.0}
    with pytest.raises(SpcxrError, match="no operating point 'best'; the checkpoint has strict, youden"):
        tasks.Predictor(loaded, "best")


@pytest.mark.parametrize(
    ("targets", "labels", "verdict"),
    [
        (["bacterial", "bacterial + viral", "normal"], ["normal", "bacterial", "viral"], "bacterial + viral"),
        (["covid-19", "normal", "pneumonia"], ["covid-19", "pneumonia", "normal"], "covid-19"),
        (["Normal", "ill"], ["Normal", "ill"], "ill"),
        (["atelectasis", "abnormal"], ["abnormal", "atelectasis"], "abnormal"),
        (["normal"], ["normal", "ill"], "normal"),
    ],
)
def test_the_verdict_is_about_what_is_ill(targets, labels, verdict):
    found = tasks.verdict_first(targets, labels)
    assert found[0] == verdict and sorted(found) == sorted(targets)


def test_a_probability_at_the_threshold_is_above(classifier):
    predictor = tasks.Predictor(load_model("classification", classifier, "cpu"))
    predictor.thresholds = {"viral": 0.25}
    assert predictor.decide([0.5, 0.25, 0.25])["targets"]["viral"]["decision"] == "above"
    assert predictor.decide([0.5, 0.26, 0.24])["targets"]["viral"]["decision"] == "below"


def test_embeddings_are_those_of_the_model(tmp_path, pretrained):
    paths, loaded = save_pictures(tmp_path), load_model("embedding", pretrained, "cpu")
    for path, record in zip(paths, records(loaded, paths, tasks.embed, batch_size=3), strict=True):
        expected = loaded.model(expected_pixels(loaded, path)).pooler_output[0].tolist()
        assert record["embedding"] == pytest.approx(expected, abs=1e-5)


def test_masks_have_the_images_own_size(tmp_path, segmenter):
    paths, loaded = save_pictures(tmp_path), load_model("segmentation", segmenter, "cpu")
    found = records(loaded, paths, lambda model, batch: tasks.segment(model, batch, beside(tmp_path)))
    for number, (path, record) in enumerate(zip(paths, found, strict=True)):
        assert record["mask"] == str(tmp_path / "pictures" / path.name)
        mask = np.asarray(Image.open(record["mask"])) == 255
        assert mask.shape == (40 + number, 40 + number)
        assert record["lung_area"]["total"] == pytest.approx(mask.mean())
        halves = measure_lungs(mask)
        assert (record["lung_area"]["image_left"], record["lung_area"]["image_right"]) == (
            halves.image_left,
            halves.image_right,
        )


def test_reconstructions_do_not_depend_on_the_batch(tmp_path, pretrained):
    paths, loaded = save_pictures(tmp_path, 3), load_model("reconstruction", pretrained, "cpu")
    second = tasks.read_second(loaded, paths[0])
    fills = ("noise", "zeros", "block", "replace")
    pictures = []
    for batch_size in (3, 1):
        answer = tasks.Reconstructor(beside(tmp_path), fills, seed=3, second=second)
        found = records(loaded, paths, answer, batch_size=batch_size)
        pictures.append((found, [Path(record["picture"]).read_bytes() for record in found]))
    assert pictures[0] == pictures[1]
    assert Image.open(found[0]["picture"]).width == 4 * (7 * SIDE + 6) - 6  # four tiles, each enlarged sevenfold
    other = records(loaded, paths, tasks.Reconstructor(beside(tmp_path), ("noise",), seed=4))
    assert other[0]["fills"]["noise"] != found[0]["fills"]["noise"]
    with pytest.raises(SpcxrError, match="give --second FILE"):
        tasks.Reconstructor(beside(tmp_path), ("replace",))


def test_a_reconstruction_s_error_is_that_of_the_corrupted_pixels(tmp_path, pretrained):
    """In grey values of 0 to 1, of what the model makes of the corrupted image alone."""
    (path,), loaded = save_pictures(tmp_path, 1), load_model("reconstruction", pretrained, "cpu")
    (record,) = records(loaded, [path], tasks.Reconstructor(beside(tmp_path), ("zeros",), seed=5))
    clean = expected_pixels(loaded, path)
    corrupted = GroupMasking(fill_modes=("zeros",))(clean, torch.Generator().manual_seed(5))
    assert not torch.equal(corrupted.pixel_values, clean)
    with torch.no_grad():
        made = loaded.model(corrupted.pixel_values).reconstruction
    mean, std = loaded.processor.image_mean[0], loaded.processor.image_std[0]
    grey, made_grey = ((one.mean(dim=1) * std + mean).clamp(0, 1) for one in (clean, made))
    pixels = corrupted.mask[:, 0]
    found = record["fills"]["zeros"]
    assert found["masked"] == pytest.approx(pixels.float().mean().item())
    assert found["error"] == pytest.approx((made_grey - grey).abs()[pixels].mean().item(), rel=1e-4)


def test_explanations_say_what_they_are_of(tmp_path, classifier, segmenter):
    paths = save_pictures(tmp_path, 2)
    loaded, lungs = load_model("classification", classifier, "cpu"), load_model("segmentation", segmenter, "cpu")
    place = beside(tmp_path)
    found = records(loaded, paths, tasks.Explainer(loaded, place, "bacterial + viral", lungs=lungs))
    for record in found:
        picture = Image.open(record["picture"])
        assert (picture.mode, picture.width, picture.height > picture.width) == ("RGB", 448, True)  # words below
    relevance = torch.tensor([[0.0, 1.0], [1.0, 6.0]])
    assert tasks.map_caption(found[0], relevance)[1] == "Colour: from the average patch to 3.0 times it, yellow."
    assert tasks.map_caption(found[0], relevance)[0] == (
        f"Relevance for bacterial + viral; {found[0]['relevance_in_lungs']:.0%} of it inside the lungs "
        f"(lungs: {found[0]['lung_area']:.0%} of the image)."
    )
    assert tasks.map_caption(found[0], relevance)[-1] == "Research use only, not for clinical use."
    assert [record["target"] for record in found] == ["bacterial + viral"] * 2
    assert all(0 <= record["lung_area"] <= 1 for record in found)
    probable = records(loaded, paths, tasks.Explainer(loaded, place))
    assert {record["target"] for record in probable} <= set(LABELS.values())
    with pytest.raises(SpcxrError, match="no label 'cancer'"):
        tasks.Explainer(loaded, place, "cancer")
