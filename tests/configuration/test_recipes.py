from pathlib import Path

import pytest

from latentgnn.configuration.recipes import list_recipes, load_recipe, merge, read_recipe, to_yaml
from latentgnn.errors import UserError
from latentgnn.files.reading import read_yaml


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_classes_are_replaced_and_not_merged(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {classes: {1: a, 2: b}, voxel: 1.0}\n")
    (tmp_path / "over.yaml").write_text("extends: base.yaml\ndata: {classes: {2: c}}\n")
    assert load_recipe(tmp_path / "over.yaml") == {"data": {"classes": {2: "c"}, "voxel": 1.0}}


def test_a_chain_is_merged_deeply_and_lists_are_replaced(tmp_path):
    write(tmp_path, "a.yaml", "description: base\nx: {p: 1, q: {r: [1, 2, 3], s: 4}}\ny: 5\n")
    write(tmp_path, "sub/b.yaml", "extends: ../a.yaml\nx: {q: {r: [9]}}\n")
    last = write(tmp_path, "c.yaml", "extends: sub/b.yaml\nx: {p: null}\nz: 7\n")
    assert load_recipe(last) == {"x": {"p": None, "q": {"r": [9], "s": 4}}, "y": 5, "z": 7}


def test_blocks_are_one_value(tmp_path):
    write(tmp_path, "a.yaml", "model: {blocks: {C3: 150, C4: 100}, block: {reduction: 8, norm: none}}\n")
    over = write(tmp_path, "b.yaml", "extends: a.yaml\nmodel: {blocks: {C5: 50}, block: {reduction: 4}}\n")
    assert load_recipe(over) == {"model": {"blocks": {"C5": 50}, "block": {"reduction": 4, "norm": "none"}}}


def test_of_several_parents_the_later_wins_and_the_file_over_all(tmp_path):
    write(tmp_path, "a.yaml", "x: {p: 1, q: 1, r: 1}\n")
    write(tmp_path, "b.yaml", "x: {q: 2, r: 2}\n")
    path = write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\nx: {r: 3}\n")
    assert load_recipe(path) == {"x": {"p": 1, "q": 2, "r": 3}}


def test_a_file_may_extend_a_packaged_recipe(tmp_path):
    path = write(tmp_path, "mine.yaml", "extends: mask_rcnn_r50_c4\ntraining: {steps: 7}\n")
    mine, published = load_recipe(path), load_recipe("mask_rcnn_r50_c4")
    assert mine["training"].pop("steps") == 7
    assert published["training"].pop("steps") == 90_000
    assert mine == published


def test_merge_leaves_its_arguments_alone():
    base, over = {"x": {"p": 1}}, {"x": {"q": 2}}
    assert merge(base, over) == {"x": {"p": 1, "q": 2}}
    assert (base, over) == ({"x": {"p": 1}}, {"x": {"q": 2}})


def test_a_description_is_not_inherited(tmp_path):
    write(tmp_path, "a.yaml", "description: of a\nx: 1\n")
    recipe = read_recipe(write(tmp_path, "b.yaml", "extends: a.yaml\n"))
    assert (recipe.description, recipe.values) == ("", {"x": 1})
    assert read_recipe(tmp_path / "a.yaml").description == "of a"


def test_a_circle_is_refused_with_its_path(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: c.yaml\n")
    start = write(tmp_path, "c.yaml", "extends: b.yaml\n")
    with pytest.raises(UserError, match=r"circle: c\.yaml -> b\.yaml -> c\.yaml"):
        load_recipe(start)
    itself = write(tmp_path, "d.yaml", "extends: d.yaml\n")
    with pytest.raises(UserError, match=r"d\.yaml -> d\.yaml"):
        load_recipe(itself)


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"'mask_rcnn_r50c4'.*did you mean mask_rcnn_r50_c4"):
        load_recipe("mask_rcnn_r50c4")
    path = write(tmp_path, "a.yaml", "extends: mask_rcnn_r10\n")
    with pytest.raises(UserError, match=r"a\.yaml: 'extends'.*'mask_rcnn_r10'.*did you mean mask_rcnn_r101"):
        load_recipe(path)
    with pytest.raises(UserError, match=r"no configuration file missing\.yaml"):
        load_recipe("missing.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 1\ny: [1, 2\nz: 3\n", r"line 3, column 2"),
        ("x: 1\n  y: 2\n", r"line 2, column 4"),
        ("x: 1\ny:\n  p: 1\n  p: 2\n", r"line 4, column 3: 'p' is given twice"),
        ("- 1\n- 2\n", r"expected a mapping of settings, got list"),
        ("x: !!python/object/apply:os.system ['true']\n", r"line 1, column 4"),
        ("extends: 3\n", r"'extends' takes a recipe's name or file"),
        ("extends: [a, 3]\n", r"'extends' takes a recipe's name or file"),
    ],
)
def test_malformed_files_say_where(tmp_path, text, message):
    path = write(tmp_path, "broken.yaml", text)
    with pytest.raises(UserError, match=rf"broken\.yaml.*{message}"):
        load_recipe(path)


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"binary\.yaml: line 1, column 1: not UTF-8"):
        load_recipe(path)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    path = write(tmp_path, "a.yaml", "a: 1e-4\nb: 2.5E3\nc: -3e2\nd: 1e-4x\ne: 7\n")
    assert read_yaml(path) == {"a": 1e-4, "b": 2500.0, "c": -300.0, "d": "1e-4x", "e": 7}


def test_an_empty_file_says_nothing(tmp_path):
    assert load_recipe(write(tmp_path, "empty.yaml", "# nothing\n")) == {}


def test_yaml_reads_back(tmp_path):
    values = {"b": {"x": [1, 2.5, None], "y": True}, "a": "1e-4", "c": {}}
    path = write(tmp_path, "out.yaml", to_yaml(values, description="one: two # three"))
    assert read_yaml(path) == {"description": "one: two # three", **values}
    assert list(read_yaml(path)) == ["description", "b", "a", "c"]


def test_parts_of_recipes_are_not_listed():
    names = list_recipes()
    assert "mask_rcnn_r50_c345" in names
    assert not [name for name in names if name.startswith("_")]
    assert all(description and "\n" not in description for description in names.values())


def test_a_file_that_many_extend_is_read_once(tmp_path):
    write(tmp_path, "r0.yaml", "x: {r0: 1}\n")
    for level in range(1, 16):
        write(tmp_path, f"r{level}.yaml", f"extends: [{', '.join([f'r{level - 1}.yaml'] * 8)}]\nx: {{r{level}: 1}}\n")
    assert load_recipe(tmp_path / "r15.yaml") == {"x": {f"r{level}": 1 for level in range(16)}}
    last = write(tmp_path, "r16.yaml", "extends: r15.yaml\n")
    with pytest.raises(UserError, match="more than 16 recipes extend one another"):
        load_recipe(last)


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_say_which_batch_their_rate_is_meant_for(name):
    training = load_recipe(name)["training"]
    assert training["optimizer"]["reference_batch"] == training["batch_size"]
