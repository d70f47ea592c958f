import copy
import json
import logging

import numpy as np
import pytest
import torch

from latentgnn.errors import UserError
from latentgnn.tasks.detection.evaluation import CocoEvaluator
from latentgnn.tasks.detection.results import encode_masks, kinds_of, load_results, records_of
from latentgnn.tasks.detection.segmentations import decode_masks

EXPECTED_NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


def polygon(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def truth(boxes, *, size=400, categories=((1, "cell"),), category_ids=None):
    """A COCO dict of one image with rectangles."""
    category_ids = category_ids or [categories[0][0]] * len(boxes)
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": size, "height": size}],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": [
            {
                "id": i,
                "image_id": 7,
                "category_id": category,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": polygon(box),
            }
            for i, (box, category) in enumerate(zip(boxes, category_ids, strict=True), 1)
        ],
    }


def detected(box, score, category=1):
    return {
        "image_id": 7,
        "category_id": category,
        "score": score,
        "bbox": list(box),
        "segmentation": polygon(box),
    }


def grid(count, side=10):
    return [(20 * (i % 20), 20 * (i // 20), side, side) for i in range(count)]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_agrees_with_the_published_figures(shared, kind):
    folder = shared("coco_eval")
    dataset = json.loads((folder / "instances_val2014_100.json").read_text())
    expected = json.loads((folder / "expected_stats.json").read_text())
    results = load_results(folder / f"instances_val2014_fake{kind}100_results.json", dataset)
    scores = CocoEvaluator(dataset, kinds=[kind], per_category=True).score(results)
    assert list(scores.metrics) == [f"{kind}/{name}" for name in EXPECTED_NAMES]
    reference = expected[f"instances_val2014_100 vs fake{kind}100 ({kind})"]
    assert list(scores.metrics.values()) == pytest.approx(reference, rel=0, abs=1e-9)
    # COCO's AP is the mean over the categories that the ground truth has.
    assert len(scores.per_category) == 80
    for name in ("AP", "AP50"):
        defined = [values[f"{kind}/{name}"] for values in scores.per_category.values()]
        assert np.mean([v for v in defined if v != -1]) == pytest.approx(scores.metrics[f"{kind}/{name}"])


def test_kinds_together_are_the_kinds_alone(shared):
    folder = shared("coco_eval")
    dataset = json.loads((folder / "instances_val2014_100.json").read_text())
    results = load_results(folder / "instances_val2014_fakesegm100_results.json", dataset)
    both = CocoEvaluator(dataset).score(results).metrics
    reference = json.loads((folder / "expected_stats.json").read_text())
    segm = reference["instances_val2014_100 vs fakesegm100 (segm)"]
    assert [both[f"segm/{name}"] for name in EXPECTED_NAMES] == pytest.approx(segm, rel=0, abs=1e-9)
    assert both["bbox/AP"] > both["segm/AP"]


@pytest.mark.parametrize("name", ["nuclei/instances_val", "coco_mini/instances_val2017"])
def test_ground_truth_scored_against_itself_is_perfect(shared, name):
    folder, _, file = name.partition("/")
    dataset = json.loads((shared(folder) / "annotations" / f"{file}.json").read_text())
    results = [a | {"score": 0.5} for a in dataset["annotations"] if not a["iscrowd"]]
    metrics = CocoEvaluator(dataset, max_detections=(1, 10, 1000)).score(results).metrics
    perfect = {name: v for name, v in metrics.items() if "AR_1" not in name} | {
        kind: metrics[f"{kind}/AR_1000"] for kind in ("bbox", "segm")
    }
    assert set(perfect.values()) <= {1.0, -1.0}
    assert perfect["segm"] == 1


def test_three_detections_by_hand():
    dataset = truth([(0, 0, 10, 10), (100, 100, 10, 10)])
    results = [detected((0, 0, 10, 10), 0.9), detected((200, 200, 10, 10), 0.8), detected((100, 100, 10, 7.2), 0.7)]
    # The last matches at the thresholds 0.50 to 0.70, five of ten. Of COCO's 101 recalls 51 are at most one half.
    without, with_it = 51 / 101, (51 + 50 * 2 / 3) / 101
    metrics = CocoEvaluator(dataset, kinds=["bbox"]).score(results).metrics
    assert metrics == pytest.approx(
        {
            "bbox/AP": (without + with_it) / 2,
            "bbox/AP50": with_it,
            "bbox/AP75": without,
            "bbox/AP_small": (without + with_it) / 2,
            "bbox/AP_medium": -1,
            "bbox/AP_large": -1,
            "bbox/AR_1": 0.5,
            "bbox/AR_10": 0.75,
            "bbox/AR_100": 0.75,
            "bbox/AR_small": 0.75,
            "bbox/AR_medium": -1,
            "bbox/AR_large": -1,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize(
    ("limits", "ap", "recalls"),
    [
        ((1, 10, 100), 0.5 * 34 / 101, (0, 0, 1 / 3)),
        ((1, 10, 200), 0.75, (0, 0, 1)),
        ((60, 120), None, (1 / 15, 7 / 15)),
    ],
)
def test_ap_is_taken_at_the_last_limit(limits, ap, recalls):
    boxes = grid(200)
    dataset = truth(boxes[:150])
    # Fifty misses lead: at rank 50 + k, k are right, so the precision that is still to come is that of the last rank.
    results = [detected(box, 0.9) for box in boxes[150:]] + [detected(box, 0.5) for box in boxes[:150]]
    metrics = CocoEvaluator(dataset, max_detections=limits).score(results).metrics
    if ap is None:
        ap = 70 / 120 * 47 / 101
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "AP_small"):
            assert metrics[f"{kind}/{name}"] == pytest.approx(ap, abs=1e-12)
        assert [metrics[f"{kind}/AR_{limit}"] for limit in limits] == pytest.approx(recalls, abs=1e-12)
        assert metrics[f"{kind}/AR_small"] == pytest.approx(recalls[-1], abs=1e-12)


def test_mask_area_decides_the_size_of_a_mask():
    """A missed mask of 20 x 20 pixels within a box of 40 x 40 is small as a mask and medium as a box."""
    dataset = truth([(0, 0, 10, 10)])
    missed = detected((100, 100, 40, 40), 0.9) | {"segmentation": polygon((110, 110, 20, 20))}
    metrics = CocoEvaluator(dataset).score([missed, detected((0, 0, 10, 10), 0.5)]).metrics
    assert metrics["segm/AP_small"] == pytest.approx(0.5)
    assert metrics["bbox/AP_small"] == pytest.approx(1)


def test_crowds_neither_count_nor_cost():
    dataset = truth([(0, 0, 10, 10), (100, 100, 200, 200)])
    dataset["annotations"][1]["iscrowd"] = 1
    mask = np.zeros((400, 400), np.uint8)
    mask[100:300, 100:300] = 1
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [0]])))
    counts = np.diff(np.concatenate([[0], runs, [mask.size]])).tolist()
    dataset["annotations"][1]["segmentation"] = {"size": [400, 400], "counts": counts}
    results = [detected((120, 120, 20, 20), 0.9), detected((0, 0, 10, 10), 0.5)]
    metrics = CocoEvaluator(dataset).score(results).metrics
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(1)


