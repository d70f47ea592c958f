"""Scans in files: LAS, LAZ, PLY, NPZ and text, read and written.

N is a number of points. Coordinates are float64 metres everywhere: map coordinates of 10^6 m keep their millimetres.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, require, system_error, told
from latentgnn.files import write_bytes
from latentgnn.reading import regular_file
from latentgnn.tasks.pointcloud.kitti import label_bytes, read_velodyne
from latentgnn.tasks.pointcloud.text import read_table, table_bytes

IGNORE = -1
"""The label of a point that is neither learnt nor scored."""

SUFFIXES = (".las", ".laz", ".ply", ".npz", ".csv", ".xyz", ".bin")

_FARTHEST = 1e8
"""Metres: the Earth's circumference is two fifths of it."""

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A scan as a network and its scores take it.

    Args:
        name: unique in its set.
        points: metres as in the file, float64, shape (N, 3).
        features: float32, shape (N, F), in the order of `ScanSet.feature_names`.
        labels: classes 0..K-1 or `IGNORE`, int64, shape (N,); ``None`` where the file has none.
    """

    name: str
    points: NDArray[np.float64]
    features: NDArray[np.float32]
    labels: NDArray[np.int64] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class RawScan:
    """What a file holds.

    Args:
        points: metres, float64, shape (N, 3).
        columns: further values of each point by name: ``intensity``, ``return_number``, ``number_of_returns`` of shape
            (N,); ``color`` in 0..1 and ``normal`` of shape (N, 3).
        classes: class ids as in the file, int64, shape (N,); ``None`` where it has none.
    """

    points: NDArray[np.float64]
    columns: Columns = field(default_factory=dict)
    classes: NDArray[np.int64] | None = None


def read_scan(path: Path | str) -> RawScan:
    """Read a LAS, LAZ, PLY, NPZ, CSV or XYZ file, or SemanticKITTI's ``.bin`` with the labels beside it.

    Classes are LAS's ``classification``, a PLY vertex property ``label``, ``class``, ``classification`` or
    ``scalar_Label``, a text's column of such a name, and NPZ's ``labels``. An NPZ file holds ``points`` and, under the
    names of `RawScan.columns`, what else is known. For text see `latentgnn.tasks.pointcloud.text.read_table`.

    Raises:
        UserError: no such file, another format, or a file that is damaged or cut short.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    regular_file(path)
    try:
        # What overflows is told by `coordinate_fault`.
        with np.errstate(all="ignore"):
            scan = reader(path)
    except UserError:
        raise
    except Exception as error:
        if (fault := system_error(error)) is not None:
            raise UserError(told(fault, path)) from error
        # Damage makes decoders raise errors of every kind, of memory too where a header announces too much.
        raise UserError(
            f"{path}: cannot be read, perhaps because it is damaged or cut short ({_told(error)})"
        ) from error
    _check_shapes(path, scan)
    return scan


def coordinate_fault(points: NDArray[np.float64]) -> str | None:
    """What is wrong with the points of a scan, shape (N, 3), or ``None``: they must be near enough for float64."""
    if not len(points):
        return "it has no points"
    if number := int((~np.isfinite(points)).any(axis=1).sum()):
        return f"{number} of its {len(points)} points have coordinates that are not finite numbers"
    if (farthest := float(np.abs(points).max())) > _FARTHEST:
        return f"it has coordinates of {farthest:.3g} m; expected {_FARTHEST:.0e} m at most"
    return None


