"""Rules that take one label after another: the class that is pushed up most, and less of it each time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gi_lib.labels.counts import of_counts
from gi_lib.labels.layer import by_class, descent, features, last_layer, need_batch_size, need_bias, noise
from gi_lib.types import Labels, NotApplicableError, Observation, PerClass, Presence, whole


def greedy(score: PerClass, impact: Tensor, first: Presence, size: int) -> Labels:
    """One label of each of the `first` classes, then again and again the class of the smallest score, from which the
    impact of one image (negative) is subtracted each time.

    The scores that a class goes through rise in equal steps, so that the labels are those of the smallest of all.
    Where the first are more than B, the B with the smallest scores are taken.
    """
    if not impact < 0:
        raise NotApplicableError(
            "the impact of one image does not come out negative: the sums of the features are, or the network is sure"
            " of every label; use labels.ZeroShot(), which reads the bias"
        )
    n = first.long()
    if n.sum() > size:
        n = torch.zeros_like(n)
        n[score.masked_fill(~first, torch.inf).topk(size, largest=False).indices] = 1
    left = size - int(n.sum())
    ladder = (score - n * impact)[:, None] - impact * torch.arange(left, device=n.device)
    taken = ladder.flatten().topk(left, largest=False).indices.div(max(1, left), rounding_mode="floor")
    return of_counts(n + torch.bincount(taken, minlength=len(n)))


def _scores(obs: Observation, rule: str) -> tuple[PerClass, int]:
    """Row sums of the mean gradient of a step, and B."""
    size, run = need_batch_size(obs, rule), descent(obs, rule)
    return last_layer(obs)[0].double().sum(1) / run.steps, size


def llg(obs: Observation) -> Labels:
    """Label leakage from gradients (Wainakh et al., PoPETs 2022(2), arXiv:2105.09369).

    s_k = sum_d dL/dW_kd; the impact of one image is m = (1/B) (1 + 1/K) sum_{s_k < 0} s_k. Every class with s_k < 0
    is taken once, then `greedy`. Threat A with the batch size; features that are not negative; beyond B >> K half
    of the classes that are there have a positive s_k.

    Departures: never more than B labels, where the public code may return one of every negative class. T local steps
    have one label an image here, and T there.

    Raises:
        NotApplicableError: the last layer is not dense, or no sum is negative.
        WithheldError: the batch size or the client's steps are withheld.
    """
    s, size = _scores(obs, "llg")
    negative = s < 0
    return greedy(s, (1 + 1 / len(s)) * s[negative].sum() / size, negative, size)


@dataclass(frozen=True)
class LLGStar:
    """LLG with the impact and an offset from the model (Wainakh et al., arXiv:2105.09369): the server knows it.

    Dummy images that are all of class c give row sums s^(c). The impact is m = (1 + 1/K) mean_c s_c^(c) / B, the
    offset o_j = mean_{c != j} s_j^(c), and s - o is what `greedy` goes through after one label for every s_k < 0.

    Departures: noise alone, not zeros and ones as well; one set of images is taken for all classes and repetitions.
    """

    images: int = 128  # ten batches of B in the public code
    seed: int = 0
    revision = 1

    def __post_init__(self):
        whole(self, "images")
        whole(self, "seed", least=0)

    def __call__(self, obs: Observation) -> Labels:
        s, size = _scores(obs, "LLGStar")
        h, p = features(obs, noise(obs, self.images, torch.Generator().manual_seed(self.seed)))
        H = h.sum(1, keepdim=True)
        m = (1 + 1 / len(s)) * ((p - 1) * H).mean() / size
        return greedy(s - (p * H).mean(0), m, s < 0, size)


@dataclass(frozen=True)
class LLGPlus:
    """LLG* with auxiliary images of every class in place of noise (Wainakh et al., arXiv:2105.09369); threat D.

    Departures: as many images of a class as are asked for, in place of ten times B.
    """

    images: int = 20  # of each class
    seed: int = 0
    revision = 1

    def __post_init__(self):
        whole(self, "images")
        whole(self, "seed", least=0)

    def __call__(self, obs: Observation) -> Labels:
        s, size = _scores(obs, "LLGPlus")
        x, of = by_class(obs, "LLGPlus", self.images, torch.Generator().manual_seed(self.seed))
        h, p = features(obs, x)
        H = h.sum(1, keepdim=True)
        others = of @ (p * H)  # [c, j]: the row sum of class j for a batch of class c, without its own -1
        m = (1 + 1 / len(s)) * (others.diagonal() - (of @ H).squeeze(1)).mean() / size
        o = (others.sum(0) - others.diagonal()) / (len(s) - 1)
        return greedy(s - o, m, s < 0, size)


def bias_greedy(obs: Observation) -> Labels:
    """The default of the public framework breaching (Geiping, Fowl, Wen), which is no paper's.

    The impact is m = (1/B) sum_{gb_k < 0} gb_k; every class with a negative gb_k is taken once, then `greedy`. Whatever
    the features, it is right while labels are few against the classes, and wrong from B > K on. Threat B.

    Departures: no labels at random, since no place is left for them.

    Raises:
        NotApplicableError: the last layer has no bias, or no entry is negative.
        WithheldError: the batch size or the client's steps are withheld.
    """
    size, run = need_batch_size(obs, "bias_greedy"), descent(obs, "bias_greedy")
    gb = need_bias(obs, "bias_greedy", "labels.llg")[1].double() / run.steps
    negative = gb < 0
    return greedy(gb, gb[negative].sum() / size, negative, size)


@dataclass(frozen=True)
class LLBG:
    """Labels from bias gradients alone, whatever the activation ("Harmful Bias", Gat, Sharif, AISec 2024).

    The impact and the offset are measured on dummy images as in LLG*, of the bias in place of the row sums: m =
    (mean p - 1) / B and o = mean p, so that it is zero-shot counts rounded by `greedy`.

    Departures: written from second-hand notes; neither the paper nor its code was read.
    """

    images: int = 128
    seed: int = 0
    revision = 1

    def __post_init__(self):
        whole(self, "images")
        whole(self, "seed", least=0)

    def __call__(self, obs: Observation) -> Labels:
        size, run = need_batch_size(obs, "LLBG"), descent(obs, "LLBG")
        gb = need_bias(obs, "LLBG", "labels.LLGStar()")[1].double() / run.steps
        p = features(obs, noise(obs, self.images, torch.Generator().manual_seed(self.seed)))[1].mean(0)
        return greedy(gb - p, (p - 1).mean() / size, gb < 0, size)
