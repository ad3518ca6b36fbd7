"""What a run writes down about itself, so that it can be examined later: gradients, frozen parts, audio heard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from xded.config import ObjectiveConfig
from xded.corpus.manifest import Recording
from xded.models import collective
from xded.models.student import Student
from xded.training.data import TrainingData
from xded.training.status import write_atomically

DATA_CARD = "data.json"
CTC_PARTS = ("ctc_head",)
DECODER_PARTS = ("embedding", "decoder", "decoder_head")


def group_of(name: str) -> str:
    """Part of the recogniser that a parameter belongs to: `subsampling`, `encoder.3`, `decoder.0`, `ctc_head` ..."""
    first, *rest = name.split(".")
    if first == "encoder":
        return rest[0] if rest[0] != "layers" else f"encoder.{rest[1]}"
    if first == "decoder":
        return f"decoder.{rest[1]}" if rest[0] == "layers" else f"decoder_{rest[0]}"
    return first


def unused_parts(objective: ObjectiveConfig) -> tuple[str, ...]:
    """First names of the parameters that the objective does not use: they receive no gradient, rightly."""
    parts = {"ctc": CTC_PARTS, "decoder": DECODER_PARTS}
    return tuple(name for head, names in parts.items() if head not in objective.heads for name in names)


def gradient_norms(student: Student, blank: int) -> dict[str, Any]:
    """L2 norms of the gradient by part; for the CTC head also of the blank's row and the mean of the other rows."""
    squares: dict[str, float] = {}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            group = group_of(name)
            squares[group] = squares.get(group, 0.0) + float(parameter.grad.detach().float().square().sum())
    row: dict[str, Any] = {"norms": {group: square**0.5 for group, square in squares.items()}}
    head = student.ctc_head.weight.grad
    if head is not None:
        rows = head.detach().float().norm(dim=1)  # [V]
        row["blank"] = float(rows[blank])
        row["rows"] = float((rows.sum() - rows[blank]) / max(1, len(rows) - 1))
    return row


class FrozenParts:
    """A copy of what must not move, compared with the student when its stage ends."""

    def __init__(self, student: Student, parts: Iterable[str]) -> None:
        # by identity: a part's name need not begin the names of its tensors
        kept = {
            id(value) for part in parts for value in student.get_submodule(part).state_dict(keep_vars=True).values()
        }
        everything = student.state_dict(keep_vars=True)
        self.copies = {name: value.detach().clone() for name, value in everything.items() if id(value) in kept}

    def moved(self, student: Student) -> list[str]:
        """Names of the parameters and buffers that changed."""
        now = student.state_dict()
        return [name for name, before in self.copies.items() if not torch.equal(before, now[name])]


def loaded(student: nn.Module, weights: Mapping[str, Tensor], of: Iterable[str] | None = None) -> dict[str, Any]:
    """How many of the student's tensors (default: all; else those named) are those that it starts from."""
    own = student.state_dict()
    meant = list(own if of is None else of)
    differing = [name for name in meant if name not in weights or not torch.equal(own[name], weights[name])]
    return {"tensors": len(meant) - len(differing), "of": len(meant), "differing": differing}


class DataCard:
    """RUN/data.json: whose audio was really opened, beside who was meant. Written until both sides were served whole,
    and at the end of the run at the latest.

    Args:
        out: run folder; sides: `train` and `validation` as they are served; meant: their recordings as the split named
            them; corpus: recordings that say whose a file is; test_takes: of the fold.
    """

    def __init__(
        self,
        out: Path,
        sides: Mapping[str, TrainingData],
        meant: Mapping[str, Sequence[Recording]],
        corpus: Sequence[Recording],
        test_takes: Iterable[str],
    ) -> None:
        self.out, self.sides, self.meant, self.corpus, self.test_takes = out, sides, meant, corpus, test_takes
        self.due = True

    def end_epoch(self, *, validated: bool, before: Iterable[Sequence[int]] | None = None) -> None:
        """Writes the card when every training recording was served since this process was started, or the run ends.

        Batches of words serve everyone in several epochs only: a run may end before, or have gone on in between.

        Args:
            before: at the end of the run, the batches (as in `training.order`) that earlier processes were served. If
                they left no card, their recordings are opened again.
        """
        if not self.due:
            return
        data = self.sides["train"]
        late = before is not None and not (self.out / DATA_CARD).is_file()
        for index in {index % len(data) for batch in before or () for index in batch} if late else ():
            if data.recordings[index].recording not in data.opened:
                data.plain()[0, index]
        _gather(data)
        if late or len(data.opened) == len(data):
            self.due = bool(self.meant["validation"]) and not validated
            if collective.rank() == 0:
                write_atomically(self.out / DATA_CARD, json.dumps(self.content(), indent=1))

    def content(self) -> dict[str, Any]:
        """What the card says."""
        owner = {row.audio_filepath: row.speaker for rows in (*self.meant.values(), self.corpus) for row in rows}
        card: dict[str, Any] = {"takes": {side: sorted({r.take for r in rows}) for side, rows in self.meant.items()}}
        card["takes"]["test"] = sorted(self.test_takes)
        for side, data in self.sides.items():
            opened = list(data.opened.values())
            card[side] = {
                "meant": dict(sorted(Counter(row.speaker for row in self.meant[side]).items())),
                "heard": dict(sorted(Counter(owner[path] for path in opened if path in owner).items())),
                "files": len(set(opened)),
                "strangers": len({path for path in opened if path not in owner}),
                "spread": fmean(data.spread.values()) if data.spread else None,
            }
        return card


def _gather(data: TrainingData) -> None:
    """Adds to what this process has opened, and measured of it, what the others have."""
    own = [{recording: str(path) for recording, path in data.opened.items()}, data.spread]
    for opened, spread in collective.everyones(own):
        data.opened |= {recording: Path(path) for recording, path in opened.items()}
        data.spread |= spread
