"""Probes that train: eight recordings learned by heart, and words learned under wrong labels.

Both go through `training.run.fit`, the loop that made the run, into a temporary folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from xded.checks.training import HEADS, SILENT_SHARE, heads_of, trained_heads
from xded.config import OF_SPEAKERS, AugmentConfig, Config, FoldConfig, ObjectiveConfig, StageConfig
from xded.corpus.folds import Fold
from xded.corpus.manifest import Recording
from xded.errors import CorpusError, TokenizerError, TrainingError, few
from xded.findings import CHECKS, Finding, Severity
from xded.models.checkpoints import load
from xded.models.recogniser import Recogniser, load_recogniser, pick_device
from xded.objectives import ctc_frames_needed
from xded.scoring import Prediction, is_right
from xded.targets.store import Store, TargetError
from xded.training.data import TrainingData
from xded.training.evaluation import recognise
from xded.training.job import Job
from xded.training.loop import InterruptedRunError
from xded.training.monitor import unused_parts
from xded.training.preflight import NEVER_FORCED
from xded.training.run import fit

EIGHT = 8
# Learned on four corpora: micro, tiny and the tests' model after 30 to 80 updates at 3e-3, small after 60 at 1e-3.
ROUND = 80  # updates; it is stopped at the end of the round that has all eight right
ROUNDS = 3
LARGE = 2_000_000  # parameters; above, an update takes about a second on a processor
HUGE = 20_000_000  # parameters; above, training on a processor is left out
PEAK_LR = {"large": 1e-3, "other": 3e-3}
NEVER = 1_000_000  # updates or epochs between saves that nobody needs

# With true labels 90 updates make 20 to 40 of 48 takes of 8 words right, with wrong ones 4 to 7 (4 corpora, micro).
WORDS = 8
TAKES_OF_WORD = 6  # to train on, and as many others to test on
LABEL_UPDATES = 90
LABEL_BATCH = 16
FEWEST_TAKES = 16  # on fewer, not even all right is far from chance
RARE = 1e-3  # probability of a result as good by chance, below which it is not chance

STILL = AugmentConfig(frequency_masks=0, time_masks=0, mel_warp=0.0, noise=0.0, tempo=0.0)


@dataclass(frozen=True)
class Bench:
    """What the probes work with.

    Attributes:
        recogniser: the trained one; config: of its run.
        train, test: usable recordings of either side, one a take, in a seeded order.
        seed: of everything that is drawn; folder: temporary.
    """

    recogniser: Recogniser
    config: Config
    train: tuple[Recording, ...]
    test: tuple[Recording, ...]
    seed: int
    folder: Path

    @property
    def subject(self) -> str:
        """The checkpoint."""
        return str(self.recogniser.path)

    @property
    def parameters(self) -> int:
        """Size of the model."""
        return self.recogniser.student.parameter_counts()["total"]

    def serve(self, recordings: Sequence[Recording]) -> TrainingData:
        """Recordings as the recogniser's training and tests serve them, without augmentation."""
        return TrainingData(recordings, self.recogniser.student.front_end, self.recogniser.tokenizer)


def usable(recordings: Iterable[Recording], recogniser: Recogniser, seed: int) -> tuple[Recording, ...]:
    """One recording a take, in a seeded order: those whose file is there and whose text both heads can write."""
    tokenizer, student = recogniser.tokenizer, recogniser.student
    needed: dict[str, int] = {}
    of_take: dict[str, Recording] = {}
    for recording in recordings:
        of_take.setdefault(recording.take, recording)
    ordered = sorted(of_take.values(), key=lambda r: r.take)
    for text in {recording.text for recording in ordered}:
        try:
            tokenizer.self_test([text])
        except TokenizerError:  # reported by the checks of the tokenizer
            continue
        needed[text] = ctc_frames_needed(tokenizer.encode(text))
    rate = recogniser.config.features.sample_rate
    frames = student.encoded_frames(torch.tensor([round(r.duration * rate) for r in ordered])).tolist()
    order = np.random.default_rng(seed).permutation(len(ordered))
    rows = ((ordered[i], frames[i]) for i in order)
    return tuple(r for r, n in rows if r.text in needed and needed[r.text] <= n and r.audio_filepath.is_file())


def too_large(bench: Bench, most: int) -> bool:
    """Whether training this model takes more than a probe may."""
    return bench.parameters > most and pick_device("auto").type == "cpu"


