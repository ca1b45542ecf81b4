"""One training run: its command line, its processes, where it stands, and how it survives what happens to machines.

A script's loop stays in the script:

    for step, micro_batches in run.steps(images):
        for micro_batch in micro_batches:
            with run.forward(micro_batch) as model:
                loss = model(...).loss
            run.backward(loss)
        run.update(learning_rate(step), weight_decay(step))
        if run.is_due:  # a checkpoint follows
            ...
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .checkpoints import resume, save_checkpoint, written_aside
from .data import MicroBatch, StepPlan
from .errors import SpcxrError
from .recipe import save_recipe
from .report import write_report
from .training import CosineSchedule, StepLog, set_schedule

# Every process holds the whole model.
PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
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
    seed: int = field(default=0, metadata={"help": "everything random follows from it"})


class StepSource(Protocol):
    """Where micro-batches come from: a `RadiographSet` in memory or a stream of shards."""

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of every step."""


class Run:
    """A training run from its command line to its last checkpoint.

    Attributes:
        accelerator: The processes and the precision.
        output: Where everything is written.
        state: What the run needs to go on besides weights and optimiser, as JSON: "step", "seconds", "skipped", and
            whatever the script adds.
        model: The model as it is trained (wrapped by Accelerate); `bare_model` is the model itself.
        scores: What the script measured in this step; goes into the log and to the trackers.
        is_due: Whether a checkpoint follows this step.
    """

    def __init__(self, arguments: RunArguments):
        check_run(arguments)
        self.arguments = arguments
        if arguments.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
            torch.use_deterministic_algorithms(True)
        self.output = Path(arguments.output)
        self.accelerator = start_accelerator(arguments)
        self.plan = StepPlan(
            arguments.batch_size,
            arguments.micro_batch_size,
            arguments.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.scores: dict[str, Any] = {}
        self.is_due = False
        self._average: dict[str, torch.Tensor] | None = None
        self._asked_to_stop = self._stop = False
        self._unsynchronised = ExitStack()
        if self.is_main:
            prepare_folder(self.output, arguments)
        self.accelerator.wait_for_everyone()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def start(self, model: PreTrainedModel, groups: list[dict], **state: Any) -> None:
        """Take a model and AdamW's parameter groups; go on from the newest checkpoint, or begin with `state`."""
        optimizer = torch.optim.AdamW(groups, betas=(0.9, self.arguments.adam_beta2), fused=True)
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "skipped": 0, "without_best": 0, **state}
        found = resume(self.output, model, optimizer)
        if found is not None:
            saved, self._average = found
            self.state.update(saved)
            if "scaler" in saved and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.arguments.ema_decay and self._average is None:
            self._average = {name: value.detach().clone() for name, value in self._averaged()}
        elif self._average is not None:
            self._average = {name: value.to(self.accelerator.device) for name, value in self._average.items()}
        self._step_model = torch.compile(self.model) if self.arguments.compile else self.model

    def _averaged(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.bare_model.named_parameters() if value.requires_grad]

    def steps(self, source: StepSource) -> Iterator[tuple[int, list[MicroBatch]]]:
        """The number of every step that is left, from 0, and this process's micro-batches; logs and saves behind each.

        Raises:
            SystemExit: the machine asked the process to end (SIGTERM); a checkpoint was written, the exit code is 0.
        """
        first_step = self.state["step"]
        last_step = first_step if self.state.get("stopped_early") else self.arguments.steps
        self._log = StepLog(self.output / "log.csv", first_step)
        self._started = time.perf_counter() - self.state["seconds"]
        self._in_a_row = 0
        with self._progress(first_step) as progress, self._listening():
            for step, micro_batches in enumerate(source.steps(self.plan, first_step, last_step), first_step):
                self.is_due = (step + 1) % self.arguments.save_every == 0 or step + 1 == last_step
                self._begin(micro_batches)
                yield step, micro_batches
                self.state["step"] = step + 1
                progress.update(self.plan.batch_size)
                self._record(progress)
                if self.is_due or self._stop:
                    self._save()
                if self._stop and step + 1 < last_step:
                    self.accelerator.end_training()
                    self._say(f"stopped by SIGTERM after step {step + 1}; the same command goes on from there")
                    raise SystemExit(0)
                if self.state.get("stopped_early"):
                    break

    def _begin(self, micro_batches: list[MicroBatch]) -> None:
        self.scores = {}
        self._ids = [name for micro_batch in micro_batches for name in micro_batch.ids]
        self._left = len(micro_batches)
        self._count = len(micro_batches)
        self._losses: list[torch.Tensor] = []

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[nn.Module]:
        """The model, for its pass over a micro-batch: with its random numbers, in the run's precision."""
        self._left -= 1
        if self._left:  # processes exchange their gradients behind the last micro-batch only
            self._unsynchronised.enter_context(self.accelerator.no_sync(self.model))
        torch.manual_seed(micro_batch.seed)  # stochastic depth
        with self.accelerator.autocast():
            yield self._step_model

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the micro-batch that has just gone forward."""
        self._losses.append(loss.detach().float())
        self.accelerator.backward(loss / self._count)
        self._unsynchronised.close()

    def update(self, learning_rate: float, weight_decay: float) -> None:
        """One step of the optimiser; none where the loss or the gradient is not finite.

        Raises:
            SpcxrError: `max_skipped` steps in a row had no finite loss; the message names the images of the last.
        """
        set_schedule(self.optimizer, learning_rate, weight_decay)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm)
        loss = torch.stack(self._losses).mean()
        told = torch.stack([loss, torch.tensor(float(self._asked_to_stop), device=loss.device)])
        loss_value, stop = self.accelerator.reduce(told, "mean").tolist()
        self._stop = stop > 0
        # A scaled gradient (fp16) may overflow: that is the scaler's to see to. The norm is the same on all processes.
        finite = math.isfinite(loss_value) and (self.accelerator.scaler is not None or math.isfinite(float(norm)))
        if finite:
            self.optimizer.step()
            self._in_a_row = 0
            self._update_average()
        self.optimizer.zero_grad()
        self._row = {"loss": round(loss_value, 5), "learning_rate": f"{learning_rate:.3g}"}
        if not finite:
            self._skip()

    def _skip(self) -> None:
        self.state["skipped"] += 1
        self._in_a_row += 1
        if self._in_a_row < self.arguments.max_skipped:
            return
        ids = [name for names in self.collect([self._ids]) for name in names]
        raise SpcxrError(
            f"step {self.state['step'] + 1}: the loss or its gradient was not finite in {self._in_a_row} steps "
            f"in a row; images of the last: {', '.join(ids)}"
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None:
            return
        for name, value in self._averaged():
            self._average[name].lerp_(value, 1 - self.arguments.ema_decay)

    @contextmanager
    def averaged(self) -> Iterator[PreTrainedModel]:
        """The bare model with its averaged weights, where the run keeps them, and with its own again afterwards."""
        model = self.bare_model
        if self._average is None:
            yield model
            return
        own = {name: value.detach().clone() for name, value in self._averaged()}
        self._put(self._average)
        try:
            yield model
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in self._averaged():
            value.copy_(values[name])

    def collect(self, own: list) -> list:
        """The items of all processes, where this one holds those at process, process + processes, ... (tensors too)."""
        if self.plan.processes == 1:
            return own
        shares: list[Any] = [None] * self.plan.processes
        torch.distributed.all_gather_object(shares, own)
        total = sum(len(share) for share in shares)
        return [shares[index % len(shares)][index // len(shares)] for index in range(total)]

    def keep_best(self, metric: str, value: float, patience: int = 0) -> None:
        """Write the model to `best/` if its `metric` (more is better) is the highest so far.

        Args:
            patience: End the run after so many values in a row without a new best; 0: never.
        """
        self.scores[metric] = value
        if value > self.state.get("best", -math.inf):
            self.state.update(best=value, best_metric=metric, best_step=self.state["step"] + 1, without_best=0)
            if self.is_main:
                with self.averaged() as model, written_aside(self.output / "best") as folder:
                    model.save_pretrained(folder)
        else:
            self.state["without_best"] += 1
        if patience and self.state["without_best"] >= patience:
            self.state["stopped_early"] = True
            self.is_due = True

    def _record(self, progress: tqdm) -> None:
        if not self.is_main:
            return
        done = self.state["step"]
        if self.is_due or done % self.arguments.log_every == 0:
            row = {**self._row, **self.scores}
            progress.set_postfix(row)
            self._log.add(step=done, **row)
            self.accelerator.log({name: float(value) for name, value in row.items() if value != ""}, step=done)

    def _save(self) -> None:
        self.state["seconds"] = round(time.perf_counter() - self._started, 1)
        if self.accelerator.scaler is not None:
            self.state["scaler"] = self.accelerator.scaler.state_dict()
        if self.is_main:
            state = {name: value for name, value in self.state.items() if name != "step"}
            save_checkpoint(
                self.output,
                self.state["step"],
                self.bare_model,
                self.optimizer,
                state,
                self.arguments.keep_checkpoints,
                self._average,
            )

    def draw_curves(self, curves: dict[str, str], y_label: str = "") -> None:
        """Write the log's columns as `loss.png`; `curves` maps what a curve is called to its column."""
        self._log.draw(self.output / "loss.png", curves, y_label)

    def report(self, title: str, pictures: Sequence[str] = ("loss.png",)) -> None:
        """Write the run's page, `report.md`."""
        seconds = self.state["seconds"]
        figures: dict[str, Any] = {
            "optimiser steps": self.state["step"],
            "images per step": self.plan.batch_size,
            "seconds": seconds,
            "images per second": self.state["step"] * self.plan.batch_size / seconds if seconds else 0.0,
            "steps skipped, loss not finite": self.state["skipped"],
            "processes": self.plan.processes,
            "device": self._device_name(),
        }
        if "best" in self.state:
            figures[f"best {self.state['best_metric']}"] = f"{self.state['best']} (step {self.state['best_step']})"
        write_report(self.output, title, figures, asdict(self.arguments), pictures)

    def _device_name(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

    def end(self) -> None:
        """Let the trackers finish and the processes go."""
        self.accelerator.end_training()

    def _progress(self, first_step: int) -> tqdm:
        batch = self.plan.batch_size
        return tqdm(
            total=self.arguments.steps * batch, initial=first_step * batch, unit="image", disable=not self.is_main
        )

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM, which machines send before they take themselves away, ends the run behind the step at hand."""

        def ask(*_: Any) -> None:
            self._asked_to_stop = True

        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread listen
            yield
            return
        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _say(self, words: str) -> None:
        if self.is_main:
            print(words, flush=True)


def start_accelerator(arguments: RunArguments) -> Accelerator:
    """The processes that this run consists of.

    Raises:
        SpcxrError: several processes were started and do not know of each other: each would train on all the data and
            write over the others' checkpoints.
    """
    trackers = list(arguments.trackers)
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision, log_with=trackers or None, project_dir=arguments.output
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise SpcxrError(
            f"{started} processes were started but each runs alone; "
            "on a CPU start them by `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    if accelerator.distributed_type not in PLAIN:
        raise SpcxrError(
            f"{accelerator.distributed_type.value} divides the model among the processes; checkpoints hold it whole: "
            "use data parallelism (DDP), every preset fits one GPU"
        )
    if trackers:
        accelerator.init_trackers("spcxr", config={name: str(value) for name, value in asdict(arguments).items()})
    return accelerator


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
    for name, lowest in least.items():
        if (value := getattr(arguments, name)) < lowest:
            raise SpcxrError(f"{name} must be at least {lowest}; got {value}")
    if not 0 <= arguments.ema_decay < 1:
        raise SpcxrError(f"ema_decay must lie in [0, 1); got {arguments.ema_decay}")


def prepare_folder(output: Path, arguments: RunArguments) -> None:
    """Make the run's folder, with the resolved recipe in it.

    Raises:
        SpcxrError: it cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        save_recipe(arguments, output / "recipe.yaml")
    except OSError as error:
        raise SpcxrError(f"{output}: cannot be written to ({error})") from error


def learning_rate_schedule(arguments: RunArguments) -> CosineSchedule:
    """The learning rate over the steps of a run."""
    return CosineSchedule(
        arguments.learning_rate,
        arguments.final_learning_rate,
        arguments.warmup_steps,
        arguments.steps,
        arguments.decay_steps,
    )
