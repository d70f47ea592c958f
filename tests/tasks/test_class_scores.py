from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from latentgnn.tasks.class_losses import cross_entropy, lovasz_softmax
from latentgnn.tasks.class_scores import Scores, confusion_matrix

NAMES = ("ground", "tree", "roof", "car")


def _labelled(seed, classes=4, number=500):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, classes, number)
    predictions = np.where(rng.random(number) < 0.6, labels.clip(0), rng.integers(0, 4, number))
    return labels, predictions


@pytest.mark.parametrize("seed", range(3))
def test_figures_agree_with_torchmetrics(seed):
    labels, predictions = _labelled(seed)
    confusion = confusion_matrix(labels, predictions, 4)
    scores = Scores(class_names=NAMES, confusion=confusion)
    given = torch.from_numpy(predictions), torch.from_numpy(labels), 4
    theirs = {"num_classes": 4, "ignore_index": -1}
    assert (confusion == multiclass_confusion_matrix(*given[:2], **theirs).numpy()).all()
    iou = multiclass_jaccard_index(*given[:2], **theirs, average="none")
    np.testing.assert_allclose(scores.iou, iou, atol=1e-6)
    metrics = scores.metrics
    assert metrics["mIoU"] == pytest.approx(float(iou.mean()), abs=1e-6)
    assert metrics["OA"] == pytest.approx(float(multiclass_accuracy(*given[:2], **theirs, average="micro")), abs=1e-6)
    assert metrics["mAcc"] == pytest.approx(float(multiclass_accuracy(*given[:2], **theirs)), abs=1e-6)
    assert metrics["IoU/roof"] == pytest.approx(float(iou[2]), abs=1e-6)


def test_classes_that_do_not_occur_are_in_no_mean():
    # Class 2 occurs nowhere; class 3 is only ever taken by mistake.
    labels, predictions = np.array([0, 0, 1, 1, -1]), np.array([0, 3, 1, 1, 2])
    scores = Scores(class_names=NAMES, confusion=confusion_matrix(labels, predictions, 4))
    assert scores.iou.tolist() == [0.5, 1.0, -1.0, 0.0]
    assert scores.metrics["mIoU"] == pytest.approx(0.5)
    assert scores.metrics["mAcc"] == pytest.approx(0.75)
    assert scores.metrics["OA"] == pytest.approx(0.75)
    assert "n/a" in scores.table()
    assert scores.to_json()["confusion"][0] == [1, 0, 0, 1]
    nothing = Scores(class_names=NAMES, confusion=np.zeros((4, 4), np.int64))
    assert set(nothing.metrics.values()) == {-1.0}


def test_the_lovasz_loss_of_certain_predictions_is_the_jaccard_loss():
    for seed in range(4):
        labels, predictions = _labelled(seed, classes=3)
        logits = 200.0 * torch.nn.functional.one_hot(torch.from_numpy(predictions), 4).float()
        iou = Scores(class_names=NAMES, confusion=confusion_matrix(labels, predictions, 4)).iou
        present = np.unique(labels[labels >= 0])
        loss = lovasz_softmax(logits, torch.from_numpy(labels))
        assert float(loss) == pytest.approx(1 - iou[present].mean(), abs=1e-5)


def test_the_lovasz_loss_is_the_mean_over_thresholds():
    # The extension's value is the integral of the set function over the level sets of the errors.
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(30, 2, generator=generator), torch.randint(0, 2, (30,), generator=generator)
    expected = []
    for label in (0, 1):
        truth = labels == label
        error = (truth.float() - logits.softmax(dim=1)[:, label]).abs()
        levels = torch.cat((torch.zeros(1), error.sort().values))
        total = 0.0
        for low, high in pairwise(levels):
            wrong = error >= high
            predicted = truth ^ wrong
            total += float(high - low) * (1 - float((truth & predicted).sum()) / float((truth | predicted).sum()))
        expected.append(total)
    assert float(lovasz_softmax(logits, labels)) == pytest.approx(sum(expected) / 2, abs=1e-5)


def test_cross_entropy_is_pytorchs_and_finite_without_labels():
    logits, labels = torch.randn(20, 4, requires_grad=True), torch.arange(20) % 5 - 1
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    expected = torch_cross_entropy(logits[labels >= 0], labels[labels >= 0], weight)
    torch.testing.assert_close(cross_entropy(logits, labels, weight), expected)
    nothing = torch.full((20,), -1)
    loss = cross_entropy(logits, nothing, weight) + lovasz_softmax(logits, nothing)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
