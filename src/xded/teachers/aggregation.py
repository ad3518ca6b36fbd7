"""What the teachers say about the training recordings, aggregated once into targets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from xded.checks.teachers import best_path, text_of
from xded.config import Config
from xded.corpus.folds import Fold, Provenance, coverage, guard, key_of
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError, few
from xded.models.checkpoints import load
from xded.models.recogniser import load_recogniser, provenance_of
from xded.parallel import run_all
from xded.targets.aggregate import combine, top_k
from xded.targets.asking import PARENT, listened_to, questions
from xded.targets.store import Entry, Index, Kind, Posterior, Store, StoreWriter, TargetError, audio_hash, read_index
from xded.targets.weighting import Evidence, accuracies, closeness_of, fits, need_sense, weigh
from xded.teachers.adapt import Teachers, parts_of
from xded.teachers.posteriors import KINDS, extract, extracted_kinds
from xded.tokenizer import Tokenizer, normalise
from xded.training.data import TrainingData
from xded.training.evaluation import batches


def _extract_job(job: tuple[Path, str, tuple[Recording, ...], Config, Path, tuple[str, ...]]) -> None:
    extract(*job)


def kinds_of(config: Config) -> tuple[Kind, ...]:
    """What can be aggregated: frames of different recordings do not line up, their words and decoder steps do."""
    return tuple(k for k in extracted_kinds(config) if k != "ctc" or config.target.heard == "same_audio")


def needs_parent(config: Config) -> bool:
    """Whether targets depend on the parent itself: it is asked like a teacher, or compares the speakers' voices."""
    return config.target.asked != "all" or config.target.weighting == "embedding"


def listed_words(corpus: Corpus, config: Config) -> tuple[str, ...]:
    """Words that posteriors are to be made of: the corpus's texts, where the objective reads them; else none.

    That a word is listed says nothing of anybody's speech: word-list decoding knows the same list.
    """
    if "words" not in config.objective.kinds:
        return ()
    return tuple(sorted({r.text for r in corpus.recordings if r.speaker not in config.fold.exclude}))


def left_out(teachers: Teachers, fold: Fold) -> dict[str, str]:
    """Speakers whose teachers a fold may not ask, and why."""
    forbidden = dict.fromkeys(fold.exclude, "excluded")
    forbidden |= {} if fold.include_held_out else dict.fromkeys(fold.held_out, "held out")
    return {s: forbidden[s] for s in sorted({*teachers.finished, *teachers.imported}) if s in forbidden}


def make_targets(
    corpus: Corpus,
    teachers: Teachers,
    fold: Fold,
    recordings: Sequence[Recording],
    config: Config,
    out: Path,
    *,
    jobs: int = 1,
) -> dict[Kind, Index]:
    """Posteriors of every teacher of the fold, then one aggregate a kind in OUT/ctc, OUT/decoder and OUT/words.

    Args:
        corpus: gives bands, listed words and, with `same_prompt`, the teachers' own recordings.
        teachers: folder of teachers, trained here or imported; those of `left_out` are not asked.
        recordings: what the student will train on.
        config: `target`, `objective.temperature` and `objective.kinds`.

    Raises:
        CorpusError: the fold has no finished teacher. LeakageError: a teacher has heard a held-out speaker.
        TargetError: imported posteriors are of another temperature, tokenizer or audio, or only CTC frames of other
            recordings than the student's; the parent is asked and not there; a weighting lacks what it asks for.
    """
    need_sense(config.target)
    forbidden = left_out(teachers, fold)
    imported = {speaker: teachers.posteriors(speaker) for speaker in teachers.imported}
    speakers = [speaker for speaker in sorted({*teachers.finished, *imported}) if speaker not in forbidden]
    if not speakers:
        raise CorpusError(
            f"{teachers.folder} has no finished teacher for this fold.", "Train them first: 'xded teach'."
        )
    parent = _parent_of(teachers, config, speakers)
    ready = {speaker: imported[speaker] for speaker in speakers if speaker in imported}
    paths = {speaker: teachers.teacher(speaker) / "best.pt" for speaker in speakers if speaker not in ready}
    test_takes = frozenset(r.take for r in parts_of(corpus, fold, config).test)
    asked = questions(corpus, speakers, recordings, config.target, test_takes)
    if PARENT in asked and parent is not None:
        paths[PARENT] = parent
    used = dict.fromkeys([*(paths[s] for s in paths if s in asked), *([parent] if parent else [])])
    heard = [p for path in used for p in provenance_of(load(path))]
    heard += [
        p for folder in ready.values() for index in check_imported(folder, corpus, config) for p in index.provenance
    ]
    guard(fold, dict.fromkeys(heard), test_takes)
    folders = {s: out / "posteriors" / s for s in asked}
    words = listed_words(corpus, config)
    run_all(_extract_job, [(paths[s], s, asked[s], config, folders[s], words) for s in paths if s in asked], jobs)
    for speaker, folder in ready.items():
        shutil.rmtree(out / "posteriors" / speaker, ignore_errors=True)
        shutil.copytree(folder, out / "posteriors" / speaker)
    tokenizer = Tokenizer.load(teachers.tokenizer, config.tokenizer.normaliser)
    made = aggregate_all(folders, asked, recordings, corpus, tokenizer, config, out, parent)
    if not made:
        raise TargetError(
            f"{teachers.folder} has CTC posteriors only, and with heard '{config.target.heard}' every teacher has "
            "heard another recording: their frames do not line up.",
            "Give --heard same_audio, or import the decoder's posteriors too.",
        )
    return made