def recipe(
    bench: Bench, objective: ObjectiveConfig, *, epochs: int, batch_size: int, init: Path | None = None
) -> Config:
    """The run's config for a short training from scratch: same sizes and objective; no dropout, no augmentation, and a
    learning rate that is known to work.
    """
    config = bench.config
    peak_lr = PEAK_LR["large" if bench.parameters > LARGE else "other"]
    train = config.train.model_copy(
        update={
            "stages": (StageConfig(epochs=epochs, peak_lr=peak_lr),), "init": init, "freeze_layers": 0,
            "batch_size": batch_size, "accumulate": 1, "decay": "constant", "validate_every_epochs": epochs,
            "save_every_steps": NEVER, "checkpoint_every_epochs": NEVER, "device": "auto", "sampler": "length",
        }
    )  # fmt: skip
    return config.model_copy(
        update={
            "corpus": None, "fold": FoldConfig(), "seed": bench.seed, "augment": STILL, "objective": objective,
            "model": config.model.model_copy(update={"dropout": 0.0}), "train": train,
        }
    )  # fmt: skip


def train_briefly(bench: Bench, name: str, recordings: Sequence[Recording], config: Config) -> Path:
    """One run of the training loop in the temporary folder; the path of its last weights.

    Raises:
        KeyboardInterrupt: the user stopped it; the other probes are not wanted either.
    """
    job = Job(
        name, config, recordings, (), Fold(()), frozenset(), bench.recogniser.tokenizer, bench.folder / name,
        # wrong labels are meant here, and what pre-flight thinks of the run is reported elsewhere
        force=frozenset(CHECKS) - NEVER_FORCED,
    )  # fmt: skip
    try:
        return fit(job, quiet=True)
    except InterruptedRunError as error:
        raise KeyboardInterrupt from error


def count_right(predictions: Sequence[Prediction], recogniser: Recogniser) -> int:
    """Outputs that are right by the rule of WRA."""
    return sum(is_right(prediction, recogniser.tokenizer.normaliser) for prediction in predictions)


def above_chance(right: int, of: int, chance: float) -> float:
    """Probability that as many or more are right by chance (binomial, one-sided)."""
    return float(binom.sf(right - 1, of, chance))


def most_common_share(recordings: Sequence[Recording]) -> float:
    """Share of the most frequent text: what always saying the same gets right at best."""
    return max(Counter(r.text for r in recordings).values()) / len(recordings)


# --- eight recordings by heart -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """How a few recordings were learned: (updates, loss, right by head) after every round."""

    curve: tuple[dict[str, Any], ...]
    right: dict[str, int]
    of: int
    silent: tuple[str, ...] = ()  # parameters that the objective uses and that received no gradient
    silent_share: float = 0.0  # of all parameters

    @property
    def whole(self) -> bool:
        """Whether every head has all of them right."""
        return all(right == self.of for right in self.right.values())


def overfit(bench: Bench) -> list[Finding]:
    """Eight recordings, of different words where there are eight, must be learned by heart from scratch.

    Labels that have nothing to do with the audio can be learned by heart too: this finds what keeps the model from
    learning (no gradient, masks, heads), not what it is taught.
    """
    covered = _covered(bench)
    eight = _of_different_words(covered or bench.train, EIGHT)
    if len(eight) < EIGHT:
        raise CorpusError(f"Only {len(eight)} training recordings can be used.", "Give the run's own corpus.")
    try:
        taught = _with_targets(bench, eight) if covered else None
        if taught is not None and taught.whole:
            return _in_spite(bench, taught)
        alone = learn(bench, "by_heart", eight, bench.config.objective.supervised)
    except TrainingError as error:
        if error.__cause__ is not None:  # the disk, not the loss
            raise
        return [_not_learned(bench, "refuse", error.problem, {})]
    if not alone.whole:
        return [_head_failed(bench, alone, head) for head, right in alone.right.items() if right < alone.of]
    return _in_spite(bench, alone) or ([] if taught is None else _misled(bench, taught))


def _with_targets(bench: Bench, recordings: Sequence[Recording]) -> Learned | None:
    try:
        # eight recordings have no partners, and the guide is no target
        others = dict.fromkeys(("feature_kd", *OF_SPEAKERS), 0.0)
        return learn(bench, "with_targets", recordings, bench.config.objective.model_copy(update=others))
    except TargetError:  # of another tokenizer or temperature: reported by the checks of targets
        return None


