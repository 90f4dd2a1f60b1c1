"""The two spiking encoders of the paper, SEW-ResNet-18 and Spikformer-2-256, and the classifier on top.

Both are stacks of one block, convolution -> batch norm -> (max-pool) -> LIF, joined by sums of spikes:

    SEW-ResNet (Fang et al. 2021):  x + block(block(x)), "spike-element-wise" addition
    Spikformer (Zhou et al. 2023):  four blocks make the image tokens; then, per layer, x + attention(x), x + mlp(x),
                                    where attention is q (k^T v) / 8 on spikes: no softmax, for nothing is negative

Shapes: frames [T, B, 2, H, W] -> features [T, B, D], the mean over space per time step. Convolutions: [T*B, C, H, W].
`state_dict()` has the tensors of SpikingJelly 2.0.0's spikformer.Spikformer and sew_resnet.sew_resnet18(cnf="ADD") in
the same order and sizes (1x1 kernels up to trailing ones), so weights can be exchanged by position.
Tested by `python -m pytest test_all.py -k models`.
"""
import re

import torch
import torch.nn.functional as F
from torch import nn

from neuron import LIF, gradient_of, per_neuron, spikes_of

POOL = 3, 2, 1  # kernel, stride and padding of every max-pool: it halves the image


class ConvLIF(nn.Module):
    """Convolution -> batch norm -> max-pool (if pool) -> LIF: [T, B, C, H, W] -> spikes [T, B, C', H', W'].

    first: the input may be any numbers, as of frames; otherwise it must be spikes or sums of them, whole numbers below
    256, which LeanConvLIF keeps as bytes. ValueError for any other, if the last frame shows it.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, pool=False, first=False):
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        # Chosen: with a scale of 1, as usual, only about 2 % of the neurons fire at first; with 2 it is 15 to 50 %.
        nn.init.constant_(self.bn.weight, 2.0)
        self.pool = nn.MaxPool2d(*POOL) if pool else nn.Identity()
        self.lif = LIF()

    def forward(self, x):
        # LeanConvLIF knows no autocast, and of these modules no others and no setting that is not used here; a compiler
        # picks itself what to keep.
        plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        parts = list(self.children())
        own = {type(part) for part in parts} <= {nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.Identity, LIF}
        own &= self.conv.bias is None and self.conv.padding_mode == "zeros"
        if own and all(part.training for part in parts) and not plain:
            return LeanConvLIF.apply(x, self.conv.weight, self.bn.weight, self.bn.bias, self)
        current = self.pool(self.bn(self.conv(x.flatten(0, 1))))  # [T*B, C', H', W']
        return self.lif(current.unflatten(0, x.shape[:2]))  # [T, B, C', H', W']


class LeanConvLIF(torch.autograd.Function):
    """ConvLIF in training, the same numbers in less memory; on a first reading, skip to the networks below.

    Kept for backward are the input, a byte per spike, and the convolution's output c; all else is cheap to recompute.
    PyTorch on its own also keeps the outputs of batch norm and pool, the places of the maxima, and four bytes per
    spike: a step of Spikformer-2-256 (batch 4) then peaks at 1,080 MiB instead of 670, in about the same time. The pool
    comes before batch norm here: it picks the same values (minima where weight < 0) and leaves a quarter to normalise.
    With mean m and variance var of a channel's n values c, z = (c - m) / sqrt(var + eps) and y = weight z + bias:

        dL/dc = weight / sqrt(var + eps) * (dL/dy - sum(dL/dy) / n - z sum(z dL/dy) / n)     dL/dy = 0 where not picked
    """

    @staticmethod
    def forward(ctx, x, kernel, weight, bias, block):
        ctx.block, ctx.TB, bn = block, x.shape[:2], block.bn
        x = x.flatten(0, 1)
        c = block.conv(x)  # [T*B, C, H, W]; from here on C, H, W are the convolution's, H', W' the pool's
        mean, var = torch.batch_norm_update_stats(c, bn.running_mean, bn.running_var, bn.momentum)  # updates running_*
        bn.num_batches_tracked += 1
        kept = x if block.first else x.byte()
        if not block.first and (kept[-1, :, ::8] != x[-1, :, ::8]).any():  # a look at all takes a twentieth of a step
            raise ValueError("ConvLIF takes whole numbers from 0 to 255, or any with first=True")
        ctx.save_for_backward(kept, kernel, weight, bias, c, mean, var)
        return per_neuron(spikes_of, block.lif.constants, LeanConvLIF.current(ctx, c, weight, bias, mean, var)[0])

    @staticmethod
    def current(ctx, c, weight, bias, mean, var):
        """The LIF's input [T, B, C, H', W']; the values of c that the pool picked and their places [T*B, C, H', W']."""
        index = None
        if isinstance(ctx.block.pool, nn.MaxPool2d):
            flipped = (weight < 0).any()  # batch norm turns the least value of such a channel into the largest
            sign = torch.where(weight < 0, -1, 1)[:, None, None]
            size = ctx.block.pool.kernel_size, ctx.block.pool.stride, ctx.block.pool.padding
            c, index = F.max_pool2d(c * sign if flipped else c, *size, return_indices=True)
            c = c * sign if flipped else c
        y = F.batch_norm(c, mean, var, weight, bias, eps=ctx.block.bn.eps)
        return y.unflatten(0, ctx.TB), c, index

    @staticmethod
    def backward(ctx, g):
        x, kernel, weight, bias, c, mean, var = ctx.saved_tensors
        conv, aten = ctx.block.conv, torch.ops.aten
        current, picked, index = LeanConvLIF.current(ctx, c, weight, bias, mean, var)
        g = per_neuron(gradient_of, ctx.block.lif.constants, current, g).flatten(0, 1)  # dL/dy [T*B, C, H', W']
        # With mean and variance held fixed: weight * rstd * dL/dy, gweight = sum(z dL/dy), gbias = sum(dL/dy).
        rstd, n = (var + ctx.block.bn.eps).rsqrt(), c.numel() / len(weight)
        g, gweight, gbias = aten.native_batch_norm_backward(
            g, picked, weight, mean, var, mean, rstd, False, ctx.block.bn.eps, [True] * 3)  # False: both fixed
        if index is not None:
            pool = ctx.block.pool
            g = aten.max_pool2d_with_indices_backward(  # [T*B, C, H, W]
                g, c, [pool.kernel_size], [pool.stride], [pool.padding], [1], False, index)  # dilation 1, no ceil_mode
        # The gradient through mean and variance, for every value of c: slope * (c - mean) - weight * rstd * gbias / n.
        slope = -weight * rstd.square() * gweight / n
        g.addcmul_(c, slope[:, None, None]).sub_((weight * rstd * gbias / n + slope * mean)[:, None, None])
        needed = [ctx.needs_input_grad[0], True, False]  # of input, kernel, bias
        gx, gkernel, _ = aten.convolution_backward(
            g, x.to(g.dtype), kernel, None, conv.stride, conv.padding, [1, 1], False, [0, 0], 1, needed)
        gkernel = gkernel.flatten().view_as(kernel)  # in the kernel's memory format: DistributedDataParallel wants that
        return gx if gx is None else gx.unflatten(0, ctx.TB), gkernel, gweight, gbias, None


