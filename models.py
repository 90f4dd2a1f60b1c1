"""The spiking encoders of the paper, SEW-ResNet-18 and Spikformer-2-256, and the classifier.

Both are stacks of one block, convolution -> batch norm -> (max-pool) -> LIF, joined by sums:

    SEW-ResNet (Fang et al. 2021)   x + block(block(x)), "spike-element-wise" addition; block(x)
                                    in place of x where the shape changes
    Spikformer (Zhou et al. 2023)   four blocks turn the image into tokens; x + block(x) adds
                                    position; then, depth times, x + attention(x) and x + mlp(x),
                                    where attention is block(LIF((q k^T) v / 8)) of spikes q, k,
                                    v, no softmax

Only LIF layers see time: the others see a batch of T*B images. Both follow SpikingJelly 2.0.0's
Spikformer and sew_resnet18(cnf="ADD"), whose weights fit: state_dict() has the same tensors in the
same order, under other names, and [C, C, 1, 1] for Conv1d's [C, C, 1]. Spikformer's authors, for
CIFAR10-DVS, pool after the LIF, scale by 1/4 and keep PyTorch's initial weights of convolutions.
Shapes: frames [T, B, 2, H, W] -> features [T, B, D], the mean over space.
Tests: python -m pytest test_all.py -k models
"""
import argparse
import ctypes
import os
import re
import sys

import torch
import torch.nn.functional as F
from torch import nn

from neuron import LIF

HALVE = dict(kernel_size=3, stride=2, padding=1)  # settings of every max-pool
THREADS = torch.get_num_threads()  # before prepare_cpu changes it


