"""Teachers' posteriors and targets: which belong together, and every check of them that can be run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from xded.checks import posteriors as numbers
from xded.checks import targets as indexes
from xded.checks import teachers as spelling
from xded.checks.posteriors import Said
from xded.config import Config
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.errors import XdedError, few
from xded.findings import Examination, Finding
from xded.models.checkpoints import sha256_of
from xded.models.recogniser import tokenizer_of
from xded.scoring import Prediction, is_right, read_predictions
from xded.targets.store import Index, Kind, Posterior, Store
from xded.teachers.adapt import Teachers, parts_of
from xded.teachers.posteriors import KINDS
from xded.tokenizer import NORMALISERS, Tokenizer, normalise

if TYPE_CHECKING:
    from xded.doctor.given import Given
    from xded.doctor.run_folder import RunFolder

EVERY_KIND: tuple[Kind, ...] = get_args(Kind)
SAMPLED = 200  # recordings whose numbers are looked at, spread over the speakers
LEAST_OF_SPEAKER = 8  # of them, of every speaker: teachers are judged by their own
COMPARED = 16  # recordings whose average is computed again, or whose posteriors are compared bit by bit
HASHED = 50  # files that are read where the manifest has no hashes
SEED = 0
GREEDY = "the greedy text of the posteriors"
NOTHING_SAID = (True, True, 9, 0.0)  # after every rank of a finding
AVERAGE = ""  # name of the aggregate among the teachers
TOKENIZER = "tokenizer.model"


@dataclass
class TargetSet:
    """What lies in one folder of `xded targets`: aggregates, and the teachers' posteriors that they were made from."""

    root: Path
    targets: dict[Kind, Store] = field(default_factory=dict)
    posteriors: dict[Kind, dict[str, Store]] = field(default_factory=dict)  # by the name of the teacher's folder

    @property
    def stores(self) -> dict[str, Store]:
        """All stores by their path below the root."""
        every = [*self.targets.values(), *(s for rows in self.posteriors.values() for s in rows.values())]
        return {_below(store.folder, self.root): store for store in every}

    @property
    def indexes(self) -> dict[str, Index]:
        """Their indexes."""
        return {name: store.index for name, store in self.stores.items()}


def _below(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)


def stores_in(folder: Path) -> list[Path]:
    """Stores in a folder of targets or of posteriors, half-written ones included; none when it is neither."""
    if _is_store(folder):
        return [folder]
    teachers = (folder / "posteriors", *([folder] if folder.name == "posteriors" else []))
    folders = [folder, *(one for above in teachers if above.is_dir() for one in sorted(above.iterdir()))]
    found = [one / kind for one in folders for kind in EVERY_KIND]
    return [path for path in found if _is_store(path) or (path.is_dir() and not any(path.iterdir()))]


def _is_store(folder: Path) -> bool:
    index = folder / "index.json"
    if any(folder.glob("shard_*.safetensors")) or (folder / "index.json.tmp").is_file():
        return True
    if not index.is_file():
        return False
    with index.open("rb") as file:  # other programs have an index.json too
        return b'"kind"' in file.read(200)


def sets_of(stores: Iterable[Store]) -> list[TargetSet]:
    """Stores by the folder of `xded targets` that they lie in."""
    sets: dict[Path, TargetSet] = {}
    for store in stores:
        of_teacher = store.index.aggregation is None
        root = store.folder.parent
        if of_teacher:
            root = root.parent.parent if root.parent.name == "posteriors" else root.parent
        one = sets.setdefault(root, TargetSet(root))
        if of_teacher:
            one.posteriors.setdefault(store.index.kind, {})[store.folder.parent.name] = store
        else:
            one.targets[store.index.kind] = store
    return list(sets.values())


def examine(examination: Examination, given: Given) -> None:
    """Checks all posteriors and targets, and the cross-tests of teachers."""
    for one in sets_of(given.stores):
        users = _users(one, given)
        corpus = _corpus_of(one, given.corpora)
        _Examiner(examination, given, one, users, corpus).examine()
    for teachers in given.teachers:
        _examine_crosstest(examination, given, teachers)


