"""Checkpoints that are not what was written: noticed, named, and passed over for the newest that is sound."""

import copy
import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from torch import nn
from training_toy import ToyTask, config, new_run, same, state_of

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import newest_checkpoint, read_checkpoint, write_checkpoint
from latentgnn.training.commands import trained_weights
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import TrainingStopped


def content(step: int = 4, **changes: Any) -> dict[str, Any]:
    record = {"step": step, "config": {"task": "toy"}, "course": {"training.steps": 9}}
    whole = {
        "latentgnn": {**record, **changes.pop("latentgnn", {})},
        "state_dict": {"weight": torch.arange(6.0).reshape(2, 3)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]},
    }
    return {**whole, **changes}


def test_any_zip_tool_reads_it_and_its_comment_is_the_digest_of_what_is_before(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.ckpt", content())
    data = (tmp_path / "a.ckpt").read_bytes()
    with ZipFile(tmp_path / "a.ckpt") as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(data[: -len(archive.comment)]).hexdigest().encode()
    assert same(torch.load(tmp_path / "a.ckpt", weights_only=True), content())
    assert read_checkpoint(tmp_path / "a.ckpt").step == 4


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, content())
    whole = path.read_bytes()
    draw = random.Random(0)
    # Anywhere, and all of the end, where the digest and the archive's own lengths are.
    for bit in [*draw.sample(range(8 * len(whole)), 300), *range(8 * (len(whole) - 93), 8 * len(whole))]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"a.ckpt is damaged \("):
            read_checkpoint(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, content())
    whole = path.read_bytes()
    for length in [0, 1, 21, 22, *range(50, len(whole), 97), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="it is empty" if not length else r"a.ckpt is damaged \("):
            read_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(path)


def test_without_a_digest_the_archives_checksums_count(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(content(), path)
    assert read_checkpoint(path).step == 4
    whole = path.read_bytes()
    place = whole.index(torch.arange(6.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    assert not same(torch.load(path, weights_only=True)["state_dict"], content()["state_dict"])
    with pytest.raises(UserError, match=r"damaged \(the checksum of a/data/0"):
        read_checkpoint(path)


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


def doubled(times: int) -> Any:
    """A list of 2 ** times numbers that takes hardly any memory."""
    value: list[Any] = [1]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(3), "expected a mapping, got Tensor"),
        ({"weights": torch.zeros(2)}, "it has no latentgnn and no state_dict and no optimizer"),
        (content(optimizer=None), "it has no optimizer"),
        (content(state_dict=[1]), "it has no state_dict"),
        (content(step=10**9), "it says step 1000000000 of 9"),
        (content(latentgnn={"step": -1}), "it says step -1"),
        (content(latentgnn={"step": "4"}), "it says step '4'"),
        (content(latentgnn={"step": True}), "it says step True"),
        (content(latentgnn={"step": torch.tensor(4)}), r"it says step tensor\(4\)"),
        (content(latentgnn={"config": "text"}), "its config is str, expected a mapping"),
        (content(latentgnn={"config": {"a": torch.ones(1)}}), "expected plain data, got Tensor"),
        (content(latentgnn={"config": {1.5: 2}}), "expected names or numbers as keys"),
        (content(latentgnn={"config": {"a": 2**70}}), "more than 64 bits"),
        (content(latentgnn={"course": nested(50)}), "nested too deeply"),
        (content(latentgnn={"course": {"a": doubled(25)}}), "more than 1,000,000 values"),
        (content(latentgnn={"data": [1]}), "the data fingerprint has an unexpected structure"),
        (
            content(latentgnn={"data": {"training set": {"names": "[]"}}}),
            "the data fingerprint has an unexpected structure",
        ),
        (content(precision=3), "its precision is int"),
        (content(state_dict={"weight": 3.0}), "its weight 'weight' is float, expected a tensor"),
        (content(state_dict={"weight": torch.zeros(1).expand(10**12)}), "no memory for its 1000000000000 values"),
        (content(state_dict={"weight": torch.zeros(2, 2).to_sparse()}), "has no memory for its 4 values"),
        (content(state_dict={"weight": torch.zeros(2, device="meta")}), "has no memory for its 2 values"),
        (content(state_dict={"weight": torch.tensor([1.0, float("nan")])}), "infinite or not numbers: weight"),
        (
            content(optimizer={"state": {0: {"momentum_buffer": torch.tensor(float("inf"))}}}),
            "infinite or not numbers: state.0.momentum_buffer",
        ),
    ],
)
def test_fields_of_other_types_are_told_in_a_line(tmp_path: Path, made: Any, message: str) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(made, path)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def packed(path: Path) -> None:
    torch.save(content(), path)
    with ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)


def old_format(path: Path) -> None:
    torch.save(content(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (packed, "it is compressed, and checkpoints never are"),
        (old_format, "cut short, or is something else"),
        (lambda path: path.write_text("text"), "cut short, or is something else"),
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            r"a checkpoint \(it holds more than tensors and plain data\)",
        ),
        (lambda path: path.mkdir(), "holds no saved model: it has no config.json and no model.safetensors"),
    ],
)
def test_other_files_are_told_in_a_line(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "a.ckpt"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, content(3))
    bad = {"running_var": torch.tensor([1.0, float("inf")]), "weight": torch.ones(2)}
    with pytest.raises(UserError, match=r"after step 4, .*: running_var\. The last checkpoint is as it was"):
        write_checkpoint(path, content(state_dict=bad))
    state = {"state": {1: {"exp_avg": torch.tensor(float("nan"))}}, "param_groups": []}
    with pytest.raises(UserError, match=r"state\.1\.exp_avg"):
        write_checkpoint(path, content(optimizer=state))
    assert read_checkpoint(path).step == 3
    assert list(tmp_path.iterdir()) == [path]