def _parent_of(teachers: Teachers, config: Config, speakers: Sequence[str]) -> Path | None:
    """Checkpoint of the parent, where targets depend on it and it is there.

    Raises:
        TargetError: the targets cannot be made without it, or a speaker has its name.
    """
    if not needs_parent(config):
        return None
    if PARENT in speakers:
        raise TargetError(f"A speaker is called '{PARENT}', as the parent is.", "Rename the speaker in the manifest.")
    path = teachers.parent / "best.pt"
    if path.is_file():
        return path
    if config.target.asked == "own":  # who has a teacher does not need it
        return None
    why = "target.asked is own_and_parent" if config.target.asked != "all" else "weighting 'embedding' needs its ears"
    raise TargetError(
        f"{teachers.folder} has no parent, and {why}.",
        "Train it with 'xded teach', or ask all teachers (--asked all) and weigh them in another way.",
    )


def check_imported(folder: Path, corpus: Corpus, config: Config) -> list[Index]:
    """Indexes of one imported teacher.

    Raises:
        TargetError: they were imported at another temperature, or describe other audio than the corpus has.
    """
    again = "Import them again from this corpus, with this temperature: 'xded import-teachers'."
    hashes = {recording.recording: recording for recording in corpus.recordings}
    indexes = [read_index(folder / kind) for kind in KINDS if (folder / kind).is_dir()]
    for index in indexes:
        if index.temperature != config.objective.temperature:
            raise TargetError(
                f"{folder} was imported at temperature {index.temperature:g}; the objective says "
                f"{config.objective.temperature:g}.", again,
            )  # fmt: skip
        for entry in index.recordings:
            known = hashes.get(entry.recording)
            if known is not None and audio_hash(known) != entry.audio_sha256:
                raise TargetError(
                    f"{folder}: the posterior of '{entry.recording}' describes other audio (its SHA-256 differs).",
                    again,
                )
    return indexes


# --- from answers to targets ----------------------------------------------------------------------------------------


def aggregate_all(
    folders: Mapping[str, Path],
    asked: Mapping[str, Sequence[Recording]],
    recordings: Sequence[Recording],
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: Config,
    out: Path,
    parent: Path | None = None,
) -> dict[Kind, Index]:
    """One target a recording and kind, from posteriors that are there.

    Args:
        folders: posteriors of each teacher, called as its speaker, and of the parent (`PARENT`) where `target.asked`
            is not all; asked: recordings that each was asked about, or more.
        recordings: what the student trains on: nothing else has a part in targets or weights.
        corpus: gives bands. tokenizer: the teachers'.
        parent: checkpoint of the parent, needed with weighting `embedding`.

    Raises:
        TargetError: posteriors do not fit together, or lack what the config asks for.
    """
    need_sense(config.target)
    council = [s for s in sorted(folders) if s != PARENT or config.target.asked != "all"]
    stores = {
        kind: {s: Store(folders[s] / kind) for s in council if (folders[s] / kind).is_dir()}
        for kind in kinds_of(config)
    }
    wordless = [s for s in council if s not in stores.get("words", council)]
    if wordless:
        raise TargetError(
            f"The objective reads targets of words, and there are none of teachers {few(wordless)}.",
            "Set objective.word_kd=0: posteriors from elsewhere are of single tokens; or train the teachers here.",
        )
    voices = None
    if config.target.weighting == "embedding":
        if parent is None:
            raise TargetError("Weighting 'embedding' needs the parent's checkpoint.", "Weigh with likelihood instead.")
        voices = voices_of(parent, recordings, config.decode.batch_size)
    made: dict[Kind, Index] = {}
    for kind, answers in stores.items():
        if answers:
            together = _Council(answers, recordings, corpus, tokenizer, config, voices)
            made[kind] = together.aggregate(kind, asked, out)
    return made


