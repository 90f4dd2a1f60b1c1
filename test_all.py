"""The whole test-suite: every fast path beside a slow, obvious one, then the command line at tiny
sizes. Tests of what a machine lacks (SpikingJelly, a C++ compiler, a GPU) are skipped.

    python -m pytest test_all.py   # -k lif | loss | moco | models | data | own | train | eval
"""
import contextlib
import copy
import csv
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.response
from pathlib import Path
from unittest import mock

# Threads that wait for each other make these small tests 10 times slower beside a busy process.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import numpy as np
import pytest
import tonic
import torch
import torch.nn.functional as F
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


def refused(says, function, *args, error=data.UserError, **settings):
    """Check that a call raises an error whose text matches says."""
    with pytest.raises(error, match=says):
        function(*args, **settings)


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


def test_lif_of_the_docs_learns_tau():
    script, names = scripts_of("docs/experiments.md")[0], {}
    exec(script, names)
    plif, x, grad_s = names["PLIF"](), 2 * torch.randn(4, 30), torch.randn(4, 30)
    results = (spikes_and_gradient(lif, x, grad_s) for lif in (plif, slow_lif))
    torch.testing.assert_close(*results)
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


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_lif_compiled_tells_constants_of_layers_apart(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE", True)
    x = 2 * torch.randn(4, 900)
    for v_reset in -0.1, 0.1, -0.2:
        assert torch.equal(neuron.LIF(v_reset=v_reset)(x), slow_lif(x, v_reset=v_reset))


def test_lif_without_a_compiler_warns_once_and_continues(monkeypatch):
    monkeypatch.setattr(neuron, "COMPILE", True)
    monkeypatch.setattr(neuron, "compiled", mock.MagicMock(side_effect=RuntimeError("no compiler")))
    x = torch.randn(128, 9)  # so many steps would be compiled for minutes
    for steps in 128, 33:
        assert torch.equal(neuron.LIF()(x[:steps]), slow_lif(x[:steps]))
    neuron.compiled.assert_not_called()
    x = torch.randn(2, 32, 9)
    with pytest.warns(UserWarning, match="run uncompiled.*no compiler") as warned:
        assert all(torch.equal(neuron.LIF()(xi), slow_lif(xi)) for xi in x)
    assert len(warned) == 1 and not neuron.COMPILE
    monkeypatch.setattr(neuron, "COMPILE", True)
    neuron.compiled.side_effect = torch.OutOfMemoryError  # not to be taken for a missing compiler
    refused(None, neuron.LIF(), x[0], error=torch.OutOfMemoryError)
    assert neuron.COMPILE


def spikingjelly(module):
    """Import a module of SpikingJelly, with stand-ins for torchvision and its own data sets."""
    stand_ins = {f"torchvision{end}": mock.MagicMock() for end in ("", ".models", ".models.utils")}
    stand_ins["spikingjelly.datasets"] = datasets = types.ModuleType("spikingjelly.datasets")
    datasets.__path__ = [f"{pytest.importorskip('spikingjelly').__path__[0]}/datasets"]
    sys.modules.update({name: m for name, m in stand_ins.items() if name not in sys.modules})
    return importlib.import_module(f"spikingjelly.{module}")


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE])
@pytest.mark.parametrize("v_threshold", [1.0, 0.5])
def test_lif_equals_spikingjelly(dtype, v_threshold):
    theirs = spikingjelly("activation_based.neuron").LIFNode(
        tau=2.0, v_threshold=v_threshold, detach_reset=True, step_mode="m",
        surrogate_function=spikingjelly("activation_based.surrogate").ATan())
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
    assert value.item() == pytest.approx(2.5 * math.log(7)) == loss.chance_level(6, 0.5, 2.0)


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
    net = moco.MoCo(Linear(), 2, dim=4, queue_size=size, momentum=0.5)
    assert net.queue.shape == (size, 2, 4) and "encoder_q.0.bn.running_mean" in net.state_dict()
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


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_moco_momentum_is_exact_and_for_parameters_only(momentum):
    net = moco.MoCo(Linear(), 2, dim=4, queue_size=4, momentum=momentum)
    net.encoder_q.load_state_dict(moco.MoCo(Linear(), 2, dim=4).encoder_q.state_dict())
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
    net = moco.MoCo(Linear(), 2, dim=4, queue_size=6, momentum=0.0)
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
    ("spikformer-1-16", 16, DOUBLE), ("sew-resnet-18-8", 64, DOUBLE), ("linear", 4, BF16)])
def test_moco_compiled_gives_the_same_numbers(arch, size, dtype, device, monkeypatch):
    """Compile a step to one graph, from views to loss and queue, as train.py does on a GPU.

    Spikes are compared in float64, where the order of a sum tips no membrane over its threshold.
    In bf16, the compiled backward pass reads the queue again: it must not have changed in place.
    """
    encoder = Linear(size, 32) if arch == "linear" else models.build(arch, size)
    if arch == "sew-resnet-18-8":
        encoder.blocks = models.SEWBlock(8, 64, 2)  # one of eight, because all compile alike
    wide = FLOAT if dtype == BF16 else dtype
    plain = moco.MoCo(encoder, 2, dim=16, queue_size=16, momentum=0.9).to(device)
    plain.encoder_q.to(wide), plain.encoder_k.to(wide)
    compiled = copy.deepcopy(plain)
    # On a CPU without the compiler's last stage, which would take a minute to write kernels.
    backend = "aot_eager_decomp_partition" if device == "cpu" else "inductor"
    forward = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=False)
    for B in (4, 4, 3) if arch == "linear" else (4, 4):
        view_q, results = torch.rand(2, B, 2, size, size).to(device, wide), []
        for net, call in (plain, plain), (compiled, forward):
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
        refused("tau >= 1 and v_threshold > v_reset, got", neuron.LIF, error=ValueError, **wrong)
    for wrong in dict(queue_size=0), dict(momentum=1.5), dict(temperature=0.0):
        refused("queue_size >= 1, m.*, got", moco.MoCo, Linear(), 2, error=ValueError, **wrong)


# ----------------------------------------------------------------------------------------- models

def spikingjelly_classifier(arch):
    """Build SpikingJelly's own network of that name, for frames of 128 pixels and 10 classes."""
    if arch == "spikformer-2-256":
        return spikingjelly("activation_based.model.spikformer").Spikformer(
            img_size_h=128, img_size_w=128, patch_size=16, in_channels=2, num_classes=10,
            embed_dims=256, num_heads=16, mlp_ratio=4, depths=2, T=2)
    net = spikingjelly("activation_based.model.sew_resnet").sew_resnet18(
        cnf="ADD", spiking_neuron=spikingjelly("activation_based.neuron").LIFNode, num_classes=10,
        surrogate_function=spikingjelly("activation_based.surrogate").ATan(), detach_reset=True)
    net.conv1 = spikingjelly("activation_based.layer").Conv2d(2, 64, 7, 2, 3, bias=False)
    spikingjelly("activation_based.functional").set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("arch", ["spikformer-2-256", "sew-resnet-18"])
@torch.no_grad()
def test_models_exchange_weights_with_spikingjelly(arch):
    """Compare logits in float64, where the order of a sum moves no membrane over its threshold."""
    theirs = spikingjelly_classifier(arch).double()
    ours = models.Classifier(models.build(arch, 128), 10, 2).double()
    x = torch.poisson(torch.full((2, 2, 2, 128, 128), 0.3, dtype=DOUBLE))
    # No tensor stays as it is initialised, so that any mix-up shows; the statistics are those of x.
    for m in theirs.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
            m.weight.uniform_(1, 3), m.bias.uniform_(-0.3, 0.3)
    theirs(x)
    a, b = ours.state_dict(), [*theirs.state_dict().values()]
    b += b[-2:]  # their head serves all time steps
    assert [v.squeeze().shape for v in a.values()] == [v.squeeze().shape for v in b]
    ours.load_state_dict({name: v.reshape(a[name].shape) for name, v in zip(a, b)})
    for training in False, True:
        spikingjelly("activation_based.functional").reset_net(theirs)
        logits, their_logits = ours.train(training)(x), theirs.train(training)(x)
        assert their_logits.std(1).mean() > 1e-3  # the recordings are told apart at all
        torch.testing.assert_close(logits, their_logits)


@pytest.mark.parametrize("arch, size, dim", [
    ("sew-resnet-18-8", 32, 64), ("sew-resnet-18-8", 64, 64), ("spikformer-1-32", 34, 32),
    ("spikformer-2-48", 64, 48), ("spikformer-1-16", 17, 16)])
def test_models_have_a_gradient_everywhere_and_no_state(arch, size, dim):
    net, x = models.build(arch, size), torch.poisson(torch.full((3, 4, 2, size, size), 1.0))
    block, spikes = next(m for m in net.modules() if isinstance(m, models.ConvLIF)), []
    for dtype in FLOAT, BF16:
        net.zero_grad()
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            features = net(x)
            spikes.append(block(x))
        assert net.dim == dim and features.shape == (3, 4, dim)
        (features * torch.randn(3, 4, dim)).sum().backward()
        assert all(p.grad.any() and p.grad.isfinite().all() for p in net.parameters())
    assert 0 < (spikes[0] != spikes[1]).float().mean() < 0.02  # later layers amplify this
    # A batch leaves nothing behind for the next.
    first = net.eval()(x)
    net(x[:2, :3])
    assert torch.equal(net(x), first)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_models_prepare_cpu_keeps_memory_and_gives_threads_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(models, "THREADS", 3)
    for image_size, threads in (16, 1), (64, 3), (63, 1), (128, 3):
        models.prepare_cpu(image_size)
        assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    models.prepare_cpu(16)
    assert torch.get_num_threads() == 3  # OMP_NUM_THREADS is the user's choice
    torch.set_num_threads(1)
    script = """import models, resource, torch
models.prepare_cpu(16)
for _ in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    assert min(map(int, start("-c", script).communicate()[0].split())) < 1000  # pages, of 9,766


def test_models_attention_is_the_published_product():
    """Compute (v k^T) q / 8 step by step and head by head."""
    net = models.SpikingSelfAttention(32)
    net.qkv, net.proj, net.lif = (torch.nn.Identity() for _ in range(3))
    spikes = (torch.rand(2, 1, 96, 2, 3) < 0.4).float()  # [T, B, 3C, H, W]
    q, k, v = spikes.flatten(3).unflatten(2, (3, 2, 16)).unbind(2)  # each [T, B, heads, 16, L]
    expected = torch.empty_like(q)
    for i in itertools.product(range(2), [0], range(2)):
        expected[i] = (v[i] @ k[i].T) @ q[i] / 8
    assert torch.equal(net(spikes), expected.reshape(2, 1, 32, 2, 3))


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


def write(path, events, sensor=(12, 9)):
    """Write a recording in the format of its ending, of which .aedat4 names the sensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](path, events, *[sensor] * (path.suffix == ".aedat4"))


