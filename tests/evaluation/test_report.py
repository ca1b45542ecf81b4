"""The report on a classifier: self-contained, with the numbers of the metrics and the worst cases."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from spcxr_hf import SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.evaluation.metrics import classification_report, multilabel_report
from spcxr_hf.evaluation.report import (
    NOTICE,
    Evaluated,
    ReportOptions,
    in_words,
    worst_cases,
    write_evaluation_report,
)
from tests.common import build, tiny_config
from tests.made_up import break_rows, write_set
from training_scripts import evaluate

NAMES = ("normal", "bacterial", "viral <b>")


def evaluated(name="val", count=60, seed=0, multi_label=False):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    logits = generator.normal(0, 1, (count, 3)) + 1.5 * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.eye(3)[labels]
    if multi_label:
        probabilities, targets = 1 / (1 + np.exp(-logits)), targets.copy()
        targets[::7, 0] = np.nan
    patients = [f"patient-{row // 2}" if row % 5 else None for row in range(count)]
    return Evaluated(name, probabilities, targets, [f"id-{row}" for row in range(count)], patients)


class Page(HTMLParser):
    """What a page holds, and whether every tag is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.images, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_report_stands_by_itself(tmp_path, multi_label):
    splits = [evaluated(multi_label=multi_label), evaluated("test <1>", 50, 1, multi_label)]
    both = "bacterial + viral <b>"
    options = ReportOptions(multi_label, [both], {both: {"youden": 0.5}}, settings={"a|<x>": 1}, resamples=30)
    seen = []

    def picture(split, row):
        seen.append((split, row))
        return np.full((20, 16), 0.5)

    path = write_evaluation_report(tmp_path / "new", "A <title>", NAMES, splits, options, picture)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.words)
    assert NOTICE in words and "A <title>" in words and "test <1>" in words and "a|<x>" in words
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|<script', text)  # it loads nothing
    assert len(page.images) == 6 and all(image["alt"] for image in page.images)
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"report.html", "results.json", "roc.png", "precision_recall.png", "reliability.png",
                     "confusion.png", "worst_val.png", "worst_test__1_.png"}  # fmt: skip
    results = json.loads((path.parent / "results.json").read_text())
    assert results["notice"] == NOTICE and set(results["splits"]) == {"val", "test <1>"}
    one = splits[0]
    if multi_label:
        expected = multilabel_report(one.probabilities, one.targets, NAMES, one.patients, resamples=30)
    else:
        expected = classification_report(
            one.probabilities, one.targets.argmax(axis=1), NAMES, one.patients, resamples=30
        )
    assert results["splits"]["val"] == json.loads(json.dumps(expected))
    assert seen and {split for split, _ in seen} == {"val", "test <1>"}
    assert f"{both}: youden" in words


def test_without_pictures_none_are_shown(tmp_path):
    path = write_evaluation_report(tmp_path, "x", NAMES, [evaluated()], ReportOptions(resamples=5))
    assert not list(tmp_path.glob("worst*")) and "worst" not in json.loads((tmp_path / "results.json").read_text())
    assert len(Page(path.read_text()).images) == 4


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("macro_auroc", "AUROC, mean"),
        ("mean_sensitivity_at_specificity", "sensitivity at specificity 0.90, mean"),
        ("balanced_accuracy", "balanced accuracy"),
        ("ece", "expected calibration error"),
    ],
)
def test_figures_have_a_reader_s_names(figure, words):
    assert in_words(figure) == words


def test_worst_cases():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.05, 0.95]])
    one = Evaluated("val", probabilities, np.array([[0, 1], [0, 1], [1, 0], [1, 0]]), list("abcd"))
    found = worst_cases(one, ("normal", "ill"), multi_label=False)
    assert found == [(3, "normal", "ill", 0.95), (0, "ill", "normal", 0.9), (2, "normal", "ill", 0.6)]
    assert [row for row, *_ in worst_cases(one, ("normal", "ill"), False, count=1)] == [3]


def test_worst_cases_of_labels():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.2], [0.4, 0.4]])
    one = Evaluated("val", probabilities, np.array([[np.nan, 0], [1, 1], [0, 0]]), list("abc"))
    assert worst_cases(one, ("p", "q"), multi_label=True) == [(1, "p", "no p", pytest.approx(0.8))]


@pytest.mark.parametrize("kind", ["no splits", "names", "shape", "no class"])
def test_refusals(tmp_path, kind):
    one = evaluated()
    targets = one.targets.copy()
    targets[3] = np.nan
    splits = {
        "no splits": [],
        "names": [one, one],
        "shape": [Evaluated("val", one.probabilities[:, :2], one.targets, one.ids)],
        "no class": [Evaluated("val", one.probabilities, targets, one.ids)],
    }[kind]
    message = {"shape": "must be", "no class": "each row has one"}.get(kind, "a unique name")
    with pytest.raises(SpcxrError, match=message):
        write_evaluation_report(tmp_path / "x", "x", NAMES, splits)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_script(tmp_path, capsys):
    names = {0: "normal", 1: "ill"}
    config = tiny_config(
        num_labels=2,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="single_label_classification",
        operating_points={"ill": {"youden": 0.5}},
    )
    model = tmp_path / "model"
    build(SpcxrForImageClassification, config).save_pretrained(model)
    SpcxrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(model)
    data = write_set(tmp_path / "set.parquet", ["val"] * 9 + ["test"] * 9)
    words = ["--model", str(model), "--data", str(data), "--label_column", "pneumonia_label"]
    words += ["--splits", "val", "test", "--classes", "normal", "ill=bacterial+viral"]
    words += ["--resamples", "20", "--html", str(tmp_path / "report")]
    (model / "recipe.yaml").write_text("split_column: pneumonia_split\nclasses: [normal]\n")
    path = tmp_path / "report" / "report.html"
    evaluate.main(words)
    assert str(path) in capsys.readouterr().out
    results = json.loads((path.parent / "results.json").read_text())
    assert results["splits"]["val"]["images"] == 9
    text = path.read_text()
    assert "ill: youden" in text and str(tmp_path) not in text
    with pytest.raises(SpcxrError, match="batch_size must be"):
        evaluate.main([*words, "--batch_size", "0"])

    break_rows(data, {2, 12})
    with pytest.raises(SpcxrError, match="damaged or cut short"):
        evaluate.main(words)
    (tmp_path / "left-out.txt").write_text("row-3\nrow-4\n")
    evaluate.main([*words, "--on_error", "skip", "--exclude", str(tmp_path / "left-out.txt")])
    results = json.loads((path.parent / "results.json").read_text())
    assert [results["splits"][split]["images"] for split in ("val", "test")] == [6, 8]
    lines = (path.parent / "skipped.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["id", "row-12", "row-2"]
