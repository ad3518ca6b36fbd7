"""From a config and a split to a finished run folder: checks, assembly, Lightning's trainer, last words."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from xded.corpus.folds import Fold, Provenance, guard
from xded.corpus.manifest import Recording
from xded.errors import GO_ON, CheckpointError, ConfigError, CorpusError, TrainingError
from xded.models.checkpoints import FREE_SPACE, AtomicCheckpointIO, disk_is_full, load, load_latest
from xded.models.recogniser import describe, load_weights, pick_device, provenance_of, resolve
from xded.models.student import Student
from xded.objectives import ctc_frames_needed
from xded.targets.store import Kind, Store, TargetError, audio_hash
from xded.tokenizer import Tokenizer
from xded.training.data import RunSampler, TrainingData, collate
from xded.training.evaluation import batches, validate
from xded.training.loop import InterruptedRunError, Loop, StopOnSignal
from xded.training.schedule import Schedule
from xded.training.status import RunLog, read_status, write_atomically

FRAMES_SHOWN = 5
PATHS = {"corpus", "targets", "train.init", "tokenizer.path"}
NOT_COMPARED = {"train.device", "train.threads"}  # a run may go on somewhere else


@dataclass
class Job:
    """What to train.

    Attributes:
        name: who the result is: "parent", "teacher M08", "student".
        config: of the run; `train.init`, `targets` and `objective` say how.
        train, validation: recordings; they share no take.
        fold: who must not be heard; test_takes: takes of the test (needed when held-out speakers are included).
        tokenizer: of the run (and of the parent and the targets).
        out: run folder.
    """

    name: str
    config: Config
    train: Sequence[Recording]
    validation: Sequence[Recording]
    fold: Fold
    test_takes: frozenset[str]
    tokenizer: Tokenizer
    out: Path
    facts: dict[str, Any] = field(default_factory=dict)


def is_finished(out: Path) -> bool:
    """Whether a run folder holds a finished run."""
    return (out / "status.json").is_file() and (out / "best.pt").is_file() and read_status(out)["state"] == "finished"


def fit(job: Job, *, resume: bool = False, quiet: bool = False) -> Path:
    """Trains; returns the path of `best.pt`.

    Args:
        job: what to train.
        resume: go on from `latest.pt` (from the start when the run was stopped before the first save), or return at
            once when the run is finished.
        quiet: write nothing to the console.

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
    if job.config.train.threads:
        torch.set_num_threads(job.config.train.threads)
    device = pick_device(job.config.train.device)
    torch.manual_seed(job.config.seed)
    student = Student(job.config.model, job.tokenizer.size, job.config.features)
    checkpoint, warning = load_latest(out) if going_on else (None, None)
    if checkpoint is not None:
        check_same_config(checkpoint["config"], job)
    stores = open_targets(job)
    provenance = preflight(job, student, stores, initialise(job, student))
    if checkpoint is not None and provenance_of(checkpoint) != provenance:
        raise ConfigError(
            f"{out} was started with other recordings, another parent or other targets.",
            "Put them back, or choose another --out.",
        )
    if fits_normaliser(job.config):
        rate = job.config.features.sample_rate
        student.front_end.fit(read_audio(recording.audio_filepath, rate) for recording in job.train)
    out.mkdir(parents=True, exist_ok=True)
    write_run_files(job)
    return run(job, student, stores, provenance, checkpoint, warning, device, quiet)


