"""Completion in the shells themselves."""

import json
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from latentgnn.cli import COMMANDS, main
from latentgnn.completion import SHELLS
from latentgnn.configuration.recipes import list_recipes

_BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
function=$(complete -p latentgnn | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function latentgnn "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completion")
    paths = {shell: folder / f"completion.{shell}" for shell in SHELLS}
    for shell, path in paths.items():
        with path.open("w") as file, redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return paths


def completed(shell: str, path: Path, words: list[str], folder: Path) -> set[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"needs the shell {shell!r}")
    if shell == "bash":
        command = ["bash", "-c", _BASH, "bash", str(path), *words]
    else:
        command = ["fish", "--no-config", "-c", f"source {path}; complete -C '{' '.join(words)}'"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True, timeout=60)
    return {line.partition("\t")[0] for line in done.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes_commands_options_values_and_recipes(
    shell: str, script: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()

    def found(*words: str) -> set[str]:
        return completed(shell, script[shell], ["latentgnn", *words], tmp_path)

    assert found("") >= set(COMMANDS)
    assert found("tra") == {"train"}
    assert found("train", "--training.optimizer.na") == {"--training.optimizer.name"}
    assert found("train", "--training.optimizer.name", "") == {"sgd", "adamw"}
    assert found("evaluate", "--overw") == {"--overwrite"}
    assert found("recipes", "") >= set(list_recipes())
    assert found("train", "--config", "nuclei_") == {"nuclei_small"}
    assert {name.rstrip("/") for name in found("report", "ru")} == {"runs"}


def test_zsh_reads_the_script(script: dict[str, Path]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("needs the shell 'zsh'")
    done = subprocess.run(["zsh", "-n", str(script["zsh"])], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    text = script["zsh"].read_text()
    assert text.startswith("#compdef latentgnn\n")
    assert all(name in text for name in (*COMMANDS, *list_recipes(), "--training.optimizer.learning_rate"))


def test_recipes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["default"] == "context"
    assert {recipe["name"]: recipe["description"] for recipe in listed["recipes"]} == list_recipes()
    assert main(["recipes", "nuclei_small", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert recipe["task"] == "detection"
    assert recipe["training"]["optimizer"]["name"] == "adamw"
