"""From a config and a split to a finished run folder: checks, assembly, Lightning's trainer, last words."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from xded import config as configs
from xded.audio import read_audio
from xded.config import Config, StageConfig
from xded.corpus.folds import Provenance
from xded.corpus.manifest import read_corpus
from xded.errors import GO_ON, ConfigError, TrainingError
from xded.features import LogMel
from xded.findings import Finding
from xded.models.checkpoints import FREE_SPACE, disk_is_full, load_latest
from xded.models.collective import leave
from xded.models.recogniser import Recogniser, describe, provenance_of
from xded.models.student import Student
from xded.targets.store import Kind, Store
from xded.training.auxiliary import Auxiliary
from xded.training.checkpointing import AtomicCheckpointIO
from xded.training.data import TrainingData, collate
from xded.training.difficulty import begin_curriculum
from xded.training.evaluation import batches, validate
from xded.training.guide import auxiliary_of
from xded.training.job import Job
from xded.training.launching import launch
from xded.training.loggers import mirror_of, need_packages
from xded.training.loop import STOPPED_AT_ONCE, CollapsedRunError, InterruptedRunError, Loop, StopOnSignal
from xded.training.monitor import DataCard, unused_parts
from xded.training.order import RunSampler
from xded.training.preflight import LISTED, Gate, Opened, fits_normaliser, preflight
from xded.training.processes import ALONE, Place, device_of, place_of, strategy_of
from xded.training.schedule import Schedule
from xded.training.status import NoLog, RunLog, close_for, read_status, write_atomically

FINDINGS = "findings.json"
PATHS = frozenset(configs.PATHS)
# a run may go on somewhere else
NOT_COMPARED = {"train.device", "train.devices", "train.nodes", "train.threads", "train.loggers"}


def is_finished(out: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (out / "status.json").is_file() and (out / "best.pt").is_file() and read_status(out)["state"] == "finished"


def fit(job: Job, *, resume: bool = False, quiet: bool = False, place: Place | None = None) -> Path:
    """Trains, in as many processes as the config says; returns the path of `best.pt`.

    Args:
        job: what to train.
        resume: go on from `latest.pt` (from the start when the run was stopped before the first save), or return at
            once when the run is finished.
        quiet: write nothing to the console.
        place: which of the run's processes this one is; none: that is found out, or the processes are launched.

    Raises:
        XdedError: anything wrong with the input is said before the first step; nothing is lost.
    """
    out = job.out
    if resume and is_finished(out):
        check_same_config(configs.load(out / "config.yaml").model_dump(mode="json"), job)
        return out / "best.pt"
    going_on = resume and any(out.glob("latest*.pt"))
    if not resume and any(out.glob("*.pt")):
        raise ConfigError(f"{out} already holds a run.", "Go on with --resume, or choose another --out.")
    need_packages(job.config.train.loggers)
    place = place or place_of(job.config.train)
    if place is None:
        return fit_in_processes(job, resume=resume, quiet=quiet)
    if job.config.train.threads:
        torch.set_num_threads(job.config.train.threads)
        if place.count > 1:
            os.environ["OMP_NUM_THREADS"] = str(job.config.train.threads)  # Lightning would choose a number
    device = device_of(job.config.train, place)
    torch.manual_seed(job.config.seed)
    student = Student(job.config.model, job.tokenizer.size, job.config.features)
    checkpoint, warning = load_latest(out) if going_on else (None, None)
    if checkpoint is not None:
        check_same_config(checkpoint["config"], job)
    gate = Gate(job.force)
    opened = preflight(job, student, gate, going_on=checkpoint is not None)
    gate.decide()
    if checkpoint is not None and provenance_of(checkpoint) != opened.provenance:
        raise ConfigError(
            f"{out} was started with other recordings, another parent or other targets.",
            "Put them back, or choose another --out.",
        )
    if fits_normaliser(job.config):
        rate = job.config.features.sample_rate
        assert isinstance(student.front_end, LogMel)
        student.front_end.fit(read_audio(recording.audio_filepath, rate) for recording in job.train)
    if place.first:
        out.mkdir(parents=True, exist_ok=True)
        write_run_files(job)
        keep_findings(out, gate)
    job.facts |= {"preflight": gate.table(), "forced": sorted(job.force)}
    return run(job, student, opened, checkpoint, warning, device, quiet, place)


def fit_in_processes(job: Job, *, resume: bool, quiet: bool) -> Path:
    """`fit` in processes of its own, one a device; what ends them early is in the run folder's status."""
    status = job.out / "status.json"
    before = status.stat().st_mtime_ns if status.is_file() else None
    # after a frozen stage DDP would say that it looks for parameters without a gradient in vain
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        launch(partial(_fit_as, job, resume, quiet), job.config.train.devices)
    except BaseException as error:
        known = understood(error, job.out)
        if status.is_file() and status.stat().st_mtime_ns != before:  # they had begun
            with suppress(OSError):
                close_for(job.out, state_after(known), str(known))
        if known is error:
            raise
        raise known from error
    return job.out / "best.pt"