def write_scan(path: Path | str, scan: RawScan) -> None:
    """Write a LAS, LAZ, PLY, NPZ, CSV or XYZ file, or SemanticKITTI's ``.label``, by its suffix, in one step.

    LAS and LAZ round coordinates to a tenth of a millimetre, or to what 31 bits can count in a scan that is larger than
    214 km; text to twelve digits; PLY and NPZ keep float64.

    Raises:
        UserError: another suffix, or classes that the format cannot hold.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"{path}: expected a file name that ends in {', '.join(_WRITERS)}")
    _check_shapes(path, scan)
    write_bytes(path, writer(path, scan))


def write_classes(path: Path | str, classes: NDArray[np.int64], *, source: Path | str) -> None:
    """Write a scan again with other classes.

    From LAS or LAZ to LAS or LAZ, all else is kept as it is: every other value of the points, scales and offsets, and
    the coordinate system.

    Args:
        path: file to write; its suffix gives the format.
        classes: id of every point, int64, shape (N,).
        source: the file that the points come from.

    Raises:
        UserError: another number of points, or classes that the format cannot hold.
    """
    path, source = Path(path), Path(source)
    scan = read_scan(source)
    if len(classes) != len(scan.points):
        raise UserError(f"{source} has {len(scan.points)} points, but there are classes for {len(classes)}")
    if {path.suffix.lower(), source.suffix.lower()} <= {".las", ".laz"}:
        las = _las(source)
        write_bytes(path, _las_bytes(path, las, classes))
    else:
        write_scan(path, RawScan(points=scan.points, columns=scan.columns, classes=classes))


def _check_shapes(path: Path, scan: RawScan) -> None:
    if scan.points.ndim != 2 or scan.points.shape[1] != 3:
        raise UserError(f"{path}: expected points of shape (N, 3); got {scan.points.shape}")
    number = len(scan.points)
    if scan.classes is not None and scan.classes.shape != (number,):
        raise UserError(f"{path}: there are {number} points, but labels of shape {scan.classes.shape}")
    for name, values in scan.columns.items():
        expected = (number, 3) if name in ("color", "normal") else (number,)
        if values.shape != expected:
            raise UserError(f"{path}: expected {name} of shape {expected} for {number} points; got {values.shape}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _laspy() -> ModuleType:
    require("lazrs", extra="pointcloud")
    return require("laspy", extra="pointcloud")


def _las(path: Path) -> Any:
    laspy = _laspy()
    _check_claims(path)
    # The parallel backend's threads do not survive a fork: loading processes would wait for them for ever.
    return laspy.read(path, laz_backend=laspy.LazBackend.Lazrs)


def _check_claims(path: Path) -> None:
    """Refuse a file that claims more records or chunks than it has bytes for.

    laspy would read records for hours, and the decoder of chunks would end the process for want of memory. Where things
    lie is said by the LAS specification (the header) and by LASzip's (the table of chunks).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(375)
        if len(header) < 227:
            return
        records = [(int.from_bytes(header[100:104], "little"), 54)]
        if header[25] >= 4 and len(header) >= 247:
            records.append((int.from_bytes(header[243:247], "little"), 60))
        for number, least in records:
            if number * least > size:
                raise UserError(f"{path}: it is damaged: it claims {number:,} records in {size:,} bytes")
        if not header[104] & 0x80:
            return
        file.seek(int.from_bytes(header[96:100], "little"))
        table = int.from_bytes(file.read(8), "little", signed=True)
        if table == -1 and size >= 8:
            # Written in one pass: the place stands at the end.
            file.seek(size - 8)
            table = int.from_bytes(file.read(8), "little", signed=True)
        if not 0 <= table <= size - 8:
            raise UserError(f"{path}: it is damaged or cut short: its table of chunks lies outside it")
        file.seek(table + 4)
        chunks = int.from_bytes(file.read(4), "little")
        if chunks > size:
            raise UserError(f"{path}: it is damaged: it claims {chunks:,} chunks in {size:,} bytes")


def _read_las(path: Path) -> RawScan:
    las = _las(path)
    expected = las.header.point_count
    if path.stat().st_size < las.header.offset_to_point_data:
        # A header without its end counts no points.
        raise UserError(f"{path}: it is cut short within its header")
    if len(las.points) != expected:
        raise UserError(f"{path}: it is cut short: it announces {expected} points and has {len(las.points)}")
    present = set(las.point_format.dimension_names)
    columns = {name: np.asarray(las[name]) for name in _SCALARS if name in present and np.any(las[name])}
    if {"red", "green", "blue"} <= present:
        color = np.stack([np.asarray(las[name]) for name in ("red", "green", "blue")], axis=1)
        # Many writers leave the colours' place empty, and some write 8 bits where 16 belong.
        if (largest := color.max(initial=0)) > 0:
            columns["color"] = color.astype(np.float32) / (255 if largest < 256 else 65535)
    points = np.ascontiguousarray(las.xyz, np.float64)
    return RawScan(points=points, columns=columns, classes=np.asarray(las.classification).astype(np.int64))


def _las_bytes(path: Path, las: Any, classes: NDArray[np.int64]) -> bytes:
    if classes.size and not 0 <= classes.min() <= classes.max() <= 255:
        raise UserError(f"{path}: LAS holds class ids from 0 to 255; got {classes.min()} to {classes.max()}")
    if las.point_format.id < 6 and classes.max(initial=0) > 31:
        las = _laspy().convert(las, point_format_id=_WIDER[las.point_format.id])
    las.classification = classes.astype(np.uint8)
    buffer = io.BytesIO()
    las.write(buffer, do_compress=path.suffix.lower() == ".laz")
    return buffer.getvalue()


# Formats 0 to 5 hold classes up to 31; these hold the same and classes up to 255.
_WIDER = {0: 6, 1: 6, 2: 7, 3: 7, 4: 9, 5: 10}