def test_annotation_ids_do_not_matter():
    boxes = grid(3)
    dataset = truth(boxes)
    for annotation in dataset["annotations"]:
        annotation["id"] = 0
    assert CocoEvaluator(dataset).score([detected(box, 0.9) for box in boxes]).metrics["bbox/AP"] == pytest.approx(1)


def test_no_results_score_zero():
    scores = CocoEvaluator(truth([(0, 0, 10, 10)]), per_category=True).score([])
    assert {value for name, value in scores.metrics.items() if "medium" not in name and "large" not in name} == {0.0}
    assert {value for name, value in scores.metrics.items() if "medium" in name or "large" in name} == {-1.0}
    assert scores.per_category == {"cell": {"bbox/AP": 0, "bbox/AP50": 0, "segm/AP": 0, "segm/AP50": 0}}


@pytest.mark.parametrize("crowd", [False, True])
def test_no_ground_truth_is_an_error(crowd):
    dataset = truth([(0, 0, 10, 10)] if crowd else [])
    for annotation in dataset["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(UserError, match="1 images and no objects"):
        CocoEvaluator(dataset)


def test_inputs_are_left_alone_and_nothing_is_printed(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    dataset, results = truth(grid(3)), [detected(box, 0.9) for box in grid(3)]
    before = copy.deepcopy((dataset, results))
    evaluator = CocoEvaluator(dataset)
    assert evaluator.score(results) == evaluator.score(results)
    assert (dataset, results) == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_per_category_by_hand():
    categories = ((3, "cell"), (9, "cell"), (20, "fibre"))
    dataset = truth([(0, 0, 10, 10), (50, 50, 10, 10)], categories=categories, category_ids=[3, 9])
    scores = CocoEvaluator(dataset, kinds=["bbox"], per_category=True).score([detected((50, 50, 10, 10), 0.5, 9)])
    assert scores.per_category == {
        "cell (3)": {"bbox/AP": 0.0, "bbox/AP50": 0.0},
        "cell (9)": {"bbox/AP": pytest.approx(1), "bbox/AP50": pytest.approx(1)},
        "fibre": {"bbox/AP": -1.0, "bbox/AP50": -1.0},
    }
    assert scores.metrics["bbox/AP"] == pytest.approx(0.5)


def test_table_and_json():
    dataset = truth([(0, 0, 10, 10)])
    scores = CocoEvaluator(dataset, per_category=True, max_detections=(1, 10, 200)).score([detected((0, 0, 10, 10), 1)])
    lines = scores.table().splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR200", "ARs", "ARm", "ARl"]
    assert lines[1].split() == ["box", *["1.000"] * 4, "n/a", "n/a", *["1.000"] * 4, "n/a", "n/a"]
    assert lines[2].split()[0] == "mask"
    assert lines[4].split() == ["category", "box", "AP", "box", "AP50", "mask", "AP", "mask", "AP50"]
    assert lines[5].split() == ["cell", *["1.000"] * 4]
    data = json.loads(json.dumps(scores.to_json()))
    assert data["metrics"]["segm/AP_large"] == -1
    assert data["metrics"]["bbox/AR_200"] == 1
    assert data["max_detections"] == [1, 10, 200]
    assert list(data["per_category"]) == ["cell"]


def test_outputs_become_records():
    masks = torch.zeros(2, 1, 5, 7)
    masks[0, 0, 1:3, 2:6] = 0.51
    masks[0, 0, 4, 0] = 0.5
    masks[1, 0, :, 6] = 1
    output = {
        "boxes": torch.tensor([[2.25, 1, 6, 3], [6, 0, 7, 5]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.75, 0.5]),
        "masks": masks,
    }
    empty = {name: value[:0] for name, value in output.items()}
    evaluator = CocoEvaluator(truth([(0, 0, 5, 5)], categories=((18, "cell"), (90, "fibre"))))
    records = evaluator.results_of([empty, output], [7, 42], {1: 18, 2: 90})
    assert [(r["image_id"], r["category_id"], r["score"]) for r in records] == [(42, 90, 0.75), (42, 18, 0.5)]
    assert records[0]["bbox"] == [2.25, 1, 3.75, 2]
    assert json.loads(json.dumps(records)) == records
    for record, mask in zip(records, masks[:, 0] > 0.5, strict=True):
        assert np.array_equal(decode_masks([record["segmentation"]], 5, 7)[0], mask.numpy())
    del output["masks"]
    assert "segmentation" not in records_of(output, 42, {1: 18, 2: 90})[0]
    with pytest.raises(ValueError, match="2 outputs came with 1 image ids"):
        evaluator.results_of([empty, output], [7], {1: 18, 2: 90})


def test_detections_of_categories_without_ground_truth_do_not_count():
    output = {
        "boxes": torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 5]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.5]),
    }
    evaluator = CocoEvaluator(truth([(0, 0, 5, 5)]), kinds=("bbox",))
    records = evaluator.results_of([output], [7], {1: 1, 2: 2})
    assert [record["category_id"] for record in records] == [1]
    assert evaluator.score(records).metrics["bbox/AP"] == pytest.approx(1)


