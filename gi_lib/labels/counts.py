"""Rules that count: each is an estimate of the mean softmax in n = B (mean_i p_i - dL/db)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from gi_lib.labels.layer import (
    Inputs,
    by_class,
    descent,
    features,
    head,
    last_layer,
    need_batch_size,
    need_bias,
    noise,
)
from gi_lib.types import Counts, Labels, NotApplicableError, Observation, PerClass, function, real, whole

LARGEST = 2.0**40
"""No count is above it; sums of so many are exact."""


def apportion(raw: PerClass, total: int) -> Counts:
    """Whole numbers >= 0 that sum to `total` and are nearest to `raw`: the floors, and one more where the rest is
    largest (as public code of zero-shot counts rounds; in elections it is Hamilton's method)."""
    raw = raw.double()
    n = raw.floor().clamp(0, LARGEST)
    rest = raw - n
    while short := total - int(n.sum()):
        some = (n >= 0 if short > 0 else n > 0).nonzero().flatten()
        chosen = some[rest[some].topk(min(abs(short), len(some)), largest=short > 0).indices]
        step = abs(short) // len(chosen)  # where all change, that often at once: an absurd estimate is far off
        step = step if short > 0 else -min(step, int(n[chosen].min()))
        n[chosen] += step
        rest[chosen] -= step
    return n.long()


def of_counts(n: Counts) -> Labels:
    """The labels [B], ascending, of which class k is n_k."""
    return torch.arange(len(n), device=n.device).repeat_interleave(n)


class CountRule(ABC):
    """A rule that estimates n [K]; called, it gives the labels of the nearest whole numbers that sum to B."""

    @abstractmethod
    def raw(self, obs: Observation) -> PerClass:
        """n before rounding; it may have negative entries.

        Raises:
            NotApplicableError: the rule can't work here; the sentence says why.
            WithheldError: the threat model withholds what it needs.
        """

    def __call__(self, obs: Observation) -> Labels:
        raw = self.raw(obs)
        if not raw.isfinite().all():
            raise NotApplicableError(
                f"{type(self).__name__} found no finite counts: the model's outputs are not finite on its inputs"
            )
        return of_counts(apportion(raw, need_batch_size(obs, type(self).__name__)))


@dataclass(frozen=True)
class DummyRule(CountRule):
    """A rule that looks at what the network makes of dummy images."""

    images: int = 128  # "100 or more" in public code
    seed: int = 0  # of the noise
    inputs: Inputs = noise

    def __post_init__(self):
        whole(self, "images")
        whole(self, "seed", least=0)
        function(self, "inputs")


@dataclass(frozen=True)
class ZeroShot(DummyRule):
    """The mean softmax of dummy images stands for that of the batch (Geng et al., arXiv:2110.09074).

    n = B (pbar - gb / T) for the sum gb of T gradients; pbar is the mean softmax of the inputs. For several steps pbar
    is taken before and after the round and goes from one to the other in equal steps, as Dimitrov et al.
    (arXiv:2206.12395) do it. Threat A with the batch size; with several steps the training details.

    Departures: none in this form. With `inputs=surrogate` the images are the attacker's own (threat D), which a
    trained network needs: to noise it does not answer as it does to images.
    """

    revision = 1

    def raw(self, obs: Observation) -> PerClass:
        size, run = need_batch_size(obs, "ZeroShot"), descent(obs, "ZeroShot")
        _, gb = need_bias(obs, "ZeroShot", "labels.ZeroShotWeights()")
        x = self.inputs(obs, self.images, torch.Generator().manual_seed(self.seed))
        p = features(obs, x)[1].mean(0)
        if run.steps > 1:
            late = (run.steps - 1) / (2 * run.steps)  # mean of t / T over t = 0, ..., T - 1
            p = (1 - late) * p + late * features(obs, x, after=run.lr)[1].mean(0)
        return size * (p - gb.double() / run.steps)


@dataclass(frozen=True)
class ZeroShotWeights(DummyRule):
    """Zero-shot counts without a bias (Geng et al., arXiv:2110.09074): the row sums s of dL/dW stand for it.

    s_k is about (mean_i p_ik - n_k / B) O, with O the mean over images of sum_d h_d, so that
    n_k = B (pbar_k - s_k / (O T)). O is taken from the dummy images as pbar is; of T local steps each has its own, and
    the mean over the steps is taken. Departures: none.
    """

    revision = 1

    def raw(self, obs: Observation) -> PerClass:
        size, run = need_batch_size(obs, "ZeroShotWeights"), descent(obs, "ZeroShotWeights")
        s = last_layer(obs)[0].double().sum(1) / run.steps
        x = self.inputs(obs, self.images, torch.Generator().manual_seed(self.seed))
        ends = [features(obs, x)]
        if run.steps > 1:
            ends.append(features(obs, x, after=run.lr))
        p, O = torch.stack([p.mean(0) for _, p in ends]), torch.stack([h.sum(1).mean() for h, _ in ends])
        if (O.abs() <= 1e-12 * ends[0][0].abs().sum(1).mean()).any():
            raise NotApplicableError(
                "ZeroShotWeights divides by the mean sum of the features, which is 0 here; use a rule that reads the"
                " bias, such as labels.ZeroShot()"
            )
        t = torch.arange(run.steps, dtype=p.dtype, device=p.device) / run.steps
        late = torch.stack([1 - t, t], 1)[:, : len(ends)]
        return size * (late @ p - s / (late @ O)[:, None]).mean(0)


@dataclass(frozen=True)
class ILRG(CountRule):
    """Counts from the gradient and the last layer alone (Ma et al., ICLR 2023, "Instance-wise batch label
    restoration via gradients in federated learning").

    1. h_k = dL/dW_k / dL/db_k, a mean of the features, for class k; 2. P_k = softmax(W h_k + b);
    3. sum_k n_k = B and sum_j n_j P_j - n = B dL/db, K + 1 equations in n; 4. by the pseudo-inverse.

    So mean_i p_i is taken for sum_j n_j P_j / B. Threat A with the batch size; a last layer with a bias.

    Departures: the public code rounds each entry to the nearest whole number and scores that, so that counts need not
    sum to B; here they are apportioned, as for all rules (`raw` has them before).
    """

    revision = 1

    def raw(self, obs: Observation) -> PerClass:
        size, run = need_batch_size(obs, "ILRG"), descent(obs, "ILRG")
        gW, gb = need_bias(obs, "ILRG", "labels.ZeroShotWeights()")
        gW, gb = gW.double() / run.steps, gb.double() / run.steps
        # The public code lets no ratio pass 1e10, so that 0 / 0 is 0
        h = (gW / gb[:, None]).nan_to_num(0.0, 1e10, -1e10).clamp(-1e10, 1e10)
        W, b = head(obs)
        P = (h @ W.T + b).softmax(1)
        eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
        A = torch.cat([torch.ones_like(P[:1]), P.T - eye])
        v = torch.cat([gb.new_tensor([size]), size * gb])
        return torch.linalg.pinv(A) @ v


@dataclass(frozen=True)
class RLU(CountRule):
    """Counts of a client that takes several local steps (Chen, Vikalo, ICML 2024, arXiv:2405.00955).

    The mean update of the bias is gb / T = sum_c (n_c / N) e_c - n / N with e_ck = E[p_k | class c], which auxiliary
    data give. So n is found by least squares, n >= 0, sum n = N. Threat D, with several steps and C.

    Departures: derived from the paper's abstract, not from its text or code, which is not public. e is the mean of
    its values before and after the round, in place of logits drawn along the way. A small ridge on
    the shares n / N holds back what a network that is sure of itself, with e near the identity, leaves open. A larger
    one draws all batches to an even mixture, which flatters on even ones.
    """

    images: int = 20  # of each class, from the auxiliary data
    ridge: float = 0.01
    seed: int = 0
    revision = 1

    def __post_init__(self):
        whole(self, "images")
        whole(self, "seed", least=0)
        real(self, "ridge")

    def raw(self, obs: Observation) -> PerClass:
        from scipy.optimize import nnls  # slow to import

        size, run = need_batch_size(obs, "RLU"), descent(obs, "RLU")
        _, gb = need_bias(obs, "RLU", "labels.ZeroShotWeights(inputs=labels.surrogate)")
        x, of = by_class(obs, "RLU", self.images, torch.Generator().manual_seed(self.seed))
        e = of @ features(obs, x)[1]
        if run.steps > 1:
            e = (e + of @ features(obs, x, after=run.lr)[1]) / 2
        eye = torch.eye(len(e), dtype=e.dtype, device=e.device)
        A = torch.cat([e.T - eye, torch.ones_like(e[:1]), self.ridge**0.5 * eye])
        v = torch.cat([gb.double() / run.steps, e.new_ones(1), e.new_zeros(len(e))])
        share = torch.from_numpy(nnls(A.cpu().numpy(), v.cpu().numpy())[0]).to(e)
        return size * share / share.sum()
