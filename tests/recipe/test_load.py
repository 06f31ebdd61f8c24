"""Recipes: what is accepted, and for every mistake its code, place and cure."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from pydantic import ValidationError

from plmcc.catalog import registry as catalog
from plmcc.diagnostics import Diagnostic, Location, PlmccError
from plmcc.recipe.explain import value_at
from plmcc.recipe.load import Data, Distill, Recipe, Stage, Train, load_recipe, parse_recipe
from plmcc.recipe.schema import recipe_schema
from support.recipe_mistakes import HEAD, MISTAKES, Mistake

FULL = """\
# a comment
plmcc: 1
name: codes
model: some/model
task: sentence-similarity
seed: 3
passes:
  - compositional_codes:
      targets: [input_embeddings]
      codebooks: 8
      learning_rate: 1e-4
train:
  data: {train: [a.txt, "b*.txt"], eval: "hub:glue/stsb@validation", text: [s1, s2], label: score}
  distill:
    hidden_states: 1
    pooled: 0.5
    layers: {0: 0, 1: 3}
  trainable: passes
  arguments: {num_train_epochs: 1, learning_rate: 2e-4, eval_strategy: no, bf16: false}
evaluate:
  - {metric: spearman, data: dev.csv, text: [s1, s2], label: score, limit: 10}
lower: {to: [compile], quantize: int8}
search:
  passes.0.compositional_codes.codebooks: [4, 8]
  train.arguments.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}
"""
STAGES = """\
plmcc: 1
stages:
  - name: one
    passes: [compositional_codes]
    train: {data: {train: synthetic, synthetic: {sequences: 8}}}
  - {name: two, passes: [{compositional_codes: {codebooks: 4}}]}
"""


def problems(text: str, *overrides: str) -> list[Diagnostic]:
    with pytest.raises(PlmccError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return list(caught.value.diagnostics)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: repr(m.text[-50:]))
def test_mistake(mistake: Mistake) -> None:
    found = problems(mistake.text.replace("§", ""))
    assert len(found) == mistake.count, [d.render() for d in found]
    said = found[0]
    assert (said.code, str(said.location)) == (mistake.code, mistake.location), said.render()
    assert mistake.hint in f"{said.allowed} {said.hint}", said.render()
    assert (
        "^" in said.render() or not isinstance(said.location, Location) or not said.location.excerpt
    )


def test_the_table_is_long_and_without_repetitions() -> None:
    assert len({mistake.text for mistake in MISTAKES}) == len(MISTAKES) >= 60


def test_everything_wrong_is_said_at_once_and_in_order() -> None:
    text = (
        "plmcc: 1\nsed: 1\npasses: [a, {compositional_codes: {codebooks: x, beam: y}}]\nlower: 3\n"
    )
    found = problems(text)
    assert [d.code for d in found] == ["PLM101", "PLM110", "PLM103", "PLM103", "PLM103"]
    assert [str(d.location) for d in found] == [
        "r.yaml:2:1",
        "r.yaml:3:10",
        "r.yaml:3:47",
        "r.yaml:3:56",
        "r.yaml:4:8",
    ]


# --- what is accepted


def test_the_long_recipe_is_read_exactly() -> None:
    recipe = parse_recipe(FULL)
    assert recipe.name == "codes"
    assert recipe.seed == 3
    assert recipe.train is not None
    assert recipe.train.arguments["learning_rate"] == 2e-4
    assert recipe.train.arguments["eval_strategy"] == "no"
    assert recipe.train.distill is not None
    assert recipe.train.distill.layers == {0: 0, 1: 3}
    options = recipe.passes[0].model_dump()
    assert (options["codebooks"], options["learning_rate"]) == (8, 1e-4)
    assert options["codewords"] == 16


@pytest.mark.parametrize("text", [HEAD, FULL, STAGES], ids=["short", "full", "stages"])
def test_round_trip(text: str) -> None:
    recipe = parse_recipe(text, "some.yaml")
    written = recipe.to_yaml()
    again = parse_recipe(written, "other.yaml")
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.digest() == recipe.digest()
    assert again.to_yaml() == written
    assert json.loads(json.dumps(recipe.effective()))["plmcc"] == 1


def test_every_default_is_in_the_effective_recipe() -> None:
    effective = parse_recipe(STAGES).effective()
    assert "passes" not in effective
    stage = effective["stages"][0]
    assert stage["passes"][0]["compositional_codes"]["codewords"] == 16
    assert stage["train"]["data"]["synthetic"] == {"sequences": 8, "length": 32, "exponent": 1.0}
    assert stage["train"]["trainable"] == "all"


def test_a_changed_option_changes_the_digest() -> None:
    assert parse_recipe(FULL).digest() != parse_recipe(FULL.replace(": 8", ": 9")).digest()
    assert parse_recipe(FULL) != parse_recipe(FULL.replace("seed: 3", "seed: 4"))


def test_layout_does_not_change_the_recipe() -> None:
    windows = "\ufeff" + FULL.replace("\n", "\r\n")
    assert parse_recipe(windows) == parse_recipe(FULL)


@pytest.mark.parametrize("entry", ["compositional_codes", "{compositional_codes: {}}"])
def test_ways_to_write_a_pass(entry: str) -> None:
    expected = parse_recipe("plmcc: 1\npasses:\n  - compositional_codes:\n", "x.yaml")
    assert parse_recipe(f"plmcc: 1\npasses: [{entry}]", "x.yaml") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2", 2.0), (".5", 0.5), ("1.", 1.0), ("0x10", 16.0), ("+1E2", 100.0)],
)
def test_numbers(text: str, value: float) -> None:
    recipe = parse_recipe(HEAD + f"train: {{data: {{train: a}}, distill: {{logits: {text}}}}}")
    assert recipe.train is not None
    assert recipe.train.distill is not None
    assert recipe.train.distill.logits == value


@pytest.mark.parametrize(
    "text", ["yes", "no", "on", "1:30", "2026-01-01", "1_0", "ümläut", "=", "e5"]
)
def test_text_that_other_yaml_takes_for_something_else(text: str) -> None:
    recipe = parse_recipe(HEAD + f"model: {text}")
    assert recipe.model == text
    assert yaml.safe_load(recipe.to_yaml())["model"] == text, "YAML 1.1 must read it as text too"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(text: str) -> None:
    recipe = Recipe(model=text, passes=parse_recipe(HEAD).passes)
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_a_recipe_of_objects_equals_one_of_text() -> None:
    kind = catalog.load("compositional_codes")
    built = Recipe(
        name="x",
        passes=[kind(targets="a")],
        train=Train(data=Data(train="synthetic"), distill=Distill(logits=1)),
    )
    text = """\
