"""Compare frozen encoders, ours and its peers, by a fixed list of probes.

    python -m training_scripts.benchmarks.probes --data ../shared/data --rsna ../shared/rsna_jsrt \
        --models model_cards/base efficientnet-lite0 --exclude training_scripts/recipes/near_copies.txt
    python -m training_scripts.benchmarks.probes --render training_scripts/benchmarks/README.md

Every encoder sees whole films at its own size. Logistic regression on standardised features and k-NN on their cosine;
lungs and heart by a ridge regression from each patch's token to its 16 x 16 pixels. Each setting is chosen on `val`
(lungs and heart of JSRT: on 25 of the training images). AUROC, balanced accuracy (COVID-19, three classes), Dice.
Models that are not named keep their columns in the results file. The table is printed; `--render` writes a page's.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from spcxr_hf import SpcxrError
from spcxr_hf.data.sets import read_set
from spcxr_hf.data.table import RadiographTable, decode_set, join_tables, open_mask
from spcxr_hf.files import read_json, write_json
from spcxr_hf.models.encoders import load_encoder
from spcxr_hf.training.arguments import parse_arguments, run_script
from spcxr_hf.transforms.augment import resize
from training_scripts.benchmarks.lib.timing import replace_block

RESULTS = Path(__file__).resolve().parent / "results" / "probes.json"
COLUMNS = (
    *("source", "view", "pneumonia_label", "pneumonia_split", "findings", "findings_split", "covid_label"),
    *("covid_split", "rsna_label", "rsna_split", "lung_mask", "lung_split", "anatomy_mask", "anatomy_split"),
)
COVID_CLASSES = ("normal", "pneumonia", "covid")
LEFT_LUNG, RIGHT_LUNG, HEART = 1, 2, 4  # bits of `anatomy_mask`
C_VALUES = (1e-4, 1e-3, 1e-2, 1e-1)
NEIGHBOURS = (5, 10, 20, 50)
TEMPERATURE = 0.07
RIDGE = (1.0, 10.0, 100.0, 1e3, 1e4)
DRAWS = 3  # of 1 and 10 % of the labels
COVID_IMAGES, LUNG_IMAGES = 2000, 400  # training images of the largest task, and of the lungs' map, drawn once
MASK_SIZE = 112


@dataclass
class Arguments:
    """Measure frozen encoders by a fixed list of probes."""

    data: str = field(
        default="../shared/data",
        metadata={"help": "Parquet shards with the columns of children, NIH, COVID-19 and lung masks"},
    )
    rsna: str = field(
        default="../shared/rsna_jsrt", metadata={"help": "Parquet shards with the columns of RSNA and JSRT"}
    )
    models: list[str] = field(default_factory=list, metadata={"help": "folders, Hub ids, or efficientnet-lite0"})
    exclude: str | None = field(default=None, metadata={"help": "text file of ids to leave out of the training rows"})
    cache: str | None = field(default=None, metadata={"help": "folder that keeps the decoded images between starts"})
    image_size: int | None = field(default=None, metadata={"help": "side of the input; by default each model's own"})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file to write"})
    render: str | None = field(default=None, metadata={"help": "measure nothing; write the table into this page"})


@dataclass
class Films:
    """The rows of both folders, decoded, with their columns as arrays of objects."""

    images: torch.Tensor
    columns: dict[str, np.ndarray]

    def rows(self, column: str, value: str, *conditions: np.ndarray) -> np.ndarray:
        """Row numbers with this value in a column, where all conditions hold."""
        chosen = self.columns[column] == value
        for condition in conditions:
            chosen = chosen & condition
        return np.flatnonzero(chosen)


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    path = Path(arguments.results)
    results = read_json(path) if path.is_file() else {"models": {}}
    if arguments.render is not None:
        replace_block(Path(arguments.render), "probes", table(results))
        return results
    films = load_films(arguments)
    for model in arguments.models:
        name = model if model == "efficientnet-lite0" else Path(model).resolve().name
        size, pooled, tokens = embed(films, model, arguments.image_size)
        probes = dict(run_probes(films, pooled, tokens))
        results["models"][name] = {"image_size": size, "features": pooled.shape[1], "probes": probes}
        write_json(path, results)
    print(table(results))
    return results


def load_films(arguments: Arguments) -> Films:
    """Every row that has a place in one of the splits."""
    excluded = set(Path(arguments.exclude).read_text().split("\n")) if arguments.exclude else set()
    joined = join_tables([read_set(arguments.data), read_set(arguments.rsna)])
    splits = [name for name in COLUMNS if name.endswith("_split")]
    if missing := [name for name in COLUMNS if name not in joined.rows.column_names]:
        raise SpcxrError(f"{joined.name}: no column {missing[0]!r}")
    columns = {name: joined.column(name) for name in (*COLUMNS, "id")}
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(np.array(columns["covid_split"]) == "train"))
    spare = set(drawn[COVID_IMAGES:].tolist())
    kept = []
    for row, name in enumerate(columns["id"]):
        values = [None if row in spare and split == "covid_split" else columns[split][row] for split in splits]
        trains = "train" in values and columns["source"][row] != "jsrt"
        kept.append(any(values) and not (trains and name in excluded))
        columns["covid_split"][row] = values[splits.index("covid_split")]
    table = RadiographTable(joined.rows.filter(kept), joined.name)
    decoded = decode_set(table, 256, arguments.cache)
    arrays = {}
    for name in COLUMNS:
        arrays[name] = np.empty(len(table), object)
        arrays[name][:] = [value for value, keep in zip(columns[name], kept, strict=True) if keep]
    return Films(decoded.images, arrays)


def embed(films: Films, model: str, size: int | None) -> tuple[int, np.ndarray, dict[int, np.ndarray]]:
    """The input's side, features (n, D), and row -> tokens (N, D) of the films with a mask."""
    encoder = load_encoder(model)
    size = size or encoder.image_size
    with_mask = (films.columns["lung_split"] != None) | (films.columns["anatomy_split"] != None)  # noqa: E711
    pooled, tokens = [], {}
    for rows in tqdm(torch.arange(len(films.images)).split(32), desc=Path(model).name):
        found = encoder.patch_tokens(resize(films.images[rows], size).round().clamp(0, 255).to(torch.uint8))
        pooled.append(found.mean(dim=1).double().numpy())
        tokens.update({row: found[n].numpy() for n, row in enumerate(rows.tolist()) if with_mask[row]})
    return size, np.concatenate(pooled), tokens


