"""Linear probe and k-NN on frozen features, for any vision model that transformers loads.

    spcxr probe pneumonia --model CHECKPOINT --data ../shared/data --output probe.json

A classifier is fitted on a share of the labels of the split `train`; its one setting (the regularisation of the
logistic regression, the number of neighbours of k-NN) is chosen on `val`; `test`, and `shift` where a task has images
of other hospitals, are for the report (`--report_test false` leaves them unread). `--random_init true` measures the
same network without its weights: what the training gave is the difference.

A split that leaks between any of these is refused (`--allow_leaks`, `--exclude`).

Two classes are measured by AUROC, more by balanced accuracy; intervals come from a bootstrap over patients. A task is
one of `TASKS`, or two columns of the user's set: `--label_column`, `--split_column`.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported leaves no traceback

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, decode_set
from spcxr_hf.evaluation.bootstrap import bootstrap_draws, patient_groups
from spcxr_hf.evaluation.metrics import weighted_auroc
from spcxr_hf.models.encoders import Encoder, check_pooling, load_encoder
from spcxr_hf.quality.checks import SplitArguments, check_split, write_skipped
from spcxr_hf.training.arguments import parse_arguments, run_script

NORMAL, ABNORMAL = "normal", "abnormal"  # what a list of findings counts as: empty, or not


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: Its key in the results.
        label_column, split_column: Columns of the set.
        classes: Class -> the labels that count as it; of two classes the second is the positive one.
        report: Splits that are for the report alone.
        within: A column and two classes: their AUROC among the images of each value of the column that has both, so
            that no difference between sources can pass for one between diseases.
    """

    name: str
    label_column: str
    split_column: str
    classes: Mapping[str, Sequence[str]]
    report: Sequence[str] = ("test",)
    within: tuple[str, str, str] | None = None

    @property
    def labels(self) -> list[str]:
        """The labels in the order of their numbers; label shares are drawn from each separately."""
        return [label for labels in self.classes.values() for label in labels]

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Class numbers (n,) of label numbers (n,)."""
        class_of = [number for number, labels in enumerate(self.classes.values()) for _ in labels]
        return np.array(class_of)[labels]


TASKS = {
    "pediatric_pneumonia": Task(
        name="pneumonia",
        label_column="pneumonia_label",
        split_column="pneumonia_split",
        classes={NORMAL: ["normal"], "pneumonia": ["bacterial", "viral"]},
    ),
    "pneumonia_three_way": Task(
        name="three_way",
        label_column="pneumonia_label",
        split_column="pneumonia_split",
        classes={NORMAL: ["normal"], "bacterial": ["bacterial"], "viral": ["viral"]},
    ),
    "screening": Task(
        name="screening",
        label_column="findings",
        split_column="findings_split",
        classes={NORMAL: [NORMAL], ABNORMAL: [ABNORMAL]},
    ),
    "covid": Task(
        name="covid",
        label_column="covid_label",
        split_column="covid_split",
        classes={NORMAL: ["normal"], "pneumonia": ["pneumonia"], "covid": ["covid"]},
        report=("test", "shift"),
        within=("source", "pneumonia", "covid"),
    ),
}


@dataclass(kw_only=True)
class Arguments(SplitArguments):
    """Measure frozen features by a logistic regression or by their nearest neighbours."""

    model: str = field(metadata={"help": "checkpoint folder or Hub id, of any task"})
    data: str = field(metadata={"help": "Parquet shards with a column of labels and a column of splits"})
    task: list[str] = field(
        default_factory=lambda: ["pediatric_pneumonia", "pneumonia_three_way"],
        metadata={"help": f"any of {', '.join(TASKS)}; several at once where they share their columns"},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "labels of a user-defined task; a list counts as normal (empty) or abnormal"}
    )
    split_column: str | None = field(
        default=None, metadata={"help": "its splits: train, val and, unless --report_test false, test"}
    )
    method: str = field(default="linear", metadata={"help": "linear (logistic regression) or knn"})
    report_test: bool = field(default=True, metadata={"help": "false: read and report no split but train and val"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    cache: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images between starts"})
    random_init: bool = field(
        default=False, metadata={"help": "random weights, others for each seed; only the config is used"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of the input in pixels; by default the model's own"}
    )
    pooling: str = field(
        default="model", metadata={"help": "model (its pooler_output), mean (of the patch tokens) or cls"}
    )
    layer: int | None = field(
        default=None, metadata={"help": "pool this hidden state, 0 being the embeddings; default: the last"}
    )
    batch_size: int = field(default=64, metadata={"help": "images per forward pass"})
    bf16: bool = field(default=False, metadata={"help": "extract the features in bfloat16 autocast"})
    attention: str = field(
        default="sdpa", metadata={"help": "attention implementation; eager is faster on a CPU below 224 px"}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    label_fraction: list[float] = field(
        default_factory=lambda: [0.01, 0.1, 1.0], metadata={"help": "shares of the labels"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "draws of the labels (and of weights)"}
    )
    c_values: list[float] = field(
        default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0], metadata={"help": "values of C to choose from on val"}
    )
    neighbours: list[int] = field(
        default_factory=lambda: [5, 10, 20, 50, 100, 200], metadata={"help": "values of k to choose from on val"}
    )
    temperature: float = field(default=0.07, metadata={"help": "of the neighbours' votes; small: the nearest decide"})
    resamples: int = field(default=2000, metadata={"help": "bootstrap draws of the patients"})


@dataclass
class Split:
    """A split's images (n, 1, S, S) uint8, label numbers (n,), whose images they are; in time its features (n, D)."""

    images: torch.Tensor
    classes: np.ndarray
    patients: np.ndarray
    groups: np.ndarray | None
    features: np.ndarray


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    table = read_set(arguments.data, arguments.exclude, arguments.read_as, arguments.image_root)
    tasks = choose_tasks(arguments, table)
    encoder = load(arguments, arguments.seeds[0])
    size = arguments.image_size or encoder.image_size
    splits, skipped = load_splits(arguments, table, tasks[0], size)
    scores: dict[tuple, list] = {}
    for seed in arguments.seeds:
        if seed != arguments.seeds[0] and arguments.random_init:
            encoder = load(arguments, seed)
        if seed == arguments.seeds[0] or arguments.random_init:
            extract(arguments, encoder, splits, seed)
        for fraction in arguments.label_fraction:
            if fraction == 1 and not arguments.random_init and seed != arguments.seeds[0]:
                continue  # all labels: every draw is the same
            for task in tasks:
                scores.setdefault((task.name, fraction), []).append(
                    {"seed": seed, **probe(arguments, splits, task, fraction, seed)}
                )

    result = describe(arguments, splits, size) | {"tasks": summarise(scores, tasks)}
    print(json.dumps(result["tasks"], indent=2))
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_skipped(arguments.output, skipped)
    return result


