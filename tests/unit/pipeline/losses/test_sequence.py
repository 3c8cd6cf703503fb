"""Losses of candidates against the definition by enumeration, and against slow references, in fp64."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from pipeline.losses.sequence import Candidates, divergence, minimum_risk, policy_gradient, reference_loss

VOCABULARY, LONGEST, END = 3, 3, 0


class Policy(nn.Module):
    """A table of logits for every prefix: a model of sequences that can be anything."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        prefixes = [p for n in range(LONGEST) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
        generator = torch.Generator().manual_seed(seed)
        self.prefixes = prefixes
        self.logits = nn.Parameter(torch.randn(len(prefixes), VOCABULARY, dtype=torch.float64, generator=generator))

    def forward(self, sequence: tuple[int, ...]) -> Tensor:
        """Log probabilities of its tokens."""
        rows = [self.prefixes.index(sequence[:place]) for place in range(len(sequence))]
        return self.logits[rows].log_softmax(1).gather(1, torch.tensor(sequence)[:, None])[:, 0]


def all_sequences() -> list[tuple[int, ...]]:
    """Every sequence that generation can end with: up to the end token, or as long as it may be."""
    ended = [(*words, END) for n in range(LONGEST) for words in itertools.product(range(1, VOCABULARY), repeat=n)]
    return ended + list(itertools.product(range(1, VOCABULARY), repeat=LONGEST))


def reward_of(sequence: tuple[int, ...]) -> float:
    return (sum(sequence) + 2 * (sequence[-1] == END) + 0.5 * len(sequence) % 2) / 10


def candidates_of(
    groups: list[Counter[tuple[int, ...]]], references: list[tuple[int, ...]], sampler: Policy | None = None
) -> Candidates:
    """The table of candidates of clips, with how often each was sampled."""
    most = max(map(len, groups))
    shape = (len(groups), most, max(len(s) for group in groups for s in group))
    places, mask = [], torch.zeros(shape, dtype=torch.float64)
    counts, rewards, is_reference = (torch.zeros(shape[:2], dtype=torch.float64) for _ in range(3))
    for clip, (group, reference) in enumerate(zip(groups, references, strict=True)):
        for number, (sequence, count) in enumerate(group.items()):
            first = (clip * most + number) * shape[2]
            places += range(first, first + len(sequence))
            mask[clip, number, : len(sequence)] = 1
            counts[clip, number], rewards[clip, number] = count, reward_of(sequence)
            is_reference[clip, number] = sequence == reference
    sampled = log_probs_of(sampler or Policy(), groups).detach()
    return Candidates(torch.tensor(places), mask, counts, rewards, is_reference, sampled)


def log_probs_of(policy: Policy, groups: list[Counter[tuple[int, ...]]]) -> Tensor:
    return torch.cat([policy(sequence) for group in groups for sequence in group])


def gradient(policy: Policy, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, policy.logits, retain_graph=True)[0]


def test_the_risk_of_all_sequences_is_the_expected_risk() -> None:
    """With every sequence among the candidates, and no sharpening, loss and gradient are those of the expectation."""
    policy, sequences = Policy(), all_sequences()
    probabilities = torch.stack([policy(sequence).sum().exp() for sequence in sequences])
    assert float(probabilities.sum().detach()) == pytest.approx(1.0, abs=1e-12), "this is the whole search space"
    rewards = torch.tensor([reward_of(sequence) for sequence in sequences], dtype=torch.float64)
    expected = (probabilities * (1 - rewards)).sum()
    groups = [Counter(sequences)]
    loss = minimum_risk(log_probs_of(policy, groups), candidates_of(groups, [(END,)]), 1.0, False)
    torch.testing.assert_close(loss, expected[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(policy, loss.sum()), gradient(policy, expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 2.5])
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_risk_of_some_candidates(sharpness: float, with_reference: bool) -> None:
    """By the formula of the paper, clip by clip; how often a candidate was sampled does not count."""
    policy = Policy()
    groups = [Counter({(1, 0): 2, (2, 2, 0): 1, (0,): 0}), Counter({(1, 1, 1): 5, (2, 1, 0): 0})]
    references = [(0,), (2, 1, 0)]
    losses = minimum_risk(log_probs_of(policy, groups), candidates_of(groups, references), sharpness, with_reference)
    for loss, group in zip(losses, groups, strict=True):
        members = [sequence for sequence, count in group.items() if count or with_reference]
        powers = torch.stack([policy(sequence).sum().exp() ** sharpness for sequence in members])
        risks = torch.tensor([1 - reward_of(sequence) for sequence in members], dtype=torch.float64)
        expected = (powers / powers.sum() * risks).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-12, atol=1e-12)


