"""The leaky integrate-and-fire (LIF) neuron, written once as its equations read, and its surrogate gradient.

For every neuron and time step t, with input current x and membrane potential v (v = v_reset before the first step):

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau     charge: leak towards v_reset, add the input
    s[t] = 1 if h[t] >= v_threshold else 0                fire
    v[t] = v_reset if s[t] else h[t]                      reset

The step function has no useful derivative; backward uses that of a scaled arctangent instead (Fang et al. 2021),

    ds/dh ~ alpha / 2 / (1 + (pi/2 * alpha * (h - v_threshold))^2)

and treats the reset as a constant (detached). These are the numbers of SpikingJelly 2.0.0's
LIFNode(tau=2., detach_reset=True, surrogate_function=ATan(), step_mode='m').

Shapes: currents [T, ...] -> spikes [T, ...], time first. The module keeps no state between calls: nothing to reset
between batches, nothing of it in a checkpoint, and two encoders cannot disturb one another.
Guarded by `python -m pytest test_all.py -k lif`.
"""
import functools
import math
import warnings

import torch
from torch import nn


def charge(v, x, tau, v_reset):
    """h[t] from v[t-1] and x[t]."""
    return v + (x - (v - v_reset)) / tau


def spikes_of(x, tau, v_threshold, v_reset, alpha):
    """Currents x [T, N] -> spikes [T, N], 0 or 1 in x's dtype."""
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))
    spikes = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        s = h >= v_threshold
        v = torch.where(s, v_reset, h)
        spikes.append(torch.where(s, 1.0, 0.0).to(x.dtype))  # s.to(dtype) would not vectorise: 170 ms for 11, compiled
    return torch.stack(spikes)  # [T, N]


def gradient_of(x, g, tau, v_threshold, v_reset, alpha):
    """Currents x and the spikes' gradient g, both [T, N] -> the currents' gradient [T, N].

    The membrane is computed again from x, so x is all that a forward pass has to keep; then time runs backwards:
        dL/dh[t]   = dL/ds[t] * ds/dh + (0 if s[t] else dL/dv[t])       gh; no later step follows the last: there dL/dv = 0
        dL/dv[t-1] = dL/dh[t] * (1 - 1/tau)                             gv
        dL/dx[t]   = dL/dh[t] / tau                                     gradient
    """
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))
    membrane = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        membrane.append(h)
        v = torch.where(h >= v_threshold, v_reset, h)
    gv = torch.zeros_like(v)  # [N]
    gradient = []  # last step first
    for h, gs in zip(reversed(membrane), reversed(g.unbind(0))):
        surrogate = alpha / 2 / (1 + (math.pi / 2 * alpha * (h - v_threshold)) ** 2)
        gh = gs * surrogate + torch.where(h >= v_threshold, 0.0, gv)
        gv = gh * (1 - 1 / tau)
        gradient.append((gh / tau).to(x.dtype))
    return torch.stack(gradient[::-1])  # [T, N]


def membrane_dtype(x):
    """float32 at least: in bf16 or fp16 the leak would be lost in rounding."""
    return torch.promote_types(x.dtype, torch.float32)


class LIF(nn.Module):
    """A layer of LIF neurons without state: currents [T, ...] -> spikes [T, ...], in x's dtype and memory format.

    tau: membrane time constant in time steps (>= 1; 1: no memory); v_threshold, v_reset: in units of the membrane;
    alpha: steepness of the surrogate gradient. Source: module docstring.
    """

    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
        super().__init__()
        if tau < 1 or v_threshold <= v_reset:
            raise ValueError(f"a LIF neuron needs tau >= 1 and v_threshold > v_reset, got {tau}, {v_threshold}, {v_reset}")
        self.constants = float(tau), float(v_threshold), float(v_reset), float(alpha)

    def forward(self, x):
        return _LIF.apply(x, self.constants)

    def extra_repr(self):
        return "tau={}, v_threshold={}, v_reset={}, alpha={}".format(*self.constants)


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, constants):
        ctx.save_for_backward(x)
        ctx.constants = constants
        return per_neuron(spikes_of, constants, x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return per_neuron(gradient_of, ctx.constants, x, g), None


def per_neuron(pass_, constants, *tensors):
    """One of the two passes above over tensors [T, ...] -> [T, ...] in the memory format of the first.

    Neurons do not meet one another, so any memory format is a [T, N] matrix when read in the order of its bytes.
    """
    x = tensors[0]
    order = [0] + sorted(range(1, x.ndim), key=x.stride, reverse=True)  # time, then from the largest stride to the smallest
    back = [order.index(i) for i in range(x.ndim)]  # the inverse permutation
    y = run(pass_, constants, *(t.permute(order).reshape(len(t), -1) for t in tensors))  # [T, N]
    return y.view([x.shape[i] for i in order]).permute(back)  # [T, ...]


# Compiling takes about half a minute once a machine and seconds once a run, and makes a layer about 15 times faster: it starts
# when this many currents have gone through, a tenth of a second of work, so that a test does not wait for it. None: never.
COMPILE_AFTER = 2**23
_work = 0


def run(pass_, constants, *tensors):
    """One of the two passes above: fused into a single loop over the bytes by torch.compile where that pays."""
    global _work, COMPILE_AFTER
    if torch.compiler.is_compiling():  # an outer compiler fuses the plain function with its neighbours
        return pass_(*tensors, *constants)
    _work += tensors[0].numel()
    if COMPILE_AFTER is not None and _work > COMPILE_AFTER:
        for t in tensors:
            torch._dynamo.maybe_mark_dynamic(t, 1)  # one kernel for layers of every size
        try:
            return fused(pass_, constants)(*tensors)
        except Exception as e:
            warnings.warn(f"LIF runs uncompiled, slower with the same numbers: {str(e)[:200].strip().partition(chr(10))[0]}")
            COMPILE_AFTER = None
    return pass_(*tensors, *constants)


@functools.cache
def fused(pass_, constants):
    """pass_ compiled with its constants closed over: as arguments the compiler would make them variables, at half the speed."""
    torch._dynamo.config.recompile_limit = 64  # for all LIFs together: passes x thresholds x T x types; past it they run uncompiled
    return torch.compile(lambda *tensors: pass_(*tensors, *constants))
