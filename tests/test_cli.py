import importlib
import os
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from latentgnn.cli import main
from latentgnn.configuration.recipes import load_recipe, to_yaml
from latentgnn.configuration.settings import options, parse_config, plain_data
from latentgnn.errors import UserError
from latentgnn.tasks.detection.config import DetectionConfig

COMMANDS = "latentgnn.tasks.detection.commands"
NAMES = ("train", "compare", "evaluate", "predict", "check_data", "report")


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """What the command line asked of the task, in place of the work itself."""

    error: BaseException | None = None
    answer: Any = True


@pytest.fixture
def calls(monkeypatch):
    recorded = Calls()
    stub, commands = ModuleType(COMMANDS), SimpleNamespace()

    def command(name):
        def call(*arguments, **keywords):
            recorded.append((name, arguments, keywords))
            if recorded.error is not None:
                raise recorded.error
            return recorded.answer

        return call

    for name in NAMES:
        setattr(commands, name, command(name))
    stub.COMMANDS = commands
    monkeypatch.setitem(sys.modules, COMMANDS, stub)
    return recorded


def fails(capsys, argv, code):
    """The message of a command that must fail without a traceback."""
    assert main(argv) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err


def test_the_stub_has_the_names_of_the_real_commands():
    real = importlib.import_module(COMMANDS).COMMANDS
    assert all(callable(getattr(real, name)) for name in NAMES)


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from latentgnn.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'torchvision', 'lightning', 'numpy', 'matplotlib', 'yaml'}; "
        "heavy &= set(sys.modules); print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    for arguments in (["--help"], ["train", "--help"], ["--version"], ["predict", "-h"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "heavy: []" in done.stdout


def test_help_names_every_setting_with_its_default(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for name, option in options(DetectionConfig).items():
        assert f"--{name}  " in shown
        assert option.help
    assert re.search(r"--training\.optimizer\.name  sgd or adamw\n +sgd \(with momentum\) or adamw\. \(sgd\)", shown)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"latentgnn \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"no command given"),
        (["trian"], r"no command 'trian'; .*did you mean train\?"),
        (["--frobnicate"], r"unrecognized arguments: --frobnicate"),
        (["train", "--conf", "x"], r"no option --conf; did you mean --config\?"),
        (["train", "--res=x"], r"no option --res\b"),
        (["train", "--train.st", "3"], r"no option --train\.st; did you mean --training\.steps or"),
        (["train", "--training.step", "3"], r"no option --training\.step; did you mean --training\.steps"),
        (["train", "--steps", "3"], r"no option --steps; did you mean --training\.steps\?"),
        (["train", "--model", "{}"], r"no option --model\b"),
        # Only what the task at hand has is suggested, and what another has is told.
        (["train", "--model.neighbours", "3"], r"no option --model\.neighbours(?!.*model\.neighbors)"),
        (["train", "--config", "lidar_small", "--model.neighbours", "3"], r"did you mean --model\.neighbors\b"),
        (["train", "--config=lidar_small", "--model.fpn_chanels", "3"], r"no option --model\.fpn_chanels\b(?!.*fpn)"),
        (
            ["train", "--config", "lidar_small", "--model.fpn_channels", "3"],
            r"--model\.fpn_channels is a setting of detection, and not of pointcloud",
        ),
        (["train", "--loss.lovasz", "1"], r"--loss\.lovasz is a setting of pointcloud, and not of detection"),
        # What was called otherwise.
        (
            ["check-data", "--config", "lidar_small", "--data.block_size", "3"],
            r"no option --data\.block_size any more: it is called --data\.crop_size now",
        ),
        (["train", "-x"], r"unrecognized arguments: -x"),
        (["train", "stray"], r"unrecognized arguments: stray"),
        (["train", "--training.steps"], r"--training\.steps needs a value: a whole number"),
        (["train", "--data.root", "--compare"], r"--data\.root needs a value: text or null"),
        (["train", "--training.steps", "ten"], r"--training\.steps: expected a whole number; got 'ten'"),
        (["train", "--training.precision=fp8"], r"--training\.precision: expected one of 32-true, .*; got 'fp8'"),
        (["train", "--model.blocks", "{C9: 3}"], r"--model\.blocks: .*got the key 'C9'"),
        (["train", "--config", "mask_rcnn_r5"], r"'mask_rcnn_r5'.*did you mean mask_rcnn_r50"),
        (["train", "--config", ""], r"no recipe is named ''"),
        (["train", "--config", "context", "--config=nuclei_small"], r"--config is given twice"),
        (["train", "--training.steps", "3", "--training.steps=3"], r"--training\.steps is given twice"),
        (["train", "--model.blocks", "[&a [*a]]"], r"--model\.blocks: .*an alias refers to a value"),
        (["train", "--out"], r"--out: expected one argument"),
        (["train", "--resume", "x", "--config", "nuclei_small"], r"leave out --config and --out"),
        (["train", "--resume", "x", "--out", "y"], r"leave out --config and --out"),
        (["train", "--compare", "--config", "mask_rcnn_r50"], r"--compare.*model\.blocks is empty"),
        (["evaluate"], r"a run's folder or a checkpoint, or --results"),
        (["evaluate", "--results", "r.json"], r"--results needs --data\.root FOLDER"),
        (["predict"], r"required: RUN_OR_CHECKPOINT, INPUT"),
        (["predict", "run", "a.png", "--score-threshold", "2"], r"--score-threshold: .*from 0 to 1; got 2"),
        (["predict", "run", "a.png", "--score-threshold", "x"], r"--score-threshold: invalid float value: 'x'"),
        (["recipes", "mask_rcnn_r51"], r"'mask_rcnn_r51'.*did you mean"),
        (["recipes", "nuclei_small", "--training.steps", "3"], r"no option --training\.steps"),
    ],
)
def test_usage_errors(capsys, calls, argv, message):
    assert re.search(message, fails(capsys, argv, 2))
    assert calls == []