def write_bin(path, events):
    """Write the ATIS format, 5 bytes an event: x, y, 1 bit polarity, 23 bits time."""
    t, p = events["t"].astype(int), events["p"].astype(int)
    raw = [events["x"], events["y"], p << 7 | t >> 16, t >> 8 & 255, t & 255]
    np.stack(raw, 1).astype(np.uint8).tofile(path)


def write_npz(path, events):
    x, y, t, p = (events[field] for field in "xytp")
    np.savez(path, meta=np.array({}), x=x, y=y, timestamps=t, polarity=p)  # and one more array


def write_aedat4(path, events, sensor):
    dv = pytest.importorskip("dv_processing")
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


@pytest.mark.parametrize("split_by, frames_by", [("number", "count"), ("time", "time")])
def test_data_frames_equal_spikingjelly(split_by, frames_by):
    theirs = spikingjelly("datasets.utils")
    events = recording(1003, 16, 16)
    events["t"] = (recording(1003)["t"] / 100) ** 2  # slower and slower
    expected = theirs.integrate_events_by_fixed_frames_number(events, split_by, 4, 16, 16)
    assert expected.sum() == 1003 and expected.max() < 256
    epoch = events.astype([("x", int), ("y", int), ("t", np.uint64), ("p", bool)])
    epoch["t"] += 2**60 + 1
    for given in events, epoch:
        assert np.array_equal(data.to_frames(given, 4, (16, 16), 16, frames_by), expected)


def test_data_split_is_stable_and_nine_to_one_in_natural_order(tmp_path, monkeypatch):
    keys = [(cls, f"/d/{cls}/r{i}.npy") for cls, n in dict(a=100, b=57, c=2, d=1).items()
            for i in range(n)]
    split = data.split_by_class([keys[i] for i in torch.randperm(len(keys))])
    last = dict(a=range(90, 100), b=range(52, 57), c=[1], d=[])
    assert sorted(split) == sorted(
        ("test" if int(key[6:-4]) in last[cls] else "train", cls, key) for cls, key in keys)
    names = ["1/01.npy", "1/1.npy", "1/1.npz", "01/2.npy", "01/10.npy", "2/3.npy", "2/4.npy"]
    folder_of(tmp_path / "My.Data", *names[::-1])
    splits = load_folder(tmp_path)
    assert splits[0].classes == ["01", "1", "2"]
    assert splits[0].names.tolist() == ["01/2.npy", "1/01.npy", "1/1.npy", "2/3.npy"]
    assert splits[1].names.tolist() == ["01/10.npy", "1/1.npz", "2/4.npy"]
    monkeypatch.chdir(tmp_path)
    for name in "./toy", "toy/", str(tmp_path / "toy"):  # a folder, whether it exists or not
        assert data.resolve(name) == str(tmp_path / "toy") and data.resolve("toy") == "toy"


def test_data_toy_comes_from_its_seed_and_is_not_told_by_counts():
    recordings = [data.simulate_toy(f"toy:{seed}:{i}") for seed in (0, 1) for i in range(400)]
    assert np.array_equal(recordings[7], data.simulate_toy("toy:0:7"))
    assert len({data.recording_id(events) for events in recordings}) == 800
    counts = [data.to_frames(e, 4, (32, 32), 16).sum((2, 3)).ravel() for e in recordings]
    x, y = torch.tensor(np.array(counts)).float(), torch.arange(800) % 10
    for learns in evaluation.knn_accuracy, evaluation.linear_probe_accuracy:
        assert learns(x[:600], y[:600], x[600:], y[600:]) < 0.7  # the network: 0.9, of few labels


def split_of(frames, labels, classes):
    return data.Split(frames, labels, classes, None, np.array([""] * len(labels)), labels)


