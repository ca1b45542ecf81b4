"""Fine-tune an encoder to tell classes apart, or to find labels that may hold together, named by a column of the set.

    accelerate launch training_scripts/finetune_classification.py \
        training_scripts/recipes/finetune_classification.yaml --init_from CHECKPOINT --data ../shared/data

Started again with the same command, it goes on from its newest checkpoint. `--from_scratch true` trains the same
network without pretraining, `--freeze_encoder true` the head alone, `--lora_rank 8` adapters in every linear layer of
the encoder and the head. `--model` puts another family in SPCXR's place: what AutoModelForImageClassification loads.
`--seeds 0 1 2` makes a run of each, in `output/seed-<n>`, and `output/results.json` with means and deviations.

The model is chosen on the rows `val`; `test` and `shift` are never read here: `evaluate.py` reports them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, ViTConfig

from spcxr_hf import SpcxrConfig, SpcxrError, SpcxrForImageClassification, SpcxrImageProcessor
from spcxr_hf.archives import read_set
from spcxr_hf.augment import Views, resize
from spcxr_hf.checkpoints import written_aside
from spcxr_hf.convert import change_image_size
from spcxr_hf.data import MicroBatch, RadiographSet, RadiographTable, StepPlan, decode_images, step_seed
from spcxr_hf.encoders import LOADING_ERRORS
from spcxr_hf.metrics import auroc, average_precision, write_results
from spcxr_hf.recipe import parse_arguments, save_recipe
from spcxr_hf.run import Run, RunArguments, learning_rate_schedule
from spcxr_hf.training import layerwise_groups, new_config, parameter_groups

RANKING = {"auroc": auroc, "average_precision": average_precision}  # means over the classes, each against the rest
METRICS = ("auroc", "average_precision", "balanced_accuracy", "accuracy", "loss")
MULTI_LABEL_METRICS = ("auroc", "average_precision", "loss")


@dataclass
class Arguments(RunArguments):
    """Fine-tune an encoder to classify radiographs."""

    label_column: str = field(
        default="label",
        metadata={"help": "column of the labels: one for each row (a list counts as normal, if empty, or abnormal); "
                  "with multi_label a list of those that hold, or a struct with a field for each"},
    )  # fmt: skip
    split_column: str = field(
        default="split", metadata={"help": "column of the splits; its rows train and val are read"}
    )
    classes: list[str] = field(
        default_factory=list,
        metadata={"help": "classes in their order, as `normal pneumonia=bacterial+viral`; rows of other labels are "
                  "left out. By default the labels of the rows train, sorted"},
    )  # fmt: skip
    multi_label: bool = field(default=False, metadata={"help": "labels may hold together, and null is a missing one"})
    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of another family's model, in place of init_from"}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "random weights; of `init_from` or `model` only the config is used"}
    )
    size: Literal["tiny", "small", "base"] = field(
        default="small", metadata={"help": "tiny, small or base: from scratch, where there is no init_from"}
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "train the head alone"})
    lora_rank: int = field(default=0, metadata={"help": "rank of the adapters that are trained with the head; 0: none"})
    lora_alpha: float = field(default=16.0, metadata={"help": "the adapters' output is scaled by this / lora_rank"})
    label_fraction: float = field(default=1.0, metadata={"help": "share of each class's training images that is used"})
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "a run for each, in output/seed-<n>; by default one run, of `seed`"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per optimiser step over all processes"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate of the head"})
    warmup_steps: int = field(default=50, metadata={"help": "steps of linear warm-up"})
    layer_decay: float = field(default=0.75, metadata={"help": "learning rate of a block relative to the one above it"})
    class_weights: str = field(default="none", metadata={"help": "none, or balanced: every class weighs the same"})
    sampling: str = field(default="natural", metadata={"help": "natural, or balanced: every class comes up as often"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of a target that goes to all classes alike"})
    mixup: float = field(default=0.0, metadata={"help": "alpha of mixup; 0: none"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha of CutMix; 0: none; with mixup, either half the time"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.4, 1.0], metadata={"help": "area of a crop, least and largest"}
    )
    flip: float = field(default=0.5, metadata={"help": "probability of a left-right flip"})
    brightness: float = field(default=0.2, metadata={"help": "largest shift of the grey values, on 0 .. 1"})
    contrast: float = field(default=0.4, metadata={"help": "largest relative change of the contrast"})
    blur: float = field(default=0.2, metadata={"help": "probability of a Gaussian blur"})
    metric: str = field(default="auroc", metadata={"help": f"what chooses the model on val: {', '.join(METRICS)}"})
    patience: int = field(
        default=0, metadata={"help": "end after so many checkpoints in a row that are no better on val; 0: never"}
    )
    save_every: int = field(default=100, metadata={"help": "steps between checkpoints, each with its figures on val"})
    log_every: int = field(default=10, metadata={"help": "steps between rows of the log"})
    final: str = field(default="best", metadata={"help": "what becomes output/final: best (by metric on val) or last"})


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Arguments, argv)
    check(arguments)
    runs = arguments_of_runs(arguments)
    results = [fine_tune(one, is_last=one is runs[-1]) for one in runs]
    if arguments.seeds:
        summarise(arguments, results)


def fine_tune(arguments: Arguments, is_last: bool) -> dict:
    """One run; what it measured on val."""
    run = Run(arguments)
    labels, training, validation = load_sets(arguments, run)
    model = build_model(arguments, labels)
    pixels = Pixels.of(arguments, model)
    run.start(model, groups(arguments, model))

    train(arguments, run, pixels, training, validation)
    result = describe(arguments, run, labels, training, validation)
    if run.is_main:
        finish(arguments, run, pixels, result)
    end(run, is_last)
    return result


# ---- the command line ------------------------------------------------------------------------------------------


def check(arguments: Arguments) -> None:
    """Refuse a command line that would fail late, or train something else than was meant."""
    if arguments.init_from is None and arguments.model is None and not arguments.from_scratch:
        raise SpcxrError("give --init_from CHECKPOINT, or --model FOLDER, or --from_scratch true")
    if arguments.cache == "none":
        raise SpcxrError("labels are kept with their images: cache must be memory or device")
    check_choices(arguments)
    check_ranges(arguments)
    for one, other in (("init_from", "model"), ("freeze_encoder", "lora_rank")):
        if getattr(arguments, one) and getattr(arguments, other):
            raise SpcxrError(f"{one} and {other} exclude each other")
    if arguments.class_weights == arguments.sampling == "balanced":
        raise SpcxrError("class_weights and sampling are both balanced: that would make up for rare classes twice")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise SpcxrError(f"a seed stands twice among the seeds {' '.join(map(str, arguments.seeds))}")


def check_choices(arguments: Arguments) -> None:
    choices = {
        "metric": MULTI_LABEL_METRICS if arguments.multi_label else METRICS,
        "class_weights": ("none", "balanced"),
        "sampling": ("natural", "balanced"),
        "final": ("best", "last"),
    }
    for name, allowed in choices.items():
        if (value := getattr(arguments, name)) not in allowed:
            raise SpcxrError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}; got {value!r}")


def check_ranges(arguments: Arguments) -> None:
    if not 0 < arguments.label_fraction <= 1:
        raise SpcxrError(f"label_fraction must lie in (0, 1]; got {arguments.label_fraction}")
    if not 0 <= arguments.label_smoothing < 1:
        raise SpcxrError(f"label_smoothing must lie in [0, 1); got {arguments.label_smoothing}")
    for name in ("mixup", "cutmix", "lora_rank", "patience"):
        if getattr(arguments, name) < 0:
            raise SpcxrError(f"{name} must be at least 0; got {getattr(arguments, name)}")
    if len(arguments.crop_scale) != 2:
        raise SpcxrError(f"crop_scale is the least and the largest area; got {arguments.crop_scale}")


def arguments_of_runs(arguments: Arguments) -> list[Arguments]:
    """The command line of each run: one for each seed, as it could be started by itself."""
    if not arguments.seeds:
        return [arguments]
    return [
        dataclasses.replace(arguments, seed=seed, seeds=[], output=str(Path(arguments.output) / f"seed-{seed}"))
        for seed in arguments.seeds
    ]


# ---- labels ----------------------------------------------------------------------------------------------------


def parse_classes(words: Sequence[str]) -> dict[str, list[str]]:
    """Class -> the labels that count as it, of words such as `normal` and `pneumonia=bacterial+viral`."""
    pairs = [word.partition("=") for word in words]
    classes = {name: labels.split("+") if labels else [name] for name, _, labels in pairs}
    if len(classes) < len(words):
        raise SpcxrError(f"a class stands twice among {' '.join(words)}")
    return classes


def names_in(cell: Any, multi_label: bool) -> list[str]:
    """The labels that one cell of the column names: those of a list, or the fields of a struct, with `multi_label`."""
    if cell is None:
        return []
    if multi_label and not isinstance(cell, list | dict):
        raise SpcxrError(f"multi_label needs lists or structs in the column of labels; it holds {cell!r}")
    if isinstance(cell, list) and not multi_label:
        return ["abnormal" if cell else "normal"]
    return [str(name) for name in cell] if multi_label else [str(cell)]


def targets_of(cell: Any, classes: dict[str, list[str]], multi_label: bool) -> list[float]:
    """1, 0 or NaN (not known) for each class."""
    if cell is None:
        return [math.nan] * len(classes)
    if isinstance(cell, dict):
        return [joined([cell.get(label) for label in labels]) for labels in classes.values()]
    names = names_in(cell, multi_label)
    targets = [float(any(label in names for label in labels)) for labels in classes.values()]
    return targets if multi_label or any(targets) else [math.nan] * len(classes)


def joined(values: list[Any]) -> float:
    """1 where one of these labels holds, NaN where one is not known, else 0."""
    return 1.0 if any(values) else math.nan if None in values else 0.0


def find_classes(arguments: Arguments, training: RadiographTable, validation: RadiographTable) -> dict[str, list[str]]:
    """The classes of the command line, or those of the data; the rows val hold no others.

    Raises:
        SpcxrError: there is one class only, or the rows val hold a label that the rows train do not.
    """
    column, multi_label = arguments.label_column, arguments.multi_label
    found, expected = (
        {name for cell in table.column(column) for name in names_in(cell, multi_label)}
        for table in (training, validation)
    )
    classes = parse_classes(arguments.classes or sorted(found))
    if not arguments.classes and expected - found:
        raise SpcxrError(
            f"{training.name}: no image of {', '.join(sorted(expected - found))}, which {column} of val holds"
        )
    if len(classes) < (1 if multi_label else 2):
        raise SpcxrError(f"{training.name}: {column} holds one class only: {', '.join(classes) or 'none at all'}")
    return classes


# ---- sets ------------------------------------------------------------------------------------------------------


def load_sets(arguments: Arguments, run: Run) -> tuple[list[str], RadiographSet, RadiographSet]:
    """The names of the classes, and the rows `train` and `val`, decoded, with their targets (n, classes)."""
    table = read_set(arguments.data)
    splits = [table.where(arguments.split_column, split) for split in ("train", "val")]
    classes = find_classes(arguments, splits[0], splits[1])
    with run.accelerator.main_process_first():  # the first writes the cache, the others read it
        training, validation = (load_set(arguments, split, classes) for split in splits)
    training = draw_labels(arguments, training, list(classes))
    measured = measure(torch.zeros(len(validation), len(classes)), validation.columns["targets"], arguments.multi_label)
    if math.isnan(measured[arguments.metric]):
        raise SpcxrError(f"{splits[1].name}: {arguments.metric} is not defined on it, since no class has both sides")
    training = training.to(run.accelerator.device) if arguments.cache == "device" else training
    return list(classes), balanced(training) if arguments.sampling == "balanced" else training, validation


def load_set(arguments: Arguments, table: RadiographTable, classes: dict[str, list[str]]) -> RadiographSet:
    """Decode the images of a split that have a label."""
    cells = table.column(arguments.label_column)
    targets = torch.tensor([targets_of(cell, classes, arguments.multi_label) for cell in cells])
    known = ~targets.isnan().all(dim=1)
    if not known.any():
        raise SpcxrError(f"{table.name}: no row has a label in {arguments.label_column} that is one of the classes")
    kept = RadiographTable(table.rows.filter(pa.array(known.tolist())), table.name)
    images = decode_images(kept, arguments.stored_size, arguments.cache_folder)
    return RadiographSet(images, kept.ids, {"targets": targets[known]})


def draw_labels(arguments: Arguments, training: RadiographSet, classes: list[str]) -> RadiographSet:
    """The share of the images that the run may learn from: as large of each class, drawn by the seed.

    Raises:
        SpcxrError: a class is left without images, or a batch is larger than what is left.
    """
    if arguments.label_fraction < 1:
        training = select(training, draw_rows(training.columns["targets"], arguments.label_fraction, arguments.seed))
    counts = (training.columns["targets"] == 1).sum(dim=0).tolist()
    without = [name for name, count in zip(classes, counts, strict=True) if not count]
    if without:
        why = (
            f"label_fraction {arguments.label_fraction} leaves"
            if arguments.label_fraction < 1
            else "the rows train have"
        )
        raise SpcxrError(f"{arguments.data}: {why} no images of {', '.join(without)}")
    if arguments.batch_size > len(training):
        raise SpcxrError(f"a batch of {arguments.batch_size} is larger than the set of {len(training)} images")
    return training


def select(images: RadiographSet, rows: torch.Tensor) -> RadiographSet:
    """These rows of a set."""
    columns = {name: values[rows] for name, values in images.columns.items()}
    return RadiographSet(images.images[rows], [images.ids[row] for row in rows.tolist()], columns)


def strata(targets: torch.Tensor) -> torch.Tensor:
    """The class (n,) that each row (n, classes) counts as: its rarest, or the number of classes where it has none."""
    positive = targets == 1
    counts = positive.sum(dim=0).expand_as(positive)
    rarest = torch.where(positive, counts, torch.iinfo(counts.dtype).max).argmin(dim=1)
    return torch.where(positive.any(dim=1), rarest, targets.shape[1])


def draw_rows(targets: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Row numbers, rising: `fraction` of each class, rounded."""
    generator = np.random.default_rng(seed)
    groups = strata(targets).numpy()
    drawn = [
        generator.permutation(rows)[: round(fraction * len(rows))]
        for rows in (np.flatnonzero(groups == group) for group in np.unique(groups))
    ]
    return torch.from_numpy(np.sort(np.concatenate(drawn)))


