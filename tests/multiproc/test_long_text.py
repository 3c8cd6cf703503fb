"""Ranks that hold slices of the same packs compute what one rank computes with whole ones, and what makes room for
long sequences changes nothing under ZeRO."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.engine.checkpoint import TAG, Checkpoint, latest_checkpoint
from pipeline.engine.zero_shards import ZeroShards
from pipeline.export.hf import export
from tests.jobs import World, rows, run_job
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STAGE = "continued_pretraining"
JOB = {
    "model__llm__tiny": "{width: 48, layers: 2, heads: 6, feed_forward: 80, max_positions: 256}",
    "train__steps": 4, "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5,
    "train__eval_every_steps": 2,
}  # fmt: skip
ROOM = {
    "continued_pretraining__mlp_chunk_tokens": 20, "continued_pretraining__offload_activations": "true",
    "model__gradient_checkpointing": "true",
}  # fmt: skip

DOCUMENTS = (5, 11, 1, 7)
"""24 positions: a document crosses every border between two or three slices."""
HEADS = {2: ((4, 1), (4, 2)), 3: ((6, 1), (12, 6))}
"""Number of ranks -> (attention heads, key heads)."""


def _model(heads: int, key_heads: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    import pipeline.models  # noqa: F401  (registers the keys)
    from pipeline.models.attention import implementation

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "llama", num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=8, **sizes
    )
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=implementation("sdpa")
    ).train()


def _rows() -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Ids and targets [2, 24], and the documents' borders; the second row has them in the opposite order."""
    from pipeline.models.attention import packed_kwargs

    orders = (DOCUMENTS, DOCUMENTS[::-1])
    numbers = [torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)) for lengths in orders]
    ids_BL = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    return ids_BL, ids_BL.roll(-1, dims=1), packed_kwargs(torch.stack(numbers))


def _loss_and_grads(model: Any, ids_BL: torch.Tensor, targets_BL: torch.Tensor, packed: Any) -> dict[str, torch.Tensor]:
    logits_BLV = model(ids_BL, **packed).logits
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def _slices(rank: int, world_size: int) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Every choice of heads, the first with recomputation: sums over the ranks."""
    from pipeline import dist

    group = dist.sequence_group(world_size)
    assert (group.rank, group.size) == (rank, world_size)
    length = 24 // world_size
    own = slice(rank * length, (rank + 1) * length)
    found = {}
    for heads, key_heads in HEADS[world_size]:
        model = _model(heads, key_heads)
        if key_heads == 1:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids_BL, targets_BL, packed = _rows()
        packed = {**packed, "position_ids": packed["position_ids"][:, own], "sequence_group": group}
        sums = _loss_and_grads(model, ids_BL[:, own], targets_BL[:, own], packed)
        found[heads, key_heads] = {name: dist.all_reduce_sum(value) for name, value in sums.items()}
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_packs_give_the_loss_and_gradients_of_whole_ones(world_size: int) -> None:
    """In float64: documents cross the slices, queries share keys, and fewer key heads than ranks are repeated."""
    first, *others = run_ranks(_slices, world_size)
    for (heads, key_heads), sums in first.items():
        whole = _loss_and_grads(_model(heads, key_heads), *_rows())
        assert sums.keys() == whole.keys()
        for name, value in sums.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-11, atol=1e-12, msg=f"{heads}/{key_heads} {name}")
    assert all(torch.equal(other[key]["loss"], first[key]["loss"]) for other in others for key in first)


def job(corpus: World, run_dir: Path, world_size: int, **values: object) -> list[str]:
    llm = f"{{tiny: {JOB['model__llm__tiny']}, tokenizer: {corpus.tokenizer}}}"
    given = {name: value for name, value in JOB.items() if name != "model__llm__tiny"}
    return corpus.sets(STAGE, run_dir, world_size, model__llm=llm, **{**given, **values})


def newest(run_dir: Path) -> Checkpoint:
    found = latest_checkpoint(run_dir)
    assert found is not None
    return found


def check_equal(run_dir: Path, whole: Path) -> None:
    """Losses and held-out losses to float32 rounding; counts and data order."""
    for metric, steps in (("train/loss", [1, 2, 3, 4]), ("eval/loss", [0, 2, 4])):
        assert sorted(rows(run_dir, metric)) == steps
        assert rows(run_dir, metric) == pytest.approx(rows(whole, metric), rel=1e-5), metric
    state, expected = newest(run_dir).state(), newest(whole).state()
    assert state.step == expected.step == 4 and state.data == expected.data
    assert (state.tokens_seen, state.samples_seen) == (expected.tokens_seen, expected.samples_seen)


def check_weights(run_dir: Path, whole: Path) -> None:
    """To float32 rounding, and the norms of the gradients, which DeepSpeed does not give under ZeRO-0."""
    assert rows(run_dir, "train/grad_norm") == pytest.approx(rows(whole, "train/grad_norm"), rel=1e-4)
    weights, others = (ZeroShards.open(newest(path).path / TAG) for path in (run_dir, whole))
    assert weights.parameters == others.parameters
    for name in weights.parameters:
        torch.testing.assert_close(weights.tensor(name), others.tensor(name), rtol=1e-4, atol=2e-6, msg=name)


Runs = Callable[[int], Path]


@pytest.fixture(scope="module")
def whole(corpus: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By ZeRO stage, which draws new weights in its own order: one rank, whole packs, nothing computed twice."""

    @cache
    def run(zero_stage: int) -> Path:
        run_dir = tmp_path_factory.mktemp("whole") / "run"
        run_job(STAGE, job(corpus, run_dir, 1, **zero(zero_stage)), 1)
        return run_dir

    return run


