"""MixInfoNCE, the contrastive loss of NeuroMoCo (arXiv 2406.06305): InfoNCE over time steps.

InfoNCE of a query q with its key k+ and K negatives n_i, all of unit length (van den Oord 2018):

    InfoNCE = -log( exp(q.k+ / temperature) / sum_z exp(q.z / temperature) ),  z in k+, n_1 .. n_K

which is the cross-entropy of the logits [q.k+, q.n_1, ..., q.n_K] / temperature against class 0.
Embeddings have T time steps; there are two ways to get one loss from them, and the mix of both:

    MBC  mean before criterion: average the embeddings over time, then one InfoNCE
    MAC  mean after criterion:  one InfoNCE per time step, then average the T losses
    MixInfoNCE = alpha * MBC + beta * MAC

MBC makes unit vectors after its average, not before. MAC makes them at each step, and contrasts
step t with step t of the key and of the queue. Both are our reading of the paper. Related code
(TETMoCo in github.com/StephenTaylor1998/amazing-cls) contrasts each step with all T steps of the
queue. If T = 1, MBC = MAC.
Tests: python -m pytest test_all.py -k loss
"""
import math

import torch
import torch.nn.functional as F


def mix_info_nce(q, k, queue, temperature, alpha, beta):
    """Compute MixInfoNCE -> (loss, a scalar; the logits of MBC [B, 1 + K], for moco's accuracy).

    q, k: [T, B, dim] embeddings of two views, not yet unit vectors; queue: [K, T, dim], earlier
    keys as they came; alpha, beta: equal in the paper; 0.5 each keeps the scale of one InfoNCE.
    """
    q, k = q.float(), k.float()  # bf16 is too coarse for a mean over time
    mbc_logits = info_nce_logits(q.mean(0), k.mean(0), queue.mean(1), temperature)  # [B, 1 + K]
    mac_logits = info_nce_logits(q, k, queue.transpose(0, 1), temperature)  # [T, B, 1 + K]
    return alpha * info_nce(mbc_logits) + beta * info_nce(mac_logits), mbc_logits


def info_nce_logits(q, k, queue, temperature):
    """Compute cosines / temperature: q, k [..., B, dim], queue [..., K, dim] -> [..., B, 1 + K]."""
    with torch.autocast(q.device.type, enabled=False):  # half precision is too coarse for logits
        q, k, queue = (F.normalize(z.float(), dim=-1) for z in (q, k, queue))
        positive = (q * k).sum(-1, keepdim=True)  # [..., B, 1]
        negative = q @ queue.transpose(-1, -2)  # [..., B, K]
        return torch.cat([positive, negative], -1) / temperature


def info_nce(logits):
    """Average InfoNCE over all rows of logits [..., 1 + K] -> a scalar. Column 0: the positive."""
    return -logits.log_softmax(-1)[..., 0].mean()


def chance_level(queue_size, alpha, beta):
    """Compute the loss of embeddings that are all equal: (alpha + beta) log(K + 1)."""
    return (alpha + beta) * math.log(queue_size + 1)