# ---- the list ----------------------------------------------------------------------------------------------------


def run_probes(films: Films, pooled: np.ndarray, tokens: dict[int, np.ndarray]) -> Iterator[tuple[str, dict]]:
    """Name and figures of every probe."""
    columns = films.columns
    for method, classify in (("linear", classify_linearly), ("k-NN", classify_by_neighbours)):
        sick = columns["pneumonia_label"] != "normal"
        splits = [films.rows("pneumonia_split", split) for split in ("train", "val", "test")]
        for share in (0.01, 0.1, 1.0):
            draws = [draw(splits[0], sick, share, seed) for seed in range(DRAWS if share < 1 else 1)]
            runs = [measure(pooled, sick.astype(int), classify, rows, *splits[1:])[0] for rows in draws]
            yield f"children, {share:.0%} of the labels, {method}", mean(runs)
        abnormal = columns["rsna_label"] != "normal"
        thorax = columns["source"] == "rsna_thorax"
        sides = [films.rows("rsna_split", split, thorax) for split in ("train", "val", "test")]
        found, score = measure(pooled, abnormal.astype(int), classify, *sides)
        shift = films.rows("source", "rsna_1024")
        scores = score(pooled[shift])
        parts = {"rsna_1024": np.ones(len(shift), bool), "PA": columns["view"][shift] == "PA",
                 "AP": columns["view"][shift] == "AP",
                 "opacity": columns["rsna_label"][shift] != "other abnormal"}  # fmt: skip
        found |= {name: figure(scores[part], abnormal[shift][part].astype(int)) for name, part in parts.items()}
        yield f"screening, rsna_thorax, {method}", found
        abnormal = np.array([bool(cell) for cell in columns["findings"]]).astype(int)
        sides = [films.rows("findings_split", split) for split in ("train", "val", "test")]
        yield f"screening, NIH, {method}", measure(pooled, abnormal, classify, *sides)[0]
        classes = np.array(
            [("normal", "pneumonia", "covid").index(cell) if cell else -1 for cell in columns["covid_label"]]
        )
        sides = [films.rows("covid_split", split) for split in ("train", "val", "test")]
        yield f"COVID-19, {method}", measure(pooled, classes, classify, *sides)[0]
    yield from run_maps(films, tokens)


def measure(
    features: np.ndarray, targets: np.ndarray, classify: Callable, train: np.ndarray, val: np.ndarray, test: np.ndarray
) -> tuple[dict[str, float], Callable[[np.ndarray], np.ndarray]]:
    """The figures on val and test of the setting that is best on val, and what scores other features."""
    best: tuple[float, Any, Any] = (-1.0, None, None)
    for setting, score in classify(features[train], targets[train]):
        value = figure(score(features[val]), targets[val])
        if value > best[0]:
            best = (value, setting, score)
    value, setting, score = best
    return {"setting": setting, "val": value, "test": figure(score(features[test]), targets[test])}, score


def figure(scores: np.ndarray, targets: np.ndarray) -> float:
    """AUROC of two classes, balanced accuracy of more."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    if scores.shape[1] == 2:
        return round(float(roc_auc_score(targets, scores[:, 1])), 4)
    return round(float(balanced_accuracy_score(targets, scores.argmax(axis=1))), 4)


def mean(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over draws of the labels."""
    return {name: round(float(np.mean([run[name] for run in runs])), 4) for name in ("val", "test")}