def balanced(images: RadiographSet) -> BalancedSet:
    """The same set, sampled in the balanced way."""
    return BalancedSet(images.images, images.ids, images.columns)


@dataclass
class BalancedSet(RadiographSet):
    """A set whose classes take turns: a batch holds as many of each, to within one.

    Within a class no image comes again before all have come. Image number i of the run (batches one behind another) is
    of class i mod the number of classes, so that a resumed run needs no other state.
    """

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        of_class = strata(self.columns["targets"].cpu())
        members = [torch.nonzero(of_class == number).flatten() for number in of_class.unique()]

        @functools.lru_cache(maxsize=2 * len(members))
        def order(number: int, epoch: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step_seed(plan.seed, -1 - epoch, number))
            return members[number][torch.randperm(len(members[number]), generator=generator)]

        def row(image: int) -> int:
            turn, number = divmod(image, len(members))
            epoch, place = divmod(turn, len(members[number]))
            return int(order(number, epoch)[place])

        for step in range(first_step, last_step):
            rows = torch.tensor([row(step * plan.batch_size + slot) for slot in range(plan.batch_size)])
            lanes = rows.split(plan.lane_size)
            yield [self._micro_batch(lanes[lane], step_seed(plan.seed, step, lane)) for lane in plan.own_lanes]