def check_same_config(old: Mapping[str, Any], job: Job) -> None:
    """Raises unless a run folder's config is that of the job (the device and its threads may differ)."""
    before, now = flat(old), flat(job.config.model_dump(mode="json"))
    changed = [key for key in now | before if key not in NOT_COMPARED and not _same(key, before.get(key), now.get(key))]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed[:FRAMES_SHOWN])
        raise ConfigError(
            f"{job.out} was started with another config: {listed}{' ...' if len(changed) > FRAMES_SHOWN else ''}.",
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


def fits_normaliser(config: Config) -> bool:
    """Whether the run measures a global mean and deviation: not when it starts from weights that know another."""
    return config.features.normalisation == "global" and config.train.init is None


def initialise(job: Job, student: Student) -> tuple[Provenance, ...]:
    """Loads the weights that the run starts from; returns what they have heard."""
    if job.config.train.init is None:
        return ()
    path = resolve(job.config.train.init)
    payload = load(path)
    if payload.get("tokenizer_fingerprint") != job.tokenizer.fingerprint:
        raise CheckpointError(
            f"{path} was trained with another tokenizer (fingerprint {str(payload.get('tokenizer_fingerprint'))[:12]}, "
            f"this run's is {job.tokenizer.fingerprint[:12]}).",
            "Train with the checkpoint's own tokenizer (leave out --tokenizer), or start from scratch.",
        )
    load_weights(student, payload["model_state_dict"], path)
    before, now = payload["config"].get("features", {}), job.config.features.model_dump(mode="json")
    changed = [f"{key} {before.get(key)} (here {now[key]})" for key in now if before.get(key) != now[key]]
    if changed:
        raise CheckpointError(
            f"{path} was trained on other features: {', '.join(changed)}.",
            "Use the features of the checkpoint's config, or start from scratch.",
        )
    return provenance_of(payload)


def open_targets(job: Job) -> dict[Kind, Store]:
    """The stores that the objective needs, checked against tokenizer, temperature and audio."""
    needed: list[Kind] = []
    if job.config.objective.ctc_kd:
        needed.append("ctc")
    if job.config.objective.decoder_kd:
        needed.append("decoder")
    if not needed:
        return {}
    if job.config.targets is None:
        raise ConfigError(
            "The objective uses KD but no targets are given.", "Make them with 'xded targets', then --targets DIR."
        )
    stores = {kind: Store(job.config.targets / kind) for kind in needed}
    for store in stores.values():
        check_targets(store, job)
    return stores


def check_targets(store: Store, job: Job) -> None:
    """Raises unless the targets are of these recordings, this tokenizer and this temperature."""
    index = store.index
    if index.tokenizer != job.tokenizer.fingerprint:
        raise TargetError(
            f"{store.folder} was made with another tokenizer (fingerprint {index.tokenizer[:12]}, this run's is "
            f"{job.tokenizer.fingerprint[:12]}).",
            "Use the teachers' tokenizer, or make the targets anew.",
        )
    wanted = job.config.objective.temperature
    if abs(index.temperature - wanted) > 1e-6:
        raise TargetError(
            f"{store.folder} was made at temperature {index.temperature:g}; the objective says {wanted:g}.",
            f"Make them anew with --temperature {wanted:g}, or train with {index.temperature:g}.",
        )
    for recording in job.train:
        if recording.recording not in store:
            continue
        entry = store.entry(recording.recording)
        if entry.audio_sha256 != audio_hash(recording):
            raise TargetError(
                f"{store.folder}: the target of '{recording.recording}' describes other audio (its SHA-256 differs).",
                "Make the targets anew from this corpus: 'xded targets'.",
            )
        steps = len(job.tokenizer.encode(recording.text)) + 1  # </s> is a step
        if index.kind == "decoder" and entry.steps != steps:
            raise TargetError(
                f"{store.folder}: the target of '{recording.recording}' has {entry.steps} steps; "
                f"its text '{recording.text}' has {steps}.",
                "Make the targets anew from this corpus: 'xded targets'.",
            )


def preflight(
    job: Job, student: Student, stores: dict[Kind, Store], inherited: tuple[Provenance, ...]
) -> tuple[Provenance, ...]:
    """Everything that can be known to be wrong before the first step; returns what the run will have heard."""
    if not job.train:
        raise CorpusError(f"{job.name} has no recording to train on.", "Hold out or exclude fewer speakers.")
    job.tokenizer.self_test([r.text for r in (*job.train, *job.validation)], head_size=student.vocabulary)
    if stores:
        kept = [r for r in job.train if all(r.recording in store for store in stores.values())]
        if not kept:
            raise TargetError(
                f"The targets in {job.config.targets} cover none of the {len(job.train)} training recordings.",
                "Make them anew from this corpus and fold: 'xded targets'.",
            )
        index = next(iter(stores.values())).index
        job.facts["targets"] = f"{job.config.targets}, {len(kept)} of {len(job.train)} training recordings covered"
        job.facts["teachers"] = f"{', '.join(index.teachers)} ({index.effective_teachers:.1f} effective)"
        job.train = kept
    if job.config.objective.ctc:
        check_spelling(job, student)
    frozen = [stage.freeze_encoder for stage in job.config.train.stages]
    if sorted(frozen, reverse=True) != frozen:
        raise ConfigError("A stage with a frozen encoder follows one that trains it.", "Put the frozen stages first.")
    provenance = (
        _heard(job.name, job.train),
        *((_heard(f"model selection of {job.name}", job.validation),) if job.validation else ()),
        *((_heard(f"normaliser of {job.name}", job.train),) if fits_normaliser(job.config) else ()),
        *inherited,
        *(p for store in stores.values() for p in store.index.provenance),
    )
    guard(job.fold, provenance, job.test_takes)
    return tuple(dict.fromkeys(provenance))


def _heard(what: str, recordings: Sequence[Recording]) -> Provenance:
    return Provenance(what, frozenset(r.speaker for r in recordings), frozenset(r.take for r in recordings))


def check_spelling(job: Job, student: Student) -> None:
    """Raises when a text has more tokens than CTC can write in the recording's frames (at the fastest tempo)."""
    rate = job.config.features.sample_rate
    shortest = 1.0 - job.config.augment.tempo
    problems = []
    for recording, share in [*((r, shortest) for r in job.train), *((r, 1.0) for r in job.validation)]:
        needed = ctc_frames_needed(job.tokenizer.encode(recording.text))
        frames = int(student.encoded_frames(torch.tensor(round(recording.duration * rate * share))))
        if needed > frames:
            problems.append(f"{recording.recording} ('{recording.text}': {needed} frames needed, {frames} there)")
    if problems:
        raise CorpusError(
            f"{len(problems)} recordings are too short for CTC to write their text: "
            + "; ".join(problems[:FRAMES_SHOWN])
            + (" ..." if len(problems) > FRAMES_SHOWN else "")
            + ".",
            "Leave them out of the manifest, use a tokenizer with longer pieces (--set tokenizer.kind=bpe), "
            "or train without CTC (--ctc 0)" + (", or without augment.tempo." if job.config.augment.tempo else "."),
        )


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
        "packages": {name: version(name) for name in packages},
    }
    write_atomically(job.out / "env.json", json.dumps(env, indent=1))


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
        "init": str(job.config.train.init or "from scratch"),
        "tokenizer": f"{job.tokenizer.size} pieces, fingerprint {job.tokenizer.fingerprint[:12]}",
        "stages": [stage.model_dump(mode="json") for stage in stages],
        "parameters": {**student.parameter_counts(), "with_gradient": 0},
        "provenance": [p.what for p in provenance],
    }
    return {**facts, **job.facts}


