"""What an experiment's file may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.experiment.matrix import Matrix, arms, baseline, references, replaced, specs_of

Read = Callable[[dict[str, Any]], Matrix]


def test_arms_are_all_combinations_and_the_baseline_comes_first(content: dict[str, Any], read: Read) -> None:
    content["axes"]["lr"] = {"low": {}, "high": {"encoder": {"train.optimizer.lr": 0.01}}}
    content["baseline"] = {"lr": "high"}
    matrix = read(content)
    assert [arm.name for arm in arms(matrix)] == [
        "warmup=short, lr=high", "warmup=short, lr=low", "warmup=long, lr=low", "warmup=long, lr=high",
    ]  # fmt: skip
    assert baseline(matrix).name == "warmup=short, lr=high"
    encoder, translator = specs_of(matrix, arms(matrix)[-1])
    assert encoder.set == {"train.optimizer.lr": 0.01}
    assert translator.set == {"model.visual.path": "{encoder}", "train.optimizer.warmup_steps": 7}


def test_a_value_may_leave_a_step_out_or_change_its_recipe(content: dict[str, Any], read: Read) -> None:
    content["steps"][1]["set"] = {}
    content["axes"] = {"encoder": {"ours": {}, "none": {"encoder": None}, "other": {"encoder": {"recipe": "x.yaml"}}}}
    content["scores"].pop()
    matrix = read(content)
    assert [[spec.recipe for spec in specs_of(matrix, arm)] for arm in arms(matrix)] == [
        ["demo_contrastive", "demo_connector"], ["demo_connector"], ["x.yaml", "demo_connector"],
    ]  # fmt: skip


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = content
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value

    return apply


TWO_AXES = {"a": {"x": {}, "y": {"encoder": {"seed": 1}}}, "b": {"x": {}, "y": {"encoder": {"seed": 2}}}}


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (change("seeds", [1, 1]), "seed 1 is given twice"),
        (change("seeds", []), "seeds: give at least one"),
        (change("steps/1/name", "encoder"), "step 'encoder' is given twice; every step needs a name of its own"),
        (change("steps/0/name", "En coder"), "step 'En coder': use lower-case letters, digits and _"),
        (change("axes/warmup", {"only": {}}), "axes.warmup has 1 value; an axis needs at least two to compare"),
        (change("axes/warmup/long", {"decoder": {}}),
         "axes.warmup.long changes step 'decoder'; the steps are encoder, translator"),
        (change("baseline", {"warmup": "none"}), "baseline: no value 'none' of an axis 'warmup'; there are {'warmup'"),
        (change("axes", TWO_AXES), "the axes a and b both change seed of step encoder; leave it to one of them"),
        (change("axes/warmup/long", {}), "the arms warmup=short and warmup=long are the same steps"),
        (change("steps/0/set", {"model.text_encoder.path": "{translator}"}),
         "step encoder of the arm warmup=short uses the export of {translator}; before it come no steps"),
        (change("scores/0/metric", "eval/loss"), "score test: give either shards, which the model translates, or a"),
        (change("scores/0/step", "decoder"), "score test: no step 'decoder'; the steps are encoder, translator"),
        (change("scores/1/name", "test"), "score 'test' is given twice"),
        (change("scores/0/options", {"references": "more"}), "score test: the table compares with one reference per"),
        (change("steps/0/recipes", "x"), "steps.0.recipes: Extra inputs are not permitted"),
        (change("steps", []), "steps: List should have at least 1 item"),
    ],
)  # fmt: skip
def test_contradictions_are_named(
    content: dict[str, Any], read: Read, problem: Callable[[dict[str, Any]], None], message: str
) -> None:
    problem(content)
    with pytest.raises(RecipeError) as error:
        read(content)
    assert message in str(error.value) and "matrix.yaml" in str(error.value)


def test_a_file_that_is_no_yaml(tmp_path: Any) -> None:
    from pipeline.experiment.matrix import read_matrix

    (tmp_path / "m.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match=r"m\.yaml:1: is not valid YAML"):
        read_matrix(tmp_path / "m.yaml")


def test_fields_of_prompts_are_no_steps(content: dict[str, Any], read: Read) -> None:
    content["steps"][1]["set"] |= {"connector.prompt": "{language} {encoder} {video}"}
    content["axes"]["warmup"]["long"]["translator"] |= {"connector.prompts.example.template": "{gloss} = {text}"}
    _, translator = specs_of(read(content), arms(read(content))[1])
    assert references(translator.set) == {"encoder"}
    shown = replaced(translator.set, {"encoder": "runs/x"})
    assert shown["model.visual.path"] == "runs/x" and shown["connector.prompt"] == "{language} {encoder} {video}"