# ---- models ----------------------------------------------------------------------------------------------------


def build_model(arguments: Arguments, labels: list[str]) -> PreTrainedModel:
    """The pretrained encoder, or a new one, under a new head, with what is not to be trained frozen."""
    torch.manual_seed(arguments.seed)
    values: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "multi_label_classification" if arguments.multi_label else "single_label_classification",
    }
    model = build_own(arguments, values) if arguments.model is None else build_other(arguments, arguments.model, values)
    attend_by(model, arguments.attention)
    restrict(arguments, model)
    return set_training(arguments, model)


def build_own(arguments: Arguments, values: dict[str, Any]) -> PreTrainedModel:
    """SPCXR, at this run's image size."""
    values["drop_path_rate"] = arguments.drop_path_rate
    if arguments.init_from is None:
        return SpcxrForImageClassification(new_config(arguments.size, image_size=arguments.image_size, **values))
    config = load_config(arguments.init_from)
    if config.model_type != SpcxrConfig.model_type:
        raise SpcxrError(f"{arguments.init_from}: a model of type {config.model_type}, not spcxr; give it as --model")
    if arguments.from_scratch:
        values["image_size"] = arguments.image_size
        return SpcxrForImageClassification(SpcxrConfig.from_pretrained(arguments.init_from, **values))
    model = load_weights(SpcxrForImageClassification, arguments.init_from, **values)
    change_image_size(cast(SpcxrForImageClassification, model), arguments.image_size)
    return model


