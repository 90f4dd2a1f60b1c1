"""The whole test-suite: every fast path beside a slow, obvious one, then the command line at tiny
sizes. Tests of what a machine lacks (SpikingJelly, a C++ compiler, a GPU) are skipped.

    python -m pytest test_all.py   # -k lif | loss | moco | models | data | own | train | eval
"""
import contextlib
import copy
import csv
import functools
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest import mock

# Threads that wait for each other make these small tests 10 times slower beside a busy process.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import numpy as np
import pytest
import tonic
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval as evaluation
import loss
import moco
import models
import neuron
import train

# A test that hangs, be it in compiled code, ends the run with the place where it hangs.
pytestmark = pytest.mark.timeout(300, method="thread")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FLOAT, DOUBLE, BF16 = torch.float32, torch.float64, torch.bfloat16
CUDA = pytest.param("cuda", marks=gpu)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Run each test from one seed, with LIF layers uncompiled unless it sets COMPILE."""
    monkeypatch.setattr(neuron, "COMPILE", False)
    torch.manual_seed(0)


# -------------------------------------------------------------------------------------------- lif

def slow_lif(x, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
    """Compute spikes from currents, x [T, ...] -> [T, ...], one step after the other.

    Autograd differentiates it, also by a constant. The membrane is float32 or wider.
    """
    v = torch.zeros_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32)) + v_reset
    spikes = []
    for xt in x:
        h = v + (xt.to(v.dtype) - (v - v_reset)) / tau
        fires = h >= v_threshold
        smooth = torch.atan(math.pi / 2 * alpha * (h - v_threshold)) / math.pi
        # the value of the step and the gradient of the arctangent: the second term is exactly 0
        spikes.append(fires.to(x.dtype) + (smooth - smooth.detach()).to(x.dtype))
        v = torch.where(fires, v_reset, h)
    return torch.stack(spikes)


def spikes_and_gradient(lif, x, grad_s):
    """Run a layer of neurons forward and backward -> (spikes, dL/dx)."""
    x = x.clone().requires_grad_()
    s = lif(x)
    s.backward(grad_s)
    return s.detach(), x.grad


def test_lif_trace_by_hand():
    # Half of the way to x: 0 -> 0.75 -> 1.125 fires, 0 -> 0.25 -> 1 fires (>=), 0 -> -1 -> 0.5.
    x = torch.tensor([[1.5], [1.5], [0.5], [1.75], [-2.0], [2.0]])
    assert neuron.LIF()(x).flatten().tolist() == [0, 1, 0, 1, 0, 0]
    # With tau = 4 and reset to -1: -1 -> 2.25 fires, -1 -> 0 -> 2 fires.
    x = torch.tensor([[13.0], [4.0], [9.0]])
    assert neuron.LIF(tau=4.0, v_threshold=2.0, v_reset=-1.0)(x).flatten().tolist() == [1, 0, 1]


@pytest.mark.parametrize("constants", [
    (2.0, 1.0, 0.0, 2.0), (2.0, 0.5, 0.0, 2.0), (3.0, 1.0, -0.25, 4.0), (1.0, 1.0, 0.0, 2.0)])
@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE, BF16])
@pytest.mark.parametrize("shape", [(1, 7), (5, 3, 4), (4, 2, 3, 5, 6)])
def test_lif_equals_the_slow_one_in_any_layout_without_state(constants, dtype, shape):
    x, grad_s = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    x = models.channels_last(x) if x.ndim == 5 else x
    lif = neuron.LIF(*constants)
    s, grad_x = spikes_and_gradient(lif, x, grad_s)
    slow_s, slow_grad_x = spikes_and_gradient(lambda x: slow_lif(x, *constants), x, grad_s)
    assert 0.05 < slow_s.float().mean() < 0.95  # membranes on both sides of the threshold
    assert s.dtype == dtype and s.stride() == x.stride() and torch.equal(s, slow_s)
    torch.testing.assert_close(grad_x, slow_grad_x)
    assert torch.equal(lif(x), s) and not lif.state_dict()


def test_lif_slow_one_can_learn_its_constants():
    """Check one step, s = step(x / tau - v_threshold), by hand, near the threshold and far."""
    x = torch.tensor([[-6.0, 0.0, 1.998, 2.0, 3.0, 8.0]])
    tau, v_threshold = torch.full((6,), 2.0).requires_grad_(), torch.ones(6).requires_grad_()
    slow_lif(x, tau, v_threshold).sum().backward()
    surrogate = 1 / (1 + (math.pi * (x[0] / 2 - 1)) ** 2)
    torch.testing.assert_close(tau.grad, surrogate * -x[0] / 4)  # dh/dtau = -x / tau^2
    torch.testing.assert_close(v_threshold.grad, -surrogate)


def test_lif_of_the_docs_learns_tau():
    script = re.search("```python\n(.*?)```", (HERE / "docs/experiments.md").read_text(), re.DOTALL)
    names = {}
    exec(script[1], names)
    plif, x, grad_s = names["PLIF"](), 2 * torch.randn(4, 30), torch.randn(4, 30)
    torch.testing.assert_close(
        spikes_and_gradient(plif, x, grad_s), spikes_and_gradient(slow_lif, x, grad_s))
    tau = torch.tensor(2.0, requires_grad=True)
    slow_lif(x, tau).backward(grad_s)
    # 1 / tau = sigmoid(w), so dtau/dw = -tau^2 sigmoid(w) (1 - sigmoid(w)) = -1 at tau = 2
    torch.testing.assert_close(plif.w.grad, -tau.grad)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_lif_compiled_and_on_cuda_gives_the_same_bits(device, dtype, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for shape, layout in ((2, 8, 5, 6), torch.clone), ((3, 8, 7, 11), models.channels_last):
        x, grad_s = (layout(2 * torch.randn(4, *shape).to(dtype)) for _ in range(2))
        s, grad_x = spikes_and_gradient(neuron.LIF(), x, grad_s)
        for compiled in True, False:
            monkeypatch.setattr(neuron, "COMPILE", compiled)
            fast_s, fast_grad_x = spikes_and_gradient(neuron.LIF(), x.to(device), grad_s.to(device))
            assert neuron.COMPILE == compiled  # the compiler did not fail
            assert torch.equal(s, fast_s.cpu()) and fast_s.stride() == x.stride()
            exactly = {} if device == "cuda" else dict(rtol=0, atol=0)
            torch.testing.assert_close(grad_x, fast_grad_x.cpu(), **exactly)
    # One kernel forward and one backward serve layers of every size.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_lif_without_a_compiler_warns_once_and_continues(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "compiled", mock.MagicMock(side_effect=RuntimeError("no compiler")))
    x = torch.randn(2, 4, 9)
    with pytest.warns(UserWarning, match="run uncompiled.*no compiler") as warned:
        assert all(torch.equal(neuron.LIF()(xi), slow_lif(xi)) for xi in x)
    assert len(warned) == 1 and not neuron.COMPILE
    monkeypatch.setattr(neuron, "COMPILE", True)
    neuron.compiled.side_effect = torch.OutOfMemoryError  # not to be taken for a missing compiler
    with pytest.raises(torch.OutOfMemoryError):
        neuron.LIF()(x[0])
    assert neuron.COMPILE


def spikingjelly(module):
    """Import a module of SpikingJelly, whose models need torchvision only for downloads."""
    pytest.importorskip("spikingjelly")
    try:
        import torchvision
    except Exception:  # missing, or built for another torch
        for name in ("torchvision", "torchvision.models", "torchvision.models.utils"):
            sys.modules[name] = mock.MagicMock()
    return importlib.import_module(f"spikingjelly.activation_based.{module}")


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("v_threshold", [1.0, 0.5])
def test_lif_equals_spikingjelly(dtype, v_threshold):
    theirs = spikingjelly("neuron").LIFNode(
        tau=2.0, v_threshold=v_threshold, detach_reset=True, step_mode="m",
        surrogate_function=spikingjelly("surrogate").ATan())
    x, grad_s = 2 * torch.randn(2, 8, 3, 40, dtype=dtype)
    s, grad_x = spikes_and_gradient(neuron.LIF(v_threshold=v_threshold), x, grad_s)
    their_s, their_grad_x = spikes_and_gradient(theirs, x, grad_s)
    assert torch.equal(s, their_s) and 0.1 < s.mean() < 0.9
    torch.testing.assert_close(grad_x, their_grad_x)


# ------------------------------------------------------------------------------------------- loss

def slow_logits(q, k, queue, temperature):
    """Compute cosine / temperature pair by pair: q, k [B, D], queue [K, D] -> [B, 1 + K]."""
    rows = [[F.cosine_similarity(a, n, dim=0) for n in (b, *queue)] for a, b in zip(q, k)]
    return torch.stack([torch.stack(row) for row in rows]) / temperature


def slow_mix_info_nce(q, k, queue, temperature, alpha, beta):
    """Compute MixInfoNCE row by row in float64, as its equations read."""
    def info_nce(logits):
        return -sum(torch.log(row[0].exp() / row.exp().sum()) for row in logits) / len(logits)
    q, k, queue, T = q.double(), k.double(), queue.double(), len(q)
    mbc_logits = slow_logits(q.mean(0), k.mean(0), queue.mean(1), temperature)
    mac = [info_nce(slow_logits(q[t], k[t], queue[:, t], temperature)) for t in range(T)]
    return alpha * info_nce(mbc_logits) + beta * sum(mac) / T, mbc_logits


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("T, B, K, D", [(1, 1, 1, 2), (4, 3, 7, 5), (3, 8, 2, 16)])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_loss_logits_and_gradient_equal_a_loop(alpha, beta, T, B, K, D, temperature, dtype):
    """Check that all is computed in float32 also from bf16 under autocast."""
    (q, k), queue = torch.randn(2, T, B, D).to(dtype), torch.randn(K, T, D)
    q, slow_q = q.clone().requires_grad_(), q.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        value, logits = loss.mix_info_nce(q, k, queue, temperature, alpha, beta)
    slow_value, mbc_logits = slow_mix_info_nce(slow_q, k, queue, temperature, alpha, beta)
    value.backward(), slow_value.backward()
    assert value.dtype == logits.dtype == FLOAT
    slow = slow_value.float(), mbc_logits.float()
    torch.testing.assert_close((value, logits), slow, rtol=1e-5, atol=1e-5)
    rtol = 0.02 if dtype == BF16 else 1e-4
    torch.testing.assert_close(q.grad, slow_q.grad, rtol=rtol, atol=1e-5)


def test_loss_is_at_the_level_of_chance_where_nothing_can_be_told_apart():
    value, _ = loss.mix_info_nce(*torch.ones(2, 4, 3, 8), torch.ones(6, 4, 8), 0.2, 0.5, 2.0)
    assert value.item() == pytest.approx(2.5 * math.log(7)) == loss.chance_level(6, 4, 0.5, 2.0)


# ------------------------------------------------------------------------------------------- moco

class Linear(torch.nn.Module):
    """A one-layer encoder with batch norm, [T, B, 2, size, size] -> [T, B, dim]."""

    def __init__(self, size=3, dim=3):
        super().__init__()
        self.dim = dim
        self.layer, self.bn = torch.nn.Linear(2 * size * size, dim), torch.nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.bn(self.layer(x.flatten(2)).flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("size, batch_sizes", [
    (5, [2, 2, 2, 1]), (4, [4, 4]), (3, [7, 1, 2]), (1, [1, 3])])
def test_moco_queue_is_first_in_first_out(size, batch_sizes):
    net = moco.MoCo(Linear(), dim=4, queue_size=size, momentum=0.5)
    net.init_queue(2)
    keys = list(net.queue.clone())  # oldest first
    for B in batch_sizes:
        view_q, view_k = torch.rand(2, 2, B, 2, 3, 3)
        value = net(view_q, view_k).item()
        q, k = net.encoder_q(view_q), net.encoder_k(view_k)  # unchanged since the step
        # The loss saw the queue as it was, without the keys of this batch.
        slow_value, _ = slow_mix_info_nce(q, k, torch.stack(keys[-size:]), 0.1, 0.5, 0.5)
        assert value == pytest.approx(slow_value.item(), rel=1e-4)
        keys += list(k.transpose(0, 1))
        assert torch.equal(net.queue.roll(-int(net.queue_ptr), 0), torch.stack(keys[-size:]))
    net(*torch.rand(2, 5, 1, 2, 3, 3))
    assert net.queue.shape == (size, 5, 4)  # another T begins another queue


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_moco_momentum_is_exact_and_for_parameters_only(momentum):
    net = moco.MoCo(Linear(), dim=4, queue_size=4, momentum=momentum)
    net.encoder_q.load_state_dict(moco.MoCo(Linear(), dim=4).encoder_q.state_dict())
    before = copy.deepcopy(net.encoder_k)
    views = torch.rand(2, 2, 3, 2, 3, 3)
    net(*views).backward()
    for old, k, q in zip(*(m.parameters() for m in (before, net.encoder_k, net.encoder_q))):
        torch.testing.assert_close(k, momentum * old + (1 - momentum) * q)
        assert k.grad is None and not k.requires_grad and q.grad is not None
        assert momentum not in (0, 1) or torch.equal(k, old if momentum else q)
    # The statistics of batch norm follow the encoder's own batches.
    for network, view in zip((net.encoder_q, net.encoder_k), views):
        mean = network[0].layer(view.flatten(2)).mean((0, 1))
        torch.testing.assert_close(network[0].bn.running_mean, 0.1 * mean)


def test_moco_accuracy_counts_queries_that_find_their_key():
    net = moco.MoCo(Linear(), dim=4, queue_size=6, momentum=0.0)
    net(*torch.randn(2, 2, 6, 2, 3, 3))
    queue = net.queue.mean(1)
    view_q = torch.randn(2, 8, 2, 3, 3)
    view_k = view_q + 0.5 * torch.randn_like(view_q)
    net(view_q, view_k)
    q, k = net.encoder_q(view_q), net.encoder_k(view_k)
    rows = slow_logits(q.mean(0), k.mean(0), queue, 0.1).tolist()
    hits = sum(row[0] > max(row[1:]) for row in rows)
    assert 0 < hits < 8 and net.accuracy.item() == hits / 8
    # Its own key among the negatives ties with the positive, however sums are rounded: no hit.
    for _ in range(2):
        net(view_q[:, :6], view_k[:, :6])
    assert net.accuracy == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("arch, size, dtype", [
    ("spikformer-1-16", 16, DOUBLE), ("sew-resnet-18-8", 64, DOUBLE),
    ("linear", 4, FLOAT), ("linear", 4, BF16)])
def test_moco_compiled_gives_the_same_numbers(arch, size, dtype, device, monkeypatch):
    """Compile a step to one graph, from views to loss and queue, as train.py does on a GPU.

    Spikes are compared in float64, where the order of a sum tips no membrane over its threshold.
    In bf16, the compiled backward pass reads the queue again: it must not have changed in place.
    """
    encoder = Linear(size, 32) if arch == "linear" else models.build(arch, size)
    if arch == "sew-resnet-18-8":
        encoder.blocks = models.SEWBlock(8, 64, 2)  # one of eight, because all compile alike
    plain = moco.MoCo(encoder, 16, queue_size=16, momentum=0.9)
    plain.init_queue(2)
    wide = FLOAT if dtype == BF16 else dtype
    plain.to(device).encoder_q.to(wide), plain.encoder_k.to(wide)
    compiled = copy.deepcopy(plain)
    # On a CPU without the compiler's last stage, which would take a minute to write kernels.
    backend = "aot_eager_decomp_partition" if device == "cpu" else "inductor"
    forward = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=False)
    for B in (4, 4, 3) if arch == "linear" else (4, 4):
        view_q = torch.rand(2, B, 2, size, size).to(device, wide)
        results = []
        for net, call in ((plain, plain), (compiled, forward)):
            monkeypatch.setattr(neuron, "COMPILE", net is compiled)  # not again inside the graph
            net.zero_grad()
            with torch.autocast(device, BF16, enabled=dtype == BF16):
                value = call(view_q, view_q.roll(1, -1))
            value.backward()
            gradient = torch.cat([p.grad.flatten() for p in net.encoder_q.parameters()])
            results.append((value.detach(), gradient, net.queue, net.accuracy))
        for a, b in zip(*results):
            assert (a - b).norm() <= (0.02 if dtype == BF16 else 1e-4) * a.norm()
    torch._dynamo.reset()


def test_lif_and_moco_refuse_impossible_settings():
    for wrong in dict(tau=0.5), dict(v_threshold=0.0), dict(v_reset=1.0):
        with pytest.raises(ValueError, match="tau >= 1 and v_threshold > v_reset, got"):
            neuron.LIF(**wrong)
    for wrong in dict(queue_size=0), dict(momentum=1.5), dict(temperature=0.0):
        with pytest.raises(ValueError, match="queue_size >= 1, momentum in .*, got"):
            moco.MoCo(Linear(), **wrong)


# ----------------------------------------------------------------------------------------- models

def spikingjelly_classifier(arch):
    """Build SpikingJelly's own network of that name, for frames of 128 pixels and 10 classes."""
    if arch == "spikformer-2-256":
        return spikingjelly("model.spikformer").Spikformer(
            img_size_h=128, img_size_w=128, patch_size=16, in_channels=2, num_classes=10,
            embed_dims=256, num_heads=16, mlp_ratio=4, depths=2, T=2)
    net = spikingjelly("model.sew_resnet").sew_resnet18(
        cnf="ADD", spiking_neuron=spikingjelly("neuron").LIFNode, detach_reset=True,
        surrogate_function=spikingjelly("surrogate").ATan(), num_classes=10)
    net.conv1 = spikingjelly("layer").Conv2d(2, 64, 7, 2, 3, bias=False)
    spikingjelly("functional").set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("arch", ["spikformer-2-256", "sew-resnet-18"])