def _users(one: TargetSet, given: Given) -> list[RunFolder]:
    """Runs that distil these targets: those that name their folder, and those whose own targets are gone."""
    found = []
    for run in given.runs:
        if run.config is None or not run.config.objective.kinds:
            continue
        named = run.config.targets
        alone = len({store.folder.parent for store in given.stores if store.index.aggregation is not None}) == 1
        if named is not None and (named.resolve() == one.root.resolve() or (alone and not named.exists())):
            found.append(run)
    return found


def _corpus_of(one: TargetSet, corpora: Iterable[Corpus]) -> Corpus | None:
    """The corpus with most of the audio that a set describes, or else with most of its recordings."""
    stores = list(one.stores.values())
    entries = {e.recording: e.audio_sha256 for store in stores[:1] for e in store.index.recordings}
    best, most = None, (0, 0)
    for corpus in corpora:
        known = [r for r in corpus.recordings if r.recording in entries]
        score = sum(r.audio_sha256 == entries[r.recording] for r in known), len(known)
        if score > most:
            best, most = corpus, score
    return best


class _Examiner:
    """Runs every check of one set."""

    def __init__(
        self, examination: Examination, given: Given, one: TargetSet, users: list[RunFolder], corpus: Corpus | None
    ) -> None:
        self.examination, self.given, self.one, self.users, self.corpus = examination, given, one, users, corpus
        self.subject, self.indexes = str(one.root), one.indexes
        self.payloads = {str(run.path): payload for run in users if (payload := _payload(given, run))}
        self.recordings: dict[str, Recording] = {r.recording: r for r in corpus.recordings} if corpus else {}
        self.tokenizer = self._find_tokenizer()
        self.texts: dict[str, str] = {}  # normalised
        self.tokens: dict[str, list[int]] = {}
        self.said: dict[str, tuple[bool, bool, int, float]] = {}  # rank of the worst finding of every check
        self.ctc_right: dict[str, float] = {}  # of every teacher, and of the average
        if self.tokenizer is not None:
            written = {r.text for r in self.recordings.values()}
            normal = {text: normalise(text, self.tokenizer.normaliser) for text in written}
            ids = {text: self.tokenizer.encode(text) for text in written}
            self.texts = {name: normal[r.text] for name, r in self.recordings.items()}
            self.tokens = {name: ids[r.text] for name, r in self.recordings.items()}

    def examine(self) -> None:
        """Indexes first, then a sample of the numbers."""
        if self.given.corpora and self.corpus is None:
            self.examination.cannot(f"{self.subject} against a corpus", "no corpus that was given has its recordings.")
        self._whose()
        if self.corpus is not None:
            self._against_corpus()
        for run in self.users:
            self._coverage(run)
        for kind in EVERY_KIND:
            if kind in self.one.targets or kind in self.one.posteriors:
                self._numbers(kind)

    def _run(self, check: str, find: Callable[..., list[Finding]], *arguments: Any, detail: str = "") -> None:
        """Runs a check; what one kind of posteriors has shown already is not said again of the other."""
        self.examination.run(check, self.subject, lambda: self._once(find(*arguments, self.subject)), detail)

    def _once(self, findings: Iterable[Finding]) -> list[Finding]:
        new = [finding for finding in findings if finding.rank < self.said.get(finding.check, NOTHING_SAID)]
        self.said |= {finding.check: finding.rank for finding in new}
        return new

    def _find_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the set, wherever one with its fingerprint lies."""
        wanted = next(iter(self.indexes.values())).tokenizer
        candidates = list(self.given.tokenizers.values())
        for path in (self.one.root / TOKENIZER, *(teachers.tokenizer for teachers in self.given.teachers)):
            if path.is_file():
                try:
                    candidates.append(Tokenizer.load(path, NORMALISERS[0]))
                except XdedError as error:
                    self.examination.cannot(str(path), str(error))
        for payload in self.payloads.values():
            if isinstance(payload.get("tokenizer_model"), torch.Tensor):
                candidates.append(tokenizer_of(payload, NORMALISERS[0]))
        found = indexes.find_tokenizer(wanted, candidates)
        if found is None:
            self.examination.cannot(
                f"what the posteriors in {self.subject} spell",
                f"no tokenizer with their fingerprint ({wanted[:12]}) was given; 'xded teach' writes tokenizer.model.",
            )
        return found

    # --- indexes ---------------------------------------------------------------------------------------------

    def _whose(self) -> None:
        """Tokenizers, temperatures, weights, copies."""
        of = f"{len(self.indexes)} stores"
        prints = {name: str(payload.get("tokenizer_fingerprint")) for name, payload in self.payloads.items()}
        given = {str(path): tokenizer for path, tokenizer in self.given.tokenizers.items()}
        self._run("tokenizer-mismatch", indexes.tokenizers, self.indexes, prints, given, detail=of)
        wanted = {str(run.path): run.config.objective.temperature for run in self.users if run.config}
        self._run("temperature", indexes.temperature, self.indexes, wanted, detail=of)
        for kind, store in self.one.targets.items():
            says = f"{kind}, {len(store.index.teachers)} teachers"
            self._run("effective-teachers", indexes.effective_teachers, store.index, detail=says)
            self._run("copied-teacher", indexes.copied_hashes, store.index.teacher_hashes, detail=kind)
            self._run("target-coverage", indexes.frames_of_other_recordings, store.index, detail=kind)
            absent = sorted(set(store.index.teachers) - set(self.one.posteriors.get(kind, {})))
            if absent and self.one.posteriors:
                self.examination.cannot(
                    f"the {kind} posteriors of {few(absent)} in {self.subject}", "they are not there."
                )
        for kind, stores in self.one.posteriors.items():
            hashes = {name: value for name, s in stores.items() for value in s.index.teacher_hashes.values()}
            self._run("copied-teacher", indexes.copied_hashes, hashes, detail=f"{kind}, {len(hashes)} teachers")

    def _against_corpus(self) -> None:
        """Audio and lengths of everything that the corpus knows."""
        of = f"{len(self.indexes)} stores"
        hashes = {name: [r.audio_sha256] for name, r in self.recordings.items() if r.audio_sha256}
        if not hashes:  # the files are read instead, as many as seconds allow
            names = _spread(self._sample(next(iter(self.one.stores.values()))), HASHED)
            self.examination.run(
                "audio-hash", self.subject, lambda: self._hash_files(names), f"{len(names)} files read"
            )
        else:
            self._run("audio-hash", indexes.audio_hashes, self.indexes, hashes, detail=of)
        durations_s = {name: r.duration for name, r in self.recordings.items()}
        tokens = {name: len(ids) for name, ids in self.tokens.items()}
        self._run("frame-count", indexes.frame_counts, self.indexes, durations_s, tokens, detail=of)

    def _hash_files(self, names: list[str]) -> list[Finding]:
        hashes = {name: [sha256_of(self.recordings[name].audio_filepath)] for name in names}
        return indexes.audio_hashes(self.indexes, hashes, self.subject)

    def _coverage(self, run: RunFolder) -> None:
        """Whether the targets cover what a run trains on."""
        assert run.config is not None
        config = run.config
        for kind in (kind for kind in EVERY_KIND if kind in config.objective.kinds):
            if kind not in self.one.targets:
                self.examination.cannot(f"the {kind} targets of {run.path}", f"{self.subject} has none.")
            elif self.corpus is not None:
                detail = f"{kind} targets, training recordings of {run.path}"
                self._run("target-coverage", _covered, self.one.targets[kind].index, self.corpus, config, detail=detail)

    # --- numbers ---------------------------------------------------------------------------------------------

    def _sample(self, store: Store) -> list[str]:
        """Some recordings of a store, as many of every speaker where the corpus knows the speakers."""
        by_speaker: dict[str, list[str]] = {}
        for entry in store.index.recordings:
            known = self.recordings.get(entry.recording)
            if known is not None or not self.recordings:
                by_speaker.setdefault(known.speaker if known else "", []).append(entry.recording)
        random = np.random.default_rng(SEED)
        each = max(LEAST_OF_SPEAKER, SAMPLED // max(len(by_speaker), 1))
        return [rows[i] for _, rows in sorted(by_speaker.items()) for i in random.permutation(len(rows))[:each]]

    def _read(self, store: Store, names: Iterable[str]) -> Said:
        try:
            return store.as_stored(name for name in names if name in store)
        except XdedError as error:
            self.examination.cannot(str(store.folder), str(error))
            return {}

    def _numbers(self, kind: Kind) -> None:
        """Everything that needs the probabilities themselves, on a sample."""
        target, teachers = self.one.targets.get(kind), self.one.posteriors.get(kind, {})
        first = target or next(iter(teachers.values()))
        together = all(store.index.heard == "same_audio" for store in teachers.values())
        shared = self._sample(first)
        said = {t: self._read(store, shared if together else self._sample(store)) for t, store in teachers.items()}
        said = {teacher: rows for teacher, rows in said.items() if rows}
        aggregate = self._read(target, shared) if target else {}
        target = target if aggregate else None
        every: dict[str, Said] = {f"posteriors/{t}/{kind}": rows for t, rows in said.items()}
        if target:
            every[kind] = aggregate
        blank = self._blank(p for rows in every.values() for p in rows.values()) if kind == "ctc" else None
        of = f"{kind}: {len(shared)} of {len(first.index.recordings)} recordings, {len(said)} teachers"
        known = len(first.index.words) if kind == "words" else first.index.vocabulary
        found = numbers.normalisation(every, known, self.subject)
        self._run("normalisation", lambda subject: found, detail=of)
        if found:
            self.examination.cannot(f"what the {kind} posteriors in {self.subject} say", "they are no probabilities.")
            return
        if said and together and len(said) > 1:
            some = {t: {n: rows[n] for n in _spread(rows, COMPARED)} for t, rows in said.items()}
            self._run("copied-teacher", numbers.copied_posteriors, some, detail=of)
        if kind == "ctc" and blank is not None:
            declared = {teacher: teachers[teacher].index.temperature for teacher in said}
            self._run("temperature", numbers.sharpness, said, declared, first.index.vocabulary, blank, detail=of)
        self._run("target-text", lambda subject: self._what_it_says(kind, aggregate, said), detail=of)
        if kind == "decoder":
            self._forced(aggregate, said)
        elif blank is not None:
            self._ctc(aggregate, said, blank, of)

    def _blank(self, posteriors: Iterable[Posterior]) -> int | None:
        return spelling.blank_of(posteriors) if self.tokenizer is None else self.tokenizer.blank

    def _what_it_says(self, kind: Kind, aggregate: Said, said: Mapping[str, Said]) -> list[Finding]:
        """Text against text, the mean computed again, probabilities that were noted: the first that is certain."""
        target, teachers = self.one.targets[kind] if aggregate else None, self.one.posteriors.get(kind, {})
        found: list[Finding] = []
        if self.tokenizer is not None and self.texts:
            for store, rows in [(target, aggregate)] if target else [(teachers[t], rows) for t, rows in said.items()]:
                order = [e.recording for e in store.index.recordings if e.recording in self.texts]
                texts = {name: self.texts[name] for name in order}
                words = store.index.words
                found = found or spelling.target_text(rows, kind, self.tokenizer, texts, self.subject, words)
        if any(finding.severity == "refuse" for finding in found):
            return found
        return self._not_the_mean(target, aggregate, said) or self._not_as_noted(kind, said) or found

    def _not_the_mean(self, target: Store | None, aggregate: Said, said: Mapping[str, Said]) -> list[Finding]:
        """Targets against the mean of the posteriors beside them, computed again."""
        if target is None or not said or "effective-teachers" in self.said:
            return []
        kind = target.index.kind
        own = [self.one.posteriors[kind][teacher].index.teacher_hashes for teacher in said]
        if any(hashes.items() - target.index.teacher_hashes.items() for hashes in own):
            why = "the posteriors were made by other checkpoints of the teachers, later or earlier."
            self.examination.cannot(f"whether the {kind} targets in {self.subject} are their teachers' mean", why)
            return []
        some = {name: aggregate[name] for name in _spread(aggregate, COMPARED)}
        return numbers.aggregate_of_others(some, said, target.index, self.subject)

    def _not_as_noted(self, kind: Kind, said: Mapping[str, Said]) -> list[Finding]:
        """Posteriors against the probability of the true text that was noted with them."""
        if self.tokenizer is None or not self.tokens or not said or "temperature" in self.said:
            return []
        teachers = self.one.posteriors[kind]
        noted = {t: {name: teachers[t].entry(name).true_log_prob for name in rows} for t, rows in said.items()}
        index = teachers[next(iter(said))].index
        place = {word: [number] for number, word in enumerate(index.words)}
        ids = {name: place.get(text, []) for name, text in self.texts.items()} if place else self.tokens
        return numbers.rows_of_others(said, noted, ids, index, self.tokenizer, self.subject)

    def _ctc(self, aggregate: Said, said: Mapping[str, Said], blank: int, of: str) -> None:
        """Spikes, and what every teacher recognises."""
        stores = self.one.posteriors.get("ctc", {})
        spelled = {t: {name: spelling.spikes_of(p, blank) for name, p in rows.items()} for t, rows in said.items()}
        rate_hz = next((stores[t].index.frame_rate_hz for t in said), None)
        if len(said) > 1 and rate_hz:
            self._run("spike-misalignment", spelling.spike_misalignment, spelled, rate_hz, detail=of)
            average = {name: spelling.spikes_of(p, blank) for name, p in aggregate.items()}
            if average:
                self._run("blank-average", spelling.blank_average, spelled, average, detail=of)
        if self.tokenizer is None or not self.texts:
            return
        for teacher, rows in {**said, AVERAGE: aggregate}.items():
            right = [self._is_right("ctc", name, p) for name, p in rows.items()]
            self.ctc_right[teacher] = float(np.mean(right)) if right else 0.0
        counts = {t: _counts((self.recordings[n].speaker, self._is_right("ctc", n, p)) for n, p in rows.items())
                  for t, rows in said.items()}  # fmt: skip
        sampled = Counter(self.texts[name] for rows in said.values() for name in rows)
        if counts:
            chance = max(sampled.values()) / sampled.total()
            self._run("teacher-accuracy", spelling.teacher_accuracy, counts, chance, GREEDY, detail=_accuracy(counts))

    def _is_right(self, kind: Kind, name: str, posterior: Posterior) -> bool:
        assert self.tokenizer is not None
        return spelling.text_of(posterior, kind, self.tokenizer) == self.texts[name]

    def _forced(self, aggregate: Said, said: Mapping[str, Said]) -> None:
        """Decoder posteriors that pass for free-running ones: the first store that is marked so."""
        if self.tokenizer is None or not self.texts:
            return
        tokens = {name: len(ids) for name, ids in self.tokens.items()}
        stores = {**self.one.posteriors.get("decoder", {}), AVERAGE: self.one.targets.get("decoder")}
        found: list[Finding] = []
        for name, rows in {**said, AVERAGE: aggregate}.items():
            store = stores[name]
            if store is not None and rows and not found:
                right = float(np.mean([self._is_right("decoder", n, p) for n, p in rows.items()]))
                ctc = self.ctc_right.get(name)
                found = indexes.teacher_forced(store.index, tokens, right, ctc, self.subject)
        self._run("teacher-forced", lambda subject: found, detail=f"{len(stores)} stores")


def _covered(index: Index, corpus: Corpus, config: Config, subject: str) -> list[Finding]:
    return indexes.coverage(index, parts_of(corpus, make_fold(corpus, config.fold), config).train, subject)


def _spread(names: Iterable[str], count: int) -> list[str]:
    """About `count` of the names, from all over the list."""
    rows = list(names)
    return rows[:: max(1, len(rows) // count)][:count]


def _payload(given: Given, run: RunFolder) -> dict[str, Any] | None:
    """A checkpoint of a run; none when none can be read (the checks of runs say so)."""
    for path in run.checkpoints.values():
        try:
            return given.facts(path)
        except XdedError:
            pass
    return None


def _counts(rows: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    """Right outputs and outputs of every speaker."""
    found: dict[str, tuple[int, int]] = {}
    for speaker, right in rows:
        before = found.get(speaker, (0, 0))
        found[speaker] = before[0] + right, before[1] + 1
    return found


def _accuracy(counts: spelling.Counts) -> str:
    """Every teacher's right outputs on its own and on others' speech."""
    cells = []
    for teacher, rows in sorted(counts.items()):
        own = rows.get(teacher, (0, 0))
        others = [pair for speaker, pair in rows.items() if speaker != teacher]
        cells.append(f"{teacher} {own[0]}/{own[1]}, others {sum(r for r, _ in others)}/{sum(n for _, n in others)}")
    return "; ".join(cells)


def _examine_crosstest(examination: Examination, given: Given, teachers: Teachers) -> None:
    """Every teacher on recordings that none was trained on, from the predictions of `xded teach`."""
    files = sorted((teachers.folder / "crosstest").glob("*.jsonl"))
    if not files:
        examination.cannot(f"how well the teachers in {teachers.folder} recognise others", "there is no cross-test.")
        return
    inside = [run.config for run in given.runs if run.config and run.path.is_relative_to(teachers.folder)]
    normaliser = inside[0].tokenizer.normaliser if inside else NORMALISERS[0]

    subject = str(teachers.folder)

    def recognise() -> list[Finding]:
        said = {path.stem: read_predictions(path) for path in files}
        counts = {t: _counts((p.speaker, is_right(p, normaliser)) for p in rows) for t, rows in said.items()}
        texts = Counter(p.reference for rows in said.values() for p in rows)
        chance = max(texts.values()) / texts.total()
        return spelling.teacher_accuracy(counts, chance, "the cross-test", subject)

    def forced() -> list[Finding]:
        tokenizer = Tokenizer.load(teachers.tokenizer, normaliser)
        heard = {path.stem: _heard(read_predictions(path), path.stem, given.stores, tokenizer) for path in files}
        decoded = teachers.folder / "crosstest" / "decode.json"
        settings = decoded.read_text(encoding="utf-8", errors="replace") if decoded.is_file() else ""
        mode = "decoder" if '"mode":"decoder"' in settings else "ctc"
        return spelling.forced_predictions({t: rows for t, rows in heard.items() if rows}, mode, subject)

    examination.run("teacher-accuracy", subject, recognise, f"cross-test of {len(files)} teachers")
    if any(store.index.kind == "decoder" and store.index.aggregation is None for store in given.stores):
        examination.run("teacher-forced", subject, forced, f"cross-test of {len(files)} teachers")


def _heard(
    predictions: Sequence[Prediction], teacher: str, stores: Iterable[Store], tokenizer: Tokenizer
) -> list[spelling.Heard]:
    """A teacher's predictions beside what its posteriors of the same recordings say; none when there are few."""
    own = [s for s in stores if s.index.teachers == (teacher,) and s.index.tokenizer == tokenizer.fingerprint]
    names = [p.recording for p in predictions]
    both = {s.index.kind: s for s in own if s.index.aggregation is None and all(name in s for name in names)}
    if len(both) < len(KINDS) or len(names) < COMPARED:
        return []
    said = {kind: store.as_stored(names) for kind, store in both.items()}
    texts = {k: {n: spelling.text_of(p, k, tokenizer) for n, p in rows.items()} for k, rows in said.items()}
    rows = []
    for p in predictions:
        predicted, reference = (normalise(text, tokenizer.normaliser) for text in (p.hypothesis, p.reference))
        rows.append(spelling.Heard(predicted, texts["decoder"][p.recording], texts["ctc"][p.recording], reference))
    return rows