def build_other(arguments: Arguments, source: str, values: dict[str, Any]) -> PreTrainedModel:
    """A model of another family; one of this family is trained as `init_from` trains it."""
    config = load_config(source)
    if config.model_type == SpcxrConfig.model_type:
        return build_own(dataclasses.replace(arguments, init_from=source, model=None), values)
    if config.model_type == "vit_mae":  # a ViT: its encoder is fine-tuned under a ViT's classifier (arXiv 2111.06377)
        shared = ViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        config = ViTConfig(**{name: value for name, value in config.to_dict().items() if name in shared})
    if hasattr(config, "drop_path_rate"):
        values["drop_path_rate"] = arguments.drop_path_rate
    if arguments.from_scratch and hasattr(config, "image_size"):
        values["image_size"] = arguments.image_size
    config.update(values)
    model = load_other(arguments, source, config)
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):  # pretraining's alone: processes that share gradients would wait for its
            parameter.requires_grad_(False)
    # Checkpoints keep the names that the module has; the library would write those of its former releases.
    cast(Any, model).save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def load_other(arguments: Arguments, source: str, config: Any) -> PreTrainedModel:
    if not arguments.from_scratch:
        return load_weights(AutoModelForImageClassification, source, config=config)
    try:
        return AutoModelForImageClassification.from_config(config)
    except LOADING_ERRORS as error:
        raise SpcxrError(f"{source}: no classifier can be made of it ({one_line(error)})") from error