def encode_once(student: Student, data: TrainingData, batch_size: int) -> list[torch.Tensor]:
    """Outputs of the (frozen) encoder for every recording, without augmentation: [T', D] each."""
    student.eval()
    encoded: list[torch.Tensor] = [torch.empty(0)] * len(data)
    with torch.no_grad():
        for places, batch in batches(data, batch_size):
            assert batch.features is not None
            outputs, lengths = student.encode(batch.features, batch.feature_lengths)
            for row, place in enumerate(places):
                encoded[place] = outputs[row, : int(lengths[row])].clone()
    return encoded


def run(
    job: Job,
    student: Student,
    stores: dict[Kind, Store],
    provenance: tuple[Provenance, ...],
    checkpoint: dict[str, Any] | None,
    warning: str | None,
    device: torch.device,
    quiet: bool,
) -> Path:
    """The part of `fit` after all checks."""
    config = job.config
    # freezing a random encoder teaches nothing: frozen stages need a start
    stages = [s for s in config.train.stages if config.train.init is not None or not s.freeze_encoder]
    if not stages:
        raise ConfigError(
            "Every stage freezes the encoder, but the run starts from scratch.",
            "Give --init, or a stage that trains it.",
        )
    data = TrainingData(
        job.train, student.front_end, job.tokenizer,
        augmentation=config.augment, seed=config.seed,
        ctc_targets=stores.get("ctc"), decoder_targets=stores.get("decoder"),
        frame_rate_hz=student.frame_rate_hz, reduce=student.encoder.subsampling.reduce,
    )  # fmt: skip
    held_back = TrainingData(job.validation, student.front_end, job.tokenizer)
    schedule = Schedule.of(config.train, stages, -(-len(data) // config.train.batch_size))
    first_update = 0 if checkpoint is None else (int(checkpoint["batch"]) + 1) // config.train.accumulate
    RunLog.forget_after(job.out, first_update)
    log = RunLog(
        job.out,
        facts_of(job, student, stages, provenance),
        {n: p.numel() for n, p in student.named_parameters()},
        quiet=quiet,
    )
    loop = Loop(
        student, config, schedule, job.tokenizer, data, job.out,
        validate=partial(validate, data=held_back, config=config), watch=log,
        extra=describe(job.tokenizer, config, job.name, provenance),
    )  # fmt: skip
    if warning:
        log.line(warning)
    if checkpoint is not None:
        loop.restore(checkpoint)
    frozen_epochs = sum(s.epochs for s in stages if s.freeze_encoder)
    if schedule.epoch_of_batch(loop.first_batch) < frozen_epochs:
        data.frozen_epochs, data.encoded = frozen_epochs, encode_once(student, data, config.decode.batch_size)
    sampler = RunSampler(data.lengths, config.train.batch_size, config.seed, schedule.epochs, loop.first_batch)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, eos=job.tokenizer.eos))
    train_to_end(make_trainer(config, device, StopOnSignal(loop.stop_requested)), loop, loader, log)
    student.cpu()
    if not (job.out / "best.pt").is_file():
        shutil.copyfile(job.out / "latest.pt", job.out / "best.pt")
    log.close("finished")
    return job.out / "best.pt"


