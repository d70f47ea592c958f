"""Scans in every format, and what a folder of them says about itself."""

import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from latentgnn.configuration.recipes import load_recipe
from latentgnn.configuration.settings import parse_config
from latentgnn.tasks.pointcloud.check import check_split, load_set
from latentgnn.tasks.pointcloud.config import DataConfig, PointCloudConfig
from latentgnn.tasks.pointcloud.layouts import resolve
from latentgnn.tasks.pointcloud.samples import TrainingCrops
from latentgnn.tasks.pointcloud.scans import RawScan, coordinate_fault, read_scan, write_scan
from latentgnn.tasks.pointcloud.voxels import crops
from tests.fuzzing.child import command, outcome
from tests.fuzzing.strategies import ODD_NUMBERS, damaged, mutated

_RNG = np.random.default_rng(0)
SCAN = RawScan(
    points=_RNG.random((40, 3)) * 4 + [650_000, 6_860_000, 30],
    columns={
        "intensity": _RNG.integers(0, 1000, 40).astype(np.uint16),
        "return_number": np.ones(40, np.uint8),
        "number_of_returns": np.ones(40, np.uint8),
        "color": _RNG.random((40, 3)).astype(np.float32),
    },
    classes=_RNG.integers(1, 3, 40),
)
CONFIG = DataConfig(classes={1: "ground", 2: "building"}, features=("log_intensity", "height"), crop_size=2.0)


def _bytes(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        write_scan(path, SCAN)
        return path.read_bytes()


_ASCII = "\n".join(
    [
        *("ply", "format ascii 1.0", "element vertex 3", "property double x", "property double y", "property double z"),
        *("property float intensity", "property float label", "end_header"),
        *("0 0 0 1 1", "1 2 3 4 2", "2.5 1 1 0 1", ""),
    ]
).encode()
_TABLE = b"//X,Y,Z,Intensity,Classification\n0,0,0,1,1\n1,2,3,4,2\n2.5,1,1,0,1\n"
FILES = {suffix: [_bytes(suffix)] for suffix in (".las", ".laz", ".ply", ".npz", ".xyz", ".csv")}
FILES[".ply"].append(_ASCII)
FILES[".csv"].append(_TABLE)
FILES[".bin"] = [np.array([(0, 0, 0, 1), (1, 2, 3, 4), (2.5, 1, 1, 0)], "<f4").tobytes()]


@st.composite
def _any_npz(draw: st.DrawFn) -> bytes:
    """Sound archives of arrays of any kinds, shapes and values."""
    number = draw(st.integers(0, 4))
    kinds = ("f8", "f4", "f2", "i4", "i8", "u8", "u1", "?", "c16", "U3", "S2", "M8[s]")
    shapes = ((number, 3), (number,), (number, 2), (), (number, 1), (0, 3), (number + 1,))
    arrays = {}
    for name in ("points", "labels", "intensity", "color", "normal", "return_number"):
        if name != "points" and draw(st.booleans()):
            continue
        likely = (number, 3) if name in ("points", "color", "normal") else (number,)
        shape = draw(st.sampled_from((likely,) * 6 + shapes))
        kind = draw(st.sampled_from(("f8",) * 6 + kinds))
        values = draw(st.lists(st.sampled_from(ODD_NUMBERS[:10] + ODD_NUMBERS[13:]), min_size=1, max_size=6))
        with np.errstate(all="ignore"):
            flat = np.array(values, np.float64).astype(np.dtype("i8" if kind.startswith("M") else kind)).astype(kind)
        arrays[name] = np.resize(flat, shape)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@st.composite
def _any_ply(draw: st.DrawFn) -> bytes:
    """Text files whose header and lines say odd things."""
    lines = _ASCII.decode().split("\n")
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.integers(0, len(lines) - 1))
        words = lines[line].split(" ")
        odd = ("", "x", "uchar", "list uchar int", "1e400", "nan", "-1", "1e300", "99999999999999", "0.5", "vertex")
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(odd))
        lines[line] = " ".join(words)
    return "\n".join(lines).encode()


@st.composite
def _any_table(draw: st.DrawFn) -> bytes:
    """Tables whose names and values are odd, too few or too many."""
    lines = _TABLE.decode().split("\n")
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.integers(0, len(lines) - 1))
        words = lines[line].split(",")
        odd = ("", "x", "Red", "label", "1,2", "1e400", "nan", "-1", "1e300", "99999999999999999999", "0.5", "1 2", ";")
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(odd))
        lines[line] = ",".join(words)
    return "\n".join(lines).encode()


def _scans() -> st.SearchStrategy[tuple[str, bytes]]:
    files = [st.tuples(st.just(suffix), damaged(content)) for suffix, content in FILES.items()]
    made = {".npz": _any_npz(), ".ply": _any_ply(), ".csv": _any_table()}
    return st.one_of(*files, *(st.tuples(st.just(suffix), content) for suffix, content in made.items()))


def scans(case: tuple[str, bytes], folder: Path) -> None:
    """What is read has the shapes that it should, and what the check lets pass can be trained on."""
    suffix, content = case
    (folder / "train").mkdir()
    path = folder / "train" / f"a{suffix}"
    path.write_bytes(content)
    if (scan := outcome(read_scan, path)) is not None:
        assert scan.points.dtype == np.float64
        assert scan.points.shape == (len(scan.points), 3)
        assert scan.classes is None or scan.classes.dtype == np.int64
        if coordinate_fault(scan.points) is None and len(scan.points) < 1000:
            for shape in ("column", "sphere"):
                inside = list(crops(scan.points, shape=shape, size=2.0, overlap=0.5))
                assert set(np.concatenate(inside).tolist()) == set(range(len(scan.points)))
    config = resolve(replace(CONFIG, root=str(folder)))
    report = check_split(config, "train")
    if report.faults:
        return
    samples = TrainingCrops(load_set(config, "train"), config, seed=0)
    sample = samples[(0, 0)]
    assert np.isfinite(sample.coordinates.numpy()).all()
    assert np.isfinite(sample.features.numpy()).all()
    assert set(sample.labels.tolist()) <= {-1, 0, 1}


RECIPE = parse_config(PointCloudConfig, load_recipe("lidar_small"))
DATASET: dict[str, Any] = {
    "layout": "scans",
    "train": ["train"],
    "val": "val",
    "classes": {1: "ground", 2: "building"},
    "ignored": [0, 7],
    "features": ["log_intensity", "height"],
}


@st.composite
def _dataset_files(draw: st.DrawFn) -> bytes:
    class Dumper(yaml.SafeDumper):
        """Without aliases for what is there twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    text: str = yaml.dump(draw(mutated(DATASET)), Dumper=Dumper, sort_keys=False)
    return (
        draw(damaged([text.encode("utf-8", "surrogatepass")]))
        if draw(st.integers(0, 3)) == 0
        else text.encode("utf-8", "surrogatepass")
    )


def dataset_files(content: bytes, folder: Path) -> None:
    """A folder is checked with what it says about itself, or refused."""
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / split / f"{split}.npz").write_bytes(FILES[".npz"][0])
    (folder / "dataset.yaml").write_bytes(content)
    code, _ = command("check-data", "--config", "lidar_small", "--data.root", str(folder))
    if code == 0:
        config = resolve(replace(RECIPE.data, root=str(folder)))
        assert config.classes
        assert load_set(config, "train").counts is not None


PROPERTIES = (
    (scans, _scans(), 3.0),
    (dataset_files, _dataset_files(), 1.0),
)
