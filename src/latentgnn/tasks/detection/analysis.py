"""Report sections on detections: where they fail, on which categories and on which images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentgnn.tasks.confusion import confusion_section
from latentgnn.tasks.detection.coco import CocoAnnotations, ImageRecord
from latentgnn.tasks.detection.evaluation import CocoEvaluator, Match
from latentgnn.tasks.detection.pictures import side_by_side
from latentgnn.tasks.detection.results import Kind, Record
from latentgnn.tasks.detection.scores import Scores
from latentgnn.tasks.explaining import spread
from latentgnn.tasks.images import png_bytes, read_image
from latentgnn.tasks.inputs import result_names
from latentgnn.training.figures import UNDEFINED, figure_text, mean_of_defined
from latentgnn.training.sections import Chart, Gallery, Line, Picture, Section, Table

SCORE = 0.5
"""Detections that score less are ignored in the confusion matrix and in pictures."""
IOU = 0.5

_WORDS = {"bbox": "box", "segm": "mask"}
# More lines than this are hard to tell apart.
_MOST_CURVES = 8


@dataclass(frozen=True, kw_only=True)
class ImageScore:
    """The result for one image.

    Args:
        image_id: id of the image.
        right: number of objects found with the right category.
        confused: number of objects found with another category.
        missed: number of objects that were not found.
        invented: number of detections without an object.
    """

    image_id: int
    right: int
    confused: int
    missed: int
    invented: int

    @property
    def mistakes(self) -> int:
        """Total number of mistakes."""
        return self.confused + self.missed + self.invented

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; a wrong category counts as missed and as invented.

        Example:
            >>> ImageScore(image_id=1, right=2, confused=1, missed=0, invented=0).f1 == 2 / 3
            True
        """
        return 2 * self.right / max(2 * (self.right + self.confused) + self.missed + self.invented, 1)

    def caption(self, name: str) -> str:
        """Describe the counts that are not zero in words."""
        counts = {"right": self.right, "under another category": self.confused}
        counts |= {"missed": self.missed, "where nothing is": self.invented}
        return f"{name}: F1 {self.f1:.2f}; " + ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def image_scores(matches: Sequence[Match]) -> list[ImageScore]:
    """Return the results of all images with an object or a detection, worst first."""
    counts: dict[int, Counter[str]] = {}
    for match in matches:
        counts.setdefault(match.image_id, Counter())[_outcome(match)] += 1
    scores = [
        ImageScore(
            image_id=image_id,
            right=count["right"],
            confused=count["confused"],
            missed=count["missed"],
            invented=count["invented"],
        )
        for image_id, count in counts.items()
    ]
    # Among images with the same score, those with more objects are more informative.
    return sorted(scores, key=lambda score: (score.f1, -score.mistakes if score.f1 < 1 else score.right))


def _outcome(match: Match) -> str:
    if match.found is None:
        return "missed"
    if match.truth is None:
        return "invented"
    return "right" if match.truth == match.found else "confused"


