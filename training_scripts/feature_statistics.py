"""Give a classifier the statistics of its training images, by which it says how unlike them another image is.

    python training_scripts/feature_statistics.py --model runs/finetune_classification/final --data DATA

writes `feature_statistics.safetensors` into the model's folder: class means and shared covariance of the embeddings of
the split `train`, and the distances of `val`. `spcxr predict` then reports `unlike_training`, as do the demo and the
handler. Columns, classes and rows to leave out are by default those of the `recipe.yaml` beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from spcxr_hf import SpcxrError
from spcxr_hf.data.labels import parse_classes
from spcxr_hf.data.sets import read_set
from spcxr_hf.evaluation.predict import (
    LabelledRows,
    load_classifier,
    match_classes,
    open_images,
    predict_embeddings,
    select_rows,
)
from spcxr_hf.files import atomic_file
from spcxr_hf.modeling.modeling_spcxr import FEATURE_STATISTICS
from spcxr_hf.models.loading import is_multi_label, label_names
from spcxr_hf.models.typicality import fit_statistics
from spcxr_hf.training.arguments import parse_arguments, read_recipe, run_script


@dataclass
class Arguments:
    """Give a classifier the statistics of its training images."""

    model: str = field(metadata={"help": "folder of an SPCXR classifier, as it was trained on these images"})
    data: str = field(metadata={"help": "the set that it was trained on"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; by default the recipe's"})
    split_column: str | None = field(default=None, metadata={"help": "column of the splits; by default the recipe's"})
    classes: list[str] = field(default_factory=list, metadata={"help": "as of calibrate.py; by default the recipe's"})
    exclude: str | None = field(default=None, metadata={"help": "file of ids to leave out; by default the recipe's"})
    train_split: str = field(default="train", metadata={"help": "split of the training images"})
    val_split: str = field(default="val", metadata={"help": "split that another image is ranked among"})
    most: int = field(default=3000, metadata={"help": "images of a split, drawn where there are more"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    recipe = Path(arguments.model) / "recipe.yaml"
    known = read_recipe(recipe) if recipe.is_file() else {}
    label_column = arguments.label_column or known.get("label_column")
    split_column = arguments.split_column or known.get("split_column")
    if not label_column or not split_column:
        raise SpcxrError(f"{recipe}: no such recipe with the columns; give --label-column and --split-column")
    model, processor = load_classifier(arguments.model)
    if model.config.model_type != "spcxr":
        raise SpcxrError(f"{arguments.model}: a model of the type {model.config.model_type}, not an SPCXR checkpoint")
    given = parse_classes(arguments.classes or known.get("classes") or [])
    classes = match_classes(arguments.model, label_names(model.config), given)
    multi_label = is_multi_label(model.config)
    table = read_set(arguments.data, arguments.exclude or known.get("exclude"))
    training, validation = (
        draw(select_rows(table, label_column, split_column, split, classes, multi_label), arguments.most)
        for split in (arguments.train_split, arguments.val_split)
    )
    embeddings, _ = predict_embeddings(model, processor, open_images(training.table), training.table.name)
    others, _ = predict_embeddings(model, processor, open_images(validation.table), validation.table.name)
    with atomic_file(Path(arguments.model) / FEATURE_STATISTICS) as path:
        save_file(fit_statistics(embeddings, training.targets, others), path)
    print(f"{len(training)} training images, {len(validation)} of {arguments.val_split}: {FEATURE_STATISTICS} written")


def draw(rows: LabelledRows, most: int) -> LabelledRows:
    """At most so many of the rows, drawn by a fixed seed."""
    kept = np.random.default_rng(0).permutation(len(rows)) < most
    return rows.where(kept)


if __name__ == "__main__":
    run_script(main)