def slow_policy_gradient(
    now: Policy, sampled: Policy, start: Policy | None, group: list[tuple[int, ...]], clip: float, weight: float
) -> Tensor:
    """Equation 3 of arXiv 2402.03300, sample by sample and token by token."""
    rewards = [reward_of(sequence) for sequence in group]
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    total = torch.zeros((), dtype=torch.float64)
    for sequence, reward in zip(group, rewards, strict=True):
        advantage = (reward - mean) / (deviation + 1e-6)
        for place in range(len(sequence)):
            log_prob = now(sequence)[place]
            ratio = (log_prob - sampled(sequence)[place].detach()).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            if start is not None:
                difference = start(sequence)[place].detach() - log_prob
                gain = gain - weight * (difference.exp() - difference - 1)
            total = total + gain / len(sequence) / len(group)
    return -total


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("seed_of_sampler", [0, 7])
def test_the_policy_gradient_is_that_of_the_slow_formula(weight: float, seed_of_sampler: int) -> None:
    """Equal samples are one candidate that counts as often; a reference that was not sampled counts nothing. With the
    seed of the sampling policy other than that of the current one, ratios lie on both sides of the clip."""
    now, sampled, start = Policy(0), Policy(seed_of_sampler), Policy(9) if weight else None
    samples = [[(1, 0), (2, 2, 0), (1, 0), (0,)], [(1, 1, 1), (2, 1, 0), (2, 1, 0), (2, 1, 0)]]
    groups = [Counter(group) for group in samples]
    groups[0][(2, 2, 2)] = 0
    candidates = candidates_of(groups, [(2, 2, 2), (2, 1, 0)], sampled)
    kept = None if start is None else (log_probs_of(start, groups).detach(), weight)
    losses = policy_gradient(log_probs_of(now, groups), candidates, 0.2, kept)
    for loss, group in zip(losses, samples, strict=True):
        expected = slow_policy_gradient(now, sampled, start, group, 0.2, weight)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(now, loss), gradient(now, expected), rtol=1e-11, atol=1e-12)


def test_equal_rewards_move_nothing() -> None:
    policy, groups = Policy(), [Counter({(1, 0): 4, (1, 1, 1): 0})]
    log_probs_N = log_probs_of(policy, groups)
    loss = policy_gradient(log_probs_N, candidates_of(groups, [(1, 1, 1)]), 0.2)
    assert not gradient(policy, loss.sum()).any() and loss.tolist() == [0.0]


def test_the_divergence_is_exact_on_average() -> None:
    policy, start = Policy(0), Policy(3)
    now, then = policy.logits[0].log_softmax(0), start.logits[0].log_softmax(0)
    assert bool((divergence(now, then) >= 0).all())
    exact = (now.exp() * (now - then)).sum()
    torch.testing.assert_close((now.exp() * divergence(now, then)).sum(), exact, rtol=1e-12, atol=1e-12)


def test_the_reference_is_learned_as_ever() -> None:
    policy, groups = Policy(), [Counter({(1, 0): 2, (2, 2, 0): 0})]
    loss = reference_loss(log_probs_of(policy, groups), candidates_of(groups, [(2, 2, 0)]))
    torch.testing.assert_close(loss, -policy((2, 2, 0)).mean()[None])
