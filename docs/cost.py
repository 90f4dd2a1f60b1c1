"""Count what a run costs: arithmetic, memory, disk, and the hours that these take at a named rate.

    python docs/cost.py                                  # the paper's data sets and backbones
    python docs/cost.py --dataset nmnist --arch sew-resnet-18 --n-frames 5

Prints a markdown table, a column for each data set and backbone, at the defaults of data.py.

Multiply-accumulates (MACs) are those of convolutions, linear layers and attention's matrix
products, in encoder and projection head. Batch norm, LIF, pooling, views, loss, optimizer and
evaluation are left out. Memory is what autograd keeps of a forward pass for the backward pass.
Hours are arithmetic; the last rate among them is measured: that of a step on this CPU.
"""
import argparse
import copy
import functools
import sys
import time
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import models
import moco
import neuron

TOTAL = {"toy": data.TOY_TRAIN + data.TOY_TEST} | {
    name: total for name, (_, _, total, _, _) in data.TONIC_DATASETS.items()}
# Recordings to train on. CIFAR10-DVS has 1,000 a class. N-Caltech101 has the classes of Caltech101
# without Faces; data.split_by_class of their sizes leaves 823 to test. The rest: official splits.
TRAIN = dict(toy=data.TOY_TRAIN, cifar10dvs=9_000, dvsgesture=1_077, ncaltech101=7_886,
             nmnist=60_000)


def count_macs(net, x):
    """Count the MACs of a recording in x [T, B, 2, H, W] -> [forward pass, backward pass]."""
    # tensors of this device have a shape and no numbers, so it takes no time
    net, x = copy.deepcopy(net).to("meta"), x.to("meta")
    counters = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counters[0]:
        z = net(x)
    with counters[1]:
        z.backward(z)
    return [counter.get_total_flops() / 2 / x.shape[1] for counter in counters]  # a MAC: 2 FLOP


def kept_bytes(net, x, bf16):
    """Count the bytes that autograd keeps of a forward pass of x, each storage once."""
    storages = {}  # by address, which stays theirs as long as they are in here

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            net(x)
    return sum(storage.nbytes() for storage in storages.values())


def measure_rate(net, x, macs):
    """Compute a pre-training step of so many MACs a recording -> FLOP/s, the fastest of three."""
    seconds = []
    for _ in range(1 + 3):  # the first one compiles
        began = time.perf_counter()
        z = net(x)
        z.backward(torch.randn_like(z))
        with torch.no_grad():
            net(x)  # for the key encoder
        seconds.append(time.perf_counter() - began)
    return 2 * macs * x.shape[1] / min(seconds[1:])


@functools.cache  # the frames of the paper's data sets have one shape
def measure(arch, T, size):
    """Measure a network -> (MACs forward, backward, bytes kept [float32, bf16], FLOP/s)."""
    models.prepare_cpu(size)  # as train.py, which compiles the LIF layers, too
    encoder = models.build(arch, size)
    net = torch.nn.Sequential(encoder, moco.ProjectionHead(encoder.dim, 128))
    x = torch.poisson(torch.full((T, 4, 2, size, size), 0.5))
    neuron.COMPILE = False
    forward, backward = count_macs(net, x)
    # what one more recording adds, because weights and their bf16 copies are kept once a batch
    kept = [kept_bytes(net, x[:, :3], bf16) - kept_bytes(net, x[:, :2], bf16)
            for bf16 in (False, True)]
    neuron.COMPILE = True
    return forward, backward, kept, measure_rate(net, x, 2 * forward + backward)


def number(*values):
    """Write numbers with three digits, or all before the point if those are more."""
    return ", ".join(f"{v:,.0f}" if v >= 100 else f"{v:#.3g}" for v in values)


def column(dataset, arch, flags):
    """Compute a column of the table -> {name of the row: cell}."""
    config = data.DATASETS[dataset] | {name: v for name, v in vars(flags).items() if v}
    T, size = config["n_frames"], config["image_size"]
    forward, backward, kept, cpu = measure(arch, T, size)
    step = 2 * forward + backward  # of the query both, of the key a forward pass
    labels = 10 * config["labels_per_class"] or TRAIN[dataset]  # toy, ten classes, or all labels
    pretraining = config["pretrain_epochs"] * TRAIN[dataset] * step
    finetuning = config["epochs"] * labels * (forward + backward)
    hours = 2 * (pretraining + finetuning) / 3600  # at 1 FLOP/s
    return {
        "": f"{dataset}, {arch}",
        "T x side x side": f"{T} x {size} x {size}",
        "recordings to train on": f"{TRAIN[dataset]:,}",
        "a recording's forward pass, 10^9 MACs": number(forward / 1e9),
        "a recording's pre-training step, 10^9 MACs": number(step / 1e9),
        "pre-training, fine-tuning, 10^15 MACs": number(pretraining / 1e15, finetuning / 1e15),
        "kept of a recording, float32, bf16, MiB": number(*(k / 2**20 for k in kept)),
        **{f"kept of {B}, float32, bf16, GiB": number(*(B * k / 2**30 for k in kept))
           for B in (16, 64)},
        "cached frames in uint8, GB": number(TOTAL[dataset] * T * 2 * size**2 / 1e9),
        **{f"hours at {rate} TFLOP/s": number(hours / rate / 1e12) for rate in (10, 50)},
        "measured on this CPU, GFLOP/s": number(cpu / 1e9),
        "hours at that rate": number(hours / cpu),
    }


parser = argparse.ArgumentParser()
parser.add_argument("--dataset", choices=data.DATASETS)
parser.add_argument("--arch")
parser.add_argument("--n-frames", type=int)
parser.add_argument("--image-size", type=int)
args = parser.parse_args()
datasets = [args.dataset] if args.dataset else ["cifar10dvs", "dvsgesture", "ncaltech101"]
archs = [args.arch] if args.arch else ["spikformer-2-256", "sew-resnet-18"]
columns = [column(dataset, arch, args) for dataset in datasets for arch in archs]
for i, name in enumerate(columns[0]):
    print(f"| {name} |", " | ".join(cells[name] for cells in columns), "|")
    if i == 0:
        print("|---" * (1 + len(columns)) + "|")
