"""A layer over a NumPy file, interrupted and continued."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sweep import CONFIGS, NORMS, make_layer

from latentgnn import LatentGNN, PackedLatentGNN
from latentgnn.arrays import apply_to_file, work_folder
from latentgnn.cli import main
from latentgnn.errors import UserError
from latentgnn.training.locks import sole_use

NODES = 1000


@pytest.fixture
def layer() -> PackedLatentGNN:
    layer = PackedLatentGNN(32, reduction=4, norm=NORMS["batch"], **CONFIGS["graph_conv"])
    layer.load_state_dict(make_layer("graph_conv").state_dict())
    return layer.eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    points = np.random.default_rng(0).standard_normal((NODES, 32)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    return tmp_path / "points.npy"


def expected(layer: PackedLatentGNN, source: Path) -> NDArray[Any]:
    with torch.no_grad():
        out: NDArray[Any] = layer(torch.from_numpy(np.load(source)).float()[None])[0].numpy()
    return out


def close(found: Path, wanted: NDArray[Any]) -> bool:
    array = np.load(found, mmap_mode="r")
    return array.dtype == np.float16 and np.allclose(array, wanted, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize("chunk_nodes", [1, 300, 1000, 5000, None])
def test_the_file_is_as_the_layer_on_all_nodes(
    layer: PackedLatentGNN, source: Path, tmp_path: Path, chunk_nodes: int | None
) -> None:
    told: list[tuple[str, int]] = []
    apply_to_file(
        layer, source, tmp_path / "out.npy", chunk_nodes=chunk_nodes, progress=lambda *args: told.append(args)
    )
    assert close(tmp_path / "out.npy", expected(layer, source))
    assert not work_folder(tmp_path / "out.npy").exists()
    assert [done for sweep, done in told if sweep == "gather"][-1] == NODES
    assert told[-1] == ("scatter", NODES)


def test_another_type_may_be_asked_for(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    apply_to_file(layer, source, tmp_path / "out.npy", chunk_nodes=300, dtype="float32")
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    assert np.allclose(found, expected(layer, source), atol=1e-5)


def killed(layer: PackedLatentGNN, source: Path, target: Path, at: tuple[str, int]) -> None:
    """Run in a process of its own that ends by SIGKILL when so much is done."""

    def progress(sweep: str, done: int) -> None:
        if (sweep, done) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        apply_to_file(layer, source, target, chunk_nodes=100, every=0, progress=progress)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_kill_it_goes_on_where_it_was(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    target, told = tmp_path / "out.npy", []
    killed(layer, source, target, ("gather", 400))
    killed(layer, source, target, ("gather", 700))
    killed(layer, source, target, ("scatter", 300))
    assert not target.exists()
    apply_to_file(layer, source, target, every=0, progress=lambda *args: told.append(args))
    assert told == [("scatter", done) for done in range(400, NODES + 1, 100)]
    assert close(target, expected(layer, source))


class Stop(Exception):
    pass


def stopped(layer: PackedLatentGNN, source: Path, target: Path, at: tuple[str, int], **options: Any) -> None:
    def progress(*done: Any) -> None:
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        apply_to_file(layer, source, target, chunk_nodes=100, every=0, progress=progress, **options)


def test_what_a_work_folder_lacks_is_made_again(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    """A process may end between the target's name and the folder's end; whose target is then moved away begins anew."""
    target, other = tmp_path / "out.npy", tmp_path / "other.npy"
    np.save(other, np.load(source)[::-1] + 1)
    for lost in ("output.npy", "state.json"):
        stopped(layer, other, target, ("scatter", 300))
        (work_folder(target) / lost).unlink()
        apply_to_file(layer, source, target)
        assert close(target, expected(layer, source))
        assert not work_folder(target).exists()
        target.unlink()


def test_a_source_that_was_written_to_since_is_refused(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.npy"
    stopped(layer, source, target, ("gather", 400))
    np.save(source, np.load(source) + 1)
    with pytest.raises(
        UserError, match=r"or the file has changed since \(changed\): remove .*\.out\.npy\.work to begin anew"
    ):
        apply_to_file(layer, source, target)


def test_a_source_that_changes_under_way_is_told(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    """Even where the file's time says nothing: each chunk has a checksum."""
    target, status = tmp_path / "out.npy", source.stat()
    stopped(layer, source, target, ("scatter", 200))
    points = np.load(source)
    points[555] += 1
    np.save(source, points)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"rows 500 to 600: this chunk .* has changed since"):
        apply_to_file(layer, source, target)
    assert not target.exists()


