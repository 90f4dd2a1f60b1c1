"""The leaky integrate-and-fire (LIF) neuron, written as its equations read, and its surrogate gradient.

For every neuron and time step t, with input current x and membrane potential v (v = v_reset before the first step):

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau     charge: leak towards v_reset, add the input
    s[t] = 1 if h[t] >= v_threshold else 0                fire
    v[t] = v_reset if s[t] else h[t]                      reset

The step function has no useful derivative; backward uses that of a scaled arctangent instead (Fang et al. 2021, PLIF),

    ds/dh ~ alpha / 2 / (1 + (pi/2 * alpha * (h - v_threshold))^2)

and treats the reset as a constant (detached). Spikes and gradients equal those of SpikingJelly 2.0.0's
LIFNode(tau=2., detach_reset=True, surrogate_function=ATan(), step_mode='m').

Shapes: currents [T, ...] -> spikes [T, ...], time first. The module keeps no state between calls: nothing to reset
between batches, nothing of it in a checkpoint, and two encoders cannot disturb one another.
Tested by `python -m pytest test_all.py -k lif`.
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
    """Currents x [T, N] of N neurons -> spikes [T, N], 0 or 1 in x's dtype. alpha is for gradient_of alone."""
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))
    spikes = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        s = h >= v_threshold
        v = torch.where(s, v_reset, h)
        spikes.append(torch.where(s, 1.0, 0.0).to(x.dtype))  # s.to() compiles to slower code: 170 ms, not 11
    return torch.stack(spikes)  # [T, N]


def gradient_of(x, g, tau, v_threshold, v_reset, alpha):
    """Currents x and the spikes' gradient g, both [T, N] -> the currents' gradient [T, N].

    The membrane is computed again from x, so x is all that a forward pass has to keep; then time runs backwards:
        gh: dL/dh[t]   = dL/ds[t] * ds/dh + (0 if s[t] else dL/dv[t])   with dL/dv = 0 after the last step
        gv: dL/dv[t-1] = dL/dh[t] * (1 - 1/tau)
            dL/dx[t]   = dL/dh[t] / tau
    """
    v = torch.full_like(x[0], v_reset, dtype=membrane_dtype(x))
    membrane = []
    for xt in x.unbind(0):
        h = charge(v, xt, tau, v_reset)
        membrane.append(h)
        v = torch.where(h >= v_threshold, v_reset, h)
    gv = torch.zeros_like(v)  # [N], dL/dv after the last step
    gradient = []  # last step first
    for h, gs in zip(reversed(membrane), reversed(g.unbind(0))):
        surrogate = alpha / 2 / (1 + (math.pi / 2 * alpha * (h - v_threshold)) ** 2)
        gh = gs * surrogate + torch.where(h >= v_threshold, 0.0, gv)
        gv = gh * (1 - 1 / tau)
        gradient.append((gh / tau).to(x.dtype))
    return torch.stack(gradient[::-1])  # [T, N]


def membrane_dtype(x):
    """float32 at least: in bf16 or fp16 small inputs would be lost in rounding."""
    return torch.promote_types(x.dtype, torch.float32)


class LIF(nn.Module):
    """A stateless layer of LIF neurons: currents [T, ...] -> spikes [T, ...], in x's dtype and memory format.

    Time is the first axis alone: unflatten [T*B, ...] before it, or the membrane runs from one recording into the next.

    tau: membrane time constant in time steps (>= 1; 1: no memory); v_threshold, v_reset: in units of the membrane;
    alpha: steepness of the surrogate gradient. Equations: module docstring.
    """

    def __init__(self, tau=2.0, v_threshold=1.0, v_reset=0.0, alpha=2.0):
        super().__init__()
        if tau < 1 or v_threshold <= v_reset:
            raise ValueError("a LIF neuron needs tau >= 1 and v_threshold > v_reset, "
                             f"got {tau}, {v_threshold}, {v_reset}")
        self.constants = float(tau), float(v_threshold), float(v_reset), float(alpha)

    def forward(self, x):
        return _LIF.apply(x, self.constants)

    def extra_repr(self):
        return "tau={}, v_threshold={}, v_reset={}, alpha={}".format(*self.constants)


class _LIF(torch.autograd.Function):  # written by hand so that x is all it keeps
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
    """spikes_of or gradient_of over tensors [T, ...] -> [T, ...], in the memory format of the first.

    Neurons do not interact, so a tensor of any memory format is a [T, N] matrix when read in memory order.
    """
    x = tensors[0]
    order = [0] + sorted(range(1, x.ndim), key=x.stride, reverse=True)  # time, then by stride, the largest first
    back = [order.index(i) for i in range(x.ndim)]  # the inverse permutation
    y = run(pass_, constants, *(t.permute(order).reshape(len(t), -1) for t in tensors))  # [T, N]
    return y.view([x.shape[i] for i in order]).permute(back)  # [T, ...]


# Compiling takes about half a minute the first time on a machine and seconds in every later run; it makes a layer some
# 15 times faster. It starts once this many currents have gone through, a tenth of a second of work, so that tests do
# not wait for it. None: never.
COMPILE_AFTER = 2**23
_work = 0  # currents so far


def run(pass_, constants, *tensors):
    """Call pass_, spikes_of or gradient_of; once that pays, in torch.compile's version, a single fused loop."""
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
            why = str(e).strip().split("\n")[0][:200]
            warnings.warn(f"LIF layers run uncompiled: slower, with the same numbers ({why})")
            COMPILE_AFTER = None
    return pass_(*tensors, *constants)


@functools.cache
def fused(pass_, constants):
    """pass_ compiled, its constants closed over: as arguments they would become variables, at half the speed."""
    # One limit for all LIFs together (passes x thresholds x T x dtypes); past it they run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(lambda *tensors: pass_(*tensors, *constants))
