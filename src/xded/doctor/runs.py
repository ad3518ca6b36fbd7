"""The doctor's look at run folders and checkpoints: records, weights, and what they say of each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xded import config as configs
from xded.checks import curriculum, learning, rates, training, weights
from xded.checks.data import Named
from xded.config import Config
from xded.doctor.given import Given
from xded.doctor.run_folder import RunFolder
from xded.errors import CheckpointError, ConfigError
from xded.findings import Examination, Finding
from xded.models.checkpoints import load, sidecar
from xded.models.recogniser import resolve
from xded.models.student import Student
from xded.training.difficulty import DIFFICULTY
from xded.training.monitor import unused_parts
from xded.training.schedule import Schedule

KEPT = ("best.pt", "latest.pt")  # of a run's checkpoints: what is used, and what is newest
LARGEST_SCORES = 100_000_000  # bytes

Payload = dict[str, Any]
Weights = Mapping[str, Tensor]


def examine(examination: Examination, given: Given) -> None:
    """Every run and checkpoint that was given, and difficulty scores."""
    starts: dict[Path, Weights | None] = {}  # teachers share their parent
    for run in given.runs:
        _Run(examination, run, starts).examine()
    recordings: list[Named] = [row for corpus in given.corpora for row in corpus.recordings]
    recordings += [row for listing in given.listings for row in listing.recordings]
    for path in given.difficulty:
        examine_difficulty(examination, path, recordings)


def is_difficulty(path: Path) -> bool:
    """Whether a file holds difficulty scores."""
    if path.suffix != ".json" or path.stat().st_size > LARGEST_SCORES:
        return False
    try:
        return curriculum.is_difficulty(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return False


def examine_difficulty(examination: Examination, path: Path, recordings: Sequence[Named]) -> None:
    """Difficulty scores, against the recordings where there are any."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        examination.cannot(str(path), f"it cannot be read: {error}.")
        return
    if not isinstance(data, dict):
        examination.cannot(str(path), f"it holds a {type(data).__name__}, not a table of scores.")
        return
    subject = str(path)
    examination.run(
        "curriculum", subject, lambda: curriculum.curriculum(data, subject, recordings), f"{len(data)} keys"
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class _Run:
    """One run; each of its checkpoints is read at most once."""

    def __init__(self, examination: Examination, run: RunFolder, starts: dict[Path, Weights | None]) -> None:
        self.examination, self.run, self.starts = examination, run, starts
        self.subject = str(run.path)
        self.status = _table(run.status)
        self.config = run.config
        self.students: dict[int, Student] = {}  # by vocabulary, as before training

    def examine(self) -> None:
        """Records first, then weights."""
        for problem in self.run.problems:
            self.examination.cannot(self.subject, problem)
        payloads = self._payloads()
        newest = payloads.get("latest.pt") or next(iter(payloads.values()), None)
        best = payloads.get("best.pt") or newest
        if self.config is None and best is not None:
            self.config = self._config_of(best)
        self._weights(payloads)
        if self.run.rows:
            self._rows()
        self._status(newest)
        if (self.run.path / DIFFICULTY).is_file():  # its scores are of the training recordings alone: all have one
            examine_difficulty(self.examination, self.run.path / DIFFICULTY, ())
        if newest is not None:
            self._against_start(newest)
        else:
            self._silent([], {})
        if self.config is not None:
            self._heads(self.config)
            if self.run.rows:
                self._rates(self.config)

    def _note(self, check: str, subject: str, found: Sequence[Finding], detail: str = "") -> None:
        """Notes what a check found."""
        self.examination.run(check, subject, lambda: found, detail)

    def _several(self, checks: Iterable[str], found: Sequence[Finding], detail: str) -> None:
        """Notes the findings of several checks that were run together."""
        for check in checks:
            self._note(check, self.subject, [finding for finding in found if finding.check == check], detail)

    # --- reading -------------------------------------------------------------------------------------------

    def _payloads(self) -> dict[str, Payload]:
        """The checkpoints that are looked at: of a folder best and latest, otherwise the file."""
        paths = self.run.checkpoints
        wanted = {name: paths[name] for name in KEPT if name in paths} or dict(list(paths.items())[-1:])
        payloads = {}
        for name, path in wanted.items():
            payload = self._load(path, own=self.run.path.is_dir() or sidecar(path).is_file())
            if payload is not None:
                payloads[name] = payload
        return payloads

    def _load(self, path: Path, *, own: bool) -> Payload | None:
        """A checkpoint; a damaged one is a finding where it is a run's own, and a stranger cannot be checked."""
        try:
            payload = load(path)
        except CheckpointError as error:
            problem = error.problem
            if own:
                self.examination.run("damaged-checkpoint", str(path), lambda: [weights.damaged(path, problem)])
            else:
                self.examination.cannot(str(path), str(error))
            return None
        except OSError as error:
            self.examination.cannot(str(path), str(error))
            return None
        self.examination.run("damaged-checkpoint", str(path), lambda: [], "loaded")
        state = _table(payload["model_state_dict"])
        payload["model_state_dict"] = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        return payload

    def _config_of(self, payload: Payload) -> Config | None:
        try:
            return configs.build(_table(payload["config"]), f"the config in a checkpoint of {self.subject}")
        except ConfigError as error:
            self.examination.cannot(f"config of {self.subject}", error.problem)
            return None

    def _start(self, payload: Payload) -> Weights | None:
        """The weights that the run began with: of its init checkpoint, or made anew from its seed."""
        if self.config is None:
            return None
        if self.config.train.init is None:
            if self.config.model.pretrained is not None:
                return None  # its encoder began elsewhere
            student = self._student(payload)
            return None if student is None else student.state_dict()
        path = resolve(self._found(self.config.train.init))
        if path not in self.starts:
            start = self._load(path, own=True) if path.is_file() else None
            self.starts[path] = None if start is None else start["model_state_dict"]
            if start is None:
                self.examination.cannot(f"what moved since {path}", "that checkpoint cannot be read.")
        return self.starts[path]

    def _found(self, path: Path) -> Path:
        """A path of the config; a relative one was meant from where training ran: here, or a folder above the run."""
        folders = (Path(), *self.run.path.resolve().parents)
        return next((folder / path for folder in folders if (folder / path).exists()), path)

    def _student(self, payload: Payload) -> Student | None:
        """A model of the size in the config, as it is before training."""
        size = payload.get("vocabulary")
        if self.config is None or not isinstance(size, int) or size < 1:
            return None
        if size not in self.students:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.students[size] = Student(self.config.model, size, self.config.features)
        return self.students[size]

    # --- records ---------------------------------------------------------------------------------------------

    def _rows(self) -> None:
        rows, subject = self.run.rows, self.subject
        detail = f"{len(rows)} rows of metrics"
        mixed = self.config is not None and "16-mixed" in self.config.train.precision
        message = str(self.status.get("message") or "")
        run = self.examination.run
        run("non-finite", subject, lambda: training.non_finite(rows, subject, mixed=mixed, message=message), detail)
        clip = self.config.train.gradient_clip if self.config is not None else 1.0
        run("gradients", subject, lambda: training.gradients(rows, subject, clip), detail)
        watched = training.events(rows, "gradients", "blank")
        if watched:
            run("blank-gradient", subject, lambda: training.blank_gradient(rows, subject), f"{len(watched)} updates")
        frozen = training.events(rows, "frozen", "of")
        if frozen:
            detail = f"{len(frozen)} times"
            self._several(("frozen-moved", "batchnorm-drift"), training.frozen(rows, subject), detail)
        checked = learning.validated(training.events(rows, "epoch"))
        if checked:
            detail = f"{len(checked)} validations"
            symptoms = ("blank-only", "collapse", "over-generation", "loops")
            self._several(symptoms, self._symptoms(), detail)
            run("stalled", subject, lambda: learning.stalled(rows, subject), detail)
            if self.config is not None and self.config.decode.mode == "decoder":
                decode = self.config.decode
                run("free-running", subject, lambda: learning.free_running(rows, subject, decode), detail)
        run("validation", subject, lambda: learning.validation(rows, subject, self.run.data), detail)

    def _symptoms(self) -> list[Finding]:
        """Outputs at the end; where the loop would have stopped the run, its finding says it better."""
        mode = self.config.decode.mode if self.config is not None else "ctc"
        found = learning.outputs(self.run.rows, self.subject, mode)
        steps = training.events(self.run.rows, "step", "epochs")
        epochs = training.events(self.run.rows, "epoch")
        hopeless = learning.collapsed(epochs, int(steps[-1]["epochs"]), self.subject) if steps else None
        if hopeless is None:
            return found
        return [hopeless, *(finding for finding in found if finding.check not in ("blank-only", "collapse"))]

    def _status(self, newest: Payload | None) -> None:
        subject, status, run = self.subject, self.status, self.examination.run
        if status:
            run("unfinished", subject, lambda: learning.unfinished(status, subject))
        loaded = _table(status.get("loaded"))
        tensors, of = training.number(loaded, "tensors"), training.number(loaded, "of")
        if tensors is not None and of is not None:
            names = training.strings(loaded.get("differing"))
            run(
                "partial-load", subject, lambda: training.partial_load(subject, int(tensors), int(of), names),
                f"{tensors:.0f} tensors",
            )  # fmt: skip
        skipped = training.number(status, "skipped")
        steps, updates = self._steps(newest)
        if skipped is None and steps is None:
            return
        mixed = self.config is not None and "16-mixed" in self.config.train.precision
        updates = updates or int(training.number(status, "update") or 0)
        run(
            "skipped-batches", subject,
            lambda: training.skipped_batches(subject, int(skipped or 0), updates, steps=steps, mixed=mixed),
            f"{updates} updates",
        )  # fmt: skip

    def _steps(self, payload: Payload | None) -> tuple[int | None, int]:
        """Steps that the optimiser has made, and updates that the checkpoint says there were."""
        if payload is None or self.config is None or not isinstance(payload.get("batch"), int):
            return None, 0
        updates = (payload["batch"] + 1) // self.config.train.accumulate
        states = payload.get("optimizer_states")
        state = _table(_table(states[0]).get("state")) if isinstance(states, list) and states else {}
        steps = [float(_table(entry)["step"]) for entry in state.values() if "step" in _table(entry)]
        return (round(max(steps)), updates) if steps else (None, updates)

    def _rates(self, config: Config) -> None:
        rows, subject = self.run.rows, self.subject
        stages = config.stages_run
        steps = training.events(rows, "step", "update", "lr", "updates", "epochs")
        sizes = batches_per_epoch(rows, config.train.accumulate)
        if not steps or not stages or not sizes:
            self.examination.cannot(f"learning rate of {subject}", "metrics.jsonl has no complete step rows")
            return
        schedules = [Schedule.of(config.train, stages, size) for size in sizes]
        found = [rates.rates(rows, subject, schedule.learning_rate, stages) for schedule in schedules]
        checks = ("learning-rate", "warm-up", "schedule-restart")
        self._several(checks, min(found, key=len), f"{len(steps)} logged updates")

    def _heads(self, config: Config) -> None:
        """Heads that validation, and the evaluation in the folder, decode."""
        trained = training.trained_heads(config.objective)
        decoded = {"the config's decode section": training.heads_of(config.decode)}
        how = str(_table(_table(self.run.scores).get("conditions")).get("decode") or "")
        if how.startswith("word list"):
            listed = config.decode.model_copy(update={"word_list": True})
            decoded[f"scores.json: {how}"] = training.heads_of(listed)
        elif how.split(" ")[0] in training.HEADS:
            decoded[f"scores.json: {how}"] = {how.split(" ")[0]}
        found = []
        for number, (words, heads) in enumerate(decoded.items(), start=1):
            found += training.untrained_head(
                self.subject, heads, trained, words,
                inherited=config.train.init is not None, validation=number < len(decoded),
            )  # fmt: skip
        self.examination.run("untrained-head", self.subject, lambda: found, ", ".join(decoded))

    # --- weights ---------------------------------------------------------------------------------------------

    def _weights(self, payloads: Mapping[str, Payload]) -> None:
        """Best first; what is wrong with it is most likely wrong with the newest too, and said once."""
        for name, payload in payloads.items():
            subject, state = str(self.run.checkpoints[name]), payload["model_state_dict"]
            detail, before = f"{len(state)} tensors", len(self.examination.findings)
            self._note("non-finite", subject, weights.finite(state, subject), detail)
            self._note("untrained-head", subject, weights.same_head(state, subject), "the heads differ")
            student = self._student(payload)
            fits = [] if student is None else weights.fits(state, student, subject)
            fresh = weights.unmeasured(state, subject, self._frozen_prefixes())
            self._note("partial-load", subject, [*fits, *fresh], detail)
            self._tokenizer(payload, subject)
            if len(self.examination.findings) > before:
                return

    def _tokenizer(self, payload: Payload, subject: str) -> None:
        if isinstance(payload.get("tokenizer_model"), Tensor):
            self.examination.run("tokenizer-mismatch", subject, lambda: weights.tokenizer(payload, subject))

    def _frozen_prefixes(self) -> list[str]:
        """Prefixes of what no stage trains."""
        if self.config is None:
            return []
        train = self.config.train
        stages = self.config.stages_run or train.stages
        thawed = [stage for stage in stages if not stage.freeze_encoder] or stages[-1:]
        return [f"{name}." for name in min(map(train.frozen_parts, thawed), key=len)]

    def _against_start(self, payload: Payload) -> None:
        """What moved since the start that should not have, and what did not that should have."""
        state, start, frozen = payload["model_state_dict"], self._start(payload), self._frozen_prefixes()
        if start is not None and frozen and not training.events(self.run.rows, "frozen", "of"):
            names, of = weights.changed(start, state, frozen)
            found = training.moved(self.subject, names, of, "the run")
            self._several(("frozen-moved", "batchnorm-drift"), found, f"{of} tensors against the start")
        trainable = training.strings(payload.get("trainable"))
        still = weights.unmoved(start, state, trainable) if start is not None else []
        self._silent(still, state, payload)

    def _silent(self, still: Sequence[str], state: Weights, payload: Payload | None = None) -> None:
        """Parameters that no gradient reached, by the run's own account or because they did not move (`still`)."""
        known = self.status.get("silent")
        silent = set(training.strings(known)) | set(still)
        counts = _table(self.status.get("parameters"))
        sizes = {name: value.numel() for name, value in state.items() if not name.endswith(training.BATCHNORM)}
        trainable = training.strings((payload or {}).get("trainable"))
        if self.config is not None:
            unused = unused_parts(self.config.objective)
            reached = set(training.strings((payload or {}).get("with_gradient")))
            silent |= set(trainable) - reached
            silent = {name for name in silent if name.split(".")[0] not in unused}
        if not isinstance(known, list) and not trainable:
            self.examination.cannot(f"gradients of {self.subject}", "the run does not say which parameters had one")
            return
        size = sum(sizes.get(name, 0) for name in silent)
        if not sizes:  # no checkpoint: the status knows how many, not which
            size = round((training.number(counts, "trainable") or 0) - (training.number(counts, "with_gradient") or 0))
        total = round(training.number(counts, "total") or sum(sizes.values()))
        can = sum(sizes.get(name, 0) for name in trainable) or round(training.number(counts, "trainable") or total)
        self.examination.run(
            "no-gradient", self.subject,
            lambda: training.no_gradient(self.subject, sorted(silent), size, can, total), f"{can:,} parameters",
        )  # fmt: skip


def batches_per_epoch(rows: Sequence[Mapping[str, Any]], accumulate: int) -> list[int]:
    """Numbers of batches in an epoch that agree with the counts of updates in a run's rows; mostly one."""
    steps = training.events(rows, "step", "updates", "epochs")
    if not steps:
        return []
    updates, epochs = int(steps[-1]["updates"]), max(1, int(steps[-1]["epochs"]))
    lowest, highest = max(1, (updates - 1) * accumulate // epochs), updates * accumulate // epochs
    ends = [(int(row["epoch"]), int(row["update"])) for row in training.events(rows, "epoch", "epoch", "update")]
    return [
        size
        for size in range(lowest, highest + 1)
        if -(-epochs * size // accumulate) == updates
        and all((epoch * size - 1) // accumulate + 1 == update for epoch, update in ends)
    ]
