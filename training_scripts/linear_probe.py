"""Linear probe: a logistic regression on frozen features, for any vision model that transformers loads.

    python training_scripts/linear_probe.py training_scripts/recipes/linear_probe.yaml --model CHECKPOINT \
        --data ../shared/data --output probe.json

Task: the chest radiographs of children (Kermany et al.), normal against pneumonia (AUROC) and normal, bacterial, viral
(balanced accuracy), from a share of the labels of the split `train`. The regularisation is chosen on `val`; `test` is
the set's official test folder. `--random_init true` measures the same network without its weights: what the training
gave is the difference.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from spcxr_hf import SpcxrError, SpcxrImageProcessor
from spcxr_hf.data import decode_images, read_table
from spcxr_hf.recipe import parse_arguments

CLASSES = ["normal", "bacterial", "viral"]
SPLITS = ["train", "val", "test"]


@dataclass
class Arguments:
    """Measure frozen features by a logistic regression."""

    model: str = field(metadata={"help": "checkpoint folder, of any task"})
    data: str = field(metadata={"help": "Parquet shards with the columns pneumonia_label and pneumonia_split"})
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
    strengths: list[float] = field(
        default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0], metadata={"help": "values of C to choose from on val"}
    )


@dataclass
class Split:
    """Images (n, 1, S, S) uint8 and class numbers (n,) of a split; in time its features (n, D), float32."""

    images: torch.Tensor
    classes: np.ndarray
    features: np.ndarray


def main(argv: Sequence[str] | None = None) -> dict:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    size = arguments.image_size or AutoConfig.from_pretrained(arguments.model).image_size
    splits = {name: load_split(arguments, name, size) for name in SPLITS}
    scores: dict[tuple, list] = {}
    for seed in arguments.seeds:
        if arguments.random_init or seed == arguments.seeds[0]:
            extract(arguments, splits, seed)
        for fraction in arguments.label_fraction:
            if fraction == 1 and not arguments.random_init and seed != arguments.seeds[0]:
                continue  # all labels: every draw is the same
            for task in ("pneumonia", "three_way"):
                scores.setdefault((task, fraction), []).append(
                    {"seed": seed, **probe(arguments, splits, task, fraction, seed)}
                )

    result = describe(arguments, splits, size) | {"tasks": summarise(scores)}
    print(json.dumps(result["tasks"], indent=2))
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def check(arguments: Arguments) -> None:
    """Refuse what would fail only after the features are there."""
    if arguments.pooling not in ("model", "mean", "cls"):
        raise SpcxrError(f"pooling must be model, mean or cls; got {arguments.pooling!r}")
    if arguments.layer is not None and arguments.pooling == "model":
        raise SpcxrError("--layer needs --pooling mean or cls: pooler_output is the last layer's")
    if not all(0 < fraction <= 1 for fraction in arguments.label_fraction):
        raise SpcxrError(f"label_fraction must lie in (0, 1]; got {arguments.label_fraction}")


def load_split(arguments: Arguments, name: str, size: int) -> Split:
    """Decode a split of the task, its images at size x size."""
    table = read_table(arguments.data).where("pneumonia_split", name)
    classes = np.array([CLASSES.index(label) for label in table.column("pneumonia_label")])
    return Split(decode_images(table, size, arguments.cache), classes, np.empty(0))


def load_model(arguments: Arguments, seed: int) -> torch.nn.Module:
    """The encoder, or one of the same configuration with the random weights that follow from the seed."""
    if not arguments.random_init:
        model = AutoModel.from_pretrained(arguments.model, attn_implementation=arguments.attention)
    else:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(arguments.model)
        model = AutoModel.from_config(config, attn_implementation=arguments.attention)
    return model.to(arguments.device).float().eval()


def extract(arguments: Arguments, splits: dict[str, Split], seed: int) -> None:
    """Fill in every split's features."""
    model = load_model(arguments, seed)
    mean, std = pixel_statistics(arguments)
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = (
            True  # other models of the library ask for it; this family's needs no asking
        )
    channels = getattr(model.config, "num_channels", 3)
    progress = tqdm(
        total=sum(len(split.classes) for split in splits.values()), desc=f"features, seed {seed}", unit="image"
    )
    for split in splits.values():
        features = []
        for part in split.images.split(arguments.batch_size):
            pixel_values = ((part.float() / 255).expand(-1, channels, -1, -1) - mean) / std
            features.append(embed(arguments, model, pixel_values.to(arguments.device), options))
            progress.update(len(part))
        split.features = torch.cat(features).numpy()
    progress.close()


