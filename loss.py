"""MixInfoNCE: the contrastive loss of NeuroMoCo (arXiv 2406.06305), InfoNCE for embeddings that unfold in time.

InfoNCE of one query q with its key k+ and K negatives n_i, all of unit length (van den Oord 2018; He 2020):

    InfoNCE = -log( exp(q.k+ / temperature) / (exp(q.k+ / temperature) + sum_i exp(q.n_i / temperature)) )

Where nothing can be told apart it is log(K + 1), the level of chance. Embeddings come raw; InfoNCE normalises them:

    MBC  mean before criterion: average the raw embeddings over time, then one InfoNCE
    MAC  mean after criterion:  one InfoNCE per time step, then average the T losses
    MixInfoNCE = alpha * MBC + beta * MAC

MAC compares step t with step t of the key and of the queue, as the paper does as far as its text could be read. Related
code of the authors' circle (amazing-cls, TETMoCo) compares each step with the negatives of all T steps instead. Step by
step, MBC and MAC both have K negatives and so the same level of chance. At T = 1 both are plain InfoNCE.
Tested by `python -m pytest test_all.py -k loss`.
"""
import math

import torch
import torch.nn.functional as F


def contrast(q, k, queue, temperature):
    """Logits of InfoNCE, the positive first: raw q, k [..., B, D] and queue [..., K, D] -> [..., B, 1 + K]."""
    with torch.autocast(q.device.type, enabled=False):  # products in half precision / temperature are too coarse
        q, k, queue = (F.normalize(z.float(), dim=-1) for z in (q, k, queue))
        positive = (q * k).sum(-1, keepdim=True)  # [..., B, 1]
        negative = q @ queue.transpose(-1, -2)  # [..., B, K]
        return torch.cat([positive, negative], -1) / temperature


def info_nce(q, k, queue, temperature):
    """Mean InfoNCE over all rows, a scalar: cross-entropy of the logits against class 0. Shapes as in contrast."""
    logits = contrast(q, k, queue, temperature)
    return (logits.logsumexp(-1) - logits[..., 0]).mean()


def mix_info_nce(q, k, queue, temperature, alpha, beta):
    """MixInfoNCE, a scalar.

    q, k: [T, B, D] raw embeddings of two views; queue: [K, T, D] raw embeddings of earlier keys; temperature > 0.
    alpha, beta: weights of MBC and MAC. The paper sets them equal; 0.5 each (chosen) keeps the scale of either alone.
    """
    q, k = q.float(), k.float()  # before the mean: bf16 is too coarse for it
    mbc = info_nce(q.mean(0), k.mean(0), queue.mean(1), temperature)
    mac = info_nce(q, k, queue.transpose(0, 1), temperature)
    return alpha * mbc + beta * mac


def chance(queue_size, alpha, beta):
    """MixInfoNCE where a query is as near to each of K = queue_size negatives as to its own key."""
    return (alpha + beta) * math.log(queue_size + 1)
