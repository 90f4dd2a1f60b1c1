"""The leaky integrate-and-fire (LIF) neuron, as its equations read, and its surrogate gradient.

For every neuron and time step t, with input current x, membrane potential v and spike s:

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau   charge: leak towards v_reset, add input
    s[t] = 1 if h[t] >= v_threshold else 0              fire
    v[t] = v_reset if s[t] else h[t]                    reset; before the first step v = v_reset

The step function has no useful derivative. The backward pass takes that of an arctangent instead,

    ds/dh ~ alpha / 2 / (1 + (pi/2 * alpha * (h - v_threshold))^2)     (Fang et al. 2021, PLIF)

and treats the reset as a constant (detached). Spikes and gradients equal those of SpikingJelly
2.0.0's LIFNode(tau=2., detach_reset=True, surrogate_function=ATan(), step_mode='m').

Shapes: currents [T, ...] -> spikes [T, ...], time first. A layer keeps no state between calls, so
there is nothing to reset between batches.
Tests: python -m pytest test_all.py -k lif
"""
import functools
import math
import warnings

import torch
from torch import nn


def charge(v, x, tau, v_reset):
    """Compute the membrane h[t] before firing from v[t-1] and the input current x[t]."""
    return v + (x - (v - v_reset)) / tau


def lif_forward(x, tau, v_threshold, v_reset, alpha):
    """Compute spikes, 0 or 1, from currents: x [T, N] -> [T, N]. alpha is for lif_backward only."""
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))  # [N]
    spikes = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        s = h >= v_threshold
        v = torch.where(s, v_reset, h)
        spikes.append(torch.where(s, 1.0, 0.0).to(x.dtype))  # s.to(x.dtype) compiles to slower code
    return torch.stack(spikes)  # [T, N]


def lif_backward(x, grad_s, tau, v_threshold, v_reset, alpha):
    """Compute dL/dx from the currents x and grad_s = dL/ds, all [T, N].

    The membrane is computed again from x; then time runs backwards from dL/dv[T] = 0:

        dL/dh[t]   = dL/ds[t] * ds/dh + (0 if s[t] else dL/dv[t])
        dL/dx[t]   = dL/dh[t] / tau
        dL/dv[t-1] = dL/dh[t] * (1 - 1/tau)
    """
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))  # [N]
    membrane = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        membrane.append(h)
        v = torch.where(h >= v_threshold, v_reset, h)
    grad_v = torch.zeros_like(v)  # [N]
    grad_x = []  # the last step first
    for h, grad_st in zip(reversed(membrane), reversed(grad_s.unbind(0))):
        surrogate = alpha / 2 / (1 + (math.pi / 2 * alpha * (h - v_threshold)) ** 2)
        grad_h = grad_st * surrogate + torch.where(h >= v_threshold, 0.0, grad_v)
        grad_x.append((grad_h / tau).to(x.dtype))
        grad_v = grad_h * (1 - 1 / tau)
    return torch.stack(grad_x[::-1])  # [T, N]


def membrane_dtype(x):
    """Return float32 or wider: in bf16 a membrane would lose small inputs to rounding."""
    return torch.promote_types(x.dtype, torch.float32)


class LIF(nn.Module):
    """A stateless layer of LIF neurons: currents [T, ...] -> spikes [T, ...] of the same dtype.

    tau: membrane time constant in time steps, >= 1 (1: no memory); v_threshold, v_reset: in units
    of the membrane; alpha: steepness of the surrogate gradient. Raises ValueError otherwise.
    For parameters to learn, start from `slow_lif` in test_all.py, which autograd differentiates.
    """

    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
        super().__init__()
        if tau < 1 or v_threshold <= v_reset:
            raise ValueError("a LIF neuron needs tau >= 1 and v_threshold > v_reset, "
                             f"got {tau}, {v_threshold}, {v_reset}")
        self.constants = float(tau), float(v_threshold), float(v_reset), float(alpha)

    def forward(self, x):
        return LIFFunction.apply(x, self.constants)

    def extra_repr(self):
        return "tau={}, v_threshold={}, v_reset={}, alpha={}".format(*self.constants)


# ---------------------------------------------------- the same numbers, faster and in less memory

COMPILE = True  # train.py and eval.py clear it for --no-compile: slower, with the same numbers


class LIFFunction(torch.autograd.Function):
    """lif_forward and lif_backward as one autograd operation that saves x only."""

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
    """Apply lif_forward or lif_backward to tensors [T, ...] -> [T, ...] in the same layout.

    Neurons do not interact: read in the order of its memory, any tensor is a [T, N] matrix.
    """
    x = tensors[0]
    order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]  # time, then largest stride
    inverse = [order.index(axis) for axis in range(x.ndim)]
    y = run(function, constants, *(t.permute(order).reshape(len(t), -1) for t in tensors))  # [T, N]
    return y.view([x.shape[axis] for axis in order]).permute(inverse)  # [T, ...]


def run(function, constants, *tensors):
    """Call lif_forward or lif_backward, compiled if COMPILE: one loop, not 5 T operations."""
    global COMPILE
    # Inside a compiled network the outer compiler fuses the plain function with its neighbours.
    if COMPILE and not torch.compiler.is_compiling():
        for t in tensors:
            torch._dynamo.maybe_mark_dynamic(t, 1)  # one kernel for layers of every size
        try:
            return compiled(function, constants)(*tensors)
        except Exception as e:
            reason = str(e).strip().split("\n")[0][:200]
            warnings.warn(f"LIF layers run uncompiled: slower, with the same numbers ({reason})")
            COMPILE = False
    return function(*tensors, *constants)


@functools.cache
def compiled(function, constants):
    """Compile the function for these constants; as arguments they would cost half the speed."""
    torch._dynamo.config.recompile_limit = 64  # variants: functions x constants x T
    return torch.compile(lambda *tensors: function(*tensors, *constants))