def test_mask_codec_is_the_published_format():
    """The text for a 2 x 2 square at (1, 2) of a 5 x 7 image, worked out from COCO's format by hand."""
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[0, 1:3, 2:4] = True
    # Runs 11, 2, 3, 2, 17; from the fourth on as differences to the run two before: 11, 2, 3, 0, 14; plus 48 in ASCII.
    assert encode_masks(mask) == [{"size": [5, 7], "counts": ";230>"}]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [401, 400], "counts": [401 * 400]},
        {"size": [400, 400], "counts": [11, 2]},
        {"size": [400, 400], "counts": "PPPPP1"},
        {"size": [400, 400], "counts": "\u00e9garbage"},
        {"size": [400.0, 400.0], "counts": [400 * 400]},
        {"size": ["400", 400], "counts": [400 * 400]},
        {"size": None, "counts": [400 * 400]},
        [[1.0, 2.0, 1e12, 3.0, 5.0, 6.0]],
        {"size": [400, 400]},
        "text",
        [["a", "b"]],
        None,
    ],
)
def test_segmentations_that_do_not_decode(tmp_path, segmentation):
    record = detected((0, 0, 10, 10), 0.9) | {"segmentation": segmentation}
    with pytest.raises(UserError, match="record 0 has a segmentation that cannot be used"):
        CocoEvaluator(truth([(0, 0, 10, 10)])).score([record])
    path = tmp_path / "results.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"results\.json: record 0 has a segmentation"):
        load_results(path, truth([(0, 0, 10, 10)]))


