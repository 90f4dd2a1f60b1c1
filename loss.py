"""MixInfoNCE, the contrastive loss of NeuroMoCo (arXiv 2406.06305): InfoNCE over time steps.

InfoNCE of a query q with its key k+ and K negatives n_i, all of unit length (van den Oord 2018):

    InfoNCE = -log( exp(q.k+ / temperature) / sum_j exp(q.z_j / temperature) ),  z = k+, n_1 .. n_K

which is the cross-entropy of the logits [q.k+, q.n_1, ..., q.n_K] / temperature against class 0.
Embeddings have T time steps; there are two ways to get one loss from them, and the mix of both:

    MBC  mean before criterion: average the embeddings over time, then one InfoNCE
    MAC  mean after criterion:  one InfoNCE per time step, then average the T losses
    MixInfoNCE = alpha * MBC + beta * MAC

MAC contrasts step t with step t of the key and of the queue; this is our reading of the paper.
Related code (amazing-cls, TETMoCo) takes the negatives of all T steps. With T = 1 both are InfoNCE.
Tests: python -m pytest test_all.py -k loss
"""
import math

import torch
import torch.nn.functional as F


def mix_info_nce(q, k, queue, temperature, alpha, beta):
    """Compute MixInfoNCE -> (loss, a scalar; the MBC logits [B, 1 + K], the positive first).

    q, k: [T, B, D] raw embeddings of two views; queue: [K, T, D] raw embeddings of earlier keys;
    temperature > 0. alpha, beta: weights of MBC and MAC. The paper sets them equal; we choose 0.5
    each, which keeps the scale of either loss.
    """
    q, k = q.float(), k.float()  # before the mean, for which bf16 is too coarse
    mbc_logits = info_nce_logits(q.mean(0), k.mean(0), queue.mean(1), temperature)  # [B, 1 + K]
    mac_logits = info_nce_logits(q, k, queue.transpose(0, 1), temperature)  # [T, B, 1 + K]
    return alpha * info_nce(mbc_logits) + beta * info_nce(mac_logits), mbc_logits


def info_nce_logits(q, k, queue, temperature):
    """Compute cosines / temperature: q, k [..., B, D] and queue [..., K, D] -> [..., B, 1 + K]."""
    with torch.autocast(q.device.type, enabled=False):  # half precision is too coarse for logits
        q, k, queue = (F.normalize(z.float(), dim=-1) for z in (q, k, queue))
        positive = (q * k).sum(-1, keepdim=True)  # [..., B, 1]
        negative = q @ queue.transpose(-1, -2)  # [..., B, K]
        return torch.cat([positive, negative], -1) / temperature


def info_nce(logits):
    """Average InfoNCE over all rows of logits [..., 1 + K], the positive first -> a scalar."""
    logits = logits.flatten(0, -2)  # [rows, 1 + K]
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def chance_level(queue_size, alpha, beta):
    """Compute the loss of an uninformative encoder: log(K + 1) for each of MBC and MAC."""
    return (alpha + beta) * math.log(queue_size + 1)