@torch.no_grad()
def test_models_exchange_weights_with_spikingjelly(arch):
    """Compare logits in float64, where the order of a sum moves no membrane over its threshold."""
    theirs = spikingjelly_classifier(arch).double()
    ours = models.Classifier(models.build(arch, 128), 10).double()
    x = torch.poisson(torch.full((2, 2, 2, 128, 128), 0.3, dtype=DOUBLE))
    # No tensor stays as it is initialised, so that any mix-up shows; the statistics are those of x.
    for m in theirs.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
            m.weight.uniform_(1, 3), m.bias.uniform_(-0.3, 0.3)
    theirs(x)
    a, b = ours.state_dict(), theirs.state_dict()
    assert [v.squeeze().shape for v in a.values()] == [v.squeeze().shape for v in b.values()]
    ours.load_state_dict({name: v.reshape(a[name].shape) for name, v in zip(a, b.values())})
    for training in False, True:
        spikingjelly("functional").reset_net(theirs)
        logits, their_logits = ours.train(training)(x), theirs.train(training)(x)
        assert their_logits.std(1).mean() > 1e-3  # the recordings are told apart at all
        torch.testing.assert_close(logits, their_logits)


@pytest.mark.parametrize("arch, size, dim", [
    ("sew-resnet-18-8", 32, 64), ("sew-resnet-18-8", 64, 64), ("spikformer-1-32", 34, 32),
    ("spikformer-2-48", 64, 48), ("spikformer-1-16", 17, 16)])
