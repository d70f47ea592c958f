"""Which detection found which object, and what a report says of it: worked out by hand, and against COCO's figures."""

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgnn.tasks.detection.analysis import Analysis, ImageScore, image_scores
from latentgnn.tasks.detection.coco import CocoAnnotations
from latentgnn.tasks.detection.evaluation import CocoEvaluator, Match
from latentgnn.tasks.detection.results import load_results
from latentgnn.training.figures import UNDEFINED

CAT, DOG = 3, 7


def box(image: int, category: int, place: list[int], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": place, **more}


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """Three images: cats and dogs on the first two, nothing on the third."""
    objects = [
        box(1, CAT, [0, 0, 10, 10]),
        box(1, DOG, [20, 0, 10, 10]),
        box(1, DOG, [50, 50, 40, 40], iscrowd=1),
        box(2, DOG, [20, 0, 10, 10]),
        box(2, CAT, [60, 60, 10, 10]),
    ]
    for number in (1, 2, 3):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{number}.png")
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in (1, 2, 3)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": n, "area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0, **item} for n, item in enumerate(objects)
        ],
    }


RESULTS = [
    box(1, CAT, [0, 0, 10, 10], score=0.9),
    # Better than the dog's own detection, and of another category: the dog is found all the same.
    box(1, CAT, [20, 0, 10, 10], score=0.8),
    box(1, DOG, [20, 0, 10, 9], score=0.7),
    # Within a crowd: neither right nor wrong.
    box(1, DOG, [55, 55, 10, 10], score=0.7),
    box(1, DOG, [70, 60, 10, 10], score=0.7),
    # A dog that is called a cat, and a second one of the same.
    box(2, CAT, [20, 0, 10, 9], score=0.6),
    box(2, CAT, [20, 0, 10, 10], score=0.5),
    # Too little of the cat: an overlap of 40 of 160.
    box(2, CAT, [60, 66, 10, 10], score=0.9),
    box(3, DOG, [1, 1, 5, 5], score=0.5),
    # No claim.
    box(3, DOG, [30, 30, 5, 5], score=0.4),
]
CLAIMS = [record for record in RESULTS if record["score"] >= 0.5]
MATCHES = Counter(
    [
        Match(1, CAT, CAT),
        Match(1, DOG, DOG),
        Match(1, None, CAT),
        Match(2, DOG, CAT),
        Match(2, None, CAT),
        Match(2, None, CAT),
        Match(2, CAT, None),
        Match(3, None, DOG),
    ]
)


def test_matches_are_those_worked_out_by_hand(dataset: dict[str, Any]) -> None:
    evaluator = CocoEvaluator(dataset, kinds=("bbox",))
    before = json.dumps(CLAIMS)
    assert Counter(evaluator.matches("bbox", CLAIMS)) == MATCHES
    assert Counter(evaluator.matches("bbox", CLAIMS)) == MATCHES
    assert json.dumps(CLAIMS) == before
    # With less overlap asked for, the cat that was hit in part is found.
    looser = Counter(evaluator.matches("bbox", CLAIMS, iou=0.2))
    assert looser[Match(2, CAT, CAT)] == 1
    assert looser[Match(2, CAT, None)] == 0


def test_without_detections_all_objects_are_missed(dataset: dict[str, Any]) -> None:
    missed = [Match(1, CAT, None), Match(1, DOG, None), Match(2, CAT, None), Match(2, DOG, None)]
    assert sorted(CocoEvaluator(dataset, kinds=("bbox",)).matches("bbox", []), key=str) == sorted(missed, key=str)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_objects_found_are_those_of_coco_recall(shared: Callable[[str], Path], kind: Any) -> None:
    """On real annotations and the official fake results, faster-coco-eval's own recall counts the same objects."""
    folder = shared("coco_eval")
    dataset = json.loads((folder / "instances_val2014_100.json").read_text())
    results = load_results(folder / f"instances_val2014_fake{kind}100_results.json", dataset)
    evaluator = CocoEvaluator(dataset, kinds=(kind,))
    matches = evaluator.matches(kind, results)
    _, recall_TKAM = evaluator._evaluate(kind, results)
    objects = Counter(match.truth for match in matches if match.truth is not None)
    right = Counter(match.truth for match in matches if match.truth is not None and match.truth == match.found)
    assert sum(right.values()) > 300
    for index, category in enumerate(evaluator.category_names):
        recall = recall_TKAM[0, index, 0, -1]
        assert (objects[category] == 0) == (recall == UNDEFINED)
        if objects[category]:
            assert right[category] / objects[category] == pytest.approx(recall)
    annotated = [annotation for annotation in dataset["annotations"] if not annotation["iscrowd"]]
    assert sum(objects.values()) == len(annotated)


