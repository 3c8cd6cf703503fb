"""One side of ``benchmarks/contrastive_loss.py`` in a process of its own: ``contrastive_side.py SIDE JSON`` prints one
answer line. A side is ``ours`` or ``open_clip`` for sentences, ``ours_tokens`` or ``padded`` for tokens.

Peaks are the process's (VmHWM) above what it held with features and the room of their gradients.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
ANSWER = "ANSWER "


class OneOf:
    """One rank among several alike: what it gathers are copies of its own rows."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def rank(self) -> int:
        return 0

    def world_size(self) -> int:
        return self.ranks

    def host_counts(self, counts: list[int]) -> list[list[int]]:
        return [list(counts)] * self.ranks

    def gather_rows(self, local: Tensor) -> Tensor:
        return local.repeat(self.ranks, *[1] * (local.dim() - 1))

    def scatter_sum(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.ranks, -1)).sum(0)

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value * self.ranks

    def all_reduce_max(self, value: Tensor) -> Tensor:
        return value


def sentences(side: str, batch: int, width: int, ranks: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    features = [torch.randn(batch, width, requires_grad=True) for _ in range(2)]
    scale = torch.tensor([10.0], requires_grad=True)
    if side == "ours":
        sys.path.insert(0, str(ROOT))
        from pipeline.losses import sentence_contrastive

        # distinct texts: copies of a row would all be left out
        ids_B = torch.arange(batch)
        group: Any = OneOf(ranks)
        both = (features[0], features[1])
        return lambda: sentence_contrastive(both, ids_B, scale, None, group), [*features, scale]
    loss = clip_loss()
    norm = torch.nn.functional.normalize
    return lambda: loss(norm(features[0], dim=-1), norm(features[1], dim=-1), scale), [*features, scale]


def clip_loss() -> Any:
    """open_clip's loss without the rest of open_clip, which wants torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("open_clip is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss()


def tokens(side: str, batch: int, width: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Lengths as in weather reports: 8 to 64 word tokens, 4 to 44 text tokens, most of them short."""
    from pipeline.losses import Tokens, token_contrastive
    from tests.contrast_reference import whole_tokens

    generator = torch.Generator().manual_seed(0)
    lengths = [
        (low + torch.rand(batch, generator=generator) ** 2 * most).long().tolist() for low, most in ((8, 57), (4, 41))
    ]
    features = [torch.randn(sum(part), width, requires_grad=True) for part in lengths]
    scales = (torch.tensor([10.0], requires_grad=True), torch.tensor([10.0], requires_grad=True))
    words, texts = (Tokens(*both) for both in zip(features, lengths, strict=True))
    loss = token_contrastive if side == "ours_tokens" else whole_tokens
    ids_B = torch.arange(batch)
    return lambda: loss(words, texts, ids_B, scales), [*features, *scales]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(run: Callable[[], Tensor], leaves: list[Tensor], runs: int) -> dict[str, Any]:
    """Best CPU seconds of forward and backward, and the peak of the first run."""
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    before, seconds = peak_mib(), []
    loss = torch.zeros(())
    for number in range(runs):
        begin = time.process_time()
        loss = run()
        loss.backward()
        seconds.append(time.process_time() - begin)
        if number == 0:
            peak = peak_mib() - before
    return {"seconds": min(seconds), "mib": peak, "process_mib": before + peak, "loss": float(loss.detach())}


def main() -> None:
    side, options = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))

    def made(batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        if side in ("ours_tokens", "padded"):
            return tokens(side, batch, options["width"])
        return sentences(side, batch, options["width"], options.get("ranks", 1))

    made(8)[0]().backward()  # what torch loads at first use is nobody's
    print(ANSWER + json.dumps(measure(*made(options["batch"]), options["runs"])), flush=True)


if __name__ == "__main__":
    main()
