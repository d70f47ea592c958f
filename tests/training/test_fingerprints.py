"""Data that changed between stop and resume are noticed and named; the same data elsewhere are the same."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toy import ToyTask, config, new_run

from latentgnn.errors import UserError
from latentgnn.training.checkpoints import read_checkpoint
from latentgnn.training.fingerprint import Fingerprint, Record, changes
from latentgnn.training.loop import fit
from latentgnn.training.runs import RunFolder
from latentgnn.training.stopping import TrainingStopped


def make_files(root: Path, count: int = 5) -> Path:
    root.mkdir()
    for index in range(count):
        (root / f"{index}.png").write_bytes(bytes([index]) * (10 + index))
    return root


def fingerprint_of(root: Path, names: str = "01234", labels: dict[str, Any] | None = None) -> Fingerprint:
    records = [
        Record(name=f"{name}.png", content=[name, (labels or {}).get(name, 0)], files=[root / f"{name}.png"])
        for name in names
    ]
    return Fingerprint.of(root, records, totals={"points of wall": 10 * len(names)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_files(tmp_path / "set")


def test_the_same(root: Path) -> None:
    before = fingerprint_of(root)
    assert changes(before, fingerprint_of(root)) == []
    (root.parent / "link").symlink_to(root)
    assert changes(before, fingerprint_of(root.parent / "link")) == []


def test_records(root: Path) -> None:
    before = fingerprint_of(root)
    assert changes(before, fingerprint_of(root, "024")) == [
        "2 removed (first 1.png)",
        "points of wall: was 50, is 30",
    ]
    assert changes(fingerprint_of(root, "0234"), before) == ["1 added (1.png)", "points of wall: was 40, is 50"]
    assert changes(before, fingerprint_of(root, "01243")) == ["the order is another"]
    assert changes(before, fingerprint_of(root, labels={"3": [1, 2]})) == ["1 with other content (3.png)"]
    # A name that occurs twice is two records.
    assert changes(fingerprint_of(root, "00"), fingerprint_of(root, "0"))[0] == "1 removed (0.png)"
    assert changes(fingerprint_of(root, "00"), fingerprint_of(root, "00")) == []


def test_files(root: Path) -> None:
    before = fingerprint_of(root)
    (root / "1.png").write_bytes(b"1" * 12)
    status = (root / "2.png").stat()
    (root / "2.png").write_bytes(b"9" * 12)
    os.utime(root / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (root / "4.png").unlink()
    assert changes(before, fingerprint_of(root)) == [
        "2 with files of another size (first 1.png)",
        "1 with files that were written since (2.png)",
    ]


def test_a_copy_elsewhere_has_times_of_its_own(root: Path) -> None:
    before = fingerprint_of(root)
    copy = Path(shutil.copytree(root, root.parent / "copy", copy_function=shutil.copyfile))
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    assert changes(before, fingerprint_of(copy)) == []
    (copy / "0.png").write_bytes(b"longer than before")
    assert changes(before, fingerprint_of(copy)) == ["1 with files of another size (0.png)"]
    # In the old place, all is new, and from outside it may be anything.
    for file in root.iterdir():
        os.utime(file, (0, 0))
    assert changes(before, fingerprint_of(root)) == ["all 5 with files that were written since (first 0.png)"]
    made = Fingerprint.of(root, [Record(name="0.png", files=[root / "0.png"])], times=False)
    os.utime(root / "0.png", (9, 9))
    again = Fingerprint.of(root, [Record(name="0.png", files=[root / "0.png"])], times=False)
    assert changes(made, again) == []


def test_it_is_kept_in_checkpoints(root: Path, tmp_path: Path) -> None:
    before = fingerprint_of(root, labels={"1": [0.5, None, {"a": "ü"}]})
    torch.save(before.to_plain(), tmp_path / "kept")
    after = Fingerprint.from_plain(torch.load(tmp_path / "kept", weights_only=True))
    assert changes(before, after) == []
    assert changes(after, fingerprint_of(root)) == ["1 with other content (1.png)"]
    assert after.names == [f"{index}.png" for index in range(5)]


@pytest.mark.parametrize(
    "change",
    [
        {"names": "[1]"},
        {"names": "["},
        {"names": "[" * 100_000},
        {"names": 3},
        {"contents": torch.zeros(4, dtype=torch.int64)},
        {"contents": torch.zeros(5)},
        {"sizes": torch.zeros(5, 1, dtype=torch.int64)},
        {"times": None},
        {"root": 3},
        {"totals": {"a": object()}},
    ],
)
def test_another_shape_is_refused(root: Path, change: dict[str, Any]) -> None:
    plain = fingerprint_of(root).to_plain()
    assert changes(Fingerprint.from_plain(plain), fingerprint_of(root)) == []
    with pytest.raises(ValueError):  # noqa: PT011  what is wrong is the reader's to say
        Fingerprint.from_plain({**plain, **change})


class OnFiles(ToyTask):
    """The toy task, as if its samples came from files."""

    def __init__(self, root: Path, names: str = "01234", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.root, self.names = root, names

    def fingerprints(self) -> dict[str, Fingerprint]:
        return {"training set": fingerprint_of(self.root, self.names)}


@pytest.fixture
def stopped(root: Path, tmp_path: Path) -> RunFolder:
    def stop(call: int) -> None:
        if call == 9:
            raise KeyboardInterrupt

    run = new_run(tmp_path / "run")
    with pytest.raises(TrainingStopped):
        fit(OnFiles(root, on_losses=stop), config(), run)
    return run


def test_a_resumed_run_stops_at_other_data(root: Path, stopped: RunFolder) -> None:
    before = stopped.checkpoint("last").read_bytes()
    os.utime(root / "3.png", (1, 1))
    expected = (
        r"the data are not those that the run was stopped with \(training set: 1 removed \(4\.png\), 1 with files that "
        r"were written since \(3\.png\), points of wall: was 50, is 40\): put them back.*on_changed_data accept"
    )
    with pytest.raises(UserError, match=expected) as caught:
        fit(OnFiles(root, "0123"), config(), stopped, resume=True)
    assert "\n" not in str(caught.value)
    assert stopped.checkpoint("last").read_bytes() == before


def test_a_resumed_run_goes_on_where_the_user_says_so_and_keeps_what_it_goes_on_with(
    root: Path, stopped: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(root / "3.png", (1, 1))
    fit(OnFiles(root), config(on_changed_data="accept"), stopped, resume=True)
    assert "written since (3.png)); they are accepted" in capsys.readouterr().out
    kept = read_checkpoint(stopped.checkpoint("last")).data["training set"]
    assert changes(kept, fingerprint_of(root)) == []


def test_a_resumed_run_finds_its_data_in_another_place(root: Path, stopped: RunFolder) -> None:
    fit(OnFiles(root.rename(root.parent / "moved")), config(), stopped, resume=True)
