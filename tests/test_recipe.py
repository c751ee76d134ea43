"""Recipes are data: whatever is wrong with one is told in one line that names the key and the mend."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from risotto_zoo.errors import UserError
from training import train
from training.recipe import Recipe, _known_keys, dump, load_recipe, recipe_names, validate


@pytest.mark.parametrize(
    ("recipe", "sets", "words"),
    [
        ("digit", [], ["unknown recipe 'digit'", "did you mean 'digits'"]),
        ("nowhere/x.yaml", [], ["nowhere/x.yaml", "no such file"]),
        ("digits", ["epoch=3"], ["unknown key 'epoch'", "'epochs'"]),
        ("digits", ["optimizer.lrr=3"], ["unknown key 'optimizer.lrr'", "'optimizer.lr'"]),
        ("digits", ["lr=3"], ["unknown key 'lr'", "'optimizer.lr'"]),
        ("digits", ["alpha=0.3"], ["unknown key 'alpha'", "'model_args.alpha'"]),
        ("digits", ["learning_rate=1"], ["unknown key 'learning_rate'; training/README.md lists all"]),
        ("digits", ["optimizer.options={weight_decay: 1}"], ["weight_decay is a key of its own"]),
        ("digits", ["epochs=ten"], ["epochs", "'ten'"]),
        ("digits", ["epochs=0"], ["epochs", "greater than or equal to 1"]),
        ("digits", ["optimizer.lr=-1"], ["optimizer.lr", "greater than 0"]),
        ("digits", ["optimizer.name=mouon"], ["unknown optimizer 'mouon'", "'muon'"]),
        ("digits", ["schedule=cosin"], ["schedule", "'cosine'"]),
        ("digits", ["augment.crop_scale=[1.0, 0.5]"], ["augment.crop_scale", "smallest <= largest"]),
        ("digits", ["data.train_size=6"], ["train_size", "augment.crop_scale"]),
        ("digits", ["warmup_epochs=99"], ["warmup_epochs 99"]),
        ("digits", ["accumulate=7"], ["no multiple of accumulate"]),
        ("digits", ["epochs"], ["write it as key=value"]),
        ("digits", ["epochs=[1"], ["not a YAML value"]),
        ("digits", ["freeze=1"], ["init_from"]),
        ("digits", ["data.pipeline=streaming"], ["shift"]),
        ("digits", ["augment.mixup_prob=0.5"], ["mixup_prob has no effect"]),
        ("digits", ["model_args.pretrained=true"], ["model_args takes none of pretrained", "init_from"]),
        ("digits", ["optimizer.options={eps: .inf}"], ["optimizer.options holds what cannot be written down"]),
        ("digits", ["model_args.a=!!binary /w=="], ["model_args holds what cannot be written down"]),
        ("digits", ["model_args={a: {1: 2}}"], ["model_args holds what cannot be written down"]),
        ("digits", ["model_args.a=2026-01-01"], ["model_args holds what cannot be written down"]),
        ("digits", ["optimizer.name=kron"], ["unknown optimizer 'kron'"]),
    ],
)
def test_what_is_wrong_is_named(recipe, sets, words):
    with pytest.raises(UserError) as error:
        load_recipe(recipe, sets)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_numbers_with_exponents_are_numbers():
    assert load_recipe("digits", ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
    assert load_recipe("digits", ["optimizer.lr=2.5e-4"]).optimizer.lr == 2.5e-4


@pytest.mark.parametrize("place", ["/tmp/photos #1", "2024", "a: b", "[x]", "~/x", "no", "yes it's"])
def test_names_and_paths_are_taken_as_they_are(place):
    recipe = load_recipe("digits", [f"data.source={place}", f"data.root={place}"])
    assert recipe.data.source == recipe.data.root == place
    assert load_recipe("digits", [f"data.source={json.dumps(place)}"]).data.source == place


def test_null_is_none_where_a_name_may_be_left_out():
    for nothing in ("null", "~", " Null", ""):
        assert load_recipe("digits", ["data.root=x", f"data.root={nothing}"]).data.root is None
    assert load_recipe("digits", ["data.root= x "]).data.root == "x"
    assert load_recipe("digits", ["data={root: null}"]).data.root is None


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("epochs: 3\noptimizer: {lr: 0.5}\nseed: 1\noptimizer:\n  momentum: 0.5\n")
    with pytest.raises(UserError, match=r"twice\.yaml, line 4: the key 'optimizer' stands twice"):
        load_recipe(str(path))
    path.write_text(
        "model: risotto_resnet20\ndata: {source: digits}\n"
        "optimizer: &o {<<: {lr: 0.5}, <<: {momentum: 0.8}, lr: 0.25}\nmodel_args: {<<: *o}\n"
    )
    optimizer = load_recipe(str(path), ["model_args={}"]).optimizer
    assert (optimizer.lr, optimizer.momentum) == (0.25, 0.8)


def test_base_is_merged_key_by_key(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\noptimizer: {name: sgd, lr: 0.5}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptimizer: {lr: 0.25}\n")
    recipe = load_recipe(str(tmp_path / "child.yaml"))
    assert (recipe.epochs, recipe.optimizer.name, recipe.optimizer.lr) == (7, "sgd", 0.25)
    (tmp_path / "base.yaml").write_text("base: child.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_recipe(str(tmp_path / "child.yaml"))
    (tmp_path / "child.yaml").write_text("base: missing.yaml\n")
    with pytest.raises(UserError, match=r"missing\.yaml"):
        load_recipe(str(tmp_path / "child.yaml"))


@pytest.mark.parametrize("text", ["epochs: [1", "- 1\n- 2", "just words", "\x00\x01", "{{}}"])
def test_files_that_are_no_recipe(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(str(path))


def test_a_dumped_recipe_reads_back_the_same(tmp_path):
    for name in recipe_names():
        recipe = load_recipe(name)
        (tmp_path / "copy.yaml").write_text(dump(recipe))
        assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


# --- 100 randomly broken recipes through the command itself

SOUND = yaml.safe_load(dump(load_recipe("digits", ["epochs=1", "warmup_epochs=0"])))
KEYS = sorted(_known_keys(Recipe))
WRONG_TYPES = st.one_of(st.text("xyz", min_size=3), st.lists(st.integers(), min_size=3, max_size=4))
MUTATIONS = st.one_of(
    st.tuples(st.sampled_from(KEYS), WRONG_TYPES),
    st.tuples(
        st.sampled_from(["epochs", "batch_size", "accumulate", "optimizer.lr", "save_minutes", "seed"]),
        st.one_of(st.integers(max_value=-1), st.just(float("nan"))),
    ),
    st.tuples(st.from_regex(r"\A[a-z]{3,9}_[a-z]{2}\Z").filter(lambda key: key not in KEYS), st.integers()),
    st.tuples(st.sampled_from(["data.source", "init_from", "model"]), st.just("/absent/model")),
    st.sampled_from(
        [
            ("augment.crop_scale", [0.0, 1.0]),
            ("warmup_epochs", 1),
            ("freeze", 2),
            ("batch_size", 100_000),
            ("data.train_images", 100_000),
            ("data.stored_size", 20),
            ("model_args", {"num_classes": 3, "in_chans": 1}),
            ("model_args", {"no_such_argument": 1}),
            ("model_args", {"alpha": 0.0, "in_chans": 1}),
            ("optimizer.options", {"no_such_option": 1}),
            ("data.pipeline", "streaming"),
            ("clip", {"mode": "norm"}),
        ]
    ),
)


def broken(mutation):
    key, value = mutation
    values = yaml.safe_load(yaml.safe_dump(SOUND))
    target = values
    *path, last = key.split(".")
    for part in path:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[last] = value
    return values


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutation=MUTATIONS)
def test_a_hundred_broken_recipes_each_give_one_line_and_code_2(mutation, command, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(broken(mutation)))
    result = command(train.main, "--recipe", path, "--output", tmp_path / "run", "--overwrite", "--device", "cpu")
    lines = result.err.strip().splitlines()
    assert result.code == 2, (mutation, result)
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    assert "Traceback" not in result.err


def test_validate_names_its_source():
    with pytest.raises(UserError, match="somewhere: unknown key"):
        validate({"no_such": 1}, "somewhere")


@pytest.mark.parametrize("name", ["1e5", "0x1F", "12:30:00", "null", "yes", "2026-01-01", "a #1", ".5", "1_000"])
def test_text_comes_back_as_text(name, tmp_path):
    recipe = load_recipe("digits", [f"data.source='{name}'", f"model_args={{a: '{name}'}}"])
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe and again.data.source == again.model_args["a"] == name
