"""Healthy variants: other corpora, seeds, sizes and recipes; nothing is wrong with any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REAL
from faults.plant_tokens import write_study_file
from faults.plant_training import around
from faults.workbench import Workbench, healthy, make_targets, xded
from xded.corpus.synthetic import make_embedded_corpus
from xded.training.loop import Loop


def supervised(bench: Workbench, out: Path, *flags: object) -> list[Path]:
    """A run from the parent, evaluated."""
    return [bench.evaluate(bench.train(out / "run", *bench.from_parent, *flags))]


def on_another_corpus(
    bench: Workbench, out: Path, corpus: Path, held_out: str, updates: int, *flags: object
) -> list[Path]:
    """A supervised run from scratch on another corpus, evaluated."""
    lines = len((corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    stages = f"train.stages=[{{epochs: {max(2, updates * 16 // lines)}, peak_lr: 0.003}}]"
    words = ("--corpus", corpus, "--held-out", held_out, "--set", stages)
    return [bench.evaluate(bench.train(out / "run", *words, *flags)), corpus]


@healthy("student from the parent, CTC-KD")
def student(bench: Workbench, out: Path) -> list[Path]:
    """The workbench's student."""
    return [bench.student]


@healthy("supervised from scratch")
def scratch(bench: Workbench, out: Path) -> list[Path]:
    """The workbench's baseline."""
    return [bench.scratch]


@healthy("corpus alone")
def corpus_alone(bench: Workbench, out: Path) -> list[Path]:
    """Seven speakers, three microphones."""
    return [bench.corpus]


@healthy("everything of the fold at once")
def everything(bench: Workbench, out: Path) -> list[Path]:
    """Corpus, teachers, targets, student and baseline together."""
    return [bench.corpus, bench.teachers, bench.targets, bench.student, bench.scratch]


@healthy("teachers of the other fold")
def other_fold(bench: Workbench, out: Path) -> list[Path]:
    """Parent and teachers without T03."""
    return [bench.teachers_of_three, bench.corpus]


@healthy("decoder-KD")
def decoder_kd(bench: Workbench, out: Path) -> list[Path]:
    """From the parent, decoded through the decoder."""
    flags = ("--targets", bench.targets, "--decoder-kd", 1, "--set", "decode.mode=decoder")
    return [*supervised(bench, out, *flags), bench.targets]


@healthy("both KD losses, from scratch")
def both_kd(bench: Workbench, out: Path) -> list[Path]:
    """Target speakers only."""
    flags = (*bench.from_scratch, "--no-controls", *bench.distilled, "--decoder-kd", 0.5)
    return [bench.evaluate(bench.train(out / "run", *flags))]


@healthy("another embedded corpus")
def another_seed(bench: Workbench, out: Path) -> list[Path]:
    """Other voices, other words, one microphone, another training seed."""
    corpus = out / "corpus"
    make_embedded_corpus(
        corpus, controls=2, targets=4, words=("alpha", "hotel", "water", "copy", "line"), takes=4, seed=8
    )
    return on_another_corpus(bench, out, corpus, "T01", 150, "--seed", 5)


@healthy("fsdd")
def fsdd(bench: Workbench, out: Path) -> list[Path]:
    """Real digits (the embedded corpus without controls where they are not there)."""
    corpus = out / "corpus"
    if REAL.is_dir():
        xded("corpus", "import", "fsdd", REAL / "fsdd", "--out", corpus)
        return on_another_corpus(bench, out, corpus, "theo", 200)
    make_embedded_corpus(corpus, controls=0, targets=4, words=6, takes=4, seed=21)
    return on_another_corpus(bench, out, corpus, "T02", 150)


@healthy("asc16")
def asc16(bench: Workbench, out: Path) -> list[Path]:
    """Real words through a NeMo manifest, far too few updates (the embedded corpus where they are not there)."""
    corpus = out / "corpus"
    if REAL.is_dir():
        xded("corpus", "import", "nemo", REAL / "asc16" / "recordings.jsonl", "--out", corpus)
        return on_another_corpus(bench, out, corpus, "01", 150)
    make_embedded_corpus(corpus, controls=4, targets=2, words=12, takes=2, seed=22)
    return on_another_corpus(bench, out, corpus, "T01", 150)


@healthy("model of another size")
def other_size(bench: Workbench, out: Path) -> list[Path]:
    """`tiny`: four encoder layers, four decoder layers; hardly trained."""
    stages = "train.stages=[{epochs: 4, peak_lr: 0.002}]"
    return [bench.evaluate(bench.train(out / "run", "--model-size", "tiny", "--set", stages))]


@healthy("frozen lower layers")
def freeze_layers(bench: Workbench, out: Path) -> list[Path]:
    """Subsampling and one layer never move."""
    return supervised(bench, out, "--set", "train.freeze_layers=1")


@healthy("accumulated batches")
def accumulate(bench: Workbench, out: Path) -> list[Path]:
    """Two batches an update."""
    return supervised(bench, out, "--set", "train.accumulate=2", "--batch-size", 8)


@healthy("noam, seed 1")
def noam(bench: Workbench, out: Path) -> list[Path]:
    """From scratch, another decay, another seed."""
    return [bench.evaluate(bench.train(out / "run", *bench.from_scratch, "--set", "train.decay=noam", "--seed", 1))]


@healthy("constant rate, no warm-up")
def constant(bench: Workbench, out: Path) -> list[Path]:
    """From the parent."""
    flags = ("--set", "train.decay=constant", "--set", "train.warmup_steps=0", "--seed", 2)
    return supervised(bench, out, *flags, *bench.distilled)


