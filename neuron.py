"""The leaky integrate-and-fire (LIF) neuron, as its equations read, and its surrogate gradient.

A neuron has a membrane potential v, with v[0] = v_reset. At each time step t = 1 .. T it turns an
input current x into a spike s, 0 or 1:

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau   charge: go 1/tau of the way to v_reset + x
    s[t] = 1 if h[t] >= v_threshold else 0              fire
    v[t] = v_reset if s[t] else h[t]                    reset

The step function has no useful derivative. The backward pass takes that of an arctangent instead,

    ds/dh ~ alpha / 2 / (1 + (pi/2 * alpha * (h - v_threshold))^2)     (Fang et al. 2021, PLIF)

and takes s in the reset's equation as a constant (detached). Spikes and gradients equal those of
SpikingJelly 2.0.0's LIFNode(tau=2., detach_reset=True, surrogate_function=ATan(), step_mode='m').

Shapes: currents [T, ...] -> spikes [T, ...]. Nothing to reset between batches: no state is kept.
Tests: python -m pytest test_all.py -k lif
"""
import functools
import math
import warnings

import torch
from torch import nn


def lif_steps(x, tau, v_threshold, v_reset):
    """Run the equations over currents x [T, N] -> T pairs (h, s), each [N], s as bool."""
    # At least float32: in bf16 the membrane would lose small inputs to rounding.
    v = torch.full_like(x[0], v_reset, dtype=torch.promote_types(x.dtype, torch.float32))
    steps = []
    for xt in x.unbind(0):
        h = v + (xt - (v - v_reset)) / tau  # its derivatives are in lif_backward, by hand
        s = h >= v_threshold
        v = torch.where(s, v_reset, h)
        steps.append((h, s))
    return steps


def lif_forward(x, tau, v_threshold, v_reset, alpha):
    """Compute spikes from currents: x [T, N] -> [T, N]. alpha matters to lif_backward only."""
    steps = lif_steps(x, tau, v_threshold, v_reset)
    # s.to(x.dtype) would compile to slower code
    return torch.stack([torch.where(s, 1.0, 0.0).to(x.dtype) for _, s in steps])  # [T, N]


def lif_backward(x, grad_s, tau, v_threshold, v_reset, alpha):
    """Compute dL/dx from the currents x and grad_s = dL/ds, all [T, N].

    To save memory, h and s are computed again. Then time runs backwards from dL/dv[T] = 0:

        dL/dh[t]   = dL/ds[t] * ds/dh[t] + (0 if s[t] else dL/dv[t])
        dL/dx[t]   = dL/dh[t] / tau
        dL/dv[t-1] = dL/dh[t] * (1 - 1/tau)
    """
    steps = lif_steps(x, tau, v_threshold, v_reset)
    grad_v = torch.zeros_like(steps[0][0])  # [N]
    grad_x = []  # the last step first
    for (h, s), grad_st in zip(reversed(steps), reversed(grad_s.unbind(0))):
        surrogate = alpha / 2 / (1 + (math.pi / 2 * alpha * (h - v_threshold)) ** 2)
        grad_h = grad_st * surrogate + torch.where(s, 0.0, grad_v)
        grad_x.append((grad_h / tau).to(x.dtype))
        grad_v = grad_h * (1 - 1 / tau)
    return torch.stack(grad_x[::-1])  # [T, N]


class LIF(nn.Module):
    """A layer of LIF neurons: currents [T, ...] -> spikes [T, ...] of the same dtype.

    tau: time constant in steps, >= 1 (1: no memory); v_threshold > v_reset; alpha: steepness of
    the surrogate gradient. Raises ValueError otherwise. They are numbers without a gradient;
    docs/experiments.md has a subclass that learns tau.
    """

    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
        super().__init__()
        if tau < 1 or v_threshold <= v_reset:
            raise ValueError("a LIF neuron needs tau >= 1 and v_threshold > v_reset, "
                             f"got {tau}, {v_threshold}, {v_reset}")
        # in the order of lif_forward's arguments
        self.constants = float(tau), float(v_threshold), float(v_reset), float(alpha)

    def forward(self, x):
        return LIFFunction.apply(x, self.constants)  # lif_forward and lif_backward, below

    def extra_repr(self):
        return "tau={}, v_threshold={}, v_reset={}, alpha={}".format(*self.constants)


# ---------------------------------------------------- the same numbers, faster and in less memory

COMPILE = True  # train.py and eval.py clear it for --no-compile: slower, with the same numbers
MAX_COMPILED_STEPS = 32  # the compiler unrolls all steps, and takes minutes for 128


class LIFFunction(torch.autograd.Function):
    """lif_forward and lif_backward as one operation of autograd, which stores x only."""

    @staticmethod
    def forward(ctx, x, constants):
        ctx.save_for_backward(x)
        ctx.constants = constants
        return flatten_neurons(lif_forward, constants, x)

    @staticmethod
    def backward(ctx, grad_s):
        (x,) = ctx.saved_tensors
        return flatten_neurons(lif_backward, ctx.constants, x, grad_s), None


def flatten_neurons(function, constants, *tensors):
    """Apply lif_forward or lif_backward to tensors [T, ...] -> [T, ...], strided as the first.

    Neurons do not interact, so their order is free. Networks keep channels last (models.py); in the
    order in which memory holds the neurons, [T, N] is a view of the first tensor and no copy.
    """
    x = tensors[0]
    order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]  # time, then largest stride
    inverse = [order.index(axis) for axis in range(x.ndim)]
    matrices = [t.permute(order).reshape(len(t), -1) for t in tensors]  # [T, N]
    y = call(function, constants, *matrices)  # [T, N]
    return y.view([x.shape[axis] for axis in order]).permute(inverse)  # [T, ...]


def call(function, constants, *tensors):
    """Call lif_forward or lif_backward; if COMPILE, as one fused loop."""
    global COMPILE
    # While a whole network is being compiled, its compiler fuses the plain function with others.
    if COMPILE and len(tensors[0]) <= MAX_COMPILED_STEPS and not torch.compiler.is_compiling():
        for t in tensors:
            torch._dynamo.maybe_mark_dynamic(t, 1)  # N: one kernel for layers of every size
        try:
            return compiled(function, constants)(*tensors)
        except torch.OutOfMemoryError:  # no fault of the compiler
            raise
        except Exception as e:  # no C++ compiler, for one
            reason = str(e).strip().split("\n")[0][:200]
            warnings.warn(f"LIF layers run uncompiled: slower, with the same numbers ({reason})")
            COMPILE = False
    return function(*tensors, *constants)


@functools.cache
def compiled(function, constants):
    """Compile the function for these constants; as arguments they would cost half the speed."""
    torch._dynamo.config.recompile_limit = 64  # a variant for each function, constants, T, dtype
    # dynamic=False, or a constant that differs between layers is taken for a variable, wrongly.
    return torch.compile(lambda *tensors: function(*tensors, *constants), dynamic=False)