# Arguments


def check(arguments: Arguments) -> None:
    """Refuse what would fail only after the features are there."""
    if arguments.layer is not None and arguments.pooling == "model":
        raise SpcxrError("--layer needs --pooling mean or cls: pooler_output is the last layer's")
    check_pooling(arguments.pooling, arguments.layer)
    if arguments.method not in ("linear", "knn"):
        raise SpcxrError(f"method must be linear or knn; got {arguments.method!r}")
    if (arguments.label_column is None) != (arguments.split_column is None):
        raise SpcxrError("--label_column and --split_column go together")
    check_values(arguments)


def check_values(arguments: Arguments) -> None:
    """Refuse empty lists and numbers out of range."""
    for name in ("task", "label_fraction", "seeds", "c_values", "neighbours"):
        if not getattr(arguments, name):
            raise SpcxrError(f"{name} needs at least one value")
    if not all(0 < fraction <= 1 for fraction in arguments.label_fraction):
        raise SpcxrError(f"label_fraction must lie in (0, 1]; got {arguments.label_fraction}")
    for name in ("image_size", "batch_size", "c_values", "neighbours", "temperature", "resamples"):
        if np.min(1 if getattr(arguments, name) is None else getattr(arguments, name)) <= 0:
            raise SpcxrError(f"{name} must be above 0; got {getattr(arguments, name)}")


def choose_tasks(arguments: Arguments, table: RadiographTable) -> list[Task]:
    """The tasks that are named, or the one of two columns of the user's; all of one run share their columns."""
    if arguments.label_column is not None and arguments.split_column is not None:
        return [own_task(table, arguments.label_column, arguments.split_column)]
    unknown = [name for name in arguments.task if name not in TASKS]
    if unknown:
        raise SpcxrError(f"task must be any of {', '.join(TASKS)}; got {unknown[0]!r}")
    tasks = [TASKS[name] for name in dict.fromkeys(arguments.task)]
    if len({(task.label_column, task.split_column) for task in tasks}) > 1:
        raise SpcxrError(f"{', '.join(arguments.task)} are of different columns: measure them in a run each")
    return tasks