def draw(rows: np.ndarray, sick: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The same share of the rows of either class, at least two of each."""
    generator = np.random.default_rng(seed)
    groups = [generator.permutation(rows[sick[rows] == value]) for value in (False, True)]
    return np.concatenate([group[: max(2, round(share * len(group)))] for group in groups])


def classify_linearly(inputs: np.ndarray, targets: np.ndarray) -> Iterator[tuple[float, Callable]]:
    """For each C: itself, and what gives the probabilities of a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for strength in C_VALUES:
        classifier = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        yield strength, make_pipeline(StandardScaler(), classifier).fit(inputs, targets).predict_proba


def classify_by_neighbours(inputs: np.ndarray, targets: np.ndarray) -> Iterator[tuple[int, Callable]]:
    """For each k: itself, and what gives the classes' shares of the votes (as in `linear_probe.py`, centred)."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    for count in sorted({min(count, len(inputs)) for count in NEIGHBOURS}):
        votes = KNeighborsClassifier(count, metric="cosine", weights=lambda far: np.exp(-far / TEMPERATURE))
        pipeline = make_pipeline(StandardScaler(with_std=False), Normalizer(), votes).fit(inputs, targets)
        yield count, pipeline.predict_proba


# ---- lungs and heart -----------------------------------------------------------------------------------------------


def run_maps(films: Films, tokens: dict[int, np.ndarray]) -> Iterator[tuple[str, dict]]:
    """Dice of lungs (children, and adults with COVID-19 as shift) and of JSRT's lungs and heart."""
    children = films.columns["source"] == "kermany"
    train, val, test = (films.rows("lung_split", split, children) for split in ("train", "val", "test"))
    train = np.random.default_rng(0).permutation(train)[:LUNG_IMAGES]
    shift = films.rows("lung_split", "shift")

    def lungs(row: int) -> np.ndarray:
        return (
            np.asarray(open_mask(films.columns["lung_mask"][row], f"row {row}").resize((MASK_SIZE, MASK_SIZE), 0)) > 0
        )

    def structure(*bits: int) -> Callable[[int], np.ndarray]:
        def read(row: int) -> np.ndarray:
            with Image.open(io.BytesIO(films.columns["anatomy_mask"][row]["bytes"])) as picture:
                return (np.asarray(picture.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.NEAREST)) & sum(bits)) > 0

        return read

    yield "lungs, children, linear", map_linearly(tokens, lungs, train, val, {"test": test, "shift": shift})
    odd = np.random.default_rng(0).permutation(films.rows("anatomy_split", "train"))
    even = films.rows("anatomy_split", "test")
    for name, read in (("lungs", structure(LEFT_LUNG, RIGHT_LUNG)), ("heart", structure(HEART))):
        yield f"{name}, JSRT, linear", map_linearly(tokens, read, odd[25:], odd[:25], {"test": even})


def map_linearly(
    tokens: dict[int, np.ndarray], read: Callable, train: np.ndarray, val: np.ndarray, report: dict[str, np.ndarray]
) -> dict[str, float]:
    """Dice on val and on the splits for the report of the ridge regression that is best on val."""
    from sklearn.linear_model import Ridge

    def of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = np.stack([tokens[row] for row in rows]).astype(np.float64)
        return features, np.stack([in_patches(read(row), features.shape[1]) for row in rows])

    inputs, targets = of(train)
    offset, scale = inputs.mean(axis=(0, 1)), inputs.std(axis=(0, 1)) + 1e-6
    flat = ((inputs - offset) / scale).reshape(-1, inputs.shape[2])
    sides = {name: of(rows) for name, rows in {"val": val, **report}.items()}
    best: dict[str, float] = {"val": -1.0}
    for strength in RIDGE:
        ridge = Ridge(strength).fit(flat, targets.reshape(len(flat), -1))
        found: dict[str, float] = {"setting": strength}
        for name, (features, masks) in sides.items():
            predicted = ridge.predict(((features - offset) / scale).reshape(-1, flat.shape[1])) > 0.5
            found[name] = dice(predicted.reshape(len(masks), -1), masks.reshape(len(masks), -1))
        best = max(best, found, key=lambda entry: entry["val"])
    return best


def in_patches(mask: np.ndarray, patches: int) -> np.ndarray:
    """A mask (S, S) as (patches, pixels of a patch), row by row."""
    grid = round(patches**0.5)
    side = mask.shape[0] // grid
    return mask.reshape(grid, side, grid, side).transpose(0, 2, 1, 3).reshape(patches, side * side).astype(float)


def dice(predicted: np.ndarray, masks: np.ndarray) -> float:
    """The mean over images (n, pixels)."""
    both = (predicted & (masks > 0.5)).sum(axis=1)
    return round(float((2 * both / np.maximum(predicted.sum(axis=1) + masks.sum(axis=1), 1)).mean()), 4)


# ---- the table -----------------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """A Markdown table: a row for each figure of the report, a column for each model; the best in bold."""
    models = results["models"]
    lines = [f"| probe | figure on | {' | '.join(models)} |", "|---" * (2 + len(models)) + "|"]
    first = next(iter(models.values()))["probes"]
    for probe, figures in first.items():
        for name in (name for name in figures if name not in ("setting", "val")):
            values = [entry["probes"].get(probe, {}).get(name) for entry in models.values()]
            highest = max(value for value in values if value is not None)
            cells = ["" if v is None else f"**{v:.3f}**" if v == highest else f"{v:.3f}" for v in values]
            lines.append(f"| {probe} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
