"""Everything that can be known to be wrong before the first step: a table of checks that pass, warn or refuse."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar, cast

import torch

from xded.augment_audio import shortest_s
from xded.checks import data, labels, targets, training
from xded.checks.ordering import unordered_by_targets
from xded.config import Config
from xded.corpus.folds import Provenance, guard
from xded.corpus.manifest import Recording, read_corpus
from xded.errors import CheckpointError, ConfigError, CorpusError, XdedError
from xded.findings import CHECKS, Examination, Finding
from xded.models.checkpoints import load
from xded.models.pretrained import begin_with, open_pretrained
from xded.models.pretrained import provenance as provenance_of_pretrained
from xded.models.recogniser import Recogniser, provenance_of, resolve
from xded.models.student import Student
from xded.models.weights import load_weights
from xded.objectives import ctc_frames_needed
from xded.targets.store import Kind, Store, TargetError, audio_hash
from xded.tokenizer import Tokenizer
from xded.training.guide import check_speakers, open_guide
from xded.training.job import Job
from xded.training.monitor import loaded
from xded.training.order import Words

LISTED = 5
VOID = "the run could not learn what was meant, or its results would be void"
# without these the loop cannot run at all, so that no --force helps
NEVER_FORCED = frozenset(
    {"tokenizer-mismatch", "unreachable-prompts", "unspellable", "target-coverage", "frame-count", "partial-load"}
)
Result = TypeVar("Result")


class Gate(Examination):
    """An examination that ends in a decision: go on, or refuse with the first error."""

    def __init__(self, forced: frozenset[str]) -> None:
        super().__init__()
        unknown = sorted(forced - (CHECKS.keys() - NEVER_FORCED))
        if unknown:
            raise ConfigError(
                f"--force {', '.join(unknown)}: no check that can be overridden.",
                "Name the check that refused, as it is written in the message.",
            )
        self.forced = forced
        self._errors: list[tuple[Finding, XdedError]] = []

    def must(self, check: str, subject: str, test: Callable[[], Result], detail: str = "") -> Result | None:
        """Runs a test that raises when something is wrong; the error becomes a refusal (and None the result)."""
        try:
            result = test()
        except XdedError as error:
            finding = Finding(check, "refuse", subject, error.problem, VOID, error.remedy)
            self._errors.append((finding, error))
            self.run(check, subject, lambda: [finding])
            return None
        self.run(check, subject, lambda: [], detail)
        return result

    def decide(self) -> None:
        """Raises the worst refusal that is not overridden; all of them are named."""
        refused = [f for f in self.at_least("refuse") if f.check not in self.forced]
        if not refused:
            return
        first, *others = refused
        errors = [error for finding, error in self._errors if finding == first]
        error = errors[0] if errors else ConfigError(first.what, first.remedy)
        more = f" Refused too: {'; '.join(f'{f.check}: {f.what}' for f in others)}" if others else ""
        force = (
            "" if first.check in NEVER_FORCED else f" To go on all the same (it is recorded): --force {first.check}."
        )
        raise type(error)(error.problem + more, error.remedy + force)

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (verdict, check, what): worst first, then what passed."""
        rows: list[tuple[str, str, str]] = []
        rows += [("forced" if f.severity == "refuse" else f.severity, f.check, f.what) for f in self.findings]
        for p in self.passed:
            rows.append(("pass", p.check, CHECKS[p.check].title + (f" ({p.detail})" if p.detail else "")))
        return rows


class Opened(NamedTuple):
    """What a run reads besides recordings: targets by kind, the guide (or none), and what the run will have heard."""

    stores: dict[Kind, Store]
    guide: Recogniser | None
    provenance: tuple[Provenance, ...]


