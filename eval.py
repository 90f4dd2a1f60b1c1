"""What a checkpoint is worth: accuracy, representation, spikes and energy, as text, JSON and pictures.

    python eval.py --ckpt runs/toy/finetuned.pt --pictures docs    # everything; of a pretrained.pt all but accuracy
    python eval.py --ckpt runs/*/finetuned.pt --json all.json      # a row each, then mean and deviation over seeds
    python eval.py --ckpt runs/toy/pretrained.pt --dataset FOLDER  # transfer: kNN and linear probe on other data

A prediction after t steps is the mean of the logits over steps 1 to t. Features are the frozen encoder's, averaged over
time; kNN and probe learn from all training labels. Synaptic operations of a layer = its multiply-accumulates x the mean
of its input, that is the firing rate, where the sum of two spikes counts twice; in q (k^T v) a spike of k adds a row of
v, and a spike of q a row of k^T v. In this order: figures, text, pictures, checkpoints, which may be a stranger's.
Tested by `python -m pytest test_all.py -k eval`.
"""
import argparse
import csv
import functools
import importlib.util
import inspect
import json
import math
import os
import pickletools
import re
import statistics
import sys
import timeit
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import models
import neuron
from loss import chance

# The columns of several checkpoints, and the settings that matter to pre-training alone.
UNITS = dict(accuracy="%", knn="%", probe="%", alignment="", uniformity="", rate="%", energy="uJ")
PRETRAINING = ("pretrain_epochs", "queue_size", "momentum", "temperature", "alpha", "beta", "pretrain_lr", "views")
LAST_LINE = "test accuracy {:.2f} % (last epoch, {} recordings)"
MAC, AC = 4.6e-6, 0.9e-6  # uJ of a multiply-accumulate (not the loss term of that name), of an accumulate
ASSUMED = """\
  assumed: 45 nm, 4.6 pJ a MAC, 0.9 pJ a synaptic operation (MACs x mean input); MACs in the first layer and where the
  input is no sum of spikes, as of the head; batch norm is folded into the weights; membranes and memory cost nothing;
  without spikes no zero is skipped; convolutions, linear layers and models.Attention count, other products do not"""
COUNTED = neuron.LIF, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear, models.Attention
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito, without yellow


def autocast(device):
    """bf16 on GPUs, where float16 would overflow in spiking nets; float32 where bf16 is slower: CPUs, older GPUs."""
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8  # Ampere and later
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


@torch.no_grad()
def over_split(model, split, batch_size, device, each_step=False, view=lambda x: x):
    """What `model` gives for a split of N recordings, on the CPU: the mean over time [N, D]; if each_step, [T, N, D].

    model: [T, B, 2, H, W] -> [T, B, D], left in evaluation mode; view: applied to every batch first, as data.augment.
    """
    model.eval()
    with autocast(device):
        steps = (model(view(x)).float() for x, _ in data.batches(split, batch_size, device))  # each [T, B, D]
        out = [z if each_step else z.mean(0) for z in steps]
    return torch.cat(out, -2).cpu()


def wilson(hits, n, z=1.959964):
    """[share of hits, lower, upper end of its 95 % interval] in percent; Wilson 1927."""
    p, w = hits / n, z * z / n
    half = (w * p * (1 - p) + w * w / 4) ** 0.5
    return [100 * p, 100 * max(0.0, p + w / 2 - half) / (1 + w), 100 * (p + w / 2 + half) / (1 + w)]


def accuracy_line(logits, labels):
    """The line that train.py ends with, of logits [N, C], averaged over time."""
    hits = (logits.argmax(1) == torch.as_tensor(labels)).sum().item()
    return LAST_LINE.format(100 * hits / len(labels), len(labels))


