"""Scans as text, as other programs write them."""

from pathlib import Path

import numpy as np
import pytest

from latentgnn.errors import UserError
from latentgnn.tasks.pointcloud.check import check_split
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.prediction import expand_scans
from latentgnn.tasks.pointcloud.scans import RawScan, read_scan, write_classes, write_scan

ROWS = [(770600.125, 6277500.25, 20.5, 255, 0, 51, 7, 2), (770601.0, 6277501.0, 21.0, 0, 102, 0, 9, 6)]
NUMBERS = "\n".join(" ".join(map(str, row)) for row in ROWS)


def write(path: Path, head: str, text: str = NUMBERS, delimiter: str = " ") -> Path:
    path.write_text(f"{head}\n{text.replace(' ', delimiter)}\n")
    return path


@pytest.mark.parametrize(
    ("name", "head", "delimiter"),
    [
        ("cloudcompare.xyz", "//X Y Z R G B Intensity Classification", " "),
        (
            "cloudcompare.csv",
            "//X,Y,Z,R,G,B,Scalar_field_#2,Scalar_Classification".replace("field_#2", "Intensity"),
            ",",
        ),
        ("counted.xyz", "//X Y Z R G B Intensity Classification\n2", " "),
        ("pdal.csv", '"X","Y","Z","Red","Green","Blue","Intensity","Classification"', ","),
        ("german.csv", "x;y;z;red;green;blue;intensity;label", ";"),
        ("tabs.xyz", "# x\ty\tz\tr\tg\tb\tintensity\tclass", "\t"),
        ("spreadsheet.csv", "\ufeffx,y,z,r,g,b,intensity,class", ","),
        ("DOS.CSV", "x,y,z,r,g,b,intensity,class\r", ","),
    ],
)
def test_text_of_other_programs(tmp_path: Path, name: str, head: str, delimiter: str) -> None:
    scan = read_scan(write(tmp_path / name, head, delimiter=delimiter))
    np.testing.assert_array_equal(scan.points, [row[:3] for row in ROWS])
    np.testing.assert_allclose(scan.columns["color"], [[1, 0, 0.2], [0, 0.4, 0]], rtol=1e-6)
    np.testing.assert_array_equal(scan.columns["intensity"], [7, 9])
    assert scan.classes is not None
    np.testing.assert_array_equal(scan.classes, [2, 6])


def test_coordinates_alone_need_no_names(tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "a.xyz", "1.5 -2 3e2", "4 5 6"))
    assert scan.points.tolist() == [[1.5, -2, 300], [4, 5, 6]]
    assert (scan.columns, scan.classes) == ({}, None)


def test_what_is_not_known_is_left_out_and_may_be_words(tmp_path: Path) -> None:
    scan = read_scan(write(tmp_path / "a.csv", "name,x,y,z,Return Number", "oak,1,2,3,1", ","))
    assert scan.points.tolist() == [[1, 2, 3]]
    assert {name: values.tolist() for name, values in scan.columns.items()} == {"return_number": [1]}


def test_colours_of_0_to_1_and_of_16_bits(tmp_path: Path) -> None:
    floats = read_scan(write(tmp_path / "a.xyz", "x y z Rf Gf Bf", "0 0 0 0.25 1 0"))
    assert floats.columns["color"].tolist() == [[0.25, 1, 0]]
    wide = read_scan(write(tmp_path / "b.xyz", "x y z r g b", "0 0 0 65535 0 13107"))
    np.testing.assert_allclose(wide.columns["color"], [[1, 0, 0.2]], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1 2 3 4\n",
            "its first line is '1 2 3 4': expected the names of the columns, such as 'x y z intensity label'",
        ),
        ("x y label\n1 2 3\n", "no column is named z; its first line names x, y, label"),
        ("x y z r red\n1 2 3 4 5\n", "several columns are red"),
        ("x y z label\n1 2 3 4\n1 2 3\n", "line 3: expected 4 values, x, y, z, label; got '1 2 3'"),
        ("x y z label\n1 2 3 4 5\n", "line 2: expected 4 values, x, y, z, label; got '1 2 3 4 5'"),
        ("x y z label\n1 2 3 tree\n", "line 2: expected 4 values, x, y, z, label; got '1 2 3 tree'"),
        ("x y z label\n1 2 3 4.5\n", "labels of whole numbers"),
        ("x;y;z\n1,5;2;3\n", "line 2: expected 3 values, x, y, z; got '1,5;2;3'"),
        ("", "its first line is empty: expected the names of the columns"),
        ("\0\1\2 binary\n\0", "no column is named x, y, z"),
    ],
)
def test_faults_of_text(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as raised:
        read_scan(tmp_path / "a.xyz")
    assert str(raised.value).startswith(f"{tmp_path}/a.xyz: ")


def test_no_points_are_told_by_the_check(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.csv").write_text("x,y,z,label\n")
    (fault,) = check_split(DataConfig(root=str(tmp_path), classes={1: "a", 2: "b"}), "train").faults
    assert "it has no points" in str(fault)


def test_predicted_classes_are_written_as_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "X,Y,Z,R,G,B,Intensity,Classification", delimiter=",")
    assert expand_scans([str(tmp_path)]) == [source]
    write_classes(tmp_path / "out.csv", np.array([6, 5]), source=source)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines == [
        "x,y,z,red,green,blue,intensity,label",
        "770600.125,6277500.25,20.5,255,0,51,7,6",
        "770601,6277501,21,0,102,0,9,5",
    ]


def test_map_coordinates_keep_their_micrometres(tmp_path: Path) -> None:
    points = np.array([[770600.123456, 627750.654321, -0.000001]])
    write_scan(tmp_path / "a.xyz", RawScan(points=points))
    np.testing.assert_allclose(read_scan(tmp_path / "a.xyz").points, points, rtol=0, atol=5e-7)