Voices = tuple[dict[str, np.ndarray], tuple[Provenance, ...]]


@torch.inference_mode()
def voices_of(parent: Path, recordings: Sequence[Recording], batch_size: int) -> Voices:
    """Mean encoder output of the parent over each speaker's recordings, [D] each, and what the parent has heard.

    Every recording counts as much as any other of its speaker, however long it is.
    """
    recogniser = load_recogniser(parent)
    data = TrainingData(recordings, recogniser.student.front_end, recogniser.tokenizer)
    means: dict[str, list[np.ndarray]] = {}
    for _, batch in batches(data, batch_size):
        assert batch.features is not None
        encoded, frames = recogniser.student.encode(batch.features, batch.feature_lengths)
        for speaker, outputs, count in zip(batch.speakers, encoded, frames.tolist(), strict=True):
            means.setdefault(speaker, []).append(outputs[:count].double().mean(dim=0).numpy())
    return {speaker: np.mean(rows, axis=0) for speaker, rows in means.items()}, recogniser.provenance


class _Council:
    """Teachers' answers of one kind, and everything that says whom to believe."""

    def __init__(
        self,
        stores: Mapping[str, Store],
        recordings: Sequence[Recording],
        corpus: Corpus,
        tokenizer: Tokenizer,
        config: Config,
        voices: Voices | None,
    ) -> None:
        self.stores, self.recordings, self.tokenizer, self.config = stores, recordings, tokenizer, config
        self.first = next(iter(stores.values())).index
        strange = [s for s, store in stores.items() if store.index.words != self.first.words]
        if strange:
            raise TargetError(
                f"Teachers {few(strange)} were asked about another list of words than {next(iter(stores))}.",
                "Make the posteriors of all teachers anew, with one corpus: 'xded targets' into an empty folder.",
            )
        if PARENT not in stores:
            self._need_no_parent()
        weighting = config.target.weighting
        entries = {s: store.index.recordings for s, store in stores.items()}
        self.evidence = Evidence(
            bands={s: corpus.band_of(s) for s in stores if s != PARENT} if weighting == "band" else {},
            accuracy=accuracies(entries, recordings, tokenizer.normaliser) if weighting == "accuracy" else {},
            fit=fits(entries, recordings) if weighting == "likelihood" else {},
            closeness=closeness_of(voices[0], stores) if voices else {},
        )
        self.provenance = (
            *(p for store in stores.values() for p in store.index.provenance), *(voices[1] if voices else ())
        )  # fmt: skip

    def _need_no_parent(self) -> None:
        asked = self.config.target.asked
        without = sorted({r.speaker for r in self.recordings} - set(self.stores)) if asked == "own" else []
        if asked == "own_and_parent" or without:
            who = f"; {few(without)} have no teacher" if without else ""
            raise TargetError(
                f"target.asked is {asked}, and there are no {self.first.kind} posteriors of the parent{who}.",
                "Train the parent with 'xded teach', or ask all teachers: --asked all.",
            )

    def aggregate(self, kind: Kind, asked: Mapping[str, Sequence[Recording]], out: Path) -> Index:
        """Writes the targets of one kind to OUT/<kind>."""
        how = self.config.target
        hashes = {s: h for store in self.stores.values() for s, h in store.index.teacher_hashes.items()}
        index = self.first.model_copy(
            update={
                "teachers": tuple(self.stores),
                "teacher_hashes": hashes,
                "heard": how.heard,
                "aggregation": how.aggregation,
                "weighting": how.weighting,
                "asked": how.asked,
                "best": how.best,
                "spelled_only": how.spelled_only,
                "provenance": tuple(dict.fromkeys(self.provenance)),
                "recordings": (),
            }
        )
        answered = {s: [r for r in asked[s] if r.recording in store] for s, store in self.stores.items()}
        partners = partners_of(self.recordings, answered, self.config)
        writer = StoreWriter(out / kind, index)
        for recording in self.recordings:
            heard = partners.get(recording.recording, {})
            heard = {s: heard[s] for s in listened_to(heard, recording.speaker, how.asked)}
            if not heard:
                continue
            entry, posterior = self._target(recording, heard)
            if how.spelled_only and not self._spells(entry, recording):
                writer.drop(recording.recording)
            else:
                writer.add(entry, posterior)
        return writer.close()

    def _target(self, recording: Recording, heard: Mapping[str, str]) -> tuple[Entry, Posterior]:
        """One recording's target; `heard`: teacher -> id of the recording that it heard."""
        entries = {s: self.stores[s].entry(heard[s]) for s in heard}
        said = {s: self.stores[s].read(heard[s]) for s in heard}
        lengths = {len(p.ids) for p in said.values()}
        if len(lengths) > 1:
            raise TargetError(
                f"Teachers disagree on the number of steps of '{recording.recording}': {sorted(lengths)}.",
                "Teachers of one fold must share front end, subsampling and tokenizer; train them with one config.",
            )
        how = self.config.target
        weights = weigh(how.weighting, recording, entries, said, self.evidence, how.best)
        believed = [said[s] for s in weights]
        mean = combine(believed, list(weights.values()), how.aggregation, self.first.vocabulary)
        least_blank = np.min([p.least_blank for p in believed], axis=0)
        posterior = top_k(mean, how.top_k, least_blank)
        entry = Entry(
            recording=recording.recording,
            audio_sha256=audio_hash(recording),
            steps=len(mean),
            weight=weights,
            text=spelled(posterior, self.first, self.tokenizer),
        )
        return entry, posterior

    def _spells(self, entry: Entry, recording: Recording) -> bool:
        normaliser = self.tokenizer.normaliser
        return normalise(str(entry.text), normaliser) == normalise(recording.text, normaliser)


