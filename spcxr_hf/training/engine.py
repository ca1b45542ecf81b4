"""The training engine: processes, precision, gradient accumulation, checkpoints, the log, exact resume.

The loop is the script's own:

    with Run(arguments) as run:
        run.start(model, parameter_groups(model))
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from spcxr_hf.data.batches import MicroBatch, StepPlan
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import atomic_folder, locked
from spcxr_hf.models.loading import bf16_autocast, has_fast_bf16, no_progress_bar
from spcxr_hf.training.arguments import RunArguments, check_launch, check_run, keep_recipe
from spcxr_hf.training.checkpoints import resume, save_checkpoint
from spcxr_hf.training.optim import StepLog, named_trainable, set_schedule
from spcxr_hf.training.push import HubPusher
from spcxr_hf.training.run_report import write_report
from spcxr_hf.training.sharding import Shards, own_share, whole_tensor

# Seconds to wait for the last push, at the end of a run and after SIGTERM: machines give half a minute.
WAIT_AT_THE_END, WAIT_WHEN_ASKED = 120.0, 20.0
SECONDS_BETWEEN_DRAWINGS = 30.0  # a drawing takes as long as many steps


class StepSource(Protocol):
    """Where micro-batches come from: a `RadiographSet` in memory or a stream of shards."""

    def steps(self, plan: StepPlan, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """This process's micro-batches of every step."""


