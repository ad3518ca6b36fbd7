"""Properties of the losses that the design asks for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xded import objectives
from xded.objectives import TopK, top_k_kl

BATCH, FRAMES, VOCABULARY = 3, 7, 11


def random_logits(seed: int = 0, scale: float = 2.0, frames: int = FRAMES) -> Tensor:
    return scale * torch.randn(BATCH, frames, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor, k: int, temperature: float) -> TopK:
    """A teacher's top k at a temperature."""
    listed, ids = F.softmax(logits / temperature, dim=-1).topk(k, dim=-1)
    return TopK(ids, listed, (1.0 - listed.sum(-1)).clamp(min=0.0))


def dense_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL over the whole vocabulary, in double precision: [B, T]."""
    log_student = F.log_softmax(student.double() / temperature, -1)
    log_teacher = F.log_softmax(teacher.double() / temperature, -1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1) * temperature**2


def losses(logits: Tensor, seed: int = 5, order: Tensor | None = None, padding: int = 0) -> dict[str, Tensor]:
    """Every loss of a batch; the other inputs are in the order given and padded by `padding` steps of garbage."""
    order = torch.arange(BATCH) if order is None else order
    target = kept(random_logits(seed), 4, 2.0)
    frames, tokens = torch.tensor([7, 4, 6]), torch.tensor([[3, 4, 2], [5, 2, 2], [6, 6, 7]])
    lengths = torch.tensor([2, 1, 3])
    least_blank = torch.rand(BATCH, FRAMES, generator=torch.Generator().manual_seed(seed))

    def pad(values: Tensor, filler: float) -> Tensor:
        shape = (len(values), padding, *values.shape[2:])
        return torch.cat([values, torch.full(shape, filler, dtype=values.dtype)], dim=1)[order]

    target = TopK(pad(target.ids, 1), pad(target.probabilities, 0.3), pad(target.rest, 0.2))
    logits, tokens, least_blank = pad(logits, 9.0), pad(tokens, 3), pad(least_blank, 0.0)
    frames, lengths = frames[order], lengths[order]
    speech = objectives.speech_frames(least_blank, frames, 0.5)
    return {
        "ctc": objectives.ctc(logits, frames, tokens, lengths, blank=0),
        "cross_entropy": objectives.cross_entropy(logits[:, : tokens.shape[1]], tokens, lengths),
        "ctc_kd": objectives.ctc_kd(logits, target, speech, 2.0),
        "decoder_kd": objectives.decoder_kd(logits, target, frames, 2.0),
    }


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 10, 11])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_teacher_equal_to_student_gives_zero(k: int, temperature: float, scale: float) -> None:
    logits = random_logits(scale=scale).requires_grad_()
    kl = top_k_kl(logits, kept(logits.detach(), k, temperature), temperature)
    assert kl.abs().max() < 2e-5
    kl.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-4  # a minimum


def test_top_k_kl_approaches_the_dense_kl_from_below() -> None:
    student, teacher = random_logits(1), random_logits(2)
    exact = dense_kl(student, teacher, 2.0)
    by_k = [top_k_kl(student, kept(teacher, k, 2.0), 2.0).double() for k in range(1, VOCABULARY + 1)]
    for fewer, more in itertools.pairwise(by_k):
        assert (fewer <= more + 1e-5).all()  # pooling entries can only lose divergence
    assert (by_k[0] >= -1e-6).all()
    torch.testing.assert_close(by_k[-1], exact, rtol=1e-5, atol=1e-5)
    assert (by_k[2] < exact - 1e-3).any()


def test_kl_is_scaled_by_the_squared_temperature() -> None:
    """With small logits gradients at T then equal those at 1 over K (Hinton et al. 2015, section 2)."""
    teacher, student = random_logits(1, 0.01), random_logits(2, 0.01)
    cold = top_k_kl(student, kept(teacher, VOCABULARY, 1.0), 1.0)
    hot = top_k_kl(student, kept(teacher, VOCABULARY, 4.0), 4.0)
    torch.testing.assert_close(cold, hot, rtol=0.2, atol=1e-6)


@pytest.mark.parametrize("name", ["ctc", "cross_entropy", "ctc_kd", "decoder_kd"])
def test_padding_and_batch_order_change_nothing(name: str) -> None:
    logits = random_logits()
    plain = losses(logits)[name]
    assert plain > 0.01
    torch.testing.assert_close(losses(logits, padding=5)[name], plain)
    for order in itertools.permutations(range(BATCH)):
        torch.testing.assert_close(losses(logits, order=torch.tensor(order))[name], plain)


def test_nothing_beyond_a_recording_gets_a_gradient() -> None:
    for name in ("ctc", "cross_entropy", "ctc_kd", "decoder_kd"):
        logits = random_logits().requires_grad_()
        losses(logits)[name].backward()
        assert logits.grad is not None
        assert logits.grad[0].any()
        assert not logits.grad[1, 4:].any(), name  # the second recording has 4 frames


def test_equal_micro_batches_add_up_under_sgd() -> None:
    """One step of SGD on a batch of four = one step on two accumulated halves."""

    def step(parts: list[list[int]]) -> Tensor:
        torch.manual_seed(0)
        head = torch.nn.Linear(5, VOCABULARY)
        heard = torch.randn(4, FRAMES, 5, generator=torch.Generator().manual_seed(3))
        target = kept(random_logits(4).repeat(2, 1, 1)[:4], 4, 2.0)
        frames = torch.tensor([7, 4, 6, 2])
        for part in parts:
            said = TopK(*(tensor[part] for tensor in target))
            logits = head(heard[part])
            speech = objectives.speech_frames(torch.zeros(len(part), FRAMES), frames[part], 0.5)
            tokens, lengths = torch.tensor([[3, 4], [5, 5], [6, 2], [7, 2]])[part], torch.tensor([2, 1, 1, 1])[part]
            loss = (
                objectives.ctc_kd(logits, said, speech, 2.0)
                + objectives.decoder_kd(logits, said, frames[part], 2.0)
                + objectives.ctc(logits, frames[part], tokens, lengths, 0)
                + objectives.cross_entropy(logits[:, :2], tokens, lengths)
            )
            (loss / len(parts)).backward()
        torch.optim.SGD(head.parameters(), lr=0.1).step()
        return head.weight.detach()

    torch.testing.assert_close(step([[0, 1, 2, 3]]), step([[0, 1], [2, 3]]))
    torch.testing.assert_close(step([[0, 1, 2, 3]]), step([[3, 0], [2, 1]]))


def test_ctc_kd_trains_the_blank() -> None:
    """The KL is over the whole vocabulary: a teacher that says blank raises the student's blank."""
    logits = torch.zeros(1, 4, VOCABULARY, requires_grad=True)
    teacher = torch.zeros(1, 4, VOCABULARY)
    teacher[:, :, 0] = 4.0
    speech = torch.ones(1, 4, dtype=torch.bool)
    objectives.ctc_kd(logits, kept(teacher, 3, 2.0), speech, 2.0).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, 0] < -0.05).all()
    assert (logits.grad[:, :, 1:] > 0).all()