@pytest.mark.parametrize(
    ("name", "text", "needed", "value"),
    [
        ("data.val_seed", "5", "data.val_fraction", "0.2"),
        ("data.val_groups", "^.", "data.val_fraction", "0.2"),
        ("data.crop.visible", "0.5", "data.crop.size", "64"),
        ("data.crop.on_object", "0.5", "data.crop.size", "64"),
        ("evaluation.tile_overlap", "0.3", "evaluation.tiles", "64"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, capsys, calls, name, text, needed, value):
    assert main(["train", f"--{name}", text]) == 2
    message = f"--{name} {text} has no effect without --{needed}: give both, or leave it out"
    assert message in capsys.readouterr().err
    assert main(["train", f"--{name}", text, f"--{needed}", value]) == 0

    # In a recipe, what is not the default is refused, unless the one that it needs is switched off by hand.
    groups, last = name.split(".")[:-1], name.split(".")[-1]
    content = {last: "^.$" if last == "val_groups" else 1 if last == "val_seed" else 0.25}
    for group in reversed(groups):
        content = {group: content}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"task": "detection", **content}))
    assert main(["train", "--config", str(recipe)]) == 2
    assert f"has no effect without --{needed}" in capsys.readouterr().err
    assert main(["train", "--config", str(recipe), f"--{needed}", "null"]) == 0


def test_a_faulty_file_is_named(tmp_path, capsys, calls):
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n  stesp: 3\n")
    assert "mine.yaml: there is no setting 'training.stesp'; did you mean training.steps" in fails(
        capsys, ["train", "--config", str(path)], 2
    )
    path.write_text("training: {steps: many}\n")
    assert "mine.yaml: training.steps: expected a whole number; got 'many'" in fails(
        capsys, ["train", "--config", str(path)], 2
    )
    path.write_text("# nothing\n")
    assert "mine.yaml: it holds no settings" in fails(capsys, ["train", "--config", str(path)], 2)
    path.write_text("task: knitting\n")
    assert "there is no task 'knitting'; tasks: detection" in fails(capsys, ["train", "--config", str(path)], 2)
    assert calls == []


def test_train_hands_over_the_typed_configuration(tmp_path, calls):
    run = tmp_path / "run"
    argv = ["train", "--config", "mask_rcnn_r50_c4", "--out", str(run), "--training.steps", "100"]
    argv += [
        "--data.root=2017",
        "--model.blocks",
        '{"C3": 7, "C5": [1, 2]}',
        "--training.optimizer.learning_rate",
        "1e-3",
    ]
    assert main(argv) == 0
    [(name, (config, path), keywords)] = calls
    assert (name, path, keywords) == ("train", run, {"name": "mask_rcnn_r50_c4", "resume": False})
    assert isinstance(config, DetectionConfig)
    assert config.training.steps == 100
    assert config.training.optimizer.learning_rate == 1e-3
    assert config.data.root == "2017"
    assert config.model.blocks == {"C3": 7, "C5": (1, 2)}
    assert config.training.schedule.milestones == (60_000, 80_000)


def test_train_without_arguments_takes_the_embedded_recipe(tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    [(name, (config, path), keywords)] = calls
    assert (name, path, keywords) == ("train", None, {"name": "context", "resume": False})
    assert config == parse_config(DetectionConfig, load_recipe("context"))
    assert config.data.root is None


def test_compare(tmp_path, calls):
    assert main(["train", "--compare", "--config", "nuclei_small", "--out", str(tmp_path / "run")]) == 0
    assert [name for name, *_ in calls] == ["compare"]


def written_run(folder, **values):
    config = parse_config(DetectionConfig, values)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(plain_data(config)))
    return config


def test_resume_takes_its_configuration_from_the_run(tmp_path, calls):
    config = written_run(tmp_path / "run", training={"steps": 77}, model={"blocks": {"C3": 5}})
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    [(name, arguments, keywords)] = calls
    assert (name, arguments, keywords) == ("train", (config, tmp_path / "run"), {"name": "run", "resume": True})


def test_resume_of_something_else_fails(tmp_path, capsys, calls):
    assert "is not a run's folder" in fails(capsys, ["train", "--resume", str(tmp_path)], 1)
    assert "is not a run's folder" in fails(capsys, ["predict", str(tmp_path), "a.png"], 1)
    assert "no run folder or checkpoint at" in fails(capsys, ["evaluate", str(tmp_path / "none")], 1)
    (tmp_path / "text.ckpt").write_text("text")
    assert "text.ckpt" in fails(capsys, ["evaluate", str(tmp_path / "text.ckpt")], 1)
    assert calls == []


