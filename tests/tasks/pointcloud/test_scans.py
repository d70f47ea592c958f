import io
import struct

import laspy
import numpy as np
import pytest
import trimesh

from latentgnn.errors import UserError
from latentgnn.tasks.pointcloud.scans import RawScan, coordinate_fault, read_scan, write_classes, write_scan

# Lambert 93, as in the French elevation data: float32 knows such a northing to half a metre.
FAR = np.array([770_600.0, 6_277_500.0, 20.0])


def _points(number=50, seed=0):
    """Millimetres, which every format can hold."""
    return np.round(np.random.default_rng(seed).uniform(0, 50, (number, 3)), 3) + FAR


def _las(path, number=50, format=3, **values):
    """Written by laspy alone."""
    header = laspy.LasHeader(point_format=format, version="1.2" if format < 6 else "1.4")
    header.offsets, header.scales = FAR, [0.001] * 3
    las = laspy.LasData(header)
    las.xyz = _points(number)
    for name, value in values.items():
        las[name] = value
    las.write(path)
    return path


def _ply(path, kind="binary_little_endian", labels=(1, 2, 39), extra="", faces=((0, 1, 2),)):
    """A mesh as ScanNet's files are, written byte by byte."""
    corners = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0]], float)
    order = ">" if "big" in kind else "<"
    head = ["ply", f"format {kind} 1.0", "comment by hand", f"element vertex {len(corners)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"property uchar {name}" for name in ("red", "green", "blue", "alpha")]
    head += ["property ushort label"] * (labels is not None)
    head += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    dtype = [(axis, f"{order}f4") for axis in "xyz"] + [(name, "u1") for name in ("red", "green", "blue", "alpha")]
    dtype += [("label", f"{order}u2")] * (labels is not None)
    rows = np.zeros(len(corners), dtype)
    rows["x"], rows["y"], rows["z"] = corners.T
    rows["red"], rows["green"], rows["blue"] = 255, [0, 51, 102], 0
    if labels is not None:
        rows["label"] = labels
    polygons = np.zeros(len(faces), [("number", "u1"), ("corners", f"{order}i4", 3)])
    polygons["number"], polygons["corners"] = 3, faces
    if kind == "ascii":
        lines = [" ".join(str(value) for value in row) for row in rows.tolist()]
        lines += [" ".join(map(str, [3, *face])) for face in faces]
        body = "\n".join([*lines, ""]).encode()
    else:
        body = rows.tobytes() + polygons.tobytes()
    path.write_bytes("\n".join(head).encode() + body)
    return path


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las(tmp_path, suffix):
    classes = np.arange(50) % 20
    path = _las(
        tmp_path / f"a.{suffix}",
        intensity=np.arange(50) * 1000,
        return_number=np.full(50, 2),
        classification=classes,
        red=np.full(50, 65535),
        green=np.full(50, 13107),
    )
    scan = read_scan(path)
    np.testing.assert_allclose(scan.points, _points(), rtol=0, atol=1e-6)
    assert scan.points.dtype == np.float64
    np.testing.assert_array_equal(scan.classes, classes)
    np.testing.assert_array_equal(scan.columns["intensity"], np.arange(50) * 1000)
    np.testing.assert_allclose(scan.columns["color"], np.tile([1, 0.2, 0], (50, 1)), rtol=1e-6)
    # All zero means that nobody wrote them.
    assert set(scan.columns) == {"intensity", "return_number", "color"}


def test_las_colours_of_eight_bits(tmp_path):
    scan = read_scan(_las(tmp_path / "a.las", red=np.full(50, 255), blue=np.full(50, 51)))
    np.testing.assert_allclose(scan.columns["color"], np.tile([1, 0, 0.2], (50, 1)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["binary_little_endian", "binary_big_endian", "ascii"])
def test_ply_of_a_labelled_mesh(tmp_path, kind):
    scan = read_scan(_ply(tmp_path / "a.ply", kind))
    np.testing.assert_array_equal(scan.points, [[0, 0, 0], [2, 0, 0], [0, 2, 0]])
    np.testing.assert_array_equal(scan.classes, [1, 2, 39])
    np.testing.assert_allclose(scan.columns["color"], [[1, 0, 0], [1, 0.2, 0], [1, 0.4, 0]], rtol=1e-6)
    np.testing.assert_array_equal(scan.columns["normal"], [[0, 0, 1]] * 3)
    assert all(values.dtype.isnative for values in (scan.points, scan.classes, *scan.columns.values()))


def test_ply_without_labels_or_faces(tmp_path):
    scan = read_scan(_ply(tmp_path / "a.ply", labels=None, faces=np.zeros((0, 3), int)))
    assert scan.classes is None
    assert set(scan.columns) == {"color"}


def test_ply_normals_of_a_mesh_are_weighted_by_area(tmp_path):
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.export(tmp_path / "a.ply")
    scan = read_scan(tmp_path / "a.ply")
    radial = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    assert (scan.columns["normal"] * radial).sum(axis=1).min() > 0.999
    # A vertex of one small triangle in z and one of four times its area in x leans to x by 4 : 1.
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 2]], float)
    trimesh.Trimesh(points, [[0, 1, 2], [0, 3, 4]], process=False).export(tmp_path / "b.ply", vertex_normal=False)
    normal = read_scan(tmp_path / "b.ply").columns["normal"]
    np.testing.assert_allclose(normal[0], np.array([4, 0, 1]) / np.sqrt(17), rtol=1e-6)


