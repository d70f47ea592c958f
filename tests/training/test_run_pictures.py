from pathlib import Path

import pytest

from latentgnn.errors import UserError
from latentgnn.training.commands import write_pictures
from latentgnn.training.runs import RunFolder


def test_a_runs_pictures_replace_its_own_and_nothing_that_is_read(tmp_path):
    run = RunFolder.create(tmp_path / "run", task="toy")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").write_bytes(b"image")
    for content in (b"first", b"second"):
        write_pictures(run, [(Path("a.png"), content)], reads=[data / "a.png"])
        assert (run.pictures / "a.png").read_bytes() == content
    # The folder of pictures is, by a link, that of the images.
    (run.pictures / "a.png").unlink()
    run.pictures.rmdir()
    run.pictures.symlink_to(data)
    with pytest.raises(UserError, match="which is read"):
        write_pictures(run, [(Path("a.png"), b"third")], reads=[data / "a.png"])
    assert (data / "a.png").read_bytes() == b"image"
