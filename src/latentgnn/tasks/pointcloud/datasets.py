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
    """Scans that are read on access.

    Args:
        sources: the scans.
        config: configuration from `latentgnn.tasks.pointcloud.layouts.resolve`.
        counts: number of points of each class, if known.
        unknown: whether class ids that the configuration does not name are ignored or refused.

    Attributes:
        names: names of the scans.
        class_names: class names in the order of the labels.
        class_ids: ids of the classes in files, in the order of the labels; if a class has several, the one named first.
        feature_names: names of the columns of `Scan.features`.
        counts: number of points of each class, int64, shape (K,); ``None`` if not known.
        skipped: message about what was left out.
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
        """Return scan files to predict on: labels are used if present, and are not required.

        Args:
            paths: scan files.
            config: configuration with ``classes`` and ``features``; ``root`` is not used.

        Raises:
            UserError: if the classes have no names.
        """
        check_classes(config)
        sources = [Source(name=Path(path).stem, path=Path(path), read=partial(read_scan, path)) for path in paths]
        return cls(sources, config, unknown="ignore")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def files(self) -> list[Path]:
        """Return the files that are read repeatedly."""
        return [path for source in self.sources for path in source.files]

    @property
    def num_classes(self) -> int:
        return len(self.class_ids)

    @property
    def num_features(self) -> int:
        return len(self.feature_names)

    def raw(self, index: int) -> RawScan:
        """Read the content of a scan's file, without caching."""
        return self.sources[index].read()

    def scan(self, index: int) -> Scan:
        """Return a scan, read or cached; the caller must not modify its arrays, which later calls share.

        Raises:
            UserError: if it cannot be read, lacks a feature, or contains class ids without a name.
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