def preflight(job: Job, student: Student, gate: Gate, *, going_on: bool = False) -> Opened:
    """Loads what the run starts from and looks at everything; nothing is decided yet (`Gate.decide`).

    A run that is going on has its weights: the pretrained encoder that it began with is not read again.
    """
    if not job.train:
        raise CorpusError(f"{job.name} has no recording to train on.", "Hold out or exclude fewer speakers.")
    everything = (*job.train, *job.validation)
    texts = [r.text for r in everything]
    gate.must(
        "unreachable-prompts", job.name, lambda: job.tokenizer.self_test(texts, student.vocabulary),
        f"{len(set(texts))} texts written and read back",
    )  # fmt: skip
    stores = open_targets(job, gate)
    inherited: tuple[Provenance, ...] = ()
    if job.config.train.init is not None or job.config.model.pretrained is not None:
        inherited = gate.must("partial-load", job.name, lambda: initialise(job, student, going_on)) or ()
    if job.config.objective.ctc:
        gate.must("unspellable", job.name, lambda: check_spelling(job, student), f"{len(everything)} recordings")
    frozen = [stage.freeze_encoder for stage in job.config.train.stages]
    if sorted(frozen, reverse=True) != frozen:
        raise ConfigError("A stage with a frozen encoder follows one that trains it.", "Put the frozen stages first.")
    check_layers(job.config, student)
    without = unordered_by_targets(job.config, bool(stores) and all(s.index.spelled_only for s in stores.values()))
    if without is not None:
        raise ConfigError(f"{job.name} {without[0]}", without[1])
    Words.of([tuple(job.tokenizer.encode(r.text)) for r in job.train], [r.speaker for r in job.train], job.config.train)
    guide = open_guide(job, student)
    check_speakers(job)
    provenance = (
        _heard(job.name, job.train),
        *((_heard(f"model selection of {job.name}", job.validation),) if job.validation else ()),
        *((_heard(f"normaliser of {job.name}", job.train),) if fits_normaliser(job.config) else ()),
        *inherited,
        *(guide.provenance if guide is not None else ()),
        *(p for store in stores.values() for p in store.index.provenance),
    )
    gate.must(
        "leakage", job.name, lambda: guard(job.fold, provenance, job.test_takes),
        data.sources_said(provenance, job.test_takes),
    )  # fmt: skip
    look_at_data(job, gate)
    look_at_settings(job, stores, gate)
    return Opened(stores, guide, tuple(dict.fromkeys(provenance)))


def check_layers(config: Config, student: Student) -> None:
    """Raises when more layers are frozen or whitened than there are, or when early features are not ours to change."""
    layers = len(student.encoder.layers)
    frozen = max(config.train.freeze_layers, *(stage.freeze_layers or 0 for stage in config.train.stages))
    for name, asked, what in (("freeze", frozen, "Freeze"), ("whiten", config.model.whiten_layers, "Whiten")):
        if asked > layers:
            raise ConfigError(
                f"{name}_layers is {asked}, and the encoder has {layers} layers.", f"{what} at most {layers}."
            )
    if config.model.whiten_layers and config.augment.mix_style:
        raise ConfigError(
            "model.whiten_layers takes away the statistics that augment.mix_style mixes.", "Set one of the two to 0."
        )
    changed = {"model.whiten_layers": config.model.whiten_layers, "augment.mix_style": config.augment.mix_style}
    for key, value in changed.items():
        if value and config.model.hugging_face is not None:
            raise ConfigError(
                f"{key} is {value:g}, and a Hugging Face encoder's layers are left as they are.",
                f"Set {key}=0, or use the Conformer.",
            )


def look_at_data(job: Job, gate: Gate) -> None:
    """Whose audio, which labels, which split: from the manifest's rows alone."""
    everything = (*job.train, *job.validation)
    parts = {"train": job.train, "validation": job.validation}
    sides: dict[str, Collection[str]] = {side: {r.take for r in rows} for side, rows in parts.items()}
    if job.fold.include_held_out:  # else the leakage guard says more of the held-out speakers
        sides["test"] = job.test_takes
    spoken = data.spoken_takes(everything) | data.spoken_by_name(take for takes in sides.values() for take in takes)
    detail = f"{len(everything)} recordings"
    gate.run("shared-takes", job.name, lambda: data.shared_takes(sides, spoken, job.name), detail)
    gate.run("wrong-audio", job.name, lambda: labels.wrong_files(everything, job.name), detail)
    gate.run("duplicates", job.name, lambda: labels.duplicates(everything, job.name), detail)
    gate.run("labels", job.name, lambda: labels.labels(everything, job.name), detail)