def _write_las(path: Path, scan: RawScan) -> bytes:
    laspy = _laspy()
    if not np.isfinite(scan.points).all():
        raise UserError(f"{path}: LAS cannot hold coordinates that are not finite")
    header = laspy.LasHeader(point_format=7 if "color" in scan.columns else 6, version="1.4")
    if len(scan.points):
        header.offsets = np.floor(scan.points.min(axis=0))
        extent = float((scan.points.max(axis=0) - header.offsets).max())
        header.scales = np.full(3, max(1e-4, 10.0 ** np.ceil(np.log10(max(extent, 1.0) / 2**31))))
    las = laspy.LasData(header)
    las.xyz = scan.points
    for name, largest in (("intensity", 65535), ("return_number", 15), ("number_of_returns", 15)):
        if name in scan.columns:
            las[name] = np.round(scan.columns[name]).clip(0, largest).astype(np.uint16)
    if "color" in scan.columns:
        color = np.round(scan.columns["color"].clip(0, 1) * 65535).astype(np.uint16)
        las.red, las.green, las.blue = color.T
    classes = np.zeros(len(scan.points), np.int64) if scan.classes is None else scan.classes
    return _las_bytes(path, las, classes)


def _read_ply(path: Path) -> RawScan:
    require("trimesh", extra="pointcloud")
    ply = require("trimesh.exchange.ply", extra="pointcloud")
    with path.open("rb") as file:
        elements = ply.load_ply(file, fix_texture=False, skip_materials=True)["metadata"]["_ply_raw"]
    if "vertex" not in elements:
        raise UserError(f"{path}: a PLY file of points has an element 'vertex'; it has {', '.join(elements) or 'none'}")
    vertices = _values_of(elements["vertex"])
    points = _stacked(vertices, ("x", "y", "z")).astype(np.float64)
    columns = {name: vertices[name] for name in _SCALARS if name in vertices}
    if {"red", "green", "blue"} <= set(vertices):
        color = _stacked(vertices, ("red", "green", "blue"))
        columns["color"] = (color / (np.iinfo(color.dtype).max if color.dtype.kind in "iu" else 1)).astype(np.float32)
    if {"nx", "ny", "nz"} <= set(vertices):
        columns["normal"] = _stacked(vertices, ("nx", "ny", "nz")).astype(np.float32)
    elif (corners := _triangles(elements.get("face"))) is not None:
        columns["normal"] = _vertex_normals(points, corners)
    label = next((name for name in _PLY_LABELS if name in vertices), None)
    return RawScan(points=points, columns=columns, classes=None if label is None else _classes(path, vertices[label]))