def test_npz(tmp_path):
    color = np.full((50, 3), 51, np.uint8)
    np.savez(
        tmp_path / "a.npz", points=_points(), labels=np.arange(50, dtype=np.uint8), color=color, intensity=color[:, 0]
    )
    scan = read_scan(tmp_path / "a.npz")
    np.testing.assert_array_equal(scan.points, _points())
    np.testing.assert_array_equal(scan.classes, np.arange(50))
    np.testing.assert_allclose(scan.columns["color"], 0.2, rtol=1e-6)
    assert set(scan.columns) == {"color", "intensity"}


def _full(number=50):
    rng = np.random.default_rng(1)
    return RawScan(
        points=_points(number),
        columns={
            "intensity": rng.integers(0, 65536, number),
            "return_number": rng.integers(1, 6, number),
            "number_of_returns": np.full(number, 5),
            "color": rng.integers(0, 256, (number, 3)) / 255,
        },
        classes=rng.integers(0, 256, number),
    )


@pytest.mark.parametrize("suffix", ["las", "laz", "ply", "npz", "csv", "xyz"])
def test_what_is_written_is_read(tmp_path, suffix):
    written = _full()
    write_scan(tmp_path / f"deep/a.{suffix}", written)
    scan = read_scan(tmp_path / f"deep/a.{suffix}")
    np.testing.assert_allclose(scan.points, written.points, rtol=0, atol=0 if suffix in ("ply", "npz") else 5.1e-5)
    np.testing.assert_array_equal(scan.classes, written.classes)
    assert set(scan.columns) == set(written.columns)
    for name, values in written.columns.items():
        np.testing.assert_allclose(scan.columns[name], values, atol=1e-5, err_msg=name)


def test_other_programs_open_what_is_written(tmp_path):
    written = _full()
    write_scan(tmp_path / "a.laz", written)
    las = laspy.read(tmp_path / "a.laz")
    np.testing.assert_array_equal(las.classification, written.classes)
    np.testing.assert_array_equal(las.intensity, written.columns["intensity"])
    np.testing.assert_allclose(las.xyz, written.points, rtol=0, atol=5.1e-5)
    write_scan(tmp_path / "a.ply", written)
    cloud = trimesh.load(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.vertices, written.points)
    np.testing.assert_array_equal(cloud.colors[:, :3], np.round(written.columns["color"] * 255))


def test_a_scan_as_large_as_a_continent(tmp_path):
    points = np.array([[0, 0, 0], [3e6, 1, 0]])
    write_scan(tmp_path / "a.las", RawScan(points=points))
    np.testing.assert_allclose(read_scan(tmp_path / "a.las").points, points, atol=0.01)


def test_an_empty_scan(tmp_path):
    for suffix in ("laz", "ply", "npz"):
        write_scan(tmp_path / f"a.{suffix}", RawScan(points=np.zeros((0, 3))))
        assert read_scan(tmp_path / f"a.{suffix}").points.shape == (0, 3)