@pytest.mark.parametrize("n, world_size", [(24, 2), (25, 2), (26, 3)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_data_batches_hold_every_recording_once(n, world_size, shuffle):
    frames = np.arange(n, dtype=np.uint8)[:, None, None, None, None]  # its number, in all pixels
    split = split_of(frames * np.ones((1, 3, 2, 4, 4), np.uint8), np.arange(n), [])

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


def test_data_split_events_deals_each_event_to_one_half():
    x = torch.poisson(torch.full((4, 6, 2, 32, 32), 3.0))
    a, b = data.split_events(x)
    assert torch.equal(a + b, x) and torch.equal(a, a.round()) and min(a.min(), b.min()) == 0
    assert a.sum() / x.sum() == pytest.approx(0.5, abs=0.01)
    assert (a - b).square().sum() / x.sum() == pytest.approx(1, abs=0.03)  # one by one


def test_data_crops_in_time_equal_a_loop_over_overlaps(monkeypatch):
    x, T, draws = torch.randint(1000, (5, 10_000, 2, 1, 1)).float(), 5, torch.rand(2, 10_000)
    assert data.crop_time(x, 1.0) is x
    monkeypatch.setattr(torch, "rand", lambda *_, left=[*draws], **__: left.pop(0))
    with torch.autocast("cpu", torch.bfloat16):
        views = data.crop_time(x, 0.2)
    length = 1 - 0.8 * draws[0]
    begin = (1 - length) * draws[1]
    assert [length.min(), length.max()] == pytest.approx([0.2, 1], abs=0.01)
    for v, t in itertools.product(range(T), range(T)):
        start, end = begin + length * v / T, begin + length * (v + 1) / T  # of the recording
        share = T * (end.clamp(max=(t + 1) / T) - start.clamp(min=t / T)).clamp(min=0)  # of frame t
        views[v] -= share[:, None, None, None] * x[t]
    assert views.abs().max() < 0.01


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


def make_folder(tmp_path, n=3, suffix=".npy", parts=("Train", "Test"), sensor=(12, 9)):
    """Write n recordings of each of the classes a and b into every part -> {path: events}."""
    names = itertools.product(parts, "ab", (f"r{i}{suffix}" for i in range(n)))
    return folder_of(tmp_path / "My.Data", *(Path(*name) for name in names), sensor=sensor)


def folder_of(root, *names, sensor=(12, 9)):
    """Write recordings to root/<name>, each with events of its own -> {path: events}."""
    made = {root / name: recording(60, *sensor, seed) for seed, name in enumerate(names)}
    for path, events in made.items():
        write(path, events, sensor)
    return made


def load_folder(tmp_path, n_frames=2, size=None, sensor=(12, 9), folder="My.Data", **settings):
    root = tmp_path / "root"
    return data.load(tmp_path / folder, root, n_frames, size, sensor=sensor, **settings)


@pytest.mark.parametrize("suffix, sensor, size, parts", [
    (".bin", (40, 30), 40, ("train", "Test")), (".npy", (200, 150), 128, ("",)),
    (".npz", (4, 5), 8, ("train", "Test")), (".aedat4", (40, 30), 40, ("",))])
def test_data_folder_of_recordings(tmp_path, suffix, sensor, size, parts):
    made = make_folder(tmp_path, 12, suffix, parts, sensor)
    in_test = [p for p in made if "Test" in p.parts or parts == ("",) and p.stem == "r11"]
    in_train = [p for p in made if p not in in_test]  # r2 before r10
    for told in [None] if suffix == ".aedat4" else [sensor, (256, 250)]:  # .aedat4 names its own
        splits = load_folder(tmp_path, size=size if told else None, sensor=told)
        for split, paths in zip(splits, (in_train, in_test)):
            expected = [slow_frames(made[path], 2, told or sensor, size) for path in paths]
            assert isinstance(split.frames, np.memmap) and np.array_equal(split.frames, expected)
            assert split.labels.tolist() == ["ab".index(path.parent.name) for path in paths]
            assert split.classes == ["a", "b"] and split.sensor == list(told or sensor)
            assert split.ids.tolist() == [data.recording_id(made[path]) for path in paths]
    with mock.patch.object(data, "make_frames") as make_frames:
        load_folder(tmp_path, size=size, sensor=list(sensor))  # as eval.py does: the same frames
        load_folder(tmp_path, sensor=sensor)
    make_frames.assert_not_called()
    write(in_train[0], recording(77, *sensor), sensor)
    counts = load_folder(tmp_path, sensor=sensor)[0].frames.sum((1, 2, 3, 4))
    assert counts[:2].tolist() == [77, 60]


def test_data_other_settings_or_functions_make_frames_anew(tmp_path, monkeypatch):
    def read_inverted(path, **options):
        events = np.load(path)
        events["p"] ^= True
        return events
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


def test_data_frames_are_complete_or_absent(tmp_path):
    made = make_folder(tmp_path)
    with mock.patch.object(data, "write_json", side_effect=KeyError):
        refused(None, load_folder, tmp_path, error=KeyError)  # once the frames have a name
    (frames,) = tmp_path.glob("root/frames/My.Data-*")
    splits, good, about = load_folder(tmp_path), frames.read_bytes(), frames.with_suffix(".json")
    expected = [slow_frames(events, 2, (12, 9), 12) for events in made.values()]
    for path, content in [
            (about, b""), (about, b'{"ids": ['), (about, None), (frames, None), (frames, b""),
            (frames, good[:-500]), (frames, good[:60]), (frames, good)]:
        assert np.array_equal(np.concatenate([split.frames for split in splits]), expected)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        splits = load_folder(tmp_path)
        assert frames.read_bytes() == good and len(os.listdir(frames.parent)) == 2


@pytest.mark.parametrize("error", [PermissionError, MemoryError, ValueError])
def test_data_what_cannot_be_opened_now_is_tried_again(tmp_path, monkeypatch, error):
    errors = [error("not now")]

    def read(path):
        if errors and "r1" in path:
            raise errors[0]
        return np.load(path)
    make_folder(tmp_path)
    monkeypatch.setitem(data.READERS, ".npy", read)
    says = f"4 of 12 .*broken(?s:.*)r1.npy: .*{error.__name__}: not"
    for _ in range(2):
        refused(says, load_folder, tmp_path)
    errors.clear()
    if error is ValueError:  # what it holds is wrong
        refused(says, load_folder, tmp_path)
    else:
        assert len(load_folder(tmp_path)[0].labels) == 6


def with_field(name, values):
    fields = {field: recording(60)[field] for field in "xytp"} | {name: values}
    return np.rec.fromarrays(list(fields.values()), names=list(fields))


BROKEN = {  # file -> (content, what is said about it)
    "cut.bin": (bytes(5 * 20 + 3), "truncated"), "cut.npy": (b"\x93NUMPY", "ValueError"),
    "text.npy": (b"x y t p", "pickle"), "old.aedat4": (b"#!AER-DAT2.0\r\n", "AEDAT4"),
    "pickled.npy": (np.array([{}], object), "pickle"), "none.npy": (recording(0), "no event"),
    "plain.npy": (np.zeros((9, 4)), "--columns xytp"),
    "arrays.npz": (dict(events=recording(60)), "arrays x, y, t and p, found events"),
    "fields.npy": (recording(60)[["x", "y", "t"]], "fields x, y, t, p"),
    "wide.npy": (recording(60, 13), "x 0 to 12"), "high.npy": (recording(60, 12, 10), "y 0 to 9"),
    "negative.npy": (with_field("y", np.arange(60) - 52), "outside the sensor of 12 x 9 pixels"),
    "three.npy": (with_field("p", np.arange(60) % 3), "polarities 0 and 1 and 2"),
    "ones.npy": (with_field("p", np.arange(60) % 2 + 1), "polarities 1 and 2: store p == 2"),
    "single.npy": (with_field("p", np.full(60, 2)), "polarities 2"),
    "unsure.npy": (with_field("p", np.r_[:2, [np.nan] * 58]), "polarities 0.0 and 1.0 and nan"),
    "fraction.npy": (with_field("x", np.arange(60) % 9 + 0.5), "must be whole"),
    "lost.npy": (with_field("y", np.r_[:5, [np.nan] * 55]), "must be whole"),
    "huge.npy": (with_field("x", 2**32 + np.arange(60) % 9), "x 4294967296 to 4294967304"),
    "backwards.npy": (with_field("t", np.arange(60)[::-1]), "backwards, by 59 of 59"),
    "nan.npy": (with_field("t", np.r_[:59, np.nan]), "backwards, by nan of nan")}


def test_data_broken_recordings_are_listed_and_skipped(tmp_path, capsys):
    make_folder(tmp_path)
    whole, n, broken, says = load_folder(tmp_path), len(BROKEN), {}, {}
    for name, (content, why) in sorted(BROKEN.items()):
        path = tmp_path / "My.Data/Train/a" / name
        if isinstance(content, dict):
            np.savez(path, **content)
        else:
            path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        says[str(path)] = why
    settings = dict(n_frames=2, sensor_size=(12, 9), size=12)
    assert list(data.map_recordings(list(says), data.read_file, settings, broken)) == []
    assert [why for key, why in says.items() if why not in broken[key]] == []
    expected = [f"  {key}: {why}" for key, why in broken.items()]
    for _ in range(2):  # made, then cached; and in between they are skipped
        with pytest.raises(data.UserError) as e:
            load_folder(tmp_path)
        first, *listed, more = str(e.value).splitlines()
        assert first.startswith(f"{n} of {n + 12} recordings are broken: remove them or pass --")
        assert listed == expected[:20] and more not in expected
        rest = load_folder(tmp_path, skip_broken=True)
        for split, good in zip(rest, whole):
            assert all(map(np.array_equal, split, good))  # frames, labels, ..., ids
        out = capsys.readouterr().out
        assert out.startswith(f"warning: {n} of {n + 12} recordings are broken: left out")
        assert out.splitlines()[1:] == [*listed, more]
    for part, says in ("Test", "no recordings to test on"), ("*", f"{n + 12} of {n + 12}"):
        for path in tmp_path.glob(f"My.Data/{part}/*/r*"):
            path.write_bytes(b"")
        refused(says, load_folder, tmp_path, skip_broken=True)
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
        write(path, plain if name == "dvsgesture" else events, sensor)
        expected[part].append(slow_frames(events, 2, sensor, 16))
    for split, frames in zip(data.load(name, tmp_path, 2, 16), expected.values()):
        assert np.array_equal(split.frames, frames)
        assert split.classes == classes and split.sensor == list(sensor)
        assert np.array_equal(split.labels, np.arange(len(frames)) * len(classes) // len(frames))
    assert f"{10 * len(classes)} of the {total:,} recordings of {name}" in capsys.readouterr().out
    assert all(getattr(tonic_class, key) == address for key, address in addresses.items())


@pytest.mark.parametrize("name, part", [
    ("nmnist", "train_"), ("nmnist", "test_"), ("ncaltech101", "")])
def test_data_failed_download_says_what_to_do(tmp_path, monkeypatch, name, part):
    class_name, folders = data.TONIC_DATASETS[name][0], ("Train/0", "Train/1", "Test/0")
    folder_of(tmp_path / "files", *(f"{f}/{i}.bin" for f in folders for i in range(4)))
    archive = shutil.make_archive(tmp_path / "inner" / "Caltech101", "zip", tmp_path / "files")
    if name == "ncaltech101":  # its archive holds another one
        archive = shutil.make_archive(tmp_path / "outer", "zip", tmp_path / "inner")
    url, md5 = Path(archive).as_uri(), tonic.download_utils.calculate_md5(archive)
    monkeypatch.setattr(urllib.response.addinfourl, "length", None, raising=False)  # as of http
    tonic_class, whole = getattr(tonic.datasets, class_name), Path(archive).read_bytes()
    for each in {"train_", "test_"} if part else {""}:
        monkeypatch.setattr(tonic_class, f"{each}url", url)
        monkeypatch.setattr(tonic_class, f"{each or 'file_'}md5", md5)
    place = tmp_path / class_name / getattr(tonic_class, f"{part}filename")
    monkeypatch.setattr(tonic_class, f"{part}url", bad := (tmp_path / "bad").as_uri())
    for answer in b"", b"?", whole[:-9]:  # each meets what the one before has left
        (tmp_path / "bad").write_bytes(answer)
        says = re.escape(f"fetch {bad} (md5 {md5}), put it at {place}, run")
        refused(rf"^[^\n]*{says}[^\n]*$", data.load, name, tmp_path, 1, 8)
    monkeypatch.setattr(tonic_class, f"{part}url", url)
    train, test = data.load(name, tmp_path, 1, 8)
    assert (len(train.labels), len(test.labels)) == ((8, 4) if part else (10, 2))


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
    T, N, C = 3, 60, 12
    logits, labels = torch.randn(T, N, C), torch.randint(C - 1, (N,))  # the last class has none
    more = torch.tensor([0.5, 1.5, 3.0])[:, None]  # later steps know more
    logits[torch.arange(T)[:, None], torch.arange(N), labels] += more
    results, correct = evaluation.accuracy_metrics(logits, labels), [0] * T
    confusion = np.zeros((C, C), int)
    for i, label in enumerate(labels.tolist()):
        for t in range(T):
            score = logits[: t + 1, i].mean(0).tolist()
            predicted = score.index(max(score))
            correct[t] += predicted == label
        confusion[label, predicted] += 1
    assert correct[0] < correct[2] < N
    assert results["steps"] == [evaluation.wilson_interval(n, N) for n in correct]
    assert [results["accuracy"], *results["interval"]] == results["steps"][2]
    assert results["confusion"] == confusion.tolist()
    by_class = [100 * row[c] / row.sum() if row.any() else None for c, row in enumerate(confusion)]
    assert results["by_class"] == by_class and by_class[-1] is None


@pytest.mark.parametrize("arch, layers", [("spikformer-1-16", 11), ("sew-resnet-18-8", 21)])
@torch.no_grad()
def test_eval_counts_spikes_and_operations_of_every_layer(arch, layers):
    """Four recordings in two batches, beside the inputs and outputs that hooks see at once."""
    T, B, x, seen, spikes = 3, 4, torch.rand(3, 4, 2, 16, 16), {}, []
    net = models.Classifier(models.build(arch, 16), 5, 3)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # with the statistics of x, so that all fires
            m.momentum = 1.0
            torch.nn.init.constant_(m.bias, 0.5)
    net.train()(x)
    net.eval()
    out, stats, rasters = evaluation.spike_stats(net, [(x[:, :3], None), (x[:, 3:], None)])
    again = torch.cat([net(x[:, :3]), net(x[:, 3:])], 1)
    assert torch.equal(out, again) and not any(m._forward_hooks for m in net.modules())
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
            m, x, out = seen.get(name + ".conv") or seen["heads.2" if name == "heads" else name]
            macs = out.numel() // B * (m.weight.numel() // m.weight.shape[0])
            macs = 3 * macs if name == "heads" else macs  # one a step
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
    for k in ("macs", "operations", "energy"):
        assert stats[k] == pytest.approx(sum(layer[k] for layer in stats["layers"]))
    assert stats["energy"] < stats["energy_dense"] == pytest.approx(4.6e-6 * stats["macs"])
    rate = torch.cat([s.flatten() for s in spikes]).mean().item()
    assert stats["rate"] == pytest.approx(100 * rate, rel=1e-5)


def test_eval_energy_does_not_depend_on_batches():
    """A layer that takes real numbers in one batch multiplies in all of them."""
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2)))
    torch.nn.init.eye_(net[0].weight)
    batches = [(torch.full((1, 3, 2), value), None) for value in (0.0, 0.5, 0.0)]
    stats = evaluation.spike_stats(net, batches)[1]
    assert [layer["energy"] for layer in stats["layers"]] == pytest.approx([4 * 4.6e-6] * 2)
    assert stats["operations"] == 0


