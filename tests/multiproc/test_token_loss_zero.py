"""The token loss and the fused optimizer under every ZeRO stage: equal losses and weights, and how often ZeRO-3
gathers the head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STEPS, LENGTH = 4, 12


@contextlib.contextmanager
def gatherings(numel: int) -> Iterator[list[int]]:
    """Sizes of the all-gathers of at least this many elements."""
    import deepspeed.runtime.zero.partition_parameters as partition

    seen: list[int] = []
    original = partition._dist_allgather_fn

    def counted(input_tensor: Any, output_tensor: Any, group: Any = None) -> Any:
        if output_tensor.numel() >= numel:
            seen.append(output_tensor.numel())
        return original(input_tensor, output_tensor, group)

    partition._dist_allgather_fn = counted
    try:
        yield seen
    finally:
        partition._dist_allgather_fn = original


def _train(rank: int, folder: Path, stage: int, tied: bool) -> dict[str, Any]:
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from pipeline.models.attention import packed_kwargs
    from pipeline.models.packed_lm import PackedCausalLm

    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
            "reduce_bucket_size": 1000000,
        },
    }  # fmt: skip
    keep_alive = HfDeepSpeedConfig(config) if stage == 3 else None
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(folder / str(tied))
    model = PackedCausalLm(llm, loss_chunk_tokens=3 + rank)  # ranks need not agree on chunks
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # weights move by their gradients
    if tied:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses, counts = [], []
    ids_BL = torch.randint(0, 300, (1, LENGTH), generator=torch.Generator().manual_seed(rank))
    targets_BL = ids_BL.roll(-1, 1)
    if rank:
        targets_BL[:, 3:] = -100
    for _ in range(STEPS):
        with gatherings(300 * 16) as seen:
            loss = engine(ids_BL, packed_kwargs(torch.zeros_like(ids_BL)), targets_BL)
            engine.backward(loss)
        counts.append(len(seen))
        losses.append(float(loss))
        engine.step()
    weight = llm.get_output_embeddings().weight
    with deepspeed.zero.GatheredParameters([weight]):
        head = weight.detach().clone()
    engine.destroy()
    del keep_alive
    return {"losses": losses, "head": head, "counts": counts}


def _rank_main(rank: int, world_size: int, folder: Path) -> dict[Any, Any]:
    from pipeline import dist

    dist.init()
    return {(stage, tied): _train(rank, folder, stage, tied) for tied in (False, True) for stage in (0, 1, 2, 3)}


def _save(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for tied in (False, True):
        config = AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / str(tied))


def test_losses_and_weights_are_those_of_stage_0(tmp_path: Path) -> None:
    _save(tmp_path)
    ranks = run_ranks(_rank_main, 2, tmp_path, timeout=240)
    for result in ranks:
        for (stage, tied), run in result.items():
            assert run["losses"] == pytest.approx(result[0, tied]["losses"], rel=1e-5)
            torch.testing.assert_close(run["head"], result[0, tied]["head"], rtol=1e-4, atol=1e-6)
            # the embedding and the head, each once for forward and backward; tied weights once for both. The first step
            # finds out which parts read the head.
            assert run["counts"][1:] == [0 if stage < 3 else 1 if tied else 2] * (STEPS - 1)