def test_models_have_a_gradient_everywhere_and_no_state(arch, size, dim):
    net, x = models.build(arch, size), torch.poisson(torch.full((3, 4, 2, size, size), 1.0))
    block = next(m for m in net.modules() if isinstance(m, models.ConvLIF))
    weights, spikes = torch.randn(3, 4, dim), {}
    for dtype in FLOAT, BF16:
        net.zero_grad()
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            features, spikes[dtype] = net(x), block(x)
        assert net.dim == dim and features.shape == weights.shape
        (features * weights).sum().backward()
        assert all(p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    # Few spikes of the first layer depend on the precision; the layers after it amplify this.
    assert 0 < (spikes[BF16] != spikes[FLOAT]).float().mean() < 0.02
    # A batch leaves nothing behind for the next.
    first = net.eval()(x)
    net(x[:2, :3])
    assert torch.equal(net(x), first)


def test_models_attention_is_the_published_product():
    """Compute (v k^T) q / 8 step by step and head by head."""
    net = models.SpikingSelfAttention(32)
    net.qkv, net.proj, net.lif = (torch.nn.Identity() for _ in range(3))
    spikes = (torch.rand(2, 1, 96, 2, 3) < 0.4).float()  # [T, B, 3C, H, W]
    q, k, v = spikes.flatten(3).unflatten(2, (3, 2, 16)).unbind(2)  # each [T, B, heads, 16, L]
    expected = torch.empty_like(q)
    for i in [(t, 0, head) for t in range(2) for head in range(2)]:
        expected[i] = (v[i] @ k[i].T) @ q[i] / 8
    assert torch.equal(net(spikes), expected.reshape(2, 1, 32, 2, 3))


def test_models_load_model_refuses_other_files_and_runs_no_code(tmp_path):
    class Attack:
        __reduce__ = lambda self: (os.mkdir, (str(folder),))
    path, folder = tmp_path / "file.pt", tmp_path / "made"
    args = dict(arch="spikformer-1-16", image_size=16, split_events=True)
    for content in (
            b"# NeuroMoCo\n\nSelf-supervised pre-training.\n", b"", pickle.dumps(Attack(), 2),
            Attack(), [1, 2], dict(kind="pretrained", args=args, weights={}),
            dict(kind="pretrained", args=dict(arch="spikformer-1-16", image_size=16))):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(OSError) as error:
            models.load_model(path)
        message = str(error.value)
        assert message.startswith(f"{path}: not a checkpoint of this train.py (")
        assert "\n" not in message and not folder.exists()
    pickle.loads(pickle.dumps(Attack()))
    assert folder.exists()  # so the attack is a real one


# ------------------------------------------------------------------------------------------- data

def recording(n, width=12, height=9, seed=0):
    """Draw n events, no two of them at the same time."""
    rng = np.random.default_rng(seed)
    fields = [rng.integers(0, width, n), rng.integers(0, height, n),
              np.sort(rng.permutation(10 * n)[:n]), rng.integers(0, 2, n)]
    return np.rec.fromarrays(fields, formats="i2,i2,i8,?", names="x,y,t,p")


def slow_frames(events, n_frames, sensor_size, size, frames_by="count"):
    """Count events, which are in order of time, one after the other."""
    frames, n = np.zeros((n_frames, 2, size, size), int), len(events)
    for i, e in enumerate(events):
        t = min(i // (n // n_frames), n_frames - 1) if n >= n_frames else n_frames - 1
        y, x = int(e["y"]) * size // sensor_size[1], int(e["x"]) * size // sensor_size[0]
        frames[t, int(e["p"] > 0), y, x] += 1
    return np.minimum(frames, 255).astype(np.uint8)


def write(path, events, *sensor):
    """Write a recording in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](path, events, *sensor)


def write_bin(path, events):
    """Write the ATIS format, 5 bytes an event: x, y, 1 bit polarity, 23 bits time."""
    t, p = events["t"].astype(int), events["p"].astype(int)
    raw = [events["x"], events["y"], p << 7 | t >> 16, t >> 8 & 255, t & 255]
    np.stack(raw, 1).astype(np.uint8).tofile(path)


def write_npz(path, events):
    np.savez(path, **{field: events[field] for field in "xytp"})


def write_aedat4(path, events, sensor=None):
    """Write an AEDAT4 file, which names its sensor: if not given, as far as its events reach."""
    dv = pytest.importorskip("dv_processing")
    sensor = sensor or (int(events["x"].max()) + 1, int(events["y"].max()) + 1)
    store = dv.EventStore()
    for e in events:
        store.push_back(int(e["t"]), int(e["x"]), int(e["y"]), bool(e["p"]))
    config = dv.io.MonoCameraWriter.EventOnlyConfig("DVS", sensor)
    dv.io.MonoCameraWriter(str(path), config).writeEvents(store)


WRITERS = {".bin": write_bin, ".npy": np.save, ".npz": write_npz, ".aedat4": write_aedat4}


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 7, 1003])
@pytest.mark.parametrize("sensor, size", [((12, 9), 4), ((12, 9), 12), ((640, 480), 128)])
def test_data_frames_equal_a_slow_loop_and_lose_no_event(n, sensor, size):
    events = recording(n, *sensor)
    signed = events.astype([("x", int), ("y", int), ("t", np.uint64), ("p", np.int8)])
    signed["p"][~events["p"]] = -1  # some cameras call it so
    for given in (events, events[np.random.default_rng(1).permutation(n)], signed):
        frames = data.to_frames(given, 4, sensor, size)
        assert frames.dtype == np.uint8 and frames.sum(dtype=int) == n
        assert np.array_equal(frames, slow_frames(events, 4, sensor, size))
    for p in -1, 0, 1:  # a single polarity
        signed["p"] = p
        on = data.to_frames(signed, 4, sensor, size)[:, 1]
        assert on.sum(dtype=int) == (n if p > 0 else 0)


def test_data_frames_count_to_32767():
    frames = data.to_frames(recording(300_000, 1, 1), 4, (12, 9), 12)  # all events in one pixel
    assert frames.dtype == np.int16 and (frames[..., 0, 0] == 32767).all()
    assert frames.sum(dtype=int) == 8 * 32767


@pytest.mark.parametrize("split_by, frames_by", [("number", "count"), ("time", "time")])
def test_data_frames_equal_spikingjelly(monkeypatch, split_by, frames_by):
    # Stand-ins for what this function does not need: SpikingJelly's other data sets, torchvision.
    package = types.ModuleType("spikingjelly.datasets")
    package.__path__ = [f"{pytest.importorskip('spikingjelly').__path__[0]}/datasets"]
    monkeypatch.setitem(sys.modules, "spikingjelly.datasets", package)
    monkeypatch.setitem(sys.modules, "torchvision", mock.MagicMock())
    theirs = pytest.importorskip("spikingjelly.datasets.utils")
    events = recording(1003, 16, 16)
    events["t"] = (recording(1003)["t"] / 100) ** 2  # slower and slower
    expected = theirs.integrate_events_by_fixed_frames_number(events, split_by, 4, 16, 16)
    assert expected.sum() == 1003 and expected.max() < 256
    frames = data.to_frames(events, 4, (16, 16), 16, frames_by)
    assert np.array_equal(frames, expected)
    seconds = np.rec.fromarrays([events["t"] / 1e6, *(events[f] for f in "xyp")], names="t,x,y,p")
    in_seconds = data.to_frames(seconds, 4, (16, 16), 16, frames_by)
    epoch = events.astype([("x", int), ("y", int), ("t", np.uint64), ("p", bool)])
    epoch["t"] += 2**60 + 1
    assert np.array_equal(data.to_frames(epoch, 4, (16, 16), 16, frames_by), expected)
    # "//" makes microsecond frames up to 1 us shorter, so that a few events change places
    difference = in_seconds.sum((1, 2, 3), dtype=int) - frames.sum((1, 2, 3), dtype=int)
    assert abs(difference).max() <= 3


def test_data_split_is_stable_and_nine_to_one_in_natural_order():
    keys = [(cls, f"/d/{cls}/r{i}.npy") for cls, n in dict(a=100, b=57, c=2, d=1).items()
            for i in range(n)]
    split = data.split_by_class(random.Random(0).sample(keys, len(keys)))
    last = dict(a=range(90, 100), b=range(52, 57), c=[1], d=[])
    assert sorted(split) == sorted(
        ("test" if int(key[6:-4]) in last[cls] else "train", cls, key) for cls, key in keys)
    names = ["r01", "r1", "r2", "r10"]  # 01 and 1 in one order, whichever is found first
    for found in itertools.permutations(names):
        assert sorted(found, key=data.natural_key) == names


def test_data_toy_comes_from_its_seed_and_is_not_told_by_counts():
    recordings = [data.simulate_toy(f"toy:0:{i}") for i in range(600)]
    assert np.array_equal(recordings[7], data.simulate_toy("toy:0:7"))
    for other in (recordings[17], data.simulate_toy("toy:1:7")):  # of the same class
        assert not np.array_equal(recordings[7][:50], other[:50])
    frames = np.stack([data.to_frames(events, 4, (32, 32), 16) for events in recordings])
    counts, labels = torch.from_numpy(frames.sum((3, 4), dtype=np.float32)), torch.arange(600) % 10
    for features in (counts.flatten(1), F.normalize(counts.flatten(1))):
        nearest = torch.cdist(features[:100], features[100:]).topk(20, largest=False).indices
        preds = labels[100:][nearest].mode(1).values
        assert (preds == labels[:100]).float().mean() < 0.7  # the network: 0.9, from fewer labels


@pytest.mark.parametrize("n, world_size", [(24, 2), (25, 2), (26, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_data_batches_hold_every_recording_once(n, world_size, shuffle):
    frames = np.arange(n, dtype=np.uint8)[:, None, None, None, None]  # its number, in all pixels
    split = data.Split(frames * np.ones((1, 3, 2, 4, 4), np.uint8), np.arange(n), [])

    def load(**share):
        generator, labels = torch.Generator().manual_seed(5), []
        for x, y in data.batches(split, 12, "cpu", shuffle, generator, **share):
            assert x.shape == (3, len(y), 2, 4, 4) and x.is_contiguous()
            assert x.dtype == torch.float32 and y.dtype == torch.int64
            assert (x == y.float()[:, None, None, None]).all()
            labels.append(y)
        return labels

    alone = load()
    sizes, order = [len(y) for y in alone], torch.cat(alone).tolist()
    assert sizes == {24: [12, 12], 25: [9, 8, 8], 26: [9, 9, 8]}[n]  # no small last batch
    assert sorted(order) == list(range(n)) and (order != sorted(order)) == shuffle
    shares = [load(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # no process waits for another
    interleaved = torch.stack([torch.cat(share) for share in shares], 1).flatten().tolist()
    assert interleaved == order[: n - n % world_size]


def test_data_augment_draws_one_view_per_recording():
    for size in (17, 32, 128):
        x = torch.poisson(torch.full((1, 6, 1, size, size), 0.3)).expand(4, 6, 2, size, size)
        assert torch.equal(data.augment(x, num_ops=0, flip=False, min_scale=1.0), x)
    y = data.augment(x)
    assert y.shape == x.shape and not torch.equal(y, data.augment(x))
    assert torch.equal(y, y[:1, :, :1].expand_as(y))  # the same for all times, both polarities
    assert set(y.unique().tolist()) <= set(x.unique().tolist())  # counts stay counts
    views = data.augment(x[:, :1].expand_as(x))[0, :, 0]
    assert len({view.numpy().tobytes() for view in views}) == 6  # different between recordings


def test_data_split_events_deals_each_event_to_one_half():
    x = torch.poisson(torch.full((4, 6, 2, 32, 32), 3.0))
    a, b = data.split_events(x)
    assert torch.equal(a + b, x) and torch.equal(a, a.round()) and min(a.min(), b.min()) == 0
    assert a.sum() / x.sum() == pytest.approx(0.5, abs=0.01)
    assert (a - b).square().sum() / x.sum() == pytest.approx(1, abs=0.03)  # one by one


def test_data_views_are_drawn_from_their_ranges():
    draw = data.draw_view(10_000, "cpu", num_ops=1, min_scale=1.0, shift=0.1, cutout=0.2)
    reach = dict(centre=0.2, angle=math.radians(30), shear=0.3, half_hole=0.2)
    for key, most in reach.items():
        values = draw[key].view(-1, 10_000)
        least = 0 if key == "half_hole" else -most
        assert [values.min(), values.max()] == pytest.approx([least, most], rel=0.01)
        used = (values != 0).any(0).float().mean()  # by every fourth view, as num_ops is 1
        assert used == pytest.approx(0.25, abs=0.03)
    assert draw["mirror"].unique().tolist() == [-1, 1] and draw["mirror"].mean().abs() < 0.05
    assert [draw["hole"].min(), draw["hole"].max()] == pytest.approx([-1, 1], abs=0.01)
    draw = data.draw_view(10_000, "cpu", 0, False, 0.25, 2.25)
    area, room = draw["side"] ** 2, (1 - draw["side"]).abs()
    assert 0.25 <= area.min() < 0.26 and 1.2 < area.mean() < 1.3 and 2.24 < area.max() <= 2.25
    assert (draw["centre"].abs() <= room + 1e-6).all() and (draw["mirror"] == 1).all()
    assert (draw["centre"].abs() > 0.95 * room).float().mean() == pytest.approx(0.05, abs=0.02)


def test_data_augment_equals_one_operation_after_the_other(monkeypatch):
    """Flip, shear, shift, crop, rotate, hole: any of them, each as plain indexing of 9 x 9."""
    # Not shear beside shift or crop: between two steps of indexing, pixels leave the image that
    # augment's one look-up keeps.
    chosen = [c for c in itertools.product([0.0, 1.0], repeat=6) if not (c[1] and any(c[2:4]))]
    flip, shear, shift, crop, rotate, cut = torch.tensor(chosen).T
    pixel = 2 / 9  # where the image's sides are from -1 to 1
    monkeypatch.setattr(data, "draw_view", lambda *_: dict(
        mirror=1 - 2 * flip, shear=shear, angle=rotate * math.pi / 2, side=1 - crop * 2 / 3,
        centre=torch.stack([-2 * pixel * shift - 2 / 3 * crop, -3 * pixel * shift + 2 / 3 * crop]),
        half_hole=2 * pixel * cut, hole=torch.tensor([[0.5], [-0.5]]).expand(2, len(chosen))))
    x, hole = torch.rand(2, len(chosen), 2, 9, 9) + 0.1, F.pad(torch.ones(4, 4), (5, 0, 0, 5)) > 0
    views = data.augment(x)
    for i, (flip, shear, shift, crop, rotate, cut) in enumerate(chosen):
        y = x[:, i].flip(-1) if flip else x[:, i]  # [T, 2, H, W]
        if shear:  # a row moves by its distance from the middle
            y = torch.stack([F.pad(y, (4, 4))[..., r, r : r + 9] for r in range(9)], -2)
        y = F.pad(y, (2, 0, 3, 0))[..., :9, :9] if shift else y  # to the right, and down
        if crop:  # the lower left third
            y = y[..., 6:, :3].repeat_interleave(3, -1).repeat_interleave(3, -2)
        y = torch.rot90(y, 1, (-2, -1)) if rotate else y
        assert torch.equal(views[:, i], y.masked_fill(hole, 0) if cut else y), chosen[i]


def make_folder(tmp_path, n=3, suffix=".npy", parts=("Train", "Test"), **settings):
    """Write n recordings of each of the classes a and b into every part -> {path: events}."""
    made = {tmp_path / "My.Data" / part / cls / f"r{i}{suffix}": recording(60, seed=s, **settings)
            for s, (part, cls, i) in enumerate(itertools.product(parts, "ab", range(n)))}
    for path, events in made.items():
        write(path, events)
    return made


def load_folder(tmp_path, n_frames=2, size=None, **settings):
    return data.load(tmp_path / "My.Data", tmp_path / "root", n_frames, size, **settings)


def cached(tmp_path):
    return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("root/frames/*")}


@pytest.mark.parametrize("suffix, sensor, size, parts", [
    (".bin", (40, 30), 40, ("train", "Test")), (".npy", (200, 150), 128, ("",)),
    (".npz", (4, 5), 8, ("train", "Test")), (".aedat4", (40, 30), 40, ("",))])
def test_data_folder_of_recordings(tmp_path, suffix, sensor, size, parts):
    made = make_folder(tmp_path, 12, suffix, parts, width=sensor[0], height=sensor[1])
    in_test = [p for p in made if "Test" in p.parts or parts == ("",) and p.stem == "r11"]
    in_train = [p for p in made if p not in in_test]  # r2 before r10
    for told in (None, (256, 250)):
        splits = load_folder(tmp_path, size=told and size, sensor=told)
        for split, paths in zip(splits, (in_train, in_test)):
            expected = [slow_frames(made[path], 2, told or sensor, size) for path in paths]
            assert isinstance(split.frames, np.memmap) and np.array_equal(split.frames, expected)
            assert split.labels.tolist() == ["ab".index(path.parent.name) for path in paths]
            assert split.classes == ["a", "b"] and split.sensor == list(told or sensor)
    before = cached(tmp_path)
    assert len(before) == 5 and all(name.startswith("My.Data-") for name in before)
    load_folder(tmp_path, size=size, sensor=list(sensor))  # as eval.py does: the same frames
    load_folder(tmp_path)
    assert cached(tmp_path) == before
    write(in_train[0], recording(77, *sensor))
    assert load_folder(tmp_path)[0].frames.sum((1, 2, 3, 4))[:2].tolist() == [77, 60]


def read_inverted(path, columns=None):
    events = np.load(path)
    events["p"] ^= True
    return events


def test_data_other_settings_or_functions_make_frames_anew(tmp_path, monkeypatch):
    make_folder(tmp_path)
    before, keys = load_folder(tmp_path)[0].frames, []
    assert load_folder(tmp_path, 3, 8)[0].frames.shape[1:] == (3, 2, 8, 8)
    monkeypatch.setitem(data.READERS, ".npy", read_inverted)
    assert (load_folder(tmp_path)[0].frames == before[:, :, ::-1]).all()
    for functions, name, function in [
            (data.READERS, ".npy", functools.partial(read_inverted, columns="xytp")),
            (data.READERS, ".npy", read_inverted), (vars(data), "read_file", read_inverted),
            (vars(data), "validate_events", read_inverted), (vars(data), "to_frames", slow_frames),
            (data.READERS, ".bin", read_inverted),  # which no recording needs
            (data.READERS, ".npy", functools.partial(np.fromfile, dtype="i4"))]:  # has no source
        monkeypatch.setitem(functions, name, function)
        keys.append(data.cache_key([("test", "a", "1.npy")], data.read_file, {}))
    assert len(set(keys)) == 6 and keys[4] == keys[5]


def test_data_folder_names_classes_that_are_not_in_both_parts(tmp_path, capsys):
    own = tmp_path / "My.Data"
    for name in ("Train/a/1.npy", "Train/b/1.npy", "Test/a/1.npy", "Test/c/1.npy"):
        write(own / name, recording(60))
    load_folder(tmp_path)
    warning, sensor = capsys.readouterr().out.splitlines()
    assert warning == f"warning: {own}: not both to train and to test on: class b, c"
    assert sensor.startswith("sensor: 12 x 9 pixels")


def load_beside(barrier, tmp_path):
    """Load while another process does: both have found no frames and begin to make them."""
    infer = data.infer_sensor_size

    def wait_and_infer(*args):
        barrier.wait(60)
        return infer(*args)
    with mock.patch.object(data, "infer_sensor_size", wait_and_infer):
        return load_folder(tmp_path)


def test_data_frames_are_complete_or_absent(tmp_path):
    made = make_folder(tmp_path)
    stop = mock.patch.object(data, "write_json", side_effect=KeyboardInterrupt)
    with stop, pytest.raises(KeyboardInterrupt):  # once the frames have a name
        load_folder(tmp_path, sensor=(12, 9))
    assert [path.suffix for path in tmp_path.glob("root/frames/*")] == [".npy"]
    barrier = multiprocessing.Barrier(2)
    other = multiprocessing.Process(target=load_beside, args=(barrier, tmp_path))
    other.start()
    splits = load_beside(barrier, tmp_path)
    other.join(100)
    before = cached(tmp_path)
    assert other.exitcode == 0 and len(before) == 3
    expected = [slow_frames(events, 2, (12, 9), 12) for events in made.values()]
    for train, test in (splits, load_folder(tmp_path)):
        assert np.array_equal(np.concatenate([train.frames, test.frames]), expected)
    assert cached(tmp_path) == before


def with_field(name, values):
    fields = {field: recording(60)[field] for field in "xytp"} | {name: values}
    return np.rec.fromarrays(list(fields.values()), names=list(fields))


BROKEN = {  # file -> (content, what is said about it)
    "cut.bin": (bytes(5 * 20 + 3), "truncated"), "cut.npy": (b"\x93NUMPY", "ValueError"),
    "text.npy": (b"x y t p", "pickle"), "old.aedat4": (b"#!AER-DAT2.0\r\n", "AER-DAT2.0"),
    "pickled.npy": (np.array([{}], object), "pickle"), "none.npy": (recording(0), "no event"),
    "plain.npy": (np.zeros((9, 4)), "--columns xytp"),
    "fields.npy": (recording(60)[["x", "y", "t"]], "fields x, y, t, p"),
    "wide.npy": (recording(60, 13), "x 0 to 12"), "high.npy": (recording(60, 12, 10), "y 0 to 9"),
    "negative.npy": (with_field("y", np.arange(60) - 52), "outside the sensor of 12 x 9 pixels"),
    "polarity.npy": (with_field("p", np.arange(60) % 3), "more than two polarities"),
    "backwards.npy": (with_field("t", np.arange(60)[::-1]), "backwards, by 59 of 59"),
    "reset.npy": (with_field("t", np.r_[:30, :30]), "backwards, by 29 of 29"),
    "nan.npy": (with_field("t", np.r_[:59, np.nan]), "backwards, by nan of nan"),
    **{f"~{i}.bin": (b"", "no event") for i in range(9)}}  # behind the others


def test_data_broken_recordings_are_listed_and_skipped(tmp_path, capsys):
    make_folder(tmp_path)
    whole = load_folder(tmp_path, sensor=(12, 9))
    for name, (content, _) in BROKEN.items():
        path = tmp_path / "My.Data/Train/a" / name
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    for _ in range(2):  # made, then cached; and in between they are skipped
        with pytest.raises(data.UserError) as e:
            load_folder(tmp_path, sensor=(12, 9))
        first, *listed, more = str(e.value).splitlines()
        assert first == "24 of 36 recordings are broken: remove them or pass --skip-broken:"
        assert len(listed) == 20 and more == "  and 4 more"
        for line, name in zip(listed, sorted(BROKEN)):
            path, _, error = line.strip().partition(": ")
            assert path == f"{tmp_path}/My.Data/Train/a/{name}" and BROKEN[name][1] in error
        rest = load_folder(tmp_path, sensor=(12, 9), skip_broken=True)
        for split, expected in zip(rest, whole):
            assert all(map(np.array_equal, split[:2], expected[:2]))  # frames and labels
        out = capsys.readouterr().out
        assert f"warning: 24 of 36 recordings are broken: left out:\n{listed[0]}" in out
    for path in tmp_path.rglob("Test/*/r*.npy"):
        path.write_bytes(b"")
    with pytest.raises(data.UserError, match="no recordings to test on"):
        load_folder(tmp_path, sensor=(12, 9), skip_broken=True)
    for path in tmp_path.rglob("r*.npy"):
        path.write_bytes(b"")
    with pytest.raises(data.UserError, match="36 of 36"):
        load_folder(tmp_path, sensor=(12, 9), skip_broken=True)
    late = recording(1000)
    late["t"] += np.random.default_rng(0).integers(0, 50, 1000)  # by half a hundredth: cameras do
    assert (late["t"][1:] < late["t"][:-1]).any() and data.validate_events(late) is late


@pytest.mark.parametrize("name, layout", [  # of recording i, below tonic's folder
    ("dvsgesture", "ibmGesture{part}/user{i:02}_led/{label}.npy"),
    ("nmnist", "{part}/{label}/{i:05}.bin"), ("ncaltech101", "Caltech101/{cls}/image_{i:04}.bin"),
    ("cifar10dvs", "{cls}/cifar10_{cls}_{i}.aedat4")])
def test_data_public_sets_as_tonic_lays_them_out(tmp_path, monkeypatch, capsys, name, layout):
    class_name, _, total, _, addresses = data.TONIC_DATASETS[name]
    tonic_class = getattr(tonic.datasets, class_name)
    sensor = (tonic_class.sensor_size or (240, 180))[:2]
    # Tonic wants to see 100 to 10,000 recordings, or downloads.
    monkeypatch.setattr(tonic_class, "_check_exists", lambda self: True)
    classes = list(getattr(tonic_class, "classes", ["BACKGROUND_Google", "airplanes", "zebra"]))
    expected = dict(Train=[], Test=[])
    for (label, cls), i in itertools.product(enumerate(classes), range(2, 12)):
        part = "Test" if i == 11 else "Train"  # where there are no parts: the last tenth
        path = tmp_path / class_name / layout.format(part=part, label=label, cls=cls, i=i)
        events = recording(60, *sensor, seed=100 * label + i)
        plain = np.stack([events[field] for field in "xypt"], 1)
        write(path, plain if name == "dvsgesture" else events)
        if name == "ncaltech101":  # tonic moves every recording to the corner
            events["x"], events["y"] = (events[side] - events[side].min() for side in "xy")
        expected[part].append(slow_frames(events, 2, sensor, 16))
    for split, frames in zip(data.load(name, tmp_path, 2, 16), expected.values()):
        assert np.array_equal(split.frames, frames)
        assert split.classes == classes and split.sensor == list(sensor)
        assert np.array_equal(split.labels, np.arange(len(frames)) * len(classes) // len(frames))
    assert f"{10 * len(classes)} of the {total:,} recordings of {name}" in capsys.readouterr().out
    # figshare's API and the addresses in tonic, which are dead, share the numbers of files.
    for attribute, address in addresses.items():
        file = address.removeprefix("https://api.figshare.com/v2/file/download/")
        dead = f'{attribute} = "https://figshare.com/ndownloader/files/{file}"'
        assert dead in inspect.getsource(tonic_class) and getattr(tonic_class, attribute) == address


@pytest.mark.parametrize("name, part", [
    ("nmnist", "train_"), ("nmnist", "test_"), ("ncaltech101", "")])
def test_data_failed_download_says_what_to_do(tmp_path, monkeypatch, name, part):
    for folder, i in itertools.product(("Train/0", "Train/1", "Test/0"), range(4)):
        write(tmp_path / "files" / folder / f"{i}.bin", recording(60, seed=i))
    archive = shutil.make_archive(tmp_path / "inner" / "Caltech101", "zip", tmp_path / "files")
    if name == "ncaltech101":  # its archive holds another one
        archive = shutil.make_archive(tmp_path / "outer", "zip", tmp_path / "inner")
    archive = Path(archive).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = {"/empty": b"", "/other": b"?"}.get(self.path, archive)
            self.send_response(202 if self.path == "/empty" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path == "/half" else body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, md5 = f"http://127.0.0.1:{server.server_port}", hashlib.md5(archive).hexdigest()
    tonic_class = getattr(tonic.datasets, data.TONIC_DATASETS[name][0])
    for each in {"train_", "test_"} if part else {""}:
        monkeypatch.setattr(tonic_class, f"{each}url", f"{address}/good")
        monkeypatch.setattr(tonic_class, f"{each or 'file_'}md5", md5)
    place = tmp_path / tonic_class.__name__ / getattr(tonic_class, f"{part}filename")
    for answer in ("/empty", "/other", "/half"):  # each meets what the one before has left
        monkeypatch.setattr(tonic_class, f"{part}url", address + answer)
        with pytest.raises(data.UserError) as e:
            data.load(name, tmp_path, 1, 8)
        assert f"fetch {address}{answer} (md5 {md5}), put it at {place}, run" in str(e.value)
        assert "\n" not in str(e.value)
    monkeypatch.setattr(tonic_class, f"{part}url", f"{address}/good")
    train, test = data.load(name, tmp_path, 1, 8)
    assert (len(train.labels), len(test.labels)) == ((8, 4) if part else (10, 2))
    server.shutdown()


# ------------------------------------------------------------------------------------------- eval

def test_eval_knn_alignment_and_uniformity_equal_loops():
    z, z_test, y, y_test = torch.randn(30, 5), torch.randn(9, 5), torch.arange(30) % 4, [0, 1, 2]
    correct = 0
    for query, label in zip(z_test, 3 * y_test):
        cosine, votes = torch.cosine_similarity(query, z, dim=1).tolist(), [0.0] * 4
        for i in sorted(range(30), key=lambda i: -cosine[i])[:7]:
            votes[y[i]] += math.exp(cosine[i] / 0.07)
        correct += votes.index(max(votes)) == label
    knn = evaluation.knn_accuracy(z, y, z_test, torch.tensor(3 * y_test), k=7)
    assert 0 < correct < 9 and knn == pytest.approx(correct / 9)
    assert evaluation.knn_accuracy(z[:3], y[:3], z[:3], y[:3], k=20) == 1  # k: more than there are

    a, b, unit = z[:9], z_test, F.normalize(z)
    alignment = sum(2 - 2 * torch.cosine_similarity(*pair, dim=0).item() for pair in zip(a, b)) / 9
    pairs = [math.exp(-2 * (v - w).square().sum()) for v, w in itertools.combinations(unit, 2)]
    expected = dict(alignment=alignment, uniformity=math.log(sum(pairs) / len(pairs)))
    assert evaluation.alignment_uniformity(a, b, z) == pytest.approx(expected, rel=1e-5)


def test_eval_probe_solves_what_is_linear_only():
    z, z_test, rule = torch.randn(200, 6), torch.randn(100, 6), torch.randn(6, 3)
    y, y_test = (z @ rule).argmax(1), (z_test @ rule).argmax(1)
    z, z_test = 100 + 9 * z, 100 + 9 * z_test
    # the head is the minimum of the penalised loss of standardised features: no gradient is left
    mean, std, head = z.mean(0), z.std(0, correction=0), models.fit_linear(z, y, 3)
    w = (head.weight * std).detach().requires_grad_()
    logits = (z - mean) / std @ w.T + (head.bias + head.weight @ mean).detach()
    loss = -logits.log_softmax(1)[torch.arange(200), y].mean() + 1e-3 / 2 * (w * w).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-4 < 1e-3 * w.abs().max()
    assert evaluation.linear_probe_accuracy(z, y, z_test, y_test) > 0.9
    assert evaluation.linear_probe_accuracy(z, y[torch.randperm(200)], z_test, y_test) < 0.6


@pytest.mark.parametrize("correct, n, low, high", [
    (81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18),
    (100, 100, 96.30, 100)])
def test_eval_wilson_equals_the_published_intervals(correct, n, low, high):
    """Newcombe 1998, table I, method 3; and all correct."""
    interval = evaluation.wilson_interval(correct, n)
    assert interval == pytest.approx([100 * correct / n, low, high], abs=0.006)
    assert 0 <= interval[1] < interval[2] <= 100


def test_eval_accuracy_equals_loops():
    (T, N, C), names = (3, 60, 12), [f"class {c}" for c in range(12)]
    logits, labels = torch.randn(T, N, C), torch.randint(C - 1, (N,))  # the last class has none
    more = torch.tensor([0.5, 1.5, 3.0])[:, None]  # later steps know more
    logits[torch.arange(T)[:, None], torch.arange(N), labels] += more
    results, correct = evaluation.accuracy_metrics(logits, labels, names), [0] * T
    confusion, top5 = np.zeros((C, C), int), 0
    for i, label in enumerate(labels.tolist()):
        for t in range(T):
            score = logits[: t + 1, i].mean(0).tolist()
            order = sorted(range(C), key=lambda c: -score[c])
            correct[t] += order[0] == label
        confusion[label, order[0]] += 1
        top5 += label in order[:5]
    assert correct[0] < correct[2] < top5 and results["top5"] == 100 * top5 / N
    assert results["steps"] == [evaluation.wilson_interval(n, N) for n in correct]
    assert [results["accuracy"], *results["interval"]] == results["steps"][2]
    assert results["confusion"] == confusion.tolist()
    by_class = [100 * row[c] / row.sum() if row.any() else None for c, row in enumerate(confusion)]
    assert results["by_class"] == by_class and by_class[-1] is None
    errors = [[confusion[i, j], names[i], names[j]] for i in range(C) for j in range(C) if i != j]
    assert results["worst"] == sorted(errors, reverse=True)[:5]


@pytest.mark.parametrize("arch, layers", [("spikformer-1-16", 11), ("sew-resnet-18-8", 21)])
@torch.no_grad()
def test_eval_counts_spikes_and_operations_of_every_layer(arch, layers):
    """Four recordings in two batches, beside the inputs and outputs that hooks see at once."""
    T, B, x, seen, spikes = 3, 4, torch.rand(3, 4, 2, 16, 16), {}, []
    net = models.Classifier(models.build(arch, 16), 5)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # with the statistics of x, so that all fires
            m.momentum = 1.0
            torch.nn.init.constant_(m.bias, 0.5)
    net.train()(x)
    net.eval()
    out, stats, rasters = evaluation.spike_stats(net, [(x[:, :3], None), (x[:, 3:], None)])
    assert torch.equal(out, net(x)) and not any(m._forward_hooks for m in net.modules())
    for name, m in net.named_modules():
        def note(m, inputs, out, name=name.removeprefix("encoder.")):
            seen[name] = m, inputs[0], out
        m.register_forward_hook(note)
    net(x)

    assert len(stats["layers"]) == layers
    for i, layer in enumerate(stats["layers"]):
        name = layer["layer"]
        if name + ".qkv" in seen:  # attention; a spike of q or k adds 16 numbers
            macs, added = 2 * 16 * 16 * 16 * T, 16 * seen[name + ".qkv"][2][:, :, :32].sum() / B
        else:
            m, x, out = seen.get(name + ".conv") or seen[name]
            macs = out.numel() // B * (m.weight.numel() // m.weight.shape[0])
            added = macs * x.mean() * (0 < i < layers - 1)  # real numbers enter first and last
        energy = 0.9e-6 * added if added else 4.6e-6 * macs
        costs = dict(macs=macs, operations=float(added), energy=float(energy))
        assert {k: layer[k] for k in costs} == pytest.approx(costs) and energy > 0
        if i < layers - 1:
            spikes.append(seen[name + ".lif"][2])  # [T, B, ...]
            silent = (spikes[-1].sum((0, 1)) == 0).float().mean()
            assert layer["silent"] == pytest.approx(100 * silent.item())
            assert layer["rate"] == pytest.approx(100 * spikes[-1].mean().item()) and silent < 1
            ends = spikes[-1][:, 0].flatten(1)[:, [0, -1]]
            assert torch.equal(rasters[name][:, [0, -1]], ends)
    assert max(x.max() for _, x, _ in seen.values()) > 1  # sums of spikes
    if layers == 11:
        assert [layer["macs"] // T for layer in stats["layers"]] == [
            16**2 * 9 * 4, 16**2 * 9 * 8, 16**2 * 9 * 32, 8**2 * 9 * 128, 4**2 * 9 * 256,  # stem
            4**2 * 16 * 48, 2 * 4**2 * 256, 4**2 * 256, 4**2 * 1024, 4**2 * 1024, 16 * 5]
    for k in ("macs", "operations", "energy"):
        assert stats[k] == pytest.approx(sum(layer[k] for layer in stats["layers"]))
    assert stats["energy"] < stats["energy_dense"] == pytest.approx(4.6e-6 * stats["macs"])
    rate = torch.cat([s.flatten() for s in spikes]).mean().item()
    assert stats["rate"] == pytest.approx(100 * rate, rel=1e-5)


def test_eval_energy_does_not_depend_on_batches():
    """A layer that takes real numbers in one batch multiplies in all of them."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.nn.init.eye_(net[0].weight)
    torch.nn.init.zeros_(net[0].bias)
    batches = [(torch.full((1, 3, 2), value), None) for value in (0.0, 0.5, 0.0)]
    stats = evaluation.spike_stats(net, batches)[1]
    assert [layer["energy"] for layer in stats["layers"]] == pytest.approx([4 * 4.6e-6] * 2)
    assert stats["operations"] == 0


# ---------------------------------------------------------------- train and eval, at tiny sizes

HERE = Path(train.__file__).parent
TINY = ("--arch spikformer-1-16 --n-frames 2 --image-size 16 --batch-size 6 --queue-size 8 "
        "--pretrain-epochs 2 --epochs 2 --lr 0.002 --device cpu --no-compile").split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def tiny(dataset, out, *flags):
    root = Path(dataset).parent / "root"
    return [str(f) for f in ("--dataset", dataset, "--root", root, "--out", out, *TINY, *flags)]


def printed(function, *args):
    """Call a function -> the lines it prints, those on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        function(*args)
    return out.getvalue().splitlines(), err.getvalue().splitlines()


def run_tiny(dataset, out, *flags):
    return printed(train.main, tiny(dataset, out, *flags))[0]


def run_eval(*argv):
    return printed(evaluation.main, ["--device", "cpu", "--no-compile", "--ckpt", *map(str, argv)])


def start(*argv, **options):
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=HERE, text=True, **options,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same(a, b, *names):
    return all(equal(*(torch.load(run / name)["weights"] for run in (a, b))) for name in names)


def same_run(a, b):
    return same(a, b, "pretrained.pt", "finetuned.pt") and read_log(a) == read_log(b)


def read_log(folder):
    """Read the epochs of log.csv, without the column seconds."""
    with open(folder / "log.csv") as f:
        rows = [row for row in csv.DictReader(f) if row["phase"] != "test"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder of recordings of three toy shapes: 3 x 20 to train on, 3 x 4 to test."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    for i, c in itertools.product(range(24), range(3)):
        path = folder / ("Train" if i < 20 else "Test") / "abc"[c] / f"{i}.npy"
        write(path, data.simulate_toy(f"toy:0:{10 * i + c}"))
    return folder


@pytest.fixture(scope="session")
def whole(shapes):
    """The folder of an undisturbed run."""
    run_tiny(shapes, shapes.parent / "whole")
    return shapes.parent / "whole"


def test_eval_json_holds_what_the_text_says(whole, tmp_path):
    lines, _ = run_eval(whole / "finetuned.pt", "--json", tmp_path / "f.json")
    (r,), text = json.loads((tmp_path / "f.json").read_text())["runs"], "\n".join(lines)
    assert r["alignment"] > 0 > r["uniformity"]
    assert lines[-1] == f"test accuracy {r['accuracy']:.2f} % (last epoch, 12 recordings)"
    for says in (f"kNN {r['knn']:.2f} %, linear probe {r['probe']:.2f} % (12 test recordings)",
                 f"alignment {r['alignment']:.3f}, uniformity {r['uniformity']:.3f}",
                 f"1 to 2 time steps: {r['steps'][0][0]:.2f}, {r['accuracy']:.2f} %",
                 "95 % interval {:.2f} to {:.2f} %".format(*r["interval"]),
                 f"{r['parameters']:,} parameters", f"T steps: {r['energy_dense']:.4f} uJ"):
        assert says in text
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    for name, row in zip("abc", r["confusion"]):
        assert cells[name][4:] == [str(n or ".") for n in row] and sum(row) == 4
    for layer in r["layers"] + [r | dict(layer="all")]:
        expected = [f"{layer[k]:.2f}" for k in ("rate", "silent") if k in layer]
        expected += [f"{layer[k]:,.0f}" for k in ("macs", "operations")]
        assert cells[layer["layer"]] == expected + [f"{layer['energy']:.4f}"]


def test_eval_of_an_encoder_and_of_the_same_in_a_classifier_changes_neither(whole, monkeypatch):
    lines, loaded = run_eval(whole / "pretrained.pt")[0], models.load_model(whole / "pretrained.pt")
    assert lines[-1].startswith("frozen features: kNN ")
    model, checkpoint = models.Classifier(loaded[0], 3), loaded[1] | dict(kind="finetuned")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(models, "load_model", lambda path, device: (model, checkpoint))
    again = run_eval(whole / "finetuned.pt")[0]
    assert equal(model.state_dict(), before) and len(before) > 50  # weights and buffers
    assert again[-2] == lines[-1] and again[-1].startswith("test accuracy ")
    assert again == run_eval(whole / "finetuned.pt")[0]  # the same views again


def test_eval_on_other_classes_and_in_another_order(whole, shapes, tmp_path):
    own, warnings = run_eval(whole / "finetuned.pt")
    (warning,) = run_eval(whole / "finetuned.pt", "--sensor", "64", "48")[1]
    assert not warnings and "sensor" in warning and "[64, 48]" in warning
    net, checkpoint = models.load_model(whole / "finetuned.pt")
    assert not net.training
    splits = data.load(shapes, shapes.parent / "root", 2, 16)
    z, z_test = (models.predict(net.encoder, data.batches(split, 6)).mean(0) for split in splits)
    y, y_test = (torch.tensor(split.labels) for split in splits)
    assert f"kNN {100 * evaluation.knn_accuracy(z, y, z_test, y_test):.2f} %" in own[-2]

    outputs = F.one_hot((y_test + 2) % 3).float()  # of a head for b, c, a
    head = {"head.weight": torch.linalg.lstsq(z_test, outputs)[0].T, "head.bias": torch.zeros(3)}
    checkpoint |= dict(weights=checkpoint["weights"] | head, classes=["b", "c", "a"])
    torch.save(checkpoint, tmp_path / "f.pt")
    assert float(run_eval(tmp_path / "f.pt")[0][-1].split()[2]) > 80
    torch.save(checkpoint | dict(classes=["b", "c", "z"]), tmp_path / "f.pt")
    lines, _ = run_eval(tmp_path / "f.pt")
    assert "no accuracy: the checkpoint has other classes, b, c, z" in lines
    assert lines[-1] == own[-2]  # kNN and probe do not mind the names


def test_train_and_eval_on_recordings_of_one_class(shapes, tmp_path):
    """Nothing to tell apart: pre-training only, and no kNN or probe that would say 100 %."""
    shutil.copytree(shapes / "Train" / "a", tmp_path / "one" / "a")
    assert "single class" in error_of("train.py", *tiny(tmp_path / "one", tmp_path / "run"))
    lines = run_tiny(tmp_path / "one", tmp_path / "run", "--epochs", "0")
    assert lines[-1].endswith(f"eval.py --ckpt {tmp_path / 'run' / 'pretrained.pt'}")
    assert [row["knn"] for row in read_log(tmp_path / "run")] == ["", ""]
    assert not any("kNN" in line for line in run_eval(tmp_path / "run" / "pretrained.pt")[0])


def test_eval_summary_averages_runs_that_differ_only_in_the_seed(whole, tmp_path):
    paths, units = [whole / "finetuned.pt", whole / "pretrained.pt"], evaluation.UNITS.items()
    cells = [re.split(r"\s{2,}", line) for line in run_eval(*paths, "--json", tmp_path / "f")[0]]
    run = json.loads((tmp_path / "f").read_text())["runs"][0]
    assert cells[0][1:] == [f"{k}, {unit}" if unit else k for k, unit in units]
    assert cells[1] == [str(paths[0]), *(f"{run[k]:.{2 if unit else 3}f}" for k, unit in units)]
    assert cells[2][:2] == [str(paths[1]), "-"] and len(cells) == 3
    changes = [dict(seed=1), dict(seed=1, init="same.pt"),  # of a seed, the first one counts
               dict(seed=2, out="o", root="r", device="d", resume=1, no_compile=0),
               dict(seed=3, init="other.pt"), dict(seed=4, init="other.pt", init_kind="finetuned"),
               dict(seed=5, init="other.pt", pretrain_on="other"), dict(lr=0.5), dict(queue_size=9)]
    runs = [run | dict(path=str(i), args=run["args"] | change, accuracy=90.0 + i**2)
            for i, change in enumerate(changes)]
    lines, _ = printed(evaluation.print_summary, runs)
    assert len(lines) == 10 and lines[-1].startswith("mean of 3 seeds, 0 ...")
    assert re.split(r"\s{2,}", lines[-1])[1] == "94.33 ± 4.51"  # of 90, 94 and 99


def test_eval_pictures_are_written_and_not_blank(whole, tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    run_eval(whole / "finetuned.pt", "--pictures", tmp_path / "a" / "b")
    shutil.copy(whole / "pretrained.pt", tmp_path)  # away from its log.csv
    monkeypatch.setattr(models, "autocast", lambda _: torch.autocast("cpu", BF16))  # as on GPUs
    run_eval(tmp_path / "pretrained.pt", "--pictures", tmp_path / "pre")
    names = [sorted(p.stem for p in (tmp_path / d).iterdir()) for d in ("a/b", "pre")]
    assert names == [["accuracy", "curves", "frames", "map", "spikes"], ["frames", "map", "spikes"]]
    for path in (tmp_path / "a" / "b").iterdir():
        pixels = image.imread(path)[..., :3]
        assert pixels.shape[1] >= 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
        assert (pixels.max(2) - pixels.min(2) > 0.3).mean() > 0.0005  # coloured


@pytest.mark.parametrize("spiking", [True, False])
def test_train_and_eval_of_a_backbone_of_ones_own(shapes, tmp_path, monkeypatch, spiking):
    def build(arch, size):
        net = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Linear(2 * 16 * 16, 6))
        net.append(neuron.LIF() if spiking else torch.nn.ReLU())
        net.dim = 6
        return net
    monkeypatch.setattr(models, "build", build)
    run_tiny(shapes, tmp_path / "a", "--arch", "own")
    lines, _ = run_eval(tmp_path / "a" / "finetuned.pt", "--json", tmp_path / "f.json")
    (results,) = json.loads((tmp_path / "f.json").read_text())["runs"]
    macs = [2 * 512 * 6, 2 * 6 * 3]  # two steps; spikes enter the head, or real numbers
    assert [layer["macs"] for layer in results["layers"] if layer["macs"]] == macs
    spikes = 0.9e-6 * macs[1] * results["rate"] / 100 if spiking else 4.6e-6 * macs[1]
    assert results["energy"] == pytest.approx(4.6e-6 * macs[0] + spikes)
    assert ("rate" in results) == spiking and lines[-1].startswith("test accuracy ")
    assert all((float(row["rate"]) > 0) == spiking for row in read_log(tmp_path / "a"))


# ------------------------------------------------------------------------------------------ train

def test_train_optimizer_decays_weights_only_and_rates_follow_a_cosine():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.Linear(3, 4))
    model[1].weight.requires_grad_(False)
    decayed, others = train.build_optimizer(model, 0.06).param_groups
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.06
    assert others["params"] == [model[0].bias, model[1].bias] and others["weight_decay"] == 0
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 40) for step in range(40)]
    rates = [train.warmup_cosine(step, 40) for step in range(40)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine[4:]])
    rates = [train.warmup_cosine(step, 200) for step in range(10)]
    assert rates[:9] == pytest.approx([i / 10 for i in range(1, 10)])

    p, batch = torch.nn.Parameter(torch.tensor(0.0)), (torch.tensor(1.0), torch.tensor(0.5))
    results = train.train_one_epoch(
        lambda x, y: (p + x, y), [batch] * 2, torch.optim.SGD([p], 9.0), [0.1, 0.2])
    assert p.item() == pytest.approx(-0.3) and results == pytest.approx([0.95, 0.5])


def test_train_labels_per_class(shapes):
    split = data.load(shapes, shapes.parent / "root", 2, 16)[0]
    few, again, other = (train.few_shot_subset(split, 4, seed) for seed in (0, 0, 1))
    assert few.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(few.frames, again.frames) and (few.frames != other.frames).any()
    for frames, label in zip(few.frames, few.labels):
        assert any(np.array_equal(frames, one) for one in split.frames[split.labels == label])
    assert train.few_shot_subset(split, 0, 0) is split
    warnings = [f"warning: fewer than 21 recordings in class {c}" for c in "abc"]
    assert printed(train.few_shot_subset, split, 21, 0)[0] == warnings


def before_the_loop(phase, split, **flags):
    """Call train.pretrain or train.finetune -> (args, what it passes to train_phase)."""
    flags = data.FOLDER_DEFAULTS | dict(
        batch_size=6, queue_size=4, seed=0, init=None, device="cpu", no_compile=True) | flags
    args = types.SimpleNamespace(**flags)
    with mock.patch.object(train, "train_phase", side_effect=StopIteration) as train_phase:
        with pytest.raises(StopIteration):
            phase(models.build("spikformer-1-16", 16), split, args, {"log": []})
    return args, train_phase.call_args.args


@pytest.mark.parametrize("split_events", [True, False])
def test_train_contrasts_two_views_of_a_recording(shapes, monkeypatch, split_events):
    split = data.load(shapes, shapes.parent / "root", 2, 16)[0]
    args, (_, net, _, compute_loss, *_) = before_the_loop(
        train.pretrain, split, split_events=split_events)
    augment, drawn, views = data.augment, [], []

    def recorded(x, **ranges):
        drawn.append((x, ranges, augment(x, **ranges)))
        return drawn[-1][2]
    monkeypatch.setattr(data, "augment", recorded)
    net.register_forward_pre_hook(lambda net, inputs: views.extend(inputs))
    x, y = next(train.mixed_batches(split, args))
    assert compute_loss(x, y)[0].requires_grad
    (x_q, ranges_q, view_q), (x_k, ranges_k, view_k) = drawn
    assert ranges_q == ranges_k == data.AFFINE_AUG and views[0] is view_q and views[1] is view_k
    assert (view_q != view_k).any((0, 2, 3, 4)).all()  # of each recording
    assert torch.equal(x_q + x_k, x if split_events else 2 * x)
    if not split_events:
        assert torch.equal(x_q, x)


def test_train_monitor_never_asks_a_recording_about_itself(shapes, monkeypatch):
    split = data.load(shapes, shapes.parent / "root", 2, 16)[0]
    args, (*_, monitor) = before_the_loop(train.pretrain, split)
    y = torch.tensor(split.labels)
    noise, classes, unique = torch.randn(60, 60), 99 * F.one_hot(y, 60), torch.eye(60)
    # Only the average over time shows the class; each recording is like itself only: guessing.
    for z, expected in [([noise, classes - noise], 1), ([unique, unique], 1 / 3)]:
        monkeypatch.setattr(models, "predict", lambda *_: torch.stack(z))
        assert monitor() == pytest.approx(expected, abs=0.1)
    once, again = ([y.tolist() for _, y in train.mixed_batches(split, args)] for _ in range(2))
    assert once == again and sorted(sum(once, [])) == y.tolist()
    assert min(len(set(labels)) for labels in once) > 1  # batches of mixed classes


@pytest.mark.parametrize("pretrain_epochs", [2, 0])
def test_train_finetunes_by_the_mean_over_time(shapes, monkeypatch, pretrain_epochs):
    split = data.load(shapes, shapes.parent / "root", 2, 16)[0]
    monkeypatch.setattr(train, "fit_head", lambda *_: None)
    args, (_, net, _, compute_loss, *_) = before_the_loop(
        train.finetune, split, pretrain_epochs=pretrain_epochs)
    torch.nn.init.normal_(net.head.weight)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    x, y = next(train.mixed_batches(split, args))
    net.encoder.train()
    net(x)  # the statistics with which neurons fire
    assert net.train().encoder.training  # in a backbone of your own, dropout is active
    before = copy.deepcopy(net.encoder.state_dict())
    torch.manual_seed(1)
    loss, accuracy = compute_loss(x, y)
    kept = equal(net.encoder.state_dict(), before)
    assert kept == (pretrain_epochs > 0)  # the statistics of batch norm
    torch.manual_seed(1)
    logits = net(data.augment(x, **args.finetune_aug))  # [T, B, classes]
    assert (logits[0] != logits[1]).any() and not torch.equal(logits, net(x))
    mean = (logits[0] + logits[1]) / 2
    expected = sum(-row.log_softmax(0)[label] for row, label in zip(mean, y)) / len(y)
    torch.testing.assert_close(loss, expected)
    assert accuracy == sum(row.argmax() == label for row, label in zip(mean, y)) / len(y)


def test_train_fits_the_head_to_the_frozen_encoder_first(shapes, whole, monkeypatch):
    split = data.load(shapes, shapes.parent / "root", 2, 16)[0]
    encoder = Linear(16, 8)
    before, saved = copy.deepcopy(encoder.state_dict()), torch.load(whole / "finetuned.pt")["args"]
    monkeypatch.setattr(train, "train_phase", lambda *_: None)
    monkeypatch.setattr(train, "save", lambda *_: None)
    accuracy = {}
    for epochs in 2, 0:
        args = types.SimpleNamespace(**saved | dict(pretrain_epochs=epochs))
        net = train.finetune(encoder, split, args, {})
        logits = models.predict(net, data.batches(split, 6)).mean(0)
        accuracy[epochs] = (logits.argmax(1) == torch.tensor(split.labels)).float().mean()
    assert accuracy[2] > 0.6 > accuracy[0]  # from scratch: a random head
    assert equal(encoder.state_dict(), before)


class OneDevice(TorchDispatchMode):
    """Raise where an operation on the device without values (meta) meets a tensor on the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors if t.ndim} != {"cpu", "meta"}, operation
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch, size", [("spikformer-2-256", 128), ("sew-resnet-18", 16)])
def test_train_loop_stays_on_its_device_and_never_waits_for_it(arch, size, monkeypatch):
    """Asking a device without values for one raises: the end of an epoch does, nothing before."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(train, "fit_head", lambda *_: None)  # before the loop, on the CPU
    args = data.FOLDER_DEFAULTS | dict(
        device="meta", batch_size=3, no_compile=True, seed=0, init=None, split_events=False)
    frames = torch.empty(6, 4, 2, size, size, dtype=torch.uint8, device="meta")
    split = data.Split(frames, np.zeros(6, int), ["a", "b"])
    for phase in (train.pretrain, train.finetune):
        steps = []
        hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
        with OneDevice(), pytest.raises(NotImplementedError, match="meta"):
            phase(models.build(arch, size), split, types.SimpleNamespace(**args), {"log": []})
        hook.remove()
        assert len(steps) == 2


def test_train_rate_is_the_share_of_spikes():
    encoder, x, spikes = models.build("spikformer-1-16", 16), torch.ones(2, 6, 2, 16, 16), []
    before, rate = copy.deepcopy(encoder.state_dict()), train.firing_rate(encoder, x)
    assert equal(encoder.state_dict(), before)
    for m in encoder.modules():
        if isinstance(m, neuron.LIF):
            m.register_forward_hook(lambda m, i, out: spikes.append(out.flatten()))
    encoder(x)
    assert len(spikes) == 10 and 0.01 < rate == pytest.approx(torch.cat(spikes).mean().item())
    for m in encoder.modules():
        if isinstance(m, models.ConvLIF):
            torch.nn.init.constant_(m.bn.bias, -1e3)
    assert train.firing_rate(encoder, x) == 0


@pytest.mark.parametrize("moment", range(1, 7))
def test_train_resumes_bit_for_bit(shapes, whole, tmp_path, monkeypatch, moment):
    """Interrupted half-way through writing state.pt (1, 2, 4, 5), pretrained.pt, finetuned.pt."""
    save, paths = torch.save, []

    def interrupted(content, path):
        paths.append(path)
        if len(paths) < moment:
            return save(content, path)
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(torch, "save", interrupted)
        run_tiny(shapes, tmp_path / "cut")
    assert len(paths) == moment and not (tmp_path / "cut" / "finetuned.pt").exists()
    run_tiny(shapes, tmp_path / "cut", "--resume")
    assert same_run(whole, tmp_path / "cut")


def test_train_resumes_bit_for_bit_after_kill_9_and_ctrl_c(shapes, tmp_path):
    flags, log = ["--pretrain-epochs", "6", "--epochs", "6"], tmp_path / "cut" / "log.csv"
    run_tiny(shapes, tmp_path / "whole", *flags)
    flags += ["--root", tmp_path / "root", "--resume"]
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's & ignores
    for stop, moment in [
            (signal.SIGKILL, lambda: (tmp_path / "root" / "frames").exists()),
            (signal.SIGKILL, lambda: log.exists() and log.stat().st_mtime > began),
            (signal.SIGINT, lambda: log.stat().st_mtime > began),  # an epoch of its own is done
            (signal.SIGKILL, lambda: "finetune,2" in log.read_text())]:
        began = time.time()
        run = start("train.py", *tiny(shapes, tmp_path / "cut", *flags), preexec_fn=default)
        while run.poll() is None and not moment():
            time.sleep(0.005)
        run.send_signal(stop)
        error = run.communicate(timeout=60)[1]
        assert run.returncode == -stop, error
        if stop == signal.SIGINT:
            assert "Traceback" not in error and "--resume" in error.splitlines()[-1]
    run_tiny(shapes, tmp_path / "cut", *flags)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_train_resume_of_a_finished_run_trains_what_flags_add(shapes, whole, tmp_path):
    run, changed = shutil.copytree(whole, tmp_path / "run"), []

    def epochs(*flags):
        lines = run_tiny(shapes, run, "--resume", *flags)
        changed[:] = [line for line in lines if re.match("from here on|too late", line)]
        assert lines[-1] == run_eval(run / "finetuned.pt")[0][-1]  # test accuracy ...
        test = (run / "log.csv").read_text().splitlines()[-1]
        assert re.fullmatch(rf"test,,,{float(lines[-1].split()[2]) / 100:.4f},+", test)
        return [line.split(":")[0] for line in lines if re.match(r"(pretrain|finetune) \d", line)]
    assert epochs("--alpha", "1", "--labels-per-class", "3") == [] and same_run(whole, run)
    assert changed == [
        f"too late, its phase is over: {stays}"
        for stays in ("labels_per_class stays 0, not 3", "alpha stays 0.5, not 1.0")]
    saved = torch.load(run / "finetuned.pt")["args"]
    assert (saved["alpha"], saved["labels_per_class"]) == (0.5, 0)
    rates = [row["lr"] for row in read_log(run)]
    assert rates == ["4.00e-04", "1.00e-03"] * 2
    more = ["--epochs", "4", "--weight-decay", "0.5", "--batch-size", "4"]
    assert epochs(*more) == ["finetune 3/4", "finetune 4/4"]
    assert changed == [
        "from here on: epochs 4, not 2", "from here on: weight_decay 0.5, not 0.06",
        "from here on: batch_size 4, not 6"]
    assert same(whole, run, "pretrained.pt") and not same(whole, run, "finetuned.pt")
    assert read_log(run)[:4] == read_log(whole) and len(read_log(run)) == 6
    state = torch.load(run / "state.pt")
    assert state["finetune"]["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert state["args"]["epochs"] == torch.load(run / "finetuned.pt")["args"]["epochs"] == 4
    assert epochs("--pretrain-epochs", "3") == ["pretrain 3/3", "finetune 1/2", "finetune 2/2"]
    assert not same(whole, run, "pretrained.pt") and not same(whole, run, "finetuned.pt")
    rows = [row["phase"] + row["epoch"] for row in read_log(run) if 0 < float(row["rate"]) < 1]
    assert rows == ["pretrain1", "pretrain2", "pretrain3", "finetune1", "finetune2"]
    state = torch.load(run / "state.pt")
    del state["args"]["alpha"], state["args"]["lr"]  # as if train.py had got these flags since
    torch.save(state, run / "state.pt")
    assert epochs("--pretrain-epochs", "3") == []
    assert sorted(changed) == [
        "from here on: alpha 0.5, not None", "from here on: lr 0.002, not None"]
    state = torch.load(run / "state.pt")
    del state["finetune"]
    state["args"]["pretrain_epochs"], state["log"] = 5, state["log"][:3]  # as after 3 epochs of 5
    torch.save(state, run / "state.pt")
    assert epochs("--pretrain-epochs", "3") == ["finetune 1/2", "finetune 2/2"]
    assert "from here on: pretrain_epochs 3, not 5" in changed


def test_train_init_takes_the_encoder_of_either_kind(shapes, whole, tmp_path):
    run_tiny(shapes, tmp_path / "init", "--init", whole / "pretrained.pt", "--temperature", "3")
    assert same(whole, tmp_path / "init", "finetuned.pt")
    run_tiny(shapes, tmp_path / "seed", "--init", whole / "pretrained.pt", "--seed", "1")
    assert not same(whole, tmp_path / "seed", "finetuned.pt")
    was, args = (torch.load(out / "finetuned.pt")["args"] for out in (whole, tmp_path / "init"))
    assert args == was | {k: args[k] for k in ("init", "out")}  # how the encoder was made
    ckpt, encoder = whole / "finetuned.pt", models.build("spikformer-1-16", 16)
    args = types.SimpleNamespace(init=ckpt, image_size=16, dataset="other")
    train.load_pretrained_encoder(encoder, args)
    assert (args.init_kind, args.pretrain_on) == ("finetuned", was["dataset"])
    assert equal(encoder.state_dict(), models.load_model(ckpt)[0].encoder.state_dict())


def test_train_stops_at_a_loss_that_is_not_finite(shapes, whole, tmp_path, monkeypatch):
    train_one_epoch, epochs = train.train_one_epoch, []

    def broken(*args):
        epochs.append(train_one_epoch(*args))
        return (math.nan, 0.0) if len(epochs) == 4 else epochs[-1]
    says = "finetune 2/2: the loss is nan: take a lower learning rate"
    with monkeypatch.context() as m, pytest.raises(data.UserError, match=says):
        m.setattr(train, "train_one_epoch", broken)
        run_tiny(shapes, tmp_path / "a")
    assert torch.load(tmp_path / "a" / "state.pt")["finetune"]["epoch"] == 1
    run_tiny(shapes, tmp_path / "a", "--resume")
    assert same_run(whole, tmp_path / "a")


def test_train_numbers_its_folders_and_resumes_the_last(shapes, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, out in [("", "runs/shapes"), ("", "runs/shapes-2"), ("--resume", "runs/shapes-2"),
                       ("--out runs/shapes-4", "runs/shapes-4"), ("--resume", "runs/shapes-4"),
                       ("", "runs/shapes-5"), ("--out .", ".")]:  # a gap is not filled
        args = train.parse_args(["--dataset", str(shapes), "--device", "cpu", *flags.split()])
        printed(train.make_run_dir, args, ["a", "b", "c"])
        assert args.out == out and Path(out, "log.csv").exists()
    shutil.copytree(whole, "runs/shapes-6")
    shutil.copytree(shapes, "other/shapes")  # another folder of this name
    flags = ["--dataset", "other/shapes", "--root", "root", *TINY, "--resume"]
    with pytest.raises(data.UserError, match="runs/shapes-6/state.pt was made with dataset"):
        train.main(flags)
    printed(train.main, [*flags, "--out", "runs/shapes-6"])  # the folder has moved


def test_train_under_torchrun(shapes, whole, tmp_path):
    """One process is a run without torchrun; two share the work, write once, and resume."""
    for processes, out, *flags in [(1, "one"), (2, "two"), (2, "two", "--epochs", 3, "--resume")]:
        run = start(*TORCHRUN, processes, "train.py", *tiny(shapes, tmp_path / out, *flags))
        text, error = run.communicate(timeout=150)
        assert run.returncode == 0 and text.count("test accuracy") == 1, error
    assert same_run(whole, tmp_path / "one")
    assert [row["epoch"] for row in read_log(tmp_path / "two")] == list("12123")
    assert all(0 < float(row["loss"]) < 9 for row in read_log(tmp_path / "two"))


def test_train_names_what_several_processes_cannot_do(monkeypatch):
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 3))
    split = data.Split(np.zeros((6, 1)), np.arange(6) % 2, ["a", "b"])
    assert len(printed(train.few_shot_subset, split, 2, 0)[0]) == 0
    with pytest.raises(data.UserError, match="--labels-per-class 1: fewer labels than processes"):
        train.few_shot_subset(split, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(data.UserError, match="WORLD_SIZE is set, but not by torchrun"):
        train.init_distributed(types.SimpleNamespace(device="cpu", batch_size=32))


def train_share(folder):
    """Pre-train for two steps, one process's share, in evaluation mode of batch norm."""
    args = types.SimpleNamespace(device="cpu", batch_size=6, seed=0, weight_decay=0.0, out=folder)
    train.init_distributed(args)
    torch.manual_seed(0)
    net = moco.MoCo(models.build("spikformer-1-16", 16), queue_size=8, momentum=0.5)
    net.init_queue(2)
    net.double()  # or rounding, which depends on the size of a batch, could make a neuron fire
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 1.0
    x = torch.randint(0, 9, (2, 6, 2, 16, 16))
    net.encoder_q(x.double())  # the statistics with which neurons fire
    net.encoder_k(2 * x.double())
    net.eval().train = lambda: net  # train_phase must not undo eval
    split = data.Split(x.transpose(0, 1).to(torch.uint8), torch.arange(6), ["a"])
    model, drawn, state = train.wrap_model(net, args), [], {"log": []}

    def compute_loss(x, y):
        drawn.append(torch.rand(1))
        return model(x.double(), 2 * x.double()), net.accuracy

    def sgd(model, weight_decay):  # AdamW would not tell a gradient from twice itself
        return torch.optim.SGD(model.encoder_q.parameters())
    with mock.patch.object(train, "build_optimizer", sgd):
        train.train_phase("pretrain", net, torch.nn.Identity(), compute_loss, split, 2, 0.1, args,
                          state, None)
    losses = torch.tensor([float(row["loss"]) for row in state["log"]])
    result = dict(net.state_dict(), losses=losses, drawn=torch.cat(drawn))
    torch.save(result, f"{folder}/{'%d of %d' % train.rank_and_world_size()}.pt")


def test_train_on_two_processes_is_train_on_one(tmp_path):
    """The same losses, weights and queue; each process draws views of its own."""
    printed(train_share, tmp_path)
    script = f"import {__name__}; {__name__}.train_share({str(tmp_path)!r})"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(HERE), str(Path(__file__).parent)]))
    run = start(*TORCHRUN, 2, "--no-python", sys.executable, "-c", script, env=env)
    error = run.communicate(timeout=150)[1]
    assert run.returncode == 0, error
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("0 of 1", "0 of 2", "1 of 2"))
    drawn = [value for share in (one, *two) for value in share.pop("drawn").tolist()]
    # Each has drawn twice; process 0 of two as the only one does.
    assert len(drawn) == 6 and len(set(drawn)) == 4 and one["losses"].max() > 1
    assert len(one["queue"].unique(dim=0)) == 8  # no two recordings look alike
    assert equal(*two)
    for k in one:
        torch.testing.assert_close(two[0][k], one[k], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- user's mistakes

def error_of(script, *argv):
    """Run a script as the command line does -> the last line of its error."""
    err = io.StringIO()
    with pytest.raises(SystemExit) as e, contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", [script, *map(str, argv)]):
            runpy.run_path(str(HERE / script), run_name="__main__")
    lines = [e.value.code] if e.value.code != 2 else err.getvalue().splitlines()  # 2: argparse
    assert "\n" not in lines[-1]
    return lines[-1]


# What the error must say is behind the arrow, or it is the first flag.
@pytest.mark.parametrize("flags", [
    "--lr nan", "--lr 0", "--pretrain-lr inf", "--weight-decay nan", "--alpha -1", "--epochs -1",
    "--momentum 1.5", "--momentum -0.1", "--temperature 0", "--n-frames 0", "--queue-size 0",
    "--image-size 0", "--batch-size 2", "--labels-per-class -1", "--sensor 0 9", "--dataset",
    "--seed 99999999999999999999", "--device gpu", "--device cuda:99", "--pretrain-epoch 3",
    "--beta 0 --alpha 0 -> --beta 0", "--epochs 0 --pretrain-epochs 0 -> nothing to do",
    "--dataset no/such -> no/such: neither a folder nor one of toy",
    "--dataset FOLDER -> folder: no recordings",
    "--arch resnet-50 -> 'resnet-50'", "--arch sew-resnet-18-0 -> 'sew-resnet-18-0'",
    "--arch sew-resnet-18-4 -> multiple of 8", "--arch sew-resnet-34 -> 'sew-resnet-34'",
    "--arch spikformer-2 -> 'spikformer-2'",
    "--arch spikformer-0-64 -> 'spikformer-0-64'", "--arch spikformer-2-100 -> 'spikformer-2-100'",
    "--arch sew-resnet-18-12 -> a multiple of 8: on some CPUs, PyTorch hangs",
    "--init no/such.pt -> no/such.pt", "--init EMPTY -> empty: not", "--init EVIL -> evil: not",
    "--init FOLDER -> folder",
    "--init CKPT --pretrain-on OTHER -> --pretrain-on",
    "--pretrain-epochs 0 --pretrain-on OTHER -> --pretrain-on",
    "--init CKPT --arch spikformer-1-32 -> builds spikformer-1-32",
    "--root EMPTY -> empty", "--out EMPTY -> empty", "--out EMPTY/below -> empty/below",
    "--out WHOLE -> holds a run already: add --resume", "--resume --out FOLDER -> state.pt",
    "--resume --out WHOLE --arch spikformer-1-32 -> arch spikformer-1-16, not spikformer-1-32",
    "--resume --out WHOLE --queue-size 9 -> queue_size 8, not 9",
    "--resume --out WHOLE --n-frames 3 -> n_frames 2, not 3",
    "--resume --out WHOLE --frames-by time -> frames_by count, not time",
    "--resume --out WHOLE --image-size 8 -> image_size 16, not 8",
    "--resume --out WHOLE --seed 1 -> seed 0, not 1",
    "--resume --out WHOLE --init CKPT -> init None, not",
    "--resume --out WHOLE --epochs 1 -> 2 epochs of finetune, not 1",
    "--resume --out WHOLE --pretrain-epochs 0 -> 2 epochs of pretrain, not 0",
    "--out LOST -> holds finetuned.pt, but not both",
    "--resume --out LOST -> holds finetuned.pt, but not both",
    "--dataset SPLIT -> need a folder for each class",
    "--resume --out WHOLE --dataset OTHER -> classes ['a', 'b', 'c'], not ['a', 'z']",
    "--resume --out WHOLE --dataset TESTS -> recordings of other names",
    "--ckpt no/such.pt -> no/such.pt", "--ckpt EMPTY -> empty: not", "--ckpt EVIL -> evil: not",
    "--ckpt HALF -> half: not", "--ckpt FOLDER -> folder", "--ckpt CKPT --pict p -> --pict",
    "--ckpt CKPT --device gpu -> --device", "--ckpt CKPT --device cuda:99 -> --device",
    "--ckpt CKPT --json EMPTY/f -> empty", "--ckpt CKPT --dataset no/such -> no/such",
    "--ckpt CKPT CKPT --pictures p -> --pictures",
    "--ckpt CKPT --predict FOLDER -> no recordings",
    "--ckpt CKPT --predict FOLDER --dataset toy -> does not go with"])
def test_train_and_eval_answer_a_mistake_with_one_line(shapes, whole, tmp_path, flags):
    evil = f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()  # a pickle that runs a command
    files = {"empty": b"", "half": (whole / "finetuned.pt").read_bytes()[:9000]}
    files |= {"evil": evil, "folder/state.pt": evil, "lost/finetuned.pt": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for folder in "other/a", "other/z", "split/train", "split/test":
        shutil.copytree(shapes / "Test" / "a", tmp_path / folder)
    places = dict(CKPT=whole / "finetuned.pt", WHOLE=whole, TESTS=shapes / "Test")
    flags, _, says = flags.partition(" -> ")
    flags = [re.sub("[A-Z]{4,}", lambda m: str(places.get(m[0], tmp_path / m[0].lower())), flag)
             for flag in flags.split()]
    if flags[0] == "--ckpt":
        line = error_of("eval.py", "--device", "cpu", "--no-compile", *flags)
    else:
        line = error_of("train.py", *tiny(shapes, tmp_path / "out", *flags))
    assert "error: " in line and (says or flags[0]) in line
    assert not any((tmp_path / name).exists() for name in ("out", "ran", "lost/log.csv"))


def test_train_and_the_script_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_TRAIN", 300)
    monkeypatch.setattr(data, "TOY_TEST", 100)
    few = "--arch", "sew-resnet-18-8", "--labels-per-class", "3", "--queue-size", "500"
    lines = run_tiny("toy", "runs/toy", *few)
    assert lines[-1].endswith("% (last epoch, 100 recordings)")
    assert any("a queue of 500 holds all 300 recordings" in line for line in lines)
    (script,) = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert float(printed(exec, script, {"__name__": "__main__"})[0][-1]) > 0.3


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_train_on_cuda(tmp_path, monkeypatch, compiled):
    """An epoch of each phase is like the CPU's; --resume continues; the CPU can evaluate it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_TRAIN", 600)
    monkeypatch.setattr(data, "TOY_TEST", 200)
    argv = tiny("toy", "cuda", "--batch-size", 32, "--epochs", 1, "--device", "cuda")
    argv = [flag for flag in argv if not (compiled and flag == "--no-compile")]
    printed(train.main, argv)
    run_tiny("toy", "cpu", "--batch-size", 32, "--epochs", 1)
    cuda, cpu = read_log(Path("cuda")), read_log(Path("cpu"))
    for column, tolerance in dict(loss=0.5, rate=0.05, knn=0.12).items():
        for a, b in zip(cuda, cpu, strict=True):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), abs=tolerance)
    last = printed(train.main, [*argv, "--resume", "--epochs", "2"])[0][-1]
    rows, on_cpu = read_log(Path("cuda")), run_eval("cuda/finetuned.pt")[0][-1]
    assert rows[:3] == cuda and len(rows) == 4 and 0 < float(rows[3]["loss"]) < 9
    assert float(last.split()[2]) == pytest.approx(float(on_cpu.split()[2]), abs=4)


# ------------------------------------------------- own recordings: no wrong result without a word

def folder_of(root, *names, n=60):
    """Write recordings to root/<name>, each with events of its own."""
    for i, name in enumerate(names):
        write(root / name, recording(n, seed=i))


def many(*folders, n=6):
    return [f"{folder}/{i}.npy" for folder in folders for i in range(n)]


def test_own_path_with_a_slash_or_a_dot_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "toy", *many("a", "b"))
    for name in ("./toy", "toy/", str(tmp_path / "toy")):
        assert data.load(name, "root", 2)[0].classes == ["a", "b"]
        assert data.resolve(name) == str(tmp_path / "toy")
    assert data.resolve("toy") == "toy" and len(data.list_toy()[1]) == 10


def test_own_everything_left_out_is_named_once(tmp_path, capsys):
    own = tmp_path / "own"
    folder_of(own, *many("Train/a", "Train/b", "Test/a", "Test/b", "Val/a", n=2), "Train/a/.x.npy",
              ".old/a/1.npy", "Train/a/deep/1.npy", "loose.npy", "Train/a/._1.npy")
    (own / "Train" / "a" / "notes.txt").touch()
    train_split, test_split = data.load(own, tmp_path / "root", 2)
    assert (len(train_split.labels), len(test_split.labels)) == (4, 4)
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    expected = {"1 .txt", "1 beside the folders", "1 hidden: ._1.npy", "1 hidden: .old",
                "1 hidden: .x.npy", "1 in Train/a/deep/", "2 in Val/a/"}
    assert len(said) == 1 and set(said[0].split("left out: ")[1].split(", ")) == expected

    (own / "Train" / "c").symlink_to(own / "Val" / "a")  # links are followed
    assert len(data.load(own, tmp_path / "root", 2)[0].labels) == 6


def test_own_names_decide_order_and_split(tmp_path, capsys):
    names = ["1/01.npy", "1/1.npy", "1/1.npz", "01/2.npy", "01/10.npy", "2/3.npy", "2/4.npy"]
    for i, order in enumerate([names, names[::-1]]):
        folder_of(tmp_path / str(i), *order)
        splits = data.load(tmp_path / str(i), tmp_path / "root", 2)
        assert splits[0].classes == ["01", "1", "2"]
        assert splits[0].names == ["01/2.npy", "1/01.npy", "1/1.npy", "2/3.npy"]
        assert splits[1].names == ["01/10.npy", "1/1.npz", "2/4.npy"]
        assert "1 recordings occur under two endings" in capsys.readouterr().out
    hashes = data.fingerprint(splits[0].names, splits[1].names)
    assert hashes["train"] != hashes["test"]


def test_own_counts_past_255_and_thin_or_small_recordings(tmp_path, capsys):
    own, dense = tmp_path / "own", recording(2000)
    folder_of(own, *many("a", "b", n=2))
    dense["x"], dense["y"], dense["p"] = 3, 2, True
    write(own / "a" / "1.npy", dense)
    write(own / "b" / "1.npy", recording(3))
    train_split, test_split = data.load(own, tmp_path / "root", 4, 32, sensor=(12, 9))
    assert train_split.frames.dtype == np.int16 and test_split.frames[0].max() == 500
    assert [int(f.sum()) for f in (*train_split.frames, *test_split.frames)] == [60, 60, 2000, 3]
    x, _ = next(data.batches(test_split, 2))
    assert x.dtype == torch.float32 and x[:, 0].sum() == 2000
    out = capsys.readouterr().out
    assert "1 recordings have fewer events than the 4 frames" in out
    assert "larger than the sensor, 12 x 9: 20 of 32 columns stay empty" in out
    data.load(own, tmp_path / "root", 4, 32, sensor=(12, 9))
    assert not capsys.readouterr().out  # said once, when frames are made


@pytest.mark.parametrize("low, high", [(0, 1), (-1, 1), (1, 2), (0, 255)])
def test_own_polarity_is_off_for_the_smaller_value(tmp_path, capsys, low, high):
    plain, own = recording(60), tmp_path / "own"
    coded = plain.astype([("x", "<i2"), ("y", "<i2"), ("timestamp", "<i8"), ("polarity", "<i2")])
    coded["polarity"] = np.where(plain["p"], high, low)
    for name in many("a", "b", n=2):
        write(own / name, coded)
    frames = data.load(own, tmp_path / "root", 2)[0].frames
    assert np.array_equal(frames[0], slow_frames(plain, 2, (12, 9), 12))
    out = capsys.readouterr().out
    assert (f"polarity: {low} is read as off, {high} as on" in out) == ((low, high) != (0, 1))
    coded["polarity"] = low
    write(own / "a" / "1.npy", coded)
    data.load(own, tmp_path / "root", 2)
    assert ("1 recordings have one polarity only" in capsys.readouterr().out) == (low > 0)


def test_own_plain_arrays_need_their_columns(tmp_path):
    events = recording(60)
    for name in many("a", "b", n=2):
        write(tmp_path / "own" / name, np.stack([events[f] for f in "typx"], 1))
    frames = data.load(tmp_path / "own", tmp_path / "root", 2, columns="typx")[0].frames
    assert np.array_equal(frames[0], slow_frames(events, 2, (12, 9), 12))


def test_own_aedat4_names_its_sensor_and_is_checked(tmp_path, capsys):
    dv = pytest.importorskip("dv_processing")
    for i, size in enumerate([(64, 48), (64, 48), (32, 32), (64, 48)]):
        write(tmp_path / "own" / "ab"[i % 2] / f"{i}.aedat4", recording(60), size)
    assert data.load(tmp_path / "own", tmp_path / "root", 2)[0].sensor == [64, 48]
    out = capsys.readouterr().out
    assert "named by the recordings" in out
    assert "cameras of different sizes: 3 recordings of 64 x 48, 1 recordings of 32 x 32" in out
    config = dv.io.MonoCameraWriter.FrameOnlyConfig("DVS", (64, 48))
    writer = dv.io.MonoCameraWriter(str(tmp_path / "own" / "a" / "8.aedat4"), config)
    writer.writeFrame(dv.Frame(1000, np.zeros((48, 64), np.uint8)))
    del writer
    with pytest.raises(data.UserError, match="no events in the AEDAT"):
        data.load(tmp_path / "own", tmp_path / "root", 2)


def test_own_new_recordings_are_all_tested(whole, shapes, tmp_path):
    """A folder given to a classifier is a test set, with Test and Train or without."""
    shutil.copytree(shapes / "Test", tmp_path / "only" / "Test")
    own = run_eval(whole / "finetuned.pt")[0][-1]
    for folder in shapes / "Test", tmp_path / "only":
        lines, _ = run_eval(whole / "finetuned.pt", "--dataset", folder, "--sensor", 32, 32)
        assert lines[-1] == own and "12 recordings" in own


def test_own_results_stand_if_others_or_the_file_fail(whole, tmp_path, capsys):
    good = whole / "finetuned.pt"
    with pytest.raises(data.UserError, match="none.pt"):
        run_eval(good, tmp_path / "none.pt", good, "--json", tmp_path / "f.json")
    assert len(json.loads((tmp_path / "f.json").read_text())["runs"]) == 2
    with pytest.raises(OSError):  # after the text
        evaluation.main(["--ckpt", str(good), "--json", f"{good}/f.json", "--device", "cpu"])
    assert "\ntest accuracy " in capsys.readouterr().out


def test_own_folder_at_another_place_has_the_same_test_until_it_grows(tmp_path):
    for c, i in itertools.product("ab", range(10)):
        write(tmp_path / "own" / c / f"{i}.npy", recording(60, seed=10 * ord(c) + i))
    ckpt = tmp_path / "run" / "finetuned.pt"
    last = run_tiny(tmp_path / "own", ckpt.parent, "--pretrain-epochs", "0")[-1]
    assert not (ckpt.parent / "pretrained.pt").exists()
    moved = shutil.copytree(tmp_path / "own", tmp_path / "moved")
    lines, (warning,) = run_eval(ckpt, "--dataset", moved)
    assert lines[-1] == last and "2 recordings" in last
    assert "has the names of the training folder" in warning
    for folder in tmp_path / "own", moved:
        shutil.copy(folder / "a" / "9.npy", folder / "a" / "10.npy")
    assert "21 recordings" in run_eval(ckpt, "--dataset", moved)[0][-1]
    (warning,) = run_eval(ckpt)[1]
    assert "holds other recordings than when" in warning and "may be tested on now" in warning


def test_own_times_and_arrays_that_cannot_be_used_are_named(tmp_path):
    events = recording(60)
    events["t"] = np.arange(60) // 30  # 0 and 1
    assert data.to_frames(events, 4, (12, 9), 12).sum() == 60
    with pytest.raises(ValueError, match="lasts 1 units of time, too few for 4 frames"):
        data.to_frames(events, 4, (12, 9), 12, "time")
    arrays = {field: events[field] for field in "xyp"}
    np.savez(tmp_path / "a.npz", timestamps=events["t"], meta=np.array({}), **arrays)
    assert (data.read_file(str(tmp_path / "a.npz"))["t"] == events["t"]).all()
    np.savez(tmp_path / "b.npz", events=events)
    with pytest.raises(ValueError, match="expected arrays x, y, t and p, found events"):
        data.read_file(str(tmp_path / "b.npz"))


def test_own_links_in_a_loop_and_a_reader_that_dies_end(tmp_path, monkeypatch):
    make_folder(tmp_path)
    folders = [path for path in (tmp_path / "My.Data").rglob("*") if path.is_dir()]
    for path in folders:
        (path / "up").symlink_to(path.parent)
    for again in range(2):
        assert len(load_folder(tmp_path)[0].labels) == 6 == len(folders)
        for path in tmp_path.glob("root/frames/*.npy"):
            path.unlink()  # it is made again
    monkeypatch.setitem(data.READERS, ".npy", lambda path: os._exit(9))
    with pytest.raises(data.UserError, match="lack of memory"):
        load_folder(tmp_path, 3)


def beat(events, key):
    for _ in range(2000):  # at least 20 seconds
        Path(key).with_suffix(".beat").touch()
        time.sleep(0.01)


def read_slowly(path):
    list(data.map_recordings(beat, [("train", "a", str(path))], data.read_file))


def test_own_workers_end_with_a_process_that_is_killed(tmp_path):
    write(tmp_path / "1.npy", recording(60))
    other = multiprocessing.Process(target=read_slowly, args=(tmp_path / "1.npy",))
    other.start()
    while not (tmp_path / "1.beat").exists():
        time.sleep(0.01)
    other.kill()
    beats = []
    while len(beats) < 2 or beats[-1] != beats[-2]:
        assert len(beats) < 10
        beats.append((tmp_path / "1.beat").stat().st_mtime_ns)
        time.sleep(1)


def test_own_predictions_and_features(whole, shapes, tmp_path):
    ckpt, test_folder = whole / "finetuned.pt", shapes / "Test"
    lines, _ = run_eval(ckpt, "--features", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as saved:
        logits, labels, names = (saved[f"test_{k}"] for k in ("logits", "labels", "names"))
        assert len(saved["train_features"]) == len(saved["train_names"]) == 60
        assert saved["train_logits"].shape == (60, 3) and "".join(saved["logit_classes"]) == "abc"
    accuracy = 100 * (logits.argmax(1) == labels).mean()
    assert lines[-1] == f"test accuracy {accuracy:.2f} % (last epoch, 12 recordings)"
    rows, _ = run_eval(ckpt, "--json", tmp_path / "p.json", "--predict", *test_folder.iterdir())
    assert rows[0] == "path,predicted,probability" and len(rows) == 13
    rows = [row.split(",") for row in rows[1:]]
    predicted = {"/".join(Path(path).parts[-2:]): rest for path, *rest in rows}
    probability = torch.from_numpy(logits).softmax(1).amax(1)
    for name, row, p in zip(names, logits, probability):
        assert predicted[name][0] == "abc"[row.argmax()]
        assert float(predicted[name][1]) == pytest.approx(p.item(), abs=1e-3)
    assert len(json.loads((tmp_path / "p.json").read_text())) == 12

    (tmp_path / "broken.npy").write_bytes(b"half")
    rows, warnings = run_eval(ckpt, "--skip-broken", "--predict", tmp_path / "broken.npy",
                              test_folder / "a" / "20.npy")
    assert len(rows) == 2 and "left out" in warnings[0] and "broken.npy" in warnings[0]

    # after training on N-Caltech101, whose recordings are moved to the corner
    checkpoint, events = torch.load(ckpt), np.load(test_folder / "a" / "20.npy")
    checkpoint["args"]["dataset"] = "ncaltech101"
    torch.save(checkpoint, tmp_path / "caltech.pt")
    for side in "xy":
        events[side] -= events[side].min()
    write(tmp_path / "moved.npy", events)
    moved, _ = run_eval(ckpt, "--predict", tmp_path / "moved.npy")
    row, _ = run_eval(tmp_path / "caltech.pt", "--predict", test_folder / "a" / "20.npy")
    assert row[1].split(",")[1:] == moved[1].split(",")[1:] and events["x"].min() == 0


def test_own_flat_folder_pretrains_and_another_folder_is_fine_tuned(shapes, tmp_path):
    for split in "Train", "Test":
        shutil.copytree(shapes / split / "a", tmp_path / "one class" / split / "a")
    shutil.copytree(shapes / "Train" / "a", tmp_path / "flat")
    run_tiny(tmp_path / "one class", tmp_path / "pre", "--epochs", "0", "--image-size", "32")
    for i, folder in enumerate(["flat", "one class"]):  # all of a flat folder, Train of a split one
        run_tiny(shapes, tmp_path / f"both{i}", "--pretrain-on", tmp_path / folder,
                 "--image-size", "32")
        assert same(tmp_path / "pre", tmp_path / f"both{i}", "pretrained.pt")
    for name, flags in [("tenth", []), ("itself", ["--pretrain-on", tmp_path / "flat"])]:
        run_tiny(tmp_path / "flat", tmp_path / name, "--epochs", "0", "--image-size", "32", *flags)
    assert not same(tmp_path / "pre", tmp_path / "tenth", "pretrained.pt")
    assert same(tmp_path / "tenth", tmp_path / "itself", "pretrained.pt")  # without its test
    lines = run_tiny(shapes, tmp_path / "other", "--init", tmp_path / "pre" / "pretrained.pt")
    assert any("pre-trained at 32 pixels, this run has 16" in line for line in lines)
    args = torch.load(tmp_path / "other" / "finetuned.pt")["args"]
    assert (args["pretrain_size"], args["image_size"]) == (32, 16)


def test_own_scripts_of_the_docs_convert(tmp_path, monkeypatch):
    """Run each script of docs/recordings.md on a recording written in its format."""
    wizard = pytest.importorskip("expelliarmus").Wizard
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    events, folder = recording(60), tmp_path / "FOLDER"
    folder.mkdir()
    coded = np.rec.fromarrays([events[f] for f in "txyp"], formats="i8,i2,i2,u1", names="t,x,y,p")
    wizard(encoding="dat").save(fpath=folder / "a.dat", arr=coded)
    with h5py.File(folder / "b.h5", "w") as f:
        for name in "xytp":
            f[f"events/{name}"] = events[name]
    address = (events["x"].astype(">u4") << 8) | (events["y"].astype(">u4") << 1) | events["p"]
    pairs = np.stack([address, events["t"].astype(">u4")], 1).astype(">u4")
    (folder / "c.aedat").write_bytes(b"#!AER-DAT2.0\r\n# DVS128\r\n" + pairs.tobytes())
    text = (HERE / "docs" / "recordings.md").read_text()
    for script in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(script, {})
    for name in "abc":
        read = data.read_file(str(folder / f"{name}.npy"))
        for field in "xytp":
            assert read[field].astype(int).tolist() == events[field].astype(int).tolist(), name