class ConvLIF(nn.Module):
    """Convolution, batch norm, max-pool (if pool), LIF: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, c_in, c_out, kernel, stride=1, pool=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        # Our choice: untrained, a weight of 1 (PyTorch's) lets 3 % of the neurons spike at a time
        # step, in attention none; 2 lets 10 to 15 %, and more after a max-pool.
        nn.init.constant_(self.bn.weight, 2.0)
        self.pool = nn.MaxPool2d(**HALVE) if pool else nn.Identity()
        self.lif = LIF()

    def forward(self, x):
        current = self.pool(self.bn(self.conv(x.flatten(0, 1))))  # [T*B, C', H', W']
        return self.lif(current.unflatten(0, x.shape[:2]))  # [T, B, C', H', W']


class SEWBlock(nn.Module):
    """Add the spikes of two 3x3 ConvLIFs to their input: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = ConvLIF(c_in, c_out, 3, stride)
        self.conv2 = ConvLIF(c_out, c_out, 3)
        same_shape = stride == 1 and c_in == c_out
        self.downsample = nn.Identity() if same_shape else ConvLIF(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.downsample(x) + self.conv2(self.conv1(x))


class SEWResNet18(nn.Module):
    """SEW-ResNet-18: [T, B, 2, H, W] -> [T, B, 8 * width]; width: channels of the first stage.

    From 64 pixels on, stem and pool are ResNet's, which divide the image's sides by 4.
    """

    def __init__(self, width=64, image_size=128):
        super().__init__()
        self.dim = 8 * width
        large = image_size >= 64
        self.stem = ConvLIF(2, width, 7, 2) if large else ConvLIF(2, width, 3)
        self.pool = nn.MaxPool2d(**HALVE) if large else nn.Identity()  # of spikes
        blocks, c_in = [], width
        for c_out, stride in (width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2):  # stages
            blocks += [SEWBlock(c_in, c_out, stride), SEWBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # ResNet's

    def forward(self, x):
        x = self.stem(channels_last(x))  # [T, B, width, H', W']
        x = self.pool(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # [T, B, width, H'', W'']
        return self.blocks(x).mean((3, 4))  # [T, B, D]


class SpikingSelfAttention(nn.Module):
    """Attention of L = H * W tokens, each head of 16 of the C channels: [T, B, C, H, W] -> same."""

    def __init__(self, dim):
        super().__init__()
        self.qkv = ConvLIF(dim, 3 * dim, 1)  # one convolution for all three
        self.lif = LIF(v_threshold=0.5)  # as published; 1 elsewhere
        self.proj = ConvLIF(dim, dim, 1)

    def forward(self, x):
        H, W = x.shape[3:]
        tokens = self.qkv(x).flatten(3).mT.unflatten(3, (3, -1, 16))  # [T, B, L, 3, heads, 16]
        q, k, v = tokens.permute(3, 0, 1, 4, 2, 5)  # each [T, B, heads, L, 16]
        # (q k^T) v = q (k^T v) where there is no softmax, and k^T v is 16 x 16 instead of L x L.
        y = q @ (k.mT @ v) * 0.125  # [T, B, heads, L, 16]; 1/8 as in SpikingJelly, not 1/sqrt(16)
        y = self.lif(y.transpose(2, 3).flatten(3))  # [T, B, L, C]
        return self.proj(y.mT.unflatten(3, (H, W)))  # [T, B, C, H, W]


class Spikformer(nn.Module):
    """Spikformer-<depth>-<dim>: [T, B, 2, H, W] -> [T, B, dim].

    From 64 pixels on, each of the stem's four blocks halves the image's sides (a token is a patch
    of 16 x 16 pixels); for smaller images, only the last two do (4 x 4).
    """

    def __init__(self, depth=2, dim=256, image_size=128):
        super().__init__()
        self.dim = dim
        widths = [2, dim // 8, dim // 4, dim // 2, dim]
        self.stem = nn.Sequential(*[
            ConvLIF(widths[i], widths[i + 1], 3, pool=image_size >= 64 or i >= 2)
            for i in range(4)])
        self.pos_embed = ConvLIF(dim, dim, 3)
        self.layers = nn.ModuleList()  # attention, MLP, attention, MLP, ...
        for _ in range(depth):
            self.layers.append(SpikingSelfAttention(dim))
            self.layers.append(nn.Sequential(ConvLIF(dim, 4 * dim, 1), ConvLIF(4 * dim, dim, 1)))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)

    def forward(self, x):
        x = self.stem(channels_last(x))  # [T, B, D, H', W']
        x = x + self.pos_embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return x.mean((3, 4))  # [T, B, D]


def channels_last(x):
    """Store the channels of a pixel side by side, a layout that later layers keep; same shape."""
    if x.device.type == "mps":  # where the gradient of batch norm would be wrong (pytorch#175189)
        return x
    # On a CPU, this makes max-pooling ten times faster, and 1x1 convolutions need no reordering.
    flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # [T*B, C, H, W]
    return flat.unflatten(0, x.shape[:2])  # [T, B, C, H, W]


class Classifier(nn.Module):
    """Encoder, a linear head for each step: [T, B, 2, H, W] -> logits [T, B, classes].

    The prediction is the class whose logit is the largest on average over T.
    freeze_encoder: only the heads learn; the encoder stays in evaluation mode.
    """

    def __init__(self, encoder, num_classes, n_frames, freeze_encoder=False):
        super().__init__()
        self.encoder, self.freeze_encoder = encoder, freeze_encoder
        if freeze_encoder:  # else as it is: a backbone of your own may have frozen parts
            encoder.requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(encoder.dim, num_classes) for _ in range(n_frames))
        for head in self.heads:
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.freeze_encoder)  # batch norm, dropout
        return self

    def forward(self, x):
        features = self.encoder(x)  # [T, B, D]
        logits = [head(z) for head, z in zip(self.heads, features, strict=True)]
        return torch.stack(logits)  # [T, B, classes]


def build(arch, image_size):
    """Build the encoder called arch for square frames of image_size pixels; its .dim is D.

    arch: "sew-resnet-18-<width>", width (64 if left out) a multiple of 8, or
    "spikformer-<depth>-<dim>", dim a multiple of 16. Raises ValueError for any other name.
    """
    if m := re.fullmatch(r"sew-resnet-18(?:-([1-9]\d*))?", arch):
        width = int(m[1] or 64)
        if width % 8:
            raise ValueError(f"{arch}: the width must be a multiple of 8: on some CPUs, PyTorch "
                             "hangs in the backward pass of narrower 1x1 convolutions")
        return SEWResNet18(width, image_size)
    m = re.fullmatch(r"spikformer-([1-9]\d*)-([1-9]\d*)", arch)
    if m and int(m[2]) % 16 == 0:
        return Spikformer(int(m[1]), int(m[2]), image_size)
    raise ValueError(f"no backbone is called {arch!r}: choose sew-resnet-18, spikformer-2-256, "
                     "sew-resnet-18-<width> or spikformer-<depth>-<dim>, dim a multiple of 16")


# -------------------------------------------------------------------------------- using a network

def autocast(device):
    """Choose the precision of a forward pass: bf16 on GPUs from Ampere on, else float32.

    float16 can overflow in sums of spikes, and bf16 is slower on CPUs without bf16 units.
    """
    kind = torch.device(device).type
    enabled = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def device(name):
    """Return the name of a device that PyTorch can compute on: a type for argparse."""
    try:
        torch.ones(1, device=name).item()
    except Exception as e:
        raise argparse.ArgumentTypeError(f"PyTorch cannot compute on {name} here ({e})")
    return name


def prepare_cpu(image_size):
    """Compute in one thread where frames are small, and keep freed memory: docs/performance.md.

    Threads that wait for each other at every small operation make a step 10 times slower beside a
    busy process; one is 1.3 to 1.7 times slower on an idle machine. OMP_NUM_THREADS overrides this.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if image_size < 64 else THREADS)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc, which else gives each large block back to the kernel
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


@torch.no_grad()
def predict(model, batches):
    """Run model over (x, y) -> features or logits [T, N, D] on the CPU; leave it in eval mode."""
    model.eval()
    outputs = []
    for x, _ in batches:
        with autocast(x.device):
            outputs.append(model(x).float().cpu())  # [T, B, D]
    return torch.cat(outputs, 1)


def fit_linear(features, labels, num_classes):
    """Fit a linear classifier to features [N, D] with labels [N] -> nn.Linear, on the CPU.

    Cross-entropy on standardised features, L2 penalty on the weights, up to 200 steps of L-BFGS.
    """
    mean = features.mean(0)
    std = features.std(0, correction=0) + 1e-3  # a feature that hardly varies is not blown up
    standardised = (features - mean) / std
    head = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(standardised), labels)
        loss = loss + 1e-3 / 2 * head.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():  # w (x - mean) / std + b = (w / std) x + (b - (w / std) mean)
        head.weight /= std
        head.bias -= head.weight @ mean
    return head


def load_model(path, device="cpu"):
    """Rebuild the network of a checkpoint -> (network in evaluation mode, checkpoint).

    The network is the encoder for pretrained.pt, a Classifier for finetuned.pt; the checkpoint is a
    dict of kind, args, classes, weights and trained_on: ids of recordings, see data.recording_id.
    No code of an untrusted file runs. Raises OSError if there is no such file or it does not fit.
    """
    open(path, "rb").close()  # raises an OSError that names the file; torch.load's may not
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "trained_on" not in checkpoint:
            raise ValueError("a state.pt, or written by an earlier version")
        model = build(checkpoint["args"]["arch"], checkpoint["args"]["image_size"])
        if checkpoint["kind"] == "finetuned":
            n_frames = checkpoint["args"]["n_frames"]
            model = Classifier(model, len(checkpoint["classes"]), n_frames)
        model.load_state_dict(checkpoint["weights"])
    except Exception as e:  # there is no list of all that a foreign file may raise
        reason = " ".join(f"{type(e).__name__}: {e}".split()).split(". ")[0][:200]
        raise OSError(f"{path}: not a checkpoint of this train.py ({reason})")
    return model.to(device).eval(), checkpoint