# ---------------------------------------------------------------- train and eval, at tiny sizes

HERE = Path(train.__file__).parent
TINY = ("--arch spikformer-1-16 --n-frames 2 --image-size 16 --batch-size 6 --queue-size 8 "
        "--pretrain-epochs 2 --epochs 2 --lr 0.002 --device cpu --no-compile "
        "--sensor 32 32").split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def tiny(dataset, run, *flags):
    """Write the flags that begin a run in a folder or, given again, continue it."""
    root = Path(dataset).parent / "root"
    return [str(f) for f in ("--dataset", dataset, "--root", root, "--resume", run, *TINY, *flags)]


def printed(function, *args):
    """Call a function -> the lines it prints, those on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        function(*args)
    return out.getvalue().splitlines(), err.getvalue().splitlines()


def run_tiny(dataset, run, *flags):
    return printed(train.main, tiny(dataset, run, *flags))[0]


def scripts_of(page):
    """List the Python scripts of a page of the docs."""
    return re.findall("```python\n(.*?)```", (HERE / page).read_text(), re.DOTALL)


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


def load_shapes(beside):
    return data.load(beside.with_name("shapes"), beside.with_name("root"), 2, 16, sensor=(32, 32))


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
    cells = {line.split()[0]: line.split()[1:] for line in reversed(lines)}  # notes come later
    for name, row in zip("abc", r["confusion"]):
        assert cells[name][4:] == [str(n or ".") for n in row] and sum(row) == 4
    for layer in r["layers"] + [r | dict(layer="all")]:
        expected = [f"{layer[k]:.2f}" for k in ("rate", "silent") if k in layer]
        expected += [f"{layer[k]:,.0f}" for k in ("macs", "operations")]
        assert cells[layer["layer"]] == expected + [f"{layer['energy']:.4f}"]


def test_eval_on_other_classes_and_in_another_order(whole, shapes, tmp_path):
    own, warnings = run_eval(whole / "finetuned.pt")
    for folder in shapes / "Test", shapes:  # all of it, or its Test
        lines, left_out = run_eval(whole / "finetuned.pt", "--dataset", folder)
        assert lines[-1] == own[-1] and not left_out
    (warning,) = run_eval(whole / "finetuned.pt", "--sensor", "64", "48")[1]
    assert not warnings and "sensor" in warning and "[64, 48]" in warning
    net, checkpoint = models.load_model(whole / "finetuned.pt")
    splits = load_shapes(shapes)
    z, z_test = (models.predict(net.encoder, data.batches(split, 6)).mean(0) for split in splits)
    y, y_test = (torch.tensor(split.labels) for split in splits)
    assert f"kNN {100 * evaluation.knn_accuracy(z, y, z_test, y_test):.2f} %" in own[-2]

    outputs = F.one_hot((y_test + 2) % 3).float()  # of a head for b, c, a
    weight = torch.linalg.lstsq(z_test, outputs)[0].T
    heads = {name: torch.zeros(3) if name.endswith("bias") else weight
             for name in checkpoint["weights"] if name.startswith("heads.")}
    checkpoint |= dict(weights=checkpoint["weights"] | heads, classes=["b", "c", "a"])
    torch.save(checkpoint, tmp_path / "f.pt")
    assert float(run_eval(tmp_path / "f.pt")[0][-1].split()[2]) > 80
    torch.save(checkpoint | dict(classes=["b", "c", "z"]), tmp_path / "f.pt")
    lines, _ = run_eval(tmp_path / "f.pt")
    assert "no accuracy: the checkpoint has other classes, b, c, z" in lines
    assert lines[-1] == own[-2]  # kNN and probe do not mind the names


def test_eval_summary_averages_runs_that_differ_only_in_the_seed(whole, tmp_path):
    paths, units = [whole / "finetuned.pt", whole / "pretrained.pt"], evaluation.UNITS.items()
    cells = [re.split(r"\s{2,}", line) for line in run_eval(*paths, "--json", tmp_path / "f")[0]]
    run = json.loads((tmp_path / "f").read_text())["runs"][0]
    assert cells[0][1:] == [f"{k}, {unit}" if unit else k for k, unit in units]
    assert cells[1] == [str(paths[0]), *(f"{run[k]:.{2 if unit else 3}f}" for k, unit in units)]
    assert cells[2][:2] == [str(paths[1]), "-"] and len(cells) == 3
    source = run["args"] | dict(kind="pretrained", seed=1)  # of --init
    changes = [dict(seed=0), dict(seed=1, out="o", root="r", device="d", resume="a"),
               dict(seed=1, no_compile=0), dict(seed=2),  # of a seed, the first one counts
               *(dict(init=f"{seed}.pt", pretrained=source | dict(seed=seed, out=f"{seed}"))
                 for seed in range(3)), dict(init="same.pt", pretrained=source),
               *(dict(init="0.pt", pretrained=source | other) for other in (
                   dict(kind="finetuned"), dict(dataset="other"), dict(pretrained=source))),
               dict(lr=0.5), dict(queue_size=9), dict(seed=3)]
    runs = [run | dict(path=str(i), args=run["args"] | change, accuracy=90.0 + i**2 / 10)
            for i, change in enumerate(changes)]
    runs[-1]["recordings"] = 9  # of another test set
    lines, left_out = printed(evaluation.print_summary, runs)
    assert len(lines) == 17 and [line.split()[-1] for line in left_out] == ["2", "7"]
    means = [re.split(r"\s{2,}", line)[:2] for line in lines[-2:]]
    assert means == [["mean of 3 runs, 0 ...", "90.33 ± 0.49"],  # of 90, 90.1, 90.9
                     ["mean of 3 runs, 4 ...", "92.57 ± 1.00"]]  # of 91.6, 92.5, 93.6


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
    assert [train.warmup_cosine(i, 200) for i in range(9)] == pytest.approx(np.arange(1, 10) / 10)

    p, batch = torch.nn.Parameter(torch.tensor(0.0)), (torch.tensor(1.0), torch.tensor(0.5))
    results = train.train_one_epoch(
        lambda x, y: (p + x, y), [batch] * 2, torch.optim.SGD([p], 9.0), [0.1, 0.2])
    assert p.item() == pytest.approx(-0.3) and results == pytest.approx([0.95, 0.5])


def test_train_labels_per_class(shapes):
    split = load_shapes(shapes)[0]
    few, again, other = (train.few_shot_subset(split, 4, seed) for seed in (0, 0, 1))
    assert few.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(few.ids, again.ids) and (few.ids != other.ids).any()
    drawn = data.select(split, [split.ids.tolist().index(i) for i in few.ids])
    assert all(map(np.array_equal, few, drawn))  # frames, labels, ...
    assert train.few_shot_subset(split, 0, 0) is split
    warnings = [f"warning: fewer than 21 recordings in class {c}" for c in "abc"]
    assert printed(train.few_shot_subset, split, 21, 0)[0] == warnings


def before_the_loop(whole, phase, recordings=range(60), **flags):
    """Call train.pretrain or train.finetune -> (args, split, what it passes to train_phase)."""
    encoder, checkpoint = models.load_model(whole / "pretrained.pt")
    args, split = types.SimpleNamespace(**checkpoint["args"] | flags), load_shapes(whole)[0]
    split = data.select(split, list(recordings))
    with mock.patch.object(train, "train_phase", side_effect=StopIteration) as train_phase:
        seen = [split.ids] if phase is train.finetune else []
        refused(None, phase, encoder, split, args, {}, *seen, error=StopIteration)
    return args, split, train_phase.call_args.args


@pytest.mark.parametrize("split_events, crop", [(True, 0.5), (False, 1.0)])
def test_train_contrasts_two_views_of_a_recording(whole, monkeypatch, split_events, crop):
    args, split, (_, net, _, compute_loss, *_) = before_the_loop(
        whole, train.pretrain, split_events=split_events, crop_time=crop)
    augment, drawn, views, crops = data.augment, [], [], []

    def recorded(x, **ranges):
        drawn.append((x, ranges, augment(x, **ranges)))
        return drawn[-1][2]
    monkeypatch.setattr(data, "augment", recorded)
    monkeypatch.setattr(data, "crop_time", lambda x, shortest: crops.append(shortest) or x)
    net.register_forward_pre_hook(lambda net, inputs: views.extend(inputs))
    x, y = next(train.mixed_batches(split, args))
    assert compute_loss(x, y)[0].requires_grad
    (x_q, ranges_q, view_q), (x_k, ranges_k, view_k) = drawn
    assert ranges_q == ranges_k == data.AFFINE_AUG and crops == [crop, crop]
    assert views[0] is view_q and views[1] is view_k
    assert (view_q != view_k).any((0, 2, 3, 4)).all()  # of each recording
    assert torch.equal(x_q + x_k, x) if split_events else x_q is x_k is x


def test_train_monitor_never_asks_a_recording_about_itself(whole, monkeypatch):
    args, split, (*_, monitor) = before_the_loop(whole, train.pretrain)
    y = torch.tensor(split.labels)
    noise, classes, unique = torch.randn(60, 60), 99 * F.one_hot(y, 60), torch.eye(60)
    # Only the average over time shows the class; each recording is like itself only: guessing.
    for z, expected in [([noise, classes - noise], 1), ([unique, unique], 1 / 3)]:
        monkeypatch.setattr(models, "predict", lambda *_: torch.stack(z))
        assert monitor() == pytest.approx(expected, abs=0.1)
    once, again = ([y.tolist() for _, y in train.mixed_batches(split, args)] for _ in range(2))
    assert once == again and sorted(sum(once, [])) == y.tolist()
    assert min(len(set(labels)) for labels in once) > 1  # batches of mixed classes


def test_train_finetunes_each_step_and_predicts_by_the_mean_over_time(whole):
    args, split, (_, net, _, compute_loss, *_) = before_the_loop(whole, train.finetune)
    for head in net.heads:
        torch.nn.init.normal_(head.weight)
    x, y = next(train.mixed_batches(split, args))
    assert net.train().encoder.training  # in a backbone of your own, dropout is active
    before = copy.deepcopy(net.encoder.state_dict())
    torch.manual_seed(1)
    loss, accuracy = compute_loss(x, y)
    assert not equal(net.encoder.state_dict(), before)  # batch norm goes on
    torch.manual_seed(1)
    logits = net(data.augment(x, **args.finetune_aug))  # [T, B, classes]
    assert (logits[0] != logits[1]).any() and not torch.equal(logits, net(x))
    mean = (logits[0] + logits[1]) / 2
    losses = [-row.log_softmax(0)[label] for step in logits for row, label in zip(step, y)]
    torch.testing.assert_close(loss, sum(losses) / len(losses))
    assert accuracy == sum(row.argmax() == label for row, label in zip(mean, y)) / len(y)


def test_train_fits_heads_to_the_frozen_encoder_first(whole, monkeypatch):
    accuracy, source, fitted = {}, torch.load(whole / "pretrained.pt")["weights"], []
    fit_linear = models.fit_linear
    monkeypatch.setattr(models, "fit_linear",
                        lambda *features: fitted.append(fit_linear(*features)) or fitted[-1])
    for epochs in 2, 0:
        _, split, (_, net, encoder, *_) = before_the_loop(
            whole, train.finetune, pretrain_epochs=epochs)
        z, logits = (models.predict(m, data.batches(split, 6)) for m in (encoder, net))
        accuracy[epochs] = (logits.mean(0).argmax(1) == torch.tensor(split.labels)).float().mean()
        assert equal(encoder.state_dict(), source)
        heads = fitted if epochs else net.heads  # each to its own step; from scratch, random
        slow = [z_t @ head.weight.T + head.bias for head, z_t in zip(heads, z)]
        torch.testing.assert_close(logits, torch.stack(slow))
    assert len(fitted) == 2 and accuracy[2] > 0.6 > accuracy[0]
    for labels, epochs in ([5, 5, 4], 2), ([20, 4, 4], 2), ([5, 4, 4], 0):  # of each class
        few = [i for first, n in zip((0, 20, 40), labels) for i in range(first, first + n)]
        _, _, (_, net, encoder, *_) = before_the_loop(
            whole, train.finetune, few, pretrain_epochs=epochs)
        trained = {m.training for m in net.train().encoder.modules()}  # batch norm, dropout
        trained |= {p.requires_grad for p in encoder.parameters()}
        assert trained == {labels[1] == 5 or epochs == 0} and net.heads[0].weight.requires_grad


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
    monkeypatch.setattr(train, "fit_heads", lambda *_: None)  # before the loop, on the CPU
    args = types.SimpleNamespace(**data.FOLDER_DEFAULTS | dict(
        device="meta", batch_size=3, no_compile=True, seed=0, init=None, split_events=False))
    frames = torch.zeros(6, 4, 2, size, size, dtype=torch.uint8)
    split = split_of(frames, np.zeros(6, int), ["a", "b"])
    for phase, *seen in [train.pretrain], [train.finetune, []]:
        encoder, step = models.build(arch, size), torch.optim.AdamW.step
        with OneDevice(), mock.patch.object(torch.optim.AdamW, "step", autospec=True) as steps:
            steps.side_effect = step
            refused("meta", phase, encoder, split, args, {}, *seen, error=NotImplementedError)
        assert steps.call_count == 2


@pytest.mark.parametrize("moment", range(1, 8))
def test_train_resumes_bit_for_bit(shapes, whole, tmp_path, moment):
    """Interrupted half-way through writing state.pt, pretrained.pt (4) or finetuned.pt (7)."""
    save, names, run = torch.save, [], tmp_path / "a b"

    def interrupted(content, file):
        names.append(Path(file.name).name.split(".")[0])
        if len(names) < moment:
            return save(content, file)
        file.write(b"half")
        raise KeyboardInterrupt
    with mock.patch.object(torch, "save", interrupted), pytest.raises(KeyboardInterrupt) as stopped:
        run_tiny(shapes, run)
    assert names == "state state state pretrained state state finetuned".split()[:moment]
    assert not (run / "finetuned.pt").exists() and not [*run.glob("*part*")]
    # Before its first state.pt there is no run: the same command begins it.
    again = tiny(shapes, run) if moment == 1 else ["--resume", str(run)]
    assert moment == 1 or str(stopped.value).endswith(f"train.py --resume '{run}'")
    printed(train.main, again)
    assert same_run(whole, run)


def family(pid):
    """List a process and all below it, the oldest first."""
    lists = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(p for child in sum(lists, []) for p in family(int(child)))]


def killed(stop, moment, *argv):
    """Start a script, stop all its processes at a moment -> the last line of its error."""
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's & ignores
    run = start(*argv, preexec_fn=default)
    while run.poll() is None and not moment():
        time.sleep(0.005)
    for pid in family(run.pid):
        os.kill(pid, stop)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == (1 if stop == signal.SIGINT else -stop), error
    return error.splitlines()[-1:]


def test_train_resumes_bit_for_bit_after_kill_9_and_ctrl_c(shapes, tmp_path):
    flags, cut = ["--pretrain-epochs", "6", "--epochs", "6"], tmp_path / "cut"
    run_tiny(shapes, tmp_path / "whole", *flags)
    first = "train.py", *tiny(shapes, cut, *flags, "--root", tmp_path / "root")
    again, log = ["train.py", "--resume", cut], cut / "log.csv"
    killed(signal.SIGKILL, (tmp_path / "root" / "frames").exists, *first)
    killed(signal.SIGKILL, (cut / "state.pt").exists, *first)  # in its first epoch
    killed(signal.SIGKILL, log.exists, *again)
    began = time.time()
    error = killed(signal.SIGINT, lambda: log.stat().st_mtime > began, *again)
    assert error == [f"stopped; to continue: python train.py --resume {cut}"]
    killed(signal.SIGKILL, lambda: "finetune,2" in log.read_text(), *again)
    assert not (cut / "finetuned.pt").exists()
    printed(train.main, ["--resume", str(cut)])
    assert same_run(tmp_path / "whole", cut)


def stop_in_epoch(number, *argv, effect=KeyboardInterrupt, says="to continue"):
    """Call train.main, of which one epoch, counted from 1, raises or returns something else."""
    with mock.patch.object(train, "train_one_epoch", wraps=train.train_one_epoch) as one_epoch:
        one_epoch.side_effect = [mock.DEFAULT] * (number - 1) + [effect]
        refused(says, train.main, argv, error=(KeyboardInterrupt, data.UserError))


def test_train_resume_of_a_finished_run_trains_what_flags_add(shapes, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")

    def epochs(*flags):
        lines, _ = printed(train.main, ["--resume", str(run), *flags])
        assert lines[-1] == run_eval(run / "finetuned.pt")[0][-1]  # test accuracy ...
        test = (run / "log.csv").read_text().splitlines()[-1]
        assert re.fullmatch(rf"test,,,{float(lines[-1].split()[2]) / 100:.4f},+", test)
        return [line.split(":")[0] for line in lines if re.match(r"(pretrain|finetune) \d", line)]
    elsewhere = ["--root", str(tmp_path / "root"), "--device", "cpu", "--no-compile"]
    assert epochs() == epochs(*elsewhere) == epochs(*tiny(shapes, run)) == []
    assert same_run(whole, run)
    assert [row["lr"] for row in read_log(run)] == ["4.00e-04", "1.00e-03"] * 2
    assert epochs("--epochs", "4") == ["finetune 3/4", "finetune 4/4"]
    assert same(whole, run, "pretrained.pt") and not same(whole, run, "finetuned.pt")
    assert read_log(run)[:4] == read_log(whole) and len(read_log(run)) == 6
    state, ckpt = torch.load(run / "state.pt"), torch.load(run / "finetuned.pt")
    assert state["args"]["epochs"] == ckpt["args"]["epochs"] == 4  # its own flags from now on
    anew = ["pretrain 3/3", *(f"finetune {i}/4" for i in range(1, 5))]
    assert epochs("--pretrain-epochs", "3") == anew
    assert not same(whole, run, "pretrained.pt") and not same(whole, run, "finetuned.pt")
    rows = [row["phase"] + row["epoch"] for row in read_log(run) if 0 < float(row["rate"]) < 1]
    assert rows == [f"pretrain{i}" for i in (1, 2, 3)] + [f"finetune{i}" for i in (1, 2, 3, 4)]
    # a loss that is not finite; the epochs before it are done, and may be all
    says, more = "pretrain 5/6: the loss is nan.* lower learning rate", ("--pretrain-epochs", "6")
    stop_in_epoch(2, "--resume", str(run), *more, effect=(math.nan, 0.0), says=says)
    assert epochs("--pretrain-epochs", "4") == anew[1:]


def test_train_init_takes_the_encoder_of_either_kind(shapes, whole, tmp_path):
    ckpt, run = shutil.copy(whole / "pretrained.pt", tmp_path / "p.pt"), tmp_path / "init"
    begin, again = tiny(shapes, run, "--init", ckpt, "--temperature", "3"), ["--resume", str(run)]
    stop_in_epoch(1, *begin)
    gone = ckpt.rename(tmp_path / "gone.pt")
    refused("p.pt", train.main, again, error=OSError)  # no epoch is done: still needed
    gone.rename(ckpt)
    stop_in_epoch(2, *again)
    ckpt.unlink()
    printed(train.main, again)
    assert same(whole, run, "finetuned.pt")
    paths = whole / "pretrained.pt", whole / "finetuned.pt", run / "finetuned.pt"
    source, was, now = (torch.load(path) for path in paths)
    assert now["args"]["pretrained"] == source["args"] | dict(kind="pretrained")
    assert now["args"]["temperature"] == 3 and was["args"]["pretrained"] is None
    for checkpoint in source, was, now:
        assert sorted(checkpoint["trained_on"].tolist()) == sorted(load_shapes(whole)[0].ids)

    run_tiny(shapes, tmp_path / "seed", "--init", whole / "pretrained.pt", "--seed", "1")
    assert not same(whole, tmp_path / "seed", "finetuned.pt")
    ckpt, encoder = whole / "finetuned.pt", models.build("spikformer-1-16", 16)
    args = types.SimpleNamespace(**was["args"] | dict(init=ckpt, n_frames=3, sensor=[64, 32]))
    lines, _ = printed(train.load_pretrained_encoder, encoder, args)
    assert args.pretrained == was["args"] | dict(kind="finetuned")
    assert "seen labels" in lines[0] and len(lines) == 2
    assert "sensor [32, 32], not [64, 32]; n_frames 2, not 3" in lines[1]
    assert equal(encoder.state_dict(), models.load_model(ckpt)[0].encoder.state_dict())


def test_train_goes_on_while_its_log_cannot_be_written(shapes, whole, tmp_path, monkeypatch):
    run, write_log = tmp_path / "run", train.write_log

    def unlocked_at_the_end(args, state, *test):
        if test:
            (run / "log.csv").rmdir()
        write_log(args, state, *test)
    monkeypatch.setattr(train, "write_log", unlocked_at_the_end)
    (run / "log.csv").mkdir(parents=True)
    lines = run_tiny(shapes, run)
    assert len([line for line in lines if re.match("warning: .*log.csv", line)]) == 4
    assert same_run(whole, run) and "test," in (run / "log.csv").read_text()


def test_train_numbers_its_folders_and_claims_them(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, out in [("", "runs/shapes"), ("", "runs/shapes-2"), ("--out runs/shapes-4", ""),
                       ("", "runs/shapes-3"), ("", "runs/shapes-5"), ("--resume runs/shapes-6", ""),
                       ("--resume .", "")]:
        argv = ["--dataset", str(shapes), "--device", "cpu", *flags.split()]
        args, state = train.parse_args(argv)
        printed(train.open_run, args, state | dict(seen=[]))
        out = out or flags.split()[1]
        args, state = train.parse_args(["--resume", out])  # with the flags that it began with
        assert (args.dataset, args.resume, state["args"]["out"]) == (str(shapes), out, out)
    assert len(os.listdir("runs")) == 6


def test_train_under_torchrun(shapes, whole, tmp_path):
    """One is a run without it; two share the work, write once, and resume with the same bits."""
    def torchrun(processes, *flags):
        run = start(*TORCHRUN, processes, "train.py", *flags)
        text, error = run.communicate(timeout=150)
        assert run.returncode == 0 and text.count("test accuracy") == 1, error
    torchrun(1, *tiny(shapes, tmp_path / "one"))
    assert same_run(whole, tmp_path / "one")
    torchrun(2, *tiny(shapes, tmp_path / "two"))
    assert [row["epoch"] for row in read_log(tmp_path / "two")] == list("1212")
    cut = tmp_path / "cut"
    killed(signal.SIGKILL, (cut / "log.csv").exists, *TORCHRUN, 2, "train.py", *tiny(shapes, cut))
    assert not (cut / "finetuned.pt").exists()
    torchrun(2, "--resume", cut)
    assert same_run(tmp_path / "two", cut)


def train_share(folder):
    """Pre-train for two steps, one process's share, in evaluation mode of batch norm."""
    args = types.SimpleNamespace(device="cpu", batch_size=6, seed=0, weight_decay=0.0, out=folder)
    args, state = train.init_distributed(args, {})
    torch.manual_seed(0)
    x, encoder = torch.randint(9, (2, 6, 2, 16, 16)), models.load_model(f"{folder}/p.pt")[0]
    net = moco.MoCo(encoder, 2, queue_size=8, momentum=0.5)
    net.double()  # or rounding, which depends on the size of a batch, could make a neuron fire
    net.eval().train = lambda: net  # train_phase must not undo eval
    split = split_of(x.transpose(0, 1).to(torch.uint8), torch.arange(6), ["a"])
    model, drawn = train.wrap_model(net, args), []

    def loss_of(x, y):
        drawn.append(torch.rand(1))
        return model(x.double(), 2 * x.double()), net.accuracy

    def sgd(model, weight_decay):  # AdamW would not tell a gradient from twice itself
        return torch.optim.SGD(model.encoder_q.parameters())
    with mock.patch.object(train, "build_optimizer", sgd):
        train.train_phase("pretrain", net, Linear(16), loss_of, split, 2, 0.1, args, state, None)
    losses = torch.tensor([float(row["loss"]) for row in state["pretrain"]["log"]])
    result = dict(net.state_dict(), losses=losses, drawn=torch.cat(drawn))
    torch.save(result, f"{folder}/{'%d of %d' % train.rank_and_world_size()}.pt")