def test_images_are_ordered_by_their_f1() -> None:
    scores = image_scores(
        [
            *(Match(1, CAT, CAT), Match(1, DOG, DOG), Match(1, None, DOG)),
            *(Match(2, CAT, CAT),),
            *(Match(3, CAT, DOG),),
            *(Match(4, CAT, None), Match(4, DOG, None)),
            *(Match(5, CAT, CAT), Match(5, CAT, CAT)),
        ]
    )
    assert [(score.image_id, score.f1) for score in scores] == [(4, 0), (3, 0), (1, 0.8), (2, 1), (5, 1)]
    assert scores[1] == ImageScore(image_id=3, right=0, confused=1, missed=0, invented=0)
    assert scores[2].caption("a.png") == "a.png: F1 0.80; 2 right, 1 where nothing is"


def analysis_of(dataset: dict[str, Any], folder: Path, pictures: int) -> Analysis:
    evaluator = CocoEvaluator(dataset, kinds=("bbox",))
    val_set = CocoAnnotations(dataset, folder)
    return Analysis(evaluator, val_set, evaluator.score(RESULTS), RESULTS, pictures=pictures)


def test_the_sections_hold_what_the_matches_say(dataset: dict[str, Any], tmp_path: Path) -> None:
    curves, categories, confusion, images = analysis_of(dataset, tmp_path, 4).sections()
    [matrix] = confusion.matrices
    assert matrix.rows == ("cat", "dog", "nothing there")
    assert matrix.columns == ("cat", "dog", "not found")
    assert matrix.counts == ((1, 0, 1), (1, 1, 0), (3, 1, 0))
    [table] = categories.tables
    by_name = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    # Of five cats that were claimed one is one, of two that are there one was found.
    shown = ("precision", "recall", "objects", "called another", "missed", "invented")
    assert [by_name["cat"][name] for name in shown] == ["0.200", "0.500", "2", "0", "1", "3"]
    assert [by_name["dog"][name] for name in shown] == ["0.500", "0.500", "2", "1", "0", "1"]
    assert [chart.title for chart in curves.charts] == ["Mean over categories, box", "Each category, box, IoU 0.5"]
    worst, best = images.galleries
    # Of the first image, the only one with anything right, the mistake counts first.
    assert [picture.path for picture in worst.pictures] == ["worst/2.png", "worst/3.png"]
    assert [picture.path for picture in best.pictures] == ["best/1.png"]


def test_curves_have_the_average_precision_as_their_mean(dataset: dict[str, Any], tmp_path: Path) -> None:
    evaluator = CocoEvaluator(dataset, kinds=("bbox",), per_category=True)
    scores = evaluator.score(RESULTS)
    sections = Analysis(evaluator, CocoAnnotations(dataset, tmp_path), scores, RESULTS, pictures=0).sections()
    mean, each = sections[0].charts
    lines = {line.name: line for line in (*mean.lines, *each.lines)}
    assert lines["IoU 0.5"].x == tuple(np.linspace(0, 1, 101).round(4).tolist())
    for name, figure in {
        "IoU 0.5": scores.metrics["bbox/AP50"],
        "IoU 0.75": scores.metrics["bbox/AP75"],
        "IoU 0.5 to 0.95": scores.metrics["bbox/AP"],
        "cat": scores.per_category["cat"]["bbox/AP50"],
        "dog": scores.per_category["dog"]["bbox/AP50"],
    }.items():
        assert np.mean(lines[name].y) == pytest.approx(figure, abs=1e-5), name


def test_pictures_lie_where_the_report_looks_for_them(dataset: dict[str, Any], tmp_path: Path) -> None:
    analysis = analysis_of(dataset, tmp_path, 4)
    drawn = {name.as_posix(): content for name, content in analysis.pictures()}
    galleries = analysis.sections()[-1].galleries
    assert list(drawn) == [picture.path for gallery in galleries for picture in gallery.pictures]
    for content in drawn.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG"
    assert analysis_of(dataset, tmp_path, 0).sections()[-1].galleries[0].pictures == ()
