"""The whole test-suite: every fast path beside a slow, obvious one, then the command line at tiny sizes.

    python -m pytest test_all.py            # everything; -k lif | loss | moco | models | data | train | eval for a part

Tests against SpikingJelly and of AEDAT4 files are skipped where spikingjelly or dv-processing is not installed.
"""
import hashlib
import http.server
import io
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as evaluation
import loss
import models
import moco
import neuron
import train

HERE = Path(__file__).parent
EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE_AFTER", None)
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------- lif

class Surrogate(torch.autograd.Function):
    """A step whose gradient is the arctangent's: for the reference below."""

    @staticmethod
    def forward(ctx, u, alpha):
        ctx.u, ctx.alpha = u, alpha
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * ctx.u) ** 2), None


def slow_lif(x, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
    """One step after the other, differentiated by autograd, in the precision of the membrane."""
    v, spikes = torch.full_like(x[0].float() if x.dtype == torch.bfloat16 else x[0], v_reset), []
    for t in range(len(x)):
        h = v + (x[t].to(v.dtype) - (v - v_reset)) / tau
        s = Surrogate.apply(h - v_threshold, alpha)
        v = torch.where(s.detach() > 0, v_reset, h)
        spikes.append(s.to(x.dtype))
    return torch.stack(spikes)


def test_lif_trace_by_hand():
    # charge halves the distance to x: 0 -> .75 -> 1.125 fires, back to 0 -> .25 -> 1 fires (>=) -> 0 -> -1 -> .5
    x = torch.tensor([1.5, 1.5, 0.5, 1.75, -2.0, 2.0])
    assert neuron.LIF()(x[:, None])[:, 0].tolist() == [0, 1, 0, 1, 0, 0]
    # tau 4, threshold 2, reset -1: -1 -> 2 fires, -1 -> -.75 -> 3.1875 fires
    x = torch.tensor([11.0, 0.0, 14.0])
    assert neuron.LIF(tau=4.0, v_threshold=2.0, v_reset=-1.0)(x[:, None])[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("constants", [(2.0, 1.0, 0.0, 2.0), (2.0, 0.5, 0.0, 2.0), (3.0, 1.0, -0.25, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 4), (4, 2, 3, 5, 6)])
def test_lif_equals_the_slow_one(constants, dtype, shape):
    x = (2 * torch.randn(shape)).to(dtype)
    g = torch.randn(shape).to(dtype)
    ours, slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    s, r = neuron.LIF(*constants)(ours), slow_lif(slow, *constants)
    s.backward(g), r.backward(g)
    assert 0.05 < r.float().mean() < 0.95  # membranes on both sides of the threshold
    assert s.dtype == dtype and torch.equal(s, r)
    torch.testing.assert_close(ours.grad, slow.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_lif_gradient_near_and_far_from_the_threshold():
    """One step: ds/dx = surrogate(h - threshold) / tau, at values worked out by hand."""
    h = torch.tensor([[-3.0, 0.0, 0.999, 1.0, 1.5, 4.0]])
    x = (2 * h).requires_grad_()  # v starts at 0, so h = x / 2
    neuron.LIF()(x).sum().backward()
    expected = [0.5 / (1 + (math.pi * (u - 1)) ** 2) for u in h[0].tolist()]
    assert x.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_lif_keeps_channels_last_and_leaves_no_state():
    x = models.channels_last(torch.randn(3, 2, 4, 5, 6))
    lif = neuron.LIF()
    first, second = lif(x), lif(x)
    assert first.stride() == x.stride() and torch.equal(first, second) and not lif.state_dict()
    assert torch.equal(first, slow_lif(x))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_lif_compiled_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE_AFTER", 0)
    for shape in [(4, 3, 50), (4, 7, 11)]:
        x, g = 2 * torch.randn(shape), torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        s = neuron.LIF()(a)
        s.backward(g)
        assert neuron.COMPILE_AFTER == 0  # it did compile
        monkeypatch.setattr(neuron, "COMPILE_AFTER", None)
        r = neuron.LIF()(b)
        r.backward(g)
        monkeypatch.setattr(neuron, "COMPILE_AFTER", 0)
        assert torch.equal(s, r) and torch.equal(a.grad, b.grad)


def test_lif_without_a_compiler_warns_once_and_goes_on(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")
    monkeypatch.setattr(neuron, "COMPILE_AFTER", 0)
    monkeypatch.setattr(neuron, "fused", broken)
    x = torch.randn(4, 9)
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(neuron.LIF()(x), slow_lif(x))
    assert neuron.COMPILE_AFTER is None


# --------------------------------------------------------------------------------------------------------------- loss

def slow_info_nce(q, k, queue, temperature):
    """InfoNCE row by row in float64, as the equation reads. q, k: [B, D], queue: [K, D]."""
    unit = [z.double() / z.double().norm(dim=-1, keepdim=True) for z in (q, k, queue)]
    total = 0.0
    for a, b in zip(unit[0], unit[1]):
        positive = math.exp(float(a @ b) / temperature)
        total -= math.log(positive / (positive + sum(math.exp(float(a @ n) / temperature) for n in unit[2])))
    return total / len(q)


def slow_mix(q, k, queue, temperature, alpha, beta):
    mbc = slow_info_nce(q.mean(0), k.mean(0), queue.mean(1), temperature)
    mac = sum(slow_info_nce(q[t], k[t], queue[:, t], temperature) for t in range(len(q))) / len(q)
    return alpha * mbc + beta * mac


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("T, B, K, D", [(1, 1, 1, 2), (4, 3, 7, 5), (3, 8, 2, 16)])
def test_loss_equals_a_loop_over_rows(alpha, beta, T, B, K, D):
    q, k, queue = torch.randn(T, B, D), torch.randn(T, B, D), torch.randn(K, T, D)
    for temperature in (0.07, 0.2, 1.0):
        ours = loss.mix_info_nce(q, k, queue, temperature, alpha, beta).item()
        assert ours == pytest.approx(slow_mix(q, k, queue, temperature, alpha, beta), rel=1e-5)


def test_loss_gradient():
    q, k, queue = (torch.randn(*s, dtype=torch.float64) for s in [(3, 2, 4), (3, 2, 4), (5, 3, 4)])
    q32 = q.float().requires_grad_()
    loss.mix_info_nce(q32, k.float(), queue.float(), 0.5, 0.5, 0.5).backward()
    for i in [(0, 0, 0), (1, 1, 2), (2, 0, 3)]:  # central differences of the loop
        up, down = q.clone(), q.clone()
        up[i] += 1e-5
        down[i] -= 1e-5
        slope = (slow_mix(up, k, queue, 0.5, 0.5, 0.5) - slow_mix(down, k, queue, 0.5, 0.5, 0.5)) / 2e-5
        assert q32.grad[i].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_loss_identities():
    T, B, K, D = 4, 3, 6, 8
    q, k, queue = torch.randn(T, B, D), torch.randn(T, B, D), torch.randn(K, T, D)
    mbc = lambda *z: loss.mix_info_nce(*z, 0.2, 1.0, 0.0).item()
    mac = lambda *z: loss.mix_info_nce(*z, 0.2, 0.0, 1.0).item()
    one = q[:1], k[:1], queue[:, :1]
    assert mbc(*one) == pytest.approx(mac(*one)) == pytest.approx(slow_info_nce(q[0], k[0], queue[:, 0], 0.2), rel=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = q[order], k[order], queue[:, order]
    assert mbc(*shuffled) == pytest.approx(mbc(q, k, queue), rel=1e-5) and mac(*shuffled) == pytest.approx(mac(q, k, queue), rel=1e-5)
    alone = q[order], k, queue
    assert mbc(*alone) == pytest.approx(mbc(q, k, queue), rel=1e-5) and abs(mac(*alone) - mac(q, k, queue)) > 1e-3
    scaled = 3 * q, 0.1 * k, 7 * queue
    assert mbc(*scaled) == pytest.approx(mbc(q, k, queue), rel=1e-4) and mac(*scaled) == pytest.approx(mac(q, k, queue), rel=1e-4)
    same = torch.ones(T, B, D), torch.ones(T, B, D), torch.ones(K, T, D)
    assert mbc(*same) == pytest.approx(math.log(K + 1)) == pytest.approx(mac(*same))  # nothing to tell apart: chance


# --------------------------------------------------------------------------------------------------------------- moco

class Mean(torch.nn.Module):
    """A one-layer encoder, [T, B, 2, H, W] -> [T, B, 3], small enough to follow by hand."""
    dim = 3

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x.mean((3, 4)))


@pytest.mark.parametrize("size, batch_sizes", [(5, [2, 2, 2, 1]), (4, [4, 4]), (3, [7, 1, 2]), (1, [1, 3])])
def test_moco_queue_is_first_in_first_out(size, batch_sizes):
    net = moco.MoCo(Mean(), dim=4, queue_size=size, momentum=0.5)
    keys = []
    for b in batch_sizes:
        x, y = torch.rand(2, b, 2, 3, 3), torch.rand(2, b, 2, 3, 3)
        before = None if net.queue is None else net.queue.clone()
        value = net(x, y)
        k = net.key_head(net.key_encoder(y)).transpose(0, 1)  # unchanged since the forward pass
        keys += list(k)
        if before is not None:  # the loss saw the queue as it was, without the batch's own keys
            q = net.head(net.encoder(x))
            assert value.item() == pytest.approx(slow_mix(q.detach(), k.transpose(0, 1), before, 0.1, 0.5, 0.5), rel=1e-4)
    newest = keys[-size:]
    position = int(net.position)
    slots = [(position - 1 - i) % size for i in range(len(newest))]  # newest first
    for slot, key in zip(slots, reversed(newest)):
        assert torch.equal(net.queue[slot], key)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_moco_momentum_is_exact(momentum):
    net = moco.MoCo(Mean(), dim=4, queue_size=4, momentum=momentum)
    with torch.no_grad():
        for p in net.encoder.parameters():
            p.add_(torch.randn_like(p))
    was = [p.clone() for p in net.key_encoder.parameters()]
    net(torch.rand(2, 3, 2, 3, 3), torch.rand(2, 3, 2, 3, 3)).backward()
    for old, key, query in zip(was, net.key_encoder.parameters(), net.encoder.parameters()):
        torch.testing.assert_close(key, momentum * old + (1 - momentum) * query)
        assert key.grad is None and not key.requires_grad and query.grad is not None
        assert momentum != 0 or torch.equal(key, query)
        assert momentum != 1 or torch.equal(key, old)


def test_moco_key_statistics_follow_the_keys_own_batches():
    net = moco.MoCo(models.build("spikformer-1-16", 16), queue_size=4, momentum=1.0)
    x, y = torch.rand(2, 3, 2, 16, 16), 5 * torch.rand(2, 3, 2, 16, 16)
    net(x, y)
    for encoder, view in ((net.encoder, x), (net.key_encoder, y)):
        bn, conv = encoder.stem[0].bn, encoder.stem[0].conv
        torch.testing.assert_close(bn.running_mean, 0.1 * conv(view.flatten(0, 1)).mean((0, 2, 3)), rtol=1e-3, atol=1e-6)


def test_moco_accuracy_counts_queries_that_find_their_key():
    net = moco.MoCo(Mean(), dim=4, queue_size=6, momentum=0.0)
    x, y = torch.rand(2, 8, 2, 3, 3), torch.rand(2, 8, 2, 3, 3)
    net(x, y)
    queue = F.normalize(net.queue.mean(1), dim=-1)
    net(x, y)
    q, k = (F.normalize(net.head(net.encoder(v)).mean(0), dim=-1) for v in (x, y))
    assert net.accuracy.item() == pytest.approx(sum(float(a @ b) > float((queue @ a).max()) for a, b in zip(q, k)) / 8)


@pytest.mark.parametrize("wrong", [dict(queue_size=0), dict(momentum=1.5), dict(temperature=0.0)])
def test_moco_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError):
        moco.MoCo(Mean(), **{"queue_size": 4, **wrong})
