"""Small recipes as text, for tests that break them in one place."""

from __future__ import annotations

from pathlib import Path

CONNECTOR = """\
name: tiny
stage: connector
run_dir: runs/tiny
model:
  llm:
    path: models/llm
  visual:
    path: models/visual
data:
  train:
    - shards: shards/video
train:
  steps: 10
  global_batch: 8
  micro_batch: 2
  world_sizes: [1, 2]
  precision: fp32
  optimizer: {lr: 1e-3}
deepspeed:
  base: cpu
"""

CONTRASTIVE = """\
name: tiny
stage: contrastive
run_dir: runs/tiny
model:
  visual:
    backbone:
      tiny: {width: 96, heads: 3, patch_pixels: 16}
  text_encoder:
    path: models/text
data:
  train:
    - shards: shards/video
train:
  steps: 10
  global_batch: 8
  micro_batch: 2
  precision: fp32
  optimizer: {lr: 1e-3}
deepspeed:
  base: cpu
"""

PRETRAINING = """\
name: tiny
stage: continued_pretraining
run_dir: runs/tiny
model:
  llm:
    tiny: {width: 64, heads: 4, max_positions: 512}
    tokenizer: models/tokenizer
data:
  train:
    - shards: shards/text
  block_tokens: 256
train:
  steps: 10
  global_batch: 8
  micro_batch: 2
  precision: fp32
  optimizer: {lr: 1e-3}
deepspeed:
  base: cpu
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