def test_train_on_two_processes_is_train_on_one(whole, tmp_path):
    """The same losses, weights and queue; each process draws views of its own."""
    shutil.copy(whole / "pretrained.pt", tmp_path / "p.pt")
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


# What the error must say is behind the arrow, with gaps at ..., or it is the first flag.
@pytest.mark.parametrize("flags", [
    "--lr nan", "--momentum 1.5", "--temperature 0", "--queue-size 0", "--batch-size 2",
    "--labels-per-class -1", "--sensor 0 9", "--dataset", "--seed 99999999999999999999",
    "--device cuda:99", "--pretrain-epoch 3", "--columns xxyt", "--root EMPTY -> empty",
    "--resume OLDER -> --crop-time: ... None", "--epochs 0 --pretrain-epochs 0 -> --epochs 0",
    "--dataset FOLDER -> folder: no recordings", "--dataset OTHER/a -> single class",
    "--dataset no/such -> no/such: neither a folder nor one", "--init no/such.pt -> no/such.pt",
    "--dataset SPLIT -> need a folder for each class", "--arch sew-resnet-34 -> 'sew-resnet-34'",
    "--arch spikformer-2-100 -> 'spikformer-2-100'", "--init CKPT --arch spikformer-1-32 -> builds",
    "--arch sew-resnet-18-12 -> a multiple of 8: on some CPUs, PyTorch hangs",
    "--init CKPT --pretrain-on OTHER -> no --init", "--pretrain-on SHAPES/Test -> nothing is left",
    "--out WHOLE -> whole exists", "--out EMPTY/below -> empty/below", "--resume LOST -> state.pt",
    "--out WHOLE --resume OTHER -> not allowed with", "--resume NONE -> no run there",
    "--resume WHOLE --epochs 1 -> WHOLE: ... 1 ... finetune", "--resume FOLDER -> state.pt",
    "--resume WHOLE --seed 1 -> --seed", "--resume WHOLE --lr 1 -> --lr: ... 0.002",
    "--resume WHOLE --init CKPT -> --init: ... None", "--resume WHOLE --beta 1 -> --beta",
    "--resume WHOLE --sensor 9 9 -> --sensor: ... [32, 32]", "--ckpt FOLDER -> folder",
    "--resume WHOLE --dataset OTHER -> other recordings", "--ckpt no/such.pt -> no/such.pt",
    "--resume WHOLE --pretrain-epochs 0 -> WHOLE: ... 0 ... pretrain", "--ckpt EMPTY -> empty: not",
    "--ckpt EVIL -> evil: not", "--ckpt HALF -> half: not", "--ckpt CKPT --pict p -> --pict",
    "--ckpt WHOLE/state.pt -> state.pt: not", "--ckpt CKPT --json EMPTY/f -> empty",
    "--ckpt CKPT --dataset SHAPES/Train -> not trained on",
    "--ckpt CKPT CKPT --pictures p -> --pictures", "--ckpt CKPT --predict FOLDER -> no recordings",
    "--ckpt CKPT --predict FOLDER --dataset toy -> does not go with"])
