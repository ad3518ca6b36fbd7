"""The training loop: one Lightning module for parent, teachers, students and baselines.

Every batch is numbered through the whole run. Order, augmentation, dropout, learning rate and stage are pure
functions of that number and the seed, so a run that goes on from a checkpoint ends bit-identical.

Several processes may share each batch (`train.devices`). All of them run all of this and take the same decisions:
what decides (loss, gradients, scores, a request to stop) is that of all. The first one alone writes and validates.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from xded.checks.learning import collapsed
from xded.config import Config
from xded.errors import EXIT_INTERRUPTED, GO_ON, TrainingError
from xded.findings import Finding
from xded.models import collective
from xded.models.conformer import Conformer, MaskedBatchNorm
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training.auxiliary import Auxiliary
from xded.training.averaging import Average
from xded.training.checkpointing import AUXILIARY
from xded.training.curriculum import require_same_order
from xded.training.data import Batch, TrainingData
from xded.training.losses import loss_parts, weighted_sum
from xded.training.monitor import FrozenParts, gradient_norms, unused_parts
from xded.training.optimizer import AdamW
from xded.training.order import Order
from xded.training.schedule import Schedule
from xded.training.status import is_logged

LATEST = "latest.pt"  # what a run goes on from; all other checkpoints hold the weights that are tested
GRADIENT_WATCH = 4  # batches at the start of each epoch in which gradients are looked for
STOPPED_AT_ONCE = "Stopped at once; updates since the last save are lost."
NEXT_PROCESS = 7_368_787_200_000_049  # between the random states of the processes that share a batch


class InterruptedRunError(TrainingError):
    """The user or the system asked the run to stop; latest.pt holds everything."""

    exit_code = EXIT_INTERRUPTED


class CollapsedRunError(TrainingError):
    """The run says the same whatever it hears, and will not learn anything else; `finding` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"Stopped: {finding.what}", finding.remedy)
        self.finding = finding

    def __reduce__(self) -> tuple[type[CollapsedRunError], tuple[Finding]]:  # on its way from another process
        return type(self), (self.finding,)


def worth(measured: Mapping[str, float]) -> tuple[bool, float, float]:
    """What the best epoch has most of. Averaged weights come first: what a run keeps is what it was asked for."""
    return measured.get("averaged", 0) > 0, measured.get("wra", 0.0), -measured.get("val_loss", 0.0)


