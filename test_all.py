"""The whole test-suite: every fast path beside a slow, obvious one, then the command line at tiny sizes.

    python -m pytest test_all.py            # everything; -k lif | loss | moco | models | data | train | eval for a part

Tests against SpikingJelly and of AEDAT4 files are skipped where spikingjelly or dv-processing is not installed.
"""
import contextlib
import copy
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    # tau 4, threshold 2, reset -1: -1 -> 2.25 fires, -1 -> 0 -> 2 fires
    x = torch.tensor([13.0, 4.0, 9.0])
    assert neuron.LIF(tau=4.0, v_threshold=2.0, v_reset=-1.0)(x[:, None])[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("constants", [(2.0, 1.0, 0.0, 2.0), (2.0, 0.5, 0.0, 2.0), (3.0, 1.0, -0.25, 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 4), (4, 2, 3, 5, 6)])
def test_lif_equals_the_slow_one(constants, dtype, shape):
    x = (4 * torch.randn(shape)).to(dtype)
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


def test_loss_is_float32_under_autocast():
    q, k, queue = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(6, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.mix_info_nce(q, k, queue, 0.05, 0.5, 0.5).item()
        assert value == pytest.approx(slow_mix(q, k, queue, 0.05, 0.5, 0.5), rel=1e-5)


def test_loss_identities():
    T, B, K, D = 4, 3, 6, 8
    q, k, queue = torch.randn(T, B, D), torch.randn(T, B, D), torch.randn(K, T, D)
    mbc = lambda *z: loss.mix_info_nce(*z, 0.2, 1.0, 0.0).item()
    mac = lambda *z: loss.mix_info_nce(*z, 0.2, 0.0, 1.0).item()
    one = q[:1], k[:1], queue[:, :1]
    assert mbc(*one) == pytest.approx(mac(*one)) == pytest.approx(slow_info_nce(q[0], k[0], queue[:, 0], 0.2), rel=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = q[order], k[order], queue[:, order]
    assert mbc(*shuffled) == pytest.approx(mbc(q, k, queue), rel=1e-5)
    assert mac(*shuffled) == pytest.approx(mac(q, k, queue), rel=1e-5)
    alone = q[order], k, queue
    assert mbc(*alone) == pytest.approx(mbc(q, k, queue), rel=1e-5) and abs(mac(*alone) - mac(q, k, queue)) > 1e-3
    scaled = 3 * q, 0.1 * k, 7 * queue
    assert mbc(*scaled) == pytest.approx(mbc(q, k, queue), rel=1e-4)
    assert mac(*scaled) == pytest.approx(mac(q, k, queue), rel=1e-4)
    same = torch.ones(T, B, D), torch.ones(T, B, D), torch.ones(K, T, D)
    assert mbc(*same) == pytest.approx(math.log(K + 1)) == pytest.approx(mac(*same))  # nothing to tell apart: chance
    assert loss.mix_info_nce(*same, 0.2, 0.5, 2.0).item() == pytest.approx(loss.chance(K, 0.5, 2.0))


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
        before = net.queue.clone() if net.queue.numel() else None
        value = net(x, y)
        k = net.key(y).transpose(0, 1)  # unchanged since the forward pass
        keys += list(k)
        if before is not None:  # the loss saw the queue as it was, without the batch's own keys
            q = net.query(x).detach()
            assert value.item() == pytest.approx(slow_mix(q, k.transpose(0, 1), before, 0.1, 0.5, 0.5), rel=1e-4)
    newest = keys[-size:]
    position = int(net.position)
    slots = [(position - 1 - i) % size for i in range(len(newest))]  # newest first
    for slot, key in zip(slots, reversed(newest)):
        assert torch.equal(net.queue[slot], key)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_moco_momentum_is_exact(momentum):
    net = moco.MoCo(Mean(), dim=4, queue_size=4, momentum=momentum)
    with torch.no_grad():
        for p in net.query.parameters():
            p.add_(torch.randn_like(p))
    was = [p.clone() for p in net.key.parameters()]
    net(torch.rand(2, 3, 2, 3, 3), torch.rand(2, 3, 2, 3, 3)).backward()
    for old, key, query in zip(was, net.key.parameters(), net.query.parameters()):
        torch.testing.assert_close(key, momentum * old + (1 - momentum) * query)
        assert key.grad is None and not key.requires_grad and query.grad is not None
        assert momentum != 0 or torch.equal(key, query)
        assert momentum != 1 or torch.equal(key, old)


def test_moco_key_statistics_follow_the_keys_own_batches():
    net = moco.MoCo(models.build("spikformer-1-16", 16), queue_size=4, momentum=1.0)
    x, y = torch.rand(2, 3, 2, 16, 16), 5 * torch.rand(2, 3, 2, 16, 16)
    net(x, y)
    for encoder, view in ((net.query[0], x), (net.key[0], y)):
        mean = encoder.stem[0].conv(view.flatten(0, 1)).mean((0, 2, 3))
        torch.testing.assert_close(encoder.stem[0].bn.running_mean, 0.1 * mean, rtol=1e-3, atol=1e-6)


def test_moco_accuracy_counts_queries_that_find_their_key():
    net = moco.MoCo(Mean(), dim=4, queue_size=6, momentum=0.0)
    net(torch.rand(2, 8, 2, 3, 3), torch.rand(2, 8, 2, 3, 3))
    queue = F.normalize(net.queue.mean(1), dim=-1)
    x, y = torch.rand(2, 8, 2, 3, 3), torch.rand(2, 8, 2, 3, 3)
    net(x, y)
    q, k = (F.normalize(f(v).mean(0).detach(), dim=-1) for f, v in ((net.query, x), (net.key, y)))
    assert net.accuracy.item() == pytest.approx(sum(float(a @ b) > float((queue @ a).max()) for a, b in zip(q, k)) / 8)
    net(x[:, :6], y[:, :6]), net(x[:, :6], y[:, :6])  # own keys are among the negatives: ties, however they are rounded
    assert net.accuracy == 0


@pytest.mark.parametrize("arch, size", [("spikformer-1-16", 16), ("sew-resnet-18-4", 64)])
def test_moco_compiles_as_a_whole_to_the_same_numbers(arch, size):
    """As on a GPU: one graph from views to loss and queue per size of batch, but without the compiler's last stage."""
    plain = moco.MoCo(models.build(arch, size), 16, queue_size=8, momentum=0.9)
    plain.new_queue(2)
    compiled = copy.deepcopy(plain)
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=False)
    for B in (4, 3):
        views = torch.poisson(torch.rand(2, 2, B, 2, size, size))
        losses = [net(*views) for net in (plain, forward)]
        torch.autograd.backward(losses)
        assert torch.allclose(*losses) and torch.allclose(plain.queue, compiled.queue)
        assert plain.accuracy == compiled.accuracy
        for p, q in zip(plain.query.parameters(), compiled.query.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-5)
    torch._dynamo.reset()


class Linear(torch.nn.Module):
    dim = 32

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x.flatten(2))


def test_moco_compiled_in_bf16_has_the_gradient_of_the_queue_as_it_was():
    """A quarter of the queue is new after each step; backward must not see it."""
    plain = moco.MoCo(Linear(), 16, queue_size=32, momentum=0.9)
    plain.new_queue(3)
    compiled = copy.deepcopy(plain)
    forward = torch.compile(compiled, dynamic=False)
    for _ in range(2):
        view, gradients = torch.rand(3, 8, 2, 4, 4), []
        other = view + 0.05 * torch.rand_like(view)
        for net, call in ((plain, plain), (compiled, forward)):
            with torch.autocast("cpu", torch.bfloat16):
                value = call(view, other)
            net.zero_grad()
            value.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.query.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()
    torch._dynamo.reset()


class OneDevice(TorchDispatchMode):
    """Raises where an operation on the device that holds no values (meta) is given a tensor left on the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}  # a GPU takes scalars
        assert devices != {"cpu", "meta"}, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch, size", [("spikformer-2-256", 128), ("sew-resnet-18", 128), ("spikformer-1-64", 16)])
def test_train_loop_stays_on_its_device_and_never_waits_for_it(arch, size, monkeypatch):
    """On a device without values, asking for one, by .item() or an if, raises: an epoch's end does, nothing before."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)  # the path of a GPU
    args = types.SimpleNamespace(device="meta", batch_size=3, n_frames=4, seed=0, weight_decay=0.06)
    split = data.Split(torch.empty(6, 4, 2, size, size, dtype=torch.uint8, device="meta"), np.zeros(6, int), ["a", "b"])
    encoder = models.build(arch, size)
    net, classifier = moco.MoCo(encoder).to("meta"), models.Classifier(encoder, 2).to("meta")
    net.new_queue(4)
    done = []

    def pretrain(x, y):
        done.append(net(data.augment(x), data.augment(x)))
        return done[-1], net.accuracy

    def finetune(x, y):
        done.append(F.cross_entropy(classifier(data.augment(x)).mean(0), y))
        return done[-1], done[-1]

    for model, step in ((net, pretrain), (classifier, finetune)):
        done.clear()
        with OneDevice(), pytest.raises(NotImplementedError, match="meta"):
            train.fit(types.SimpleNamespace(args=args, state=None), "pretrain", model, step, split, 1, 1e-3, None)
        assert len(done) == 2 and {t.device.type for t in (*done, net.queue, net.accuracy)} == {"meta"}


def test_train_decays_weights_alone():
    layers = torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 4)
    model = torch.nn.Sequential(*layers).requires_grad_()
    model[2].weight.requires_grad_(False)
    optimizer, schedule = train.optimizer_of(model, 0.5, 0.06, steps=40)
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [(0.06, 1), (0.0, 4)]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step(), schedule.step()
    cosine = [0.25 + 0.25 * math.cos(math.pi * step / 40) for step in range(40)]
    assert rates == pytest.approx([0.25, *cosine[1:]])  # two steps of warm-up


@pytest.mark.parametrize("wrong", [dict(queue_size=0), dict(momentum=1.5), dict(temperature=0.0)])
def test_moco_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError):
        moco.MoCo(Mean(), **{"queue_size": 4, **wrong})


# ------------------------------------------------------------------------------------------------------------- models

def spikingjelly():
    """SpikingJelly; its models import torchvision and torchaudio for downloads alone: stand-ins for what is missing."""
    pytest.importorskip("spikingjelly")
    for part in ("", ".models", ".models.utils", ".datasets", ".transforms"):
        name = f"torchvision{part}"
        try:
            __import__(name)
        except Exception:
            module = types.ModuleType(name)
            module.__path__, module.__getattr__ = [], lambda a: type(a, (), {})
            sys.modules[name] = module
    from spikingjelly.activation_based import functional, layer, neuron as sj_neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet, spikformer
    return types.SimpleNamespace(functional=functional, layer=layer, neuron=sj_neuron, surrogate=surrogate,
                                 sew=sew_resnet, spik=spikformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lif_equals_spikingjelly(dtype):
    sj = spikingjelly()
    for threshold in (1.0, 0.5):
        x = 2 * torch.randn(8, 3, 40, dtype=dtype)
        g = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        theirs = sj.neuron.LIFNode(tau=2.0, v_threshold=threshold, detach_reset=True, step_mode="m",
                                   surrogate_function=sj.surrogate.ATan())
        s, r = neuron.LIF(v_threshold=threshold)(a), theirs(b)
        s.backward(g), r.backward(g)
        assert torch.equal(s, r)
        torch.testing.assert_close(a.grad, b.grad)


def peer_of(arch, sj):
    if arch == "spikformer-2-256":
        return sj.spik.Spikformer(img_size_h=128, img_size_w=128, patch_size=16, in_channels=2, num_classes=10,
                                  embed_dims=256, num_heads=16, mlp_ratio=4, depths=2, T=2)
    net = sj.sew.sew_resnet18(cnf="ADD", spiking_neuron=sj.neuron.LIFNode, surrogate_function=sj.surrogate.ATan(),
                              detach_reset=True, num_classes=10)
    net.conv1 = sj.layer.Conv2d(2, 64, 7, 2, 3, bias=False)
    sj.functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["spikformer-2-256", "sew-resnet-18"])
