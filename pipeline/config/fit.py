"""Whether the inputs of a recipe fit each other: models and tokenizers, shard sets and what made them, images.

Only what config files, tokenizer files and manifests say for certain; ranks check the loaded models again. Nothing is
said of parts that are themselves missing or broken, or that only the hub holds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.checks import heads_problem
from pipeline.config.pretrained import read_json
from pipeline.config.schema import Recipe, VisualConfig
from pipeline.config.shard_sets import SetFacts
from pipeline.config.source import Problem
from pipeline.config.stages import STAGES
from pipeline.config.widths import feature_width

VISUAL_MODEL = "slt_visual"
"""`model_type` of an exported visual encoder."""
_ROOT = Path(__file__).resolve().parents[2]
_FINGERPRINT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from transformers import AutoTokenizer; "
    "from shards.text import tokenizer_fingerprint; "
    "print(tokenizer_fingerprint(AutoTokenizer.from_pretrained(sys.argv[2])))"
)
_SECONDS = 120.0


def fit_problems(recipe: Recipe, sets: Mapping[str, SetFacts], broken: Collection[str] = ()) -> Iterator[Problem]:
    """Everything that does not fit.

    Args:
        recipe: checked by itself.
        sets: the sound sets on this machine, by where the recipe names them.
        broken: pretrained parts with a problem of their own.
    """
    yield from _kinds(recipe, sets)
    if recipe.model.llm is not None and "llm" in STAGES[recipe.stage].parts:
        yield from _language_model(recipe, broken)
        if recipe.stage == "continued_pretraining":
            yield from _tokenised_sets(recipe, sets, broken)
    if recipe.model.text_encoder is not None and "text_encoder" in STAGES[recipe.stage].parts:
        path = recipe.model.text_encoder.path
        if path not in broken and (text := vocabulary_problem(Path(path), Path(path))):
            yield Problem(f"model.text_encoder.path={path}: {text}", ("model.text_encoder.path",))
    if recipe.model.visual is not None and "visual" in STAGES[recipe.stage].parts:
        yield from _visual_export(recipe, broken)
        yield from _stored_features(recipe, sets)


def _kinds(recipe: Recipe, sets: Mapping[str, SetFacts]) -> Iterator[Problem]:
    """A plan orders either videos or stored features."""
    kinds = {facts.kind: place for place, facts in sets.items() if place.startswith("data.train.")}
    if len(kinds) > 1:
        shown = ", ".join(f"{place} holds {kind}" for kind, place in kinds.items())
        text = f"data.train mixes videos and stored features ({shown}); extract the features of all sources"
        yield Problem(f"{text} (`slt shards features`), or train on the videos of all", ("data.train",))


# -- language --------------------------------------------------------------------------------------------------------
def _language_model(recipe: Recipe, broken: Collection[str]) -> Iterator[Problem]:
    llm = recipe.model.llm
    assert llm is not None
    if llm.path is None or llm.path in broken or not Path(llm.path).is_dir():
        return
    text = _text_config(Path(llm.path))
    heads, size = text.get("num_attention_heads"), recipe.train.sequence_parallel
    if isinstance(heads, int) and (problem := heads_problem(heads, text.get("num_key_value_heads") or heads, size)):
        yield Problem(f"model.llm.path={llm.path}: {problem}", ("train.sequence_parallel", "model.llm.path"))
    tokenizer = llm.tokenizer or llm.path
    if tokenizer not in broken and (problem := vocabulary_problem(Path(llm.path), Path(tokenizer))):
        of = "" if tokenizer == llm.path else f" with model.llm.tokenizer={tokenizer}"
        yield Problem(f"model.llm.path={llm.path}{of}: {problem}", ("model.llm.path", "model.llm.tokenizer"))


def vocabulary_problem(model: Path, tokenizer: Path) -> str:
    """Why a model has too few embeddings for a tokenizer; empty if it has enough, or the files do not say."""
    rows, content = _text_config(model).get("vocab_size"), read_json(tokenizer / "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab")
    if not isinstance(rows, int) or not isinstance(vocabulary, dict | list) or not vocabulary:
        return ""
    used = set(_special_tokens(tokenizer).values())
    added = [token for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    # texts never make control tokens: one beyond the table matters only if it begins, ends or pads a sequence
    idle = {token["id"] for token in added if token.get("special") and token.get("content") not in used}
    known = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    ids = max((known | {token["id"] for token in added}) - idle, default=-1) + 1
    if rows >= ids:
        return ""
    return (
        f"the model's embedding table has {rows} rows, its tokenizer makes {ids} ids; use the tokenizer that belongs to"
        " the model, or enlarge the table (`resize_token_embeddings` in transformers)"
    )


def _text_config(model: Path) -> dict[str, Any]:
    config = read_json(model / "config.json")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _special_tokens(tokenizer: Path) -> dict[str, str]:
    """Role -> text of the tokens that begin, end, pad or replace, as far as the files say."""
    settings = {**read_json(tokenizer / "special_tokens_map.json"), **read_json(tokenizer / "tokenizer_config.json")}
    texts = {}
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = settings.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[role] = text
    return texts


def _tokenised_sets(recipe: Recipe, sets: Mapping[str, SetFacts], broken: Collection[str]) -> Iterator[Problem]:
    """Shards of token ids are of use to the tokenizer that made them only."""
    llm = recipe.model.llm
    assert llm is not None
    path = llm.tokenizer or llm.path or ""
    recorded = {place: str(facts.options.get("tokenizer")) for place, facts in sets.items()}
    if path in broken or not recorded or not (Path(path) / "tokenizer.json").is_file():
        return
    expected = tokenizer_fingerprint(Path(path), set(recorded.values()))
    for place, fingerprint in recorded.items() if expected else ():
        if fingerprint != expected:
            text = (
                f"{place}.shards was tokenised with another tokenizer (fingerprint {fingerprint[:16]}) than model.llm "
                f"uses ({path}, {expected[:16]}); rebuild the shards with `slt shards build text --tokenizer {path}`"
            )
            yield Problem(text, (f"{place}.shards", "model.llm.tokenizer"))


def tokenizer_fingerprint(folder: Path, likely: Collection[str] = ()) -> str:
    """`shards.text.tokenizer_fingerprint` of a folder; empty if it cannot be known here.

    transformers decides it, but takes seconds to import. Where the files alone give one of ``likely``, that is it: no
    two tokenizers have the same.
    """
    quick = fingerprint_of_files(folder)
    if quick in likely:
        return quick
    argv = [sys.executable, "-c", _FINGERPRINT, str(_ROOT), str(folder)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().rpartition("\n")[2] if done.returncode == 0 else ""


def fingerprint_of_files(folder: Path) -> str:
    """The fingerprint, if transformers takes the tokenizer as its files say; empty if they cannot be read so."""
    from tokenizers import Tokenizer

    from shards.text import tokenizer_fingerprint as fingerprint

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises plain Exception for a file it cannot use; transformers has the last word
        return ""
    special = _special_tokens(folder)
    bos, eos = (backend.token_to_id(special[role]) if role in special else None for role in ("bos_token", "eos_token"))
    tokens = dict.fromkeys(special.values())
    return fingerprint(
        SimpleNamespace(backend_tokenizer=backend, bos_token_id=bos, eos_token_id=eos, all_special_tokens=list(tokens))
    )


# -- video -----------------------------------------------------------------------------------------------------------
def _visual_export(recipe: Recipe, broken: Collection[str]) -> Iterator[Problem]:
    """An exported encoder says which images and clips it takes."""
    visual, data = recipe.model.visual, recipe.data
    assert visual is not None
    if visual.path is None or visual.path in broken:
        return
    config, name = read_json(Path(visual.path) / "config.json"), f"model.visual.path={visual.path}"
    if config.get("model_type") != VISUAL_MODEL:
        text = f"{name} holds a {config.get('model_type')!r} model, not a visual encoder; export the contrastive stage"
        yield Problem(f"{text}, or name a frame backbone under model.visual.backbone.path", ("model.visual.path",))
        return
    pixels, frames = config.get("image_pixels"), config.get("max_frames")
    if isinstance(pixels, int) and pixels != data.image_pixels:
        text = f"data.image_pixels={data.image_pixels}, but the encoder in {visual.path} was trained on {pixels}"
        yield Problem(f"{text}; set it to {pixels}", ("data.image_pixels", "model.visual.path"))
    if isinstance(frames, int) and data.max_frames > frames:
        text = f"data.max_frames={data.max_frames} is more than the {frames} frames that {visual.path} takes"
        yield Problem(f"{text}; lower it to {frames}", ("data.max_frames", "model.visual.path"))


def _stored_features(recipe: Recipe, sets: Mapping[str, SetFacts]) -> Iterator[Problem]:
    """Stored frame features must be those of the encoder's own, frozen backbone."""
    stored = {place: facts.options.get("features") for place, facts in sets.items() if facts.kind == "features"}
    wanted = _backbone(recipe)
    images = wanted.pop("images", True)
    if not images and (video := next((place for place, facts in sets.items() if facts.kind == "video"), None)):
        text = f"{video}.shards holds videos, but model.visual has no backbone: it reads stored features or keypoints"
        yield Problem(f"{text}; name shards that were built with --rows", (f"{video}.shards", "model.visual"))
        return
    if not stored:
        return
    if recipe.stage == "contrastive" and wanted.pop("train", "frozen") != "frozen":
        place = next(iter(stored))
        text = f"{place}.shards holds frame features, but model.visual.backbone.train lets the backbone change"
        yield Problem(f"{text}; set it to frozen, or train on the video shards", (f"{place}.shards",))
        return
    for place, made in stored.items():
        made = made if isinstance(made, dict) else {}
        if names := [name for name in wanted if made.get(name, _without(name, wanted)) != wanted[name]]:
            shown = ", ".join(f"{name} {made.get(name, 'not said')}, the model's is {wanted[name]}" for name in names)
            text = f"{place}.shards holds frame features of another backbone or preprocessing ({shown}); use the video"
            text += " shards, or extract them again: `slt shards features SHARDS --recipe RECIPE --out DIR`"
            if not images:
                text = f"{place}.shards holds other rows than the model reads ({shown}); build them with the layout or"
                text += " the fingerprint that the recipe names, or change the recipe"
            yield Problem(text, (f"{place}.shards", "model.visual"))