def load_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise SpcxrError(f"{source}: no model that transformers loads ({one_line(error)})") from error


def load_weights(model_class: Any, source: str, **values: Any) -> PreTrainedModel:
    """The checkpoint's encoder in float32; a head of another number of classes is left aside.

    Raises:
        SpcxrError: it cannot be loaded, or holds no weights for a part of the encoder.
    """
    try:
        model, loading = model_class.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,  # a pickle can run code
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **values,
        )
    except LOADING_ERRORS as error:
        raise SpcxrError(f"{source}: no classifier can be made of it ({one_line(error)})") from error
    encoder = {name for name in loading["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")}
    lost = sorted(name for name in encoder if not name.endswith("mask_token"))
    if lost:
        raise SpcxrError(f"{source}: no weights for {len(lost)} parameters of the encoder, {lost[0]} among them")
    return model


def attend_by(model: PreTrainedModel, implementation: str) -> None:
    """Choose the attention implementation; eager where a family has no fused one."""
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        if implementation != "sdpa":
            raise SpcxrError(f"attention {implementation!r} is refused ({one_line(error)})") from error
        model.set_attn_implementation("eager")


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]} ..."


def restrict(arguments: Arguments, model: PreTrainedModel) -> None:
    """Freeze the encoder, or put adapters into it, where the command line says so."""
    if not arguments.freeze_encoder and not arguments.lora_rank:
        return
    in_encoder = {id(parameter) for parameter in model.base_model.parameters()}
    head = [parameter for parameter in model.parameters() if id(parameter) not in in_encoder]
    if not head:
        raise SpcxrError(f"{type(model).__name__} has no head apart from its encoder: nothing would be trained")
    model.base_model.requires_grad_(False)
    if arguments.lora_rank:
        add_adapters(arguments, model)
    for parameter in head:
        parameter.requires_grad_(True)


def add_adapters(arguments: Arguments, model: PreTrainedModel) -> None:
    """LoRA (arXiv 2106.09685) in every linear layer of the encoder, as QLoRA (arXiv 2305.14314) found it best."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SpcxrError('peft is missing: pip install "spcxr-hf[train]"') from error
    names = [
        f"{model.base_model_prefix}.{name}"
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not names:
        raise SpcxrError(f"{type(model).__name__} has no linear layer in its encoder to adapt")
    config = LoraConfig(r=arguments.lora_rank, lora_alpha=cast(int, arguments.lora_alpha), target_modules=names)
    inject_adapter_in_model(config, model)  # in place, and the model stays of its class


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter to the weight that it adapts, and leave plain layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def set_training(arguments: Arguments, model: PreTrainedModel) -> PreTrainedModel:
    """Training mode; a frozen encoder stays in evaluation mode, so that no running mean of it moves either."""
    model.train()
    if arguments.freeze_encoder:
        model.base_model.eval()
    return model


def groups(arguments: Arguments, model: PreTrainedModel) -> list[dict]:
    """AdamW's parameter groups, with layer-wise decay where the blocks are `layer(s).<n>` or `encoder.layer(s).<n>`."""
    blocks = re.compile(rf"^{model.base_model_prefix}\.(?:encoder\.)?layers?\.(\d+)\.")
    if not any(blocks.search(name) for name, _ in model.named_parameters()):
        return parameter_groups(model)
    return layerwise_groups(cast(Any, Renamed(model, blocks)), arguments.layer_decay)