def look_at_settings(job: Job, stores: Mapping[Kind, Store], gate: Gate) -> None:
    """Heads that are decoded but not trained, teachers that have no say."""
    config = job.config
    gate.run(
        "untrained-head", job.name,
        lambda: training.untrained_head(
            job.name, training.heads_of(config.decode), training.trained_heads(config.objective),
            "the config's decode section", inherited=config.train.init is not None,
        ),
    )  # fmt: skip
    if config.augment.dysarthria:
        gate.run("same-simulator", job.name, lambda: same_simulator(job))
    for store in stores.values():
        where = str(store.folder)
        gate.run("effective-teachers", where, partial(targets.effective_teachers, store.index, where))


def same_simulator(job: Job) -> list[Finding]:
    """Whether the run's augmentation is what made its corpus, the recordings of the test included."""
    heard, path = (*job.train, *job.validation), job.config.corpus
    if not any(r.simulated_by for r in heard) and path is not None and path.exists():
        heard = read_corpus(path).recordings
    return data.same_simulator(job.config.augment.dysarthria, [r.simulated_by for r in heard], job.name)


def fits_normaliser(config: Config) -> bool:
    """Whether the run measures a global mean and deviation: not when it starts from weights that know another."""
    own_front_end = config.model.hugging_face is None
    return own_front_end and config.features.normalisation == "global" and config.train.init is None


def initialise(job: Job, student: Student, going_on: bool) -> tuple[Provenance, ...]:
    """Loads the weights that the run starts from: a checkpoint's, or a pretrained encoder's unless it is going on.

    Returns:
        What they have heard.
    """
    if job.config.train.init is None:
        path = job.config.model.pretrained
        assert path is not None
        if not going_on:
            weights = begin_with(student, open_pretrained(path), job.tokenizer)
            job.facts["loaded"] = loaded(student, weights, of=weights)
            own_head = any(name.startswith("ctc_head.") for name in weights)
            job.facts["init"] = f"encoder of {path}, {'with its own' if own_head else 'a new'} CTC head"
        return (provenance_of_pretrained(path),)
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
    job.facts["loaded"] = loaded(student, payload["model_state_dict"])
    if job.facts["loaded"]["differing"]:
        raise CheckpointError(
            f"Only {job.facts['loaded']['tensors']} of {job.facts['loaded']['of']} tensors of {path} were loaded.",
            "Give the model the size in the checkpoint's config, or leave out --init.",
        )
    return provenance_of(payload)


def open_targets(job: Job, gate: Gate) -> dict[Kind, Store]:
    """The stores that the objective needs, checked against tokenizer, temperature and audio; `job.train` becomes what
    they cover. A recording whose target was dropped on purpose (`target.spelled_only`) stays: it has its text.
    """
    needed = cast(tuple[Kind, ...], job.config.objective.kinds)
    if not needed:
        return {}
    folder = job.config.targets
    if folder is None:
        raise ConfigError(
            "The objective uses KD but no targets are given.", "Make them with 'xded targets', then --targets DIR."
        )
    stores = {kind: Store(folder / kind) for kind in needed}
    for store in stores.values():
        check_targets(store, job, gate)
    for store in stores.values():
        gate.run("target-coverage", str(folder), partial(targets.coverage, store.index, job.train, str(store.folder)))
    covered = {r.recording for r in job.train if all(r.recording in store for store in stores.values())}
    if not covered:
        raise TargetError(
            f"The targets in {folder} cover none of the {len(job.train)} training recordings.",
            "Make them anew from this corpus and fold: 'xded targets'.",
        )
    index = next(iter(stores.values())).index
    job.facts["targets"] = f"{folder}, {len(covered)} of {len(job.train)} training recordings covered"
    job.facts["teachers"] = f"{', '.join(index.teachers)} ({index.effective_teachers:.1f} effective)"
    for store in stores.values():
        job.train = [r for r in job.train if r.recording in store or r.recording in store.dropped]
    return stores


