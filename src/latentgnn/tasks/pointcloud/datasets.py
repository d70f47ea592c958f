"""Sets of labelled scans."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.classes import class_names, first_ids
from latentgnn.tasks.pointcloud.config import DataConfig
from latentgnn.tasks.pointcloud.features import feature_columns, to_scan
from latentgnn.tasks.pointcloud.layouts import Source, check_classes
from latentgnn.tasks.pointcloud.scans import RawScan, Scan, read_scan


class ScanSet:
    """Scans that are read when they are asked for.

    Args:
        sources: the scans.
        config: as `latentgnn.tasks.pointcloud.layouts.resolve` returns it.
        counts: points of each class, where they are known.
        unknown: whether class ids that the configuration does not name are ignored instead of refused.

    Attributes:
        names: of the scans.
        class_names: in the order of the labels.
        class_ids: the ids that files get for the classes, in the order of the labels; of several ids of a class, the
            one named first.
        feature_names: one a column of `Scan.features`.
        counts: points of each class, int64, shape (K,); ``None`` where they are not known.
        skipped: what was left out, in words.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        *,
        counts: NDArray[np.int64] | None = None,
        skipped: str = "",
        unknown: Literal["ignore", "refuse"] = "refuse",
    ) -> None:
        self.config = config
        self.sources = list(sources)
        self.names = [source.name for source in sources]
        self.class_names = class_names(config.classes)
        self.class_ids = first_ids(config.classes)
        self.feature_names = feature_columns(config.features)
        self.counts = counts
        self.skipped = skipped
        self._unknown = unknown
        self._cache: OrderedDict[int, Scan] = OrderedDict()

    @classmethod
    def of_files(cls, paths: Sequence[Path | str], config: DataConfig) -> "ScanSet":
        """Scan files to predict on: labels are taken where they are known, and no fault otherwise.

        Args:
            paths: scan files.
            config: with ``classes`` and ``features``; ``root`` is not looked at.

        Raises:
            UserError: the classes have no names.
        """
        check_classes(config)
        sources = [Source(name=Path(path).stem, path=Path(path), read=partial(read_scan, path)) for path in paths]
        return cls(sources, config, unknown="ignore")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def files(self) -> list[Path]:
        """What is read again and again."""
        return [path for source in self.sources for path in source.files]

    @property
    def num_classes(self) -> int:
        return len(self.class_ids)

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    def raw(self, index: int) -> RawScan:
        """What the file of a scan holds, read anew."""
        return self.sources[index].read()

    def scan(self, index: int) -> Scan:
        """A scan, read or from memory; the caller must not write to its arrays, which later calls share.

        Raises:
            UserError: it cannot be read, lacks a feature, or holds class ids that are not named.
        """
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        source = self.sources[index]
        scan = to_scan(source.path, source.read(), self.config, name=source.name, unknown=self._unknown)
        self._cache[index] = scan
        kept = sum(len(scan.points) for scan in self._cache.values())
        while kept > self.config.cached_points:
            kept -= len(self._cache.popitem(last=False)[1].points)
        return scan
