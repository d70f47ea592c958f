"""PLY files: points, or the vertices of a mesh."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError, require
from latentgnn.tasks.pointcloud.raw import SCALARS, RawScan, class_ids, stacked, table_of

_LABELS = ("label", "class", "classification", "scalar_Label")


def read_ply(path: Path) -> RawScan:
    """Read a PLY file; if it has no normals, they are computed from its faces."""
    require("trimesh", extra="pointcloud")
    ply = require("trimesh.exchange.ply", extra="pointcloud")
    with path.open("rb") as file:
        elements = ply.load_ply(file, fix_texture=False, skip_materials=True)["metadata"]["_ply_raw"]
    if "vertex" not in elements:
        raise UserError(f"{path}: a PLY file of points has an element 'vertex'; it has {', '.join(elements) or 'none'}")
    vertices = _values_of(elements["vertex"])
    points = stacked(vertices, ("x", "y", "z")).astype(np.float64)
    columns = {name: vertices[name] for name in SCALARS if name in vertices}
    if {"red", "green", "blue"} <= set(vertices):
        color = stacked(vertices, ("red", "green", "blue"))
        columns["color"] = (color / (np.iinfo(color.dtype).max if color.dtype.kind in "iu" else 1)).astype(np.float32)
    if {"nx", "ny", "nz"} <= set(vertices):
        columns["normal"] = stacked(vertices, ("nx", "ny", "nz")).astype(np.float32)
    elif (corners := _triangles(elements.get("face"))) is not None:
        columns["normal"] = _vertex_normals(points, corners)
    label = next((name for name in _LABELS if name in vertices), None)
    return RawScan(points=points, columns=columns, classes=None if label is None else class_ids(path, vertices[label]))


def _values_of(element: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The scalar values of an element of a PLY file by name, each of shape (N,)."""
    values = {}
    for name, kind in element["properties"].items():
        if "," not in kind:
            column = np.asarray(element["data"][name]).reshape(-1)
            if len(column) != element["length"]:
                raise ValueError(f"the header announces {element['length']} {name!r}, the file has {len(column)}")
            values[name] = column.astype(column.dtype.newbyteorder("="))
    return values


def _triangles(element: Mapping[str, Any] | None) -> NDArray[np.int64] | None:
    """The corners of a mesh's faces, shape (F, 3); ``None`` if it has no faces or they are not triangles."""
    if element is None or not element["length"]:
        return None
    for name in ("vertex_indices", "vertex_index"):
        if name in element["properties"]:
            data = element["data"][name]
            # In binary files, the number of corners is the first field, and the corners are the second.
            corners = np.asarray(data if data.dtype.names is None else data[data.dtype.names[1]])
            if len(corners) != element["length"]:
                raise ValueError(f"the header announces {element['length']} faces, the file has {len(corners)}")
            return corners.astype(np.int64) if corners.shape == (len(corners), 3) else None
    return None


def _vertex_normals(points: NDArray[np.float64], corners: NDArray[np.int64]) -> NDArray[np.float32]:
    """Unit normals of a mesh's vertices, the area-weighted means over their triangles; zero without triangles."""
    a, b, c = (points[corners[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    summed = np.stack(
        [np.bincount(corners.reshape(-1), np.repeat(across[:, axis], 3), len(points)) for axis in range(3)], axis=1
    )
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    return np.divide(summed, length, out=np.zeros_like(summed), where=length > 0).astype(np.float32)


def ply_bytes(scan: RawScan) -> bytes:
    """Return the content of a binary PLY file."""
    # trimesh would write coordinates as float32, with a resolution of only 6 cm at map coordinates of 10^6 m.
    values = table_of(scan)
    kinds = {"f8": "double", "f4": "float", "u1": "uchar", "i4": "int"}
    properties = [f"property {kinds[column.dtype.str[1:]]} {name}" for name, column in values.items()]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {len(scan.points)}", *properties, "end_header"]
    packed = np.zeros(len(scan.points), [(name, column.dtype) for name, column in values.items()])
    for name, column in values.items():
        packed[name] = column
    return "\n".join(head).encode() + b"\n" + packed.tobytes()
