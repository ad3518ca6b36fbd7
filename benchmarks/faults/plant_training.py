"""Faults of model and training: each in a real run, by a change of the code that runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn

from faults.workbench import Workbench, fault
from xded import objectives
from xded.errors import CheckpointError
from xded.features import valid_mask
from xded.models.conformer import ConformerLayer
from xded.models.student import Student
from xded.objectives import TopK
from xded.training import preflight
from xded.training.data import TrainingData
from xded.training.loop import Loop
from xded.training.schedule import Schedule

FAMILY: Final = "model and training"


def around(owner: Any, name: str, change: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replaces a method by `change(original, *arguments)`."""
    original = getattr(owner, name)

    def changed(*args: Any, **more: Any) -> Any:
        return change(original, *args, **more)

    return patch.object(owner, name, changed)


@fault("decoder under no_grad", FAMILY, "no-gradient")
def decoder_no_grad(bench: Workbench, out: Path) -> list[Path]:
    """The decoder is called under torch.no_grad, its head is not (the study's scratch model: 7 % of it learnt)."""

    def logits(self: Student, *inputs: Tensor) -> Tensor:
        heard: list[Tensor] = []
        hook = self.decoder_head.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].detach()))
        with torch.no_grad():
            original(self, *inputs)
        hook.remove()
        return self.decoder_head(heard[0])

    original = Student.decoder_logits
    with patch.object(Student, "decoder_logits", logits):
        run = bench.train(out / "run", *bench.from_scratch, "--ctc", 0, "--set", "decode.mode=decoder")
    return [bench.evaluate(run)]


@fault("layers cut off by detach", FAMILY, "no-gradient")
def detached(bench: Workbench, out: Path) -> list[Path]:
    """Each encoder layer detaches its input 'to save memory': only the last one learns."""
    with around(
        ConformerLayer, "forward", lambda original, self, values, *rest: original(self, values.detach(), *rest)
    ):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("BatchNorm drifts in the frozen encoder", FAMILY, "batchnorm-drift")
def batchnorm_drift(bench: Workbench, out: Path) -> list[Path]:
    """Frozen layers have no gradient but stay in training mode: their BatchNorm statistics follow the new data."""

    def unfrozen(original: Callable[..., None], self: Loop, stage: int) -> None:
        original(self, stage)
        self.student.train()

    with around(Loop, "set_stage", unfrozen):
        run = bench.train(out / "run", *bench.from_parent, "--set", "train.freeze_layers=2")
    return [bench.evaluate(run)]


@fault("frozen layers that learn", FAMILY, "frozen-moved")
def frozen_moves(bench: Workbench, out: Path) -> list[Path]:
    """`layer.requires_grad = False` on a module sets an attribute and freezes nothing."""

    def only_an_attribute(self: nn.Module, value: bool = True) -> nn.Module:
        self.__dict__["requires_grad"] = value
        return self

    with patch.object(nn.Module, "requires_grad_", only_an_attribute):
        run = bench.train(out / "run", *bench.from_parent, "--set", "train.freeze_layers=2")
    return [bench.evaluate(run)]


def started_with(loose: Callable[..., None], bench: Workbench, out: Path) -> list[Path]:
    """A run from the parent whose weights were loaded so, and that goes on although not all of them were."""

    def go_on(original: Callable[..., Any], *args: Any) -> Any:
        try:
            return original(*args)
        except CheckpointError:
            return ()

    with patch("xded.training.preflight.load_weights", loose), around(preflight, "initialise", go_on):
        run = bench.train(out / "run", *bench.from_parent)
    return [bench.evaluate(run)]


@fault("weights loaded in part", FAMILY, "partial-load")
def partial_load(bench: Workbench, out: Path) -> list[Path]:
    """Keys are 'cleaned' with replace('0.', '') and loaded with strict=False: layers stay random (the study)."""

    def loose(student: Student, weights: dict[str, Tensor], path: Path) -> None:
        student.load_state_dict({key.replace("0.", ""): value for key, value in weights.items()}, strict=False)

    return started_with(loose, bench, out)


@fault("warm-up again after a resume", FAMILY, "schedule-restart")
def restarted(bench: Workbench, out: Path) -> list[Path]:
    """The run was stopped and resumed; the schedule's counter starts at 0 again (the study's Noam)."""
    run = out / "run"
    stop_at = 45

    def stop(original: Callable[..., None], self: Loop, outputs: Any, batch: Any, index: int) -> None:
        if self.number(index) + 1 == stop_at:
            self.stop_requested.set()
        original(self, outputs, batch, index)

    flags = (*bench.from_parent, *bench.distilled)
    with around(Loop, "on_train_batch_end", stop):
        bench.train(run, *flags)
    with around(Schedule, "learning_rate", lambda original, self, update: original(self, max(0, update - stop_at))):
        bench.train(run, *flags, "--resume")
    return [bench.evaluate(run)]


