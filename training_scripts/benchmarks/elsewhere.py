"""Evaluate the heads on archives, hospitals and image processings other than those of their training.

    python -m training_scripts.benchmarks.elsewhere --data ../shared/data --rsna ../shared/rsna_jsrt

Writes `results/elsewhere.json` into each checkpoint's folder: AUROC of a score between two groups of images, the share
of each group that the published operating point (or the likeliest class) calls positive, how well `unlike_training`
tells each group and photographs from held-out images of the training's own source (beside 1 - the largest probability,
arXiv 1610.02136), Dice of the lungs on JSRT, and, of the encoder, a linear probe that is trained on one file processing
of the RSNA films and read on another.
The intervals are 95 % percentile bootstraps over patients, or over images where the patients are unknown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from spcxr_hf import SpcxrError
from spcxr_hf.data.table import RadiographTable, decode_images, decode_masks, join_tables, read_table
from spcxr_hf.evaluation.bootstrap import bootstrap, bootstrap_interval, patient_groups
from spcxr_hf.evaluation.metrics import auroc, dice
from spcxr_hf.evaluation.predict import load_classifier, open_images, predict_embeddings
from spcxr_hf.evaluation.shortcuts import choose_probe
from spcxr_hf.files import write_json
from spcxr_hf.models.encoders import load_encoder
from spcxr_hf.models.loading import (
    Statistics,
    is_multi_label,
    label_names,
    load_statistics,
    probabilities,
    to_pixel_values,
)
from spcxr_hf.models.lungs import load_segmenter, lungs_of, segment_structures
from spcxr_hf.models.typicality import UNLIKE
from spcxr_hf.training.arguments import parse_arguments, run_script

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
ANATOMY = {"lungs": 1 + 2, "lungs and heart": 1 + 2 + 4}  # bits of JSRT's masks
SIDE = 256  # pixels of the masks that are compared


def _rows(**columns: str | tuple[str, ...]) -> Callable[[dict], bool]:
    """Whether a row holds, in each column, the value or one of the values."""
    return lambda row: all(
        row.get(name) in (wanted if isinstance(wanted, tuple) else (wanted,)) for name, wanted in columns.items()
    )


# Groups of images, none of which a head below was trained on.
GROUPS = {
    "RSNA 1024, normal": _rows(rsna_split="shift", rsna_label="normal"),
    "RSNA 1024, opacity": _rows(rsna_split="shift", rsna_label="opacity"),
    "RSNA 1024, other abnormal": _rows(rsna_split="shift", rsna_label="other abnormal"),
    "RSNA thorax, normal": _rows(rsna_split="test", rsna_label="normal"),
    "RSNA thorax, opacity": _rows(rsna_split="test", rsna_label="opacity"),
    "other hospitals, COVID-19": _rows(covid_split="shift", covid_label="covid"),
    "other hospitals, no COVID-19": _rows(covid_split="shift", covid_label=("normal", "pneumonia")),
    "children, normal": _rows(pneumonia_split="test", pneumonia_label="normal"),
    "children, pneumonia": _rows(pneumonia_split="test", pneumonia_label=("bacterial", "viral")),
    "tuberculosis sets": _rows(source=("rahman_tb", "mendeley_tb")),
    "COVID-19 and others, test": _rows(covid_split="test"),
}
MOST = 500  # images of a group, drawn by a fixed seed


class Comparison(NamedTuple):
    """One head's AUROC: groups that should score high against groups that should not."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    views: tuple[str, ...] = ()  # reported one by one too


class Head(NamedTuple):
    """What is measured of a classifier."""

    score: Callable[[dict[str, np.ndarray]], np.ndarray]  # label -> probabilities (n,) to one score (n,)
    comparisons: dict[str, Comparison]
    target: str  # what an image is called
    point: str | None  # above this threshold; None: where it is the likeliest class
    called: tuple[str, ...]  # groups whose share of called images is reported
    own: tuple[str, ...]  # held-out images of the training's own source