class Loop(L.LightningModule):
    """One run.

    Args:
        student: the recogniser to train; config, schedule, tokenizer: of the run.
        data: training recordings.
        out: run folder; checkpoints are written here.
        validate: called at epoch ends, returns metrics with `wra` and `val_loss` (or an empty mapping).
        watch: called with every event ("stage", "step", "epoch", "saved") for logs, status and metrics.
        extra: keys that every checkpoint carries (config, tokenizer, provenance).
        auxiliary: what parts of the loss learn beside the student.
    """

    def __init__(
        self,
        student: Student,
        config: Config,
        schedule: Schedule,
        tokenizer: Tokenizer,
        data: TrainingData,
        out: Path,
        validate: Callable[[Student], dict[str, float]],
        watch: Callable[[str, dict[str, Any]], None],
        extra: Mapping[str, Any],
        auxiliary: Auxiliary | None = None,
    ) -> None:
        super().__init__()
        self.student, self.run_config, self.schedule, self.tokenizer = student, config, schedule, tokenizer
        self.data, self.out, self.validate, self.watch, self.extra = data, out, validate, watch, extra
        self.order = Order.of(data, config.train, config.seed)
        self.auxiliary = auxiliary
        if isinstance(student.encoder, Conformer):
            student.encoder.mixing = config.augment.mix_style
        self.average: Average | None = None
        self.first_batch = 0
        self.restored: dict[str, Any] | None = None
        self.sums: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.last_epoch: dict[str, Any] = {"train_loss": math.nan, "val_loss": math.nan}
        self.with_gradient: set[str] = set()
        self.pending: list[str] = []  # recordings of the update under way
        self.save_due = False
        self.stop_requested = threading.Event()
        self.stopping = False  # some process was asked to
        self.gradient_norm = 0.0
        self.last_saved = 0
        self.stage = -1
        self.watched_stage = -1  # `frozen` was copied at its start
        self.frozen: FrozenParts | None = None
        self.trainable: set[str] = set()
        self.skipped = 0  # batches that led to no update
        self.history: list[dict[str, Any]] = []  # one row an epoch
        self.hopeless: Finding | None = None
        self.current = 0

    # --- start and resume -------------------------------------------------------------------------------

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same run."""
        self.restored = checkpoint
        self.student.load_state_dict(checkpoint["model_state_dict"])
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(checkpoint[AUXILIARY])
        self.first_batch = int(checkpoint["batch"]) + 1
        self.sums, self.best = dict(checkpoint["sums"]), dict(checkpoint["best"])
        self.last_epoch = dict(checkpoint["last_epoch"])
        self.with_gradient = set(checkpoint["with_gradient"])
        self.trainable, self.skipped = set(checkpoint["trainable"]), int(checkpoint["skipped"])
        self.history = list(checkpoint["history"])
        self.last_saved = self.first_batch // self.schedule.accumulate

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The learning rate is set before every update."""
        beside = [self.auxiliary] if self.auxiliary is not None else []
        return AdamW([self.student, *beside], self.run_config.train.weight_decay)

    def on_train_start(self) -> None:
        """Puts the optimiser (and the loss scaler of 16-mixed) back where the checkpoint left them."""
        if self.data.curriculum is not None:
            require_same_order(self.data.curriculum.order)
        self.set_stage(self.schedule.stage_of_epoch(self.schedule.epoch_of_batch(self.first_batch)))
        if self.run_config.train.average != "none":
            self.average = Average(self.student, self.run_config.train, self.schedule.updates)
        if self.restored is not None:
            if self.average is not None:
                self.average.restore(self.restored["average"])
            self.trainer.strategy.load_optimizer_state_dict(self.restored)
            precision = self.trainer.precision_plugin
            if type(precision).__qualname__ in self.restored:
                precision.load_state_dict(self.restored[type(precision).__qualname__])
            self.restored = None

    def set_stage(self, stage: int) -> None:
        """Freezes and thaws what the stage asks for; frozen parts are in eval mode (no BatchNorm drift)."""
        if stage == self.stage:
            return
        self.stage = stage
        self.student.train()
        self.student.encoder.requires_grad_(True)
        for name in self.run_config.train.frozen_parts(self.schedule.stages[stage]):
            part = self.student.get_submodule(name).requires_grad_(False).eval()
            part.zero_grad()  # of batches before this stage, of an update that it begins within
        self.watch("stage", {"parameters": self.student.parameter_counts()})

    def watch_frozen(self, stage: int) -> None:
        """At the start of a stage (-1: the run is over) says what of the last one's frozen parts has moved."""
        if stage == self.watched_stage:
            return
        if self.frozen is not None:
            moved, of = self.frozen.moved(self.student), len(self.frozen.copies)
            update = self.update_of(self.current)
            self.watch("frozen", {"update": update, "stage": self.watched_stage + 1, "of": of, "moved": moved})
        self.watched_stage = stage
        parts = self.run_config.train.frozen_parts(self.schedule.stages[stage]) if stage >= 0 else ()
        self.frozen = FrozenParts(self.student, parts) if parts else None

    # --- one batch ---------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning does not know how to move a `Batch`."""
        return batch.to(device)

    def number(self, batch_idx: int) -> int:
        """Number of a batch in the whole run."""
        return self.first_batch + batch_idx

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets stage, learning rate and random state as functions of the batch number."""
        number = self.number(batch_idx)
        stage = self.schedule.stage_of_epoch(self.schedule.epoch_of_batch(number))
        self.watch_frozen(stage)
        self.set_stage(stage)
        self.current = number
        own = collective.rank() * NEXT_PROCESS
        torch.manual_seed((self.run_config.seed * 1_000_003 + number + own) % 2**63)
        rate = self.schedule.learning_rate(number // self.schedule.accumulate)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, times the part in it of this process and, because DDP takes the mean, their number.

        Raises:
            TrainingError: it is not finite; the recordings are named and nothing has been updated.
        """
        share = self._share(self.number(batch_idx))
        if collective.count() > 1:
            for module in self.student.modules():
                if isinstance(module, MaskedBatchNorm):
                    module.counted = share > 0
        progress = self.progress(self.number(batch_idx))
        parts = loss_parts(self.student, batch, self.run_config, self.tokenizer, self.auxiliary, progress)
        loss = weighted_sum(parts, self.run_config, progress)
        self.pending += batch.recordings if share else []
        values = self._of_all({"loss": loss, **parts}, share)
        if not math.isfinite(values["loss"]):
            self._refuse(f"the loss is {values['loss']}")
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["batches"] = self.sums.get("batches", 0.0) + 1
        return loss * (share * collective.count())

    def _share(self, number: int) -> float:
        """Part of a batch's recordings that this process has."""
        if collective.count() == 1:
            return 1.0
        whole = self.order.batch(number)
        return len(whole[collective.rank() :: collective.count()]) / len(whole)

    def _of_all(self, values: Mapping[str, Tensor], share: float) -> dict[str, float]:
        """Values of the whole batch, of means over the recordings of each process; also whether any is to stop."""
        if collective.count() == 1:
            return {name: float(value.detach()) for name, value in values.items()}
        asked = self.stop_requested.is_set()
        own = torch.stack([value.detach().double() for value in values.values()]) * share
        *sums, stopping = collective.total(torch.cat([own, own.new_tensor([asked])])).tolist()
        self.stopping = stopping > 0
        return dict(zip(values, sums, strict=True))

    def _refuse(self, what: str) -> None:
        recordings = [recording for own in collective.everyones(self.pending) for recording in own]
        shown = ", ".join(recordings[:16]) + (" ..." if len(recordings) > 16 else "")
        raise TrainingError(
            f"Training stopped before an update: {what}, in the batch of recordings {shown}.",
            f"Check them with 'xded corpus check'; weights before this update are in {self.out / 'latest.pt'}.",
        )

    def on_after_backward(self) -> None:
        """Notes which parameters really receive a gradient."""
        done = int(self.sums.get("batches", 0))
        if done <= GRADIENT_WATCH:
            for name, parameter in self.student.named_parameters():
                if parameter.requires_grad:
                    self.trainable.add(name)
                if name not in self.with_gradient and parameter.grad is not None and parameter.grad.any():
                    self.with_gradient.add(name)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm; a gradient that is not finite stops the run before the update."""
        update = self.update_of(self.current)
        if is_logged(update):
            self.watch("gradients", {"update": update, **gradient_norms(self.student, self.tokenizer.blank)})
        clip = cast(AdamW, optimizer).clip
        self.gradient_norm = float(clip(0, self.run_config.train.gradient_clip))
        if self.auxiliary is not None:  # by itself: what it learns must not shorten the student's steps
            clip(1, self.run_config.train.gradient_clip)
        if not math.isfinite(self.gradient_norm) and "16-mixed" not in str(self.trainer.precision):
            self._refuse(f"the gradient's norm is {self.gradient_norm}")
        self.skipped += not math.isfinite(self.gradient_norm)  # the loss scaler of 16-mixed leaves the update out

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs, validates at epoch ends, saves when due, stops when asked."""
        number = self.number(batch_idx)
        updated = (number + 1) % self.schedule.accumulate == 0 or number + 1 == self.total_batches
        update = self.update_of(number)
        self.skipped += not outputs  # of `training_step`: without a loss there is no update
        if updated:
            self.pending = []
            if self.average is not None:
                self.average.take(update)
            rate = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
            self.watch("step", self._step_row(number, update, rate))
        ends_epoch = (number + 1) % self.schedule.batches_per_epoch == 0
        if ends_epoch:
            self._end_epoch(number)
        self.save_due |= ends_epoch or update - self.last_saved >= self.run_config.train.save_every_steps
        stopping = self.stopping if collective.count() > 1 else self.stop_requested.is_set()
        if updated and (self.save_due or stopping):
            self.save(self.out / LATEST, number)
            self.save_due, self.last_saved = False, update
        if updated and stopping and number + 1 < self.total_batches:
            raise InterruptedRunError(f"Stopped on request after update {update}.", GO_ON)
        if updated and self.hopeless is not None and number + 1 < self.total_batches:
            raise CollapsedRunError(self.hopeless)

    def update_of(self, number: int) -> int:
        """Update (from 1) that a batch belongs to; the last one may have fewer batches than the others."""
        return number // self.schedule.accumulate + 1

    def progress(self, number: int) -> float:
        """Share of the run that is over at a batch's update: 0 at the first one, 1 at the last."""
        return (self.update_of(number) - 1) / max(1, self.schedule.updates - 1)

    @property
    def total_batches(self) -> int:
        """Batches of the whole run."""
        return self.schedule.epochs * self.schedule.batches_per_epoch

    def _means(self) -> dict[str, float]:
        batches = max(1.0, self.sums.get("batches", 1.0))
        return {name: value / batches for name, value in self.sums.items() if name != "batches"}

    def _step_row(self, number: int, update: int, rate: float) -> dict[str, Any]:
        epoch = self.schedule.epoch_of_batch(number)
        return {
            "epoch": epoch + 1,
            "epochs": self.schedule.epochs,
            "update": update,
            "updates": self.schedule.updates,
            "stage": self.stage + 1,
            "lr": rate,
            "gradient_norm": self.gradient_norm,
            **self._means(),
        }

    # --- epoch ends and saving -----------------------------------------------------------------------------

    def _end_epoch(self, number: int) -> None:
        epoch = self.schedule.epoch_of_batch(number) + 1
        due = epoch % self.run_config.train.validate_every_epochs == 0 or epoch == self.schedule.epochs
        means = self._means()
        self.sums = {}
        measured: dict[str, float] = {}
        if due:
            with self.tested():
                own = self.validate(self.student) if collective.rank() == 0 else {}
            measured = collective.everyones(own)[0]
            self.stage = -1  # validation left everything in eval mode: the next batch sets the stage anew
        self.last_epoch = {
            "train_loss": means["loss"],
            "val_loss": measured.get("val_loss", self.last_epoch["val_loss"]),
        }
        row = {f"train_{name}": value for name, value in means.items()}
        self.history.append({"epoch": epoch, "update": self.update_of(number), **row, **measured})
        self.watch("epoch", self.history[-1])
        if self.average is not None and measured:
            measured["averaged"] = self.average.count
        if due and (not measured or not self.best or worth(measured) > worth(self.best)):
            self.best = {"epoch": epoch, **measured}  # without validation recordings the last epoch
            self.save(self.out / "best.pt", number)
        if epoch % self.run_config.train.checkpoint_every_epochs == 0:
            self.save(self.out / f"checkpoint_epoch_{epoch}.pt", number)
        if measured and self.run_config.train.stop_on_collapse:
            self.hopeless = collapsed(self.history, self.schedule.epochs, str(self.out))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what resuming and using the model need."""
        checkpoint.update(self.extra)
        if self.auxiliary is not None:
            checkpoint[AUXILIARY] = self.auxiliary.state_dict()
        checkpoint.update(
            epoch=self.schedule.epoch_of_batch(self.saving) + 1,
            batch=self.saving,
            sums=dict(self.sums),
            best=dict(self.best),
            last_epoch=dict(self.last_epoch),
            train_loss=self.last_epoch["train_loss"],
            val_loss=self.last_epoch["val_loss"],
            with_gradient=sorted(self.with_gradient),
            trainable=sorted(self.trainable),
            skipped=self.skipped,
            history=list(self.history),
        )
        if self.average is not None and self.to_go_on:
            checkpoint["average"] = self.average.state()
        elif self.average is not None:
            checkpoint["averaged"] = self.average.count

    def tested(self) -> AbstractContextManager[None]:
        """The student has the weights that are tested: the averaged ones where the config says so."""
        return nullcontext() if self.average is None else self.average.in_place()

    def save(self, path: Path, number: int) -> None:
        """Writes a checkpoint after batch `number`."""
        self.saving, self.to_go_on = number, path.name == LATEST
        with nullcontext() if self.to_go_on else self.tested():
            self.trainer.save_checkpoint(path)
        self.watch("saved", {"path": path.name, "best": dict(self.best), **self.gradient_facts()})

    def gradient_facts(self) -> dict[str, Any]:
        """Who received a gradient, who should have but did not, and batches without an update."""
        unused = unused_parts(self.run_config.objective)
        silent = [name for name in self.trainable - self.with_gradient if name.split(".")[0] not in unused]
        return {"with_gradient": sorted(self.with_gradient), "silent": sorted(silent), "skipped": self.skipped}

    def on_train_end(self) -> None:
        """Last look at the frozen parts."""
        self.watch_frozen(-1)


class StopOnSignal(L.Callback):
    """Turns the first of its signals into 'finish the update, save, stop'; a second one stops at once.

    A callback, because Lightning installs a SIGTERM handler of its own that ends the run after the batch without
    saving: this one takes its place when training starts. Lightning puts the caller's handlers back at the end.
    """

    def __init__(self, event: threading.Event, signals: Collection[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.event, self.signals = event, signals

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers (possible in the main thread only)."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()
