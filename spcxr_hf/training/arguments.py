"""A command line is a typed dataclass plus a YAML recipe: `script.py recipe.yaml --learning_rate 1e-3`."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from accelerate import Accelerator, DistributedType
from transformers import HfArgumentParser

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_file
from spcxr_hf.training.checkpoints import list_checkpoints
from spcxr_hf.training.optim import CosineSchedule

Arguments = TypeVar("Arguments")


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Parse a command line: an optional recipe first, then flags, which win over the recipe.

    The recipe's values go through the same parser as the flags, so both are typed and refused alike.

    Args:
        arguments_class: A dataclass; its fields are the flags, their metadata's "help" the help text.
        argv: The words of the command line without the program's name; those of the process by default.

    Raises:
        SpcxrError: the recipe cannot be read, or has a key that is no field; the message names both.
        SystemExit: a flag is unknown or its value of the wrong type, as in every command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cast(Any, arguments_class), description=(arguments_class.__doc__ or "").strip())
    parser.usage = "%(prog)s [RECIPE.yaml] [--flag value ...]"
    if words and not words[0].startswith("-"):
        # The recipe's flags go first: of two equal flags, argparse keeps the last.
        words = [*_recipe_words(arguments_class, Path(words[0])), *words[1:]]
    arguments, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:  # their values are not repeated: they may be secrets
        known = [field.name for field in dataclasses.fields(cast(Any, arguments_class))]
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        named = ", ".join(flag + _nearest(flag, known, "--") for flag in flags)
        parser.error(f"unrecognized arguments: {named or unknown[0]}")
    return arguments


def run_script(main: Callable[[], object]) -> None:
    """Run the `main` of a script: errors of the input end it with one line, Ctrl-C with status 130."""
    try:
        status = main()
    except SpcxrError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what was saved", file=sys.stderr)
        raise SystemExit(130) from None
    if isinstance(status, int):
        raise SystemExit(status)


def check_values(
    arguments: Any, choices: Mapping[str, Sequence[str]] | None = None, ranges: Mapping[str, str] | None = None
) -> None:
    """Refuse values of flags that are not among the choices, or out of range; None passes.

    Args:
        choices: Flag -> its values.
        ranges: Flag -> an interval, as "[0, 1)" or "[1, inf)"; every item of a list must lie in it.

    Raises:
        SpcxrError: the message names the flag, what it may be and what it is.
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
                said = f"be at least {low:g}" if interval.startswith("[") and high == math.inf else f"lie in {interval}"
                raise SpcxrError(f"{name} must {said}; got {item}")


def _nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    """What was meant, in brackets, if anything known is called nearly so."""
    near = difflib.get_close_matches(name.removeprefix(dashes), list(known), n=1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe.

    Raises:
        SpcxrError: the file is missing, is not YAML, or holds something else than keys and values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise SpcxrError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise SpcxrError(f"{path}: a recipe holds `key: value` lines; found {type(values).__name__}")
    return values


def save_recipe(arguments: Any, path: Path) -> None:
    """Write the resolved values of a dataclass as a recipe that gives them back."""
    with atomic_file(path) as partial:
        partial.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False), encoding="utf-8")


def fill_from_recipe(arguments: Any, recipe: Path, **otherwise: Any) -> None:
    """Give fields that are empty the recipe's values, as of the recipe that lies beside a trained model.

    Args:
        arguments: A dataclass of which fields are changed.
        recipe: A file that need not be there.
        otherwise: Field -> its value where the recipe does not say one either.

    Raises:
        SpcxrError: as `read_recipe`, of a file that is there.
    """
    known = read_recipe(recipe) if recipe.is_file() else {}
    for name, value in otherwise.items():
        setattr(arguments, name, getattr(arguments, name) or known.get(name) or value)


def _recipe_words(arguments_class: type, path: Path) -> list[str]:
    known = {field.name for field in dataclasses.fields(arguments_class)}
    words: list[str] = []
    for key, value in read_recipe(path).items():
        if key not in known:
            meant = _nearest(str(key), known)
            raise SpcxrError(f"{path}: unknown key {key!r}{meant}; known keys: {', '.join(sorted(known))}")
        if value is None or value == []:  # no flag says so; it is what these fields are by default
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(str(item) for item in values)]
    return words


logger = logging.getLogger(__name__)

# Every process holds the whole model, or the run itself divides it (`--shard true`).
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# What may be another at the next start of a run without making it another run. (A set that is read on the way comes in
# another order than one that is kept; where it is kept makes no difference.)
NEUTRAL = {"data", "output", "cache_folder", "workers", "compile", "save_every", "keep_checkpoints"}
NEUTRAL |= {"log_every", "max_skipped", "trackers", "push_to_hub"}