def _backbone(recipe: Recipe) -> dict[str, Any]:
    """What files say of the features that the recipe's backbone makes, named as a set of features records it."""
    visual = recipe.model.visual
    assert visual is not None
    if visual.path is None and visual.backbone is None:
        return _rows_wanted(visual)
    if visual.path is not None:
        export = read_json(Path(visual.path) / "config.json")
        if export.get("pose_layout") and not export.get("backbone_config") and not export.get("features_width"):
            return {"images": False, "layout": export["pose_layout"], "fingerprint": export.get("pose_fingerprint")}
        if width := export.get("features_width"):
            return {"images": False, "width": width, "fingerprint": export.get("backbone_fingerprint")}
        config, pool, train = export.get("backbone_config") or {}, export.get("pool"), export.get("backbone_train")
        known = {"fingerprint": export.get("backbone_fingerprint"), "image_pixels": export.get("image_pixels")}
    elif visual.backbone is not None and visual.backbone.path is not None:
        config, pool = read_json(Path(visual.backbone.path) / "config.json"), visual.backbone.pool
        train, known = visual.backbone.train, {"image_pixels": recipe.data.image_pixels}
    else:
        return {"train": "full"}  # random weights: nothing was extracted with them
    width = feature_width(config)
    known |= {"pool": pool, "train": train, "width": width * (2 if pool == "cls_mean" else 1) if width else None}
    return {name: value for name, value in known.items() if value}


def _without(name: str, wanted: dict[str, Any]) -> Any:
    """What a set is taken to hold where it does not say: what is wanted, but for keypoints, which always say."""
    return "none" if name == "layout" else wanted[name]


def _rows_wanted(visual: VisualConfig) -> dict[str, Any]:
    """The same for an encoder without a backbone."""
    if visual.features is not None:
        return {"images": False, "width": visual.features.width, "fingerprint": visual.features.fingerprint}
    return {"images": False, "layout": visual.pose.layout if visual.pose is not None else ""}


__all__ = ["VISUAL_MODEL", "fingerprint_of_files", "fit_problems", "tokenizer_fingerprint", "vocabulary_problem"]
