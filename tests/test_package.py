"""The public names, and what importing them costs."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import latentgnn
from latentgnn.errors import UserError, require
from latentgnn.files.writing import write_bytes, write_json


def test_the_public_names() -> None:
    assert latentgnn.__all__ == [
        "Chunk",
        "FrozenBatchNorm",
        "LatentGNN",
        "LatentGNNConfig",
        "LatentSums",
        "PackedLatentGNN",
        "backward_chunk",
        "capture",
        "gather_chunks",
        "insert",
        "inspection",
        "load_published",
        "load_run",
        "node_mask",
        "norms",
        "paths",
        "published_state_dict",
        "reference",
        "remove",
        "report",
        "scatter_chunk",
        "shard_nodes",
    ]
    modules = {name for name in latentgnn.__all__ if isinstance(getattr(latentgnn, name), ModuleType)}
    assert modules == {"inspection", "norms", "paths", "reference"}
    assert all(callable(getattr(latentgnn, name)) for name in set(latentgnn.__all__) - modules)
    assert set(latentgnn.__all__) < set(dir(latentgnn))
    with pytest.raises(AttributeError, match="no attribute 'LatentGnn'"):
        latentgnn.LatentGnn  # noqa: B018


def test_the_core_imports_nothing_heavier_than_torch() -> None:
    program = (
        "import sys, latentgnn; [getattr(latentgnn, name) for name in latentgnn.__all__];"
        "import latentgnn.reference, latentgnn.inspection;"
        "extras = {'torchvision', 'timm', 'lightning', 'matplotlib', 'PIL', 'yaml', 'rich'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_modules_need_no_import_of_their_own() -> None:
    program = (
        "import sys, latentgnn; assert 'torch' not in sys.modules;"
        "found = latentgnn.reference.forward, latentgnn.norms.group_norm, latentgnn.paths.memory;"
        "print(*(function.__name__ for function in found))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["forward", "group_norm", "memory"]


def test_a_missing_extra_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'no_such_package'.*pip install 'latentgnn\[train\]'"):
        require("no_such_package", extra="train")
    assert require("json", extra="train").__name__ == "json"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "result.json"
    write_json(target, {"a": 1})

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(target, b"half")
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in target.parent.iterdir()] == ["result.json"]


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(latentgnn.__path__, "latentgnn.")]


@pytest.mark.small_inputs
@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    context = {"torch": importlib.import_module("torch"), "latentgnn": latentgnn, **vars(module)}
    failures, _ = doctest.testmod(module, extraglobs=context, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0