def check_targets(store: Store, job: Job, gate: Gate) -> None:
    """Whether targets are of this tokenizer and temperature and of these recordings."""
    where = str(store.folder)
    gate.must("tokenizer-mismatch", where, lambda: check_fingerprint(store, job))
    gate.must("temperature", where, lambda: check_temperature(store, job))
    covered = [recording for recording in job.train if recording.recording in store]
    gate.must("audio-hash", where, lambda: check_audio(store, covered), f"{len(covered)} recordings")
    if store.index.kind == "decoder":
        gate.must("frame-count", where, lambda: check_steps(store, covered, job.tokenizer))
    if store.index.kind == "ctc" and job.config.objective.text_kd:
        gate.must("target-coverage", where, lambda: check_texts(store, covered))


def check_fingerprint(store: Store, job: Job) -> None:
    """Raises unless the targets are of the job's tokenizer."""
    if store.index.tokenizer != job.tokenizer.fingerprint:
        raise TargetError(
            f"{store.folder} was made with another tokenizer (fingerprint {store.index.tokenizer[:12]}, this run's is "
            f"{job.tokenizer.fingerprint[:12]}).",
            "Use the teachers' tokenizer, or make the targets anew.",
        )


def check_temperature(store: Store, job: Job) -> None:
    """Raises unless the targets are at the objective's temperature."""
    made, wanted = store.index.temperature, job.config.objective.temperature
    if abs(made - wanted) > 1e-6:
        raise TargetError(
            f"{store.folder} was made at temperature {made:g}; the objective says {wanted:g}.",
            f"Make them anew with --temperature {wanted:g}, or train with {made:g}.",
        )


def check_audio(store: Store, recordings: Sequence[Recording]) -> None:
    """Raises when a target describes other audio than its recording's."""
    for recording in recordings:
        if store.entry(recording.recording).audio_sha256 != audio_hash(recording):
            raise TargetError(
                f"{store.folder}: the target of '{recording.recording}' describes other audio (its SHA-256 differs).",
                "Make the targets anew from this corpus: 'xded targets'.",
            )


def check_steps(store: Store, recordings: Sequence[Recording], tokenizer: Tokenizer) -> None:
    """Raises when a decoder target has another number of steps than its text."""
    for recording in recordings:
        found = store.entry(recording.recording).steps
        steps = len(tokenizer.encode(recording.text)) + 1  # </s> is a step
        if found != steps:
            raise TargetError(
                f"{store.folder}: the target of '{recording.recording}' has {found} steps; "
                f"its text '{recording.text}' has {steps}.",
                "Make the targets anew from this corpus: 'xded targets'.",
            )


def check_texts(store: Store, recordings: Sequence[Recording]) -> None:
    """Raises when it is not on record what the teachers hear."""
    unknown = sum(store.entry(recording.recording).text is None for recording in recordings)
    if unknown:
        raise TargetError(
            f"{store.folder}: of {unknown} recordings the text that the teachers hear is not on record.",
            "Make the targets anew ('xded targets'), or set objective.text_kd=0.",
        )


def _heard(what: str, recordings: Sequence[Recording]) -> Provenance:
    return Provenance(what, frozenset(r.speaker for r in recordings), frozenset(r.take for r in recordings))


def check_spelling(job: Job, student: Student) -> None:
    """Raises when a text has more tokens than CTC can write in the recording's frames (augmented to the shortest)."""
    rate, augment = job.config.features.sample_rate, job.config.augment
    shortest = [(r, shortest_s(r.duration, augment) * (1.0 - augment.tempo)) for r in job.train]
    hastening = [f"augment.{key}" for key in ("tempo", "speed", "dysarthria") if getattr(augment, key)]
    problems = []
    for recording, seconds in [*shortest, *((r, r.duration) for r in job.validation)]:
        needed = ctc_frames_needed(job.tokenizer.encode(recording.text))
        frames = int(student.encoded_frames(torch.tensor(round(seconds * rate))))
        if needed > frames:
            problems.append(f"{recording.recording} ('{recording.text}': {needed} frames needed, {frames} there)")
    if problems:
        raise CorpusError(
            f"{len(problems)} recordings are too short for CTC to write their text: "
            + "; ".join(problems[:LISTED])
            + (" ..." if len(problems) > LISTED else "")
            + ".",
            "Leave them out of the manifest, use a tokenizer with longer pieces (--set tokenizer.kind=bpe), "
            "or train without CTC (--ctc 0 --set decode.mode=decoder)"
            + (f", or without {' and '.join(hastening)}." if hastening else "."),
        )