def train_to_end(trainer: L.Trainer, loop: Loop, loader: DataLoader, log: RunLog) -> None:
    """Lightning's `fit`; whatever ends it early is in the run folder's status before it is raised."""
    try:
        trainer.fit(loop, loader)
    except BaseException as error:
        known = understood(error, loop.out)
        state = "stopped" if isinstance(known, InterruptedRunError) else "failed"
        with suppress(OSError):  # a full disk has no room for last words: the error itself says them
            log.close(state, str(known) or type(known).__name__)
        if known is error:
            raise
        raise known from error


def understood(error: BaseException, out: Path) -> BaseException:
    """What Lightning or the system raised, as an error of this project where there is a remedy."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):  # Lightning turns Ctrl-C into SystemExit
        return InterruptedRunError("Stopped at once; updates since the last save are lost.", GO_ON)
    if disk_is_full(error):
        return TrainingError(f"The disk is full: nothing more can be written to {out}.", FREE_SPACE)
    return error


def make_trainer(config: Config, device: torch.device, stop: StopOnSignal) -> L.Trainer:
    """Lightning without its own progress bar, logger and checkpoint callback."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=config.train.precision,  # type: ignore[arg-type]
        max_epochs=1,  # one pass of RunSampler is the whole run
        accumulate_grad_batches=config.train.accumulate,
        gradient_clip_val=config.train.gradient_clip,
        plugins=[AtomicCheckpointIO()],
        callbacks=[stop],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