def accuracy_figures(logits, labels, classes):
    """What logits [T, N, C] say of labels [N], a dict.

    In percent: accuracy, its 95 % interval [low, high], top5 (None up to 10 classes), by_class, and steps, [accuracy,
    low, high] after 1 to T steps. In recordings: confusion [C][C], a row for each true class, and worst, the five most
    frequent errors as [count, true, guessed].
    """
    _, N, C = logits.shape
    guesses = logits.cumsum(0).argmax(2)  # [T, N]; of steps 1 to t, the largest sum is the largest mean
    steps = [wilson(hits, N) for hits in (guesses == labels).sum(1).tolist()]
    five = logits.sum(0).topk(min(5, C)).indices  # [N, 5]
    confusion = torch.bincount(labels * C + guesses[-1], minlength=C * C).view(C, C)  # [true, guessed]
    errors = confusion - confusion.diag().diag()
    worst = [[errors[i, j].item(), classes[i], classes[j]] for i, j in errors.nonzero().tolist()]
    return dict(accuracy=steps[-1][0], interval=steps[-1][1:], steps=steps, confusion=confusion.tolist(),
                top5=100 * (five == labels[:, None]).sum().item() / N if C > 10 else None,
                by_class=(100 * confusion.diag() / confusion.sum(1).clamp(min=1)).tolist(),
                worst=sorted(worst, reverse=True)[:5])


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Share of queries [M, D] for whose label their k nearest of the bank [N, D] vote, by exp(cosine / temperature).

    The evaluation of Wu et al. 2018; k is at most N; the similarities are taken 1,024 queries at a time.
    """
    bank, hits = F.normalize(bank, dim=1), 0
    bank_labels, labels = torch.as_tensor(bank_labels), torch.as_tensor(labels)
    for q, y in zip(queries.split(1024), labels.split(1024)):
        similarity, nearest = (F.normalize(q, dim=1) @ bank.T).topk(min(k, len(bank)))  # [m, k]
        votes = F.one_hot(bank_labels[nearest]) * (similarity / temperature).exp()[..., None]  # [m, k, classes]
        hits += (votes.sum(1).argmax(1) == y).sum().item()
    return hits / len(labels)


def probe_accuracy(bank, bank_labels, queries, labels, weight_decay=1e-3):
    """Share of queries [M, D] that a linear classifier fitted to the bank [N, D] gets right; labels [N], [M].

    Features standardised by the bank's mean and deviation, L2 penalty, at most 200 iterations of L-BFGS.
    """
    bank_labels, labels = torch.as_tensor(bank_labels), torch.as_tensor(labels)
    mean, std = bank.mean(0), bank.std(0, unbiased=False) + 1e-6
    bank, queries = (bank - mean) / std, (queries - mean) / std
    head = torch.nn.Linear(bank.shape[1], int(bank_labels.max()) + 1)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(head(bank), bank_labels) + weight_decay / 2 * head.weight.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return (head(queries).argmax(1) == labels).float().mean().item()


def alignment_uniformity(a, b, z):
    """Wang and Isola 2020, of features [N, D] made unit length: of two views of the recordings, and of themselves.

    alignment: mean |a - b|^2, best 0. uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over pairs, best about -4.
    """
    a, b, z = (F.normalize(f.double(), dim=1) for f in (a, b, z))
    total = sum(torch.cdist(rows, z).square().mul(-2).exp().sum() for rows in z.split(1024))  # with each itself, 1
    pairs = len(z) * (len(z) - 1)
    return dict(alignment=(a - b).square().sum(1).mean().item(), uniformity=((total - len(z)) / pairs).log().item())


def spike_figures(net, run):
    """Call run(), which passes recordings through `net` and gives [T, N, D]; sum up by forward hooks what layers see.

    Returns run()'s result; a dict with MACs, operations and energy (uJ) of a recording, firing rate and silent neurons
    (no spike in any recording) in percent, in all and for each of its "layers"; and {layer: spikes [T, 16] of the first
    recording, of neurons drawn by lot}.
    """
    sums, spikes, rasters, calls = defaultdict(Counter), {}, {}, Counter()  # each by the name of a layer

    def see(name, module, inputs, out):
        spiking = isinstance(module, neuron.LIF)
        calls[name, spiking] += 1
        if calls[name, spiking] > 1:  # one LIF may serve in several places, and an encoder may have a head of its own
            name = f"{name} ({calls[name, spiking]})"
        total = sums[name]  # made here, so that layers come in order
        if spiking:
            spikes[name] = spikes.get(name, 0) + out.sum((0, 1), dtype=torch.float32)  # of every neuron
            if name not in rasters:  # of the first batch alone
                some = torch.randperm(out[0, 0].numel(), generator=torch.Generator().manual_seed(0))[:16]
                rasters[name] = out[:, 0].flatten(1).cpu()[:, some]
            return
        if isinstance(module, models.ConvLIF):  # makes q, k and v [T, B, C, H, W] of an attention
            x = torch.stack(out.chunk(3, 2)[:2])  # q and k: the two products take 16 MACs for each of their values
            macs = 16 * x.numel()
        else:
            x, macs = inputs[0], out.numel() * module.weight[0].numel()
        real = calls.total() == 1 or bool((x != x.round()).any())  # frames enter the first, means over space the head
        total.update(macs=macs, operations=macs * x.mean(dtype=torch.float64).item(), real=real)  # adds

    hooks = [net.register_forward_pre_hook(lambda *_: calls.clear())]
    for name, module in net.named_modules():
        if isinstance(module, COUNTED):
            name = re.sub(r"^encoder\.|\.conv$|\.lif$", "", name)
            hooks.append(getattr(module, "qkv", module).register_forward_hook(functools.partial(see, name)))
    result = run()
    for hook in hooks:
        hook.remove()
    T, n = result.shape[:2]

    def rates(counts):  # spikes of each neuron
        return dict(rate=100 * counts.mean().item() / (n * T), silent=100 * (counts == 0).float().mean().item())

    layers = []
    for name, total in sums.items():
        macs, operations = total["macs"] / n, 0.0 if total["real"] else total["operations"] / n
        energy = MAC * macs if total["real"] else AC * operations
        layers.append(dict(layer=name, macs=macs, operations=operations, energy=energy))
        if name in spikes:
            layers[-1] |= rates(spikes[name])
    f = {k: sum(layer[k] for layer in layers) for k in ("macs", "operations", "energy")}
    if spikes:  # a network without any has no rate
        f |= rates(torch.cat([counts.flatten() for counts in spikes.values()]))
    return result, f | dict(layers=layers, energy_without_spikes=MAC * f["macs"]), rasters


def examine(path, ckpt, args):
    """All numbers about the checkpoint at `path`, a dict for text, JSON and pictures; draws these if args say where."""
    made, classes = ckpt["args"], ckpt["classes"]
    name = os.path.normpath(args.dataset or made["dataset"])
    own = name == made["dataset"]
    sensor = args.sensor or (made.get("sensor") if own else None)
    train, test = data.load(name, args.root or made["root"], made["n_frames"], made["image_size"],
                            made["skip_broken"] or args.skip_broken, sensor)
    data.compare_sensors(made, name, train)
    bank_labels, labels = torch.tensor(train.labels), torch.tensor(test.labels)
    counts = f"{len(bank_labels)}+{len(labels)}"
    if own and made.get("recordings", counts) != counts:
        print(f"warning: {name} holds {counts} recordings, {made['recordings']} when {path} was trained: "
              "some of those may be tested on now", file=sys.stderr)
    net = restore(ckpt, args.device)
    encoder = net.encoder if ckpt["kind"] == "finetuned" else net
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    run = functools.partial(over_split, batch_size=made["batch_size"], device=args.device)

    out, f, rasters = spike_figures(net, lambda: run(net, test, each_step=True))  # out: [T, N, classes or features]
    f |= dict(path=path, kind=ckpt["kind"], dataset=name, recordings=len(labels), args=made, classes=classes,
              device=args.device, parameters=sum(p.numel() for p in net.parameters()))
    if dead := [layer["layer"] for layer in f["layers"] if layer.get("silent") == 100]:
        print(f"warning: {path}: {', '.join(dead)} never spike: nothing gets through them", file=sys.stderr)
    if ckpt["kind"] == "finetuned" and set(classes) == set(test.classes):
        order = torch.tensor([classes.index(c) for c in test.classes])
        f |= accuracy_figures(out, order[labels], classes)
    elif ckpt["kind"] == "finetuned":
        f["strangers"] = [sorted(set(test.classes) - set(classes)), sorted(set(classes) - set(test.classes))]

    bank, z = run(encoder, train), run(encoder, test)  # features [N, D]
    if len(train.classes) > 1:
        f["knn"] = 100 * knn_accuracy(bank, bank_labels, z, labels)
        f["probe"] = 100 * probe_accuracy(bank, bank_labels, z, labels)
    torch.manual_seed(0)  # always the same views
    view = functools.partial(data.augment, **made["views"])
    f |= alignment_uniformity(run(encoder, test, view=view), run(encoder, test, view=view), z)

    def seconds(x):  # the median of ten after one to warm up; .cpu() waits for a GPU
        return statistics.median(timeit.repeat(lambda: net(x).cpu(), number=1, repeat=11)[1:])

    x = next(data.batches(test, made["batch_size"], args.device))[0]  # [T, B, 2, H, W]
    with torch.no_grad(), autocast(args.device):
        f |= dict(batch=x.shape[1], per_second=x.shape[1] / seconds(x), latency=1000 * seconds(x[:, :1].contiguous()))
    f["frozen"] = all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    if args.pictures:
        draw(f, test, view, z, rasters, Path(args.pictures))
    return f


def tell(f):
    """Print the figures of one checkpoint."""
    made, T, few = f["args"], f["args"]["n_frames"], len(f["classes"]) <= 20
    print("{path}: {kind} {arch}, T = {n_frames}, {image_size} x {image_size} pixels, on {dataset}".format(**made | f))
    if "strangers" in f:
        print("no accuracy, the classes do not agree: "
              "only in the data {}, only in the checkpoint {}".format(*f["strangers"]))
    if "accuracy" in f:
        print("accuracy by class" + few * ", and the confusion matrix: rows true, columns predicted, in the same order")
        for name, share, row in zip(f["classes"], f["by_class"], f["confusion"]):
            print(f"  {name:18} {share:6.2f} % of {sum(row):<6}" + "".join(f"{c or '.':>4}" for c in row if few))
        for n, a, b in f["worst"]:
            print(f"  {n} x {a} taken for {b}")
        print(f"accuracy after 1 to {T} time steps: " + ", ".join(f"{s[0]:.2f}" for s in f["steps"]) + " %")
        top5 = f"; top-5 {f['top5']:.2f} %" if f["top5"] is not None else ""
        print("95 % interval {:.2f} to {:.2f} %".format(*f["interval"]) + top5)
    print(f"{'layer':18} {'rate, %':>9} {'silent, %':>9} {'MACs':>14} {'operations':>14} {'energy, uJ':>11}")
    for x in f["layers"] + [f | dict(layer="all")]:
        rate = f"{x['rate']:9.2f} {x['silent']:9.2f}" if "rate" in x else " " * 19
        print(f"{x['layer']:18} {rate} {x['macs']:14,.0f} {x['operations']:14,.0f} {x['energy']:11.4f}")
    dense = f["energy_without_spikes"]
    print(f"the same network without spikes: {dense:.4f} uJ on the same {T} frames, {dense / T:.4f} uJ on a single one",
          ASSUMED, sep="\n")
    print("{parameters:,} parameters; on {device} {per_second:,.0f} recordings/s, {batch} at once; "
          "{latency:.2f} ms for one\nalignment {alignment:.3f}, uniformity {uniformity:.3f}; encoder".format(**f),
          "unchanged" if f["frozen"] else "CHANGED", "by all this")
    if "knn" in f:
        print("frozen features: kNN {knn:.2f} %, linear probe {probe:.2f} % ({recordings} test recordings)".format(**f))
    if "accuracy" in f:
        print(LAST_LINE.format(f["accuracy"], f["recordings"]))


def table(runs):
    """Print a row for each run, then mean and standard deviation (n - 1) of those that differ only in the seed.

    Returns these groups, called by the settings that are not the same in all runs. Of a run from scratch the settings
    of pre-training do not count; an encoder given by --init does, by those of its pre-training.
    """
    recipes = defaultdict(dict)
    for f in runs:
        settings = f["args"] | dict(kind=f["kind"], dataset=f["dataset"])
        aside = {"seed", "out", "root", "device", "resume", "no_compile", "init"}
        if not settings["pretrain_epochs"]:
            aside |= {*PRETRAINING[1:], "pretrained_on"}
        recipe = tuple((k, str(v)) for k, v in settings.items() if k not in aside)
        recipes[recipe][settings["seed"], settings.get("init")] = f  # of one seed and encoder, the last
    variants = Counter(k for k, _ in set().union(*recipes))  # how many values a setting has in all runs
    rows = [(f["path"], {k: [f[k]] for k in UNITS if k in f}) for f in runs]  # name, {figure: [value]}
    groups = []
    for recipe, by_seed in recipes.items():
        same = list(by_seed.values())
        if len(same) > 1:
            title = ", ".join([f"{k} {v}" for k, v in recipe if variants[k] > 1] + [f"{len(same)} seeds"])
            values = {k: [f[k] for f in same] for k in UNITS if all(k in f for f in same)}
            spread = {k: [statistics.mean(v), statistics.stdev(v)] for k, v in values.items()}
            rows.append((title, spread))
            groups.append(dict(title=title, paths=[f["path"] for f in same]) | spread)
    width = max(len(name) for name, _ in rows)
    print(" " * width, *(f"{k}, {unit}".strip(", ").rjust(15) for k, unit in UNITS.items()))
    for name, columns in rows:
        cells = [" ± ".join(f"{v:.{2 if unit else 3}f}" for v in columns.get(k, [])) for k, unit in UNITS.items()]
        print(name.ljust(width), *(f"{cell or '-':>15}" for cell in cells))
    return groups


def draw(f, test, view, features, rasters, folder):
    """The figures `f` as PNG files in `folder`, in colours that the colour-blind can tell apart.

    test: the split; view: makes views of its frames; features: its features [N, D]; rasters: {layer: spikes [T, 16]}.
    """
    import matplotlib  # here, for it is optional
    from matplotlib.figure import Figure
    colours = matplotlib.cycler(color=COLOURS)
    matplotlib.rcParams.update({"axes.prop_cycle": colours, "text.parse_math": False, "legend.frameon": False})
    pages = {}

    def page(name, width, height, rows=1, columns=1, **options):
        """A picture of width x height inches, called `name` -> its axes [rows, columns]."""
        pages[name] = Figure((width, height), layout="constrained")
        pages[name].suptitle(f["path"], size=8, color="grey")
        return pages[name].subplots(rows, columns, squeeze=False, **options)

    draw_curves(f, page)
    torch.manual_seed(0)
    recording = torch.as_tensor(test.frames[len(features) // 2]).float()[:, None]  # [T, 1, 2, H, W]
    draw_frames({"recording": recording, "a view of it": view(recording), "another view": view(recording)}, page)
    if rasters:  # a network without spikes has none
        draw_spikes(f, rasters, page)
    if "accuracy" in f:
        draw_accuracy(f, page)
    draw_map(features, test, page)
    for name, figure in pages.items():
        figure.savefig(folder / f"{name}.png")


def draw_curves(f, page):
    """Loss and accuracy by epoch, from the log.csv beside the checkpoint, if there is one."""
    log, file = defaultdict(list), Path(f["path"]).with_name("log.csv")
    for row in csv.DictReader(file.read_text().splitlines() if file.exists() else []):
        log[row["phase"]].append([float(row[k] or "nan") for k in ("epoch", "loss", "accuracy", "knn")])
    level = chance(*(f["args"][k] for k in ("queue_size", "alpha", "beta")))
    about = dict(  # phase: its title, loss at the level of chance, what its accuracy is
        pretrain=("pre-training", level, "own key nearer than the queue"),
        finetune=("fine-tuning", math.log(len(f["classes"])), "training recordings"))
    axes = page("curves", 9, 4.6, 2, len(log), sharex="col").T if log else ()
    for (phase, rows), (loss, share) in zip(log.items(), axes):
        epochs, losses, accuracy, knn = np.array(rows).T
        title, level, label = about[phase]
        loss.axhline(level, color="grey", ls="--", label="chance")
        loss.plot(epochs, losses, ".-", ms=4)
        loss.set(title=title, ylabel="loss", ylim=(0, 1.08 * max(level, losses.max())))
        share.plot(epochs, 100 * accuracy, ".-", ms=4, label=label)
        if phase == "pretrain":
            share.plot(epochs, 100 * knn, "o", label="kNN, training recordings")
        share.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        share.xaxis.get_major_locator().set_params(integer=True)
        loss.legend(), share.legend()


def draw_frames(rows, page):
    """At most eight frames of each of {name: recording [T, 1, 2, H, W]}."""
    T, brightest = len(rows["recording"]), rows["recording"].max().clamp(min=1)
    steps = range(0, T, math.ceil(T / 8))
    for line, name in zip(page("frames", 1.6 * len(steps) + 0.5, 5.2, 3, len(steps)), rows):
        for ax, t in zip(line, steps):
            off, on = (rows[name][t, 0] / brightest).sqrt()  # [H, W]
            ax.imshow(1 - torch.stack([on, (on + off) / 2, off], -1).numpy())  # both: black
            ax.set(xticks=[], yticks=[], title=f"t = {t + 1}" if name == "recording" else "")
        line[0].set_ylabel(name)
    line[0].figure.supxlabel("events: off orange, on blue", size=10)


def draw_spikes(f, rasters, page):
    """Sixteen neurons of each layer over time, rasters {layer: spikes [T, 16]}; what every layer does."""
    T, layers = f["args"]["n_frames"], f["layers"]
    y, names = range(len(layers)), [layer["layer"] for layer in layers]
    rows = [rasters.get(name, torch.zeros(T, 0)) for name in names]
    spikes = torch.cat([F.pad(row, (0, 16 - row.shape[1])) for row in rows], 1)  # [T, 16 for each layer]
    t, k = spikes.nonzero().T.numpy()
    [[raster, *bars]] = page("spikes", 9, 1.6 + 0.4 * len(y), 1, 4, sharey=True, width_ratios=[4, 2, 2, 2])
    raster.hlines((k + 0.5) / 16 - 0.5, t + 0.6, t + 1.4, color="black", lw=1.5)
    raster.hlines([i + 0.5 for i in y], 0.5, T + 0.5, color="lightgrey", lw=0.8)
    raster.set(title="16 neurons of each layer", xlabel="time step", xticks=range(1, T + 1, 1 + T // 9),
               xlim=(0.5, T + 0.5), ylim=(len(y) - 0.5, -0.5), yticks=y, yticklabels=names)
    labelled = dict(rate="firing rate, %", silent="silent neurons, %", energy="energy, µJ")
    for ax, (key, label) in zip(bars, labelled.items()):
        ax.barh(y, [layer.get(key, 0) for layer in layers], 0.7)
        ax.set_xlabel(label)


def draw_accuracy(f, page):
    """Accuracy by time step, and the confusion matrix."""
    counts, t, side = np.array(f["confusion"]), range(1, len(f["steps"]) + 1), 3.4 + 0.12 * len(f["classes"])
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    [[curve, matrix]] = page("accuracy", 4 + side, side, 1, 2, width_ratios=[3.6, side])
    share, low, high = zip(*f["steps"])
    curve.fill_between(t, low, high, alpha=0.2, lw=0)
    curve.plot(t, share, "o-")
    curve.set(xlabel="time steps seen", ylabel="test accuracy and its 95 % interval, %", xticks=t[:: 1 + len(t) // 9])
    matrix.imshow(percent, "Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(counts):
        white = percent[i, j] > 50
        matrix.text(j, i, counts[i, j], size=8, ha="center", va="center", color="white" if white else "black")
    matrix.set(title="recordings; colour: share of the class", xlabel="taken for", ylabel="class")
    matrix.set_xticks(range(len(counts)), f["classes"], rotation=90, size=8)
    matrix.set_yticks(range(len(counts)), f["classes"], size=8)


def draw_map(features, test, page):
    """A map of the features [N, D]: their first two principal components, coloured by class."""
    z = features - features.mean(0)
    _, s, directions = torch.linalg.svd(F.pad(z, (0, 0, 0, 1)), full_matrices=False)  # a row of zeros: N may be 1
    points, percent = z @ directions[:2].T, 100 * s.square() / s.square().sum()  # [N, 2]
    width = max(9, len(test.classes) / 7)
    [[ax]] = page("map", width, 0.75 * width)
    for c in np.unique(test.labels):
        x, y = points[test.labels == c].T.numpy()
        ax.scatter(x, y, 18, f"C{c % 7}", marker="o^sDv"[c % 5])
        ax.text(np.median(x), np.median(y), test.classes[c], size=8, bbox=dict(color="white", alpha=0.8, pad=1))
    x, y = (f"principal component {i + 1}, {percent[i]:.0f} % of the variance" for i in (0, 1))
    ax.set(xlabel=x, ylabel=y)


# Down to restore: checkpoints, which may be a stranger's. On a first reading, go on at main.


def read_checkpoint(path):
    """The dict that torch.save wrote, or an exception. Runs no code of the file, takes no memory for what it claims.

    Its pickle may name only what tensors need, and weights_only loads nothing else; its tensors are views of the file,
    mapped into memory, so none can be larger than the file; all must be dense and finite.
    """
    harmless = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"
    with zipfile.ZipFile(path) as z:
        entries = z.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
        if not stored or sum(e.file_size for e in entries) > os.path.getsize(path) or z.testzip():
            raise ValueError("compressed, which torch.save does not do, or damaged")
        (pickled,) = [name for name in z.namelist() if name.endswith("/data.pkl")]
        for op, arg, _ in pickletools.genops(z.read(pickled)):
            if "GLOBAL" in op.name and not re.fullmatch(harmless, str(arg)):
                raise ValueError(f"asks for {arg!r}")
    mapped = sys.platform != "win32"  # which would let no run replace the file then
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    parts = [content]
    for _ in range(10**6):  # a list that holds itself, or two of the next that holds two of the next, has no end
        if not parts and type(content) is dict:
            return content
        part = parts.pop()
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            parts += part
        elif isinstance(part, torch.Tensor):
            dense = part.layout == torch.strided and part.nbytes <= part.untyped_storage().nbytes()
            if not dense or not part.isfinite().all():
                raise ValueError("a tensor is larger than what it holds, or not finite")
    raise ValueError("no dict, or one of too many parts")


def load_checkpoint(path):
    """A checkpoint of train.py as a dict: kind, args, classes, weights, that fit one another. Raises UserError."""
    try:
        ckpt = read_checkpoint(path)
        kind, args, classes, weights = (ckpt[k] for k in ("kind", "args", "classes", "weights"))
        views = args["views"]
        inspect.signature(data.augment).bind(None, **views)  # raises what a call with such settings would
        json.dumps(args)  # raises unless all are plain values
        texts = [*classes, args["dataset"], args["root"], args["pretrained_on"]]
        sizes = [args["image_size"], args["n_frames"], args["batch_size"]]
        numbers = [args[k] for k in ("seed", "skip_broken", *PRETRAINING) if k != "views"] + list(views.values())
        sensor = args.get("sensor") or [1, 1]  # earlier checkpoints do not say
        sound = (kind in ("pretrained", "finetuned") and type(classes) is list and len(set(classes)) == len(classes) > 0
                 and all(type(s) is str for s in texts)
                 and all(type(n) is int and 0 < n <= 10**6 for n in sizes) and max(sizes[:2]) <= 1024
                 and all(type(n) in (int, float, bool) and 0 <= n <= 10**9 for n in numbers)
                 and [type(n) for n in sensor] == [int, int])
        if not sound:
            raise ValueError("its settings cannot be; those of views are numbers of 0 or more")
        with torch.device("meta"):  # shapes only
            expected = network(ckpt).state_dict()
        if {k: (v.shape, v.dtype) for k, v in weights.items()} != {k: (v.shape, v.dtype) for k, v in expected.items()}:
            raise ValueError(f"its weights are not those of {args['arch']} in models.py")
        return ckpt
    except Exception as e:
        raise data.UserError(f"{path}: cannot be read as a checkpoint of this train.py ({data.reason(e)}): "
                             "pass a pretrained.pt or finetuned.pt")


def network(ckpt):
    """What a checkpoint holds the weights of, without them: an encoder if pretrained, a Classifier if finetuned."""
    encoder = models.build(ckpt["args"]["arch"], ckpt["args"]["image_size"])
    return models.Classifier(encoder, len(ckpt["classes"])) if ckpt["kind"] == "finetuned" else encoder


def restore(ckpt, device):
    """The network of a checkpoint with its weights, in evaluation mode."""
    net = network(ckpt)
    net.load_state_dict(ckpt["weights"])
    return net.to(device).eval()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = data.fail
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="pretrained.pt or finetuned.pt, one or more")
    add("--dataset", help="data to test on, if not those of the checkpoint")
    add("--root", help="folder of downloads and frames, if not that of the checkpoint")
    add("--sensor", type=int, nargs=2, metavar=("W", "H"), help="of a folder; if not given: as far as its events reach")
    add("--skip-broken", action="store_true", help="go on without the recordings that cannot be read")
    add("--pictures", metavar="DIR", help="draw the figures of one checkpoint, PNG files, into this folder")
    add("--json", metavar="FILE", help="write all figures to this file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    args = data.parse(parser, argv)
    with data.answers("choose another --device", ""):
        data.check_device(args.device)
        if args.pictures and len(args.ckpt) > 1:
            raise data.UserError("--pictures: shows one checkpoint: pass a single --ckpt")
        if args.pictures and not importlib.util.find_spec("matplotlib"):
            print("no pictures without matplotlib: pip install matplotlib", file=sys.stderr)
            args.pictures = None
        ckpts = [load_checkpoint(path) for path in args.ckpt]  # all of them, to complain before the work
        try:
            if args.pictures:
                Path(args.pictures).mkdir(parents=True, exist_ok=True)
            if args.json:
                open(args.json, "a").close()
        except OSError as e:
            raise data.UserError(f"{e.filename}: cannot be written ({e.strerror}): choose another place")
        work = tqdm([*zip(args.ckpt, ckpts)], disable=None)  # on a terminal alone
        runs = [examine(path, ckpt, args) for path, ckpt in work]
        if len(runs) == 1:
            tell(runs[0])
        groups = table(runs) if len(runs) > 1 else []
        if args.json:
            text = json.dumps(dict(units=UNITS, runs=runs, groups=groups))
            Path(args.json).write_text(json.dumps(json.loads(text, parse_constant=lambda _: None)))  # JSON knows no NaN


if __name__ == "__main__":
    main()
