"""The rank of `benchmarks/launch_time.py`: ours (`launch/train.py`) or a bare DeepSpeed script, with the time of each
part of its start.

Stamps are seconds of the machine's clock, in the file that SLT_BENCH_STAMPS names; rank 0 writes it after its first
step.
"""

from __future__ import annotations

import time

STAMPS = {"started": time.time()}

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def stamp(name: str) -> None:
    STAMPS.setdefault(name, time.time())
    if name == "first step" and os.environ["RANK"] == "0":
        Path(os.environ["SLT_BENCH_STAMPS"]).write_text(json.dumps(STAMPS), encoding="utf-8")


def ours() -> int:
    """`launch/train.py` as it is, with stamps around its parts."""
    sys.path.insert(0, str(ROOT))
    from launch import train

    run_rank = train.run_rank

    def stamped(*arguments: Any) -> int:
        from pipeline import dist
        from pipeline.engine import run
        from pipeline.engine.trainer import Trainer

        stamp("imports")
        dist.init = _then("rendezvous", dist.init)
        run.prepare = _then("model", run.prepare)
        Trainer._step = _then("first step", Trainer._step)  # type: ignore[method-assign]
        return run_rank(*arguments)

    train.run_rank = stamped
    return train.main()


def _then(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def stamped(*arguments: Any, **options: Any) -> Any:
        value = function(*arguments, **options)
        stamp(name)
        return value

    return stamped


def bare(tokenizer: str, sizes: str, block: int, micro_batch: int, accumulation: int) -> None:
    """The shortest script that trains the same model under the same ZeRO stage: random tokens, no data, no checks."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    stamp("imports")
    deepspeed.init_distributed("gloo", verbose=False)
    stamp("rendezvous")
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=True, **json.loads(sizes))
    model = AutoModelForCausalLM.from_config(config)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )  # fmt: skip
    stamp("model")
    for _ in range(accumulation):
        ids = torch.randint(0, vocabulary, (micro_batch, block))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    stamp("first step")
    # the stamps are written; threads of the libraries end a process at its exit now and then: "terminate called without
    # an active exception"
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        bare(*sys.argv[2:4], *map(int, sys.argv[4:7]))
    sys.exit(ours())