def test_train_and_eval_answer_a_mistake_with_one_line(shapes, whole, tmp_path, flags):
    evil = f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()  # a pickle that runs a command
    files = dict.fromkeys(["empty", "lost/finetuned.pt", "older/state.pt"], b"")
    files |= {"half": (whole / "finetuned.pt").read_bytes()[:9000]}
    files |= {"evil": evil, "folder/state.pt": evil}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    state = torch.load(whole / "state.pt")
    del state["args"]["crop_time"]  # of a version without this flag
    torch.save(state, tmp_path / "older" / "state.pt")
    for folder in "other/a", "other/z", "split/train", "split/test":
        shutil.copytree(shapes / "Test" / "a", tmp_path / folder)
    places = dict(CKPT=whole / "finetuned.pt", WHOLE=whole, SHAPES=shapes)
    flags = re.sub("[A-Z]{4,}", lambda m: str(places.get(m[0], tmp_path / m[0].lower())), flags)
    flags, _, says = flags.partition(" -> ")
    flags = flags.split()
    if flags[0] == "--ckpt":
        line = error_of("eval.py", "--device", "cpu", "--no-compile", *flags)
    else:
        begin = tiny(shapes, tmp_path / "out") if "--resume" not in flags else TINY
        line = error_of("train.py", *[f.replace("--resume", "--out") for f in begin], *flags)
    parts = ("error: ... " + (says or flags[0])).split(" ... ")
    assert re.search(".*".join(map(re.escape, parts)), line)
    assert not any((tmp_path / name).exists() for name in ("out", "ran", "lost/log.csv"))