class Run:
    """A training run from its command line to its last checkpoint.

    Attributes:
        accelerator: The processes and the precision.
        output: Where everything is written.
        state: What a resumed run needs besides weights and optimiser, as JSON: "step", "seconds", "skipped", and
            whatever the script adds.
        model: The model as it is trained (wrapped by Accelerate, or sharded); `bare_model` is the model itself.
        optimizer: AdamW.
        scaler: Loss scaling of an fp16 run; disabled in others.
        scores: What the script measured in this step, for the log and the trackers.
        is_due: Whether a checkpoint follows this step.
        pusher: Pushes checkpoints to the Hub, on the main process of a run with `push_to_hub`.
    """

    def __init__(self, arguments: RunArguments):
        check_run(arguments)
        self.arguments = arguments
        if arguments.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed by deterministic cuBLAS
            torch.use_deterministic_algorithms(True)
        self.output = Path(arguments.output)
        self.accelerator = Accelerator(
            mixed_precision="no",  # precision is the run's own: see `Run.autocast`
            log_with=arguments.trackers or None,
            project_dir=arguments.output,
        )
        check_launch(self.accelerator)
        if arguments.trackers:
            config = {name: str(value) for name, value in asdict(arguments).items()}
            self.accelerator.init_trackers("spcxr", config=config)
        self.plan = StepPlan(
            arguments.batch_size,
            arguments.micro_batch_size,
            arguments.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.scores: dict[str, Any] = {}
        self.is_due = False
        # Not Accelerate's scaler: it has none on a CPU, where fp16 would silently be float32.
        self._is_fp16 = arguments.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=self._is_fp16)
        self._shards: Shards | None = None
        self._average: dict[str, torch.Tensor] | None = None
        self._whole_average: dict[str, torch.Tensor] | None = None
        self._in_steps = self._asked_to_stop = self._stop = False
        self._unsynchronised, self._held = ExitStack(), ExitStack()
        self.pusher: HubPusher | None = None

    def __enter__(self) -> Run:
        """Lock the output folder, and install a SIGTERM handler that ends the run with a checkpoint."""
        if self.is_main:
            if self.arguments.push_to_hub is not None:
                self.pusher = HubPusher(self.arguments.push_to_hub)
            self._held.enter_context(locked(self.output))
        if threading.current_thread() is threading.main_thread():  # Python handles signals there only
            before = signal.signal(signal.SIGTERM, self._on_sigterm)
            self._held.callback(signal.signal, signal.SIGTERM, before)
        self._held.enter_context(no_progress_bar())  # for every saved checkpoint, across the run's own
        self.accelerator.wait_for_everyone()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Push the final model, if it was written, and close the trackers; unlock the folder."""
        with self._held:
            if kind is not None:
                return
            if self.pusher is not None:
                if (self.output / "final").is_dir():
                    self.pusher.push(self.output / "final", "the final model")
                self.pusher.close(WAIT_AT_THE_END)
            self.accelerator.wait_for_everyone()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.free_memory()

    def _on_sigterm(self, *_: Any) -> None:
        """Within a step, end after it with a checkpoint; otherwise exit at once, as nothing is lost."""
        self._asked_to_stop = True
        if not self._in_steps:
            self._say("stopped by SIGTERM; run the same command to resume from the newest checkpoint")
            raise SystemExit(0)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process

    @property
    def bare_model(self) -> PreTrainedModel:
        """The model without wrappers. Sharded, it has its weights only where `is_due` and after the last step."""
        if self._shards is not None:
            return self._shards.whole
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def start(
        self,
        model: PreTrainedModel,
        groups: list[dict],
        fingerprint: Mapping[str, str] | None = None,
        adam_beta2: float = 0.999,
        **state: Any,
    ) -> None:
        """Take a model and AdamW's parameter groups; resume from the newest checkpoint, or begin with `state`.

        Args:
            fingerprint: Part of the data -> hash of its rows and labels, in their order; kept in the checkpoints.
            adam_beta2: Second beta of AdamW.

        Raises:
            SpcxrError: the checkpoints are damaged, of another model, or of other data (but for `allow_other_data`).
        """
        is_sharded = self.arguments.fsdp and self.plan.processes > 1
        if not is_sharded:
            model.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, adam_beta2), fused=True)
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "skipped": 0, "without_best": 0, **state}
        self.state["data"] = data = dict(fingerprint or {})
        found = resume(self.output, model, optimizer)
        average = None
        if found is not None:
            saved, average = found
            before = saved.pop("data", {})
            changed = [part for part, value in data.items() if before.get(part, value) != value]
            if changed and not self.arguments.allow_other_data:
                raise SpcxrError(
                    f"{self.output}: its checkpoints were trained on other data: rows of {', '.join(changed)}, their "
                    "order or their labels have changed; train into another folder, or add --allow-other-data true"
                )
            if saved["step"] >= self.arguments.steps:
                self._say(f"{self.output}: {saved['step']} steps are done already, so nothing is trained")
            if (scaler := saved.pop("scaler", None)) is not None:
                self.scaler.load_state_dict(scaler)
            self.state.update(saved)
        if self.is_main:  # not before: a run that is refused keeps its old recipe
            keep_recipe(self.output, self.arguments)
        if is_sharded:
            self._shards = Shards(model, optimizer, self.accelerator.device)
            self.model, self.optimizer = self._shards.model, self._shards.optimizer
        else:
            self.model, self.optimizer = self.accelerator.prepare_model(model), optimizer
        if average is not None and self._shards is not None:
            self._average = self._shards.divide(average)
        elif average is not None:
            self._average = {name: value.to(self.accelerator.device) for name, value in average.items()}
        elif self.arguments.ema_decay:
            self._average = {name: value.detach().clone() for name, value in self._trained()}
        self._step_model = cast(nn.Module, torch.compile(self.model)) if self.arguments.compile else self.model
        if self._is_over:
            self._fill()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are averaged, or this process's shares of them."""
        model = self.bare_model if self._shards is None else self._shards.model
        return list(named_trainable(model))

    @property
    def _is_over(self) -> bool:
        return bool(self.state["step"] >= self.arguments.steps or self.state.get("stopped_early"))

    def steps(
        self, source: StepSource, curves: Mapping[str, str] | None = None, y_label: str = ""
    ) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Number (from 0) of every step that is left, and this process's micro-batches; logs and saves after each.

        Args:
            curves: Name -> column of the log; drawn as `loss.png`, now and then with a checkpoint and at the end.
            y_label: Of that figure.

        Raises:
            SystemExit: the process received SIGTERM; a checkpoint was written, the exit code is 0.
        """
        first_step = self.state["step"]
        last_step = first_step if self.state.get("stopped_early") else self.arguments.steps
        self._log = StepLog(self.output / "log.csv", first_step)
        self._started = time.perf_counter() - self.state["seconds"]
        self._in_a_row = 0
        self._drawn = -math.inf
        batch = self.plan.batch_size
        bar = tqdm(
            total=self.arguments.steps * batch, initial=first_step * batch, unit="image", disable=not self.is_main
        )
        with bar as progress:
            for step, micro_batches in enumerate(source.steps(self.plan, first_step, last_step), first_step):
                self.is_due = (step + 1) % self.arguments.save_every == 0 or step + 1 == last_step
                self._in_steps = True
                if self._shards is not None:
                    self._shards.empty()
                    self._whole_average = None
                self.scores = {}
                self._ids = [name for micro_batch in micro_batches for name in micro_batch.ids]
                self._left = self._count = len(micro_batches)
                self._losses: list[torch.Tensor] = []
                yield step, micro_batches
                self.state["step"] = step + 1
                progress.update(batch)
                self._record(progress)
                if self.is_due or self._stop:
                    is_time = time.perf_counter() - self._drawn >= SECONDS_BETWEEN_DRAWINGS
                    if curves is not None and self.is_main and (is_time or self._is_over or self._stop):
                        self._log.draw(self.output / "loss.png", curves, y_label)
                        self._drawn = time.perf_counter()
                    self._save()
                if self._stop and step + 1 < last_step:
                    if self.pusher is not None:
                        self.pusher.close(WAIT_WHEN_ASKED)
                    self.accelerator.end_training()
                    self._say(f"stopped by SIGTERM after step {step + 1}; run the same command to resume")
                    raise SystemExit(0)
                if self.state.get("stopped_early"):
                    break
        self._in_steps = False

    @contextmanager
    def forward(self, micro_batch: MicroBatch) -> Iterator[nn.Module]:
        """The model, for its pass over a micro-batch: with its random numbers, in the run's precision."""
        self._left -= 1
        # Gradients are exchanged after the last micro-batch only; of a sharded model after each, or every process would
        # hold all of them.
        if self._left and self._shards is None:
            self._unsynchronised.enter_context(self.accelerator.no_sync(self.model))
        torch.manual_seed(micro_batch.seed)  # stochastic depth
        with self.autocast():
            yield self._step_model

    def autocast(self) -> AbstractContextManager:
        """The run's precision."""
        if self._is_fp16:
            return torch.autocast(self.accelerator.device.type, torch.float16)
        return bf16_autocast(self.accelerator.device, self.arguments.mixed_precision == "bf16")

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of the last micro-batch."""
        self._losses.append(loss.detach().float())
        self.scaler.scale(loss / self._count).backward()
        self._unsynchronised.close()

    def update(self, learning_rate: float, weight_decay: float) -> None:
        """One step of the optimiser; none where the loss or the gradient is not finite.

        Raises:
            SpcxrError: `max_nonfinite_steps` in a row were not finite; the message names the images of the last.
        """
        set_schedule(self.optimizer, learning_rate, weight_decay)
        self.scaler.unscale_(self.optimizer)
        norm = whole_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.arguments.max_grad_norm))
        loss = torch.stack(self._losses).mean()
        own = torch.stack([loss, torch.tensor(float(self._asked_to_stop), device=loss.device), norm])
        loss_value, stop, norm_value = self.accelerator.reduce(own, "mean").tolist()
        self._stop = stop > 0
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            self.optimizer.step()
            self._in_a_row = 0
            if self._average is not None:
                with torch.no_grad():
                    for name, value in self._trained():
                        own_share(self._average[name]).lerp_(own_share(value), 1 - self.arguments.ema_decay)
        self.optimizer.zero_grad()
        self._row = {"loss": round(loss_value, 5), "learning_rate": f"{learning_rate:.3g}"}
        was_too_large = False
        if self._is_fp16:
            # Above 1, the scale may be why gradients overflowed, and is halved. Those that overflow at 1 have another
            # cause, which must end the run.
            before = self.scaler.get_scale()
            self.scaler.update()
            was_too_large = before > 1 and self.scaler.get_scale() < before
        if math.isfinite(loss_value) and was_too_large:
            self.state["overflows"] = self.state.get("overflows", 0) + 1
        elif not finite:
            self.state["skipped"] += 1
            self._in_a_row += 1
            if self._in_a_row >= self.arguments.max_nonfinite_steps:
                ids = [name for names in self.collect([self._ids]) for name in names]
                raise SpcxrError(
                    f"step {self.state['step'] + 1}: the loss or its gradient was not finite in {self._in_a_row} "
                    f"steps in a row; images of the last: {', '.join(ids)}"
                )
        if self.is_due:
            self._fill()

    def _fill(self) -> None:
        """Gather the weights of a sharded model into `bare_model`, on every process, and their average beside it."""
        if self._shards is None or self._shards.is_filled:
            return
        self._shards.fill()
        if self._average is not None:
            self._whole_average = {name: whole_tensor(value) for name, value in self._average.items()}

    @contextmanager
    def averaged(self) -> Iterator[PreTrainedModel]:
        """The bare model with its averaged weights, if the run keeps an average; afterwards with its own again.

        Raises:
            RuntimeError: the run is sharded and no checkpoint is due, so that no process has the weights.
        """
        if self._shards is not None and not self._shards.is_filled:
            raise RuntimeError("a sharded run has its weights together only where run.is_due")
        model = self.bare_model
        average = self._average if self._shards is None else self._whole_average
        if average is None:
            yield model
            return
        own = {name: value.detach().clone() for name, value in model.named_parameters() if name in average}
        put_parameters(model, average)
        try:
            yield model
        finally:
            put_parameters(model, own)

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
            patience: End the run after this many values in a row without a new best; 0: never.
        """
        self.scores[metric] = value
        if value > self.state.get("best", -math.inf):
            self.state.update(best=value, best_metric=metric, best_step=self.state["step"] + 1, without_best=0)
            if self.is_main:
                with self.averaged() as model, atomic_folder(self.output / "best") as folder:
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
            progress.set_postfix({name: value for name, value in row.items() if value != ""})
            self._log.add(step=done, **row)
            self.accelerator.log({name: float(value) for name, value in row.items() if value != ""}, step=done)

    def _save(self) -> None:
        """Write a checkpoint; all processes call it, the main one writes."""
        self.state["seconds"] = round(time.perf_counter() - self._started, 1)
        state = {name: value for name, value in self.state.items() if name != "step"}
        if self._is_fp16:
            state["scaler"] = self.scaler.state_dict()
        optimizer, average = self.optimizer, self._average
        if self._shards is not None:
            self._fill()
            optimizer, average = self._shards.gather_optimizer(keep=self.is_main), self._whole_average
        if self.is_main:
            step, keep = self.state["step"], self.arguments.keep_checkpoints
            saved = save_checkpoint(self.output, step, self.bare_model, optimizer, state, keep, average)
            if self.pusher is not None:
                self.pusher.push(saved, f"step {step}")

    def report(self, title: str, pictures: Sequence[str] = ("loss.png",)) -> None:
        """Write the run's page, `report.md`."""
        seconds, device = self.state["seconds"], self.accelerator.device
        figures: dict[str, Any] = {
            "optimiser steps": self.state["step"],
            "images per step": self.plan.batch_size,
            "seconds": seconds,
            "images per second": self.state["step"] * self.plan.batch_size / seconds if seconds else 0.0,
            "steps skipped, loss not finite": self.state["skipped"],
            "processes": f"{self.plan.processes}{', sharded' if self._shards is not None else ''}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        }
        if self.arguments.mixed_precision == "bf16" and not has_fast_bf16(self.accelerator.device.type):
            figures["precision"] = "float32: this CPU has no fast bf16"
        if self._is_fp16:
            figures["steps skipped, loss scale too high"] = self.state.get("overflows", 0)
        if "best" in self.state:
            figures[f"best {self.state['best_metric']}"] = f"{self.state['best']} (step {self.state['best_step']})"
        write_report(self.output, title, figures, asdict(self.arguments), pictures)

    def _say(self, words: str) -> None:
        if self.is_main:
            print(words, flush=True)


@torch.no_grad()
def put_parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values by name into a model's parameters; those that have none stay."""
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])