def test_models_exchange_weights_with_spikingjelly(arch, training):
    """By position, with the same logits: in float64, where the order of a sum tips no membrane over the threshold."""
    sj = spikingjelly()
    ours, theirs = models.Classifier(models.build(arch, 128), 10).double(), peer_of(arch, sj).double()
    x = torch.poisson(torch.full((2, 2, 2, 128, 128), 0.3, dtype=torch.float64))
    with torch.no_grad():
        for m in theirs.modules():  # nothing at its initial value, so that any mix-up shows; statistics as of data
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                m.momentum = 1.0
                m.weight.uniform_(1, 3), m.bias.uniform_(-0.3, 0.3)
        theirs(x)
        sj.functional.reset_net(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    strip = lambda shape: tuple(shape) if not shape or shape[-1] != 1 or len(shape) < 3 else strip(shape[:-1])
    assert [strip(v.shape) for v in a.values()] == [strip(v.shape) for v in b.values()]
    ours.load_state_dict({k: v.reshape(a[k].shape) for k, v in zip(a, b.values())})
    ours.train(training), theirs.train(training)
    with torch.no_grad():
        mine, other = ours(x), theirs(x)
    assert other.std(1).mean() > 1e-3  # the recordings are told apart at all
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_models_block_that_keeps_little_computes_what_its_modules_do(pool, first):
    torch.manual_seed(0)
    lean = models.ConvLIF(3, 8, 3, stride=1 if pool else 2, pool=pool, first=first).double()
    torch.nn.init.normal_(lean.bn.weight), torch.nn.init.normal_(lean.bn.bias)  # weights of either sign
    plain = copy.deepcopy(lean)
    x = torch.randint(0, 4, (5, 2, 3, 9, 9)).double() * (0.3 if first else 1)
    x = models.channels_last(x)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = lean(x1)
    y2 = plain.lif(plain.pool(plain.bn(plain.conv(x2.flatten(0, 1)))).unflatten(0, (5, 2)))
    assert torch.equal(y1, y2) and 0.05 < y1.mean() < 0.95
    g = torch.randn_like(y1)
    y1.backward(g), y2.backward(g)
    assert x1.grad is not None
    for a, b in zip((x1, *lean.parameters()), (x2, *plain.parameters())):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    for (name, a), (_, b) in zip(lean.named_buffers(), plain.named_buffers()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("wrong", [0.5, -1.0, 256.0])
def test_models_block_refuses_what_a_byte_cannot_hold(wrong):
    x = torch.full((2, 2, 3, 8, 8), wrong)
    with pytest.raises(ValueError, match="first=True"):
        models.ConvLIF(3, 8, 3)(x)
    models.ConvLIF(3, 8, 3, first=True)(x), models.ConvLIF(3, 8, 3).eval()(x)


def test_models_block_runs_any_other_part_as_it_reads():
    class PLIF(neuron.LIF):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return super().forward(x * self.w.sigmoid() * 4)

    x = torch.randint(0, 4, (5, 2, 3, 8, 8)).float()
    for part, other in (("lif", PLIF()), ("pool", torch.nn.AvgPool2d(2)), ("pool", torch.nn.MaxPool2d(2)),
                        ("bn", torch.nn.BatchNorm2d(8).eval())):
        torch.manual_seed(0)
        block = models.ConvLIF(3, 8, 3, pool=True)
        usual = block(x)
        setattr(block, part, other)
        plain = copy.deepcopy(block)
        y = block(x)
        expected = plain.lif(plain.pool(plain.bn(plain.conv(x.flatten(0, 1)))).unflatten(0, (5, 2)))
        assert torch.equal(y, expected) and not torch.equal(y, usual)
        y.sum().backward(), expected.sum().backward()
        for a, b in zip(block.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert not block.bn.running_mean.any()  # of the frozen one


def test_models_block_keeps_its_output_before_batch_norm_and_its_input_in_bytes():
    block, kept = models.ConvLIF(4, 8, 3, pool=True), {}

    def note(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t
    x = torch.ones(3, 2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x)
    small = 4 * (block.conv.weight.numel() + 4 * 8)  # kernel, scale, shift, mean, variance
    assert sum(kept.values()) == 3 * 2 * 16 * 16 * (4 * 1 + 8 * 4) + small


@pytest.mark.parametrize("arch, size, dim", [
    ("sew-resnet-18-8", 32, 64), ("sew-resnet-18-8", 64, 64), ("spikformer-1-32", 34, 32),
    ("spikformer-2-48", 64, 48), ("spikformer-1-16", 17, 16)])
def test_models_have_a_gradient_everywhere_and_features_per_step(arch, size, dim):
    net = models.Classifier(models.build(arch, size), 5)
    assert net.encoder.dim == dim
    x = torch.poisson(torch.full((3, 4, 2, size, size), 1.0))
    assert net.encoder(x).shape == (3, 4, dim)
    logits = net(x)
    assert logits.shape == (3, 4, 5)
    (logits.mean(0) * torch.randn(4, 5)).sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_models_attention_is_the_published_product():
    """(v k^T) q / 8 per head, taken token by token."""
    net = models.Attention(32)
    spikes = (torch.rand(2, 1, 96, 2, 3) < 0.4).float()  # [T, B, 3C, H, W]
    net.qkv, net.proj, net.lif = (torch.nn.Identity() for _ in range(3))
    net.qkv.forward = lambda _: spikes
    q, k, v = spikes.flatten(3).split(32, dim=2)  # each [T, B, C, L]
    expected = torch.zeros(2, 1, 32, 6)
    for t, head in itertools.product(range(2), range(2)):
        c = slice(16 * head, 16 * head + 16)
        expected[t, 0, c] = (v[t, 0, c] @ k[t, 0, c].T) @ q[t, 0, c] * 0.125
    assert torch.equal(net(spikes).flatten(3), expected)


def test_models_have_no_state_between_batches():
    net = models.Classifier(models.build("spikformer-1-16", 16), 3).eval()
    a, b = torch.rand(2, 1, 2, 16, 16), torch.rand(5, 3, 2, 16, 16)
    first = net(a)
    net(b)
    assert torch.equal(first, net(a))


def test_models_in_bf16_stay_close_to_float32():
    net = models.Classifier(models.build("spikformer-1-32", 32), 5)
    x = torch.poisson(torch.full((4, 8, 2, 32, 32), 0.5))
    exact = net(x).mean(0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x)
    F.cross_entropy(rough.float().mean(0), torch.arange(8) % 5).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert (rough.float().mean(0) - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("name", [
    "resnet", "spikformer-2", "spikformer-0-64", "spikformer-2-100", "sew-resnet-18-0", "sew-resnet-34"])
def test_models_refuse_unknown_names(name):
    with pytest.raises(ValueError, match=name):
        models.build(name, 128)


# --------------------------------------------------------------------------------------------------------------- data

def recording(n, width=12, height=9, seed=0):
    rng = np.random.default_rng(seed)
    events = np.zeros(n, EVENT)
    events["x"], events["y"], events["p"] = rng.integers(0, width, n), rng.integers(0, height, n), rng.integers(0, 2, n)
    events["t"] = np.sort(rng.integers(0, 10_000, n))
    return events


def slow_frames(events, T, sensor, size):
    frames, n = np.zeros((T, 2, size, size), int), len(events)
    for i, e in enumerate(events):
        t = min(i // (n // T), T - 1) if n >= T else T - 1
        frames[t, int(e["p"]), int(e["y"]) * size // sensor[1], int(e["x"]) * size // sensor[0]] += 1
    return np.minimum(frames, 255).astype(np.uint8)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 8, 1000])
@pytest.mark.parametrize("size", [4, 9, 12])
def test_data_frames_lose_no_event(n, size):
    events = recording(n)
    frames = data.to_frames(events, 4, (12, 9), size)
    assert frames.dtype == np.uint8 and frames.shape == (4, 2, size, size) and frames.sum(dtype=int) == n
    assert np.array_equal(frames, slow_frames(events, 4, (12, 9), size))
    assert n < 4 or frames[:3].sum((1, 2, 3), dtype=int).tolist() == [n // 4] * 3


def test_data_frames_clip_sort_and_check():
    events = recording(1000)
    events["x"], events["y"], events["p"] = 3, 2, True
    frames = data.to_frames(events, 2, (12, 9), 12)
    assert frames[:, 1, 2 * 12 // 9, 3].tolist() == [255, 255] and frames.sum(dtype=int) == 510
    events = recording(500)
    shuffled = events[np.random.default_rng(1).permutation(500)]
    unique = events["t"] != np.roll(events["t"], 1)
    assert np.array_equal(data.to_frames(shuffled[np.isin(shuffled["t"], events["t"][unique])], 5, (12, 9), 9).sum(0),
                          data.to_frames(events[np.isin(events["t"], events["t"][unique])], 5, (12, 9), 9).sum(0))
    one_by_one = np.unique(recording(2000)["t"])
    ordered = recording(len(one_by_one), seed=2)
    ordered["t"] = one_by_one
    assert np.array_equal(data.to_frames(ordered[::-1], 7, (12, 9), 9), data.to_frames(ordered, 7, (12, 9), 9))
    with pytest.raises(ValueError, match="outside the sensor of 5 x 9"):
        data.to_frames(events, 2, (5, 9), 9)


def test_data_split_is_stable_and_nine_to_one():
    keys = [(c, f"/d/{c}/r{i}.npy") for c, n in (("a", 100), ("b", 57), ("c", 2), ("d", 1)) for i in range(n)]
    split = data.split_by_class(keys)
    shuffled = keys.copy()
    random.Random(0).shuffle(shuffled)
    assert sorted(split) == sorted(data.split_by_class(shuffled))
    count = lambda part, c: sum(s == part and k == c for s, k, _ in split)
    assert [(count("train", c), count("test", c)) for c in "abcd"] == [(90, 10), (52, 5), (1, 1), (1, 0)]
    test = {k for s, _, k in split if s == "test"}
    assert len({k for *_, k in split}) == len(keys) and test.isdisjoint(k for s, _, k in split if s == "train")
    assert {f"/d/a/r{i}.npy" for i in range(90, 100)} <= test  # in numerical order, not r10 before r2


def test_data_toy_comes_from_its_seed_and_is_not_told_by_counts():
    first, again = data.toy_events("toy:0:7"), data.toy_events("toy:0:7")
    assert np.array_equal(first, again) and not np.array_equal(first[:50], data.toy_events("toy:1:7")[:50])
    assert set(first.dtype.names) == {"x", "y", "t", "p"} and first["x"].max() < data.TOY_SENSOR
    frames = np.stack([data.to_frames(data.toy_events(f"toy:0:{i}"), 4, (32, 32), 16) for i in range(600)])
    labels = torch.arange(600) % 10
    counts = torch.from_numpy(frames.sum((3, 4), dtype=np.float32)).flatten(1)
    distance = torch.cdist(counts[:100], counts[100:])
    votes = F.one_hot(labels[100:][distance.topk(20, largest=False).indices]).sum(1)
    by_count = max((votes.argmax(1) == labels[:100]).float().mean().item(),
                   evaluation.knn_accuracy(counts[100:], labels[100:], counts[:100], labels[:100]))
    assert by_count < 0.7  # from 500 labels; the network reaches more than 0.9 from 20


def test_data_batches_hold_every_recording_once():
    frames = np.arange(11, dtype=np.uint8)[:, None, None, None, None] * np.ones((1, 3, 2, 4, 4), np.uint8)
    split = data.Split(frames, np.arange(11), list("abcdefghijk"))
    for shuffle in (False, True):
        seen = list(data.batches(split, 4, "cpu", shuffle))
        assert [len(y) for _, y in seen] == [4, 4, 3]
        for x, y in seen:
            assert x.shape == (3, len(y), 2, 4, 4) and x.is_contiguous()
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            assert torch.equal(x[0, :, 0, 0, 0], y.float())
        order = torch.cat([y for _, y in seen]).tolist()
        assert sorted(order) == list(range(11)) and (order != sorted(order)) == shuffle


def test_data_augmentation_is_one_view_a_recording():
    x = torch.poisson(torch.full((1, 6, 1, 32, 32), 0.3)).expand(4, 6, 2, 32, 32).contiguous()
    y = data.augment(x)
    assert y.shape == x.shape and torch.equal(y, y[:1, :, :1].expand_as(y))  # alike over time and polarity
    same = x[:, :1].expand_as(x).contiguous()
    views = data.augment(same)[0, :, 0]
    assert len({v.numpy().tobytes() for v in views}) == 6  # different between recordings
    assert not torch.equal(data.augment(x), data.augment(x))
    assert set(y.unique().tolist()) <= set(x.unique().tolist()) | {0.0}  # nearest: counts stay counts


@pytest.mark.parametrize("size", [24, 33])
def test_data_augmentation_operations(size):
    x = torch.rand(2, 64, 2, size, size) + 0.1
    assert torch.equal(data.augment(x, operations=0, flip=False, min_scale=1.0), x)
    y = data.augment(x, operations=0, flip=True, min_scale=1.0)
    flipped = (y == x.flip(-1)).flatten(2).all(2).all(0)
    kept = (y == x).flatten(2).all(2).all(0)
    assert (flipped ^ kept).all() and 16 < flipped.sum() < 48
    y = data.augment(x, operations=1, strength=2, flip=False, min_scale=1.0)
    rolls = [torch.roll(x, (dy, dx), (-2, -1)) for dy in range(-2, 3) for dx in range(-2, 3)]
    rolled = torch.stack([(y == r).flatten(2).all(2).all(0) for r in rolls]).any(0)
    cut = ((y == x) | (y == 0)).flatten(2).all(2).all(0) & (y == 0).any(-1).any(-1).any(-1).any(0)
    assert 4 < rolled.sum() < 40 and 4 < cut.sum() < 32  # about a quarter each; the others turn or shear
    holes = (y[0, cut, 0] == 0).sum((1, 2))
    assert holes.max() <= (16 * size / 128 + 1) ** 2


def test_data_zoom_enlarges():
    x = torch.zeros(1, 200, 2, 32, 32)
    x[..., 12:20, 12:20] = 1
    area = data.augment(x, operations=0, flip=False, min_scale=0.25)[0, :, 0].sum((1, 2))
    assert area.max() > 3 * 64 and area.median() > 64  # a quarter of the image, enlarged, is four times the area


def write_bin(path, events):
    """The ATIS format, 5 bytes an event: x, y, 1 bit polarity, 23 bits time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = events["t"].astype(np.uint32)
    high = (events["p"].astype(np.uint32) << 7) | (t >> 16)
    raw = np.stack([events["x"], events["y"], high, (t >> 8) & 255, t & 255], 1)
    raw.astype(np.uint8).tofile(path)


def write_npy(path, events):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, events)


def write_aedat4(path, events, resolution=(128, 128)):
    dv = pytest.importorskip("dv_processing")
    path.parent.mkdir(parents=True, exist_ok=True)
    store = dv.EventStore()
    for e in events:
        store.push_back(int(e["t"]), int(e["x"]), int(e["y"]), bool(e["p"]))
    writer = dv.io.MonoCameraWriter(str(path), dv.io.MonoCameraWriter.EventOnlyConfig("DVS", resolution))
    writer.writeEvents(store)


WRITERS = {".bin": write_bin, ".npy": write_npy, ".aedat4": write_aedat4}


def test_data_folder_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("Train/a/1.npy", "Train/b/1.npy", "Test/a/1.npy", "Test/c/1.npy"):
        write_npy(tmp_path / "own" / name, recording(50))
    for name in ("Train/a/notes.txt", "Test/a/.hidden", "Test/c/1.h5", "Test/c/2.h5"):
        (tmp_path / "own" / name).touch()
    data.load(tmp_path / "own", tmp_path / "root", 2)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[0].partition("passed over ")[2].split(", ")) == ["1 .hidden", "1 .txt", "2 .h5"]
    assert lines[1] == f"warning: {tmp_path / 'own'}: not both to train and to test on: class b, c"
    assert lines[2].startswith("sensor: 12 x 9 pixels") and len(lines) == 3
    for file in tmp_path.rglob("*.npy"):
        file.unlink()
    with pytest.raises(data.UserError, match="of other kinds: .*2 .h5"):
        data.load(tmp_path / "own", tmp_path / "root", 2)


def test_data_sensor_of_a_folder_is_guessed_once_told_and_compared(tmp_path, capsys):
    def made(folder, reach, **changes):
        events = fields(x=np.arange(50) % reach[0], y=np.arange(50) % reach[1])
        for i, c in itertools.product(range(2), "ab"):
            write_npy(tmp_path / folder / c / f"{i}.npy", events)
        return data.load(tmp_path / folder, tmp_path / "root", 2, **changes)[0]
    whole = made("whole", (40, 30))
    assert whole.sensor == [40, 30] and whole.frames.shape[-1] == 40
    again = made("whole", (40, 30))  # written anew, and so made anew
    files = lambda: sorted((tmp_path / "root" / "frames").glob("whole*.frames"))
    before = files()
    told = data.load(tmp_path / "whole", tmp_path / "root", 2, size=40, sensor=[40, 30])[0]
    assert np.array_equal(told.frames, again.frames) and files() == before  # the same file
    part, right = made("part", (20, 15)), made("part", (20, 15), sensor=(40, 30), size=40)
    assert part.sensor == [20, 15] and right.sensor == [40, 30]
    assert right.frames.shape[-1] == 40 and not right.frames[..., 20:].any() and not right.frames[..., 20:, :].any()
    capsys.readouterr()
    for split, sensor in ((part, [40, 30]), (right, [40, 30]), (part, None)):
        data.compare_sensors(dict(sensor=sensor), tmp_path / "part", split)
    out = capsys.readouterr().out
    said = "20 x 15 pixels, that of the checkpoint 40 x 30: if the camera is the same, pass --sensor 40 30\n"
    assert out.count("warning") == 1 and out.endswith(said)
    write_npy(tmp_path / "whole" / "a" / "far.npy", fields(x=np.r_[:49, 4000]))
    assert data.load(tmp_path / "whole", tmp_path / "root", 2)[0].sensor[0] == 4001
    assert re.search(r"warning: sensor: 4001 x \d+ pixels.*far.npy", capsys.readouterr().out)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("parts", [True, False])
def test_data_folder_of_recordings(tmp_path, suffix, parts):
    made = {}
    for c, i in itertools.product("ab", range(12)):
        events = recording(40 + i, seed=i)
        events["x"][0], events["y"][0] = 11, 8  # the sensor's far corner
        folder = tmp_path / "own" / (("Train" if i < 10 else "Test") if parts else "") / c
        WRITERS[suffix](folder / f"r{i}{suffix}", events)
        made[c, i] = events
    (tmp_path / "own" / "notes.txt").write_text("not a recording")
    train_set, test_set = data.load(tmp_path / "own", tmp_path / "root", 3)
    n_test = 2 if parts else 1
    assert train_set.classes == ["a", "b"]
    assert len(train_set.labels) == 24 - 2 * n_test and len(test_set.labels) == 2 * n_test
    rows = [(c, i) for c in "ab" for i in range(12 - n_test)], [(c, i) for c in "ab" for i in range(12 - n_test, 12)]
    for split, keys in zip((train_set, test_set), rows):
        assert isinstance(split.frames, np.memmap) and split.labels.dtype == np.int64
        for frames, label, (c, i) in zip(split.frames, split.labels, keys):
            assert np.array_equal(frames, slow_frames(made[c, i], 3, (12, 9), 12)) and label == "ab".index(c)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "root" / "frames").iterdir()}
    assert sorted(p.suffix or p.name for p in stamps) == [".frames", ".sensor", ".tsv", "lock"]
    data.load(tmp_path / "own", tmp_path / "root", 3)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "root" / "frames").iterdir()}  # not made again
    WRITERS[suffix](tmp_path / "own" / ("Train" if parts else "") / "a" / f"r0{suffix}", recording(77))
    assert data.load(tmp_path / "own", tmp_path / "root", 3)[0].frames[0].sum() == 77  # a changed recording is noticed


def test_data_broken_recordings_are_named(tmp_path):
    for i in range(4):
        write_bin(tmp_path / "own" / "a" / f"{i}.bin", recording(20, seed=i))
    for name, content, why in [("4.bin", b"1234567", "truncated"), ("4.npy", b"no array", "cannot be read"),
                               ("4.aedat4", b"#!", "cannot be read")]:
        bad = tmp_path / "own" / "a" / name
        bad.write_bytes(content)
        with pytest.raises(data.UserError, match=why) as e:
            data.load(tmp_path / "own", tmp_path / "root")
        assert str(bad) in str(e.value) and "\n" not in str(e.value)
        assert not list((tmp_path / "root").glob("frames/*.*"))  # nothing half-made is left
        bad.unlink()
    np.save(tmp_path / "own" / "a" / "4.npy", np.zeros((5, 4)))
    with pytest.raises(data.UserError, match="fields x, y, t, p"):
        data.load(tmp_path / "own", tmp_path / "root")
    with pytest.raises(data.UserError, match="neither a folder"):
        data.load("no-such-data", tmp_path / "root")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(data.UserError, match="no recordings"):
        data.load(tmp_path / "empty", tmp_path / "root")


def fill_gesture(root, events):
    for part, n in (("Train", 10), ("Test", 10)):
        for user, label in itertools.product(range(n), range(11)):
            ms = np.stack([events["x"], events["y"], events["p"], events["t"] // 100], 1).astype(np.int64)
            write_npy(root / "DVSGesture" / f"ibmGesture{part}" / f"user{user:02}_led" / f"{label}.npy", ms)
        (root / "DVSGesture" / f"ibmGesture{part}.tar.gz").touch()


def fill_caltech(root, events):
    for c, n in {"BACKGROUND_Google": 4000, "airplanes": 4000, "zebra": 709}.items():
        for i in range(1, n + 1):
            write_bin(root / "NCALTECH101" / "Caltech101" / c / f"image_{i:04}.bin", events)
    (root / "NCALTECH101" / "N-Caltech101-archive.zip").touch()


def fill_nmnist(root, events):
    for part, digit in itertools.product(("Train", "Test"), range(10)):
        for i in range(1000):
            write_bin(root / "NMNIST" / part / str(digit) / f"{i:05}.bin", events)
    for name in ("train.zip", "test.zip"):
        (root / "NMNIST" / name).touch()


def fill_cifar(root, events):
    import tonic
    write_aedat4(root / "one.aedat4", events)
    for c, i in itertools.product(tonic.datasets.CIFAR10DVS.classes, range(100)):
        path = root / "CIFAR10DVS" / c / f"cifar10_{c}_{i}.aedat4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / "one.aedat4", path)


@pytest.mark.parametrize("name, fill, classes, sizes", [
    ("dvsgesture", fill_gesture, 11, (110, 110)), ("ncaltech101", fill_caltech, 3, (7839, 870)),
    ("nmnist", fill_nmnist, 10, (10_000, 10_000)), ("cifar10dvs", fill_cifar, 10, (900, 100))])
def test_data_public_sets_as_tonic_lays_them_out(tmp_path, capsys, name, fill, classes, sizes):
    events = recording(12)
    fill(tmp_path, events)
    if name == "cifar10dvs":
        (tmp_path / "CIFAR10DVS" / "CIFAR10DVS.zip").touch()
    train_set, test_set = data.load(name, tmp_path, 2, 32)
    assert (len(train_set.labels), len(test_set.labels)) == sizes and len(train_set.classes) == classes
    assert train_set.frames.shape[1:] == (2, 2, 32, 32)
    sensor = data.TONIC[name][1]
    if name == "ncaltech101":  # tonic moves every recording to the corner
        events["x"] -= events["x"].min()
        events["y"] -= events["y"].min()
    for frames in (train_set.frames[0], test_set.frames[-1]):
        assert np.array_equal(frames, slow_frames(events, 2, sensor, 32))
    assert ("warning" in capsys.readouterr().out) == (name != "ncaltech101")  # fewer than published: said, not hidden
    listing = next((tmp_path / "frames").glob("*.tsv")).read_text().splitlines()[1:]
    rows = [line.split("\t") for line in listing]
    assert [r[0] for r in rows] == ["train"] * sizes[0] + ["test"] * sizes[1]
    expected = []
    for part, c in itertools.product(("train", "test"), train_set.classes):
        expected += sorted(data.natural(r[2]) for r in rows if r[:2] == [part, c])
    assert [data.natural(r[2]) for r in rows] == expected


def test_data_caltech_archive_within_the_archive(tmp_path):
    write_bin(tmp_path / "one.bin", recording(12))
    folder = tmp_path / "NCALTECH101"
    (folder / "N-Caltech101-archive").mkdir(parents=True)
    with zipfile.ZipFile(folder / "N-Caltech101-archive" / "Caltech101.zip", "w") as z:
        for c, n in {"BACKGROUND_Google": 4000, "airplanes": 4709}.items():
            for i in range(n):
                z.write(tmp_path / "one.bin", f"Caltech101/{c}/image_{i:04}.bin")
    with zipfile.ZipFile(folder / "N-Caltech101-archive.zip", "w") as z:
        z.write(folder / "N-Caltech101-archive" / "Caltech101.zip", "N-Caltech101-archive/Caltech101.zip")
    import tonic
    with pytest.MonkeyPatch.context() as patch:
        md5 = hashlib.md5((folder / "N-Caltech101-archive.zip").read_bytes()).hexdigest()
        patch.setattr(tonic.datasets.NCALTECH101, "file_md5", md5)
        train_set, test_set = data.load("ncaltech101", tmp_path, 1, 8)
    assert (len(train_set.labels), len(test_set.labels)) == (3600 + 4239, 400 + 470)


@pytest.fixture
def server(tmp_path):
    """A web server here: /good sends the archive, /empty 202 and nothing, /other the wrong bytes, /broken half."""
    class Handler(http.server.BaseHTTPRequestHandler):
        archive = b""

        def do_GET(self):
            body = {"/good": self.archive, "/broken": self.archive, "/other": b"not it"}.get(self.path, b"")
            self.send_response(202 if self.path == "/empty" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path == "/broken" else body)

        def log_message(self, *_):
            pass
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_data_download(tmp_path, server, monkeypatch, capfd):
    import tonic
    handler, address = server
    fill_cifar(tmp_path / "made", recording(12))
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as z:
        for c in tonic.datasets.CIFAR10DVS.classes:
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as zz:
                for f in sorted((tmp_path / "made" / "CIFAR10DVS" / c).iterdir()):
                    zz.write(f, f"{c}/{f.name}")
            z.writestr(f"{c}.zip", inner.getvalue())
    handler.archive = outer.getvalue()
    monkeypatch.setattr(tonic.datasets.CIFAR10DVS, "file_md5", hashlib.md5(handler.archive).hexdigest())
    row = data.TONIC["cifar10dvs"]
    for path in ("/empty", "/other", "/broken", "/good"):  # each meets what the one before left behind
        monkeypatch.setitem(data.TONIC, "cifar10dvs", (*row[:4], dict(url=address + path)))
        if path == "/good":
            assert len(data.load("cifar10dvs", tmp_path / "root", 2, 16)[0].labels) == 900
            break
        with pytest.raises(data.UserError) as e:
            data.load("cifar10dvs", tmp_path / "root", 2, 16)
        archive = tmp_path / "root" / "CIFAR10DVS" / "CIFAR10DVS.zip"
        for part in (address + path, tonic.datasets.CIFAR10DVS.file_md5, str(archive)):
            assert part in str(e.value)
        assert "\n" not in str(e.value)
    assert capfd.readouterr().out.count("\n") <= 2  # tonic's own talk is not repeated


@pytest.mark.parametrize("name", ["cifar10dvs", "dvsgesture", "ncaltech101", "nmnist"])
def test_data_addresses_are_still_those_that_tonic_names(name):
    """figshare's API and tonic's dead addresses share the file ids; tonic still has md5 and file name as named here."""
    import tonic
    cls = getattr(tonic.datasets, data.TONIC[name][0])
    for attribute, address in data.TONIC[name][4].items():
        assert hasattr(cls, attribute) and address.startswith("https://api.figshare.com/v2/file/download/")
    whole = name in ("cifar10dvs", "ncaltech101")  # one archive, not one for each part
    for attribute in ("file_md5", "filename") if whole else ("train_md5", "train_filename"):
        assert hasattr(cls, attribute)


# --------------------------------------------------------------------------------------------------------------- eval

def test_eval_knn_equals_a_loop():
    bank, queries = torch.randn(30, 5), torch.randn(9, 5)
    labels, truth = torch.arange(30) % 4, torch.arange(9) % 4
    hits = 0
    for q, y in zip(queries, truth):
        cos = [float(q @ b / q.norm() / b.norm()) for b in bank]
        votes = [0.0] * 4
        for i in sorted(range(30), key=lambda i: -cos[i])[:7]:
            votes[int(labels[i])] += math.exp(cos[i] / 0.07)
        hits += votes.index(max(votes)) == y
    assert evaluation.knn_accuracy(bank, labels, queries, truth, k=7) == pytest.approx(hits / 9)
    assert evaluation.knn_accuracy(bank[:3], labels[:3], queries, truth, k=20) >= 0  # k larger than the bank


def test_eval_probe_solves_what_is_linear():
    bank, queries = torch.randn(200, 6), torch.randn(100, 6)
    rule = torch.randn(6, 3)
    y, truth = (bank @ rule).argmax(1), (queries @ rule).argmax(1)
    assert evaluation.probe_accuracy(bank, y, queries, truth) > 0.9
    assert evaluation.probe_accuracy(bank, y[torch.randperm(200)], queries, truth) < 0.6


@pytest.mark.parametrize("hits, n, low, high", [
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18)])
def test_eval_wilson_equals_the_published_intervals(hits, n, low, high):
    """Newcombe 1998, table I, method 3."""
    share, *interval = evaluation.wilson(hits, n)
    assert share == pytest.approx(100 * hits / n) and interval == pytest.approx([low, high], abs=0.006)
    assert evaluation.wilson(n - hits, n)[1:] == pytest.approx([100 - interval[1], 100 - interval[0]])


def test_eval_accuracy_equals_loops():
    T, N, C = 3, 60, 12
    logits, labels = torch.randn(T, N, C), torch.randint(C, (N,))
    logits[torch.arange(T)[:, None], torch.arange(N), labels] += torch.tensor([0.5, 1.5, 3.0])[:, None]
    names = [f"class {c}" for c in range(C)]
    f = evaluation.accuracy_figures(logits, labels, names)
    confusion, top5 = [[0] * C for _ in range(C)], 0
    for t in range(T):
        hits = 0
        for i in range(N):
            score = [sum(float(logits[s, i, c]) for s in range(t + 1)) for c in range(C)]
            order = sorted(range(C), key=lambda c: -score[c])
            hits += order[0] == int(labels[i])
            if t == T - 1:
                confusion[labels[i]][order[0]] += 1
                top5 += int(labels[i]) in order[:5]
        assert f["steps"][t] == evaluation.wilson(hits, N)
    assert f["steps"][0][0] < f["accuracy"] == 100 * hits / N and f["interval"] == evaluation.wilson(hits, N)[1:]
    assert f["confusion"] == confusion and f["top5"] == 100 * top5 / N > f["accuracy"]
    assert f["by_class"] == pytest.approx([100 * row[c] / max(1, sum(row)) for c, row in enumerate(confusion)])
    wrong = sorted((-confusion[i][j], i, j) for i in range(C) for j in range(C) if i != j)
    assert [n for n, _, _ in f["worst"]] == [-n for n, _, _ in wrong[:5]]
    assert all(n == confusion[names.index(true)][names.index(guess)] for n, true, guess in f["worst"])
    line = evaluation.accuracy_line(logits.mean(0), labels)
    assert line == f"test accuracy {100 * hits / N:.2f} % (last epoch, {N} recordings)"
    few = evaluation.accuracy_figures(logits[:, labels < 2, :2], labels[labels < 2], names[:2])
    assert few["top5"] is None and len(few["worst"]) <= 2


def test_eval_alignment_and_uniformity_equal_loops():
    a, b, z = torch.randn(7, 5), torch.randn(7, 5), torch.randn(9, 5)
    unit = lambda v: [float(x) / math.sqrt(sum(float(y) ** 2 for y in v)) for x in v]
    square = lambda v, w: sum((x - y) ** 2 for x, y in zip(unit(v), unit(w)))
    f = evaluation.alignment_uniformity(a, b, z)
    assert f["alignment"] == pytest.approx(sum(map(square, a, b)) / 7, rel=1e-5)
    pairs = [math.exp(-2 * square(v, w)) for v, w in itertools.combinations(z, 2)]
    assert f["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def with_statistics(net, x):
    """The network with the batch-norm statistics of x: it fires."""
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    net.train()(x)
    return net.eval()


def check_layer(layer, spikes, macs, operations):
    """Against output spikes [T, B, ...] of the layer, counted neuron by neuron, and what is expected per recording."""
    T, B = spikes.shape[:2]
    neurons = [[bool(v) for v in column] for column in spikes.flatten(2).flatten(0, 1).T]
    assert layer["rate"] == pytest.approx(100 * sum(map(sum, neurons)) / (T * B * len(neurons)))
    assert layer["silent"] == pytest.approx(100 * sum(not any(n) for n in neurons) / len(neurons))
    assert layer["rate"] > 1 and layer["macs"] == macs and layer["operations"] == pytest.approx(operations)
    assert layer["energy"] == pytest.approx(0.9e-6 * operations if operations else 4.6e-6 * macs)


def test_eval_rates_and_operations_counted_by_hand():
    """Each layer of Spikformer-1-16 at 8 pixels, T = 3, 4 recordings: spike by spike where a spike's cost is known."""
    T, B = 3, 4
    x = torch.rand(T, B, 2, 8, 8)
    net = models.Classifier(models.build("spikformer-1-16", 8), 5)
    torch.nn.init.ones_(net.encoder.layers[0].qkv.bn.bias)  # or four tokens would not make the attention fire
    net = with_statistics(net, x)
    with torch.no_grad():
        halves = lambda: torch.cat([net(x[:, :3]), net(x[:, 3:])], 1)  # two batches, one larger
        out, f, rasters = evaluation.spike_figures(net, halves)
        assert torch.equal(out, net(x)) and not any(m._forward_hooks for m in net.modules())
        e, layers = net.encoder, {layer["layer"]: layer for layer in f["layers"]}
        s = [x]
        for stage in e.stem:
            s.append(stage(s[-1]))
        attention, mlp = e.layers
        tokens = s[4] + e.position(s[4])
        qkv = attention.qkv(tokens)
        inner = []
        attention.lif.register_forward_hook(lambda m, i, out: inner.append(out))
        mixed = attention(tokens)
        middle = tokens + mixed
        hidden = mlp[0](middle)
    check_layer(layers["stem.0"], s[1], 8 * 8 * 9 * 2 * 2 * T, 0)
    for i, (size, c_in, c_out) in enumerate([(8, 2, 4), (8, 4, 8), (4, 8, 16)], 1):  # stages 2 and 3 pool at the end
        macs = size * size * 9 * c_in * c_out * T
        check_layer(layers[f"stem.{i}"], s[i + 1], macs, macs * s[i].mean().item())
    macs = 2 * 2 * 9 * 16 * 16 * T
    check_layer(layers["position"], e.position(s[4]), macs, macs * s[4].mean().item())
    added = tokens.sum().item() * 48  # a spike is added 48 times, a sum of two twice
    check_layer(layers["layers.0.qkv"], qkv, 2 * 2 * 16 * 48 * T, added / B)
    q, k = qkv[:, :, :16], qkv[:, :, 16:32]
    added = 16 * (q.sum() + k.sum()).item()  # one head of 16, 4 tokens
    check_layer(layers["layers.0"], inner[0], 2 * 4 * 16 * 16 * T, added / B)
    check_layer(layers["layers.0.proj"], mixed, 2 * 2 * 16 * 16 * T, inner[0].sum().item() * 16 / B)
    check_layer(layers["layers.1.0"], hidden, 2 * 2 * 16 * 64 * T, middle.sum().item() * 64 / B)
    check_layer(layers["layers.1.1"], mlp[1](hidden), 2 * 2 * 64 * 16 * T, hidden.sum().item() * 16 / B)
    assert tokens.max() > 1 and layers["head"]["macs"] == 16 * 5 * T and layers["head"]["operations"] == 0
    assert f["macs"] == sum(layer["macs"] for layer in f["layers"])
    assert f["energy"] == pytest.approx(sum(layer["energy"] for layer in f["layers"]))
    assert f["energy_without_spikes"] == pytest.approx(4.6e-6 * f["macs"]) and f["energy"] < f["energy_without_spikes"]
    outputs = [*s[1:], e.position(s[4]), qkv, inner[0], mixed, hidden, mlp[1](hidden)]
    assert f["rate"] == pytest.approx(100 * sum(o.sum().item() for o in outputs) / sum(o.numel() for o in outputs))
    assert list(rasters) == [name for name in layers if name != "head"]
    assert all(r.shape == (T, 16) for r in rasters.values())


def test_eval_operations_of_sew_resnet():
    """Strides, shortcuts, and inputs that are sums of spikes."""
    x, inputs, macs = torch.rand(2, 3, 2, 16, 16), {}, {}
    net = with_statistics(models.build("sew-resnet-18-2", 16), x)

    def note(name, m, i, out):
        inputs[name], macs[name] = i[0], 2 * out[0].numel() * m.in_channels * m.kernel_size[0] ** 2
    for name, m in net.named_modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_hook(functools.partial(note, name.removesuffix(".conv")))
    with torch.no_grad():
        _, f, _ = evaluation.spike_figures(net, lambda: net(x))
    assert [layer["layer"] for layer in f["layers"]] == list(inputs)
    assert "blocks.2.shortcut" in inputs and len(inputs) == 20
    assert max(v.max() for k, v in inputs.items() if k != "stem") > 1
    for i, layer in enumerate(f["layers"]):
        name = layer["layer"]
        assert layer["macs"] == macs[name]
        assert layer["operations"] == pytest.approx(macs[name] * inputs[name].mean().item() if i else 0)


@pytest.fixture(scope="session")
def tiny_runs(shapes, tmp_path_factory):
    """Of three shapes, tiny: `pre` is pre-trained as well, `s0` to `s2` differ in seed, `other` in --lr too."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--image-size", "16", "--batch-size", "6", "--epochs", "8"]
    run_tiny(shapes, folder / "pre", *flags)
    for name, seed, lr in (("s0", "0", "0.004"), ("s1", "1", "0.004"), ("s2", "2", "0.004"), ("other", "3", "0.002")):
        run_tiny(shapes, folder / name, "--pretrain-epochs", "0", "--seed", seed, "--lr", lr, *flags)
    return folder


def evaluate(capsys, *argv):
    """Runs eval.py -> its lines on stdout, on stderr."""
    capsys.readouterr()
    evaluation.main(["--ckpt", *map(str, argv)])
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()



def test_eval_energy_does_not_depend_on_batches():
    """A layer that takes real numbers in one batch multiplies in all of them."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.nn.init.eye_(net[0].weight), torch.nn.init.zeros_(net[0].bias)
    batches = torch.zeros(1, 3, 2), torch.full((1, 3, 2), 0.5)
    f = evaluation.spike_figures(net, lambda: torch.cat([net(x) for x in batches], 1))[1]
    assert [layer["energy"] for layer in f["layers"]] == [pytest.approx(4 * 4.6e-6)] * 2 and f["operations"] == 0


def test_eval_counts_convolutions_of_any_dimension():
    net = torch.nn.Conv1d(3, 4, 5, bias=False)  # takes [T, channels, 8], one recording
    f = evaluation.spike_figures(net, lambda: net(torch.ones(2, 3, 8))[:, None])[1]
    assert f["macs"] == 2 * 4 * 4 * 3 * 5  # 2 steps, 4 channels of 4 places, 3 times 5 products each


def test_eval_json_holds_what_the_text_says(tiny_runs, tmp_path, capsys):
    lines, _ = evaluate(capsys, tiny_runs / "s0" / "finetuned.pt", "--json", tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    (f,) = written["runs"]
    text = "\n".join(lines)
    assert written["units"] == evaluation.UNITS and written["groups"] == []
    assert f["frozen"] is True and f["args"]["seed"] == 0
    assert lines[-1] == f"test accuracy {f['accuracy']:.2f} % (last epoch, 12 recordings)" and f["device"] == "cpu"
    assert lines[-2] == f"frozen features: kNN {f['knn']:.2f} %, linear probe {f['probe']:.2f} % (12 test recordings)"
    assert f"95 % interval {f['interval'][0]:.2f} to {f['interval'][1]:.2f} %" in text and "top-5" not in text
    assert f"1 to 2 time steps: {f['steps'][0][0]:.2f}, {f['accuracy']:.2f} %" in text
    assert f"alignment {f['alignment']:.3f}, uniformity {f['uniformity']:.3f}; encoder unchanged" in text
    speed = f"{f['per_second']:,.0f} recordings/s, 6 at once; {f['latency']:.2f} ms for one"
    assert f"{f['parameters']:,} parameters; on cpu {speed}" in text
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    for name, share, row in zip("abc", f["by_class"], f["confusion"]):
        assert rows[name] == [f"{share:.2f}", "%", "of", "4", *(str(c or ".") for c in row)] and sum(row) == 4
    for layer in f["layers"] + [f | dict(layer="all")]:
        rate = [f"{layer[k]:.2f}" for k in ("rate", "silent") if k in layer]
        costs = [f"{layer['macs']:,.0f}", f"{layer['operations']:,.0f}", f"{layer['energy']:.4f}"]
        assert rows[layer["layer"]] == rate + costs
    net = models.Classifier(models.build("spikformer-1-16", 16), 3)
    assert sum(p.numel() for p in net.parameters()) == f["parameters"]
    assert evaluate(capsys, tiny_runs / "s0" / "finetuned.pt")[0][-3] in lines  # the same views again


def test_eval_of_a_pretrained_encoder_and_of_the_same_one_in_a_classifier(tiny_runs, tmp_path, capsys):
    lines, _ = evaluate(capsys, tiny_runs / "pre" / "pretrained.pt")
    assert lines[-1].startswith("frozen features: kNN ") and not any("accuracy" in line for line in lines)
    ckpt = torch.load(tiny_runs / "pre" / "pretrained.pt", weights_only=True)
    net = models.Classifier(models.build("spikformer-1-16", ckpt["args"]["image_size"]), 3)
    net.encoder.load_state_dict(ckpt["weights"])
    torch.save(ckpt | dict(kind="finetuned", weights=net.state_dict()), tmp_path / "f.pt")
    again, _ = evaluate(capsys, tmp_path / "f.pt")
    assert again[-2] == lines[-1] and again[-3] == lines[-2] and again[-1].startswith("test accuracy ")


class Own(torch.nn.Module):
    """An encoder as a reader of the README would add it, with spikes or without."""

    def __init__(self, spiking):
        super().__init__()
        self.dim = 6
        self.encoder = torch.nn.Conv2d(2, 4, 3, 2)  # this name and the next are used by Classifier too
        self.head = torch.nn.Linear(4 * 7 * 7, 6)
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.neuron = neuron.LIF(v_threshold=0.05) if spiking else torch.nn.ReLU()  # one serves both, having no state

    def forward(self, x):
        x = self.neuron(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.neuron(self.head(x.flatten(2)))


@pytest.mark.parametrize("spiking", [True, False])
def test_train_and_eval_of_a_backbone_of_ones_own(shapes, tmp_path, capsys, monkeypatch, spiking):
    build = models.build
    monkeypatch.setattr(models, "build", lambda arch, size: Own(spiking) if arch == "own" else build(arch, size))
    run_tiny(shapes, tmp_path / "a", "--arch", "own", "--image-size", "16")
    lines, _ = evaluate(capsys, tmp_path / "a" / "finetuned.pt", "--json", tmp_path / "f.json", "--pictures", tmp_path)
    f = json.loads((tmp_path / "f.json").read_text())["runs"][0]
    layers = {layer["layer"]: layer for layer in f["layers"]}
    macs = {"encoder": 2 * 7 * 7 * 9 * 2 * 4, "head": 2 * 4 * 7 * 7 * 6, "head (2)": 2 * 6 * 3}
    assert {name: layers[name]["macs"] for name in macs} == macs and f["macs"] == sum(macs.values())
    assert lines[-1].startswith("test accuracy ")
    # Spikes enter all but the first layer, or nothing is whole but the frames.
    operations = {"head": macs["head"] * layers["neuron"]["rate"] / 100,
                  "head (2)": macs["head (2)"] * layers["neuron (2)"]["rate"] / 100} if spiking else {}
    counted = {name: layer["operations"] for name, layer in layers.items() if layer["operations"]}
    assert counted == pytest.approx(operations)
    energy = 4.6e-6 * macs["encoder"] + 0.9e-6 * sum(operations.values())
    assert f["energy"] == pytest.approx(energy if spiking else f["energy_without_spikes"])
    assert (tmp_path / "spikes.png").exists() == spiking == ("rate" in f) and (tmp_path / "curves.png").exists()
    assert evaluate(capsys, tmp_path / "a" / "pretrained.pt")[0][-1].startswith("frozen features: ")
    for kind in ("pretrained", "finetuned"):  # --init takes the encoder's weights, all of them and no others
        ckpt, net = torch.load(tmp_path / "a" / f"{kind}.pt", weights_only=True), Own(spiking)
        train.load_encoder(net, ckpt, None)
        prefix = "encoder." if kind == "finetuned" else ""
        assert all(torch.equal(v, ckpt["weights"][prefix + k]) for k, v in net.state_dict().items())
    monkeypatch.undo()
    with pytest.raises(data.UserError, match="no backbone is called 'own'"):
        evaluation.load_checkpoint(tmp_path / "a" / "finetuned.pt")


def test_eval_proves_the_encoder_frozen(tiny_runs, monkeypatch, capsys):
    restore = evaluation.restore

    def leaky(*a):
        net = restore(*a)
        net.encoder.stem[0].register_forward_pre_hook(lambda m, _: m.bn.num_batches_tracked.add_(1) is None or None)
        return net
    monkeypatch.setattr(evaluation, "restore", leaky)
    assert any("encoder CHANGED" in line for line in evaluate(capsys, tiny_runs / "s0" / "finetuned.pt")[0])


def test_eval_table_of_seeds(tiny_runs, tmp_path, capsys):
    paths = [tiny_runs / name / "finetuned.pt" for name in ("s0", "other", "s1", "s2")]
    paths.append(tiny_runs / "pre" / "pretrained.pt")
    lines, _ = evaluate(capsys, *paths, "--json", tmp_path / "f.json")
    written = json.loads((tmp_path / "f.json").read_text())
    title = "pretrain_epochs 0, lr 0.004, kind finetuned, 3 seeds"  # what differs
    assert len(lines) == 7 and lines[-1].startswith(f"{title} ")
    assert [line.split()[0] for line in lines[1:6]] == list(map(str, paths))
    accuracies = [f"{f['accuracy']:.2f}" if "accuracy" in f else "-" for f in written["runs"]]
    assert [line.split()[1] for line in lines[1:6]] == accuracies
    (group,) = written["groups"]
    same = [f for f in written["runs"] if f["path"] in group["paths"]]
    assert group["title"] == title and group["paths"] == [str(paths[i]) for i in (0, 2, 3)]
    assert len({f["uniformity"] for f in same}) == 3
    for k in evaluation.UNITS:
        mean, std = statistics.mean(f[k] for f in same), statistics.stdev(f[k] for f in same)
        digits = 2 if evaluation.UNITS[k] else 3
        assert group[k] == pytest.approx([mean, std]) and f"{mean:.{digits}f} ± {std:.{digits}f}" in lines[-1]


def test_eval_table_tells_runs_apart_by_what_made_them(capsys):
    """The queue of a run from scratch is no setting of it; two pre-trainings that one seed fine-tunes are two runs."""
    made = dict(dict.fromkeys(evaluation.PRETRAINING, 1), pretrained_on="x", seed=0, lr=1.0, init=None)
    scratch = made | dict(pretrain_epochs=0)
    runs = [scratch | dict(seed=0), scratch | dict(seed=1, queue_size=9, pretrained_on="y"),
            made | dict(init="a.pt"), made | dict(init="b.pt")]
    figures = dict.fromkeys(evaluation.UNITS, 1.0) | dict(kind="finetuned", dataset="x")
    rows = [figures | dict(path=str(i), args=args, accuracy=float(i)) for i, args in enumerate(runs)]
    groups = evaluation.table(rows)
    assert [(g["title"], g["paths"], g["accuracy"][0]) for g in groups] == [
        ("pretrain_epochs 0, 2 seeds", ["0", "1"], 0.5), ("pretrain_epochs 1, 2 seeds", ["2", "3"], 2.5)]


def test_eval_warns_of_training_recordings_in_the_test(shapes, tmp_path, capsys):
    for c, i in itertools.product("ab", range(12)):
        write_npy(tmp_path / "grow" / c / f"{i}.npy", recording(60, seed=i))
    run_tiny(tmp_path / "grow", tmp_path / "run", "--pretrain-epochs", "0")
    assert "recordings" not in "".join(evaluate(capsys, tmp_path / "run" / "finetuned.pt")[1])
    write_npy(tmp_path / "grow" / "a" / "12.npy", recording(60))
    assert "holds 23+2 recordings, 22+2 when" in evaluate(capsys, tmp_path / "run" / "finetuned.pt")[1][0]


def test_train_on_recordings_of_one_class(tmp_path, capsys):
    """Nothing to tell apart: pre-training alone, and no kNN or probe that would say 100 %."""
    for i in range(12):
        write_npy(tmp_path / "any" / "all" / f"{i}.npy", recording(60, seed=i))
    with pytest.raises(SystemExit):
        run_tiny(tmp_path / "any", tmp_path / "run")
    assert "single class" in capsys.readouterr().err
    run_tiny(f"{tmp_path / 'any'}/", tmp_path / "run", "--epochs", "0")
    assert [line.split(",")[5] for line in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]] == ["", ""]
    lines, _ = evaluate(capsys, tmp_path / "run" / "pretrained.pt", "--json", tmp_path / "f.json")
    (f,) = json.loads((tmp_path / "f.json").read_text())["runs"]
    assert "knn" not in f and "probe" not in f and f["dataset"] == str(tmp_path / "any")
    assert not any("kNN" in line for line in lines)


def test_eval_on_other_data(tiny_runs, shapes, tmp_path, capsys):
    """Strange classes: which, and transfer. The same classes in another order: the same accuracy."""
    for part, c in itertools.product(("Train", "Test"), "abc"):
        shutil.copytree(shapes / part / c, tmp_path / "other" / part / {"a": "a", "b": "z", "c": "c"}[c])
    ckpt = tiny_runs / "s0" / "finetuned.pt"
    own, _ = evaluate(capsys, ckpt)
    lines, _ = evaluate(capsys, ckpt, "--dataset", tmp_path / "other", "--root", tmp_path)
    assert "no accuracy, the classes do not agree: only in the data ['z'], only in the checkpoint ['b']" in lines
    assert lines[-1] == own[-2]  # kNN and probe do not mind the names
    assert not any(line.startswith("test accuracy") for line in lines)
    content = torch.load(ckpt, weights_only=True)
    content["classes"].reverse()
    for k in ("head.weight", "head.bias"):
        content["weights"][k] = content["weights"][k].flip(0)
    torch.save(content, tmp_path / "reversed.pt")
    assert evaluate(capsys, tmp_path / "reversed.pt")[0][-2:] == own[-2:]


def test_eval_pictures(tiny_runs, tmp_path, capsys):
    """Every one is written, readable, and shows something."""
    image = pytest.importorskip("matplotlib.image")
    evaluate(capsys, tiny_runs / "pre" / "finetuned.pt", "--pictures", tmp_path / "a" / "b")
    shutil.copy(tiny_runs / "pre" / "pretrained.pt", tmp_path)  # away from its log.csv
    evaluate(capsys, tmp_path / "pretrained.pt", "--pictures", tmp_path / "pre")
    pictures = sorted(p.name for p in (tmp_path / "a" / "b").iterdir())
    assert pictures == ["accuracy.png", "curves.png", "frames.png", "map.png", "spikes.png"]
    assert sorted(p.name for p in (tmp_path / "pre").iterdir()) == ["frames.png", "map.png", "spikes.png"]
    figure = pytest.importorskip("matplotlib.figure").Figure()  # of a test set of a single recording:
    page = lambda *_: figure.subplots(squeeze=False)
    evaluation.draw_map(torch.ones(1, 4), data.Split(None, np.zeros(1, int), ["a"]), page)
    for path in tmp_path.rglob("*.png"):
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[1] >= 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert 0.01 < (pixels < 0.9).any(2).mean() < 0.9


def test_eval_without_matplotlib(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    lines, errors = evaluate(capsys, tiny_runs / "s0" / "finetuned.pt", "--pictures", tmp_path / "a")
    assert len(errors) == 1 and "pip install matplotlib" in errors[0]
    assert lines[-1].startswith("test accuracy ") and not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags, says", [
    (["--pictures", "p"], "--pictures"), (["--json", "no/such/folder/f.json"], "no/such/folder"),
    (["--dataset", "no/such/data"], "no/such/data"), (["--pictures", __file__], __file__)])
def test_eval_answers_a_mistake_with_one_line(tiny_runs, flags, says, capsys):
    with pytest.raises(SystemExit) as e:
        evaluation.main(["--ckpt", *[str(tiny_runs / "s0" / "finetuned.pt")] * (1 + (says == "--pictures")), *flags])
    errors = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(errors) == 1 and says in errors[0]


# -------------------------------------------------------------------------------------------------------------- train

@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of recordings of three toy shapes: 3 x 20 to train on, 3 x 4 to test."""
    folder = tmp_path_factory.mktemp("shapes")
    for i, c in itertools.product(range(24), range(3)):
        path = folder / ("Train" if i < 20 else "Test") / "abc"[c] / f"{i}.npy"
        write_npy(path, data.toy_events(f"toy:0:{10 * i + c}"))
    return folder


TINY = "--arch spikformer-1-16 --n-frames 2 --pretrain-epochs 2 --epochs 2 --queue-size 8 --no-compile".split()


def tiny(shapes, out, *flags):
    return ["--dataset", str(shapes), "--root", str(out.parent / "root"), "--out", str(out), *TINY, *flags]


def run_tiny(shapes, out, *flags):
    train.main(tiny(shapes, out, *flags))


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def test_train_and_eval_from_nothing(shapes, tmp_path, capsys):
    run_tiny(shapes, tmp_path / "a")
    lines = capsys.readouterr().out.splitlines()
    assert any("log(K + 1)" in line and f"{math.log(9):.3f}" in line for line in lines)
    assert lines[-1].startswith("test accuracy ") and lines[-1].endswith(" % (last epoch, 12 recordings)")
    rows = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert rows[0] == "phase,epoch,loss,accuracy,lr,knn,seconds" and [r.split(",")[:2] for r in rows[1:]] == [
        ["pretrain", "1"], ["pretrain", "2"], ["finetune", "1"], ["finetune", "2"]]
    assert all(0 <= float(r.split(",")[5]) <= 1 for r in rows[1:3])  # kNN
    evaluation.main(["--ckpt", str(tmp_path / "a" / "finetuned.pt")])
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]


def test_train_is_reproducible_bit_for_bit(shapes, tmp_path):
    run_tiny(shapes, tmp_path / "a"), run_tiny(shapes, tmp_path / "b"), run_tiny(shapes, tmp_path / "c", "--seed", "1")
    for name in ("pretrained.pt", "finetuned.pt"):
        a, b, c = (weights(tmp_path / run / name) for run in "abc")
        assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_train_resumes_where_it_was_interrupted(shapes, tmp_path, monkeypatch, capsys, stop_at):
    run_tiny(shapes, tmp_path / "whole")
    save, saves = train.Run.save, []

    def interrupt(self, name, content):
        save(self, name, content)
        saves.append(name)
        if saves.count("state.pt") == stop_at and name == "state.pt":
            raise KeyboardInterrupt
    monkeypatch.setattr(train.Run, "save", interrupt)
    with pytest.raises(SystemExit) as e:
        run_tiny(shapes, tmp_path / "cut")
    assert e.value.code == 130 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(train.Run, "save", save)
    run_tiny(shapes, tmp_path / "cut", "--resume")
    for name in ("pretrained.pt", "finetuned.pt"):
        a, b = weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)
        assert all(torch.equal(a[k], b[k]) for k in a)
    last = [line.split(",")[:6] for line in (tmp_path / "whole" / "log.csv").read_text().splitlines()]
    assert last == [line.split(",")[:6] for line in (tmp_path / "cut" / "log.csv").read_text().splitlines()]
    run_tiny(shapes, tmp_path / "cut", "--resume")  # of a finished run: tests again, trains nothing
    with pytest.raises(SystemExit) as e:
        run_tiny(shapes, tmp_path / "cut", "--resume", "--lr", "0.5")
    assert e.value.code == 2 and "--lr" in capsys.readouterr().err


def test_train_refuses_a_damaged_state(shapes, tmp_path, capsys):
    run_tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0")
    state = tmp_path / "a" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    for _ in range(2):  # cut short, then missing: the finished weights beside it stay
        with pytest.raises(SystemExit) as e:
            run_tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0", "--resume")
        assert e.value.code == 2 and "state.pt" in capsys.readouterr().err
        assert (tmp_path / "a" / "finetuned.pt").exists()
        state.unlink(missing_ok=True)


def test_train_variants(shapes, tmp_path, capsys):
    run_tiny(shapes, tmp_path / "a")
    run_tiny(shapes, tmp_path / "scratch", "--pretrain-epochs", "0", "--labels-per-class", "2")
    assert not (tmp_path / "scratch" / "pretrained.pt").exists()
    capsys.readouterr()
    run_tiny(shapes, tmp_path / "init", "--init", str(tmp_path / "a" / "pretrained.pt"), "--temperature", "3")
    assert "warning: without effect: --temperature;" in capsys.readouterr().out
    was, args = (torch.load(tmp_path / name / "finetuned.pt", weights_only=True)["args"] for name in ("a", "init"))
    assert args == was | {k: args[k] for k in ("init", "out")} and args["init"]  # how it was made, not what flags say
    a, b = weights(tmp_path / "a" / "finetuned.pt"), weights(tmp_path / "init" / "finetuned.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)  # fine-tuning starts from the same encoder and seed
    run_tiny(shapes, tmp_path / "mbc", "--alpha", "1", "--beta", "0", "--momentum", "0", "--queue-size", "1")
    run_tiny(shapes, tmp_path / "mac", "--alpha", "0", "--beta", "1", "--momentum", "1", "--queue-size", "500")
    run_tiny(shapes, tmp_path / "sew", "--arch", "sew-resnet-18-4", "--batch-size", "7")
    capsys.readouterr()
    run_tiny(shapes, tmp_path / "unlabelled", "--epochs", "0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(str(tmp_path / "unlabelled" / "pretrained.pt"))
    assert len([line for line in lines if line.startswith("warning: pretrain:") and "steps are few" in line]) == 1
    a, b = weights(tmp_path / "a" / "pretrained.pt"), weights(tmp_path / "unlabelled" / "pretrained.pt")
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path / "unlabelled" / "finetuned.pt").exists()


def ones(events, n_frames, sensor_size, size):
    return np.ones((n_frames, 2, size, size), np.uint8)


def test_data_a_changed_reader_or_to_frames_makes_frames_anew(shapes, tmp_path, monkeypatch):
    before = np.array(data.load(shapes, tmp_path, 2, 16)[0].frames)

    def flipped(path):
        events = np.load(path)
        events["p"] = events["p"] == 0
        return events
    monkeypatch.setitem(data.READERS, ".npy", flipped)
    assert np.array_equal(data.load(shapes, tmp_path, 2, 16)[0].frames, before[:, :, ::-1])
    monkeypatch.setattr(data, "to_frames", ones)
    assert (data.load(shapes, tmp_path, 2, 16)[0].frames == 1).all()


def test_train_log_takes_a_new_column(tmp_path):
    train.Run.write_log(types.SimpleNamespace(out=tmp_path, log=[dict(epoch=1), dict(epoch=2, mine=3)]))
    assert (tmp_path / "log.csv").read_text() == "epoch,mine\n1,\n2,3\n"


def test_train_labels_per_class(shapes, tmp_path, capsys):
    split = data.load(shapes, tmp_path, 2)[0]
    assert capsys.readouterr().out.startswith("sensor: 32 x 32")
    few, again, other = (train.labelled(split, 4, seed) for seed in (0, 0, 1))
    assert few.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(few.frames, again.frames) and not np.array_equal(few.frames, other.frames)
    assert train.labelled(split, 0, 0) is split and not capsys.readouterr().out
    assert len(train.labelled(split, 21, 0).labels) == 60
    assert capsys.readouterr().out == "warning: fewer than 21 recordings to label in class a, b, c\n"


def test_train_out_of_memory_is_one_line(shapes, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run_tiny(shapes, tmp_path / "a", "--arch", "spikformer-1-4000000")
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and err[-1].startswith("error: out of memory: lower --batch-size")


def test_train_leaves_no_run_written_over(shapes, tmp_path, monkeypatch, capsys):
    run_tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0")
    before = (tmp_path / "a" / "finetuned.pt").read_bytes()
    with pytest.raises(SystemExit) as e:
        run_tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0")
    assert e.value.code == 2 and "--resume" in capsys.readouterr().err
    assert (tmp_path / "a" / "finetuned.pt").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    for expected in ("shapes", "shapes-2"):
        args = train.parse(["--dataset", str(shapes)])
        out = train.run_folder(args)[0]
        assert out.name.replace(shapes.name, "shapes") == expected
        (out / "log.csv").touch()
    resume = train.parse(["--dataset", str(shapes), "--resume"])
    assert train.run_folder(resume)[0].name == shapes.name + "-2"
    (out.parent / (shapes.name + "-3")).mkdir()  # of a run that stopped in its first epoch: not the finished one before
    assert train.run_folder(resume)[0].name == shapes.name + "-3"


def command(*argv, threads=None):
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.run([sys.executable, *argv], cwd=HERE, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("argv, says", [
    (["train.py", "--dataset", "no/such/folder"], "no/such/folder"),
    (["train.py", "--arch", "resnet-50"], "resnet-50"),
    (["train.py", "--lr", "fast"], "--lr"),
    (["train.py", "--momentum", "1.5"], "--momentum"),
    (["train.py", "--epoch-count", "3"], "--epoch-count"),
    (["train.py", "--dataset"], "--dataset"),
    (["train.py", "--device", "gpu"], "--device gpu"),
    (["train.py", "--seed", "99999999999999999999"], "--seed"),
    (["eval.py", "--ckpt", "no/such.pt", "--device", "gpu"], "--device gpu"),
    (["train.py", "--init", "no/such.pt"], "no/such.pt"),
    (["eval.py", "--ckpt", "no/such.pt"], "no/such.pt"),
    (["eval.py", "--ckpt", "README.md"], "README.md"),
    (["eval.py", "--ckpt", "README.md", "--picture", "docs"], "did you mean --pictures?"),
    (["eval.py"], "--ckpt")])
def test_train_and_eval_answer_a_mistake_with_one_line(argv, says, tmp_path):
    run = command(*argv[:1], *(["--root", str(tmp_path)] if argv[0] == "train.py" else []), *argv[1:])
    assert run.returncode == 2 and says in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_train_help_shows_the_row_of_the_data_set():
    helps = [command("train.py", "--dataset", name, "--help").stdout for name in ("cifar10dvs", "nmnist")]
    assert "(default: 128)" in helps[0] and "(default: 0)" in helps[1] and "(default: 34)" in helps[1]
    shown = helps[0].split("--out")[0].split("--queue-size")[1].split("--init")[0]
    assert "(default: None)" not in shown


def test_train_command_line_on_the_toy_data_and_scripts_of_the_readme(tmp_path, monkeypatch, capsys):
    flags = "--pretrain-epochs 1 --epochs 1 --arch spikformer-1-16 --n-frames 2 --image-size 12 --no-compile".split()
    run = command("train.py", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "runs" / "toy"), *flags)
    assert run.returncode == 0, run.stderr
    last = run.stdout.splitlines()[-1]
    assert last.startswith("test accuracy ") and last.endswith("500 recordings)")
    again = command("eval.py", "--ckpt", str(tmp_path / "runs" / "toy" / "finetuned.pt"))
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == last
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_TRAIN", 600), monkeypatch.setattr(data, "TOY_TEST", 100)
    scripts = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        torch.manual_seed(0)
        exec(script, {})
    knn, answer = capsys.readouterr().out.splitlines()
    assert float(knn) > 0.3 and answer.endswith("torch.Size([1, 16])")
    assert answer.split(" torch.Size")[0] in data.toy_shapes()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def test_train_on_two_processes(shapes, tmp_path):
    """One process under torchrun is a run without it; two share the work, write once, resume; a mistake ends both."""
    flags = ["--dataset", str(shapes), "--root", str(tmp_path / "root"), *TINY, "--batch-size", "7"]
    out = lambda name: ["--out", str(tmp_path / name)]
    plain = command("train.py", *flags, *out("plain"), threads=1)
    one = command(*TORCHRUN, "1", "train.py", *flags, *out("one"), threads=1)
    two = command(*TORCHRUN, "2", "train.py", *flags, *out("two"), threads=1)
    assert plain.returncode == one.returncode == two.returncode == 0, plain.stderr + one.stderr + two.stderr
    a, b = weights(tmp_path / "plain" / "finetuned.pt"), weights(tmp_path / "one" / "finetuned.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert two.stdout.count("test accuracy") == 1
    rows = (tmp_path / "two" / "log.csv").read_text().splitlines()
    assert len(rows) == 5 and all(math.isfinite(float(r.split(",")[2])) for r in rows[1:])
    again = command(*TORCHRUN, "2", "train.py", *flags, *out("two"), "--resume")
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == two.stdout.splitlines()[-1]
    wrong = command(*TORCHRUN, "2", "train.py", *flags, *out("three"), "--init", "no/such.pt")
    assert wrong.returncode != 0 and "no/such.pt" in wrong.stderr
    wrong = command(*TORCHRUN, "2", "train.py", *flags, *out("two"))  # which only the first process sees
    assert wrong.returncode != 0 and "holds a run already" in wrong.stderr and 'train.py", line' not in wrong.stderr


SHARES = """
import sys, types, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
import data, models, moco, train
args = types.SimpleNamespace(device="cpu", batch_size={n}, n_frames=2, seed=0, weight_decay=0.0, no_compile=True)
run = types.SimpleNamespace(args=args, state=None, log=[], out=None, save=lambda *_: None, write_log=lambda: None)
train.join(args)
rank, world = train.processes()
torch.manual_seed(0)
net = moco.MoCo(models.build("spikformer-1-16", 16), queue_size=5, momentum=0.5)
net.new_queue(2)
net.eval()
net.train = lambda: net
split = data.Split(torch.randint(0, 9, ({n}, 2, 2, 16, 16), dtype=torch.uint8), torch.arange({n}), ["a"])
forward, seen, drawn = train.engine(net, args), [], []
def step(x, y):
    seen.append(y), drawn.append(torch.rand(1))
    return forward(x, 2 * x), net.accuracy
def sgd(model, lr, *_):  # AdamW would not tell a gradient from twice itself
    optimizer = torch.optim.SGD(model.query.parameters(), lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
train.optimizer_of = sgd
train.fit(run, "pretrain", net, step, split, 2, 0.1, lambda _: None)
losses = torch.tensor([float(row["loss"]) for row in run.log])
result = dict(net.state_dict(), losses=losses, seen=torch.cat(seen), drawn=torch.cat(drawn))
torch.save(result, f"{{sys.argv[1]}}/{{world}}-{{rank}}.pt")
"""


@pytest.mark.parametrize("n", [6, 5])
def test_train_on_two_processes_is_train_on_one(tmp_path, n):
    """In evaluation mode of batch norm: the same losses, weights, queue on both ranks, for even and uneven shares."""
    script = tmp_path / "shares.py"
    script.write_text(SHARES.format(here=str(HERE), n=n))
    for world in (1, 2):
        run = command(*TORCHRUN, str(world), str(script), str(tmp_path))
        assert run.returncode == 0, run.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    shared = [*first.pop("seen").tolist(), *second.pop("seen").tolist()]
    assert sorted(shared) == sorted(alone.pop("seen").tolist()) == sorted([*range(n)] * 2)
    drawn = {*alone.pop("drawn").tolist(), *first["drawn"].tolist(), *second["drawn"].tolist()}
    assert len(drawn) == 4  # augmentation: a process's own
    del first["drawn"], second["drawn"]
    for k in alone:
        assert torch.equal(first[k], second[k])
        torch.testing.assert_close(first[k], alone[k], rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone["losses"][:1], alone["losses"][1:])  # something was learnt


# ------------------------------------------------------------------------------------- faults, bad input, hostile files

FUZZ = int(os.environ.get("FUZZ", 150))  # mutants a reader, and a fifth for checkpoints; FUZZ=10000 for all of them


def answer(capsys, *argv, main=train.main):
    """The one line that a mistake is answered with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("flags, says", [
    ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--lr 0", "--lr"), ("--momentum -0.1", "--momentum"),
    ("--temperature 0", "--temperature"), ("--weight-decay nan", "--weight-decay"), ("--alpha -1", "--alpha"),
    ("--alpha 0 --beta 0", "--beta 0"), ("--epochs 0 --pretrain-epochs 0", "--epochs 0"), ("--epochs -1", "--epochs"),
    ("--n-frames 0", "--n-frames"), ("--queue-size 0", "--queue-size"), ("--image-size 4", "--image-size"),
    ("--batch-size 0", "--batch-size"), ("--batch-size 61", "60 recordings"),
    ("--labels-per-class -1", "--labels-per-class"), ("--device meta", "--device meta"),
    ("--device cuda:99", "--device cuda:99"), ("--dataset nminst", "did you mean nmnist?"),
    ("--arch spikfromer-2-256", "did you mean spikformer-2-256?"), ("--out FILE", "cannot be written"),
    ("--pretrian-epochs 3", "did you mean --pretrain-epochs?"), ("--out FILE/below", "cannot be written"),
    ("--root FILE/below", "cannot be written"), ("--n-frames 1 --batch-size 1", "batch of one frame"),
    ("--init FOLDER", "cannot be read")])
def test_train_checks_flags_before_any_work(shapes, tmp_path, capsys, monkeypatch, flags, says):
    (tmp_path / "file").touch()
    flags = flags.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
    monkeypatch.setattr(train, "fit", None)
    places = ["--dataset", shapes, "--root", tmp_path / "root", "--out", tmp_path / "out"]
    assert says in answer(capsys, *places, *flags.split())


def until(ready, process, seconds=120):
    for _ in range(seconds * 100):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.01)


def test_train_resumes_exactly_after_kill_9(shapes, tmp_path):
    """Killed at random moments, of caching, pre-training and fine-tuning alike: in the end the undisturbed weights."""
    flags = ["--dataset", str(shapes), *TINY, "--epochs", "4", "--image-size", "16"]
    train.main([*flags, "--root", str(tmp_path / "root"), "--out", str(tmp_path / "whole")])
    places = ["--root", str(tmp_path / "root2"), "--out", str(tmp_path / "cut")]
    again = [sys.executable, "train.py", *flags, *places, "--resume"]
    chance, log = random.Random(0), tmp_path / "cut" / "log.csv"
    caching = lambda: (tmp_path / "root2" / "frames").exists()
    for moment in (caching, log.exists, lambda: log.read_text().count("finetune") > 1):
        process = subprocess.Popen(again, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(moment, process)
        time.sleep(chance.uniform(0, 0.1))
        process.kill(), process.wait()
    assert subprocess.run(again, cwd=HERE, capture_output=True).returncode == 0
    for name in ("pretrained.pt", "finetuned.pt"):
        a, b = weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not [*tmp_path.rglob("*.part")]


def test_train_on_a_full_disk(shapes, tmp_path, capsys):
    """Too little room for frames, then for a state: one line, nothing half-made; --resume ends as if nothing was."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ["--dataset", shapes, "--root", tmp_path / "root", *TINY, "--image-size", "16", "--epochs", "3",
             "--out", tmp_path / "cut", "--resume"]

    def full(size):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
            return answer(capsys, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ".frames: cannot be written" in full(50_000)
    assert not [*tmp_path.rglob("*.frames")] and not [*tmp_path.rglob("*.tsv")]
    data.load(shapes, tmp_path / "root", 2, 16)
    assert "state.pt: cannot be written" in full(50_000) and not (tmp_path / "cut" / "state.pt").exists()
    assert "finetuned.pt" not in full((tmp_path / "root").stat().st_size + 120_000) and not [*tmp_path.rglob("*.part")]
    train.main([str(f) for f in flags])
    train.main([str(f) for f in flags[:-3]] + ["--out", str(tmp_path / "whole")])
    a, b = weights(tmp_path / "whole" / "finetuned.pt"), weights(tmp_path / "cut" / "finetuned.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_runs_keep_out_of_each_others_way(shapes, tmp_path, capsys):
    """A folder at work is refused until its run ends, even by kill -9; makers of frames wait in turn and clear up."""
    paths = [str(tmp_path / "a"), str(tmp_path / "root" / "frames")]
    hold = f"import data, pathlib; held = [data.lock(pathlib.Path(p)) for p in {paths}]; print(0, flush=True); input()"
    held = subprocess.Popen([sys.executable, "-c", hold], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    half = tmp_path / "root" / "frames" / "half.frames.1.part"
    half.write_bytes(b"half")
    assert "another run" in answer(capsys, *tiny(shapes, tmp_path / "a"))
    threading.Timer(1, held.kill).start()
    run_tiny(shapes, tmp_path / "b")
    assert "waiting for another run" in capsys.readouterr().out and held.wait() == -9 and not half.exists()
    run_tiny(shapes, tmp_path / "a")
    assert "made with" in answer(capsys, *tiny(shapes, tmp_path / "a", "--resume", "--momentum", "0.5"))


def test_data_two_starts_on_one_root(shapes, tmp_path):
    load = (f"import data; a, b = data.load({str(shapes)!r}, {str(tmp_path)!r}, 2, 16); "
            "print(int(a.frames.sum()), len(b.labels))")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    both = [subprocess.Popen([sys.executable, "-c", load], cwd=HERE, **pipes) for _ in range(2)]
    first, second = (p.communicate()[0].splitlines()[-1] for p in both)
    train_set, test_set = data.load(shapes, tmp_path, 2, 16)
    assert first == second == f"{train_set.frames.sum()} {len(test_set.labels)}"
    assert sorted(p.suffix or p.name for p in (tmp_path / "frames").iterdir()) == [".frames", ".sensor", ".tsv", "lock"]


def crash(key):
    if key == "7":
        os.kill(os.getpid(), 9)
    if key == "9":
        raise SystemExit
    return recording(1 + int(key))


def test_data_a_reader_that_crashes_is_named():
    recordings = [(("train", "test")[i % 2], "a", str(i)) for i in range(40)]
    tried = list(data.parallel(crash, len, recordings, "", True))
    broken = {key: why for (_, _, key), _, why in tried if why}
    assert [r for r, _, _ in tried] == recordings and broken.keys() == {"7", "9"} and "crashed" in broken["7"]
    assert all(result == (None if key in broken else 1 + int(key)) for (_, _, key), result, _ in tried)
    with pytest.raises(data.UserError, match="2 of 40 .*\n  7: .*crashed.*\n  9: .*SystemExit"):
        list(data.parallel(crash, len, recordings, "", False))


def fields(**changes):
    events = {name: recording(50)[name].astype(np.int64) for name in "xytp"}
    events = {k: v for k, v in (events | changes).items() if v is not None}
    return np.rec.fromarrays(list(events.values()), names=list(events))


BROKEN = {  # what is wrong with an .npy, and what is said about it
    "fields": (fields(p=None), "fields x, y, t, p"), "plain": (np.zeros((9, 4)), "fields x, y, t, p"),
    "none": (fields()[:0], "no event"), "far": (fields(x=np.full(50, 65535)), "pixels"),
    "negative": (fields(y=np.full(50, -1)), "pixels"), "half": (fields(x=np.full(50, 0.5)), "pixels"),
    "polarity": (fields(p=np.full(50, -1)), "polarity"), "backwards": (fields(t=np.arange(50)[::-1]), "backwards"),
    "reset": (fields(t=np.r_[:25, :25]), "backwards"),
    "unsigned": (fields(t=np.arange(50, dtype=np.uint64)[::-1]), "backwards"),
    "coarse": (fields(t=(1.6e15 + 1e3 * np.arange(50)).astype(np.float32)), "too coarse"),
    "nan": (fields(t=np.full(50, np.nan)), "finite"), "text": (fields(x=np.full(50, "1")), "numbers"),
    "pickled": (np.array([{}], object), "pickle"), "written": (b"x y t p\n1 2 3 0\n", "pickle"),
    "empty": (b"", "No data"),
    "claims": (b"\x93NUMPY\x01\x00v\x00" + b"{'descr': [('x', '<i8'), ('y', '<i8'), ('t', '<i8'), ('p', '<i8')], "
               b"'fortran_order': False, 'shape': (999999999,)}".ljust(117) + b"\n", "read")}


def test_data_broken_recordings_are_listed_and_skipped(tmp_path, capsys):
    own = tmp_path / "own"
    for c, i in itertools.product("ab", range(12)):
        write_npy(own / c / f"{i}.npy", recording(60, seed=i))
    whole = data.load(own, tmp_path / "root", 2)
    for i, content in enumerate(c for c, _ in BROKEN.values()):
        path = own / "a" / f"broken{i}.npy"
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    for i in range(7):
        (own / "a" / f"zero{i}.bin").touch()
    with pytest.raises(data.UserError) as e:
        data.load(own, tmp_path / "root", 2)
    lines = str(e.value).splitlines()
    assert "24 of 48" in lines[0] and "--skip-broken" in lines[0] and len(lines) == 22 and lines[-1] == "  and 4 more"
    for line, (i, (name, (_, why))) in zip(lines[1:], enumerate(BROKEN.items())):
        assert f"broken{i}.npy" in line and why in line, name
    for _ in range(2):  # made, then found
        capsys.readouterr()
        train_set, test_set = data.load(own, tmp_path / "root", 2, skip_broken=True)
        assert "24 of 48 recordings are broken" in capsys.readouterr().out
        listing = max((tmp_path / "root" / "frames").glob("*.tsv"), key=os.path.getmtime)
        rows = [r.split("\t") for r in listing.read_text().splitlines()[1:]]
        assert sum(r[0] == "broken" for r in rows) == 24
        assert all((r[0] == "broken") == (Path(r[2]).stem[0] in "bz") for r in rows)
        kept = [r for r in rows if r[0] != "broken"]
        assert len(train_set.labels) + len(test_set.labels) == 24 == len(kept)
        for frames, row in zip([*train_set.frames, *test_set.frames], kept):
            assert frames.sum() == 60 and np.array_equal(frames, slow_frames(np.load(row[2]), 2, (12, 9), 12))
    assert len(whole[0].labels) + len(whole[1].labels) == 24
    (tmp_path / "none" / "Test" / "a").mkdir(parents=True)
    (tmp_path / "none" / "Test" / "a" / "0.bin").touch()
    write_npy(tmp_path / "none" / "Train" / "a" / "0.npy", recording(60))
    with pytest.raises(data.UserError, match="none is left to test on"):
        data.load(tmp_path / "none", tmp_path / "root", 2, skip_broken=True)
    jitter = recording(1000)
    jitter["t"] += np.random.default_rng(0).integers(0, 50, 1000)
    assert data.check_events(jitter) is jitter  # a little out of order, as cameras deliver: sorted, not refused


def test_data_truncated_npy_is_called_truncated(tmp_path):
    for name in ("a/1", "a/2", "b/1", "b/2"):
        write_npy(tmp_path / "own" / f"{name}.npy", recording(60))
    os.truncate(tmp_path / "own" / "b" / "2.npy", os.path.getsize(tmp_path / "own" / "b" / "2.npy") // 2)
    with pytest.raises(data.UserError, match="b/2.npy: cannot be read .*Failed to read all data"):
        data.load(tmp_path / "own", tmp_path / "root", 2)


def test_data_damaged_cache_is_called_damaged(tmp_path):
    own = tmp_path / "²"  # a digit to str.isdigit, none to int
    for c, i in itertools.product(["a", "b²"], range(4)):
        write_npy(own / c / f"r3²{i}.npy", recording(60, seed=i))
    good = data.load(own, tmp_path / "root", 2)
    listing = next((tmp_path / "root" / "frames").glob("*.tsv"))
    raw = listing.read_bytes()
    for damaged in (b"", raw[: len(raw) // 2], bytes(len(raw)), raw + b"\n",
                    raw.replace(b"\ntrain", b'\n"train', 1), raw.replace(b"test", b"broken")):
        listing.write_bytes(damaged)
        with pytest.raises(data.UserError, match="is damaged: remove it"):
            data.load(own, tmp_path / "root", 2)
    listing.write_bytes(raw)
    for suffix in (".frames", ".sensor"):
        file = next((tmp_path / "root" / "frames").glob(f"*{suffix}"))
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2])
        with pytest.raises(data.UserError, match="is damaged: remove it"):
            data.load(own, tmp_path / "root", 2)
        file.write_bytes(raw)
    assert np.array_equal(data.load(own, tmp_path / "root", 2)[0].frames, good[0].frames)
    with pytest.raises(data.UserError, match="neither a folder"):
        data.load(tmp_path / "none", tmp_path / "root")


def test_data_truncated_aedat4_is_noticed_at_every_length(tmp_path):
    write_aedat4(tmp_path / "a.aedat4", recording(300))
    raw = (tmp_path / "a.aedat4").read_bytes()
    assert np.array_equal(data.read_aedat4(tmp_path / "a.aedat4")["x"], recording(300)["x"])
    for n in [*range(0, len(raw) - 150, 37), *range(len(raw) - 150, len(raw) - 120)]:
        (tmp_path / "b.aedat4").write_bytes(raw[:n])
        with pytest.raises(Exception):
            data.read_aedat4(tmp_path / "b.aedat4")
    header = raw.replace(b">128<", b">008<")  # width and height, in XML
    (tmp_path / "c.aedat4").write_bytes(header)
    with pytest.raises(ValueError, match="outside the sensor of 8 x 8"):
        data.read_aedat4(tmp_path / "c.aedat4")


def test_data_bin_is_read_as_tonic_reads_it(tmp_path):
    import tonic
    raw = np.random.default_rng(0).integers(0, 256, (3000, 5)).astype(np.uint8)
    raw[::50, 1] = 240  # the clock has gone round
    raw.tofile(tmp_path / "a.bin")
    ours = data.read_bin(tmp_path / "a.bin")
    theirs = tonic.io.read_mnist_file(tmp_path / "a.bin", np.dtype([(f, int) for f in "xytp"]))
    assert len(ours) < 2941 and all(np.array_equal(ours[f], theirs[f]) for f in "xytp")


def test_data_archives_that_point_outside_are_refused(tmp_path, server, monkeypatch):
    import tonic
    handler, address = server
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("../../outside.txt", "!")
    handler.archive = archive.getvalue()
    monkeypatch.setitem(data.TONIC, "cifar10dvs", (*data.TONIC["cifar10dvs"][:4], dict(url=address + "/good")))
    for md5, why in (("0" * 32, "corrupted"), (hashlib.md5(handler.archive).hexdigest(), "points outside")):
        monkeypatch.setattr(tonic.datasets.CIFAR10DVS, "file_md5", md5)
        with pytest.raises(data.UserError, match=why):
            data.load("cifar10dvs", tmp_path / "in" / "root", 2, 16)
    assert not list(tmp_path.glob("*/outside.txt")) and not (tmp_path / "outside.txt").exists()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.addfile(tarfile.TarInfo("../out.txt"))
    with pytest.raises(Exception, match="outside"):
        tonic.download_utils.extract_archive(str(tmp_path / "a.tar.gz"), str(tmp_path / "in"))
    assert not [*tmp_path.rglob("out.txt")]


@pytest.fixture(scope="module")
def checkpoint():
    args = dict(data.DATASETS["toy"], arch="spikformer-1-16", image_size=16, n_frames=2, batch_size=4, dataset="toy",
                pretrained_on="toy", root="data", seed=0, skip_broken=False)
    net = models.Classifier(models.build("spikformer-1-16", 16), 3)
    return dict(kind="finetuned", args=args, classes=["a", "b", "c"], weights=net.state_dict())


class Call:
    """Pickles as a call, which loading it would make."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_eval_refuses_hostile_checkpoints(checkpoint, tmp_path):
    """One line, no code run, no memory taken, whatever a stranger's file holds."""
    bn, laughs, itself = "encoder.stem.0.bn.weight", [], []
    for _ in range(60):
        laughs = [laughs, laughs]
    itself.append(itself)
    weight = checkpoint["weights"][bn]
    broken = dict(nan=weight * math.nan, inf=weight / 0, shape=torch.zeros(99), half=weight.half(),
                  sparse=weight.to_sparse(), terabyte=weight[:1].expand(10**12))
    arguments = dict(arch=["spikformer-99999-160000", "spikformer-9999999999-16", "sew-resnet-18", "x", 5, None],
                     image_size=[-1, 10**9, "16", None], sensor=[7, [34], ["a", "b"]], n_frames=[0, True, 10**9],
                     batch_size=[2.5, 10**30], dataset=[3], root=[None], pretrained_on=[b"toy"], momentum=["0"],
                     queue_size=[-5], views=[data.COMMON["views"] | dict(strength=10**400), {"x": 1}, [1]])
    call = Call(os.system, f"touch {tmp_path / 'ran'}")
    changes = [
        dict(kind="other"), dict(classes=[]), dict(classes=["a"] * 4), dict(classes=[1, 2, 3]), dict(classes=itself),
        dict(x=laughs), dict(x=call), dict(x=Call(bytearray, 10**11)), dict(x=Call(torch.Tensor, 10**11)),
        *(dict(weights=checkpoint["weights"] | {bn: w}) for w in broken.values()),
        dict(weights=checkpoint["weights"] | {"more": weight}),
        *(dict(args=checkpoint["args"] | {k: v}) for k, values in arguments.items() for v in values)]
    contents = [checkpoint["weights"], [1], "text", torch.zeros(3), {}]
    contents += [{k: v for k, v in checkpoint.items() if k != part} for part in checkpoint]
    contents += [checkpoint | change for change in changes]
    files = []
    for i, content in enumerate(contents):
        files.append(tmp_path / f"{i}.pt")
        torch.save(content, files[-1])
    torch.save(checkpoint, tmp_path / "good.pt")
    assert evaluation.load_checkpoint(tmp_path / "good.pt")["classes"] == ["a", "b", "c"]
    raw = (tmp_path / "good.pt").read_bytes()
    spots = [raw.index(b"X\x04\x00\x00\x00kind"), len(raw) // 2]
    others = dict(empty=b"", text=b"hello", half=raw[: len(raw) // 2], short=raw[:-1], pickle=pickle.dumps(call),
                  **{f"byte{i}": raw[:i] + b"?" + raw[i + 1 :] for i in spots})
    for name, content in others.items():
        files.append(tmp_path / f"{name}.pt")
        files[-1].write_bytes(content)
    files += [tmp_path / name for name in ("legacy.pt", "deflated.pt", "bomb.pt", "no.pt", "")]
    torch.save(checkpoint, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    path = tmp_path / "deflated.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as z, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in z.namelist():
            deflated.writestr(name, z.read(name))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb/data.pkl", bytes(10**8))
    for file in files:
        began = time.time()
        with pytest.raises(data.UserError) as e:
            evaluation.load_checkpoint(file)
        assert str(file) in str(e.value) and "\n" not in str(e.value) and time.time() - began < 10
    assert not (tmp_path / "ran").exists()


def test_train_refuses_a_hostile_state(shapes, tmp_path, capsys):
    run_tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0")
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)
    call = Call(os.system, f"touch {tmp_path / 'ran'}")
    nan = {k: v * math.nan for k, v in state["model"].items()}
    for change in [dict(epoch=-1), dict(epoch=1.5), dict(epoch="1"), dict(log=[]), dict(log=[{"x": 1}]),
                   dict(log=[["epoch"]]), dict(args=None), dict(model={}), dict(optimizer={}), dict(schedule=5),
                   dict(x=call), dict(model=nan)]:
        torch.save(state | dict(epoch=1, log=state["log"][:1]) | change, tmp_path / "a" / "state.pt")
        line = answer(capsys, *tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0", "--resume"))
        assert "state.pt" in line
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weights_alone", [False, True])
def test_train_stops_at_a_loss_that_is_not_finite(shapes, tmp_path, capsys, monkeypatch, weights_alone):
    run_tiny(shapes, tmp_path / "whole", "--pretrain-epochs", "0", "--epochs", "3")
    cross_entropy, calls = F.cross_entropy, []

    def broken(logits, y):
        calls.append(1)
        value = cross_entropy(logits, y)
        if len(calls) == 4:  # step 2 of epoch 2
            return value + (logits.sum() * 0).sqrt() if weights_alone else value * math.nan  # sqrt'(0) is infinite
        return value
    flags = tiny(shapes, tmp_path / "a", "--pretrain-epochs", "0", "--epochs", "3")
    monkeypatch.setattr(train.F, "cross_entropy", broken)
    line = answer(capsys, *flags)
    for part in ("step 2 of epoch 2", "learning rate 3.00e-03", "--lr 0.001", "state.pt"):
        assert part in line
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["epoch"] == 1
    assert not (tmp_path / "a" / "finetuned.pt").exists()
    train.main([str(f) for f in flags] + ["--resume"])
    a, b = weights(tmp_path / "whole" / "finetuned.pt"), weights(tmp_path / "a" / "finetuned.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_train_warns_of_dead_spikes_and_of_a_collapse(capsys):
    encoder = models.build("spikformer-1-16", 16)
    encoder(torch.poisson(torch.ones(2, 64, 2, 16, 16)))
    frames = np.random.default_rng(0).poisson(1.0, (12, 2, 2, 16, 16)).astype(np.uint8)
    frames[::2, :, :, :8] = 0
    args = types.SimpleNamespace(batch_size=5, device="cpu", n_frames=2)
    split, run = data.Split(frames, np.zeros(12, int), ["a"]), types.SimpleNamespace(warned=set(), args=args)
    for m in encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    encoder(torch.from_numpy(frames).float().transpose(0, 1))
    assert train.look(run, encoder, split, 50).shape == (12, 16) and not capsys.readouterr().out
    for bias, how in ((-1e3, "never spike"), (1e3, "spike at every time step")):
        torch.nn.init.constant_(encoder.position.bn.bias, bias)
        train.look(run, encoder, split, 49)
        assert not capsys.readouterr().out  # too early to tell
        for _ in range(2):
            train.look(run, encoder, split, 50)
        out = capsys.readouterr().out
        assert out.count(how) == 1 and "position.lif" in out and "stem.0" not in out
    torch.nn.init.constant_(encoder.stem[0].bn.bias, 1e3)  # every recording looks alike from here on
    train.look(run, encoder, split, 50), train.look(run, encoder, split, 50)
    assert capsys.readouterr().out.count("collapse") == 1
    with pytest.raises(data.UserError, match="unflatten"):  # recordings one after another taken for time steps
        train.look(run, torch.nn.Sequential(torch.nn.Flatten(0, 1), neuron.LIF()), split, 0)


def mutant(raw, seed, head):
    """raw with 1 to 16 changes, half of them in its first `head` bytes or its last: flips, values, cuts, insertions."""
    chance, b = random.Random(seed), bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not b:
            break
        end = min(len(b), head)
        i = chance.choice([chance.randrange(len(b)), chance.randrange(end), len(b) - 1 - chance.randrange(end)])
        match chance.randrange(6):
            case 0:
                b[i] ^= 1 << chance.randrange(8)
            case 1:
                b[i] = chance.choice([0, 1, 48, 57, 127, 128, 240, 255])
            case 2:
                value = chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, chance.getrandbits(32)])
                b[i : i + 4] = value.to_bytes(4, "little")
            case 3 if chance.random() < 0.5:
                del b[i:]
            case 4:
                del b[i : i + chance.randrange(1, 20)]
            case 5:
                b[i:i] = chance.randbytes(chance.randrange(1, 20))
    return bytes(b)


def read_mutant(raw, suffix, folder, seed):
    """Its events, in a worker of data.parallel; MemoryError past 300 MB more than before."""
    import resource
    path, before = f"{folder}/{os.getpid()}{suffix}", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(path).write_bytes(mutant(raw, seed, 1000 if suffix == ".aedat4" else 150))
    events = data.read_file(path)
    data.to_frames(data.check_events(events), 4, (128, 128), 32)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 300_000:
        raise MemoryError
    return events


@pytest.mark.parametrize("suffix", WRITERS)
def test_fuzz_recordings(tmp_path, suffix):
    """Each mutant gives frames or a reason; FUZZ times, no crash is left without its name, no hang, no gigabytes."""
    WRITERS[suffix](tmp_path / f"a{suffix}", recording(300, 100, 100))
    raw, began = (tmp_path / f"a{suffix}").read_bytes(), time.time()
    read = functools.partial(read_mutant, raw, suffix, tmp_path)
    frames_from = functools.partial(data.to_frames, n_frames=4, sensor_size=(128, 128), size=32)
    recordings = [(("train", "test")[seed % 2], "", seed) for seed in range(FUZZ)]
    tried = list(data.parallel(read, frames_from, recordings, f"fuzz {suffix}", True))
    good, broken = [frames for _, frames, why in tried if not why], [why for _, _, why in tried if why]
    assert len(good) + len(broken) == FUZZ and len(good) > FUZZ / 100 and len(broken) > FUZZ / 2
    assert all(frames.shape == (4, 2, 32, 32) for frames in good)
    assert not [why for why in broken if "MemoryError" in why] and time.time() - began < 30 + FUZZ / 20
    crashed = sum("crashed" in why for why in broken)
    print(f"{len(good)} read, {len(broken)} refused, {crashed} of them by a crash of their process")


def test_fuzz_checkpoints(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "a.pt")
    raw, good, refused, began = (tmp_path / "a.pt").read_bytes(), 0, 0, time.time()
    for seed in range(FUZZ // 5):
        (tmp_path / "b.pt").write_bytes(mutant(raw, seed, 7000))
        try:
            evaluation.restore(evaluation.load_checkpoint(tmp_path / "b.pt"), "cpu")
            good += 1
        except data.UserError:
            refused += 1
    assert good + refused == FUZZ // 5 and refused > good and time.time() - began < 30 + FUZZ / 20
    print(f"{good} loaded, {refused} refused")