def test_train_and_the_script_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_TRAIN", 300)
    monkeypatch.setattr(data, "TOY_TEST", 100)
    few = "--arch", "sew-resnet-18-8", "--labels-per-class", "3", "--queue-size", "500"
    lines = run_tiny("toy", "runs/toy", *few)
    assert lines[-1].endswith("% (last epoch, 100 recordings)")
    assert any("a queue of 500 holds all 300 recordings" in line for line in lines)
    (script,) = scripts_of("README.md")
    assert float(printed(exec, script, {"__name__": "__main__"})[0][-1]) > 0.3


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_train_on_cuda(tmp_path, monkeypatch, compiled):
    """An epoch is like the CPU's; --resume continues; the CPU can evaluate it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TOY_TRAIN", 600)
    monkeypatch.setattr(data, "TOY_TEST", 200)
    flags = tiny("toy", "cuda", "--batch-size", 32, "--epochs", 1, "--device", "cuda")
    if compiled:
        flags.remove("--no-compile")
    printed(train.main, flags)
    run_tiny("toy", "cpu", "--batch-size", 32, "--epochs", 1)
    cuda, cpu = read_log(Path("cuda")), read_log(Path("cpu"))
    for column, tolerance in dict(loss=0.5, rate=0.05, knn=0.12).items():
        for a, b in zip(cuda, cpu, strict=True):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), abs=tolerance)
    last = printed(train.main, [*flags, "--epochs", "2"])[0][-1]
    rows, on_cpu = read_log(Path("cuda")), run_eval("cuda/finetuned.pt")[0][-1]
    assert rows[:3] == cuda and len(rows) == 4 and 0 < float(rows[3]["loss"]) < 9
    assert float(last.split()[2]) == pytest.approx(float(on_cpu.split()[2]), abs=4)


# ------------------------------------------------- own recordings: no wrong result without a word

def said(capsys):
    return capsys.readouterr().out.splitlines()


def make_own(folder, suffix, numbers=range(10), name="{}"):
    """Write recordings 0, 1, ... of the classes a and b, whose events are the same each time."""
    for c, i in itertools.product("ab", numbers):
        write(folder / c / (name.format(i) + suffix), recording(60, seed=100 * ord(c) + i))
    return folder


def test_own_everything_left_out_is_named_once(tmp_path, capsys):
    own = tmp_path / "My.Data"
    for part in "Train", "Test":
        make_own(own / part, ".npy", range(2))
    folder_of(own, "Val/a/1.npy", "Val/a/2.npy", "Train/a/.x.npy", ".old/a/1.npy",
              "Train/a/deep/1.npy", "loose.npy", "Train/a/._1.npy")
    for path in own / "Train" / "zebra", own / "Train" / "yak":
        path.mkdir()
    for name in "a/notes.txt", "yak/1.h5", "yak/2.H5":
        (own / "Train" / name).touch()
    assert [len(split.labels) for split in load_folder(tmp_path)] == [4, 4]
    left_out = ", ".join(line.split("left out: ")[1] for line in said(capsys))
    assert sorted(left_out.split(", ")) == [
        "1 .txt", f"1 in {own}", f"1 in {own}/Train/a/deep", "1 without a recording: Train/yak",
        "1 without a recording: Train/zebra", "2 .h5", f"2 in {own}/Val/a", "3 hidden"]

    (own / "Train" / "c").symlink_to(own / "Val" / "a")  # links are followed
    assert len(load_folder(tmp_path)[0].labels) == 6
    assert any(re.match("warning: .*class c$", line) for line in said(capsys))  # not tested


def test_own_folder_may_be_the_root_of_its_frames(tmp_path):
    own = make_own(tmp_path / "own", ".npy", range(3))
    for _ in range(2):  # made, then cached, and no recording
        assert len(data.load(own, own, 2, sensor=(12, 9))[0].labels) == 4


def test_own_counts_up_to_32767_and_thin_recordings(tmp_path, capsys):
    own, dense = make_own(tmp_path / "My.Data", ".npy", range(2)), recording(2000)
    dense["x"], dense["y"], dense["p"] = 3, 2, True
    write(own / "a" / "1.npy", dense)
    write(own / "b" / "1.npy", recording(3))
    for _ in range(2):  # made, then cached
        train_split, test_split = load_folder(tmp_path, 4, 32)
        assert train_split.frames.dtype == np.int16 and test_split.frames[0].max() == 500
        assert train_split.frames.sum() == 120 and test_split.frames.sum() == 2003
        (warning,) = said(capsys)
        assert re.search("1 recordings .*fewer events than the 4 frames", warning)
    x, _ = next(data.batches(test_split, 2))
    assert x.dtype == torch.float32 and x[:, 0].sum() == 2000
    frames = data.to_frames(recording(300_000, 1, 1), 4, (12, 9), 12)  # all events in one pixel
    assert (frames[..., 0, 0] == 32767).all() and frames.sum(dtype=int) == 8 * 32767


def test_own_time_that_fills_one_frame_is_counted(tmp_path, capsys):
    """Equal times (seconds since 1970 as float32, say) and one outlier are counted in a warning."""
    t, late = np.arange(60), np.r_[:59, 10**6]
    times = dict(even=t, equal=0 * t, same=1.7e9 + 0.0 * t, late=late, latest=late / 1e6,
                 half=np.repeat([0, 100], 30), most=np.r_[:50, 91:101])
    for cls, name in itertools.product("ab", times):
        write(tmp_path / "My.Data" / cls / f"{name}.npy", with_field("t", times[name]))
    for _ in range(2):  # made, then cached
        (splits, *_), (warning,) = load_folder(tmp_path, 4, frames_by="time"), said(capsys)
        assert re.search("8 recordings .*nearly all events in one frame of 4", warning)
    counts = dict(zip(splits.names.tolist(), splits.frames.sum((2, 3, 4), dtype=int).tolist()))
    expected = dict(even=[14, 14, 14, 18], equal=[0, 0, 0, 60], late=[59, 0, 0, 1],
                    latest=[59, 0, 0, 1], half=[30, 0, 0, 30], most=[25, 25, 0, 10])
    assert {name: counts[f"a/{name}.npy"] for name in expected} == expected
    for settings in dict(n_frames=1, frames_by="time"), dict(n_frames=4):
        load_folder(tmp_path, **settings)
        assert not said(capsys)


def test_own_recordings_are_told_by_what_they_hold(tmp_path):
    """The number of a recording is that of its events, not of name, format, T, size or order."""
    for x, y in ([3, 4, 700], [2, 500, 1]), ([0, 1, 697], [1, 499, 0]):  # moved to the corner
        few = np.rec.fromarrays([x, y, [0, 5, 5], [0, 1, 1]], names="x,y,t,p")
        assert data.recording_id(few) == 6326649518163589176  # for ever: checkpoints hold it
    events = recording(60)
    events["t"] = events["t"] // 50 * 50  # several at one time, in another order below
    signed = events.astype([("x", "<u2"), ("y", "<f4"), ("timestamp", "<f8"), ("polarity", "i1")])
    signed["polarity"][~events["p"]] = -1
    alike = {"a/1.npy": events, "a/2.bin": events, "a/3.npz": events, "a/4.aedat4": events,
             "b/r.npy": signed, "b/s.npy": np.sort(events, order=["t", "x", "y"])}
    assert (alike["b/s.npy"] != events).any()
    other = {"d/n.npy": events[:-1]} | {f"d/{field}.npy": events.copy() for field in "xyp"}
    for field in "xyp":
        other[f"d/{field}.npy"][field][7] ^= 1
    for name, content in (alike | other).items():
        write(tmp_path / "My.Data" / name, content)
    for n_frames, size in (2, None), (5, 8):
        splits = load_folder(tmp_path, n_frames, size)
        ids = {str(name): i for split in splits for name, i in zip(split.names, split.ids)}
        assert {name for name in ids if ids[name] == data.recording_id(events)} == set(alike)
        assert len(set(ids.values())) == 5 and len(ids) == 10


def test_own_plain_arrays_need_their_columns_and_a_sensor(tmp_path):
    for path, events in make_folder(tmp_path).items():
        np.save(path, np.stack([events[field] for field in "typx"], 1))
    frames = load_folder(tmp_path, columns="typx")[1].frames[-1]
    assert np.array_equal(frames, slow_frames(events, 2, (12, 9), 12))
    says = "pass --sensor W H.*x 0 to 11, y 0 to 8"
    refused(says, load_folder, tmp_path, sensor=None, columns="typx")


def test_own_aedat4_names_its_sensor_and_is_checked(whole, tmp_path):
    dv, own = pytest.importorskip("dv_processing"), tmp_path / "My.Data"
    folder_of(own, *(f"{c}/{i}.aedat4" for c in "ab" for i in range(4)), sensor=(64, 48))
    assert load_folder(tmp_path)[0].sensor == [64, 48]  # whatever the caller says
    refused(r"--sensor \[12, 9\]: .*\[64, 48\]", run_tiny, own, tmp_path / "run", *OWN, "0")
    for what in "--dataset", "--predict":  # after training with another camera
        (warning,) = run_eval(whole / "finetuned.pt", what, own)[1]
        assert "sensor [64, 48], not [32, 32]" in warning
    write(own / "a" / "2.aedat4", recording(60), (32, 32))
    refused("different sensors: 64 x 48 .*7.*32 x 32 .*1", load_folder, tmp_path)
    (own / "a" / "2.aedat4").unlink()
    config = dv.io.MonoCameraWriter.FrameOnlyConfig("DVS", (64, 48))
    writer = dv.io.MonoCameraWriter(str(own / "a" / "8.aedat4"), config)
    writer.writeFrame(dv.Frame(1000, np.zeros((48, 64), np.uint8)))
    del writer
    refused("8.aedat4: .*no events in the AEDAT", load_folder, tmp_path)


def test_own_results_stand_if_others_or_the_file_fail(whole, shapes, tmp_path, capsys):
    good = whole / "finetuned.pt"
    refused("none.pt", run_eval, good, tmp_path / "none.pt", good, "--json", tmp_path / "f.json")
    assert len(json.loads((tmp_path / "f.json").read_text())["runs"]) == 2
    argv = ["--ckpt", str(good), "--json", f"{good}/f.json", "--device", "cpu"]
    refused("finetuned.pt", evaluation.main, argv, error=OSError)  # after the text
    assert "\ntest accuracy " in capsys.readouterr().out
    # of a single recording, the mean over pairs is no number, and JSON has no word for that
    write(tmp_path / "one" / "a" / "20.npy", np.load(shapes / "Test" / "a" / "20.npy"))
    run_eval(good, "--json", tmp_path / "f.json", "--dataset", tmp_path / "one")
    text = (tmp_path / "f.json").read_text()
    (run,) = json.loads(text)["runs"]
    assert "NaN" not in text and run["uniformity"] is None and run["recordings"] == 1


OWN = "--sensor", "12", "9", "--pretrain-epochs"


def test_own_what_was_trained_on_is_not_tested(tmp_path):
    """A training folder that has moved, and grown or not, is tested on what is left of it."""
    own, ckpt = make_own(tmp_path / "own", ".npy"), tmp_path / "run" / "finetuned.pt"
    last = run_tiny(own, ckpt.parent, *OWN, "0")[-1]
    assert not (ckpt.parent / "pretrained.pt").exists() and run_eval(ckpt)[1] == []
    grown = make_own(tmp_path / "grown", ".npz", range(12), "day1-{}")
    rest = run_eval(ckpt, "--dataset", make_own(tmp_path / "rest", ".bin", range(9, 12)))[0][-1]
    assert "2 recordings" in last and "6 recordings" in rest
    for folder, count, shown in [(grown, "18 of 24", rest),
                                 (own.rename(tmp_path / "moved"), "18 of 20", last)]:
        lines, (warning,) = run_eval(ckpt, "--dataset", folder)
        assert re.search(f"{count} .*trained on.*left out", warning) and lines[-1] == shown
    # Where files have new names, the folder's own test is another one, and not left out.
    make_own(own, ".npy", range(9), "x{}")
    lines, (warning,) = run_eval(ckpt)
    assert re.search("2 of 2 recordings .*trained on", warning) and "left out" not in warning
    assert "2 recordings" in lines[-1]


def leaks(*args):
    """Run train.py -> the lines that say how many recordings are on both sides."""
    return [line for line in run_tiny(*args) if re.match("warning: .* of .* recordings", line)]


def test_own_leaks_in_training_are_counted(tmp_path):
    own, trained_on = make_own(tmp_path / "own", ".npy"), {}
    (tmp_path / "link").symlink_to(own)
    flat = make_own(tmp_path / "flat", ".npz", range(12), "day1-{}")
    for name, count in dict(link="2 of 20", flat="2 of 24").items():
        (line,) = leaks(own, tmp_path / name[0], *OWN, "1", "--pretrain-on", tmp_path / name)
        assert re.search(f"{count} recordings .*pre-train.*left out", line)
        trained_on[name] = torch.load(tmp_path / name[0] / "pretrained.pt")["trained_on"].tolist()
    train_ids, test_ids = (split.ids.tolist() for split in load_folder(tmp_path, folder="own"))
    assert sorted(trained_on["link"]) == sorted(train_ids)
    assert len(trained_on["flat"]) == 22 and not set(trained_on["flat"]) & set(test_ids)
    # an encoder that has been shown what is the test now
    assert leaks(flat, tmp_path / "pre", *OWN, "1", "--epochs", "0") == []
    init = leaks(own, tmp_path / "init", *OWN, "0", "--init", tmp_path / "pre" / "pretrained.pt")
    seen = torch.load(tmp_path / "init" / "finetuned.pt")["trained_on"].tolist()
    assert len(seen) == 22 and set(train_ids + test_ids) <= set(seen)
    # the same recording under two names, one of them to train on
    shutil.copy(own / "a" / "0.npy", own / "a" / "copy of 0.npy")
    write(own / "b" / "x.npz", np.load(own / "b" / "1.npy"))
    twins = leaks(own, tmp_path / "twins", *OWN, "0")
    pretrained = leaks(own, tmp_path / "pretrained", *OWN, "1", "--epochs", "0")
    for line, in init, twins, pretrained:
        assert re.search("2 of 2 recordings .*trained on", line)


def test_own_resume_takes_the_same_recordings_only(tmp_path):
    own, more = make_own(tmp_path / "own", ".npy"), make_own(tmp_path / "more", ".npy", [20, 21])
    again = ["--resume", str(tmp_path / "run")]
    before = run_tiny(own, again[1], *OWN, "1", "--pretrain-on", more)[-1]
    for path, split in [(own / "a" / "0.npy", "train"), (own / "b" / "9.npy", "test"),
                        (more / "a" / "20.npy", "unlabelled")]:
        events = np.load(path)
        write(path, np.delete(events, 5))  # under the same name
        refused(f"--resume .*other recordings in {split}", train.main, again)
        write(path, events)
    assert printed(train.main, again)[0][-1] == before
    os.rename(own, tmp_path / "moved")
    assert printed(train.main, [*again, "--dataset", str(tmp_path / "moved")])[0][-1] == before


def test_own_links_in_a_loop_and_a_reader_that_dies_end(tmp_path, monkeypatch):
    make_folder(tmp_path)
    for path in "Train", "Train/a", "Test/b":
        (tmp_path / "My.Data" / path / "up").symlink_to(tmp_path / "My.Data" / path / "..")
    for _ in range(2):  # made, then cached: the next draw is the same
        torch.manual_seed(7)
        assert len(load_folder(tmp_path)[0].labels) == 6
        assert torch.rand(1, generator=torch.Generator().manual_seed(7)) == torch.rand(1)
    monkeypatch.setitem(data.READERS, ".npy", lambda path: os._exit(9))
    refused("a process that reads recordings was killed", load_folder, tmp_path, 3)


def test_own_workers_end_with_a_process_that_is_killed(tmp_path, monkeypatch):
    make_folder(tmp_path)
    beat = tmp_path / "beat"
    monkeypatch.setitem(data.READERS, ".npy", lambda _: [beat.touch() for _ in range(10**7)])
    other = multiprocessing.Process(target=load_folder, args=(tmp_path,))
    other.start()
    while not beat.exists():
        time.sleep(0.01)
    other.kill()
    time.sleep(3)
    assert time.time() - beat.stat().st_mtime > 1  # seconds since the last touch


def test_own_predictions_and_features(whole, shapes, tmp_path):
    ckpt, test_folder = whole / "finetuned.pt", shapes / "Test"
    lines, _ = run_eval(ckpt, "--features", tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz") as saved:
        logits, labels, names = (saved[f"test_{k}"] for k in ("logits", "labels", "names"))
        assert len(saved["train_features"]) == len(saved["train_names"]) == 60
        assert logits.shape == (12, 3) and "".join(saved["logit_classes"]) == "abc"
    accuracy = 100 * (logits.argmax(1) == labels).mean()
    assert lines[-1] == f"test accuracy {accuracy:.2f} % (last epoch, 12 recordings)"
    rows, _ = run_eval(ckpt, "--json", tmp_path / "p", "--predict", *sorted(test_folder.iterdir()))
    assert rows.pop(0) == "path,predicted,probability"
    paths, predicted, probability = zip(*(row.split(",") for row in rows))
    assert ["/".join(Path(path).parts[-2:]) for path in paths] == names.tolist()
    assert "".join(predicted) == "".join("abc"[c] for c in logits.argmax(1))
    expected = torch.from_numpy(logits).softmax(1).amax(1).tolist()
    assert list(map(float, probability)) == pytest.approx(expected, abs=1e-3)
    assert len(json.loads((tmp_path / "p").read_text())) == 12

    new = shutil.copytree(test_folder / "a", tmp_path / "new")
    for old, name in ("20.npy", "\u6771.npy"), ("21.npy", "\u4eac.NPY"):
        (new / old).rename(new / name)
    (new / "zebra").mkdir()
    for name in "1.h5", ".22.npy", "broken.npy":
        (new / name).touch()
    run = start("eval.py", "--ckpt", ckpt, "--skip-broken", "--sensor", 64, 64, "--no-compile",
                "--predict", new, env=os.environ | dict(PYTHONIOENCODING="cp1252"))
    out, err = run.communicate(timeout=60)  # as on Windows, into a file
    names = [Path(line.split(",")[0]).name for line in out.splitlines()[1:]]
    assert sorted(names) == ["22.npy", "23.npy", r"\u4eac.NPY", r"\u6771.npy"]
    for says in ("1 .h5", "1 hidden", "without a recording: zebra", "1 of 5 recordings are broken",
                 "broken.npy: EOFError", "sensor [64, 64], not [32, 32]"):
        assert says in err

    # after training on DVS128 Gesture, whose plain arrays have an order of columns that is known
    checkpoint, events = torch.load(ckpt), np.load(test_folder / "a" / "20.npy")
    checkpoint["args"]["dataset"] = "dvsgesture"
    torch.save(checkpoint, tmp_path / "gesture.pt")
    np.save(tmp_path / "plain.npy", np.stack([events[field] for field in "xypt"], 1))
    plain, _ = run_eval(tmp_path / "gesture.pt", "--predict", tmp_path / "plain.npy")
    assert plain[1].split(",")[1:] == rows[0].split(",")[1:]


def test_own_flat_folder_pretrains_and_another_is_fine_tuned(shapes, tmp_path):
    for split in "Train", "Test":
        shutil.copytree(shapes / split / "a", tmp_path / "one class" / split / "a")
    flat, large = shutil.copytree(shapes / "Train" / "a", tmp_path / "flat"), ["--image-size", "32"]
    run_tiny(tmp_path / "one class", tmp_path / "pre", "--epochs", "0", *large)
    assert [row["knn"] for row in read_log(tmp_path / "pre")] == ["", ""]  # nothing to tell apart
    for folder in flat, tmp_path / "one class":  # all of a flat folder, Train of a split one
        run_tiny(shapes, tmp_path / f"on {folder.name}", "--pretrain-on", folder, *large)
        assert same(tmp_path / "pre", tmp_path / f"on {folder.name}", "pretrained.pt")
    for name, flags in dict(tenth=[], itself=["--pretrain-on", flat]).items():
        run_tiny(flat, tmp_path / name, "--epochs", "0", *large, *flags)
    assert not same(tmp_path / "pre", tmp_path / "tenth", "pretrained.pt")
    assert same(tmp_path / "tenth", tmp_path / "itself", "pretrained.pt")  # without its test


def test_own_scripts_of_the_docs_convert(tmp_path, monkeypatch):
    """Run each script of docs/recordings.md on a recording written in its format."""
    wizard, h5py = pytest.importorskip("expelliarmus").Wizard, pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    Path("FOLDER").mkdir()
    fields = [recording(60)[field] for field in "txyp"]
    events = np.rec.fromarrays(fields, formats="i8,i2,i2,u1", names="t,x,y,p")
    wizard(encoding="dat").save(fpath=Path("FOLDER/a.dat"), arr=events)
    with h5py.File("FOLDER/b.h5", "w") as f:
        for name in "xytp":
            f[f"events/{name}"] = events[name]
    t, x, y, p = (field.astype(">u4") for field in fields)
    pairs = np.stack([x << 8 | y << 1 | p, t], 1).astype(">u4")
    Path("FOLDER/c.aedat").write_bytes(b"#!AER-DAT2.0\r\n# DVS128\r\n" + pairs.tobytes())
    for script in scripts_of("docs/recordings.md"):
        exec(script, {})
    for name in "abc":
        read = data.read_file(f"FOLDER/{name}.npy")
        assert all(np.array_equal(read[field], events[field]) for field in "xytp"), name