def test_the_one_before_is_kept_also_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps() -> dict[str, int]:
        return {path.name: read_checkpoint(path).step for path in tmp_path.iterdir()}

    write_checkpoint(tmp_path / "last.ckpt", content(1))
    write_checkpoint(tmp_path / "best.ckpt", content(1))
    assert steps() == {"last.ckpt": 1, "best.ckpt": 1}
    write_checkpoint(tmp_path / "last.ckpt", content(2))
    write_checkpoint(tmp_path / "best.ckpt", content(2))
    assert steps() == {"last.ckpt": 2, "previous.ckpt": 1, "best.ckpt": 2}

    def refuse(source: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_checkpoint(tmp_path / "last.ckpt", content(3))
    assert steps() == {"last.ckpt": 3, "previous.ckpt": 2, "best.ckpt": 2}


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_newest_that_is_sound(tmp_path: Path) -> None:
    last, previous, best = (tmp_path / f"{name}.ckpt" for name in ("last", "previous", "best"))
    assert newest_checkpoint(tmp_path) is None
    for path, step in ((previous, 4), (best, 6), (last, 8)):
        write_checkpoint(path, content(step))

    def newest() -> tuple[str, int, list[str]]:
        found = newest_checkpoint(tmp_path)
        assert found is not None
        return found.path.name, found.step, [path.name for path in found.lost]

    assert newest() == ("last.ckpt", 8, [])
    spoil(last)
    assert newest() == ("best.ckpt", 6, ["last.ckpt"])
    spoil(best)
    assert newest() == ("previous.ckpt", 4, ["last.ckpt", "best.ckpt"])
    with pytest.raises(UserError, match=r"digest differs.*; sound beside it: .*previous.ckpt \(step 4\)$"):
        read_checkpoint(last)
    spoil(previous)
    with pytest.raises(UserError, match=r"last.ckpt is damaged .*; no checkpoint is sound: start a new run"):
        newest_checkpoint(tmp_path)


def stopped_run(path: Path) -> RunFolder:
    """A run that was stopped after step 8, with checkpoints at 8 (last and best), and 6."""
    run = new_run(path)

    def stop(call: int) -> None:
        if call == 17:
            raise KeyboardInterrupt

    task = ToyTask(on_losses=stop)
    with pytest.raises(TrainingStopped):
        fit(task, config(), run)
    return run


def test_resume_goes_back_to_the_newest_sound_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = new_run(tmp_path / "whole")
    metrics = fit(ToyTask(), config(), whole)
    for lost, kept, step in ((["last"], "previous", 6), (["last", "previous"], "best", 4)):
        run = stopped_run(tmp_path / kept)
        assert [read_checkpoint(run.checkpoint(name)).step for name in ("last", "previous", "best")] == [8, 6, 4]
        for name in lost:
            spoil(run.checkpoint(name))  # type: ignore[arg-type]
        capsys.readouterr()
        assert fit(ToyTask(), config(), run, resume=True) == metrics
        said = capsys.readouterr().out.splitlines()
        expected = (
            f"{run.checkpoint('last')} is damaged (its digest differs from its content's); going on from "
            f"{run.checkpoint(kept)}, step {step}"  # type: ignore[arg-type]
        )
        assert said[0] == expected
        assert f"continuing after step {step} of 9" in said
        assert expected in run.log.read_text()
        assert same(state_of(run), state_of(whole))
        assert [record["step"] for record in run.validations()] == [4, 8, 9]
        assert (run.checkpoints / "last.ckpt.damaged").is_file()
        assert read_checkpoint(run.checkpoint("previous")).step < 9


def test_evaluation_refuses_a_damaged_checkpoint_and_names_a_sound_one(tmp_path: Path) -> None:
    run = stopped_run(tmp_path)
    assert trained_weights(run.path).step == 4
    spoil(run.checkpoint("best"))
    with pytest.raises(UserError, match=r"best.ckpt is damaged .*; sound beside it: .*last.ckpt \(step 8\), "):
        trained_weights(run.path)


def test_an_optimizer_of_another_model_is_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = copy.deepcopy(optimizer.state_dict())

    def load(**changes: Any) -> None:
        fresh = torch.optim.SGD(nn.Linear(3, 2).parameters(), momentum=0.9, lr=0.1)
        write_checkpoint(tmp_path / "a.ckpt", content(optimizer={**whole, **changes}))
        read_checkpoint(tmp_path / "a.ckpt").load_optimizer_into(fresh)
        assert same(fresh.state_dict()["state"], whole["state"])

    load()
    buffers = {0: {"momentum_buffer": torch.ones(4)}}
    for changes in ({"state": buffers}, {"param_groups": []}, {"param_groups": [{}]}, {"state": {0: 3}}):
        with pytest.raises(UserError, match="does not fit the optimizer"):
            load(**changes)