def test_speech_frames_keep_neighbours_and_drop_other_blanks_and_padding() -> None:
    least_blank = torch.tensor([[0.99, 0.99, 0.2, 0.99, 0.99, 0.99, 0.94], [0.99, 0.99, 0.99, 0.1, 0.1, 0.1, 0.1]])
    keep = objectives.speech_frames(least_blank, torch.tensor([7, 3]), threshold=0.95)
    assert keep[0].tolist() == [False, True, True, True, False, True, True]
    assert not keep[1].any()  # what lies beyond the third frame is padding, also as a neighbour


def test_a_threshold_above_one_keeps_every_frame() -> None:
    assert objectives.speech_frames(torch.ones(1, 5), torch.tensor([4]), 1.1)[0].tolist() == [True] * 4 + [False]


def test_a_recording_without_speech_frames_counts_as_zero_and_is_finite() -> None:
    logits = random_logits().requires_grad_()
    loss = objectives.ctc_kd(logits, kept(random_logits(1), 4, 2.0), torch.zeros(BATCH, FRAMES, dtype=torch.bool), 2.0)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_losses_and_gradients_are_finite_at_extreme_logits(scale: float, k: int) -> None:
    logits = random_logits(1, scale).requires_grad_()
    for teacher_scale in (0.1, scale):
        kl = top_k_kl(logits, kept(random_logits(2, teacher_scale), k, 2.0), 2.0)
        (gradient,) = torch.autograd.grad(kl.sum(), logits)
        assert torch.isfinite(kl).all()
        assert torch.isfinite(gradient).all()
        assert (kl > -1e-4).all()
    for loss in losses(logits).values():
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_a_certain_student_is_still_pulled_towards_the_unlisted_entries() -> None:
    """The target gives 30 % to entries beyond its top k; a student that gives them nothing must get a gradient."""
    logits = torch.full((1, 1, VOCABULARY), -40.0)
    logits[0, 0, :2] = 40.0
    logits.requires_grad_()
    target = TopK(torch.tensor([[[0, 1]]]), torch.tensor([[[0.35, 0.35]]]), torch.tensor([[0.3]]))
    top_k_kl(logits, target, 1.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 2:].sum() < -0.29


