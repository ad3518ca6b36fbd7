"""Pictures of runs and recordings: what is seen in the pixels, and what is said in words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from xded.corpus.manifest import Recording
from xded.doctor.inspection import Attention, CtcPosterior, Curves, Inspected, Spike, curves_of
from xded.report import figures
from xded.report.figures import (
    COLOURS,
    Picture,
    attention_picture,
    ctc_picture,
    gradient_picture,
    label_rows,
    loss_picture,
    rate_picture,
    run_pictures,
    validation_picture,
)

FRAME_S = 0.04
GROUPS = ("subsampling", *(f"encoder.{i}" for i in range(16)), "ctc_head", *(f"decoder.{i}" for i in range(4)))


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the pixels: faster."""
    monkeypatch.setattr(figures, "DPI", 75)


def pixels(picture: Picture) -> np.ndarray:
    """[height, width, 3], 0 to 1; checks size and that something is drawn."""
    image = np.asarray(imread(io.BytesIO(picture.png)))[..., :3]
    assert image.shape[:2] == pytest.approx(
        (picture.height * figures.DPI / 100, picture.width * figures.DPI / 100), abs=1
    )
    assert image.std() > 0.02
    return image


def share_of(colour: str, image: np.ndarray) -> float:
    return float((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02).mean())


def ctc(who: str, tokens: Sequence[int], frames: int, pieces: Sequence[str]) -> CtcPosterior:
    """One spike every other frame."""
    probabilities = np.full((frames, len(pieces)), 0.001)
    probabilities[:, 0] = 1.0
    for place, token in enumerate(tokens):
        probabilities[2 * place, [0, token]] = 0.001, 1.0
    probabilities /= probabilities.sum(1, keepdims=True)
    spikes = tuple(Spike(2 * i, t, pieces[t], 2 * i * FRAME_S, 0.9) for i, t in enumerate(tokens))
    return CtcPosterior(
        who, "".join(pieces[t] for t in tokens), 2.0, probabilities, FRAME_S, spikes, probabilities[:, 0]
    )


def heard(
    tokens: int = 3, *, layers: int = 1, teachers: int = 0, text: str = "", output: int | None = None
) -> Inspected:
    """A made-up recording of so many tokens; `output`: tokens of a free-running text."""
    frames, pieces = 2 * tokens + 2, ["<unk>", *(chr(65 + i) for i in range(tokens))]
    random = np.random.default_rng(0)
    lengths = {"true text": tokens} | ({} if output is None else {"free-running output": output})
    attention = tuple(
        Attention(
            what, (*pieces[1 : count + 1], "</s>"), random.dirichlet(np.ones(frames), (layers, count + 1)), FRAME_S
        )
        for what, count in lengths.items()
    )
    spoken = list(range(1, tokens + 1))
    row = {"duration": frames * FRAME_S, "text": text or "".join(pieces[1:]), "recording": "r1", "speaker": "s1"}
    return Inspected(
        recording=Recording.model_validate({**row, "audio_filepath": "r1.wav", "take": "r1", "prompt": "p"}),
        model="student, best.pt, epoch 1",
        features=random.normal(size=(4 * frames, 80)),
        hop_s=0.01,
        band_hz=np.linspace(50, 7900, 80),
        ctc_text="A",
        decoder_text="A",
        attention=attention,
        ctc=tuple(
            ctc(who, spoken, frames, pieces)
            for who in ("student", "target", *(f"teacher M{i:02d}" for i in range(teachers)))
        ),
        notes=(),
    )


def rows_of(updates: int, every: int = 10, **step: Any) -> list[dict[str, Any]]:
    """Metrics of a run, its first update and every tenth."""
    random = np.random.default_rng(0)
    logged = sorted({1, *range(every, updates + 1, every), updates})
    rows: list[dict[str, Any]] = []
    for update in logged:
        known = {"update": update, "updates": updates, "epochs": 1, "stage": 1, "lr": 1e-3, "gradient_norm": 2.0}
        rows.append({"event": "step", **known, "loss": 8.0 / update, "ctc": 10.0 / update, **step})
        norms = {group: float(random.uniform(0.5, 1.5)) for group in GROUPS}
        rows.append({"event": "gradients", "update": update, "norms": norms, "blank": 0.2, "rows": 0.1})
    end = {"epoch": 1, "update": updates, "train_loss": 1.0, "val_loss": 1.5, "wra": 0.625, "empty": 0.25}
    return [*rows, {"event": "epoch", **end, "distinct": 7, "references": 9, "teacher_forced": 0.875}]


def curves(updates: int, **step: Any) -> Curves:
    return curves_of(rows_of(updates, **step), None)


# --- one recording --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "layers", "output"), [(1, 1, 0), (4, 2, None), (30, 2, 12)])
def test_attention_of_short_and_long_words(tokens: int, layers: int, output: int | None) -> None:
    picture = attention_picture(heard(tokens, layers=layers, output=output), "a.png")
    pixels(picture)
    assert picture.text.count("layer ") == layers * (1 if output is None else 2)
    assert ("Free-running output" in picture.text) == (output is not None)