@dataclass
class RunArguments:
    """What the command lines of all training scripts share."""

    data: str = field(metadata={"help": "Parquet shards or a folder of pictures"})
    output: str = field(metadata={"help": "folder for checkpoints, pictures and the log"})
    cache: str = field(
        default="memory", metadata={"help": "where decoded images are kept: none (read on the way), memory or device"}
    )
    cache_folder: str | None = field(
        default=None, metadata={"help": "folder that keeps the decoded images between starts"}
    )
    stored_size: int = field(default=256, metadata={"help": "images are kept at this size, in pixels"})
    workers: int = field(default=2, metadata={"help": "processes that read images on the way, with --cache none"})
    image_size: int = field(default=224, metadata={"help": "side of the input in pixels, a multiple of 16"})
    init_from: str | None = field(
        default=None, metadata={"help": "checkpoint to start from, of any task and image size"}
    )
    attention: str = field(
        default="sdpa", metadata={"help": "attention implementation; eager is faster on a CPU below 224 px"}
    )
    drop_path_rate: float = field(default=0.1, metadata={"help": "stochastic depth of the last block"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps in all"})
    batch_size: int = field(default=64, metadata={"help": "images per optimiser step over all processes"})
    micro_batch_size: int = field(
        default=32, metadata={"help": "images per forward pass; batch_size / this is a multiple of the processes"}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    final_learning_rate: float = field(default=1e-6, metadata={"help": "learning rate at the end of the cosine"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    decay_steps: int | None = field(
        default=None, metadata={"help": "length of the cosine at the end; all steps after the warm-up by default"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "weight decay of AdamW"})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "decay of the weights' moving average, which becomes the final model; 0: none"}
    )
    mixed_precision: str = field(
        default="no", metadata={"help": "no, bf16 (on a CPU that has no fast one: float32) or fp16"}
    )
    shard: bool = field(
        default=False,
        metadata={"help": "divide weights, gradients and optimiser state among the processes (FSDP)"},
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the model"})
    deterministic: bool = field(default=False, metadata={"help": "refuse algorithms that give other results each time"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many of the newest checkpoints to keep"})
    log_every: int = field(default=20, metadata={"help": "steps between rows of the log"})
    max_skipped: int = field(
        default=10, metadata={"help": "stop after so many steps in a row whose loss is not a finite number"}
    )
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "where else to log: tensorboard, trackio, wandb, ..."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "id of a Hub repository that gets every checkpoint, in the background"}
    )
    seed: int = field(default=0, metadata={"help": "everything random follows from it"})


def check_run(arguments: RunArguments) -> None:
    """Refuse a command line that would fail late.

    Raises:
        SpcxrError: a value is out of its range; the message names it.
    """
    choices = {"cache": ("none", "memory", "device"), "mixed_precision": ("no", "bf16", "fp16")}
    for name, allowed in choices.items():
        if (value := getattr(arguments, name)) not in allowed:
            raise SpcxrError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}; got {value!r}")
    least = {"steps": 1, "save_every": 1, "log_every": 1, "keep_checkpoints": 1, "max_skipped": 1, "workers": 0}
    for name, lowest in {**least, "decay_steps": 0}.items():
        if (value := getattr(arguments, name)) is not None and value < lowest:
            raise SpcxrError(f"{name} must be at least {lowest}; got {value}")
    if arguments.image_size > arguments.stored_size:  # it would learn from enlarged images and predict from sharp ones
        raise SpcxrError(
            f"image_size {arguments.image_size} is above stored_size {arguments.stored_size}, as images are kept: "
            f"add --stored_size {arguments.image_size}"
        )
    if not 0 <= arguments.ema_decay < 1:
        raise SpcxrError(f"ema_decay must lie in [0, 1); got {arguments.ema_decay}")
    if arguments.shard and arguments.compile:  # nobody has measured or tested the two together
        raise SpcxrError("shard and compile exclude each other")


def prepare_folder(output: Path) -> None:
    """Make the run's folder.

    Raises:
        SpcxrError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpcxrError(f"{output}: cannot be written to ({error})") from error


def keep_recipe(output: Path, arguments: RunArguments) -> None:
    """Write the resolved recipe into the run's folder; warn where its checkpoints come from another recipe.

    Raises:
        SpcxrError: it cannot be written.
    """
    try:
        _warn_of_another_recipe(output, arguments)
        save_recipe(arguments, output / "recipe.yaml")
    except OSError as error:
        raise SpcxrError(f"{output}: cannot be written to ({error})") from error


def _warn_of_another_recipe(output: Path, arguments: RunArguments) -> None:
    """Say what is asked for otherwise than when the run's checkpoints were made: it goes on from them all the same."""
    checkpoints = list_checkpoints(output)
    if not checkpoints or not (output / "recipe.yaml").is_file():
        return
    try:
        before: Any = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):  # cut while it was written; it is about to be written anew
        return
    now = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(arguments)))  # as it will be read
    known = before if isinstance(before, dict) else {}
    changed = [name for name in now if name in known and name not in NEUTRAL and known[name] != now[name]]
    if "none" not in (known.get("cache"), now["cache"]):
        changed = [name for name in changed if name != "cache"]
    if changed:
        said = ", ".join(f"{name} {known[name]} -> {now[name]}" for name in changed)
        logger.warning(
            "%s goes on from %s, which was trained with another recipe (%s); another --output begins anew",
            output, checkpoints[-1].name, said,
        )  # fmt: skip


def learning_rate_schedule(arguments: RunArguments) -> CosineSchedule:
    """The learning rate over the steps of a run."""
    return CosineSchedule(
        arguments.learning_rate,
        arguments.final_learning_rate,
        arguments.warmup_steps,
        arguments.steps,
        arguments.decay_steps,
    )


def check_launch(accelerator: Accelerator) -> None:
    """Refuse processes that were started in a way that this engine does not train in.

    Raises:
        SpcxrError: several processes do not know of each other: each would train on all the data and write over the
            others' checkpoints; or accelerate was told to divide the model.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise SpcxrError(
            f"{started} processes were started but each runs alone; "
            "on a CPU start them by `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    # On a CPU, accelerate ignores that it was asked for FSDP: the run would be another than was meant.
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_fsdp or accelerator.distributed_type not in PLAIN:
        kind = "FSDP" if is_fsdp else accelerator.distributed_type.value
        raise SpcxrError(
            f"accelerate was told to divide the model itself ({kind}): start plain processes "
            "(distributed_type: MULTI_GPU) and give the script `--shard true`, as recipes/accelerate/fsdp.yaml does"
        )