def zero(stage: int) -> dict[str, object]:
    return {"deepspeed__overrides__zero_optimization__stage": stage}


@pytest.fixture(scope="module")
def sliced(corpus: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks with half of every pack, ZeRO-3, MLPs in chunks, layer inputs apart."""
    run_dir = tmp_path_factory.mktemp("sliced") / "run"
    run_job(STAGE, job(corpus, run_dir, 2, train__sequence_parallel=2, **ROOM), 2)
    return run_dir


def test_two_ranks_with_halves_under_zero_3(whole: Runs, sliced: Path, tmp_path: Path) -> None:
    check_equal(sliced, whole(3))
    check_weights(sliced, whole(3))
    assert max(export(sliced, tmp_path / "export").values()) < 1e-4


def test_three_ranks_with_thirds_under_zero_1(corpus: World, whole: Runs, tmp_path: Path) -> None:
    run_job(STAGE, job(corpus, tmp_path, 3, train__sequence_parallel=3, **zero(1)), 3)
    check_equal(tmp_path, whole(1))
    check_weights(tmp_path, whole(1))


def test_two_groups_of_two_continue_what_one_group_began(
    corpus: World, whole: Runs, sliced: Path, tmp_path: Path
) -> None:
    """Resumed at another world size, where each group reads its own packs."""
    run_dir = tmp_path / "run"
    shutil.copytree(sliced, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    output = run_job(STAGE, job(corpus, run_dir, 4, train__sequence_parallel=2), 4)
    assert "step-000002 at step 2" in output
    check_equal(run_dir, whole(3))
    check_weights(run_dir, whole(3))


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_chunks_and_host_memory_change_nothing(zero_stage: int, corpus: World, whole: Runs, tmp_path: Path) -> None:
    """The ranks' last held-out batches have unequally many rows, and so chunks: ZeRO-3 must not wait for one more."""
    run_job(STAGE, job(corpus, tmp_path, 2, **ROOM, **zero(zero_stage)), 2)
    check_equal(tmp_path, whole(3 if zero_stage == 3 else 1))
    if zero_stage:
        check_weights(tmp_path, whole(3))
