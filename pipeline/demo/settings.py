"""Sizes of the demo: `full` reaches the score floor, `smoke` shows in about two minutes that everything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

PROMPT = "signs: {video} sentence:"
PAIR_TEMPLATE = "signs: {gloss} sentence: {text}"
"""What stage 1 learns to continue; the connector's prompt is the same with the video in place of the words."""
PLAIN_TEMPLATE = "{text}"
VOCABULARY = 640


@dataclass(frozen=True, slots=True)
class DemoSize:
    """Counts of generated data and recipe overrides per stage."""

    train: int
    dev: int
    test: int
    test_signer: int
    text_train: int
    text_dev: int
    sets: dict[str, list[str]] = field(default_factory=dict)


FULL = DemoSize(train=2500, dev=100, test=150, test_signer=100, text_train=20000, text_dev=500)
SMOKE = DemoSize(
    train=48, dev=12, test=12, test_signer=8, text_train=800, text_dev=60,
    sets={
        "continued_pretraining": ["train.steps=8", "train.optimizer.warmup_steps=2", "train.eval_every_steps=0"],
        "contrastive": ["train.steps=6", "train.optimizer.warmup_steps=2", "train.eval_every_steps=0"],
        "connector": ["train.steps=6", "train.optimizer.warmup_steps=2", "train.eval_every_steps=0"],
    },
)  # fmt: skip
ABLATION = DemoSize(
    train=1500, dev=60, test=150, test_signer=100, text_train=20000, text_dev=300,
    sets={
        "continued_pretraining": ["train.steps=80", "train.eval_every_steps=0"],
        "contrastive": ["train.steps=300", "train.eval_every_steps=0"],
        "connector": ["train.steps=130", "train.eval_every_steps=0"],
    },
)  # fmt: skip
"""About half of `full` per stage: differences show, and four variants take about seven minutes per seed."""
SIZES = {"full": FULL, "smoke": SMOKE, "ablation": ABLATION}