def spelled(posterior: Posterior, index: Index, tokenizer: Tokenizer) -> str:
    """The most probable text: greedy CTC, decoder steps up to </s>, or the most probable word."""
    if index.kind != "decoder":
        return text_of(posterior, index.kind, tokenizer, words=index.words)
    best = best_path(posterior)[0].tolist()
    return tokenizer.decode(best[: best.index(tokenizer.eos)] if tokenizer.eos in best else best)


def partners_of(
    recordings: Sequence[Recording], asked: Mapping[str, Sequence[Recording]], config: Config
) -> dict[str, dict[str, str]]:
    """For every recording that the coverage mode keeps: teacher -> id of the recording that the teacher heard.

    With `same_audio` that is the recording itself, for the teachers that have heard it. With `same_prompt` it is the
    teacher's own speaker saying the same block, prompt and microphone; the n-th take is paired with the n-th (around
    in a circle).
    """
    kept = config.target.coverage, config.target.min_teachers
    if config.target.heard == "same_audio":
        known = {s: [r.recording for r in rows] for s, rows in asked.items()}
        heard = coverage(known, *kept)
        return {r.recording: dict.fromkeys(heard[r.recording], r.recording) for r in recordings if r.recording in heard}
    own = {s: _by_key(rows) for s, rows in asked.items()}
    covered = coverage({s: list(keys) for s, keys in own.items()}, *kept)
    seen: dict[tuple[str, tuple[str, str, str]], int] = {}
    partners = {}
    for recording in sorted(recordings, key=lambda r: r.take):
        key = key_of(recording)
        place = seen.get((recording.speaker, key), 0)
        seen[(recording.speaker, key)] = place + 1
        if key in covered:
            partners[recording.recording] = {s: own[s][key][place % len(own[s][key])] for s in covered[key]}
    return partners


def _by_key(recordings: Sequence[Recording]) -> dict[tuple[str, str, str], list[str]]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for recording in sorted(recordings, key=lambda r: r.take):
        rows.setdefault(key_of(recording), []).append(recording.recording)
    return rows