def test_other_weights_or_another_type_are_refused(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.npy"
    stopped(layer, source, target, ("gather", 400))
    with pytest.raises(UserError, match="started with output in float16, not float32"):
        apply_to_file(layer, source, target, dtype="float32")
    with torch.no_grad():
        layer.gamma += 1
    with pytest.raises(UserError, match=r"two layers, or other weights of one.*; remove .*\.out\.npy\.work to begin"):
        apply_to_file(layer, source, target)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones((5, 16), np.float32), r"has 16 channels \(N, C\), the layer has 32"),
        (np.ones((2, 5, 32), np.float32), r"holds an array \(2, 5, 32\) of float32: expected \(N, C\)"),
        (np.ones((5, 32), np.int32), r"of int32: expected"),
        (np.ones((5, 32), ">f4"), r"this machine's byte order"),
        (np.ones((0, 32), np.float32), "has no nodes"),
        (np.asfortranarray(np.ones((5, 32), np.float32)), "order='C'"),
        (np.full((5, 32), np.nan, np.float32), "rows 0 to 5 hold numbers that are not finite"),
        (np.full((5, 32), 1e6, np.float32), "too large for float16: ask for float32"),
    ],
)
def test_what_cannot_be_taken_is_told(layer: PackedLatentGNN, tmp_path: Path, array: NDArray[Any], reason: str) -> None:
    np.save(tmp_path / "points.npy", array)
    with pytest.raises(UserError, match=reason):
        apply_to_file(layer, tmp_path / "points.npy", tmp_path / "out.npy", dtype="float16")
    assert not (tmp_path / "out.npy").exists()


def test_a_layer_with_norms_over_nodes_is_refused_by_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PackedLatentGNN(32, num_latents=4, norm="group_norm").save_pretrained(tmp_path / "layer")
    before = sorted(tmp_path.iterdir())
    assert main(["apply", str(tmp_path / "layer"), str(source), "--out", str(tmp_path / "out.npy")]) == 1
    assert "in chunks: GroupNorm may take statistics of all nodes of a sample" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_array_is_told(layer: PackedLatentGNN, source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(UserError, match=r"text.npy is no .npy file"):
        apply_to_file(layer, tmp_path / "text.npy", tmp_path / "out.npy")
    short = tmp_path / "short.npy"
    short.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"short.npy is no .npy file"):
        apply_to_file(layer, short, tmp_path / "out.npy")
    with pytest.raises(UserError, match="is there already"):
        apply_to_file(layer, source, source)


@pytest.mark.parametrize("kind", [LatentGNN, PackedLatentGNN])
def test_the_command(
    layer: PackedLatentGNN, kind: type[LatentGNN], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = kind.from_config(layer.config)
    saved.load_state_dict(layer.state_dict())
    saved.save_pretrained(tmp_path / "layer")
    command = ["apply", str(tmp_path / "layer"), str(source), "--out", str(tmp_path / "new" / "out.npy")]
    assert main([*command, "--chunk", "300"]) == 0
    told = capsys.readouterr().out
    assert "gather 1,000 of 1,000 nodes" in told
    assert f"written to {tmp_path}/new/out.npy" in told
    assert close(tmp_path / "new" / "out.npy", expected(layer, source))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.npy"]
    assert main(command) == 1
    assert "out.npy is there already" in capsys.readouterr().err


def test_the_command_goes_on(
    layer: PackedLatentGNN, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.npy"
    stopped(layer, source, target, ("scatter", 700))
    layer.save_pretrained(tmp_path / "layer")
    command = ["apply", str(tmp_path / "layer" / "model.safetensors"), str(source), "--out", str(target)]
    with sole_use(work_folder(target)):
        assert main(command) == 1
    assert "is in use by" in capsys.readouterr().err
    assert main([*command, "--dtype", "float64"]) == 1
    assert "started with output in float16, not float64" in capsys.readouterr().err
    assert main(command) == 0
    assert "gather" not in capsys.readouterr().out
    assert close(target, expected(layer, source))
    assert not work_folder(target).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--chunk", "0"], 2, "--chunk: expected a number of at least 1; got 0"),
        (["--device", "abacus"], 1, "--device abacus: "),
        ([], 1, "points.npy"),
    ],
)
def test_what_the_command_refuses(
    layer: PackedLatentGNN,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer.save_pretrained(tmp_path / "layer")
    command = ["apply", str(tmp_path / "layer"), str(tmp_path / "points.npy"), "--out", str(tmp_path / "out.npy")]
    assert main([*command, *arguments]) == code
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer"]