@dataclass
class Renamed:
    """A model as `layerwise_groups` reads it, its blocks called as SPCXR's are."""

    model: PreTrainedModel
    blocks: re.Pattern

    @property
    def config(self) -> Any:
        return self.model.config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield self.blocks.sub(r"encoder.layers.\1.", name), parameter


# ---- pixels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """What a model sees of a grey image.

    Attributes:
        size: Side of the input in pixels.
        mean, std: (channels, 1, 1), on the scale of 0 to 1; those of the model's own image processor.
        options: What its forward takes besides.
    """

    size: int
    mean: torch.Tensor
    std: torch.Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, arguments: Arguments, model: PreTrainedModel) -> Pixels:
        """Those of a model, by the image processor that lies beside its checkpoint, or else SPCXR's."""
        processor = load_processor(arguments.init_from or arguments.model)
        channels = getattr(model.config, "num_channels", 3)
        mean, std = (
            torch.as_tensor(values).float().flatten() for values in (processor.image_mean, processor.image_std)
        )
        if not {len(mean), len(std)} <= {1, channels}:
            raise SpcxrError(f"the image processor normalises {len(mean)} channels, the model takes {channels}")
        interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        options = {"interpolate_pos_encoding": True} if interpolates else {}
        mean, std = (values.expand(channels).reshape(-1, 1, 1) for values in (mean, std))
        return cls(arguments.image_size, mean, std, options)

    def normalise(self, grey: torch.Tensor) -> torch.Tensor:
        """(B, 1, S, S) in 0 .. 1 -> (B, channels, S, S)."""
        return (grey - self.mean.to(grey.device)) / self.std.to(grey.device)

    def processor(self) -> SpcxrImageProcessor:
        """The image processor that makes the same of any picture."""
        size = {"height": self.size, "width": self.size}
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return SpcxrImageProcessor(size=size, image_mean=mean, image_std=std, num_output_channels=len(mean))


def load_processor(source: str | None) -> Any:
    """The checkpoint's image processor; SPCXR's where there is none, or it does not normalise by numbers."""
    if source is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(source)
            return processor if getattr(processor, "image_mean", None) is not None else SpcxrImageProcessor()
        except LOADING_ERRORS:
            pass
    return SpcxrImageProcessor()


def augmentation(arguments: Arguments) -> Views:
    return Views(
        size=arguments.image_size,
        scale=(arguments.crop_scale[0], arguments.crop_scale[1]),
        flip=arguments.flip,
        brightness=arguments.brightness,
        contrast=arguments.contrast,
        blur=arguments.blur,
    )


