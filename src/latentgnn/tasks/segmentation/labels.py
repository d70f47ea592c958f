"""Label pictures: the ids in them, and the labels that a network is trained on."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.errors import UserError
from latentgnn.tasks.classes import IGNORE, class_names
from latentgnn.tasks.images import open_image
from latentgnn.tasks.segmentation.config import LARGEST_ID, DataConfig

_UNKNOWN = -2
_SHOWN = 5  # number of ids or colours that a message lists


def read_ids(path: Path, config: DataConfig) -> NDArray[np.int64]:
    """Return the ids in a label picture, shape (height, width).

    Ids are gray values, palette indices, or colours, for which ``config.colors`` gives ids.

    Raises:
        UserError: if the file cannot be read, or has colours without an id.
    """
    with open_image(path) as picture:
        try:
            picture.load()
        except Exception as error:  # damage makes decoders raise errors of every kind
            raise UserError(
                f"{path}: the label picture cannot be read ({str(error) or type(error).__name__})"
            ) from error
        if picture.mode in ("L", "P", "1") or picture.mode.startswith("I"):
            ids = np.asarray(picture).astype(np.int64)
            if ids.min() < 0 or ids.max() > LARGEST_ID:
                raise UserError(f"{path}: ids of {ids.min()} to {ids.max()}; expected 0 to {LARGEST_ID:,}")
            return ids
        if picture.mode not in ("RGB", "RGBA"):
            raise UserError(f"{path}: a label picture of the mode {picture.mode}; expected gray, a palette or colours")
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
    if not config.colors:
        raise UserError(f"{path}: a label picture of colours; say which id each stands for (data.colors)")
    keys = pixels @ np.array([65536, 256, 1])
    known = {red * 65536 + green * 256 + blue: id for id, (red, green, blue) in config.colors.items()}
    found, places = np.unique(keys, return_inverse=True)
    strange = [int(key) for key in found if int(key) not in known]
    if strange:
        shown = ", ".join(f"[{key >> 16}, {key >> 8 & 255}, {key & 255}]" for key in strange[:_SHOWN])
        raise UserError(f"{path}: {len(strange)} colours that data.colors does not name: {shown}")
    return np.array([known[int(key)] for key in found], np.int64)[places].reshape(keys.shape)


def to_labels(ids: NDArray[np.int64], config: DataConfig) -> tuple[NDArray[np.int64], dict[int, int]]:
    """Return labels, 0..K-1 or `IGNORE`, of ids, and the pixel count of each id that is neither a class nor ignored.

    Example:
        >>> config = DataConfig(classes={3: "road", 7: "sky", 8: "sky"}, ignored=(255,))
        >>> labels, strange = to_labels(np.array([[3, 8, 255], [7, 9, 3]]), config)
        >>> labels.tolist(), strange
        ([[0, 1, -1], [1, -1, 0]], {9: 1})
    """
    classes = config.classes or {}
    places = {name: place for place, name in enumerate(class_names(classes))}
    label_of = np.full(LARGEST_ID + 1, _UNKNOWN, np.int64)
    label_of[list(config.ignored or ())] = IGNORE
    label_of[list(classes)] = [places[name] for name in classes.values()]
    labels = label_of[ids]
    found, counts = np.unique(ids[labels == _UNKNOWN], return_counts=True)
    labels[labels == _UNKNOWN] = IGNORE
    return labels, dict(zip(found.tolist(), counts.tolist(), strict=True))


def unknown_ids(strange: dict[int, int]) -> str:
    """Return a message about ids without a name."""
    listed = ", ".join(f"{id} ({count:,} pixels)" for id, count in list(strange.items())[:_SHOWN])
    return f"ids that are neither in data.classes nor in data.ignored: {listed}"