plmcc: 1
passes: [compositional_codes: {targets: a}]
train: {data: {train: synthetic}, distill: {logits: 1}}
"""
    assert built == parse_recipe(text, "x.yaml") == parse_recipe(built.to_yaml())
    assert built.location(("passes", 0)) == "recipe x: passes.0"
    assert type(parse_recipe(text, load_torch=True).passes[0]) is kind


def test_objects_are_frozen_and_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_recipe(HEAD).seed = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Data(train="a", evel="b")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="no distillation weight"):
        Distill()


def test_steps() -> None:
    recipe = parse_recipe(HEAD)
    assert recipe.steps() == [Stage(name="main", passes=recipe.passes)]
    assert [stage.name for stage in parse_recipe(STAGES).steps()] == ["one", "two"]


def test_places_of_what_was_written() -> None:
    recipe = parse_recipe(FULL, "r.yaml")
    targets = recipe.location(("passes", 0, "compositional_codes", "targets"))
    assert isinstance(targets, Location)
    assert (str(targets), targets.excerpt.strip()) == ("r.yaml:9:16", "targets: [input_embeddings]")
    assert str(recipe.pass_location(0, 0)) == "r.yaml:8:5"
    assert str(recipe.pass_location(0, 0, "codebooks")) == "r.yaml:10:18"
    # an option that was not written: the nearest thing around it
    assert str(recipe.pass_location(0, 0, "codewords")) == "r.yaml:9:7"
    assert str(parse_recipe(STAGES, "s.yaml").pass_location(1, 0)) == "s.yaml:6:27"


@pytest.mark.parametrize(
    ("file", "name"), [("a/minilm-codes.yaml", "minilm-codes"), ("my recipe.yml", "my-recipe")]
)
def test_the_name_comes_from_the_file(file: str, name: str) -> None:
    assert parse_recipe(HEAD, file).name == name


# --- aliases and size


def test_an_alias_repeats_a_value() -> None:
    text = HEAD + "evaluate: [&e {metric: f1, data: a}, *e]\n"
    assert len(parse_recipe(text).evaluate) == 2


def test_an_alias_bomb_ends_quickly() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    start = time.perf_counter()
    found = problems("plmcc: 1\n" + "\n".join(levels))
    assert [d.code for d in found] == ["PLM018"]
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("plmcc: 1\nname: &a [*a]\n", "PLM017"),
        ("plmcc: 1\nname: &a {b: *a}\n", "PLM017"),
        ("plmcc: 1\nname: " + "[" * 5000, "PLM017"),
        ("plmcc: 1\n" + "".join(f"{' ' * i}a:\n" for i in range(200)), "PLM017"),
        ("plmcc: 1\nname: [" + "x," * 20000 + "]", "PLM018"),
        ("%YAML " + "9" * 5000 + ".1\n---\na", "PLM010"),
    ],
)
def test_bounds(text: str, code: str) -> None:
    assert [d.code for d in problems(text)] == [code]


# --- files


def write(folder: Path, content: bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "PLM006", "begin with `plmcc: 1`"),
        (b"# only a comment\n", "PLM006", "the file is empty"),
        (b"plmcc: 1\nname: \xe9\n", "PLM005", "byte 0xe9"),
        ("plmcc: 1\n".encode("utf-16"), "PLM005", "save the file as UTF-8"),
        (b"x" * (1 << 20) + b"y", "PLM004", "1 MiB"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, code: str, words: str) -> None:
    with pytest.raises(PlmccError) as caught:
        load_recipe(write(tmp_path, content))
    assert [d.code for d in caught.value.diagnostics] == [code]
    assert words in caught.value.render()


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    write(tmp_path, b"")
    with pytest.raises(PlmccError, match=r"PLM001(.|\n)*did you mean `recipe.yaml`"):
        load_recipe(tmp_path / "recip.yaml")
    with pytest.raises(PlmccError, match=r"PLM001(.|\n)*the directory .* does not exist"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml")


def test_things_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlmccError, match=r"PLM002.*directory"):
        load_recipe(tmp_path)
    with pytest.raises(PlmccError, match="PLM003: cannot read the file: it is not a regular"):
        load_recipe("/dev/zero")
    with pytest.raises(PlmccError, match="PLM003"):
        load_recipe("a\0b")
    with pytest.raises(PlmccError, match=r"PLM003.*too long"):
        load_recipe("x" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    file = write(tmp_path, HEAD.encode())
    file.chmod(0)
    with pytest.raises(PlmccError, match=r"PLM003.*denied"):
        load_recipe(file)


def test_a_good_file(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, FULL.encode())) == parse_recipe(FULL)


# --- overrides


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        ("name=a-b", ("name",), "a-b"),
        ("model=a=b", ("model",), "a=b"),
        (
            "passes.0.compositional_codes.codewords=4",
            ("passes", 0, "compositional_codes", "codewords"),
            4,
        ),
        (
            "passes.0.compositional_codes.targets=[a, b]",
            ("passes", 0, "compositional_codes", "targets"),
            ["a", "b"],
        ),
        ("train.arguments.max_steps=3", ("train", "arguments", "max_steps"), 3),
        ("train.distill.layers.1=2", ("train", "distill", "layers", 1), 2),
        ("train.dropout=false", ("train", "dropout"), False),
        ("evaluate.0.limit=", ("evaluate", 0, "limit"), None),
    ],
)
def test_overrides(argument: str, path: tuple[str | int, ...], value: object) -> None:
    found = parse_recipe(FULL, "r.yaml", [argument]).effective()
    assert value_at(found, path) == value


def test_overrides_make_what_is_missing() -> None:
    changes = [
        "passes.0.compositional_codes.beam=2",
        "train.data.train=a.txt",
        "train.arguments.bf16=true",
    ]
    recipe = parse_recipe(HEAD, "r.yaml", changes)
    assert recipe.passes[0].model_dump()["beam"] == 2
    assert recipe.train == Train(data=Data(train="a.txt"), arguments={"bf16": True})


@pytest.mark.parametrize(
    ("argument", "code", "words"),
    [
        ("seed", "PLM130", "path=value"),
        ("=3", "PLM130", "path=value"),
        ("a..b=3", "PLM130", "path=value"),
        ("sed=3", "PLM101", "did you mean `seed`"),
        ("trian.arguments.max_steps=3", "PLM101", "did you mean `train`"),
        ("train.argument.max_steps=3", "PLM101", "did you mean `arguments`"),
        ("train.arguments.maxsteps=3", "PLM120", "did you mean `max_steps`"),
        ("train.arguments.max_steps=x", "PLM103", "a whole number"),
        ("passes.0.compositional_codes.codebook=3", "PLM101", "did you mean `codebooks`"),
        ("passes.0.compositional_code.codebooks=3", "PLM131", "did you mean `compositional_codes`"),
        ("passes.1.compositional_codes.codebooks=3", "PLM131", "0 to 0"),
        ("passes.x=3", "PLM131", "not an index"),
        ("passes.²=3", "PLM131", "not an index"),
        ("seed.x=3", "PLM131", "nothing is below it"),
        ("seed=[1", "PLM010", "not closed"),
        ("seed=!!int 3", "PLM015", "tag"),
        ("name=*x", "PLM010", "undefined alias"),
        ("plmcc=2", "PLM106", "write `plmcc: 1`"),
    ],
)
def test_bad_overrides(argument: str, code: str, words: str) -> None:
    (found,) = problems(FULL, argument)
    assert (found.code, found.location) == (code, f"--set {argument}"), found.render()
    assert words in found.render()


def test_all_bad_overrides_are_said() -> None:
    assert [d.code for d in problems(FULL, "seed", "seed.x=1")] == ["PLM130", "PLM131"]


def test_an_override_leaves_other_places_alone() -> None:
    recipe = parse_recipe(FULL, "r.yaml", ["passes.0.compositional_codes.codebooks=2"])
    assert (
        recipe.pass_location(0, 0, "codebooks") == "--set passes.0.compositional_codes.codebooks=2"
    )
    assert str(recipe.pass_location(0, 0, "targets")) == "r.yaml:9:16"


# --- the schema


def as_json(text: str) -> object:
    plain = text.replace("1e-4", "1.0e-4").replace("2e-4", "2.0e-4")  # numbers for YAML 1.1 too
    return json.loads(json.dumps(yaml.safe_load(plain)))


def test_the_schema_is_draft_07() -> None:
    schema = recipe_schema()
    Draft7Validator.check_schema(schema)
    assert "$defs" not in json.dumps(schema)
    assert "compositional_codes" in schema["definitions"]
    assert (
        schema["definitions"]["TrainingArguments"]["properties"]["max_steps"]["type"] == "integer"
    )


@pytest.mark.parametrize("text", [HEAD, FULL.replace(" no,", " 'no',"), STAGES])
def test_the_schema_accepts_good_recipes(text: str) -> None:
    assert [e.message for e in Draft7Validator(recipe_schema()).iter_errors(as_json(text))] == []


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")), ids=lambda f: f.name
)
def test_shipped_recipes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    load_recipe(file)
    assert [e.message for e in Draft7Validator(recipe_schema()).iter_errors(as_json(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "name: x",
        "plmcc: 2",
        HEAD + "passses: []",
        HEAD + "seed: x",
        HEAD + "task: nope",
        HEAD + "train: {}",
        HEAD + "train: {data: {train: a}, arguments: {num_train_epoch: 1}}",
        HEAD + "train: {data: {train: a}, arguments: {max_steps: x}}",
        HEAD + "lower: {to: [tvm]}",
        "plmcc: 1\npasses: [nope]",
        "plmcc: 1\npasses: [compositional_codes: {codeboks: 1}]",
        "plmcc: 1\npasses: [compositional_codes: {codebooks: 0}]",
        "plmcc: 1\npasses: [{compositional_codes: {}, other: {}}]",
    ],
)
def test_the_schema_refuses_what_check_refuses(text: str) -> None:
    assert list(Draft7Validator(recipe_schema()).iter_errors(as_json(text)))
    assert problems(text)


# --- fuzzing

MARKS = "\t \n : :_ -_ [ ] { } &a_ *a !x_ <<:_ ' \" |\n ?_ ~ \x00 \ud800 \x85 1e999 .nan 0x #_"
WORDS = [*MARKS.replace("_", " ").split(" "), " ", ",", "\\x", "%YAML 1.2\n", "---\n", "passes"]
PIECES = st.sampled_from(WORDS)


def survives(text: str) -> None:
    try:
        recipe = parse_recipe(text)
    except PlmccError as problem:
        json.dumps([problem.render(), problem.to_json()])
        return
    assert parse_recipe(recipe.to_yaml()) == recipe


EDITS = st.lists(
    st.tuples(st.integers(0, len(FULL)), st.integers(0, 12), PIECES | st.text(max_size=4))
)


@given(st.sampled_from([FULL, STAGES]), EDITS)
@settings(max_examples=400, deadline=None)
def test_no_text_raises_anything_but_a_plmcc_error(
    text: str, edits: list[tuple[int, int, str]]
) -> None:
    for start, length, piece in edits:
        text = text[:start] + piece + text[start + length :]
    survives(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    steps: list[tuple[str | int, object]] = []
    if isinstance(value, (dict, list)):
        steps = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [path, *(p for step, inner in steps for p in paths(inner, (*path, step)))]


@given(st.data(), VALUES, st.sampled_from([FULL, STAGES]))
@settings(max_examples=300, deadline=None)
def test_no_value_raises_anything_but_a_plmcc_error(
    data: st.DataObject, value: object, text: str
) -> None:
    recipe = yaml.safe_load(text)
    *way, last = data.draw(st.sampled_from(paths(recipe)[1:]))
    holder = recipe
    for step in way:
        holder = holder[step]
    holder[last] = value
    survives(yaml.safe_dump(recipe, allow_unicode=True))