def draw_views(
    arguments: Arguments, pixels: Pixels, micro_batch: MicroBatch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views of these images, mixed or not: pixel_values (B, C, S, S) and targets (B, classes)."""
    generator = torch.Generator(micro_batch.images.device).manual_seed(micro_batch.seed)
    views = pixels.normalise(augmentation(arguments)(micro_batch.images, generator))
    views, targets = mix(views, micro_batch.columns["targets"], arguments.mixup, arguments.cutmix, micro_batch.seed)
    return views.to(device), targets.to(device)


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup: float, cutmix: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899): every image with another of its micro-batch.

    Args:
        images: (B, C, S, S).
        targets: (B, classes); a label that either of two images lacks is missing (NaN) from both.
        mixup, cutmix: The alpha of each, 0 for none; with both, either has half of the micro-batches.
        seed: The draws follow from it.
    """
    drawn = np.random.default_rng(seed)
    cut = cutmix > 0 and (mixup == 0 or drawn.random() < 0.5)
    alpha = cutmix if cut else mixup
    if not alpha:
        return images, targets
    share = float(drawn.beta(alpha, alpha))
    partners = torch.from_numpy(drawn.permutation(len(images))).to(images.device)
    if cut:
        images, share = paste(images, images[partners], share, drawn)
    else:
        images = share * images + (1 - share) * images[partners]
    return images, share * targets + (1 - share) * targets[partners]


def paste(
    images: torch.Tensor, others: torch.Tensor, share: float, drawn: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Images (B, C, H, W) with a box of the others, about 1 - share of the area, and the share that they keep."""
    spans = []
    for side in images.shape[-2:]:
        length, centre = side * math.sqrt(1 - share), drawn.uniform(0, side)
        spans.append(slice(max(0, round(centre - length / 2)), min(side, round(centre + length / 2))))
    rows, columns = spans
    images = images.clone()
    images[..., rows, columns] = others[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return images, 1 - area / (images.shape[-2] * images.shape[-1])


# ---- training --------------------------------------------------------------------------------------------------


def train(arguments: Arguments, run: Run, pixels: Pixels, training: RadiographSet, validation: RadiographSet) -> None:
    """The loop: view, classify, step; now and then a checkpoint with its figures on val."""
    learning_rate = learning_rate_schedule(arguments)
    weights = class_weights(arguments, training.columns["targets"]).to(run.accelerator.device)
    columns = [f"val_{name}" for name in (MULTI_LABEL_METRICS if arguments.multi_label else METRICS)]
    for step, micro_batches in run.steps(training):
        for micro_batch in micro_batches:
            pixel_values, targets = draw_views(arguments, pixels, micro_batch, run.accelerator.device)
            with run.forward(micro_batch) as model:
                logits = model(pixel_values, **pixels.options).logits
            run.backward(
                classification_loss(logits, targets, arguments.multi_label, weights, arguments.label_smoothing)
            )
        run.update(learning_rate(step), arguments.weight_decay)
        run.scores = dict.fromkeys(columns, "")
        if run.is_due:
            validate(arguments, run, pixels, validation)
            if run.is_main:
                run.draw_curves({"loss": "loss", "loss on val": "val_loss", "AUROC on val": "val_auroc"})


def class_weights(arguments: Arguments, targets: torch.Tensor) -> torch.Tensor:
    """What each class weighs, (classes,): images / (classes * images of it); of labels, what a positive weighs.

    That is negatives / positives, so that both sides of a label weigh the same.
    """
    positives, known = (targets == 1).sum(dim=0), (~targets.isnan()).sum(dim=0)
    if arguments.class_weights == "none":
        return torch.ones(targets.shape[1])
    if arguments.multi_label:
        return (known - positives) / positives
    return known / (len(positives) * positives)


def classification_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    multi_label: bool,
    weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy with softmax, or of every label with sigmoid.

    Args:
        logits: (B, classes).
        targets: (B, classes) in 0 .. 1; of classes that exclude each other the rows sum to 1; of labels NaN is a
            missing one, which takes no part.
        multi_label: Whether labels may hold together.
        weights: (classes,) of each class, or of each label's positives.
        label_smoothing: Share of a target that is spread over all classes (arXiv 1512.00567, section 7).

    Returns:
        The mean over the images, or over the labels that are known; 0 where none is.
    """
    logits = logits.float()
    if not multi_label:  # the mean is over the images, not over their weights: as large on any share of a batch
        return nn.functional.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing)
    known = ~targets.isnan()
    wanted = torch.where(known, targets * (1 - label_smoothing) + label_smoothing / 2, 0.0)
    each = nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weights, reduction="none")
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def validate(arguments: Arguments, run: Run, pixels: Pixels, validation: RadiographSet) -> None:
    """Measure the model on val, and keep it if it is the best so far."""
    logits = predict(arguments, run, pixels, validation.images)
    figures = measure(logits, validation.columns["targets"], arguments.multi_label)
    sign = -1 if arguments.metric == "loss" else 1  # the engine's best is the highest
    run.keep_best(f"val_{arguments.metric}", sign * figures[arguments.metric], arguments.patience)
    run.scores = {f"val_{name}": "" if math.isnan(value) else round(value, 5) for name, value in figures.items()}
    if arguments.final == "last" or run.state.get("best_step") == run.state["step"] + 1:
        run.state["figures"] = figures
        run.state["figures_step"] = run.state["step"] + 1