def test_evaluate_takes_overrides_and_results(tmp_path, calls):
    written_run(tmp_path / "run", evaluation={"sample_pictures": 3})
    argv = ["evaluate", str(tmp_path / "run"), "--evaluation.max_detections", "[1, 10, 300]"]
    assert main([*argv, "--evaluation.per_category", "true"]) == 0
    [(name, (config, source), keywords)] = calls
    assert (name, source) == ("evaluate", tmp_path / "run")
    assert config.evaluation.max_detections == (1, 10, 300)
    assert config.evaluation.per_category
    assert config.evaluation.sample_pictures == 3
    assert keywords == {"results": None, "out": tmp_path / "run" / "evaluation", "overwrite": False}
    assert main([*argv, "--overwrite"]) == 0
    assert calls[1][2]["overwrite"]


def test_evaluate_results_needs_no_run(tmp_path, calls):
    argv = ["evaluate", "--results", "r.json", "--data.root", "here", "--out", str(tmp_path)]
    assert main(argv) == 0
    [(_, (config, source), keywords)] = calls
    assert source is None
    assert config.data.root == "here"
    assert keywords["results"].name == "r.json"


def test_predict(tmp_path, calls):
    written_run(tmp_path / "run")
    argv = ["predict", str(tmp_path / "run"), "a.png", "b*.png", "--no-pictures", "--score-threshold", "0.25"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    [(name, (config, source, inputs), keywords)] = calls
    assert (name, source, inputs) == ("predict", tmp_path / "run", ["a.png", "b*.png"])
    assert config == DetectionConfig()
    expected = {"out": tmp_path / "out", "overwrite": False, "score_threshold": 0.25, "pictures": False}
    assert keywords == expected
    assert main([*argv, "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    assert calls[1][2] == {**expected, "overwrite": True}


def test_check_data_answers_with_its_exit_code(calls):
    splits = {"splits": {"train": {}, "val": {}}}
    calls.answer = {"faultless": True, **splits}
    assert main(["check-data", "--data.root", "x"]) == 0
    calls.answer = {"faultless": False, **splits}
    assert main(["check-data", "--data.root", "x"]) == 1


def test_a_user_error_is_one_paragraph(capsys, calls):
    calls.error = UserError("the data are wrong; mend them")
    assert fails(capsys, ["train"], 1) == "latentgnn: the data are wrong; mend them\n"


def test_an_unexpected_failure_keeps_its_traceback(capsys, calls):
    calls.error = ZeroDivisionError("division by zero")
    assert main(["train"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError: division by zero" in error
    assert "a fault in latentgnn" in error


def test_an_interrupt_is_a_failure_without_a_traceback(capsys, calls):
    calls.error = KeyboardInterrupt()
    assert fails(capsys, ["train"], 1) == "latentgnn: interrupted\n"


def test_recipes_are_listed_with_their_descriptions(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.fullmatch(r"mask_rcnn_r50_c4 +Mask R-CNN, ResNet-50-FPN, a block at C4", line)]
    assert [line for line in lines if line.startswith("context ") and line.endswith("(the default)")]


def test_a_printed_recipe_is_a_configuration_file(tmp_path, capsys, calls):
    assert main(["recipes", "mask_rcnn_r101_c345_group"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["description"].startswith("Mask R-CNN, ResNet-101-FPN")
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 0
    assert main(["train", "--config", "mask_rcnn_r101_c345_group"]) == 0
    (_, (printed, _), _), (_, (original, _), _) = calls
    assert printed == original


def test_the_installed_program(tmp_path):
    program = "import sys; from latentgnn.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, "train", "--confg", "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "latentgnn: there is no option --confg; did you mean --config?\n"


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("yaml", ["recipes"]),
        ("faster_coco_eval", ["check-data", "--data.root", "."]),
        ("lightning", ["check-data", "--data.root", "."]),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, argv):
    program = f"import sys; sys.modules[{module!r}] = None; from latentgnn.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"latentgnn: this needs '{module}[\w.]*', which is not installed: pip install 'latentgnn\[\w+\]'\n",
        done.stderr,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["recipes"], ["--version"]])
def test_output_onto_a_full_disk_is_told(argv):
    program = "import sys; from latentgnn.cli import main; sys.exit(main())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, *argv], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    expected = "standard output: no space left on device: free some space, or write to another place"
    assert (done.returncode, done.stderr) == (1, f"latentgnn: {expected}\n")


def test_an_error_of_the_system_is_told_without_a_traceback(capsys, calls):
    calls.error = PermissionError(13, "Permission denied", "runs/x")
    assert fails(capsys, ["train"], 1) == (
        "latentgnn: runs/x: permission denied: change its permissions or those of the folders above it, or name "
        "another place\n"
    )


def test_output_into_a_closed_pipe_is_no_fault():
    program = "import sys; from latentgnn.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