def _values_of(element: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The single values of an element of a PLY file by name, each of shape (N,)."""
    values = {}
    for name, kind in element["properties"].items():
        if "," not in kind:
            column = np.asarray(element["data"][name]).reshape(-1)
            if len(column) != element["length"]:
                raise ValueError(f"{element['length']} times {name!r} are announced, {len(column)} are there")
            values[name] = column.astype(column.dtype.newbyteorder("="))
    return values


def _triangles(element: Mapping[str, Any] | None) -> NDArray[np.int64] | None:
    """The corners of a mesh's faces, shape (F, 3), if it has faces and they are triangles."""
    if element is None or not element["length"]:
        return None
    for name in ("vertex_indices", "vertex_index"):
        if name in element["properties"]:
            data = element["data"][name]
            # Binary files have the number of corners, the first field, beside the corners.
            corners = np.asarray(data if data.dtype.names is None else data[data.dtype.names[1]])
            if len(corners) != element["length"]:
                raise ValueError(f"{element['length']} faces are announced, {len(corners)} are there")
            return corners.astype(np.int64) if corners.shape == (len(corners), 3) else None
    return None


def _vertex_normals(points: NDArray[np.float64], corners: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit normals of a mesh's vertices, each the mean over its triangles weighted with their areas; zero without."""
    a, b, c = (points[corners[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    summed = np.stack(
        [np.bincount(corners.reshape(-1), np.repeat(across[:, axis], 3), len(points)) for axis in range(3)], axis=1
    )
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.divide(summed, length, out=np.zeros_like(summed), where=length > 0).astype(np.float32)


def _stacked(values: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any]:
    return np.stack([values[name] for name in names], axis=1)


def _read_bin(path: Path) -> RawScan:
    points, remission, classes = read_velodyne(path)
    return RawScan(points=points, columns={"intensity": remission}, classes=classes)


def _write_label(path: Path, scan: RawScan) -> bytes:
    if scan.classes is None:
        raise UserError(f"{path}: a file of labels needs classes, and the scan has none")
    return label_bytes(path, scan.classes)


def _read_text(path: Path) -> RawScan:
    values = read_table(path)
    columns: dict[str, NDArray[Any]] = {name: values[name] for name in _SCALARS if name in values}
    if {"red", "green", "blue"} <= set(values):
        color = _stacked(values, ("red", "green", "blue"))
        # Of 0 to 1, of 8 bits or of 16.
        largest = next((most for most in (1, 255) if color.max(initial=0) <= most), 65535)
        columns["color"] = (color / largest).astype(np.float32)
    if {"nx", "ny", "nz"} <= set(values):
        columns["normal"] = _stacked(values, ("nx", "ny", "nz")).astype(np.float32)
    classes = _classes(path, values["label"]) if "label" in values else None
    return RawScan(points=_stacked(values, ("x", "y", "z")), columns=columns, classes=classes)


def _write_text(path: Path, scan: RawScan) -> bytes:
    return table_bytes(_table(scan), delimiter="," if path.suffix.lower() == ".csv" else " ")


def _table(scan: RawScan) -> dict[str, NDArray[Any]]:
    """All values of a scan, each of shape (N,), by the names that PLY files have for them."""
    values: dict[str, NDArray[Any]] = {name: scan.points[:, axis].astype("<f8") for axis, name in enumerate("xyz")}
    if "color" in scan.columns:
        color = np.round(scan.columns["color"].clip(0, 1) * 255).astype("u1")
        values |= {name: color[:, axis] for axis, name in enumerate(("red", "green", "blue"))}
    if "normal" in scan.columns:
        normal = scan.columns["normal"].astype("<f4")
        values |= {name: normal[:, axis] for axis, name in enumerate(("nx", "ny", "nz"))}
    values |= {name: scan.columns[name].astype("<f4") for name in _SCALARS if name in scan.columns}
    if scan.classes is not None:
        values["label"] = scan.classes.astype("<i4")
    return values


def _write_ply(path: Path, scan: RawScan) -> bytes:
    # trimesh writes coordinates as float32, which at map coordinates of 10^6 m is 6 cm.
    values = _table(scan)
    kinds = {"f8": "double", "f4": "float", "u1": "uchar", "i4": "int"}
    properties = [f"property {kinds[column.dtype.str[1:]]} {name}" for name, column in values.items()]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(scan.points)}", *properties, "end_header"]
    packed = np.zeros(len(scan.points), [(name, column.dtype) for name, column in values.items()])
    for name, column in values.items():
        packed[name] = column
    return "\n".join(head).encode() + b"\n" + packed.tobytes()


def _read_npz(path: Path) -> RawScan:
    # np.load leaves a file open that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        if "points" not in arrays:
            raise UserError(f"{path}: expected an array 'points'; it has {', '.join(arrays) or 'none'}")
        names = [name for name in (*_SCALARS, "color", "normal") if name in arrays]
        points, *values = (_numbers(path, name, arrays[name]) for name in ("points", *names))
        columns = dict(zip(names, values, strict=True))
        if "color" in columns and columns["color"].dtype.kind in "iu":
            columns["color"] = (columns["color"] / np.iinfo(columns["color"].dtype).max).astype(np.float32)
        classes = _classes(path, arrays["labels"]) if "labels" in arrays else None
        return RawScan(points=points.astype(np.float64), columns=columns, classes=classes)


def _numbers(path: Path, name: str, values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected {name} of real numbers; got {values.dtype}")
    return values


def _classes(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """Class ids; floats that hold whole numbers are taken, for some programs write no others."""
    values = _numbers(path, "labels", values)
    # The largest float64 below 2**63 is an integer, so that nothing that passes overflows.
    unsound = ~(np.isfinite(values) & (values >= -(2.0**63)) & (values < 2.0**63) & (values == np.trunc(values)))
    if unsound.any():
        raise UserError(f"{path}: expected labels of whole numbers of 64 bits; got {values[unsound].flat[0]}")
    return values.astype(np.int64)


def _write_npz(path: Path, scan: RawScan) -> bytes:
    arrays: dict[str, Any] = {"points": scan.points, **scan.columns}
    if scan.classes is not None:
        arrays["labels"] = scan.classes
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


_SCALARS = ("intensity", "return_number", "number_of_returns")
_PLY_LABELS = ("label", "class", "classification", "scalar_Label")
_READERS = {
    ".las": _read_las,
    ".laz": _read_las,
    ".ply": _read_ply,
    ".npz": _read_npz,
    ".csv": _read_text,
    ".xyz": _read_text,
    ".bin": _read_bin,
}
_WRITERS = {
    ".las": _write_las,
    ".laz": _write_las,
    ".ply": _write_ply,
    ".npz": _write_npz,
    ".csv": _write_text,
    ".xyz": _write_text,
    ".label": _write_label,
}