RSNA = ("RSNA 1024, opacity", "RSNA 1024, other abnormal")
HEADS = {
    "screening": Head(
        lambda labels: labels["abnormal"],
        {
            "RSNA 1024, abnormal against normal": Comparison(RSNA, ("RSNA 1024, normal",), ("PA", "AP")),
            "RSNA 1024, opacity against normal": Comparison(RSNA[:1], ("RSNA 1024, normal",)),
            "RSNA thorax, opacity against normal": Comparison(("RSNA thorax, opacity",), ("RSNA thorax, normal",)),
        },
        "abnormal",
        "youden",
        ("RSNA 1024, normal", *RSNA, "RSNA thorax, normal", "RSNA thorax, opacity", "children, normal"),
        ("RSNA thorax, normal", "RSNA thorax, opacity"),
    ),
    "pneumonia": Head(
        lambda labels: 1 - labels["normal"],
        {"adults, RSNA 1024, opacity against normal": Comparison(RSNA[:1], ("RSNA 1024, normal",), ("PA", "AP"))},
        "bacterial pneumonia + viral pneumonia",
        "youden",
        ("RSNA 1024, normal", "RSNA 1024, opacity", "tuberculosis sets"),
        ("children, normal", "children, pneumonia"),
    ),
    "covid": Head(
        lambda labels: labels["covid-19"],
        {
            "no COVID-19, other sources": Comparison(
                ("other hospitals, COVID-19",), ("children, normal", "children, pneumonia", "tuberculosis sets")
            ),
            "no COVID-19, the same hospitals": Comparison(
                ("other hospitals, COVID-19",), ("other hospitals, no COVID-19",)
            ),
            "RSNA 1024, normal (the archive of the training's normals)": Comparison(
                ("other hospitals, COVID-19",), ("RSNA 1024, normal",)
            ),
        },
        "covid-19",
        None,
        ("other hospitals, COVID-19", "RSNA 1024, normal", "RSNA 1024, opacity", "children, normal",
         "children, pneumonia", "tuberculosis sets"),
        ("COVID-19 and others, test",),
    ),
}  # fmt: skip