def _covered(bench: Bench) -> list[Recording]:
    """Training recordings that the run's targets are about; none without targets that can be used."""
    objective, folder = bench.config.objective, bench.config.targets
    if folder is None or not objective.kinds:
        return []
    try:
        stores = [Store(folder / kind) for kind in objective.kinds]
    except TargetError:  # reported by the checks of targets
        return []
    covered = [r for r in bench.train if all(r.recording in store for store in stores)]
    return covered if len(covered) >= EIGHT else []


def _of_different_words(recordings: Sequence[Recording], count: int) -> list[Recording]:
    """As many words as there are, then further takes of them."""
    seen: set[str] = set()
    first: list[Recording] = []
    further: list[Recording] = []
    for recording in recordings:
        (further if recording.text in seen else first).append(recording)
        seen.add(recording.text)
    return (first + further)[:count]


def learn(bench: Bench, name: str, recordings: Sequence[Recording], objective: ObjectiveConfig) -> Learned:
    """Trains in rounds until every head that matters has every recording right."""
    decode = bench.config.decode
    # a head that the run inherited, or trains on targets only, cannot be expected to learn anything here
    never_trained = heads_of(decode) - trained_heads(bench.config.objective)
    heads = trained_heads(objective) | (never_trained if bench.config.train.init is None else set())
    longest = max(len(bench.recogniser.tokenizer.encode(r.text)) for r in recordings)
    init: Path | None = None
    curve: list[dict[str, Any]] = []
    right: dict[str, int] = {}
    for number in range(1, (2 if bench.parameters > LARGE else ROUNDS) + 1):
        config = recipe(bench, objective, epochs=ROUND, batch_size=len(recordings), init=init)
        init = train_briefly(bench, f"{name}_{number}", recordings, config)
        learner = load_recogniser(init)
        for head in sorted(heads):
            settings = decode.model_copy(
                update={"mode": head, "beam": 1, "word_list": False, "max_length": max(decode.max_length, longest)}
            )
            data = TrainingData(recordings, learner.student.front_end, learner.tokenizer)
            right[head] = count_right(recognise(learner.student, data, settings), learner)
        curve.append({"updates": number * ROUND, "loss": _last_loss(init.parent), "right": dict(right)})
        if all(count == len(recordings) for count in right.values()):
            break
    assert init is not None
    sizes = {name: parameter.numel() for name, parameter in learner.student.named_parameters()}
    silent = _silent(init, sizes, objective)
    share = sum(sizes[name] for name in silent) / sum(sizes.values())
    return Learned(tuple(curve), right, len(recordings), silent, share)


def _last_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([row["train_loss"] for row in rows if row["event"] == "epoch"][-1])


def _silent(checkpoint: Path, names: Iterable[str], objective: ObjectiveConfig) -> tuple[str, ...]:
    """Parameters that the objective uses and that received no gradient."""
    reached, unused = set(load(checkpoint)["with_gradient"]), unused_parts(objective)
    return tuple(name for name in names if name not in reached and name.split(".")[0] not in unused)


def _in_spite(bench: Bench, learned: Learned) -> list[Finding]:
    """A head alone can learn eight recordings by heart from features that never learn."""
    if learned.silent_share < SILENT_SHARE:
        return []
    what = (
        f"{learned.of} recordings were learned by heart, but by a part of the model only: {len(learned.silent)} "
        f"tensors, {100 * learned.silent_share:.0f} % of the parameters, received no gradient "
        f"({few(learned.silent)})."
    )
    return [_not_learned(bench, "refuse", what, {"curve": list(learned.curve), "silent": list(learned.silent)})]