def test_half_precision_logits_are_computed_in_single() -> None:
    logits, target = random_logits(), kept(random_logits(1), 4, 2.0)
    assert top_k_kl(logits.bfloat16(), target, 2.0).dtype == torch.float32


def test_ctc_is_the_likelihood_a_token() -> None:
    """Two frames, one token: paths 'aa', 'a-', '-a'."""
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    loss = objectives.ctc(probabilities.log(), torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1]), blank=0)
    assert loss.item() == pytest.approx(-math.log(0.3 * 0.6 + 0.3 * 0.1 + 0.5 * 0.6), rel=1e-5)


def test_ctc_has_the_gradient_of_ctc_over_all_classes() -> None:
    """Repeated tokens, padding that is the blank, a text that fills its frames, an empty one, padded frames."""
    logits = (3 * torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(0))).requires_grad_()
    tokens = torch.tensor([[4, 4, 5, 2], [6, 7, 6, 7], [8, 2, 2, 2], [9, 9, 9, 9], [3, 0, 0, 0]])
    lengths, frames = torch.tensor([3, 4, 1, 4, 0]), torch.tensor([12, 10, 1, 7, 9])
    every = logits.double().log_softmax(2).transpose(0, 1)
    expected = F.ctc_loss(every, tokens, frames, lengths, blank=2, reduction="none") / lengths.clamp(min=1)
    found = objectives.ctc(logits, frames, tokens, lengths, blank=2)
    assert float(found.detach()) == pytest.approx(float(expected.mean().detach()), rel=1e-5)
    wanted, got = (torch.autograd.grad(loss, logits)[0] for loss in (expected.mean(), found))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_ctc_frames_needed() -> None:
    assert objectives.ctc_frames_needed([3, 4, 5]) == 3
    assert objectives.ctc_frames_needed([3, 3, 4, 4, 4]) == 8
    tokens = torch.tensor([[3, 3, 4, 4, 4]])
    fits = [
        math.isfinite(objectives.ctc(torch.zeros(1, t, 6), torch.tensor([t]), tokens, torch.tensor([5]), 0))
        for t in (7, 8)
    ]
    assert fits == [False, True]


def test_cross_entropy_counts_the_end_and_smooths() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 3], logits[0, 1, 2] = 5.0, 5.0  # right: token 3, then </s> = 2; the third step is padding
    tokens, lengths = torch.tensor([[3, 2, 2]]), torch.tensor([2])
    plain = objectives.cross_entropy(logits, tokens, lengths)
    assert plain.item() == pytest.approx(math.log(1 + 3 * math.exp(-5)), rel=1e-4)
    assert objectives.cross_entropy(logits, tokens, lengths, smoothing=0.2) > plain + 0.1


def test_recording_mean_weighs_recordings_alike() -> None:
    values, mask = torch.tensor([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0]]), torch.tensor([[True] * 3, [True, False, False]])
    assert objectives.recording_mean(values, mask) == 2.5
    assert objectives.recording_mean(values * math.nan, torch.zeros_like(mask)) == 0