class Analysis:
    """Report sections and pictures for detection results.

    Args:
        evaluator: evaluator of the validation set.
        val_set: the validation set.
        scores: scores of the results.
        results: COCO-results records.
        pictures: maximum number of pictures, half of them of the worst images and half of the best.
    """

    def __init__(
        self,
        evaluator: CocoEvaluator,
        val_set: CocoAnnotations,
        scores: Scores,
        results: Sequence[Record],
        *,
        pictures: int,
    ) -> None:
        self._names: Mapping[int, str] = evaluator.category_names
        self._set, self._scores = val_set, scores
        self._kind: Kind = scores.kinds[-1]
        self._claims = [record for record in results if record["score"] >= SCORE]
        self._matches = evaluator.matches(self._kind, self._claims, iou=IOU)
        ordered = image_scores(self._matches)
        worst = [score for score in ordered if score.mistakes][: (pictures + 1) // 2]
        best = [score for score in reversed(ordered) if score.right and score not in worst][: pictures // 2]
        self._shown = {"worst": worst, "best": best}
        images = {image.id: image for image in val_set.images}
        self._images: list[tuple[str, ImageScore, ImageRecord]] = [
            (group, score, images[score.image_id]) for group, scores in self._shown.items() for score in scores
        ]

    def pictures(self) -> Iterator[tuple[Path, bytes]]:
        """Yield names below ``pictures/``, and PNG files that show ground truth beside predictions."""
        for (_, _, image), name in zip(self._images, self._places(), strict=True):
            yield name, _beside(self._set, image, self._claims)

    def sections(self) -> list[Section]:
        """Return the sections of the report."""
        word = _WORDS[self._kind]
        matching = f"Detections that score {SCORE} or more, matched with objects at a {word} IoU of {IOU} or more"
        return [
            Section(
                title="Precision and recall",
                text="COCO's precision at each recall. The area below a curve is its average precision.",
                charts=(*(self._curves(kind) for kind in self._scores.kinds), self._curves_of_categories()),
            ),
            Section(title="Categories", text=f"{matching}.", tables=(self._table(),)),
            confusion_section(
                f"{matching}: first within categories, as COCO's figures do, then what is left, across them. Rows are "
                "objects, columns what they were called. Colours are parts of a row.",
                list(self._names.values()),
                self._confusion(),
                unit="objects",
                absent=("nothing there", "not found"),
            ),
            Section(
                title="Images",
                text="Ground truth beside predictions. F1 is the harmonic mean of precision and recall.",
                galleries=tuple(self._gallery(group) for group in self._shown),
            ),
        ]

    def _confusion(self) -> NDArray[np.int64]:
        """Counts by true (row) and predicted (column) category, int64, (K + 1, K + 1); the last is nothing."""
        place: dict[int | None, int] = {id: index for index, id in enumerate(self._names)}
        place[None] = len(self._names)
        counts = np.zeros((len(place), len(place)), np.int64)
        for match in self._matches:
            counts[place[match.truth], place[match.found]] += 1
        return counts

    def _curves(self, kind: Kind) -> Chart:
        precision_TRK = self._scores.precision[kind]
        chosen = {"IoU 0.5": [0], "IoU 0.75": [5], "IoU 0.5 to 0.95": list(range(10))}
        lines = tuple(_line(title, precision_TRK[rows].mean(axis=0)) for title, rows in chosen.items())
        return Chart(title=f"Mean over categories, {_WORDS[kind]}", x="recall", lines=lines, limits=(0.0, 1.0))

    def _curves_of_categories(self) -> Chart:
        """Curves at an IoU of 0.5 for the categories with the most objects."""
        counts = Counter(match.truth for match in self._matches if match.truth is not None)
        common = {id for id, _ in counts.most_common(_MOST_CURVES)}
        places = {name: index for index, (id, name) in enumerate(self._names.items()) if id in common}
        precision_RK = self._scores.precision[self._kind][0]
        lines = tuple(_line(name, precision_RK[:, [index]]) for name, index in places.items())
        of = "Each category" if len(self._names) <= _MOST_CURVES else f"The {_MOST_CURVES} commonest categories"
        return Chart(title=f"{of}, {_WORDS[self._kind]}, IoU 0.5", x="recall", lines=lines, limits=(0.0, 1.0))

    def _table(self) -> Table:
        counts = {outcome: Counter[int | None]() for outcome in ("right", "confused", "missed", "invented")}
        found: Counter[int | None] = Counter()
        for match in self._matches:
            counts[_outcome(match)][match.found if match.truth is None else match.truth] += 1
            found[match.found] += 1
        rows = []
        for index, (id, name) in enumerate(self._names.items()):
            objects = sum(counts[outcome][id] for outcome in ("right", "confused", "missed"))
            figures = [
                figure_text(mean_of_defined(self._scores.precision[kind][rows_T, :, index]))
                for kind in self._scores.kinds
                for rows_T in (slice(None), slice(0, 1))
            ]
            right = counts["right"][id]
            rows.append(
                (
                    name,
                    *figures,
                    figure_text(right / found[id] if found[id] else UNDEFINED),
                    figure_text(right / objects if objects else UNDEFINED),
                    f"{objects:,}",
                    *(f"{counts[outcome][id]:,}" for outcome in ("confused", "missed", "invented")),
                )
            )
        titles = [f"{_WORDS[kind]} {figure}" for kind in self._scores.kinds for figure in ("AP", "AP50")]
        columns = ("", *titles, "precision", "recall", "objects", "called another", "missed", "invented")
        return Table(title="", columns=columns, rows=tuple(rows))

    def _gallery(self, group: str) -> Gallery:
        pictures = tuple(
            Picture(path=name.as_posix(), caption=score.caption(image.file_name))
            for (of, score, image), name in zip(self._images, self._places(), strict=True)
            if of == group
        )
        return Gallery(title=f"The {group} images", pictures=pictures)

    def _places(self) -> list[Path]:
        """The paths of the pictures."""
        names = result_names([image.path for _, _, image in self._images])
        return [
            Path(group) / name.with_name(f"{name.name}.png")
            for (group, _, _), name in zip(self._images, names, strict=True)
        ]


def sample_pictures(val_set: CocoAnnotations, results: Sequence[Record], number: int) -> Iterator[tuple[Path, bytes]]:
    """Yield names below ``pictures/`` and PNG files of images spread over a set: ground truth beside predictions.

    Args:
        val_set: the validation set.
        results: COCO-results records.
        number: maximum number of images.
    """
    images = [val_set.images[place] for place in spread(len(val_set), number)]
    for image, name in zip(images, result_names([image.path for image in images]), strict=True):
        yield name.with_name(f"{name.name}.png"), _beside(val_set, image, results)


def _beside(annotations: CocoAnnotations, image: ImageRecord, results: Sequence[Record]) -> bytes:
    picture = side_by_side(
        read_image(image.path, size=(image.width, image.height)),
        annotations.annotations_of(image.id),
        [record for record in results if record["image_id"] == image.id],
        annotations.categories,
        score_threshold=SCORE,
    )
    return png_bytes(picture)


def _line(title: str, precision_RK: NDArray[np.float64]) -> Line:
    """The mean over the categories that are defined; these are the same at every recall."""
    defined = precision_RK[:, precision_RK[0] != UNDEFINED]
    recalls = np.linspace(0, 1, len(precision_RK))
    values = defined.mean(axis=1) if defined.size else np.full(len(recalls), np.nan)
    return Line(name=title, x=tuple(recalls.round(4).tolist()), y=tuple(values.round(6).tolist()))
