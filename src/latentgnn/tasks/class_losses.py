"""Losses of semantic segmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from latentgnn.tasks.classes import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of the labelled nodes; 0, with zero gradients, if there are none.

    Args:
        logits: (T, K), or maps (B, K, H, W).
        labels: classes or `IGNORE`, (T,) or (B, H, W).
        weight: weights of the classes, (K,); the mean is weighted by the nodes' weights, as in PyTorch.
        label_smoothing: see `torch.nn.functional.cross_entropy`.
    """
    if not bool((labels != IGNORE).any()):
        return logits.sum() * 0
    return F.cross_entropy(logits, labels, weight, ignore_index=IGNORE, label_smoothing=label_smoothing)


def class_weights(counts: NDArray[np.int64], power: float) -> Tensor:
    """Return class weights for a loss: frequencies to the power of ``-power``, scaled to a mean of 1 over all nodes.

    Args:
        counts: nodes of each class, shape (K,).
        power: 0 gives all nodes the same weight, 1 gives all classes the same weight.

    Returns:
        float32, shape (K,); 0 for a class without nodes.
    """
    frequency = counts / counts.sum()
    weight = np.zeros(len(counts))
    weight[counts > 0] = frequency[counts > 0] ** -power
    return torch.from_numpy(weight / (frequency * weight).sum()).float()


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the Lovasz extension of the mean Jaccard loss over the classes that occur (Berman et al., CVPR 2018,
    arXiv 1705.08790); 0, with zero gradients, if no point is labelled.

    Args:
        logits: (T, K).
        labels: (T,), classes or `IGNORE`.
    """
    labelled = labels != IGNORE
    probability_TK = logits[labelled].float().softmax(dim=1)
    truth_TK = F.one_hot(labels[labelled], logits.shape[1]).to(probability_TK.dtype)
    present = truth_TK.any(dim=0)
    if not bool(present.any()):
        return logits.sum() * 0
    truth_TK, probability_TK = truth_TK[:, present], probability_TK[:, present]
    error_TK, order_TK = (truth_TK - probability_TK).abs().sort(dim=0, descending=True)
    truth_TK = truth_TK.gather(0, order_TK)
    total_K = truth_TK.sum(dim=0)
    # The Jaccard loss if all points up to this one, which have the largest errors, were wrong and all others right.
    jaccard_TK = 1 - (total_K - truth_TK.cumsum(dim=0)) / (total_K + (1 - truth_TK).cumsum(dim=0))
    growth_TK = torch.cat((jaccard_TK[:1], jaccard_TK.diff(dim=0)))
    return (error_TK * growth_TK).sum(dim=0).mean()
