"""Rules between settings. Each rule reads a whole `Recipe` and yields the problems it finds; nothing is raised here.

A rule names the settings it read, so that its verdict is dropped if one of them is itself wrong, and the message can
name the line the user wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from pipeline.config.names import is_secret
from pipeline.config.parts_rules import parts_problems
from pipeline.config.prompt_schema import VIDEO, cue_problems, fields_of, prompt_problem
from pipeline.config.schema import AUTO, Recipe, SourceConfig
from pipeline.config.sequence_checks import sequence_problems
from pipeline.config.source import Problem
from pipeline.config.stages import STAGES
from pipeline.config.transfer_checks import transfer_problems
from pipeline.config.unread import unread
from pipeline.config.visual_rules import visual_input_problems


def cross_field_problems(recipe: Recipe) -> list[Problem]:
    """Every conflict between settings of a recipe whose single values are valid."""
    return [problem for rule in RULES for problem in rule(recipe)]


def notes(recipe: Recipe, origins: Mapping[str, str]) -> Iterator[str]:
    """What is allowed but probably a mistake: settings that nothing reads, a run that ends during warm-up."""
    steps, warmup = recipe.train.steps, recipe.train.optimizer.warmup_steps
    if steps is not None and warmup > steps:
        yield f"train.optimizer.warmup_steps={warmup} is longer than the run (train.steps={steps})"
    if "contrastive.row_chunk" in origins and STAGES[recipe.stage].contrasts:
        yield "contrastive.row_chunk does nothing any more: contrastive.tile_mib bounds rows and columns by itself"
    yield from unread(recipe, origins)


def _length(recipe: Recipe) -> Iterator[Problem]:
    train, fields = recipe.train, ("train.steps", "train.epochs")
    if train.steps is not None and train.epochs is not None:
        text = f"train.steps={train.steps} and train.epochs={train.epochs} are both given; set one of them to null"
        yield Problem(text, fields)
    elif train.steps is None and train.epochs is None:
        yield Problem("the length of the run is missing: give train.steps or train.epochs", fields)


def _parts(recipe: Recipe) -> Iterator[Problem]:
    for part in STAGES[recipe.stage].parts:
        if getattr(recipe.model, part) is None:
            yield Problem(f"stage {recipe.stage} needs model.{part}", (f"model.{part}", "stage"))


def _one_of_path_and_tiny(recipe: Recipe) -> Iterator[Problem]:
    llm, visual = recipe.model.llm, recipe.model.visual
    backbone = visual.backbone if visual is not None else None
    pairs: list[tuple[str, str, object, str, object]] = []
    if llm is not None:
        pairs.append(("model.llm", "path", llm.path, "tiny", llm.tiny))
    if backbone is not None:
        pairs.append(("model.visual.backbone", "path", backbone.path, "tiny", backbone.tiny))
    for section, first, first_value, second, second_value in pairs:
        fields = (f"{section}.{first}", f"{section}.{second}")
        if first_value is not None and second_value is not None:
            text = f"{section} takes exactly one of {first} and {second}, got both; set one of them to null"
            yield Problem(text, fields)
        elif first_value is None and second_value is None:
            yield Problem(f"{section} needs exactly one of {first} and {second}, got neither", fields)
    if llm is not None and llm.tiny is not None and llm.tokenizer is None:
        text = "model.llm.tokenizer is missing: random (tiny) weights come without a tokenizer"
        yield Problem(text, ("model.llm.tokenizer", "model.llm.tiny"))


def _heads(recipe: Recipe) -> Iterator[Problem]:
    checks: list[tuple[str, int, str, int]] = []
    llm, visual = recipe.model.llm, recipe.model.visual
    if llm is not None and llm.tiny is not None:
        checks.append(("model.llm.tiny.width", llm.tiny.width, "model.llm.tiny.heads", llm.tiny.heads))
        if llm.tiny.width % llm.tiny.heads == 0 and llm.tiny.width // llm.tiny.heads % 2:
            size = llm.tiny.width // llm.tiny.heads
            text = f"model.llm.tiny: width / heads = {size} must be even, rotary positions turn pairs of dimensions"
            yield Problem(text, ("model.llm.tiny.heads", "model.llm.tiny.width"))
    if visual is not None and visual.path is None:
        word, sentence = visual.word.heads, visual.sentence.heads
        checks.append(("model.visual.width", visual.width, "model.visual.word.heads", word))
        checks.append(("model.visual.width", visual.width, "model.visual.sentence.heads", sentence))
        if visual.backbone is not None and visual.backbone.tiny is not None:
            tiny = visual.backbone.tiny
            prefix = "model.visual.backbone.tiny"
            checks.append((f"{prefix}.width", tiny.width, f"{prefix}.heads", tiny.heads))
    for width_name, width, heads_name, heads in checks:
        if width % heads:
            text = f"{heads_name}={heads} does not divide {width_name}={width}"
            yield Problem(text, (heads_name, width_name))


def _images(recipe: Recipe) -> Iterator[Problem]:
    visual = recipe.model.visual
    if visual is None or visual.path is not None or recipe.stage == "continued_pretraining":
        return
    if visual.backbone is not None and visual.backbone.tiny is not None:
        patch, pixels = visual.backbone.tiny.patch_pixels, recipe.data.image_pixels
        if pixels % patch:
            text = f"data.image_pixels={pixels} is not a multiple of model.visual.backbone.tiny.patch_pixels={patch}"
            yield Problem(text, ("data.image_pixels", "model.visual.backbone.tiny.patch_pixels"))
    if recipe.data.max_frames > visual.max_frames:
        frames, positions = recipe.data.max_frames, visual.max_frames
        text = f"data.max_frames={frames} is more than the positions of model.visual.max_frames={positions}"
        yield Problem(text, ("data.max_frames", "model.visual.max_frames"))


def _batch(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if not train.world_sizes:
        yield Problem("train.world_sizes is empty; list at least one world size", ("train.world_sizes",))
    if len(set(train.world_sizes)) != len(train.world_sizes):
        yield Problem(f"train.world_sizes={train.world_sizes} names a world size twice", ("train.world_sizes",))
    for world_size in train.world_sizes:
        problem = batch_problem(recipe, world_size)
        if problem:
            yield Problem(problem, ("train.global_batch", "train.micro_batch", "train.world_sizes"))
    if STAGES[recipe.stage].contrasts and train.global_batch < 2:
        text = "train.global_batch=1 leaves a contrastive loss without negatives; use 2 or more"
        yield Problem(text, ("train.global_batch", "stage"))


def batch_problem(recipe: Recipe, world_size: int) -> str:
    """Why the global batch cannot be split exactly over ``world_size`` ranks; empty when it can."""
    global_batch, micro_batch = recipe.train.global_batch, recipe.train.micro_batch
    if world_size < 1:
        return f"a world size must be at least 1, got {world_size}"
    size = recipe.train.sequence_parallel
    if world_size % size:
        return f"world size {world_size} is not a multiple of train.sequence_parallel={size}; change one of them"
    groups = world_size // size
    per_pass = micro_batch * groups
    if global_batch % per_pass == 0:
        return ""
    below, above = global_batch // per_pass * per_pass, (global_batch // per_pass + 1) * per_pass
    near = f"{below} or {above}" if below else f"{above}"
    return (
        f"train.global_batch={global_batch} is not a multiple of train.micro_batch={micro_batch} x {groups} "
        f"{'ranks' if size == 1 else 'groups of ranks'} = {per_pass}; {near} would be"
    )


def _long_text(recipe: Recipe) -> Iterator[Problem]:
    """Sequence parallelism fits the stage and the packs, and what is offloaded is there."""
    size, field = recipe.train.sequence_parallel, "train.sequence_parallel"
    tiny = recipe.model.llm.tiny if recipe.model.llm is not None else None
    if size > 1 and "text" not in STAGES[recipe.stage].shards:
        text = f"{field}={size} belongs to the continued_pretraining stage, not to {recipe.stage}; set it to 1"
        yield Problem(text, (field, "stage"))
    elif recipe.data.block_tokens % size:
        text = f"data.block_tokens={recipe.data.block_tokens} is not a multiple of {field}={size}: slices must be equal"
        yield Problem(text, ("data.block_tokens", field))
    elif tiny is not None and (text := heads_problem(tiny.heads, tiny.heads, size)):
        yield Problem(f"model.llm.tiny: {text}", ("model.llm.tiny.heads", field))
    if recipe.continued_pretraining.offload_activations and recipe.model.gradient_checkpointing in (False, AUTO):
        text = "continued_pretraining.offload_activations moves what model.gradient_checkpointing keeps; set both"
        yield Problem(text, ("continued_pretraining.offload_activations", "model.gradient_checkpointing"))


def heads_problem(heads: int, key_heads: int, size: int) -> str:
    """Why ``size`` ranks cannot share a model's attention heads; empty when they can.

    Fewer key heads than ranks are repeated, so either number must divide the other.
    """
    if heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0):
        return ""
    return (
        f"{heads} attention heads and {key_heads} key heads cannot be shared by train.sequence_parallel={size} ranks; "
        "choose a size that divides the heads, and divides the key heads or is a multiple of them"
    )


def _data(recipe: Recipe) -> Iterator[Problem]:
    data, stage, entry = recipe.data, recipe.stage, STAGES[recipe.stage]
    if data.unique_texts and not entry.contrasts:
        others = " and ".join(name for name, other in STAGES.items() if other.contrasts)
        text = f"data.unique_texts belongs to the {others} stage, not to {stage}"
        yield Problem(text, ("data.unique_texts", "stage"))
    if data.frame_budget is not None:
        fields = ("data.frame_budget", "stage")
        if entry.contrasts:
            text = f"data.frame_budget cannot be used by the {stage} stage: in-batch negatives need a fixed batch"
            yield Problem(f"{text}; set it to null", fields)
        elif "text" in entry.shards:
            yield Problem("data.frame_budget has no meaning for text; set it to null", fields)
        elif data.frame_budget < data.max_frames:
            text = f"data.frame_budget={data.frame_budget} cannot hold one clip of data.max_frames={data.max_frames}"
            yield Problem(text, ("data.frame_budget", "data.max_frames"))
    for name in ("frame_budget", "length_window") if data.pack_tokens else ():
        if getattr(data, name):
            text = f"data.pack_tokens and data.{name} are two ways to make items; set {name} to its default"
            yield Problem(text, ("data.pack_tokens", f"data.{name}"))
    tiny = recipe.model.llm.tiny if recipe.model.llm is not None else None
    if "text" in entry.shards and tiny is not None and data.block_tokens > tiny.max_positions:
        text = f"data.block_tokens={data.block_tokens} exceeds model.llm.tiny.max_positions={tiny.max_positions}"
        yield Problem(text, ("data.block_tokens", "model.llm.tiny.max_positions"))
    if recipe.train.eval_every_steps and not data.eval:
        text = f"train.eval_every_steps={recipe.train.eval_every_steps} but data.eval is empty; add a source or set 0"
        yield Problem(text, ("train.eval_every_steps", "data.eval"))
    yield from _remote(recipe)
    for number, source in enumerate(data.train):
        if text := _weight_problem(source.weight):
            yield Problem(f"data.train.{number}.weight {text}", (f"data.train.{number}.weight",))
    yield from _repeated_sources(data.train, "data.train", "raise its weight instead")
    yield from _repeated_sources(data.eval, "data.eval", "keep one")


def _weight_problem(weight: float | list[tuple[int, float]]) -> str:
    """What is wrong with a source's weight or curriculum; empty if nothing is."""
    if isinstance(weight, float):
        return "" if weight > 0 else f"must be positive, it is {weight:g}"
    epochs = [epoch for epoch, _ in weight]
    if not weight or min(epochs) < 0 or sorted(set(epochs)) != epochs:
        return f"needs [epoch, weight] points in ascending order of epochs, they are {weight}"
    if min(value for _, value in weight) < 0 or not any(value for _, value in weight):
        return f"needs weights of at least 0 and one above, they are {weight}"
    return ""


