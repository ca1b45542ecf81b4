"""Command lines of the scripts: a typed dataclass plus a YAML recipe, `script.py recipe.yaml --learning-rate 1e-3`.

Here are also the flags that several training scripts share.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import torch
import yaml
from accelerate import Accelerator, DistributedType
from transformers import HfArgumentParser

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.files import atomic_file, check_regular_file, os_errors
from spcxr_hf.training.checkpoints import list_checkpoints
from spcxr_hf.training.launch import find_recipe
from spcxr_hf.training.optim import CosineSchedule

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments")

MAX_RECIPE_BYTES = 1_000_000
FIRST_TO_SAY = 10.0  # seconds that the other processes of a machine give the first to report the same error
# accelerate's launch modes in which every process holds the whole model, or `--fsdp` divides it.
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Flags that may change between the starts of one run. (A stream has another order of images than a set in memory; where
# in memory it is kept makes no difference.)
NEUTRAL = {"data", "output", "cache_folder", "workers", "compile", "save_every", "keep_checkpoints", "allow_other_data"}
NEUTRAL |= {"log_every", "max_nonfinite_steps", "trackers", "push_to_hub"}
# Flags of other libraries -> ours, for "did you mean": the names alone are too far apart.
SYNONYMS = {
    "learning_rate": ("lr", "base_lr", "peak_lr", "blr"),
    "steps": ("epochs", "num_epochs", "num_train_epochs", "max_steps", "max_epochs", "iterations"),
    "warmup_steps": ("warmup", "warmup_epochs", "warmup_ratio"),
    "batch_size": ("bs", "train_batch_size", "per_device_train_batch_size", "global_batch_size"),
    "micro_batch_size": ("gradient_accumulation_steps", "accumulate_grad_batches", "accum_iter", "device_batch_size"),
    "init_from": ("model", "checkpoint", "pretrained", "model_name_or_path", "weights", "resume_from", "finetune"),
    "model": ("init_from", "checkpoint", "model_name_or_path", "weights"),
    "output": ("output_dir", "out", "out_dir", "save_dir", "work_dir"),
    "data": ("dataset", "data_dir", "data_path", "train_dir", "dataset_name", "input"),
    "label_column": ("label", "labels", "target", "targets"),
    "split_column": ("split",),
    "weight_decay": ("wd",),
    "max_grad_norm": ("clip_grad", "grad_clip", "gradient_clip_val"),
    "mixed_precision": ("fp16", "bf16", "amp", "dtype", "precision"),
    "image_size": ("img_size", "size", "resolution", "input_size"),
    "drop_path_rate": ("drop_path", "stochastic_depth"),
    "ema_decay": ("ema", "model_ema_decay"),
    "lora_rank": ("lora", "lora_r"),
    "save_every": ("save_steps", "eval_steps", "checkpoint_every"),
    "log_every": ("logging_steps", "print_freq"),
    "trackers": ("report_to", "log_with", "wandb", "tensorboard"),
    "push_to_hub": ("hub_model_id", "hub_id"),
    "workers": ("num_workers", "dataloader_num_workers", "n_jobs"),
    "patience": ("early_stopping_patience", "early_stopping"),
    "attention": ("attn_implementation", "attn"),
    "fsdp": ("shard",),
}


def flag(default: Any = dataclasses.MISSING, help_text: str = "") -> Any:
    """A field of an arguments class: its default (without one the flag is required) and its help text."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help_text})
    return dataclasses.field(default=default, metadata={"help": help_text})


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Parse a command line: an optional recipe (a file, or a name of `spcxr recipes`), then flags, which win over it.

    The recipe's values go through the same parser as the flags, so both are typed and refused alike. Where `--steps`
    makes a run shorter than its recipe (or the default), the warm-up shrinks in proportion, unless it is given too.

    Args:
        arguments_class: A dataclass; its fields are the flags, their metadata's "help" the help text.
        argv: The words of the command line without the program's name; those of the process by default.

    Raises:
        SpcxrError: the recipe cannot be read, or has a key that is no field; the message names both.
        SystemExit: a flag is unknown or its value of the wrong type, as in every command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(cast(Any, arguments_class), description=(arguments_class.__doc__ or "").strip())
    parser.usage = "%(prog)s [RECIPE] [--flag value ...]"
    for action in parser._actions:  # shown with hyphens; underscores are accepted too
        action.option_strings = [one for one in action.option_strings if "_" not in one] or action.option_strings
    recipe: list[str] = []
    if words and not words[0].startswith("-"):
        script = Path(inspect.getfile(arguments_class)).stem
        recipe = _recipe_words(arguments_class, find_recipe(words.pop(0), script))
    # The recipe's flags go first: of two equal flags, argparse keeps the last.
    arguments, unknown = parser.parse_args_into_dataclasses([*recipe, *words], return_remaining_strings=True)
    if unknown:  # their values are not repeated: they may be secrets
        known = [field.name for field in dataclasses.fields(cast(Any, arguments_class))]
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        named = ", ".join(flag + _meant(flag, known, "--") for flag in flags)
        parser.error(f"unrecognized arguments: {named or unknown[0]}")
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    if "steps" in given and "warmup_steps" not in given and hasattr(arguments, "warmup_steps"):
        defaults = {one.name: one.default for one in dataclasses.fields(cast(Any, arguments_class))}
        of_recipe = next((int(word[8:]) for word in recipe if word.startswith("--steps=")), defaults["steps"])
        scaled = round(arguments.warmup_steps * arguments.steps / of_recipe)
        if scaled < arguments.warmup_steps:
            if os.environ.get("RANK", "0") == "0":
                print(f"warmup_steps {arguments.warmup_steps} -> {scaled}, in proportion to steps {of_recipe} -> "
                      f"{arguments.steps}; --warmup-steps N overrides it", file=sys.stderr)  # fmt: skip
            arguments.warmup_steps = scaled
    return arguments


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        _let_the_first_say_it()
        super().error(message)