def _fit_as(job: Job, resume: bool, quiet: bool, rank: int, folder: Path) -> None:
    """`fit` as one of several processes, which meet in a folder."""
    fit(job, resume=resume, quiet=quiet, place=Place(rank, job.config.train.devices, rank, folder / "meeting"))


def check_same_config(old: Mapping[str, Any], job: Job) -> None:
    """Raises unless a run folder's config is that of the job (the device and its threads may differ)."""
    before, now = flat(old), flat(job.config.model_dump(mode="json"))
    changed = [key for key in now | before if key not in NOT_COMPARED and not _same(key, before.get(key), now.get(key))]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed[:LISTED])
        raise ConfigError(
            f"{job.out} was started with another config: {listed}{' ...' if len(changed) > LISTED else ''}.",
            f"Use {job.out / 'config.yaml'}, or choose another --out.",
        )


def _same(key: str, before: Any, now: Any) -> bool:
    """Whether two values of a config are the same; a path may be written in two ways."""
    return before == now or (
        key in PATHS and None not in (before, now) and Path(before).resolve() == Path(now).resolve()
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings with dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


def write_run_files(job: Job) -> None:
    """config.yaml and env.json."""
    write_atomically(job.out / "config.yaml", configs.to_yaml(job.config))
    packages = ("xded", "torch", "lightning", "numpy", "sentencepiece", "soundfile")
    env = {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": job.config.train.devices * job.config.train.nodes,
        "packages": {name: version(name) for name in packages},
    }
    write_atomically(job.out / "env.json", json.dumps(env, indent=1))


def started_from(config: Config) -> str:
    """What a run begins with, for its status: the parent's weights go over a pretrained encoder's."""
    if config.train.init is not None:
        return str(config.train.init)
    if config.model.pretrained is not None:
        return f"encoder of {config.model.pretrained}"
    return "from scratch"


def facts_of(
    job: Job, student: Student, stages: Sequence[StageConfig], provenance: Sequence[Provenance]
) -> dict[str, Any]:
    """What the status says before the first step."""
    speakers = sorted({r.speaker for r in job.train})
    hours = sum(r.duration for r in job.train) / 3600
    facts = {
        "name": job.name,
        "data": f"{len(job.train)} recordings, {len({r.take for r in job.train})} takes, {hours:.2f} h of "
        f"{len(speakers)} speakers ({', '.join(speakers)}); {len(job.validation)} for validation",
        "held_out": ", ".join(job.fold.held_out) + (" (included)" if job.fold.include_held_out else ""),
        "init": started_from(job.config),
        "tokenizer": f"{job.tokenizer.size} pieces, fingerprint {job.tokenizer.fingerprint[:12]}",
        "stages": [stage.model_dump(mode="json") for stage in stages],
        "parameters": {**student.parameter_counts(), "with_gradient": 0},
        "provenance": [p.what for p in provenance],
    }
    return {**facts, **job.facts}


def open_log(
    job: Job, facts: dict[str, Any], student: Student, checkpoint: dict[str, Any] | None, quiet: bool
) -> RunLog:
    """The log of a run that starts, or goes on from a checkpoint: what was logged after it is dropped."""
    first_update = 0 if checkpoint is None else (int(checkpoint["batch"]) + 1) // job.config.train.accumulate
    RunLog.forget_after(job.out, first_update)
    mirror = mirror_of(job.config, job.name, job.out, first_update)
    log = RunLog(job.out, facts, {n: p.numel() for n, p in student.named_parameters()}, quiet=quiet, mirror=mirror)
    log.row("start", {"update": first_update, "resumed": checkpoint is not None})
    log.table(job.facts["preflight"])
    return log


def encode_once(student: Student, data: TrainingData, batch_size: int) -> list[torch.Tensor]:
    """Outputs of the (frozen) encoder for every recording, without augmentation: [T', D] each."""
    student.eval()
    device = next(student.parameters()).device
    encoded: list[torch.Tensor] = [torch.empty(0)] * len(data)
    with torch.no_grad():
        for places, batch in batches(data.plain(), batch_size):
            assert batch.features is not None
            outputs, lengths = student.encode(batch.features.to(device), batch.feature_lengths.to(device))
            for row, place in enumerate(places):
                encoded[place] = outputs[row, : int(lengths[row])].to("cpu", copy=True)
    return encoded


def served(job: Job, student: Student, stores: Mapping[Kind, Store]) -> TrainingData:
    """Training recordings with what the objective reads of the targets."""
    config, ctc = job.config, stores.get("ctc")
    return TrainingData(
        job.train, student.front_end, job.tokenizer,
        augmentation=config.augment, seed=config.seed,
        ctc_targets=ctc if config.objective.ctc_kd else None, text_targets=ctc if config.objective.text_kd else None,
        decoder_targets=stores.get("decoder"), word_targets=stores.get("words"),
        frame_rate_hz=student.frame_rate_hz, reduce=student.encoder.reduce,
    )  # fmt: skip


def learned_beside(
    job: Job, student: Student, guide: Recogniser | None, data: TrainingData, device: torch.device
) -> Auxiliary | None:
    """Gives `data` the outputs of the guide, if there is one; returns what the loss learns beside the student."""
    if guide is not None:
        heard = TrainingData(job.train, guide.student.front_end, job.tokenizer)
        data.guide = encode_once(guide.student.to(device), heard, job.config.decode.batch_size)
        guide.student.cpu()
    return auxiliary_of(job, student, guide)


def run(
    job: Job,
    student: Student,
    opened: Opened,
    checkpoint: dict[str, Any] | None,
    warning: str | None,
    device: torch.device,
    quiet: bool,
    place: Place,
) -> Path:
    """The part of `fit` after all checks."""
    config = job.config
    stages = config.stages_run
    if not stages:
        raise ConfigError(
            "Every stage freezes the encoder, but the run starts from scratch.",
            "Give --init, or a stage that trains it.",
        )
    data = served(job, student, opened.stores)
    held_back = TrainingData(job.validation, student.front_end, job.tokenizer)
    corpus = read_corpus(config.corpus).recordings if place.first and config.corpus and config.corpus.exists() else ()
    schedule = Schedule.of(config.train, stages, -(-len(data) // config.train.batch_size))
    difficulty = begin_curriculum(job, student, data, schedule.epochs, checkpoint, device, writes=place.first)
    facts = facts_of(job, student, stages, opened.provenance)
    log = open_log(job, facts, student, checkpoint, quiet) if place.first else NoLog()
    if warning:
        log.line(warning)

    card = DataCard(
        job.out, {"train": data, "validation": held_back}, {"train": job.train, "validation": job.validation},
        corpus, job.test_takes,
    )  # fmt: skip

    def watch(event: str, row: dict[str, Any]) -> None:
        log(event, row)
        if event == "epoch":
            ends = row["epoch"] == schedule.epochs
            before = (loop.order.batch(number) for number in range(loop.first_batch)) if ends else None
            card.end_epoch(validated="wra" in row, before=before)

    loop = Loop(
        student, config, schedule, job.tokenizer, data, job.out,
        validate=partial(validate, data=held_back, config=config), watch=watch,
        extra={**describe(job.tokenizer, config, job.name, opened.provenance), **difficulty},
        auxiliary=learned_beside(job, student, opened.guide, data, device),
    )  # fmt: skip
    if checkpoint is not None:
        loop.restore(checkpoint)
    frozen_epochs = sum(s.epochs for s in stages if s.freeze_encoder)
    if schedule.epoch_of_batch(loop.first_batch) < frozen_epochs:
        data.frozen_epochs, data.encoded = frozen_epochs, encode_once(student, data, config.decode.batch_size)
    train_to_end(loop, device, log, place)
    student.cpu()
    if place.first and not (job.out / "best.pt").is_file():
        shutil.copyfile(job.out / "latest.pt", job.out / "best.pt")
    log.close("finished")
    return job.out / "best.pt"


def keep_findings(out: Path, said: Gate | Finding) -> None:
    """findings.json: what the pre-flight said, and later what ended the run."""
    path = out / FINDINGS
    if isinstance(said, Gate):
        kept = said.to_dict() | {"forced": sorted(said.forced)}
    else:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["findings"] = [asdict(said), *kept["findings"]]
    write_atomically(path, json.dumps(kept, indent=1))


def train_to_end(loop: Loop, device: torch.device, log: RunLog | NoLog, place: Place) -> None:
    """Lightning's `fit`; whatever ends it early is in the run folder's status before it is raised."""
    data, config = loop.data, loop.run_config
    sampler = RunSampler(loop.order, loop.schedule.epochs, loop.first_batch, rank=place.rank, count=place.count)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, eos=loop.tokenizer.eos))
    # Ctrl-C comes to spawned processes as a SIGTERM
    signals = (signal.SIGTERM,) if place.meeting else (signal.SIGINT, signal.SIGTERM)
    try:
        make_trainer(config, device, StopOnSignal(loop.stop_requested, signals), place).fit(loop, loader)
    except BaseException as error:
        known = understood(error, loop.out)
        with suppress(OSError):  # a full disk has no room for last words: the error itself says them
            if place.first and isinstance(known, CollapsedRunError):
                keep_findings(loop.out, known.finding)
            log.close(state_after(known), str(known) or type(known).__name__)
        if known is error:
            raise
        raise known from error
    leave()


def state_after(error: BaseException) -> str:
    """State of a run that an error has ended."""
    return "stopped" if isinstance(error, InterruptedRunError) else "failed"


def understood(error: BaseException, out: Path) -> BaseException:
    """What Lightning or the system raised, as an error of this project where there is a remedy."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):  # Lightning turns Ctrl-C into SystemExit
        return InterruptedRunError(STOPPED_AT_ONCE, GO_ON)
    if disk_is_full(error):
        return TrainingError(f"The disk is full: nothing more can be written to {out}.", FREE_SPACE)
    return error


def make_trainer(config: Config, device: torch.device, stop: StopOnSignal, place: Place = ALONE) -> L.Trainer:
    """Lightning without its own progress bar, logger and checkpoint callback."""
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    some_frozen = any(config.train.frozen_parts(stage) for stage in config.train.stages)
    strategy, plugins = strategy_of(place, device, bool(some_frozen or unused_parts(config.objective)))
    one = [device.index or 0] if device.type == "cuda" else 1
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=one if place.count == 1 else config.train.devices,
        num_nodes=config.train.nodes,
        strategy=strategy,
        precision=config.train.precision,  # type: ignore[arg-type]
        max_epochs=1,  # one pass of RunSampler is the whole run
        accumulate_grad_batches=config.train.accumulate,
        gradient_clip_val=config.train.gradient_clip,
        plugins=[AtomicCheckpointIO(), *plugins],
        callbacks=[stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
