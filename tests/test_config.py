"""Recipes: what they read, what they refuse and in which words."""

import pytest

from mmbridge.config import Part, Recipe, find_recipe, recipe_names
from mmbridge.errors import ConfigError

RECIPE = """\
schema: 1
stage: decoder_alignment
bridge:
  backbone: {name: causal_lm, source: somewhere}
  inputs:
    image: {name: encoded, encoder: {name: imagebind, modality: image}, projection: {name: grouping, num_tokens: 4}}
  outputs:
    image: {name: signals, projection: {name: signal_transformer}, decoder: {name: stable_diffusion, source: x}}
train: ["outputs.*"]
losses: {text: 1, image.alignment: 0.5}
data: {name: synthetic, samples: 100}
optimizer: {lr: 4e-4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_recipe_is_read_as_typed_sections(file):
    recipe = Recipe.load(file)
    image = recipe.bridge.inputs["image"]
    assert image.arguments["projection"] == Part("grouping", {"num_tokens": 4})
    assert image.arguments["encoder"].name == "imagebind"
    assert recipe.losses == {"text": 1.0, "image.alignment": 0.5}
    assert isinstance(recipe.losses["text"], float)
    assert recipe.optimizer.lr == 4e-4  # PyYAML alone would read a string
    assert (recipe.name, recipe.parent, recipe.run.batch_size) == ("my", None, 8)


def test_saved_recipe_loads_as_the_same_recipe(file, tmp_path):
    recipe = Recipe.load(file, ["optimizer.betas=[0.9, 0.95]", "parent=runs/first"])
    recipe.save(tmp_path / "copy.yaml")
    again = Recipe.load(tmp_path / "copy.yaml")
    assert again == recipe
    assert again.to_dict() == recipe.to_dict() == Recipe.from_dict(recipe.to_dict()).to_dict()
    assert again.optimizer.betas == (0.9, 0.95)
    assert "name: my" not in recipe.to_yaml()


def test_recipe_that_cannot_be_saved_leaves_nothing_behind(file, tmp_path):
    with pytest.raises(ConfigError, match=r"can't be written .* give a folder that exists"):
        Recipe.load(file).save(tmp_path / "no" / "such" / "folder.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_shipped_recipes_load_by_name():
    assert "tiny/encoder_alignment" in recipe_names()
    assert recipe_names("tiny/*") == [name for name in recipe_names() if name.startswith("tiny/")]
    assert Recipe.load("tiny/encoder_alignment").name == "tiny/encoder_alignment"
    assert find_recipe("tiny/encoder_alignment").name == "encoder_alignment.yaml"
    with pytest.raises(ConfigError, match="neither a file nor a shipped recipe; did you mean 'tiny/encoder_alignment'"):
        Recipe.load("tiny/encoder_aligment")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("run.steps=10", lambda recipe: recipe.run.steps, 10),
        ("optimizer.lr=1e3", lambda recipe: recipe.optimizer.lr, 1000.0),
        ("optimizer.clip=null", lambda recipe: recipe.optimizer.clip, None),
        ("losses.image.alignment=2", lambda recipe: recipe.losses["image.alignment"], 2.0),
        ("losses.image.denoising=1", lambda recipe: recipe.losses["image.denoising"], 1.0),
        ("train=[inputs.*.projection]", lambda recipe: recipe.train, ["inputs.*.projection"]),
        (
            "bridge.inputs.image.projection.num_tokens=8",
            lambda recipe: recipe.bridge.inputs["image"].arguments["projection"].arguments,
            {"num_tokens": 8},
        ),
        (
            "bridge.inputs.image.projection={name: linear}",
            lambda recipe: recipe.bridge.inputs["image"].arguments["projection"],
            Part("linear"),
        ),
        ("bridge.backbone.template=plain", lambda recipe: recipe.bridge.backbone.arguments["template"], "plain"),
        ("data.path=my.jsonl", lambda recipe: recipe.data.to_dict(), {"path": "my.jsonl"}),
    ],
)
def test_overrides_set_values_by_dotted_path(file, override, read, value):
    assert read(Recipe.load(file, [override])) == value


def test_overriding_the_data_path_switches_from_the_world_to_the_file_in_any_order(file):
    overrides = ["data.root=photos", "data.path=my.jsonl", "data.validation=held.jsonl"]
    wanted = {"path": "my.jsonl", "validation": "held.jsonl", "root": "photos"}
    for order in (overrides, overrides[::-1]):
        recipe = Recipe.load(file, order)
        assert recipe.data.name is None
        assert recipe.data.to_dict() == wanted


def test_overriding_the_data_name_switches_back_to_the_world(file):
    file.write_text(RECIPE.replace("{name: synthetic, samples: 100}", "{path: my.jsonl, root: photos}"))
    assert Recipe.load(file, ["data.name=synthetic"]).data.to_dict() == {"name": "synthetic"}


def test_sections_that_share_an_anchor_are_overridden_one_by_one(file):
    audio = "    audio: {name: encoded, encoder: {name: imagebind, modality: audio}, projection: *anchor}\n"
    text = RECIPE.replace("{name: grouping,", "&anchor {name: grouping,").replace("  outputs:", audio + "  outputs:")
    file.write_text(text)
    recipe = Recipe.load(file, ["bridge.inputs.image.projection.num_tokens=8"])
    tokens = {name: part.arguments["projection"].arguments["num_tokens"] for name, part in recipe.bridge.inputs.items()}
    assert tokens == {"image": 8, "audio": 4}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stpes=1", r"run\.stpes is not a known key; did you mean 'steps'\?"),
        ("rnu.steps=1", r"rnu is not a known key; did you mean 'run'\?"),
        ("run.steps=ten", r"run\.steps is 'ten', but must be a whole number"),
        ("run.steps=1.5", r"run\.steps is 1\.5, but must be a whole number"),
        ("run.steps=true", r"run\.steps is True, but must be a whole number"),
        ("run.steps=0", r"run\.steps is 0, but must be at least 1"),
        ("run.precision=fp16", r"run\.precision is 'fp16', which is not accepted; known: 16-mixed"),
        ("run.checkpoint_activations=1", r"checkpoint_activations is 1, but must be true or false"),
        ("run=5", r"run is 5, but must be a section of 'key: value' pairs"),
        ("run={on: 5}", r"run has the key True, which YAML reads as no word; put it in quotes"),
        ("optimizer.lr=high", r"optimizer\.lr is 'high', but must be a number"),
        ("optimizer.lr=.nan", r"optimizer\.lr is nan, but must be a number"),
        ("optimizer.warmup=2", r"optimizer\.warmup is 2\.0, but must be at most 1"),
        ("optimizer.betas=[0.9, 2]", r"optimizer\.betas\[1\] is 2\.0, but must be at most 1"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas is \[0\.9\], but must be a list of 2"),
        ("optimizer.schedule=linaer", r"optimizer\.schedule is 'linaer', which is not accepted; did you mean 'linear'"),
        ("train=outputs.*", r"train is 'outputs\.\*', but must be a list"),
        ("losses.text=much", r"losses\.text is 'much', but must be a number"),
        ("schema=2", r"schema is 2, which is not accepted; known: 1"),
        ("schema=true", r"schema is True, which is not accepted"),
        ("stage=encoder_aligment", r"stage is 'encoder_aligment', which is not accepted; did you mean 'encoder_align"),
        ("parent=3", r"parent is 3, but must be a string"),
        ("bridge.inputs.image.projection=grouping", r"inputs\.image\.projection is 'grouping', but must be a section"),
        ("bridge.backbone={source: x}", r"bridge\.backbone needs a 'name'"),
        ("bridge.inputs.imgae.projection.num_tokens=1", r"no section 'bridge\.inputs\.imgae'; did you mean 'image'"),
        ("run.steps.more=1", r"override run\.steps\.more: run\.steps is 1000, not a section"),
        ("data.root=x", r"data\.root goes with data\.path, but data\.name is given"),
        ("data={}", r"data needs either 'name' \(synthetic\) or 'path'"),
        ("data={name: synthetic, path: x}", r"data needs either .* not both"),
        ("steps", r"override 'steps' is not of the form key=value, such as run\.steps=10"),
        ("=4", r"override '=4' is not of the form key=value"),
        ("run.seed=[", r"override 'run\.seed=\[':1: not valid YAML"),
    ],
)
def test_wrong_values_are_named_by_their_path(file, override, message):
    file.write_text(RECIPE + "run: {steps: 1000}\n")
    with pytest.raises(ConfigError, match=message):
        Recipe.load(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: 1\n  stage: x\n", r"my\.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("schema: 1\nstage: a\nstage: b\n", r"my\.yaml:3: not valid YAML: 'stage' is given twice"),
        ("schema: 1\nstage: \x07\n", r"my\.yaml: not valid YAML: .*special characters"),
        ("- 1\n", r"my\.yaml holds no 'key: value' pairs; start from a copy made by `mmbridge cp`"),
        ("", r"my\.yaml holds no 'key: value' pairs"),
        (RECIPE.replace("schema: 1\n", ""), r"recipe .*my\.yaml: schema is missing; add it"),
        ("!!python/object/apply:os.getcwd []\n", r"my\.yaml:1: not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe_are_named_with_their_line(file, text, message):
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        Recipe.load(file)


def test_file_that_is_no_text_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"my\.yaml can't be read .* must be a YAML file in UTF-8"):
        Recipe.load(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bridge.backbone.name=casual_lm", r"bridge\.backbone: unknown backbone 'casual_lm'; did you mean 'causal_lm'"),
        (
            "bridge.backbone.sauce=x",
            r"bridge\.backbone: backbone 'causal_lm' has no argument 'sauce'; did you mean 'so",
        ),
        ("bridge.backbone.lora={rnak: 3}", r"bridge\.backbone\.lora\.rnak is not a known key; did you mean 'rank'"),
        ("bridge.backbone.lora={rank: big}", r"bridge\.backbone\.lora\.rank is 'big', but must be a whole number"),
        (
            "bridge.inputs.image.encoder.name=imagebnd",
            r"bridge\.inputs\.image\.encoder: unknown encoder 'imagebnd'; did you mean 'imagebind'",
        ),
        (
            "bridge.inputs.image.projection.nun_tokens=3",
            r"inputs\.image\.projection: projection 'grouping' has no argument 'nun_tokens'; did you mean 'num_tokens'",
        ),
        (
            "bridge.inputs.image.projection.num_tokens=x",
            r"bridge\.inputs\.image\.projection\.num_tokens is 'x', but must be a whole number",
        ),
        (
            "bridge.outputs.image.mode=shouted",
            r"bridge\.outputs\.image\.mode is 'shouted', which is not accepted",
        ),
        (
            "bridge.inputs={image: {name: encoded}}",
            r"bridge\.inputs\.image: input 'encoded' needs the argument 'encoder'",
        ),
        ("bridge.inputs={photo: {name: encoded}}", r"bridge\.inputs\.photo is not a known medium"),
        ("train=[]", r"train is empty, so nothing would be trained"),
        ("train=[outputs.*.rosw]", r"'outputs\.\*\.rosw', which matches no part of this bridge; did you mean .*rows"),
        ("train=[backbone.lora]", r"train has 'backbone\.lora', which matches no part"),
        ("losses.image.alignmnet=1", r"losses\.image\.alignmnet is no loss .*; did you mean 'image\.alignment'"),
        ("losses.audio.alignment=1", r"losses\.audio\.alignment is no loss"),
        ("losses.image.balance=1", r"losses\.image\.balance is no loss of this bridge"),
        ("losses.text=-1", r"losses\.text is -1\.0, but a weight must be at least 0"),
        ("losses={text: 0}", r"losses has no weight above 0, so nothing would be learned"),
    ],
)
def test_validate_asks_the_registries(file, override, message):
    recipe = Recipe.load(file, [override])
    with pytest.raises(ConfigError, match=message):
        recipe.validate()


def test_parts_that_can_train_follow_from_the_bridge(file):
    recipe = Recipe.load(file, ["bridge.backbone.lora={rank: 4}", "train=[backbone.*, outputs.*.rows]"])
    recipe.validate()
    assert recipe.bridge.part_names() == [
        "inputs.image.projection", "outputs.image.projection", "outputs.image.rows", "backbone.lora",
    ]  # fmt: skip
    assert recipe.bridge.loss_names() == ["text", "image.alignment", "image.denoising"]
    whole = Recipe.load(file, ["bridge.backbone.trainable=true"])
    assert whole.bridge.part_names()[-1] == "backbone.weights"
    mixed = Recipe.load(file, ["bridge.inputs.image.projection={name: mixture_of_experts}", "losses.image.balance=0.1"])
    mixed.validate()
    assert mixed.bridge.loss_names() == ["text", "image.alignment", "image.denoising", "image.balance"]
    tagged = Recipe.load(file, ["bridge.inputs.image.tags=true"])
    assert tagged.bridge.part_names()[:2] == ["inputs.image.projection", "inputs.image.tags"]