def _let_the_first_say_it() -> None:
    """Wait, in any process but a machine's first: where that one fails too, the launcher ends this one meanwhile."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(FIRST_TO_SAY)


def _meant(name: str, known: Sequence[str], dashes: str = "") -> str:
    """The flag that was meant, in brackets: by its meaning in other libraries, or a similar name."""
    bare = name.removeprefix(dashes).replace("-", "_").lower()
    near = [flag for flag, others in SYNONYMS.items() if bare in others and flag in known]
    near = near or difflib.get_close_matches(bare, known, n=1)
    shown = near and (near[0].replace("_", "-") if dashes else near[0])
    return f" (did you mean {dashes}{shown}?)" if near else ""


def _recipe_words(arguments_class: type, path: Path) -> list[str]:
    known = [field.name for field in dataclasses.fields(arguments_class)]
    words: list[str] = []
    for key, value in read_recipe(path).items():
        if key not in known:
            meant = _meant(str(key), known)
            raise SpcxrError(f"{path}: unknown key {key!r}{meant}; known keys: {', '.join(sorted(known))}")
        if value is None or value == []:  # no flag says so; it is what these fields are by default
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) or str(item).startswith("--") for item in items):
            raise SpcxrError(f"{path}: {key} must be one value or a list of values; got {one_line(str(value))}")
        words += [f"--{key}", *map(str, items)] if isinstance(value, list) else [f"--{key}={value}"]
    return words


class _RecipeLoader(yaml.SafeLoader):
    """YAML without aliases: a few hundred bytes of nested ones can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe.

    Raises:
        SpcxrError: the file is missing, above 1 MB, not YAML, uses aliases, or is no mapping; the message names it.
    """
    try:
        check_regular_file(path, MAX_RECIPE_BYTES)
        values = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)  # noqa: S506 - it is a SafeLoader
    except SpcxrError as error:
        raise SpcxrError(f"{path}: cannot be read ({str(error).removeprefix(f'{path}: ')})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: cannot be read ({one_line(error)})") from error
    # PyYAML lets through what Python raises for a value: a 13th month, a number of 5,000 digits, 1,000 brackets.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise SpcxrError(f"{path}: not valid YAML ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise SpcxrError(f"{path}: a recipe holds `key: value` lines; found {type(values).__name__}")
    return values


def save_recipe(arguments: Any, path: Path) -> None:
    """Write the resolved values of a dataclass as a recipe that gives them back."""
    with atomic_file(path) as partial:
        partial.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False), encoding="utf-8")


def fill_from_recipe(arguments: Any, recipe: Path, **otherwise: Any) -> None:
    """Fill empty flags, in place, from the recipe beside a trained model, if there is one, or else from `otherwise`."""
    known = read_recipe(recipe) if recipe.is_file() else {}
    for name, value in otherwise.items():
        setattr(arguments, name, getattr(arguments, name) or known.get(name) or value)


def run_script(main: Callable[[], object]) -> None:
    """Run the `main` of a script: errors of the input end it with one line, Ctrl-C with status 130.

    Of several processes that fail alike, one prints the line.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as scripts have it while they import
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
    except SpcxrError as error:
        _let_the_first_say_it()
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("stopped; run the same command to resume from what was saved", file=sys.stderr)
        raise SystemExit(130) from None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if isinstance(status, int):
        raise SystemExit(status)