@pytest.mark.parametrize(("format", "largest", "expected"), [(3, 31, 3), (3, 200, 7), (1, 64, 6), (6, 255, 6)])
def test_new_classes_change_nothing_else(tmp_path, format, largest, expected):
    source = _las(tmp_path / "a.laz", format=format, gps_time=np.arange(50.0), user_data=np.arange(50))
    classes = np.arange(50) % 2 * largest
    write_classes(tmp_path / "b.las", classes, source=source)
    before, after = laspy.read(source), laspy.read(tmp_path / "b.las")
    assert after.point_format.id == expected
    np.testing.assert_array_equal(after.classification, classes)
    np.testing.assert_array_equal(before.X, after.X)
    for name in ("gps_time", "user_data", "return_number"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_array_equal(before.header.offsets, after.header.offsets)
    np.testing.assert_array_equal(before.header.scales, after.header.scales)


def test_new_classes_of_a_mesh(tmp_path):
    source = _ply(tmp_path / "a.ply")
    write_classes(tmp_path / "b.ply", np.array([7, 8, 9]), source=source)
    np.testing.assert_array_equal(read_scan(tmp_path / "b.ply").classes, [7, 8, 9])
    np.testing.assert_array_equal(read_scan(tmp_path / "b.ply").points, read_scan(source).points)
    with pytest.raises(UserError, match="has 3 points, but there are classes for 2"):
        write_classes(tmp_path / "c.ply", np.array([7, 8]), source=source)


def test_the_coordinate_system_of_real_data_is_kept(tmp_path, shared):
    source = next(iter(sorted(shared("lidarhd").glob("val/*.laz"))))
    before = laspy.read(source)
    write_classes(tmp_path / "a.laz", np.full(len(before.points), 6), source=source)
    after = laspy.read(tmp_path / "a.laz")
    assert [record.record_id for record in after.header.vlrs] == [record.record_id for record in before.header.vlrs]
    assert [v.record_data_bytes() for v in after.header.vlrs] == [v.record_data_bytes() for v in before.header.vlrs]
    np.testing.assert_array_equal(before.X, after.X)
    np.testing.assert_array_equal(before.gps_time, after.gps_time)
    assert set(np.unique(after.classification)) == {6}


@pytest.mark.parametrize("suffix", ["las", "laz", "ply", "npz"])
def test_a_file_cut_short_anywhere(tmp_path, suffix):
    write_scan(tmp_path / f"a.{suffix}", _full())
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    lengths = {0, 1, 4, 100, 230, len(whole) - 1, *np.random.default_rng(0).integers(0, len(whole), 40).tolist()}
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{cut.name}: .*cut short"):
            read_scan(cut)


def test_an_ascii_file_cut_short(tmp_path):
    path = _ply(tmp_path / "a.ply", "ascii")
    lines = path.read_text().splitlines(keepends=True)
    for kept in range(1, len(lines)):
        path.write_text("".join(lines[:kept]))
        with pytest.raises(UserError, match="cut short"):
            read_scan(path)


def test_las_without_its_last_points(tmp_path):
    path = _las(tmp_path / "a.las")
    size = laspy.read(path).point_format.size
    path.write_bytes(path.read_bytes()[: -3 * size])
    with pytest.raises(UserError, match="announces 50 points and has 47"):
        read_scan(path)


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"expected a file that ends in \.las, \.laz, \.ply, \.npz"),
        ("a.npz", _npz(xyz=np.zeros((2, 3))), "expected an array 'points'; it has xyz"),
        ("a.npz", _npz(points=np.zeros((2, 2))), r"points of shape \(N, 3\); got \(2, 2\)"),
        ("a.npz", _npz(points=np.zeros(())), r"points of shape \(N, 3\); got \(\)"),
        ("a.npz", _npz(points=np.zeros((2, 3)), labels=np.zeros(3, int)), r"2 points, but labels of shape \(3,\)"),
        ("a.npz", _npz(points=np.zeros((2, 3)), labels=np.array([1.0, 1.5])), "labels of whole numbers .*; got 1.5"),
        ("a.npz", _npz(points=np.zeros((2, 3)), labels=np.array([1, np.nan])), "labels of whole numbers .*; got nan"),
        ("a.npz", _npz(points=np.zeros((1, 3)), labels=np.array([2**63], "u8")), "of 64 bits; got 9223372036854775808"),
        ("a.npz", _npz(points=np.zeros((1, 3)), labels=np.array([True])), "labels of real numbers; got bool"),
        ("a.npz", _npz(points=np.zeros((2, 3), complex)), "points of real numbers; got complex128"),
        ("a.npz", _npz(points=np.zeros((2, 3), bool)), "points of real numbers; got bool"),
        ("a.npz", _npz(points=np.full((2, 3), "x")), "points of real numbers; got <U1"),
        ("a.npz", _npz(points=np.zeros((1, 3)), intensity=np.array(["x"])), "intensity of real numbers; got <U1"),
        ("a.npz", _npz(points=np.zeros((2, 3)), color=np.zeros((2, 4))), r"color of shape \(2, 3\).*got \(2, 4\)"),
        ("a.npz", _npz(points=np.array([[None] * 3])), "cannot be read.*pickle"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement face 0\nend_header\n", "has an element 'vertex'; it has face"),
        (
            "a.ply",
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n",
            "cannot be read.*'y'",
        ),
        (
            "a.ply",
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
            b"property float label\nend_header\n1 2 3 4.5\n",
            "labels of whole numbers .*; got 4.5",
        ),
    ],
)
def test_other_content(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_scan(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no\.laz: there is no such file"):
        read_scan(tmp_path / "no.laz")


def test_what_cannot_be_written(tmp_path):
    scan = RawScan(points=np.zeros((1, 3)), classes=np.array([256]))
    with pytest.raises(UserError, match="class ids from 0 to 255; got 256 to 256"):
        write_scan(tmp_path / "a.las", scan)
    with pytest.raises(UserError, match="coordinates that are not finite"):
        write_scan(tmp_path / "a.las", RawScan(points=np.full((1, 3), np.nan)))
    with pytest.raises(UserError, match="file name that ends in"):
        write_scan(tmp_path / "a.pcd", scan)
    assert not list(tmp_path.iterdir())


def test_floats_that_hold_whole_numbers_are_labels(tmp_path):
    (tmp_path / "a.npz").write_bytes(_npz(points=np.zeros((2, 3)), labels=np.array([3.0, -1.0])))
    classes = read_scan(tmp_path / "a.npz").classes
    assert classes is not None
    assert classes.tolist() == [3, -1]


def test_points_out_of_this_world():
    assert coordinate_fault(np.array([[0, 0, 1e8]])) is None
    assert coordinate_fault(np.array([[0, -1e12, 0.0]])) == "it has coordinates of 1e+12 m; expected 1e+08 m at most"
    assert coordinate_fault(np.zeros((0, 3))) == "it has no points"
    assert coordinate_fault(np.array([[0, 0, np.inf], [0.0, 0, 0]])) == (
        "1 of its 2 points have coordinates that are not finite numbers"
    )


@pytest.mark.parametrize(
    ("place", "what"),
    [(100, "records"), (243, "records"), (None, "chunks")],
)
def test_claims_beyond_the_file_are_told(tmp_path, place, what):
    path = tmp_path / "a.laz"
    write_scan(path, RawScan(points=np.zeros((5, 3))))
    content = bytearray(path.read_bytes())
    if place is None:
        points = int.from_bytes(content[96:100], "little")
        # The table of chunks begins with a version.
        place = int.from_bytes(content[points : points + 8], "little") + 4
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.laz: it is damaged: it claims 2,147,483,647 {what}"):
        read_scan(path)


def test_scales_without_sense_are_told(tmp_path):
    path = tmp_path / "a.las"
    write_scan(path, RawScan(points=np.array([[0.0, 0, 0], [1, 1, 1]])))
    content = bytearray(path.read_bytes())
    # The scale of x in LAS's header.
    content[131:139] = struct.pack("<d", 1e300)
    path.write_bytes(content)
    assert "coordinates of 1e+304 m" in str(coordinate_fault(read_scan(path).points))