def is_remote(shards: str) -> bool:
    """Whether a shard set is in an object store."""
    return "://" in shards and not shards.startswith("file://")


def _augment(recipe: Recipe) -> Iterator[Problem]:
    for name, text in recipe.data.augment.wrong_pairs():
        yield Problem(f"data.augment.{name} {text}", (f"data.augment.{name}",))
    ctc = recipe.contrastive.ctc
    if recipe.stage == "contrastive" and ctc.used and ctc.unusable == "error" and recipe.data.augment.shortens:
        text = "data.augment makes clips shorter (speed, drop_frames or keep_part), so that their glosses may not fit"
        text += " any more; set contrastive.ctc.unusable to leave_out, or leave the length of clips alone"
        yield Problem(text, ("data.augment", "contrastive.ctc.unusable"))


def _remote(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    remote = next((s.shards for s in (*data.train, *data.eval) if is_remote(s.shards)), None)
    if remote is not None and data.cache_dir is None:
        yield Problem(f"data.cache_dir is missing: {remote} is in an object store; name a node-local folder", ("data",))
    if data.access == "cache" and not data.cache_gib:
        text = "data.access=cache needs data.cache_gib, the most that cached shards may take on a host"
        yield Problem(text, ("data.access", "data.cache_gib"))
    if data.cache_gib and data.cache_dir is None:
        yield Problem("data.cache_gib needs data.cache_dir, a node-local folder", ("data.cache_gib", "data.cache_dir"))
    for secret in _secret_options(data.storage_options):
        text = (
            f"data.storage_options.{secret} would be written into every run and export; put credentials into the "
            "store's own files (for S3 ~/.aws/credentials) or fsspec's configuration"
        )
        yield Problem(text, ("data.storage_options",))


def _secret_options(options: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in sorted(options.items()):
        if isinstance(value, Mapping):
            yield from _secret_options(value, f"{prefix}{name}.")
        elif is_secret(name):
            yield f"{prefix}{name}"


def _repeated_sources(sources: Iterable[SourceConfig], name: str, fix: str) -> Iterator[Problem]:
    seen: dict[tuple[str, str, str | None, str], int] = {}
    for number, source in enumerate(sources):
        identity = (source.shards, source.split, source.corpus, source.text)
        if identity in seen:
            text = f"{name}.{number} is the same source as {name}.{seen[identity]} ({source.shards}); {fix}"
            yield Problem(text, (f"{name}.{number}",))
        seen.setdefault(identity, number)


def _precision(recipe: Recipe) -> Iterator[Problem]:
    attention, precision = recipe.model.attention, recipe.train.precision
    if precision == "fp32" and attention not in ("auto", "sdpa"):
        text = f"model.attention={attention} computes in 16 bits only, but train.precision=fp32; use sdpa or bf16"
        yield Problem(text, ("model.attention", "train.precision"))
    for position, beta in enumerate(recipe.train.optimizer.betas):
        if not 0 <= beta < 1:
            text = f"train.optimizer.betas.{position}={beta} must be at least 0 and below 1"
            yield Problem(text, ("train.optimizer.betas",))


def auto_settings(recipe: Recipe) -> list[str]:
    """Settings that are chosen by how much memory they leave."""
    base, share = recipe.deepspeed.base, recipe.model.gradient_checkpointing
    settings = (("deepspeed.base", base), ("model.gradient_checkpointing", share))
    return [name for name, value in settings if value == AUTO]


def _zero_choice(recipe: Recipe) -> Iterator[Problem]:
    for name in auto_settings(recipe):
        if recipe.deepspeed.gpu_memory_gib is None:
            text = f"{name}=auto needs deepspeed.gpu_memory_gib, the memory of one GPU (80 for an H100)"
            yield Problem(text, (name, "deepspeed.gpu_memory_gib"))
    if recipe.deepspeed.base != AUTO:
        return
    zero = recipe.deepspeed.overrides.get("zero_optimization")
    if isinstance(zero, dict) and "stage" in zero:
        text = "deepspeed.base=auto chooses the ZeRO stage, but deepspeed.overrides sets it; remove one of them"
        yield Problem(text, ("deepspeed.base", "deepspeed.overrides"))


def _texts(recipe: Recipe) -> Iterator[Problem]:
    prompt = recipe.connector.prompt
    if fields_of(prompt).count(VIDEO) != 1:
        text = f"connector.prompt must contain {{{VIDEO}}} exactly once, got {prompt!r}"
        yield Problem(text, ("connector.prompt",))
    elif problem := prompt_problem(prompt):
        yield Problem(f"connector.prompt: {problem}", ("connector.prompt",))
    for name, problem in cue_problems(prompt, recipe.connector.prompts):
        yield Problem(f"connector.prompts.{problem}", (f"connector.prompts.{name}", "connector.prompt"))
    encoder = recipe.model.text_encoder
    if encoder is not None and encoder.kind == "llm" and encoder.pooling == "cls":
        text = (
            "model.text_encoder.pooling=cls is the first token, which has seen no text in a causal LM; use last or mean"
        )
        yield Problem(text, ("model.text_encoder.pooling", "model.text_encoder.kind"))


def _gloss_order(recipe: Recipe) -> Iterator[Problem]:
    ctc = recipe.contrastive.ctc
    if ctc.weight and ctc.order == "video" and not ctc.set_weight:
        text = (
            "contrastive.ctc.order=video needs contrastive.ctc.set_weight above 0: what tells the order is a classifier"
            " that learns which glosses occur"
        )
        yield Problem(text, ("contrastive.ctc.order", "contrastive.ctc.set_weight"))


def _paths(recipe: Recipe) -> Iterator[Problem]:
    """Paths mean the same on every host: no variables, no home folders."""
    model = recipe.model
    paths: list[tuple[str, str | None]] = [("run_dir", recipe.run_dir), ("deepspeed.base", recipe.deepspeed.base)]
    for name, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        paths += [(f"data.{name}.{number}.shards", source.shards) for number, source in enumerate(sources)]
        paths += [(f"data.{name}.{number}.pose", source.pose) for number, source in enumerate(sources)]
    if model.llm is not None:
        paths += [("model.llm.path", model.llm.path), ("model.llm.tokenizer", model.llm.tokenizer)]
    if model.visual is not None:
        paths.append(("model.visual.path", model.visual.path))
        if model.visual.backbone is not None:
            paths.append(("model.visual.backbone.path", model.visual.backbone.path))
    if model.text_encoder is not None:
        paths.append(("model.text_encoder.path", model.text_encoder.path))
    paths += [(f"model.init_from.{part}", path) for part, path in model.init_from.model_dump().items()]
    for name, path in paths:
        if path is None:
            continue
        if not path.strip():
            yield Problem(f"{name} is empty", (name,))
        elif "\0" in path:
            yield Problem(f"{name}={path!r} holds a NUL byte, which no path can", (name,))
        elif "$" in path or path.startswith("~"):
            text = f"{name}={path!r}: recipes do not expand variables or ~; write the path or pass --set {name}=..."
            yield Problem(text, (name,))


RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _length, _parts, _one_of_path_and_tiny, visual_input_problems, _heads, _images, _batch, _long_text, _data,
    _precision, _zero_choice, _texts, _gloss_order, _paths, _augment, parts_problems, sequence_problems,
    transfer_problems,
)  # fmt: skip

__all__ = ["RULES", "batch_problem", "cross_field_problems", "heads_problem", "is_remote", "notes"]