@torch.no_grad()
def predict(arguments: Arguments, run: Run, pixels: Pixels, images: torch.Tensor) -> torch.Tensor:
    """Logits (n, classes) of stored images (n, 1, H, W); every process predicts its share of them."""
    parts = images.split(run.plan.lane_size)
    logits = []
    with run.averaged() as model:
        model.eval()
        for part in parts[run.plan.process :: run.plan.processes]:
            pixel_values = pixels.normalise(resize(part.float() / 255, pixels.size)).to(run.accelerator.device)
            with run.accelerator.autocast():
                logits.append(model(pixel_values, **pixels.options).logits.float().cpu())
        set_training(arguments, model)
    return torch.cat(run.collect(logits))


def measure(logits: torch.Tensor, targets: torch.Tensor, multi_label: bool) -> dict[str, float]:
    """The figures of METRICS, or of MULTI_LABEL_METRICS; NaN where one is not defined.

    AUROC and average precision are means over the classes that have both sides, each class against the rest.
    """
    probabilities = logits.sigmoid() if multi_label else logits.softmax(dim=1)
    figures = {}
    for name, figure in RANKING.items():
        each = [figure(p, y) for p, y in zip(probabilities.T, targets.T, strict=True)]
        defined = [value for value in each if not math.isnan(value)]
        figures[name] = float(np.mean(defined)) if defined else math.nan
    if not multi_label:
        truth = targets.argmax(dim=1)
        hits = (logits.argmax(dim=1) == truth).double()
        recalls = [hits[truth == number].mean() for number in truth.unique()]
        figures["balanced_accuracy"] = torch.stack(recalls).mean().item()
        figures["accuracy"] = hits.mean().item()
    figures["loss"] = classification_loss(logits, targets, multi_label).item()
    return figures


# ---- the end ---------------------------------------------------------------------------------------------------


def describe(
    arguments: Arguments, run: Run, labels: list[str], training: RadiographSet, validation: RadiographSet
) -> dict:
    """What a run learned from and what its final model reached on val."""
    counts = (training.columns["targets"] == 1).sum(dim=0).tolist()
    return {
        "seed": arguments.seed,
        "label_fraction": arguments.label_fraction,
        "images": {"train": len(training), "val": len(validation)},
        "train_images_by_class": dict(zip(labels, counts, strict=True)),
        "metric": arguments.metric,
        "step": run.state["figures_step"],
        "val": run.state["figures"],
    }


def finish(arguments: Arguments, run: Run, pixels: Pixels, result: dict) -> None:
    """Write the best (or the last) model, with its image processor and recipe, into `output/final`, and its figures."""
    with run.averaged() as model, written_aside(run.output / "final") as folder:
        if arguments.final == "best":
            model.load_state_dict(load_file(run.output / "best" / "model.safetensors", device="cpu"))
        if arguments.lora_rank:
            merge_adapters(model)
        attend_by(model.eval(), "sdpa")
        type(model).save_pretrained(model, folder)  # in the library's own form, not the checkpoints'
        pixels.processor().save_pretrained(folder)
        save_recipe(arguments, folder / "recipe.yaml")
    write_results(run.output / "results.json", result)
    run.report("Classification")
    print(f"saved {run.output / 'final'}")


def end(run: Run, is_last: bool) -> None:
    """Let the trackers finish; the processes stay together until the last run is done."""
    run.accelerator.wait_for_everyone()
    if is_last:
        run.end()
        return
    for tracker in run.accelerator.trackers:
        tracker.finish()
    run.accelerator.free_memory()


def summarise(arguments: Arguments, results: list[dict]) -> None:
    """Write mean and standard deviation (n - 1) over the seeds to `output/results.json`."""
    values = {name: np.array([result["val"][name] for result in results]) for name in results[0]["val"]}
    summary = {name: results[0][name] for name in ("metric", "label_fraction", "images")}
    summary["val"] = {
        name: {"mean": each.mean(), "sd": each.std(ddof=1) if len(each) > 1 else math.nan}
        for name, each in values.items()
    }
    summary["seeds"] = {str(result["seed"]): result for result in results}
    write_results(Path(arguments.output) / "results.json", summary)


if __name__ == "__main__":
    try:
        main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