def _head_failed(bench: Bench, learned: Learned, head: str) -> Finding:
    right, last = learned.right[head], learned.curve[-1]
    decoded = head in heads_of(bench.config.decode)
    unreached = learned.silent_share >= SILENT_SHARE
    severity: Severity = "refuse" if decoded and (unreached or right <= learned.of // 2) else "warn"
    what = (
        f"Of {learned.of} recordings that were trained on for {last['updates']} updates, {right} come out right "
        f"through the {HEADS[head]} (loss {last['loss']:.2g})"
    )
    if head not in trained_heads(bench.config.objective):
        what += f"; the objective gives the {HEADS[head]} no weight"
    elif learned.silent:
        what += f"; {len(learned.silent)} tensors received no gradient ({few(learned.silent)})"
    evidence = {"curve": list(learned.curve), "head": head, "decoded": decoded, "silent": list(learned.silent)}
    return _not_learned(bench, severity, what + ".", evidence)


def _not_learned(bench: Bench, severity: Severity, what: str, evidence: dict[str, Any]) -> Finding:
    return Finding(
        "overfit", severity, bench.subject, what,
        "A model that cannot learn eight recordings by heart learns nothing from thousands.",
        "Look at gradients and attention ('xded inspect RUN --recording R'), at the objective's weights and at "
        "'decode.mode'; no longer training will help.",
        evidence, points=100.0,
    )  # fmt: skip


def _misled(bench: Bench, taught: Learned) -> list[Finding]:
    """The true text alone was learned, the run's targets beside it were in the way."""
    decoded = {head: n for head, n in taught.right.items() if head in heads_of(bench.config.decode)}
    if not decoded or min(decoded.values()) > taught.of // 2:
        return []
    head = min(decoded, key=lambda name: decoded[name])
    return [
        Finding(
            "overfit", "warn", bench.subject,
            f"Eight recordings are learned by heart from their texts, but with the run's targets {decoded[head]} of "
            f"{taught.of} come out right through the {HEADS[head]}: the targets say something else.",
            "Distillation pulls the student away from the text.",
            f"Examine the targets: xded doctor {bench.config.targets} {bench.config.corpus or 'CORPUS'}",
            {"curve": list(taught.curve), "head": head},
        )
    ]  # fmt: skip


# --- wrong labels ---------------------------------------------------------------------------------------------------


def shuffled_labels(bench: Bench) -> list[Finding]:
    """A model that was taught wrong words only must not recognise other takes above chance: else evaluation leaks."""
    labelled, test = wrongly_labelled(bench.train)
    train = usable(labelled, bench.recogniser, bench.seed)  # those long enough for their new text
    objective = bench.config.objective.supervised
    epochs = max(1, LABEL_UPDATES // -(-len(train) // LABEL_BATCH))
    config = recipe(bench, objective, epochs=epochs, batch_size=LABEL_BATCH)
    config = config.model_copy(update={"targets": None})
    learner = load_recogniser(train_briefly(bench, "wrong_labels", train, config))
    trained = trained_heads(objective)
    weight = 0.5 if len(trained) == 2 else float("ctc" in trained)
    settings = bench.config.decode.model_copy(update={"word_list": True, "ctc_weight": weight})
    data = TrainingData(test, learner.student.front_end, learner.tokenizer)
    words = sorted({r.text for r in test})
    right = count_right(recognise(learner.student, data, settings, word_list=words), learner)
    chance = most_common_share(test)
    probability = above_chance(right, len(test), chance)
    if probability >= RARE:
        return []
    return [
        Finding(
            "shuffled-labels", "refuse", bench.subject,
            f"A model that was only taught wrong words recognises {right} of {len(test)} other takes "
            f"({100 * right / len(test):.0f} %, chance {100 * chance:.0f} %, p = {probability:.1g}).",
            "Evaluation gives credit for what the model cannot know, or training reads labels from somewhere else: "
            "every WRA is too high.",
            "Find where training or evaluation sees the true text besides `Recording.text`; trust no score until then.",
            {"right": right, "takes": len(test), "chance": chance, "probability": probability, "words": words,
             "trained_on": len(train)},
            points=100 * (right / len(test) - chance),
        )
    ]  # fmt: skip


def wrongly_labelled(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """Takes of the most frequent words, each labelled as another of them in turn, and other takes with their true text.

    Raises:
        CorpusError: too few words or takes to tell a result from chance.
    """
    counts = Counter(r.text for r in recordings)
    words = [word for word, count in counts.most_common(WORDS) if count > 1]
    train: list[Recording] = []
    test: list[Recording] = []
    for place, word in enumerate(words):
        takes = [r for r in recordings if r.text == word]
        kept = min(TAKES_OF_WORD, len(takes) // 2)
        others = [words[(place + step) % len(words)] for step in range(1, len(words))]
        for number, recording in enumerate(takes[:kept] if others else []):
            train.append(recording.model_copy(update={"text": others[number % len(others)]}))
        test += takes[kept : kept + TAKES_OF_WORD]
    if len(words) < 3 or len(test) < FEWEST_TAKES:
        raise CorpusError(
            f"{len(words)} words with two takes or more, {len(test)} takes to test on: too few to tell from chance.",
            f"It needs 3 words and {FEWEST_TAKES} takes.",
        )
    return train, test