def test_a_detection_may_have_no_pixel():
    record = detected((0, 0, 10, 10), 0.9) | {"segmentation": {"size": [400, 400], "counts": [400 * 400]}}
    assert CocoEvaluator(truth([(0, 0, 10, 10)])).score([record]).metrics["segm/AP"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "record 1 is for image 8"),
        ({"category_id": 5}, "record 1 has category 5; the annotations have 1"),
        ({"score": float("nan")}, "score.* finite number"),
        ({"image_id": [1]}, r"record 1 is for image \[1\]"),
        ({"category_id": True}, "record 1 has category true"),
        ({"score": "high"}, 'record 1 has score "high"'),
        ({"bbox": [1, 2, 3]}, r"record 1 has bbox \[1, 2, 3\]"),
        ({"bbox": [1, 2, -3, 4]}, "width, height"),
        ({"score": None}, "score null"),
    ],
)
def test_faulty_records_are_named(tmp_path, change, message):
    dataset, good = truth([(0, 0, 10, 10)]), detected((0, 0, 10, 10), 0.9)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([good, good | change]))
    with pytest.raises(UserError, match=message) as error:
        load_results(path, dataset)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match=message):
        CocoEvaluator(dataset).score([good, good | change])


def test_missing_keys_are_named(tmp_path):
    dataset, good = truth([(0, 0, 10, 10)]), detected((0, 0, 10, 10), 0.9)
    for missing, message in [
        (("score",), "record 0 has no 'score'"),
        (("image_id", "score"), "record 0 has no 'image_id' and no 'score'"),
        (("bbox", "segmentation"), "neither 'bbox' nor 'segmentation'"),
    ]:
        path = tmp_path / "results.json"
        path.write_text(json.dumps([{key: value for key, value in good.items() if key not in missing}]))
        with pytest.raises(UserError, match=message):
            load_results(path, dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n  {"image_id": 7,}\n]', "line 2, column .*malformed JSON"),
        ('{"annotations": []}', "a list of result records was expected, not an object; this looks like an annotation"),
        ("3", "a list of result records was expected, not int"),
        ("[4]", "record 0 is int, not an object"),
    ],
)
def test_faulty_files_are_named(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_results(path, truth([(0, 0, 10, 10)]))
    with pytest.raises(UserError, match=r"absent\.json: there is no such file"):
        load_results(tmp_path / "absent.json", truth([(0, 0, 10, 10)]))


def test_boxes_without_masks_cannot_be_scored_as_masks():
    dataset, record = truth([(0, 0, 10, 10)]), detected((0, 0, 10, 10), 0.9)
    assert kinds_of([record]) == ("bbox", "segm")
    del record["segmentation"]
    assert kinds_of([record]) == ("bbox",)
    with pytest.raises(UserError, match="record 0 has no 'segmentation'"):
        CocoEvaluator(dataset).score([record])
    assert CocoEvaluator(dataset, kinds=("bbox",)).score([record]).metrics["bbox/AP"] == pytest.approx(1)


def test_ground_truth_that_lacks_masks_or_areas():
    dataset = truth([(0, 0, 10, 10)])
    del dataset["annotations"][0]["area"]
    scores = CocoEvaluator(dataset).score([detected((0, 0, 10, 10), 0.9)])
    assert scores.metrics["segm/AP_small"] == pytest.approx(1)
    dataset["annotations"][0]["segmentation"] = []
    with pytest.raises(UserError, match="annotation 1 has no 'segmentation'"):
        CocoEvaluator(dataset)
    boxes = CocoEvaluator(dataset, kinds=("bbox",)).score([detected((0, 0, 10, 10), 0.9)])
    assert boxes.metrics["bbox/AP_small"] == pytest.approx(1)


@pytest.mark.parametrize("limits", [(), (0, 10), (10, 1, 100), (10, 10, 100)])
def test_limits_must_ascend(limits):
    with pytest.raises(ValueError, match="positive and ascending"):
        CocoEvaluator(truth([(0, 0, 10, 10)]), max_detections=limits)


def test_kinds_and_keys_are_checked():
    with pytest.raises(ValueError, match="'bbox' and 'segm'"):
        CocoEvaluator(truth([(0, 0, 10, 10)]), kinds=("box",))
    with pytest.raises(UserError, match="no 'annotations' and no 'categories'"):
        CocoEvaluator({"images": []})
