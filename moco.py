"""Momentum contrast (He et al. 2020) around a spiking encoder, the pre-training of NeuroMoCo.

One step on two views of a batch of recordings, as `forward` computes it:

    q = encoder_q(view_q)                                          [T, B, dim]
    theta_k <- momentum * theta_k + (1 - momentum) * theta_q       the key encoder follows
    k = encoder_k(view_k), without gradient                        [T, B, dim]
    loss = MixInfoNCE(q, k, queue)                                 loss.py
    queue <- k; the oldest keys leave                              first in, first out

encoder_q and encoder_k each hold an encoder, [0], and a projection head, [1]. After pre-training,
only encoder_q[0] is kept. MoCo's shuffling for batch norm is left out, so a query and its key are
normalised with the same other recordings; docs/experiments.md measures the effect.
Shapes: views [T, B, 2, H, W] -> loss, a scalar.
Tests: python -m pytest test_all.py -k moco
"""
import copy

import torch
import torch.distributed as dist
from torch import nn

from loss import mix_info_nce


class MoCo(nn.Module):
    """Wrap an encoder for pre-training. encoder_q holds the encoder itself: this trains it.

    encoder: [T, B, 2, H, W] -> [T, B, encoder.dim]; n_frames: T; dim: size of an embedding;
    queue_size: number of negatives K >= 1; momentum in [0, 1]: at 0 the key encoder copies the
    query encoder, at 1 it is frozen; temperature > 0, alpha, beta: see loss.py. Raises ValueError
    otherwise. After each forward, .accuracy is the share of queries that, averaged over time, are
    nearer to their own key than to all K negatives.
    """

    def __init__(self, encoder, n_frames, dim=128, queue_size=4096, momentum=0.999, temperature=0.1,
                 alpha=0.5, beta=0.5):
        super().__init__()
        if queue_size < 1 or not 0 <= momentum <= 1 or temperature <= 0:
            raise ValueError("MoCo needs queue_size >= 1, momentum in [0, 1] and temperature > 0, "
                             f"got {queue_size}, {momentum}, {temperature}")
        self.momentum, self.temperature = momentum, temperature
        self.alpha, self.beta = alpha, beta
        self.encoder_q = nn.Sequential(encoder, ProjectionHead(encoder.dim, dim))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        # Random at first; the loss rises as keys, harder to tell from the positive, replace it.
        self.register_buffer("queue", torch.randn(queue_size, n_frames, dim))  # [K, T, dim]
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.long))  # slot of the oldest
        self.register_buffer("accuracy", torch.zeros(()), persistent=False)

    def forward(self, view_q, view_k):
        """Compute the loss of two views [T, B, 2, H, W] of a batch, and update keys and queue."""
        q = self.encoder_q(view_q)  # [T, B, dim]

        # key encoder and keys
        with torch.no_grad():
            self.momentum_update()
            k = self.encoder_k(view_k)  # [T, B, dim]

        # loss; logits: those of MBC [B, 1 + K]
        loss, logits = mix_info_nce(q, k, self.queue, self.temperature, self.alpha, self.beta)

        # contrastive accuracy and queue
        with torch.no_grad():
            margin = logits[:, 0] - logits[:, 1:].amax(-1)  # [B]
            # Cosines equal up to rounding do not count, or a collapsed encoder looks half right.
            self.accuracy = (margin > 1e-5 / self.temperature).float().mean()
            self.dequeue_and_enqueue(k)
        return loss

    def momentum_update(self):
        """Move the parameters of the key encoder: theta_k <- m * theta_k + (1 - m) * theta_q.

        Not batch norm's running statistics: keys are computed with those of their batch.
        """
        for theta_k, theta_q in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
            theta_k.lerp_(theta_q, 1 - self.momentum)

    def dequeue_and_enqueue(self, k):
        """Write keys [T, B, dim] over the oldest ones; of more than K keys, the last K stay."""
        K = len(self.queue)
        k = k.transpose(0, 1).to(self.queue.dtype)  # [B, T, dim]
        if dist.is_initialized():
            k = all_gather_keys(k)
        k = k[-K:]  # [min(B, K), T, dim]
        slots = (self.queue_ptr + torch.arange(len(k), device=k.device)) % K
        # Not in place: compiled in bf16, the backward pass of the loss reads the queue as it was.
        self.queue = self.queue.index_copy(0, slots, k)
        self.queue_ptr.copy_((self.queue_ptr + len(k)) % K)


class ProjectionHead(nn.Module):
    """Project features to embeddings, at each time step: [T, B, D] -> [T, B, dim].

    The paper does not describe its head. Chosen: a batch norm after each of two linear layers, over
    all T * B rows, the last without scale and shift, as in the code of MoCo v3 (Chen et al. 2021).
    """

    def __init__(self, D, dim, hidden=512):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(D, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=False))

    def forward(self, features):
        return self.layers(features.flatten(0, 1)).unflatten(0, features.shape[:2])  # [T, B, dim]


def all_gather_keys(k):
    """Gather the keys [B, ...] of all processes, in the order of the whole batch."""
    # data.batches gives process r the rows r, r + world_size, ..., hence the stack along axis 1.
    shares = [torch.empty_like(k) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, k.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)  # [B, world_size, ...] -> [B * world_size, ...]
