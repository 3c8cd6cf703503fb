"""CTC and the gloss set against torch's own loss, their definitions, and the single-process big batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.losses.gloss import (
    BLANK,
    GlossCriterion,
    Glosses,
    ctc,
    ctc_in_order_of_video,
    gloss_loss,
    gloss_set,
    words_needed,
)
from pipeline.losses.similarity import Tokens
from tests.contrast_reference import whole_ctc, whole_gloss_set
from tests.unit.pipeline.losses.meeting import Meeting, Thread, mean_over_ranks

CLASSES = 6
WORDS = [4, 7, 2, 9, 5, 3]
GLOSSES = [[2, 1], [3, 3, 5], [], [1, 4, 2, 4], [5], [2, 3, 1]]
"""The third clip has none."""
CRITERIA: list[GlossCriterion] = [ctc, ctc_in_order_of_video, gloss_set]


def logits_of(words: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(sum(words), CLASSES, dtype=torch.float64, generator=generator)).requires_grad_()


def share(logits_MV: Tensor, clips: range, criterion: GlossCriterion, *tiling: object) -> Tensor:
    rows_MV = torch.cat([logits_MV.split(WORDS)[clip] for clip in clips])
    classes = [gloss for clip in clips for gloss in GLOSSES[clip]]
    glosses = Glosses(torch.tensor(classes, dtype=torch.int64), [len(GLOSSES[clip]) for clip in clips])
    return gloss_loss(Tokens(rows_MV, [WORDS[clip] for clip in clips]), glosses, criterion, *tiling)  # type: ignore[arg-type]


def in_order_of_video(logits_MV: Tensor) -> list[list[int]]:
    """Each gloss at its most probable word token, equal places in the order given."""
    orders = []
    for rows_KV, own in zip(logits_MV.detach().log_softmax(-1).split(WORDS), GLOSSES, strict=True):
        orders.append(sorted(own, key=lambda gloss, rows_KV=rows_KV: int(rows_KV[:, gloss].argmax())))
    return orders


def expected(criterion: GlossCriterion, logits_MV: Tensor) -> Tensor:
    logits = Tokens(logits_MV, WORDS)
    if criterion is gloss_set:
        return whole_gloss_set(logits, GLOSSES)
    return whole_ctc(logits, GLOSSES if criterion is ctc else in_order_of_video(logits_MV))


def assert_equal(found: Tensor, wanted: Tensor, logits_MV: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    grads = (torch.autograd.grad(loss, logits_MV)[0] for loss in (found, wanted))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("tile_numbers", [1, 60, 1 << 20])
def test_tiles_equal_one_padded_batch(criterion: GlossCriterion, tile_numbers: int) -> None:
    logits_MV = logits_of(WORDS)
    found = share(logits_MV, range(6), criterion, Thread(Meeting(1), 0), tile_numbers)
    assert_equal(found, expected(criterion, logits_MV), logits_MV)
    with torch.no_grad():
        assert share(logits_MV, range(6), criterion).item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 2, 3, 6), (0, 2, 4, 6)])
def test_ranks_equal_one_batch(criterion: GlossCriterion, cuts: tuple[int, ...]) -> None:
    """Ranks with other numbers of clips, and one (the third clip alone) with none that has glosses."""
    logits_MV = logits_of(WORDS, seed=1)

    def loss_of(rank: int, group: Thread) -> Tensor:
        return share(logits_MV, range(cuts[rank], cuts[rank + 1]), criterion, group, 60)

    assert_equal(mean_over_ranks(len(cuts) - 1, loss_of), expected(criterion, logits_MV), logits_MV)


def test_the_order_of_the_video_is_another_one() -> None:
    """Else the test above would not see it."""
    logits_MV = logits_of(WORDS)
    assert in_order_of_video(logits_MV) != GLOSSES
    assert [sorted(own) for own in in_order_of_video(logits_MV)] == [sorted(own) for own in GLOSSES]


def test_ctc_by_hand() -> None:
    """Two word tokens, one gloss: gloss-gloss, gloss-blank and blank-gloss."""
    logits_MV = torch.tensor([[0.3, 1.0], [-0.5, 0.2]], dtype=torch.float64)
    blank, gloss = logits_MV.softmax(-1).T
    paths = gloss[0] * gloss[1] + gloss[0] * blank[1] + blank[0] * gloss[1]
    loss = gloss_loss(Tokens(logits_MV, [2]), Glosses(torch.tensor([1]), [1]), ctc)
    assert loss.item() == pytest.approx(-math.log(paths), rel=1e-12)


def test_no_clip_with_glosses_is_zero_and_connected() -> None:
    logits_MV = logits_of([3, 2])
    loss = gloss_loss(Tokens(logits_MV, [3, 2]), Glosses(torch.tensor([], dtype=torch.int64), [0, 0]), ctc)
    loss.backward()
    assert loss.item() == 0.0 and logits_MV.grad is not None and not logits_MV.grad.any()


def test_bf16_logits_are_compared_in_fp32() -> None:
    logits_MV = logits_of(WORDS).detach().bfloat16().requires_grad_()
    loss = share(logits_MV, range(6), ctc)
    loss.backward()
    assert loss.dtype == torch.float32 and logits_MV.grad is not None and logits_MV.grad.dtype == torch.bfloat16
    assert loss.item() == share(logits_MV.detach().float(), range(6), ctc).item()


def test_sure_word_tokens_keep_the_set_finite() -> None:
    """Probabilities of exactly one and zero."""
    logits_MV = torch.tensor([[-200.0, 200.0, -200.0], [200.0, -200.0, -200.0]]).requires_grad_()
    for gloss in (1, 2):
        loss = gloss_loss(Tokens(logits_MV, [2]), Glosses(torch.tensor([gloss]), [1]), gloss_set)
        (grad,) = torch.autograd.grad(loss, logits_MV)
        assert loss.isfinite() and grad.isfinite().all()


def test_words_needed() -> None:
    for classes in ([1], [1, 2], [1, 1], [1, 2, 1], [1, 1, 1, 2]):
        feasible = [
            words
            for words in range(1, 9)
            if any(
                [k for k, _ in itertools.groupby(path) if k != BLANK] == classes
                for path in itertools.product((0, 1, 2), repeat=words)
            )
        ]
        assert words_needed(classes) == feasible[0]
        orders = set(itertools.permutations(classes))
        assert words_needed(classes, any_order=True) == max(words_needed(order) for order in orders)