def check_values(
    arguments: Any, choices: Mapping[str, Sequence[str]] | None = None, ranges: Mapping[str, str] | None = None
) -> None:
    """Refuse values of flags that are not among the choices, or out of range; None passes.

    `choices` maps a flag to its values, `ranges` to an interval, as "[0, 1)" or "[1, inf)", for every item of a list.
    """
    for name, allowed in (choices or {}).items():
        if (value := getattr(arguments, name)) is not None and value not in allowed:
            raise SpcxrError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}; got {value!r}")
    for name, interval in (ranges or {}).items():
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        value = getattr(arguments, name)
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            above = item >= low if interval[0] == "[" else item > low
            below = item <= high if interval[-1] == "]" else item < high
            if not (above and below):
                bound = f"be {'at least' if interval[0] == '[' else 'above'} {low:g}"
                said = bound if high == math.inf else f"lie in {interval}"
                raise SpcxrError(f"{name} must {said}; got {item}")


# ---- flags of training scripts ---------------------------------------------------------------------------------


@dataclass
class RunArguments:
    """Flags of every training script."""

    data: str = flag(help_text="Parquet shards, or a folder of images")
    output: str = flag(help_text="folder for checkpoints, figures and the log")
    cache: str = flag(
        "memory", "where decoded images are kept: memory or device (pretraining also: none, read on the way)"
    )
    cache_folder: str | None = flag(None, "folder that keeps the decoded images between starts")
    stored_size: int = flag(256, "images are kept at this size, in pixels")
    image_size: int = flag(224, "side of the input in pixels, a multiple of 16")
    init_from: str | None = flag(None, "checkpoint to start from, of any task and image size")
    attention: str = flag("sdpa", "attention implementation; eager is faster on a CPU below 224 px")
    drop_path_rate: float = flag(0.1, "stochastic depth of the last block")
    steps: int = flag(1000, "optimiser steps: epochs x images / batch size")
    batch_size: int = flag(64, "images per optimiser step over all processes")
    micro_batch_size: int = flag(32, "images per forward pass; batch_size / this is a multiple of the processes")
    learning_rate: float = flag(5e-4, "peak learning rate; it falls along a cosine to at most 1e-6")
    warmup_steps: int = flag(100, "steps of linear warm-up")
    weight_decay: float = flag(0.05, "weight decay of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    ema_decay: float = flag(0.0, "decay of the weights' moving average, which becomes the final model; 0: none")
    mixed_precision: str = flag("no", "no, bf16 (float32 on a CPU without fast bf16) or fp16")
    fsdp: bool = flag(False, "divide weights, gradients and optimiser state among the processes (FSDP)")
    compile: bool = flag(False, "torch.compile the model")
    deterministic: bool = flag(False, "torch.use_deterministic_algorithms")
    save_every: int = flag(500, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "number of checkpoints to keep")
    log_every: int = flag(20, "steps between rows of the log")
    max_nonfinite_steps: int = flag(10, "stop after this many steps in a row with a non-finite loss or gradient")
    trackers: list[str] = flag([], "experiment trackers: tensorboard, trackio, wandb, ...")
    push_to_hub: str | None = flag(None, "id of a Hub repository that gets every checkpoint, in the background")
    allow_other_data: bool = flag(False, "resume from checkpoints although rows or labels have changed since")
    seed: int = flag(0, "seed of everything random")


@dataclass
class PretrainingArguments(RunArguments):
    """Flags of the pretraining scripts."""

    splits: list[str] = flag([], "learn from these values of split_column: `--splits train`")
    split_column: str = flag("split", "column of the splits, with --splits")
    pretrain_only: bool = flag(True, "without splits: only rows whose column `pretrain` is true")
    size: str = flag("small", "tiny, small or base")
    workers: int = flag(2, "processes that read images, with --cache none")
    decay_steps: int | None = flag(None, "length of the cosine at the end; by default all steps after the warm-up")
    adam_beta2: float = flag(0.999, "second beta of AdamW")
    weight_decay: float = flag(0.04, "weight decay at the start")
    final_weight_decay: float = flag(0.4, "weight decay at the end of its cosine")
    max_grad_norm: float = flag(3.0, "gradients are clipped to this norm")


@dataclass
class FineTuningArguments(RunArguments):
    """Flags of the fine-tuning scripts."""

    from_scratch: bool = flag(False, "random weights; of `init_from` only the config is used")
    size: Literal["tiny", "small", "base"] = flag("small", "tiny, small or base: from scratch, without init_from")
    layer_decay: float = flag(0.75, "learning rate of a block relative to the one above it")
    patience: int = flag(0, "stop after this many checkpoints in a row without a better metric on val; 0: never")
    batch_size: int = flag(32, "images per optimiser step over all processes")
    learning_rate: float = flag(5e-4, "peak learning rate of the head; it falls along a cosine to at most 1e-6")
    warmup_steps: int = flag(50, "steps of linear warm-up")
    save_every: int = flag(100, "steps between checkpoints, each measured on val")
    log_every: int = flag(10, "steps between rows of the log")


def check_run(arguments: RunArguments) -> None:
    """Refuse a command line that would fail late."""
    check_values(
        arguments,
        {"cache": ("none", "memory", "device"), "mixed_precision": ("no", "bf16", "fp16")},
        dict.fromkeys(("steps", "save_every", "log_every", "keep_checkpoints", "max_nonfinite_steps"), "[1, inf)")
        | dict.fromkeys(("warmup_steps", "learning_rate", "weight_decay"), "[0, inf)")
        | {"ema_decay": "[0, 1)"},
    )
    if isinstance(arguments, PretrainingArguments):
        check_values(arguments, ranges={"workers": "[0, inf)", "decay_steps": "[0, inf)"})
    if isinstance(arguments, FineTuningArguments):
        if arguments.init_from is None and not arguments.from_scratch:
            raise SpcxrError("give --init-from CHECKPOINT, or --from-scratch true")
        if arguments.cache == "none":
            raise SpcxrError("labels are kept with their images: cache must be memory or device")
        check_values(arguments, ranges={"patience": "[0, inf)"})
    if arguments.image_size > arguments.stored_size:  # it would learn from enlarged images and predict from sharp ones
        raise SpcxrError(
            f"image_size {arguments.image_size} is above stored_size {arguments.stored_size}, as images are kept: "
            f"add --stored-size {arguments.image_size}"
        )
    if arguments.fsdp and arguments.compile:  # the combination is untested
        raise SpcxrError("fsdp and compile exclude each other")


def keep_recipe(output: Path, arguments: RunArguments) -> None:
    """Write the resolved recipe into the run's folder; warn if its checkpoints were trained with another recipe."""
    path, checkpoints = output / "recipe.yaml", list_checkpoints(output)
    try:
        before = read_recipe(path) if checkpoints else {}
    except SpcxrError:  # damaged; it is about to be replaced
        before = {}
    now = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(cast(Any, arguments))))  # as it will be read
    changed = [name for name in now if name in before and name not in NEUTRAL and before[name] != now[name]]
    if "none" not in (before.get("cache"), now["cache"]):
        changed = [name for name in changed if name != "cache"]
    if changed:
        said = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)
        logger.warning(
            "%s resumes from %s, which was trained with another recipe (%s); another --output starts a new run",
            output, checkpoints[-1].name, said,
        )  # fmt: skip
    with os_errors(output):
        save_recipe(arguments, path)


def learning_rate_schedule(arguments: RunArguments) -> CosineSchedule:
    """The learning rate over the steps of a run."""
    decay_steps = arguments.decay_steps if isinstance(arguments, PretrainingArguments) else None
    final = min(1e-6, arguments.learning_rate)
    return CosineSchedule(arguments.learning_rate, final, arguments.warmup_steps, arguments.steps, decay_steps)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse ways of starting processes that this engine does not support.

    Raises:
        SpcxrError: several processes run without a process group, so that each would train on all the data and
            overwrite the others' checkpoints; or accelerate is configured to divide the model.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise SpcxrError(
            f"{started} processes were started but each runs alone; "
            "on a CPU start them by `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    # On a CPU, accelerate ignores a request for FSDP.
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_fsdp or accelerator.distributed_type not in PLAIN:
        kind = "FSDP" if is_fsdp else accelerator.distributed_type.value
        raise SpcxrError(
            f"accelerate is configured to divide the model itself ({kind}): start plain processes "
            "(distributed_type: MULTI_GPU) and give the script `--fsdp true`, as recipes/accelerate/fsdp.yaml does"
        )