class SEWBlock(nn.Module):
    """Two 3x3 convolutions, whose spikes are added to the shortcut's: [T, B, C, H, W] -> [T, B, C', H', W']."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = ConvLIF(c_in, c_out, 3, stride)
        self.conv2 = ConvLIF(c_out, c_out, 3)
        self.shortcut = nn.Identity() if stride == 1 and c_in == c_out else ConvLIF(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.shortcut(x) + self.conv2(self.conv1(x))


class SEWResNet18(nn.Module):
    """SEW-ResNet-18 (Fang et al. 2021, ADD) of `width` channels in stage 1: [T, B, 2, H, W] -> [T, B, 8 * width].

    From 64 pixels on the stem is ResNet's 7x7 convolution of stride 2 and max-pool; below, a 3x3 convolution alone.
    """

    def __init__(self, width=64, image_size=128):
        super().__init__()
        self.dim = 8 * width
        large = image_size >= 64
        self.stem = ConvLIF(2, width, 7, 2, first=True) if large else ConvLIF(2, width, 3, first=True)
        self.pool = nn.MaxPool2d(*POOL) if large else nn.Identity()
        blocks, c_in = [], width
        for c_out, stride in (width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2):  # the four stages
            blocks += [SEWBlock(c_in, c_out, stride), SEWBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")  # as published

    def forward(self, x):
        x = self.stem(channels_last(x))
        x = self.pool(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # [T, B, C, H, W]
        return self.blocks(x).mean((3, 4))  # [T, B, D]


class Attention(nn.Module):
    """Spiking self-attention with heads of 16 channels, [T, B, C, H, W] -> spikes [T, B, C, H, W]; tokens L = H * W."""

    def __init__(self, dim):
        super().__init__()
        self.qkv = ConvLIF(dim, 3 * dim, 1)  # one convolution for all three
        self.lif = LIF(v_threshold=0.5)
        self.proj = ConvLIF(dim, dim, 1)

    def forward(self, x):
        size = x.shape[3:]
        tokens = self.qkv(x).flatten(3).mT.unflatten(3, (3, -1, 16))  # [T, B, L, 3, heads, 16]
        q, k, v = tokens.permute(3, 0, 1, 4, 2, 5)  # 3 times [T, B, heads, L, 16]
        # Without softmax the product may be taken in either order: k^T v is 16 x 16 where q k^T is L x L.
        y = q @ (k.mT @ v) * 0.125  # [T, B, heads, L, 16]; the scale as published
        y = self.lif(y.transpose(2, 3).flatten(3))  # [T, B, L, C]
        return self.proj(y.mT.unflatten(3, size))  # [T, B, C, H, W]


class Spikformer(nn.Module):
    """Spikformer-`depth`-`dim` (Zhou et al. 2023): [T, B, 2, H, W] -> [T, B, dim].

    From 64 pixels on, all four blocks of the stem halve the image (16-pixel patches); below, only the last two (4).
    """

    def __init__(self, depth=2, dim=256, image_size=128):
        super().__init__()
        self.dim = dim
        widths = [2, dim // 8, dim // 4, dim // 2, dim]
        self.stem = nn.Sequential(*[
            ConvLIF(widths[i], widths[i + 1], 3, pool=(image_size >= 64 or i >= 2), first=(i == 0)) for i in range(4)
        ])
        self.position = ConvLIF(dim, dim, 3)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            self.layers.append(Attention(dim))
            self.layers.append(nn.Sequential(ConvLIF(dim, 4 * dim, 1), ConvLIF(4 * dim, dim, 1)))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)  # as published

    def forward(self, x):
        x = self.stem(channels_last(x))
        x = x + self.position(x)
        for layer in self.layers:
            x = x + layer(x)
        return x.mean((3, 4))  # [T, B, D]


def channels_last(x):
    """x [T, B, C, H, W] with the channels of a pixel side by side in memory, as every later layer keeps them.

    Max-pooling is ten times faster that way, and batch norm and 1x1 convolutions need no reordering.
    """
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


class Classifier(nn.Module):
    """An encoder, a linear head: [T, B, 2, H, W] -> logits [T, B, num_classes]; a prediction is their mean over T."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.encoder(x))


def build(arch, image_size):
    """The encoder called `arch`, for frames of image_size x image_size pixels; .dim is its number of features.

    arch: "sew-resnet-18" | "spikformer-2-256"; other sizes as "sew-resnet-18-<width of stage 1>",
    "spikformer-<depth>-<dim>" (depth at most 100, dim a multiple of 16). Raises ValueError for any other name.
    """
    if m := re.fullmatch(r"sew-resnet-18(?:-([1-9]\d*))?", arch):
        return SEWResNet18(int(m[1] or 64), image_size)
    m = re.fullmatch(r"spikformer-([1-9]\d*)-([1-9]\d*)", arch)
    if m and int(m[2]) % 16 == 0 and int(m[1]) <= 100:  # sums in deeper ones could overflow LeanConvLIF's bytes
        return Spikformer(int(m[1]), int(m[2]), image_size)
    raise ValueError(f"no backbone is called {arch!r}: choose sew-resnet-18, sew-resnet-18-<width>, spikformer-2-256 "
                     "or spikformer-<depth>-<dim>, depth at most 100, dim a multiple of 16")