def test_attention_words_are_the_numbers() -> None:
    weights = np.zeros((1, 3, 8))
    weights[0, [0, 1, 2], [1, 4, 7]] = 1.0
    one = heard(2)
    shown = Inspected(**{**vars(one), "attention": (Attention("true text", ("A", "B", "</s>"), weights, FRAME_S),)})
    said = "True text (A B </s>): layer 1 looks at 0.04 s first, at 0.28 s last, later than before in 2 of 2 steps."
    assert said in attention_picture(shown, "a.png").text


@pytest.mark.parametrize(("tokens", "teachers"), [(1, 0), (30, 3)])
def test_ctc_of_short_and_long_words(tokens: int, teachers: int) -> None:
    one = heard(tokens, teachers=teachers)
    picture = ctc_picture(one, "c.png")
    image = pixels(picture)
    assert share_of(COLOURS[0], image) > 0  # the first piece's line and label
    assert picture.text.count(" reads ") == 2 + teachers
    blank = one.ctc[0].blank.mean()
    assert (
        f"reads {one.ctc[0].text} ({tokens} spike{'' if tokens == 1 else 's'}, mean blank {blank:.2f})" in picture.text
    )


def test_a_piece_has_one_colour_in_all_panels() -> None:
    """The colour of a piece that only the second panel has is not in the picture of the first alone."""
    one = heard(2)
    pieces = ["<unk>", "A", "B"]
    both = (ctc("student", [1], 6, pieces), ctc("target", [1, 2], 6, pieces))
    alone, together = (
        pixels(ctc_picture(Inspected(**{**vars(one), "ctc": panels}), "c.png")) for panels in (both[:1], both)
    )
    assert share_of(COLOURS[1], alone) == 0 < share_of(COLOURS[1], together)


def test_a_prompt_with_dollar_signs_is_no_formula() -> None:
    pixels(attention_picture(heard(2, text="$\\frac{$ ^_ {"), "a.png"))


def test_labels_of_neighbours_stand_in_different_rows() -> None:
    pieces = ["<unk>", "▁CONTROL", "▁COUNTRY", "X"]
    near = ctc("student", [1, 2, 1, 3], 60, pieces)
    assert label_rows(near, 60 * FRAME_S)[:3] == [0, 1, 2]
    far = CtcPosterior("s", "", 1.0, near.probabilities, FRAME_S, (near.spikes[0], near.spikes[3]), near.blank)
    assert label_rows(far, 8 * FRAME_S) == [0, 0]
    assert label_rows(ctc("student", [3, 3, 3], 20, pieces), 20 * FRAME_S) == [0, 0, 0]


# --- a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2, 8_000])
def test_short_and_long_runs(updates: int) -> None:
    pictures = run_pictures(curves(updates), {"ctc": 0.5}, 1.0)
    assert [p.name for p in pictures] == ["loss.png", "learning_rate.png", "gradients.png", "validation.png"]
    for picture in pictures:
        pixels(picture)


def test_a_run_that_logged_nothing_has_no_pictures() -> None:
    assert run_pictures(curves_of([], None), {}, None) == []


def test_words_of_a_run_are_its_numbers() -> None:
    many = curves(50)
    assert "CTC (weight 0.5) from 10 to 0.2" in loss_picture(many, {"ctc": 0.5}).text
    assert "applied 0.001; the plan is not known" in rate_picture(many).text
    said = validation_picture(many).text
    assert "1 times in 1 epochs: WRA 62.5 %; empty outputs 25 %; steps right given the true text 87.5 %" in said
    assert "distinct outputs 7" in said


def test_layers_without_and_with_zero_gradient_are_seen_and_named() -> None:
    rows = rows_of(200)
    healthy = gradient_picture(curves_of(rows, None), 1.0)
    for row in rows:
        if row["event"] == "gradients":
            row["norms"]["encoder.7"] = 0.0
            del row["norms"]["encoder.3"]
            if row["update"] > 100:
                row["norms"]["encoder.3"] = 1.0
    faulty = gradient_picture(curves_of(rows, None), 1.0)
    orange, grey = COLOURS[1], "#D9D9D9"
    before, after = pixels(healthy), pixels(faulty)
    row = 1 / len(GROUPS) / 2  # of the map, which takes more than half of the picture
    assert share_of(orange, after) - share_of(orange, before) > row / 2
    assert share_of(grey, after) - share_of(grey, before) > row / 4
    assert "zero at times: encoder.7" in faulty.text
    assert "zero" not in healthy.text
    assert "(encoder.7) to" in faulty.text  # the smallest median


def test_a_run_without_gradients_by_layer_says_so() -> None:
    steps = [row for row in rows_of(50) if row["event"] == "step"]
    picture = gradient_picture(curves_of(steps, None), 1.0)
    pixels(picture)
    assert "did not log them by layer" in picture.text


def test_numbers_that_are_missing_or_not_finite_are_left_out() -> None:
    rows = rows_of(30)
    rows[0]["loss"], rows[1]["norms"]["ctc_head"], rows[2]["lr"] = float("nan"), float("inf"), "fast"
    run = curves_of(rows, None)
    for picture in run_pictures(run, {}, None):
        pixels(picture)
        assert "nan" not in picture.text
        assert "inf" not in picture.text