@healthy("BPE pieces, no punctuation, lower case")
def bpe(bench: Workbench, out: Path) -> list[Path]:
    """Another tokenizer and normaliser, from scratch."""
    sets = ("tokenizer.kind=bpe", "tokenizer.vocabulary=40", "tokenizer.normaliser=lower_no_punctuation")
    flags = [word for setting in sets for word in ("--set", setting)]
    return [bench.evaluate(bench.train(out / "run", *bench.from_scratch, *flags))]


@healthy("held-out speaker included")
def included(bench: Workbench, out: Path) -> list[Path]:
    """The diagnostic that hears half of the held-out speaker's takes, and says so."""
    return [bench.evaluate(bench.train(out / "run", *bench.from_scratch, "--include-held-out"))]


@healthy("stopped and resumed")
def resumed(bench: Workbench, out: Path) -> list[Path]:
    """A run that was stopped half-way and went on as it should."""
    run = out / "run"

    def stop(original: Callable[..., None], self: Loop, outputs: Any, batch: Any, index: int) -> None:
        if self.number(index) + 1 == 37:
            self.stop_requested.set()
        original(self, outputs, batch, index)

    flags = (*bench.from_parent, *bench.distilled)
    with around(Loop, "on_train_batch_end", stop):
        bench.train(run, *flags)
    bench.train(run, *flags, "--resume")
    return [bench.evaluate(run)]


@healthy("stopped, not yet resumed")
def unfinished(bench: Workbench, out: Path) -> list[Path]:
    """Half a run, without an evaluation."""

    def stop(original: Callable[..., None], self: Loop, outputs: Any, batch: Any, index: int) -> None:
        if self.number(index) + 1 == 50:
            self.stop_requested.set()
        original(self, outputs, batch, index)

    with around(Loop, "on_train_batch_end", stop):
        bench.train(out / "run", *bench.from_parent)
    return [out / "run"]


@healthy("evaluations in the study's format")
def study_format(bench: Workbench, out: Path) -> list[Path]:
    """Two models, decoded as they should be."""
    tokenizer = bench.teachers / "tokenizer.model"
    files = []
    for name, run in (("student", bench.student), ("scratch", bench.scratch)):
        path = out / f"eval_T05_{name}.json"
        files.append(write_study_file(path, bench.predictions_of(run), tokenizer=tokenizer))
    return [*files, tokenizer]


@healthy("parent of control speakers only")
def controls_only(bench: Workbench, out: Path) -> list[Path]:
    """It has heard two healthy voices; two teachers are adapted from it."""
    return [bench.teachers_of_controls]


@healthy("hardly trained")
def hardly_trained(bench: Workbench, out: Path) -> list[Path]:
    """One epoch from scratch: bad, and honestly so."""
    stages = "train.stages=[{epochs: 2, peak_lr: 0.003}]"
    return [bench.evaluate(bench.train(out / "run", "--no-controls", "--set", stages))]


@healthy("word list and beam")
def word_list(bench: Workbench, out: Path) -> list[Path]:
    """The student's evaluations with a closed word list and with a beam, under names of their own."""
    run = bench.copy(bench.student, out / "run")
    bench.evaluate(run, "--word-list", "--output", run / "closed.json")
    bench.evaluate(run, "--beam", 4, "--output", run / "beam.json")
    return [run, run / "closed.json", run / "beam.json"]


@healthy("global normaliser, validation speakers")
def global_normaliser(bench: Workbench, out: Path) -> list[Path]:
    """Features normalised over the training data; whole speakers kept for validation."""
    sets = ("features.normalisation=global", "fold.validation=speakers", "fold.validation_fraction=0.25")
    flags = [word for setting in sets for word in ("--set", setting)]
    return [bench.evaluate(bench.train(out / "run", *bench.from_scratch, *flags))]


@healthy("targets of the same prompts, weighted")
def same_prompt(bench: Workbench, out: Path) -> list[Path]:
    """Decoder targets: every teacher heard its own speaker; weights by reliability."""
    make_targets(bench, out / "targets", "--heard", "same_prompt", "--weighting", "reliability")
    flags = ("--targets", out / "targets", "--decoder-kd", 1, "--set", "target.heard=same_prompt")
    return [*supervised(bench, out, *flags), out / "targets"]


@healthy("targets of two teachers")
def two_teachers(bench: Workbench, out: Path) -> list[Path]:
    """As few as an ensemble can have, their parent has heard controls only; averaged probabilities at T = 1."""
    exclude = ("--exclude", "T01", "--exclude", "T02")
    words = ("targets", "--config", bench.recipe, "--teachers", bench.teachers_of_controls, "--no-controls", *exclude)
    xded(*words, "--out", out / "targets", "--jobs", 1, "--aggregation", "prob_mean", "--temperature", 1)
    init = ("--init", bench.teachers_of_controls / "parent", "--no-controls", *exclude)
    run = bench.train(out / "run", *init, "--targets", out / "targets", "--ctc-kd", 1, "--temperature", 1)
    return [bench.evaluate(run), out / "targets", bench.corpus]


@healthy("the student, probed", probe=True)
def probed(bench: Workbench, out: Path) -> list[Path]:
    """The workbench's student, with active probes."""
    return [bench.student]


@healthy("the baseline, probed", probe=True)
def probed_baseline(bench: Workbench, out: Path) -> list[Path]:
    """The workbench's baseline, with active probes."""
    return [bench.scratch]
