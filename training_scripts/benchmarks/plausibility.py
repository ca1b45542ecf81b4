"""False alarms and detection rate of the plausibility test, and the fit of its rule.

python -m training_scripts.benchmarks.plausibility --data ../shared/data --output false_alarms.json
python -m training_scripts.benchmarks.plausibility --data ../shared/data --fit true --output false_alarms.json

Threshold and weights come from a random half of the radiographs (`--fit true` writes them into the JSON, in the form in
which `spcxr_hf/images/plausibility.py` holds them); every figure is measured on the other half.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from spcxr_hf.data.table import open_image, read_table
from spcxr_hf.errors import SpcxrError
from spcxr_hf.images import plausibility
from spcxr_hf.training.arguments import parse_arguments, run_script

EXPONENTS = (0.7, 1.0, 1.5, 2.0)  # of 1/f noise
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
NOISE_IMAGES = 24_000


@dataclass
class Arguments:
    """Measure `spcxr_hf.images.plausibility` on real radiographs."""

    data: str = field(metadata={"help": "Parquet shards or a folder of pictures"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    others: str | None = field(default=None, metadata={"help": "folder of pictures that are no chest radiographs"})
    fit: bool = field(default=False, metadata={"help": "fit weights and threshold anew (needs scikit-learn)"})
    rate: float = field(default=0.005, metadata={"help": "false alarms that the fitted threshold allows on its half"})
    seed: int = field(default=0, metadata={"help": "of the halves and the noise"})
    limit: int | None = field(default=None, metadata={"help": "use only this many radiographs"})


def main() -> None:
    arguments = parse_arguments(Arguments)
    images, sources = load(arguments)
    generator = np.random.default_rng(arguments.seed)
    order = generator.permutation(len(images))
    fitting, held_out = order[: len(order) // 2], order[len(order) // 2 :]
    result: dict = {"images": len(images), "held_out": len(held_out), "seed": arguments.seed}
    if arguments.fit:
        result["fit"] = fit([images[row] for row in fitting], arguments.rate, generator)
    result |= measure([images[row] for row in held_out], [sources[row] for row in held_out], generator)
    if arguments.others:
        result["others"] = measure_others(Path(arguments.others))
    print(json.dumps({name: value for name, value in result.items() if name != "fit"}, indent=2))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def load(arguments: Arguments) -> tuple[list[Image.Image], list[str]]:
    """What the test looks at of every radiograph, as it was read, and where it is from."""
    table = read_table(arguments.data)
    count = min(len(table), arguments.limit or len(table))
    rows = np.random.default_rng(arguments.seed).permutation(len(table))[:count]
    cells = table.column("image")
    sources = table.column("source") if "source" in table.rows.column_names else ["unknown"] * len(table)
    warnings.simplefilter("ignore", plausibility.ImplausibleWarning)  # they are counted here
    images = [plausibility.subsample(open_image(cells[int(row)], f"row {row}")) for row in tqdm(rows, desc="read")]
    return images, [str(sources[int(row)]) for row in rows]


# ---- the rule ----------------------------------------------------------------------------------------------------


def fit(images: list[Image.Image], rate: float, generator: np.random.Generator) -> dict:
    """Weights, intercept and threshold, set in `plausibility` for what is measured next, and returned."""
    from sklearn.linear_model import LogisticRegression

    images = [plausibility.subsample(image) for image in images]  # as `quality_warnings` looks at them
    real = np.stack([plausibility.features(image) for image in images])
    mirrored = np.stack([plausibility.features(ImageOps.mirror(image)) for image in images])
    turned = np.stack([plausibility.features(image.transpose(TURNS[row % 3])) for row, image in enumerate(images)])
    negatives = np.concatenate([-real, turned, noise(NOISE_IMAGES, generator)])
    features = np.concatenate([real, mirrored, negatives])
    labels = np.arange(len(features)) < 2 * len(real)
    model = LogisticRegression(C=0.01, max_iter=1000).fit(features, labels)
    plausibility.WEIGHTS = np.rint(100 * model.coef_[0]) / 100
    plausibility.INTERCEPT = round(float(model.intercept_[0]), 2)
    scores = np.array([plausibility.chest_score(pixels) for pixels in real])
    plausibility.MIN_CHEST_SCORE = round(float(np.quantile(scores, rate)), 2)
    return {
        "hundredths": np.rint(100 * plausibility.WEIGHTS).astype(int).reshape(plausibility.SIDE, -1).tolist(),
        "intercept": plausibility.INTERCEPT,
        "min_chest_score": plausibility.MIN_CHEST_SCORE,
    }


def noise(count: int, generator: np.random.Generator) -> np.ndarray:
    """Features (count, 256) of noise whose amplitude falls with frequency as 1 / f ** exponent."""
    side = 4 * plausibility.SIDE
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    found = []
    for row in range(count):
        spectrum = np.fft.fft2(generator.normal(size=(side, side))) / frequency ** EXPONENTS[row % len(EXPONENTS)]
        values = np.fft.ifft2(spectrum).real[: side // 2, : side // 2]  # a part, so that opposite borders differ
        grey = np.rint(255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)
        found.append(plausibility.features(Image.fromarray(grey)))
    return np.stack(found)


# ---- the figures -------------------------------------------------------------------------------------------------


def measure(images: list[Image.Image], sources: list[str], generator: np.random.Generator) -> dict:
    """Shares of held-out radiographs, and of what was made from them, that the test flags."""
    alarms = [plausibility.quality_warnings(image) for image in images]
    flagged = Counter(source for source, found in zip(sources, alarms, strict=True) if found)
    negatives = [plausibility.quality_warnings(Image.eval(image, lambda level: 255 - level)) for image in images]
    turned = [plausibility.quality_warnings(image.transpose(TURNS[row % 3])) for row, image in enumerate(images)]
    scores = np.array([plausibility.chest_score(pixels) for pixels in noise(2000, generator)])
    return {
        "false_alarm_rate": rate_of(alarms),
        "false_alarms_by_warning": dict(Counter(found[0].split(":")[0] for found in alarms if found)),
        "false_alarm_rate_by_source": {
            source: round(flagged[source] / count, 4) for source, count in sorted(Counter(sources).items())
        },
        "called_negative_by_mistake": rate_of(alarms, "negative"),
        "negatives_flagged": rate_of(negatives),
        "negatives_called_negative": rate_of(negatives, "negative"),
        "turned_flagged": rate_of(turned),
        "noise_flagged": round(float((scores < plausibility.MIN_CHEST_SCORE).mean()), 4),
    }


def rate_of(found: list[list[str]], word: str = "") -> float:
    return round(sum(any(word in text for text in texts) for texts in found) / len(found), 4)


def measure_others(folder: Path) -> dict:
    """How many pictures of a folder, none of them a chest radiograph, are flagged; those that are missed by name."""
    from spcxr_hf import read_radiograph

    missed, refused, count = [], 0, 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            read_radiograph(path, strict=None)
        except SpcxrError:
            continue  # not an image that the reader takes
        count += 1
        try:
            read_radiograph(path, strict=True)
            missed.append(path.name)
        except SpcxrError:
            refused += 1
    return {"images": count, "flagged": refused, "missed": missed}


if __name__ == "__main__":
    run_script(main)
