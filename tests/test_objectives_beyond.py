"""Properties of the losses beyond frames and steps: words, texts, features, speakers who agree, schedules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xded import objectives
from xded.objectives import TopK
from xded.training.auxiliary import Auxiliary

RECORDINGS, FRAMES, VOCABULARY = 4, 9, 7
LENGTHS = torch.tensor([9, 5, 7, 8])
WORDS = torch.tensor([[3, 4, 0], [5, 5, 0], [6, 0, 0], [3, 5, 6]])
WORD_LENGTHS = torch.tensor([2, 2, 1, 3])
SPEAKERS = ("a", "b", "a", "c")


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(seed: int = 0) -> Tensor:
    return random(RECORDINGS, FRAMES, VOCABULARY, seed=seed)


def for_all(words: Tensor, lengths: Tensor, count: int = RECORDINGS) -> tuple[Tensor, Tensor]:
    return words.expand(count, -1, -1), lengths.expand(count, -1)


def word_scores(values: Tensor, frames: Tensor = LENGTHS) -> Tensor:
    return objectives.word_log_probs(values, frames, *for_all(WORDS, WORD_LENGTHS, len(values)), 0)


def every_loss(order: list[int], padding: int = 0) -> dict[str, float]:
    """Of the recordings in an order, with garbage after the end of everything that has an end."""
    values, guide, projected = logits(), random(RECORDINGS, FRAMES, 5, seed=1), random(RECORDINGS, FRAMES, 5, seed=2)
    probabilities = random(RECORDINGS, 4, seed=3).softmax(1)
    probabilities[2] = 0.0  # no target
    texts, heard_lengths = WORDS.clone(), torch.tensor([2, 0, 1, 3])
    steps, numbers = torch.tensor([3, 2, 3, 1]), torch.tensor([0, 0, 1, 0])

    def wider(rows: Tensor, filler: float) -> Tensor:
        shape = (len(rows), padding, *rows.shape[2:])
        return torch.cat([rows, torch.full(shape, filler, dtype=rows.dtype)], dim=1)[order]

    frames, speakers = LENGTHS[order], [SPEAKERS[i] for i in order]
    values, guide, projected = wider(values, 9.0), wider(guide, 5.0), wider(projected, -5.0)
    shares = objectives.partners(numbers[order], speakers)
    words, lengths = for_all(F.pad(WORDS, (0, padding), value=2), WORD_LENGTHS)
    scores = objectives.word_log_probs(values, frames, words, lengths, 0)
    agreed = objectives.agreement(values[:, : 3 + padding], shares, 4.0)
    valid = torch.arange(agreed.shape[1]) < steps[order][:, None]
    losses = {
        "word_kd": objectives.word_kd(scores, probabilities[order], 2.0),
        "text_kd": objectives.text_kd(values, frames, wider(texts, 4), heard_lengths[order], 0),
        "feature_kd": objectives.feature_kd(projected, guide, frames),
        "consistency": objectives.recording_mean(agreed, valid),
        "word_consistency": objectives.agreement(scores, shares, 4.0).mean(),
        "adversary": Auxiliary(5, None, SPEAKERS, 0).adversary(guide, frames, speakers, 0.5),
    }
    return {name: float(loss.detach()) for name, loss in losses.items()}


def test_padding_and_batch_order_change_nothing() -> None:
    plain = every_loss([0, 1, 2, 3])
    assert all(value > 1e-3 for value in plain.values())
    assert every_loss([0, 1, 2, 3], padding=3) == pytest.approx(plain, rel=1e-5)
    assert every_loss([2, 0, 3, 1]) == pytest.approx(plain, rel=1e-5)


def test_word_scores_are_those_of_ctc_word_by_word() -> None:
    scores = word_scores(logits())
    for row in range(RECORDINGS):
        for place, length in enumerate(WORD_LENGTHS.tolist()):
            log_probs = logits()[row, : LENGTHS[row], None].log_softmax(2)
            one = F.ctc_loss(log_probs, WORDS[place : place + 1, :length], LENGTHS[row : row + 1],
                             torch.tensor([length]), reduction="sum")  # fmt: skip
            assert float(scores[row, place]) == pytest.approx(-float(one), rel=1e-5)


def test_a_word_that_does_not_fit_is_impossible_and_harmless() -> None:
    values = logits().requires_grad_()
    scores = word_scores(values, torch.tensor([2, 1, 3, 9]))
    assert (scores <= objectives.IMPOSSIBLE).tolist() == [
        [False, True, False, True],  # a word with a letter twice needs a frame more
        [True, True, False, True],
        [False, False, False, False],
        [False, False, False, False],
    ]
    loss = objectives.word_kd(scores, torch.full((4, 4), 0.25), 2.0)
    loss = loss + objectives.agreement(scores, torch.full((4, 4), 0.25), 4.0).mean()
    loss.backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    nothing = objectives.word_kd(torch.full((1, 2), objectives.IMPOSSIBLE), torch.tensor([[0.5, 0.5]]), 2.0)
    assert float(nothing) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_word_kd_is_zero_for_the_same_and_a_dense_kl_otherwise(temperature: float) -> None:
    student, teacher = logits().requires_grad_(), logits(1)
    said = (word_scores(teacher) / temperature).softmax(1)
    own = (word_scores(student) / temperature).softmax(1)
    dense = (said * (said.log() - own.log())).sum(1).mean() * temperature**2
    loss = objectives.word_kd(word_scores(student), said, temperature)
    torch.testing.assert_close(loss, dense, rtol=1e-4, atol=1e-6)
    # only the listed words are compared, whatever share of the whole they have
    torch.testing.assert_close(objectives.word_kd(word_scores(student), 0.3 * said, temperature), loss)
    same = objectives.word_kd(word_scores(student), own.detach(), temperature)
    assert abs(float(same.detach())) < 1e-5
    same.backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5


def test_text_kd_is_ctc_on_the_text_whatever_the_time_of_its_spikes() -> None:
    lengths = torch.tensor([2, 2, 1, 3])
    loss = objectives.text_kd(logits(), LENGTHS, WORDS, lengths, 0)
    torch.testing.assert_close(loss, objectives.ctc(logits(), LENGTHS, WORDS, lengths, 0))
    spelling = torch.full((1, FRAMES, VOCABULARY), -20.0)
    spelling[0, :, 0] = 0.0
    early, late = spelling.clone(), spelling.clone()
    for spikes, start in ((early, 0), (late, 5)):
        for place, token in enumerate((3, 4)):
            spikes[0, start + place, [0, token]] = torch.tensor([-20.0, 0.0])
    for spikes in (early, late):
        only = objectives.text_kd(spikes, torch.tensor([9]), WORDS[:1], torch.tensor([2]), 0)
        assert float(only) == pytest.approx(0.0, abs=1e-4)


def test_no_text_and_a_text_too_long_count_nothing() -> None:
    values = logits().requires_grad_()
    whole = objectives.text_kd(values, LENGTHS, WORDS, torch.tensor([2, 0, 0, 0]), 0)
    alone = objectives.ctc(values[:1], LENGTHS[:1], WORDS[:1], torch.tensor([2]), 0)
    torch.testing.assert_close(whole, alone / RECORDINGS)
    short = objectives.text_kd(values, torch.tensor([9, 5, 7, 2]), WORDS, torch.tensor([2, 0, 0, 3]), 0)
    torch.testing.assert_close(short, whole)
    short.backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert not values.grad[1:].any()


def test_feature_kd_is_zero_for_the_same_direction() -> None:
    encoded = random(2, 4, 6).requires_grad_()
    lengths = torch.tensor([4, 2])
    loss = objectives.feature_kd(encoded, 3.0 * encoded.detach(), lengths)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(objectives.feature_kd(encoded.detach(), -encoded.detach(), lengths)) == pytest.approx(2.0, abs=1e-6)
    guide = random(2, 4, 6, seed=1).requires_grad_()
    objectives.feature_kd(encoded, guide.detach(), lengths).backward()
    assert encoded.grad is not None
    assert encoded.grad[1, :2].any()
    assert not encoded.grad[1, 2:].any()


def test_partners_are_other_speakers_of_the_same_text() -> None:
    shares = objectives.partners(torch.tensor([0, 0, 1, 1, 2, 0]), ("a", "b", "a", "a", "c", "a"))
    third = 1 / 3
    expected = torch.zeros(6, 6)
    for row in (0, 1, 5):
        expected[row, [0, 1, 5]] = third
    torch.testing.assert_close(shares, expected)  # texts 1 and 2 have one speaker each


def test_agreement_is_the_loss_of_the_paper() -> None:
    scores = random(3, 6).requires_grad_()
    shares = objectives.partners(torch.tensor([0, 0, 1]), ("a", "b", "c"))
    loss = objectives.agreement(scores, shares, 4.0)
    mean = scores[:2].detach().mean(0)
    for row in range(2):
        kl = F.kl_div((scores[row] / 4).log_softmax(0), (mean / 4).softmax(0), reduction="sum") * 16
        assert float(loss[row].detach()) == pytest.approx(float(kl.detach()), rel=1e-4)
    assert float(loss[2].detach()) == 0.0  # nobody else says it
    loss.sum().backward()
    assert scores.grad is not None
    assert not scores.grad[2].any()
    # the ensemble is a target: the gradient of p_own - p_ensemble, times T, and nothing through the mean
    expected = ((scores[:2] / 4).softmax(1) - (mean / 4).softmax(0)) * 4
    torch.testing.assert_close(scores.grad[:2], expected.detach(), rtol=1e-4, atol=1e-5)
    # of a whole group the gradients through the mean cancel out: only one recording's loss shows that there is none
    scores.grad = None
    objectives.agreement(scores, shares, 4.0)[0].backward()
    assert scores.grad is not None
    assert scores.grad[0].any()
    assert not scores.grad[1:].any()


def test_speakers_who_agree_lose_nothing() -> None:
    scores = random(1, 5, 6).repeat(3, 1, 1).requires_grad_()
    loss = objectives.agreement(scores, objectives.partners(torch.zeros(3), ("a", "b", "c")), 4.0).sum()
    assert abs(float(loss.detach())) < 5e-5  # of 15 steps, times 16
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-5


def listed(values: Tensor, k: int, temperature: float) -> TopK:
    probabilities, ids = (values / temperature).softmax(-1).topk(k, dim=-1)
    return TopK(ids, probabilities, (1 - probabilities.sum(-1)).clamp(min=0))


@pytest.mark.parametrize(("made_at", "temperature"), [(2.0, 1.0), (2.0, 4.0), (1.0, 3.0)])
def test_a_target_at_another_temperature_is_what_the_teacher_says_there(made_at: float, temperature: float) -> None:
    """One teacher, or a mean of log-probabilities: exactly; the rest where it is spread evenly."""
    values = logits()
    moved = objectives.resoften(listed(values, VOCABULARY, made_at), made_at, temperature, VOCABULARY)
    straight = listed(values, VOCABULARY, temperature)
    torch.testing.assert_close(moved.probabilities, straight.probabilities, rtol=1e-4, atol=1e-6)
    even = values.clone()
    even[..., 3:] = -1.0
    even[..., :3] = values[..., :3].abs()
    moved = objectives.resoften(listed(even, 3, made_at), made_at, temperature, VOCABULARY)
    straight = listed(even, 3, temperature)
    torch.testing.assert_close(moved.probabilities, straight.probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved.rest, straight.rest, rtol=1e-3, atol=1e-6)
    teachers = (0.5 * values.log_softmax(-1) + 0.5 * logits(1).log_softmax(-1)) / made_at
    mean = teachers.softmax(-1).pow(made_at / temperature)
    torch.testing.assert_close(
        mean / mean.sum(-1, keepdim=True), (teachers * made_at / temperature).softmax(-1), rtol=1e-4, atol=1e-6
    )


def test_the_same_temperature_is_the_same_target_and_nothing_stays_nothing() -> None:
    target = listed(logits(), 3, 2.0)
    assert objectives.resoften(target, 2.0, 2.0, VOCABULARY) is target
    empty = TopK(*(torch.zeros_like(part) for part in target))
    for part in objectives.resoften(empty, 2.0, 1.0, VOCABULARY)[1:]:
        assert not part.any()
    assert not objectives.top_k_kl(logits(), empty, 2.0).any()


def test_the_gradient_is_reversed_for_the_encoder_and_grows_with_the_run() -> None:
    seen = {}
    for progress in (0.0, 0.3, 1.0):
        encoded = random(RECORDINGS, FRAMES, 5).requires_grad_()
        auxiliary = Auxiliary(5, None, SPEAKERS, 0)
        auxiliary.adversary(encoded, LENGTHS, SPEAKERS, progress).backward()
        plain = encoded.detach().clone().requires_grad_()
        pooled = objectives.mean_frame(plain, LENGTHS)
        F.cross_entropy(auxiliary.classifier(pooled), torch.tensor([0, 1, 0, 2])).backward()
        strength = 2 / (1 + math.exp(-10 * progress)) - 1
        assert encoded.grad is not None
        assert plain.grad is not None
        torch.testing.assert_close(encoded.grad, -strength * plain.grad)
        weights = [p.grad for p in auxiliary.classifier.parameters()]
        seen[progress] = [float(w.abs().sum()) for w in weights if w is not None]
    assert len(seen[0.0]) == 4
    assert seen[0.0] == pytest.approx(seen[1.0])  # the classifier itself always learns


def test_equal_micro_batches_add_up() -> None:
    values, probabilities = logits(), random(RECORDINGS, 4, seed=3).softmax(1)
    probabilities[1] = 0.0  # no target: it counts as a recording of its micro-batch
    guide = random(RECORDINGS, FRAMES, VOCABULARY, seed=1)
    heard = torch.tensor([2, 0, 1, 3])

    def losses(part: slice) -> Tensor:
        return torch.stack([
            objectives.word_kd(word_scores(values[part], LENGTHS[part]), probabilities[part], 2.0),
            objectives.text_kd(values[part], LENGTHS[part], WORDS[part], heard[part], 0),
            objectives.feature_kd(values[part], guide[part], LENGTHS[part]),
        ])  # fmt: skip

    torch.testing.assert_close((losses(slice(0, 2)) + losses(slice(2, 4))) / 2, losses(slice(0, 4)))


def test_a_projection_only_where_widths_differ_and_the_same_for_the_same_seed() -> None:
    assert not list(Auxiliary(6, 6, (), 0).parameters())
    before = torch.random.get_rng_state()
    one, other = Auxiliary(6, 8, ("a", "b"), 3), Auxiliary(6, 8, ("b", "a", "a"), 3)
    assert torch.equal(before, torch.random.get_rng_state())  # the run draws what it drew without
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    encoded, guide = random(2, 3, 6), random(2, 3, 8, seed=1)
    loss = one.feature_kd(encoded, guide, torch.tensor([3, 3]))
    loss.backward()
    assert one.projection.weight.grad is not None
    assert one.projection.weight.grad.any()
