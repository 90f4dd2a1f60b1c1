"""Momentum contrast (He et al. 2020) around a spiking encoder: query encoder, key encoder, projection heads, queue.

One step on two views of a batch, as `forward` computes it:

    theta_k <- momentum * theta_k + (1 - momentum) * theta_q      the key encoder follows the query encoder
    q = head_q(encoder_q(view_q)), k = head_k(encoder_k(view_k))  [T, B, dim], no gradient through k
    loss = MixInfoNCE(q, k, queue)
    queue <- k, the oldest keys leave                             first in, first out

Shapes: views [T, B, 2, H, W] -> loss, a scalar. After pre-training only the query encoder is kept.
Tested by `python -m pytest test_all.py -k moco`.
"""
import copy
import math

import torch
import torch.distributed as dist
from torch import nn

from loss import contrast, mix_info_nce


class MoCo(nn.Module):
    """NeuroMoCo's pre-training (arXiv 2406.06305) of `encoder`, which is not copied: training this module trains it.

    .query and .key are an encoder and a head each; .queue holds embeddings. ValueError for settings out of range.
    encoder: [T, B, 2, H, W] -> [T, B, encoder.dim]; dim: size of an embedding; queue_size K >= 1: negatives kept;
    momentum in [0, 1]: 0 copies the query encoder each step, 1 freezes the key encoder; the others: loss.py.
    After each forward, .accuracy is the share of queries nearer to their own key than to all K negatives (MBC logits).
    """

    def __init__(self, encoder, dim=128, queue_size=4096, momentum=0.999, temperature=0.1, alpha=0.5, beta=0.5):
        super().__init__()
        if queue_size < 1 or not 0 <= momentum <= 1 or temperature <= 0:
            raise ValueError("MoCo needs queue_size >= 1, momentum in [0, 1] and temperature > 0, "
                             f"got {queue_size}, {momentum}, {temperature}")
        self.momentum, self.temperature, self.alpha, self.beta = momentum, temperature, alpha, beta
        # The head is MoCo v2's (Chen et al. 2020), applied to each time step; the paper does not describe its own.
        head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.ReLU(), nn.Linear(encoder.dim, dim))
        self.query = nn.Sequential(encoder, head)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", torch.empty(queue_size, 0, dim))  # [K, T, dim] once new_queue knows T
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # slot of the oldest key, the next to go
        self.register_buffer("accuracy", torch.zeros(()), persistent=False)

    def forward(self, view_q, view_k):
        """Two views, float [T, B, 2, H, W], of the same recordings -> loss. Updates key encoder first, queue last.

        Call it once a batch: a second call would meet the keys of the first as negatives.
        """
        q = self.query(view_q)  # [T, B, dim]
        with torch.no_grad():
            self.momentum_update()
            k = self.key(view_k)  # [T, B, dim]
            if len(k) != self.queue.shape[1]:  # the first step, or another T
                self.new_queue(len(k))
        loss = mix_info_nce(q, k, self.queue, self.temperature, self.alpha, self.beta)
        with torch.no_grad():
            logits = contrast(q.float().mean(0), k.float().mean(0), self.queue.mean(1), self.temperature)  # [B, 1 + K]
            lead = logits[:, 0] - logits[:, 1:].amax(-1)  # [B]
            # A lead within rounding error is no hit: where all embeddings are alike, there are none.
            self.accuracy = (lead > 1e-5 / self.temperature).float().mean()
            self.enqueue(k)
        return loss

    def new_queue(self, T):
        """Random directions, as in MoCo. They are easy to tell from keys, so the loss rises while keys replace them."""
        self.queue = torch.randn(len(self.queue), T, self.queue.shape[2], device=self.queue.device)

    def momentum_update(self):
        """theta_k <- momentum * theta_k + (1 - momentum) * theta_q, over parameters only.

        Batch-norm statistics are not averaged: in training both encoders normalise by their own batch, so the running
        ones play no part in the loss; those of the key encoder come from its own batches, and so fit its weights.
        """
        for theta_k, theta_q in zip(self.key.parameters(), self.query.parameters()):
            theta_k.lerp_(theta_q, 1 - self.momentum)

    def enqueue(self, k):
        """Write keys k [T, B, dim] over the oldest entries; a batch larger than the queue leaves its last K."""
        k = k.transpose(0, 1).to(self.queue.dtype)  # [B, T, dim]
        if dist.is_initialized():
            k = gather(k)
        k = k[-len(self.queue) :]  # [min(B, K), T, dim]
        slots = (self.position + torch.arange(len(k), device=k.device)) % len(self.queue)
        if torch.compiler.is_compiling():  # a copy: under autocast the loss's backward still needs the queue as it was
            self.queue = self.queue.index_copy(0, slots, k)
        else:
            self.queue.index_copy_(0, slots, k)
        self.position.copy_((self.position + len(k)) % len(self.queue))


@torch.compiler.disable
def gather(k):
    """The keys [B, ...] of all processes in the order of the whole batch: process r holds its rows r, r + world, ...

    Shares may differ by one row: all are padded to the longest, and the padding ends up behind the last row.
    """
    world = dist.get_world_size()
    total = torch.tensor(len(k))
    dist.all_reduce(total)  # sum over processes; on the CPU, so as not to wait for a GPU
    longest = math.ceil(int(total) / world)
    padded = torch.cat([k, k.new_zeros(longest - len(k), *k.shape[1:])])
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, 1).flatten(0, 1)[:total]  # [longest, world, ...] -> [B of all, ...]
