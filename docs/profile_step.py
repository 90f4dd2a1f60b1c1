"""Say where the time of one pre-training step goes, by kind of operation; for GPUs and CPUs.

    python docs/profile_step.py --device cuda --arch spikformer-2-256 --batch 16

Prints the milliseconds of a step, its recordings per second and peak GPU memory, then the share of
each kind of kernel and of the time in which the GPU waits for the CPU. Random frames, by
default T = 16 of 128 x 128 pixels; the step is that of train.py, from frames to the optimizer.
"""
import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import models
import moco
import neuron
import train

KINDS = {  # the first kind of which a word is in the name of a kernel (GPU) or operation (CPU)
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "convolution": ("conv", "wgrad", "dgrad", "fprop", "cudnn_infer", "implicit_gemm"),
    "batch norm": ("batch_norm", "bn_", "batchnorm"),
    "LIF": ("lif", "compiledfxgraph", "call compiled"),
    "pooling": ("pool",),
    "matrix product": ("gemm", "bmm", "addmm", "mm", "matmul", "cutlass"),
    "compiled by Triton": ("triton",),
    "copy": ("copy", "memcpy", "memset", "cat", "clone", "fill"),
}


def kind_of(name):
    """Name the kind of an operation."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "other")


parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--arch", default="spikformer-2-256")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--n-frames", type=int, default=16)
parser.add_argument("--image-size", type=int, default=128)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--no-compile", action="store_true")
args = parser.parse_args()
neuron.COMPILE = not args.no_compile
on_gpu = torch.device(args.device).type == "cuda"

models.prepare_cpu(args.image_size)
net = moco.MoCo(models.build(args.arch, args.image_size), args.n_frames).to(args.device)
model = train.wrap_model(net, args)
optimizer = train.build_optimizer(net, 0.06)
size = args.n_frames, args.batch, 2, args.image_size, args.image_size
x = torch.poisson(torch.full(size, 0.5, device=args.device))


def steps(n):
    """Take n pre-training steps, then wait for the device."""
    def compute_loss(x, y):
        return model(data.augment(x), data.augment(x)), net.accuracy
    train.train_one_epoch(compute_loss, [(x, None)] * n, optimizer, [1e-3] * n)


began = time.time()
steps(3)
print(f"first three steps, compilation included: {time.time() - began:.1f} s")
if on_gpu:
    torch.cuda.reset_peak_memory_stats()
began = time.time()
steps(args.steps)
ms = 1000 * (time.time() - began) / args.steps
print(f"{args.arch}, B = {args.batch}: {ms:.1f} ms a step, "
      f"{1000 * args.batch / ms:.0f} recordings/s"
      + (f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_gpu else ""))

with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
    began = time.time()
    steps(args.steps)
    wall = 1e6 * (time.time() - began)
time_of = Counter()
for event in profiler.key_averages():
    time_of[kind_of(event.key)] += (
        event.self_device_time_total if on_gpu else event.self_cpu_time_total)
if on_gpu:
    time_of["waiting for the CPU"] = max(0, wall - sum(time_of.values()))
for kind, microseconds in time_of.most_common():
    ms, share = microseconds / args.steps / 1000, 100 * microseconds / wall
    print(f"{kind:22} {ms:9.2f} ms  {share:5.1f} %")