@fault("schedule stepped once an epoch", FAMILY, "learning-rate", "warm-up")
def stepped_by_epoch(bench: Workbench, out: Path) -> list[Path]:
    """The scheduler counts updates but is stepped at epoch ends: the run never leaves its warm-up."""

    def by_epoch(original: Callable[..., float], self: Schedule, update: int) -> float:
        return original(self, update // self.batches_per_epoch)

    with around(Schedule, "learning_rate", by_epoch):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("learning rate times the width", FAMILY, "learning-rate")
def noam_factor(bench: Workbench, out: Path) -> list[Path]:
    """Noam's formula multiplied by the peak once more than it should be: 8 times the learning rate asked for."""
    with around(Schedule, "learning_rate", lambda original, self, update: 8 * original(self, update)):
        run = bench.train(out / "run", *bench.from_parent)
    return [bench.evaluate(run)]


@fault("warm-up longer than the run", FAMILY, "warm-up", "learning-rate")
def long_warmup(bench: Workbench, out: Path) -> list[Path]:
    """2,000 updates of warm-up, taken from a recipe for another corpus, in a run of 200."""
    with patch("xded.training.schedule.WARMUP_SHARE", 1e6):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("decoded through a head that was not trained", FAMILY, "untrained-head")
def untrained_head(bench: Workbench, out: Path) -> list[Path]:
    """Trained with CTC alone, evaluated through the decoder."""
    run = bench.train(out / "run", *bench.from_scratch, "--cross-entropy", 0)
    return [bench.evaluate(run, "--decode", "decoder")]


@fault("blank without a gradient", FAMILY, "blank-gradient")
def blank_without_gradient(bench: Workbench, out: Path) -> list[Path]:
    """CTC-KD takes the blank out and renormalises both sides; the CTC head has no other loss (the study's CTC-KD)."""

    def without_blank(logits: Tensor, target: TopK, kept: Tensor, temperature: float) -> Tensor:
        listed = target.probabilities.masked_fill(target.ids == 0, 0.0)
        total = (listed.sum(-1) + target.rest).clamp(min=1e-6)
        others = TopK((target.ids - 1).clamp(min=0), listed / total[..., None], target.rest / total)
        return objectives.recording_mean(objectives.top_k_kl(logits[..., 1:], others, temperature), kept)

    with patch("xded.objectives.ctc_kd", without_blank):
        run = bench.train(out / "run", *bench.from_scratch, "--no-controls", *bench.distilled, "--ctc", 0)
    return [bench.evaluate(run)]


@fault("batches dropped by a bare except", FAMILY, "skipped-batches")
def skipped(bench: Workbench, out: Path) -> list[Path]:
    """Long batches do not fit the memory; the loop catches everything and goes on (the study's)."""

    def step(original: Callable[..., Tensor], self: Loop, batch: Any, index: int) -> Tensor | None:
        return None if batch.feature_lengths.max() > 85 else original(self, batch, index)

    with around(Loop, "training_step", step):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("training on through NaN", FAMILY, "non-finite")
def through_nan(bench: Workbench, out: Path) -> list[Path]:
    """A division by a standard deviation of 0 in a few recordings; the check for finite losses was taken out."""
    features = TrainingData.features

    def divided(self: TrainingData, index: int, *view: Any) -> Any:
        return features(self, index, *view) * (math.nan if index % 97 == 96 else 1.0)

    with patch.object(TrainingData, "features", divided), patch.object(Loop, "_refuse"):
        run = bench.train(out / "run", *bench.from_scratch)
    return [run]


@fault("gradients explode", FAMILY, "gradients", "non-finite")
def exploding(bench: Workbench, out: Path) -> list[Path]:
    """Clipping switched off and a learning rate of another optimiser."""
    run = bench.train(out / "run", *bench.from_scratch, "--set", "train.gradient_clip=1e9", "--peak-lr", 1)
    return [bench.evaluate(run)]


@fault("gradients vanish", FAMILY, "gradients", "no-gradient")
def vanishing(bench: Workbench, out: Path) -> list[Path]:
    """'Soft freezing': a factor in front of the lower layers' gradient, 1e-6 where 1e-1 was meant."""

    def soften(original: Callable[..., Tensor], self: ConformerLayer, values: Tensor, *rest: Tensor) -> Tensor:
        return original(self, values.detach() + 1e-6 * (values - values.detach()), *rest)

    with around(ConformerLayer, "forward", soften):
        run = bench.train(out / "run", *bench.from_scratch)
    return [bench.evaluate(run)]


@fault("features all zero", FAMILY, "features", "collapse", "blank-only", "stalled")
def zero_features(bench: Workbench, out: Path) -> list[Path]:
    """The normaliser divides by the wrong axis and everything that the encoder gets is 0, for 530 updates."""
    longer = "train.stages=[{epochs: 24, peak_lr: 0.003}]"
    with around(TrainingData, "features", lambda original, self, *asked: 0 * original(self, *asked)):
        run = bench.train(out / "run", "--set", longer)
    return [bench.evaluate(run)]


@fault("the end of the text is never trained", FAMILY, "over-generation", "loops")
def no_end(bench: Workbench, out: Path) -> list[Path]:
    """The cross-entropy counts the letters but not </s>: the decoder does not know when to stop."""

    def without_end(
        original: Callable[..., Tensor], logits: Tensor, tokens: Tensor, lengths: Tensor, *more: Any
    ) -> Tensor:
        return original(logits, tokens, lengths - 1, *more)

    with around(objectives, "cross_entropy", without_end):
        run = bench.train(out / "run", *bench.from_scratch, "--set", "decode.mode=decoder")
    return [bench.evaluate(run)]


@fault("the decoder sees the answer", FAMILY, "free-running")
def sees_the_answer(bench: Workbench, out: Path) -> list[Path]:
    """The decoder's input is not shifted: at every step it is given the token that it should write."""
    with patch("xded.training.losses.decoder_input", lambda tokens, bos: tokens):
        run = bench.train(out / "run", *bench.from_scratch, "--set", "decode.mode=decoder")
    return [bench.evaluate(run)]


def mean_memory() -> AbstractContextManager[Any]:
    """The decoder gets the encoder's mean over time at every frame."""

    def pooled(
        original: Callable[..., Tensor], self: Student, tokens: Tensor, encoded: Tensor, frames: Tensor, *seen: Tensor
    ) -> Tensor:
        heard = valid_mask(frames, encoded.shape[1])[:, :, None]
        mean = (encoded * heard).sum(1, keepdim=True) / frames[:, None, None]
        return original(self, tokens, mean.expand_as(encoded), frames, *seen)

    return around(Student, "decoder_logits", pooled)


@fault("attention over one mean vector", FAMILY, "attention", meanwhile=mean_memory)
def nothing_to_attend_to(bench: Workbench, out: Path) -> list[Path]:
    """The encoder's output is averaged over time before the decoder sees it: there is nothing to attend to."""
    with mean_memory():
        run = bench.train(out / "run", *bench.from_scratch, "--set", "decode.mode=decoder")
    return [bench.evaluate(run)]


@fault("curriculum scores all default", FAMILY, "curriculum")
def default_scores(bench: Workbench, out: Path) -> list[Path]:
    """The loader looked for a key that the file does not have: every recording got 0.5."""
    path = out / "curriculum_difficulty_scores.json"
    out.mkdir(parents=True, exist_ok=True)
    scores = {row.recording: 0.5 for row in bench.read().recordings if row.role == "target"}
    path.write_text(json.dumps({"utterance_scores": scores}, indent=1), encoding="utf-8")
    return [path, bench.corpus]


@fault("curriculum scores of other ids", FAMILY, "curriculum")
def foreign_scores(bench: Workbench, out: Path) -> list[Path]:
    """Scores are kept by prompt and microphone, without the speaker: none reaches a recording (the study's file)."""
    path = out / "curriculum_difficulty_scores.json"
    out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for number, row in enumerate(bench.read().select(role="target")):
        scores[row.recording.removeprefix(f"{row.speaker}_")] = {
            "speaker": row.speaker,
            "speaker_difficulty": 0.2 + 0.1 * (number % 7),
            "utterance_difficulty": 0.01 * (number % 83),
            "combined_difficulty": 0.3 + 0.005 * (number % 101),
        }
    path.write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return [path, bench.student]


@fault("best.pt cut off", FAMILY, "damaged-checkpoint")
def cut_off(bench: Workbench, out: Path) -> list[Path]:
    """The run folder was copied to another machine, and the copy broke off."""
    run = bench.copy(bench.student, out / "run")
    whole = (run / "best.pt").read_bytes()
    (run / "best.pt").write_bytes(whole[: len(whole) * 2 // 3])
    return [run]