@dataclass
class Arguments:
    """Measure the heads on images of other sources than those they were trained on."""

    data: str = field(metadata={"help": "folder of Parquet shards: children, COVID-19, tuberculosis"})
    rsna: str = field(metadata={"help": "folder of Parquet shards: RSNA in two processings, JSRT"})
    cards: str = field(default=str(CARDS), metadata={"help": "folder with a folder per checkpoint"})
    only: list[str] | None = field(default=None, metadata={"help": "names of checkpoints; by default all"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    table = join_tables([read_table(arguments.data), read_table(arguments.rsna)], "other sources")
    columns = [name for name in table.rows.column_names if not name.endswith(("image", "mask"))]
    rows = table.rows.select(columns).to_pylist()
    others = {"base": measure_encoder, "lung-segmentation": measure_lungs, "anatomy": measure_anatomy}
    for name in arguments.only or [*HEADS, *others]:
        folder = Path(arguments.cards) / name
        if name in HEADS:
            found = measure(folder, HEADS[name], table, rows, arguments.device)
        else:
            found = others[name](folder, table, rows)
        write_json(folder / "results" / "elsewhere.json", found)
        print(json.dumps({name: found}), flush=True)


def group_rows(name: str, rows: Sequence[dict]) -> np.ndarray:
    """Row numbers of a group, at most `MOST` of them.

    Raises:
        SpcxrError: there are none.
    """
    numbers = np.flatnonzero([GROUPS[name](row) for row in rows])
    if not len(numbers):
        raise SpcxrError(f"no image of the group {name!r} in these sets")
    return np.sort(np.random.default_rng(0).permutation(numbers)[:MOST])


def measure(folder: Path, head: Head, table: RadiographTable, rows: Sequence[dict], device: str = "cpu") -> dict:
    """AUROC of each comparison, and the share of each group that is called positive."""
    model, processor = load_classifier(str(folder), device)
    scores: dict[str, np.ndarray] = {}
    called: dict[str, np.ndarray] = {}
    unlike: dict[str, np.ndarray] = {}
    statistics = load_statistics(str(folder))
    numbers = {name: group_rows(name, rows) for name in GROUPS}
    pictures = {name: open_images(RadiographTable(table.rows.take(pa.array(those)), name))
                for name, those in numbers.items()}  # fmt: skip
    for name, images in (pictures | {"photographs": photographs()}).items():
        embeddings, logits = predict_embeddings(model, processor, images, name)
        values = probabilities(model.config, logits).double().numpy()
        labels = dict(zip(label_names(model.config), values.T, strict=True))
        scores[name] = head.score(labels)
        called[name] = is_called(labels, head, (model.config.operating_points or {}).get(head.target))
        if statistics is not None:
            unlike[name] = unlike_scores(model, embeddings, statistics, values)
    comparisons = {}
    for title, pair in head.comparisons.items():
        comparisons[title] = compare(pair, scores, numbers, rows)
        for view in pair.views:
            comparisons[f"{title}, {view}"] = compare(pair, scores, numbers, rows, view)
    shares = {name: share(called[name], [rows[row] for row in numbers[name]]) for name in head.called}
    return {
        "comparisons": comparisons,
        "called": head.target,
        "operating_point": head.point,
        "called_positive": shares,
        **({"unlike_training": unlike_figures(head, unlike)} if unlike else {}),
    }


def photographs(count: int = 200, side: int = 256) -> Iterator[Image.Image]:
    """Grey crops of the two photographs that scikit-learn carries (a temple and a flower)."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    scenes = [Image.fromarray(scene).convert("L") for scene in load_sample_images().images]
    for number in range(count):
        scene = scenes[number % len(scenes)]
        left, top = (int(generator.integers(0, length - side)) for length in scene.size)
        yield scene.crop((left, top, left + side, top + side))


def unlike_scores(model: Any, embeddings: torch.Tensor, statistics: Statistics, values: np.ndarray) -> np.ndarray:
    """(3, n): distance to the training images, `unlike_training`, and the baseline, 1 - the largest probability.

    Of labels that may hold together, the probability of the more likely side, in the mean.
    """
    surest = np.maximum(values, 1 - values).mean(axis=1) if is_multi_label(model.config) else values.max(axis=1)
    distance = model.training_distance(embeddings, statistics).numpy()
    return np.stack([distance, model.unlike_training(embeddings, statistics).numpy(), 1 - surest])


def unlike_figures(head: Head, unlike: dict[str, np.ndarray]) -> dict:
    """The share of each group that is warned of, and AUROC of distance and baseline against the head's own images."""
    own = np.concatenate([unlike[name] for name in head.own], axis=1)
    report: dict = {"own images": {"images": own.shape[1], "warned": float((own[1] > UNLIKE).mean())}}
    for name, values in unlike.items():
        if name not in head.own:
            both = np.concatenate([values, own], axis=1)
            truth = np.arange(both.shape[1]) < values.shape[1]
            report[name] = {
                "images": values.shape[1],
                "warned": float((values[1] > UNLIKE).mean()),
                "auroc": auroc(both[0], truth),
                "baseline_auroc": auroc(both[2], truth),
            }
    return report


def is_called(labels: dict[str, np.ndarray], head: Head, points: Mapping[str, float] | None) -> np.ndarray:
    """(n,) whether the answer is the head's target: by its threshold, else as the likeliest class.

    Raises:
        SpcxrError: the checkpoint has no threshold.
    """
    if head.point is None:
        return labels[head.target] >= np.max(list(labels.values()), axis=0)
    if points is None or head.point not in points:
        raise SpcxrError(f"the checkpoint has no operating point {head.point!r} for {head.target!r}")
    return head.score(labels) >= points[head.point]


def compare(
    pair: Comparison,
    scores: dict[str, np.ndarray],
    numbers: dict[str, np.ndarray],
    rows: Sequence[dict],
    view: str | None = None,
) -> dict:
    """AUROC with its interval, of one view or of all."""
    values, targets, patients = [], [], []
    for target, names in ((1, pair.positive), (0, pair.negative)):
        for name in names:
            for score, row in zip(scores[name], numbers[name], strict=True):
                if view is None or rows[row]["view"] == view:
                    values.append(score)
                    targets.append(target)
                    patients.append(rows[row].get("patient"))
    return auroc_with_interval(np.array(values), np.array(targets), patients)


def auroc_with_interval(scores: np.ndarray, targets: np.ndarray, patients: Sequence[str | None]) -> dict:
    """AUROC of scores (n,) for targets (n,) of 0 and 1, its interval by patient, and the counts."""
    groups = patient_groups(patients, len(scores))
    interval = bootstrap(lambda drawn: auroc(scores[drawn], targets[drawn]), len(scores), groups)
    counts = {"positives": int(targets.sum()), "negatives": int((1 - targets).sum())}
    return counts | {"auroc": auroc(scores, targets), "auroc_ci95": list(interval)}


def share(called: np.ndarray, rows: Sequence[dict]) -> dict:
    """The share of a group that is called positive, with its interval."""
    groups = patient_groups([row.get("patient") for row in rows], len(rows))
    return {"images": len(called), "share": float(called.mean()),
            "share_ci95": list(bootstrap_interval(called.astype(float), groups))}  # fmt: skip


def measure_lungs(folder: Path, table: RadiographTable, rows: Sequence[dict]) -> dict:
    """Dice on JSRT by both meanings of "lung": without the area behind the heart (SCR), and with the heart."""
    those = np.flatnonzero([row.get("anatomy_split") is not None for row in rows])
    part = RadiographTable(table.rows.take(pa.array(those)), "JSRT")
    masks = [
        np.asarray(Image.open(BytesIO(cell["bytes"])).resize((SIDE, SIDE), Image.Resampling.NEAREST))
        for cell in part.column("anatomy_mask")
    ]
    images = decode_images(part, SIDE)
    segmenter = load_segmenter(str(folder))
    found = segmenter.find(images)
    report = {}
    for name, bits in ANATOMY.items():
        target = torch.from_numpy(np.stack([mask & bits > 0 for mask in masks]))
        figures = dice(found, target).numpy()
        report[name] = {"dice": float(figures.mean()), "dice_ci95": list(bootstrap_interval(figures))}
    return {"images": len(part), "jsrt": report}


def measure_anatomy(folder: Path, table: RadiographTable, rows: Sequence[dict]) -> dict:
    """Dice of the lungs, without and with the heart, on masks that count what lies behind the heart as lung."""
    segmenter = load_segmenter(str(folder))
    report: dict = {}
    for name, split in {"children": "test", "adults with COVID-19, other hospitals": "shift"}.items():
        those = np.flatnonzero([row.get("lung_split") == split for row in rows])
        part = RadiographTable(table.rows.take(pa.array(those)), name)
        target, found = decode_masks(part, SIDE), []
        for images in decode_images(part, SIDE).split(16):
            pictures = [Image.fromarray(image[0].numpy()) for image in images]
            values = to_pixel_values(segmenter.loaded.processor, pictures)
            found += segment_structures(segmenter.loaded, values, [(SIDE, SIDE)] * len(images))
        groups = patient_groups([rows[row].get("patient") for row in those.tolist()], len(those))
        report[name] = {"images": len(those)}
        for meaning in ANATOMY:
            masks = [lungs_of(one) | one["heart"] if "heart" in meaning else lungs_of(one) for one in found]
            figures = dice(torch.stack(masks), target).numpy()
            interval = list(bootstrap_interval(figures, groups))
            report[name][meaning] = {"dice": float(figures.mean()), "dice_ci95": interval}
    return {"lung_masks": report}


def measure_encoder(folder: Path, table: RadiographTable, rows: Sequence[dict]) -> dict:
    """Logistic regression on frozen features, abnormal against normal: from RSNA thorax, on it and on RSNA 1024."""
    encoder = load_encoder(str(folder))
    features: dict[str, Any] = {}
    targets: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test", "shift"):
        those = np.flatnonzero([row.get("rsna_split") == split for row in rows])
        part = RadiographTable(table.rows.take(pa.array(those)), f"RSNA, {split}")
        images = decode_images(part, encoder.image_size)
        features[split] = torch.cat([encoder.embed(some) for some in images.split(64)]).numpy().astype(np.float64)
        targets[split] = np.array([[float(rows[row]["rsna_label"] != "normal")] for row in those.tolist()])
    probe: Any = choose_probe(lambda found: found.numpy(), features, targets, multi_label=True)
    report = {}
    for name, split in (("RSNA thorax, test", "test"), ("RSNA 1024", "shift")):
        scores = probe(torch.from_numpy(features[split]))[:, 0]
        report[name] = auroc_with_interval(scores, targets[split][:, 0], [None] * len(scores))
    return {"linear_probe": report}


if __name__ == "__main__":
    run_script(main)