def own_task(table: RadiographTable, label_column: str, split_column: str) -> Task:
    """A class for each label of the split `train`, in the labels' order."""
    labels = read_labels(rows_of(table, split_column, "train"), label_column)
    if len(set(labels)) < 2:
        raise SpcxrError(f"{table.name}: {label_column} has one class in train ({labels[0]}), nothing to tell apart")
    return Task(label_column, label_column, split_column, {label: [label] for label in sorted(set(labels), key=order)})


def order(label: str) -> tuple[bool, float, str]:
    """Sorts numbers by value before words, and `normal` before `abnormal`, so that the latter is the positive class."""
    try:
        return (False, float(label), "")
    except ValueError:
        return (True, 0.0, "" if label == NORMAL else label)


# Images and labels


def load_splits(
    arguments: Arguments, table: RadiographTable, task: Task, size: int
) -> tuple[dict[str, Split], dict[str, str]]:
    """Every split that is asked for, checked before any image is decoded; id -> cause of broken images, skipped."""
    names = ["train", "val", *(task.report if arguments.report_test else ())]
    rows = {name: rows_of(table, task.split_column, name) for name in names}
    for name, part in rows.items():
        check_labels(part, task, may_lack=name == "shift")  # images of other hospitals may lack a class
    check_split(table, task.split_column, arguments.allow_leaks, names, cache=arguments.cache)
    splits: dict[str, Any] = {}
    skipped: dict[str, Any] = {}
    for name, part in rows.items():
        decoded = decode_set(part, size, arguments.cache, on_error=arguments.on_error)
        skipped |= decoded.skipped
        splits[name] = Split(
            decoded.images,
            check_labels(decoded.table, task, may_lack=name == "shift"),
            name_patients(decoded.table),
            np.array(decoded.table.column(task.within[0])) if task.within else None,
            np.empty(0),
        )
    return splits, skipped


def check_labels(table: RadiographTable, task: Task, may_lack: bool) -> np.ndarray:
    """Label numbers (n,) of the rows, each of them there unless the rows may lack one."""
    numbers = number_labels(table, task)
    missing = sorted({*range(len(task.labels))} - {*numbers.tolist()})
    if missing and not may_lack:
        raise SpcxrError(f"{table.name}: no image with {task.label_column} = {task.labels[missing[0]]!r}")
    return numbers


def rows_of(table: RadiographTable, column: str, split: str) -> RadiographTable:
    """The rows of a split."""
    known = table.rows.schema
    if column in known.names and known.field(column).type not in (pa.string(), pa.large_string()):
        raise SpcxrError(f"{table.name}: {column} holds {known.field(column).type}, not words such as {split!r}")
    return table.where(column, split)


def read_labels(table: RadiographTable, column: str) -> list[str]:
    """The labels as words; a list of findings counts as normal where it is empty."""
    values = table.column(column)
    missing = sum(value is None for value in values)
    if missing:
        raise SpcxrError(f"{table.name}: {missing} of {len(values)} rows have no {column}")
    return [(ABNORMAL if value else NORMAL) if isinstance(value, list) else str(value) for value in values]


def number_labels(table: RadiographTable, task: Task) -> np.ndarray:
    """Label numbers (n,) of the rows."""
    numbers = {label: number for number, label in enumerate(task.labels)}
    labels = read_labels(table, task.label_column)
    unknown = sorted(set(labels) - set(numbers))
    if unknown:
        raise SpcxrError(f"{table.name}: {task.label_column} holds {unknown[0]!r}; known are {', '.join(numbers)}")
    return np.array([numbers[label] for label in labels])


def name_patients(table: RadiographTable) -> np.ndarray:
    """Whose image each row is (n,), as numbers; a row whose patient is unknown counts as a separate patient."""
    known = table.column("patient") if "patient" in table.rows.column_names else [None] * len(table)
    groups = patient_groups(known, len(known)) or []
    names = [f"row {group[1]}" if isinstance(group, tuple) else f"patient {group}" for group in groups]
    return np.unique(names, return_inverse=True)[1]