def pixel_statistics(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (1, C, 1, 1) of the checkpoint's image processor; SPCXR's own where it has none."""
    try:
        processor = AutoImageProcessor.from_pretrained(arguments.model)
    except (OSError, ValueError):  # a training checkpoint: weights and configuration only
        processor = SpcxrImageProcessor()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


@torch.no_grad()
def embed(arguments: Arguments, model: torch.nn.Module, pixel_values: torch.Tensor, options: dict) -> torch.Tensor:
    """(B, C, S, S) -> (B, D) float32 on the CPU."""
    with torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=arguments.bf16):
        outputs = model(pixel_values, output_hidden_states=arguments.layer is not None, **options)
    if arguments.pooling == "model":
        if getattr(outputs, "pooler_output", None) is None:
            raise SpcxrError(f"{type(model).__name__} has no pooler_output: use --pooling mean or cls")
        return outputs.pooler_output.flatten(1).float().cpu()
    tokens = outputs.last_hidden_state if arguments.layer is None else outputs.hidden_states[arguments.layer]
    pooled = tokens[:, 0] if arguments.pooling == "cls" else tokens[:, 1:].mean(dim=1)
    return pooled.float().cpu()


def draw_labels(classes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Row numbers of a stratified share of the images: the same share of each class, at least two of each."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(len(CLASSES)):
        members = generator.permutation(np.flatnonzero(classes == number))
        rows.append(members[: max(2, round(fraction * len(members)))])
    return np.sort(np.concatenate(rows))


def probe(arguments: Arguments, splits: dict[str, Split], task: str, fraction: float, seed: int) -> dict:
    """Fit on a share of the labels with each C; the figures on val and test of the one that is best on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = draw_labels(splits["train"].classes, fraction, seed)
    scaler = StandardScaler().fit(splits["train"].features[rows])
    inputs = {name: scaler.transform(split.features) for name, split in splits.items()}
    targets = {name: split.classes if task == "three_way" else split.classes > 0 for name, split in splits.items()}
    best: dict = {"val": -1.0}
    for strength in arguments.strengths:
        classifier = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        classifier.fit(inputs["train"][rows], targets["train"][rows])
        value = score(classifier, inputs["val"], targets["val"])
        if value > best["val"]:
            test = score(classifier, inputs["test"], targets["test"])
            best = {"labels": len(rows), "C": strength, "val": value, "test": test}
    return best


def score(classifier, inputs: np.ndarray, targets: np.ndarray) -> float:
    """AUROC of a task with two classes, balanced accuracy of one with three."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    if len(classifier.classes_) == 2:
        return round(float(roc_auc_score(targets, classifier.decision_function(inputs))), 4)
    return round(float(balanced_accuracy_score(targets, classifier.predict(inputs))), 4)


def summarise(scores: dict[tuple, list]) -> dict:
    """Mean and standard deviation over the seeds, and each seed's figures, by task and share of the labels."""
    tasks: dict = {}
    for (task, fraction), runs in scores.items():
        entry = {"labels": runs[0]["labels"]}
        for split in ("val", "test"):
            values = [run[split] for run in runs]
            sd = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
            entry[split] = {"mean": round(float(np.mean(values)), 4), "sd": sd}
        entry["seeds"] = runs
        metric = "AUROC" if task == "pneumonia" else "balanced accuracy"
        tasks.setdefault(task, {"metric": metric, "label_fraction": {}})["label_fraction"][f"{fraction:g}"] = entry
    return tasks


def describe(arguments: Arguments, splits: dict[str, Split], size: int) -> dict:
    """What was measured, without the machine's paths."""
    return {
        "model": Path(arguments.model).resolve().name,
        "random_init": arguments.random_init,
        "image_size": size,
        "pooling": arguments.pooling,
        "layer": arguments.layer,
        "features": splits["train"].features.shape[1],
        "images": {name: len(split.classes) for name, split in splits.items()},
    }


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