def draw_labels(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Row numbers of a stratified share of the images: the same share of each label, at least two of each."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(classes.max() + 1):
        members = generator.permutation(np.flatnonzero(classes == number))
        rows.append(members[: max(2, round(fraction * len(members)))])
    return np.sort(np.concatenate(rows))


# Features


def load(arguments: Arguments, seed: int) -> Encoder:
    return load_encoder(
        arguments.model, arguments.random_init, seed, arguments.attention, arguments.device, arguments.bf16
    )


def extract(arguments: Arguments, encoder: Encoder, splits: dict[str, Split], seed: int) -> None:
    """Fill in every split's features."""
    total = sum(len(split.classes) for split in splits.values())
    progress = tqdm(total=total, desc=f"features, seed {seed}", unit="image")
    for split in splits.values():
        features = []
        for part in split.images.split(arguments.batch_size):
            features.append(encoder.embed(part, arguments.pooling, arguments.layer))
            progress.update(len(part))
        split.features = torch.cat(features).numpy()
    progress.close()


# Classifiers


def probe(arguments: Arguments, splits: dict[str, Split], task: Task, fraction: float, seed: int) -> dict:
    """Fit on a share of the labels with each setting; the figures on every other split of the one best on val."""
    rows = draw_labels(splits["train"].classes, fraction, seed)
    targets = {name: task.targets(split.classes) for name, split in splits.items()}
    features = {name: split.features for name, split in splits.items() if name != "train"}
    classify = classify_linearly if arguments.method == "linear" else classify_by_neighbours
    best: tuple[float, dict, dict[str, np.ndarray]] = (-1.0, {}, {})
    for setting, scores in classify(arguments, splits["train"].features[rows], targets["train"][rows], features):
        value = round(measure(scores["val"], targets["val"]), 4)
        if value > best[0]:
            best = (value, setting, scores)
    _, setting, scores = best
    run: dict = {"labels": len(rows), **setting}
    return run | {name: evaluate(arguments, splits[name], task, scores[name], targets[name]) for name in features}


def classify_linearly(arguments: Arguments, inputs: np.ndarray, targets: np.ndarray, queries: dict[str, np.ndarray]):
    """For each C: itself, and the scores (n, K) that a logistic regression on standardised features gives a split."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(inputs)
    inputs, queries = scaler.transform(inputs), {name: scaler.transform(part) for name, part in queries.items()}
    for strength in arguments.c_values:
        classifier = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(inputs, targets)
        scores = {name: classifier.decision_function(part) for name, part in queries.items()}
        if len(classifier.classes_) == 2:  # one column: how far on the second class's side
            scores = {name: np.stack([np.zeros(len(part)), part], axis=1) for name, part in scores.items()}
        yield {"C": strength}, scores


def classify_by_neighbours(
    arguments: Arguments, inputs: np.ndarray, targets: np.ndarray, queries: dict[str, np.ndarray]
):
    """For each k: itself, and the share (n, K) of the neighbours' votes that each class of a split's images gets."""
    for count in sorted({min(count, len(inputs)) for count in arguments.neighbours}):
        yield (
            {"k": count},
            {name: vote(inputs, targets, part, count, arguments.temperature) for name, part in queries.items()},
        )


def vote(
    inputs: np.ndarray, targets: np.ndarray, queries: np.ndarray, count: int, temperature: float, chunk: int = 1024
) -> np.ndarray:
    """Weighted k-NN (Wu et al., arXiv 1805.01978, section 3.4; DINO, arXiv 2104.14294, section 4.1).

    The `count` images whose features have the largest cosine similarity s to a query's vote for their class, each with
    the weight exp(s / temperature).

    Args:
        inputs: (m, D) features with a class each.
        targets: (m,) class numbers, 0 .. K - 1.
        queries: (n, D) features.
        count: Number of neighbours, at most m.
        temperature: Above 0; the papers' is 0.07.
        chunk: Queries at a time: their similarities take chunk x m of memory.

    Returns:
        (n, K) float64, each class's share of the votes; a row adds up to 1.
    """
    directions = normalise(inputs)
    shares = np.zeros((len(queries), targets.max() + 1))
    for start in range(0, len(queries), chunk):
        similarity = normalise(queries[start : start + chunk]) @ directions.T
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        logits = np.take_along_axis(similarity, nearest, axis=1) / temperature
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))  # the largest is 1: no overflow, the same shares
        for number in range(shares.shape[1]):
            shares[start : start + chunk, number] = (weights * (targets[nearest] == number)).sum(axis=1)
    return shares / shares.sum(axis=1, keepdims=True)


def normalise(features: np.ndarray) -> np.ndarray:
    """Features (n, D) as unit vectors, float64."""
    vectors = features.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


# Figures


def measure(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> Any:
    """AUROC of two classes, balanced accuracy of more (the mean recall of those classes that there are).

    Args:
        scores: (n, K), the higher the likelier.
        targets: (n,) class numbers, 0 .. K - 1.
        weights: (R, n), how often each image counts in each of R resamples; by default once, in one.

    Returns:
        A number without weights; (R,) with them, NaN where a resample lacks a class that AUROC needs.
    """
    counts = np.ones((1, len(targets))) if weights is None else weights
    if scores.shape[1] == 2:
        values = weighted_auroc(scores[:, 1] - scores[:, 0], targets == 1, counts)
    else:
        values = np.nanmean(recalls(scores, targets, counts), axis=1)
    return values if weights is not None else float(values[0])


def recalls(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of each class's images that are recognised, (R, K); NaN for a class without images."""
    members = targets[:, None] == np.arange(scores.shape[1])
    right = (scores.argmax(axis=1) == targets)[:, None] & members
    with np.errstate(invalid="ignore"):
        return (weights @ right) / (weights @ members)


def evaluate(arguments: Arguments, split: Split, task: Task, scores: np.ndarray, targets: np.ndarray) -> dict:
    """The figure of a split, of each of its bootstrap resamples, and what else the task asks for."""
    count = len(targets)
    weights = bootstrap_draws(  # how often each image counts
        lambda rows: np.bincount(rows, minlength=count), count, split.patients.tolist(), arguments.resamples
    )
    entry: dict = {
        "value": round(measure(scores, targets), 4),
        "resampled": measure(scores, targets, weights),
    }
    if len(task.classes) > 2:
        shares = recalls(scores, targets, np.ones((1, count)))[0]
        entry["recall"] = {
            name: round(float(share), 4) for name, share in zip(task.classes, shares, strict=True) if share == share
        }
    if task.within is not None and split.groups is not None:
        names = list(task.classes)
        pair = [names.index(name) for name in task.within[1:]]
        entry["within"] = measure_within(scores[:, pair], targets, pair, split.groups)
    return entry


def measure_within(scores: np.ndarray, targets: np.ndarray, pair: list[int], groups: np.ndarray) -> dict[str, float]:
    """AUROC of the second class of a pair against the first in each group that has both."""
    found = {}
    for group in sorted(set(groups.tolist())):
        rows = (groups == group) & np.isin(targets, pair)
        if len(set(targets[rows].tolist())) == 2:
            found[group] = round(measure(scores[rows], (targets[rows] == pair[1]).astype(int)), 4)
    return found


def interval(resampled: np.ndarray) -> list[float] | None:
    """Ends of the 95 % percentile interval; None where no resample has every class that it needs."""
    values = resampled[np.isfinite(resampled)]
    return [round(float(end), 4) for end in np.quantile(values, [0.025, 0.975])] if len(values) else None


# Results


def summarise(scores: dict[tuple, list], tasks: Sequence[Task]) -> dict:
    """Mean and standard deviation over the seeds, and each seed's figures, by task and share of the labels.

    The interval beside a mean is that of the mean: every seed's figure is taken on the same draws of the patients.
    """
    results: dict = {}
    for task in tasks:
        metric = "AUROC" if len(task.classes) == 2 else "balanced accuracy"
        results[task.name] = {"metric": metric, "classes": list(task.classes), "label_fraction": {}}
    for (name, fraction), runs in scores.items():
        splits = [key for key, value in runs[0].items() if isinstance(value, dict)]
        entry: dict = {"labels": runs[0]["labels"]}
        entry |= {split: summarise_split([run[split] for run in runs]) for split in splits}
        entry["seeds"] = [flatten(run) for run in runs]
        results[name]["label_fraction"][f"{fraction:g}"] = entry
    return results


def summarise_split(figures: list[dict]) -> dict:
    """Mean, standard deviation and interval of a split's figures, one for each seed."""
    values = [figure["value"] for figure in figures]
    sd = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
    entry: dict = {"mean": round(float(np.mean(values)), 4), "sd": sd}
    entry["ci95"] = interval(np.mean([figure["resampled"] for figure in figures], axis=0))
    for extra in ("recall", "within"):
        if figures[0].get(extra):
            entry[extra] = {
                name: round(float(np.mean([figure[extra][name] for figure in figures])), 4)
                for name in figures[0][extra]
            }
    return entry


def flatten(run: dict) -> dict:
    """A seed's figures with their intervals beside them."""
    flat: dict = {}
    for key, value in run.items():
        if isinstance(value, dict):
            flat |= {key: value["value"], f"{key}_ci95": interval(value["resampled"])}
        else:
            flat[key] = value
    return flat


def describe(arguments: Arguments, splits: dict[str, Split], size: int) -> dict:
    """What was measured, without the machine's paths."""
    return {
        "model": Path(arguments.model).resolve().name,
        "method": arguments.method,
        "random_init": arguments.random_init,
        "image_size": size,
        "pooling": arguments.pooling,
        "layer": arguments.layer,
        "features": splits["train"].features.shape[1],
        "images": {name: len(split.classes) for name, split in splits.items()},
        "patients": {name: len(set(split.patients.tolist())) for name, split in splits.items()},
    }


if __name__ == "__main__":
    run_script(main)
