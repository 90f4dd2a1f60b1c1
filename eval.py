"""What a checkpoint is worth: accuracy, representation, spikes and energy, as text, JSON and pictures.

    python eval.py --ckpt runs/toy/finetuned.pt --pictures docs     # everything; of a pretrained.pt too, without accuracy
    python eval.py --ckpt runs/*/finetuned.pt --json all.json       # a row each, then mean and deviation over seeds
    python eval.py --ckpt runs/toy/pretrained.pt --dataset FOLDER   # transfer: kNN and linear probe on other data

A prediction after t steps is the mean of the logits over steps 1 to t. Features are those of the frozen encoder, averaged over time;
kNN and probe learn from all training labels. Theoretical energy: 4.6 pJ a multiply-accumulate (MAC; not the loss term of that name),
0.9 pJ a synaptic operation, which is an accumulate. Operations of a layer = its MACs x the mean of its input, that is the firing rate,
where the sum of two spikes counts twice. In q (k^T v) a spike of k adds a row of v, and a spike of q a row of k^T v.
Guarded by `python -m pytest test_all.py -k eval`.
"""
import argparse
import copy
import csv
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import pickletools
import re
import statistics
import sys
import time
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

UNITS = dict(accuracy="%", knn="%", probe="%", alignment="", uniformity="", rate="%", energy="uJ")  # the columns of several checkpoints
PRETRAINING = "pretrain_epochs", "queue_size", "momentum", "temperature", "alpha", "beta", "pretrain_lr", "views"  # settings of it alone
LAST_LINE = "test accuracy {:.2f} % (last epoch, {} recordings)"
MAC, AC = 4.6e-6, 0.9e-6  # uJ of a multiply-accumulate and of an accumulate: 45 nm
ASSUMED = """  assumed: 45 nm, 4.6 pJ a MAC, 0.9 pJ a synaptic operation (MACs x mean input); MACs in the first layer and where
  the input is no sum of spikes, as of the head; batch norm is folded into the weights; membranes and memory cost nothing; without
  spikes no zero is skipped"""
BLUE, RED, *_ = COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # Okabe and Ito, without yellow


def autocast(device):
    """bf16 on a GPU, where float16 would overflow in spiking nets; float32 where bf16 is slower: on GPUs before Ampere and on CPUs."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


@torch.no_grad()
def over_split(model, split, batch_size, device, each_step=False, view=lambda x: x):
    """What `model` gives for all N recordings of a split, on the CPU: the mean over time, float [N, D]; with each_step [T, N, D].

    model: [T, B, 2, H, W] -> [T, B, D], left in evaluation mode; view: applied to every batch first, as data.augment.
    """
    model.eval()
    with autocast(device):
        steps = (model(view(x)).float() for x, _ in data.batches(split, batch_size, device))  # each [T, B, D]
        out = [z if each_step else z.mean(0) for z in steps]
    return torch.cat(out, -2).cpu()


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Share of queries [M, D] whose k nearest of the bank [N, D] by cosine vote for their label, votes weighing exp(cos / temperature).

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
    """Share of queries [M, D] that a linear classifier fitted to the bank [N, D] gets right; labels int64 tensors [N], [M].

    Features standardised by the bank's mean and deviation, L2 penalty, at most 200 iterations of L-BFGS.
    """
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


HARMLESS = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"  # all that a checkpoint's pickle names


def read_checkpoint(path):
    """What torch.save wrote to a file, or an exception. Runs no code of the file's and takes no memory for what it claims.

    Its pickle may name nothing but HARMLESS, and weights_only loads no others; its tensors are views of the file, mapped into
    memory, so none can be larger than the file; all must be dense and finite.
    """
    with zipfile.ZipFile(path) as z:
        entries = z.infolist()
        stored = all(e.compress_type == zipfile.ZIP_STORED for e in entries)
        if not stored or sum(e.file_size for e in entries) > os.path.getsize(path) or z.testzip():
            raise ValueError("compressed, which torch.save does not do, or damaged")
        (pickled,) = [name for name in z.namelist() if name.endswith("/data.pkl")]
        for op, arg, _ in pickletools.genops(z.read(pickled)):
            if "GLOBAL" in op.name and not re.fullmatch(HARMLESS, str(arg)):
                raise ValueError(f"asks for {arg!r}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parts = [content]
    for _ in range(10**6):  # a list that holds itself, or two of the next that holds two of the next, has no end
        if not parts:
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
    raise ValueError("too many parts")


def load_checkpoint(path):
    """A checkpoint of train.py as a dict: kind, args, classes, weights, all of which fit one another. Raises UserError."""
    try:
        ckpt = read_checkpoint(path)
        kind, args, classes, weights = (ckpt[k] for k in ("kind", "args", "classes", "weights"))
        views = args["views"]
        inspect.signature(data.augment).bind(None, **views), json.dumps(args)  # or an exception
        texts = [*classes, args["dataset"], args["root"], args["pretrained_on"]]
        sizes = [args["image_size"], args["n_frames"], args["batch_size"]]
        numbers = [args[k] for k in ("seed", "skip_broken", *PRETRAINING) if k != "views"] + list(views.values())
        sensor = args.get("sensor") or [1, 1]  # earlier checkpoints do not say
        sound = (kind in ("pretrained", "finetuned") and classes and all(type(s) is str for s in texts)
                 and all(type(n) is int and 0 < n <= 10**6 for n in sizes) and max(sizes[:2]) <= 1024
                 and all(type(n) in (int, float, bool) and 0 <= n <= 10**9 for n in numbers)
                 and [type(n) for n in sensor] == [int, int])
        if not sound:
            raise ValueError("its settings cannot be")
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


def wilson(hits, n, z=1.959964):
    """[share of hits, lower, upper end of its 95 % interval] in percent; Wilson 1927."""
    p, w = hits / n, z * z / n
    half = (w * p * (1 - p) + w * w / 4) ** 0.5
    return [100 * p, 100 * max(0.0, p + w / 2 - half) / (1 + w), 100 * (p + w / 2 + half) / (1 + w)]


def accuracy_line(logits, labels):
    return LAST_LINE.format(wilson((logits.argmax(1) == torch.as_tensor(labels)).sum().item(), len(labels))[0], len(labels))


def accuracy_figures(logits, labels, classes):
    """What logits [T, N, C] say of labels [N], a dict.

    In percent: accuracy, its 95 % interval [low, high], top5 (None up to 10 classes), by_class, and steps, [accuracy, low,
    high] after 1 to T steps. In recordings: confusion [C][C], a row for each true class, and worst, the five most frequent
    errors as [count, true, guessed].
    """
    _, N, C = logits.shape
    guesses = logits.cumsum(0).argmax(2)  # [T, N]; the largest sum over steps 1 to t is the largest mean
    steps = [wilson(hits, N) for hits in (guesses == labels).sum(1).tolist()]
    confusion = torch.bincount(labels * C + guesses[-1], minlength=C * C).view(C, C)  # [true, guessed]
    errors = confusion - confusion.diag().diag()
    worst = [[errors[i, j].item(), classes[i], classes[j]] for i, j in errors.nonzero().tolist()]
    five = logits.sum(0).topk(min(5, C)).indices  # [N, 5]
    return dict(
        accuracy=steps[-1][0], interval=steps[-1][1:], steps=steps, worst=sorted(worst, reverse=True)[:5],
        top5=wilson((five == labels[:, None]).sum().item(), N)[0] if C > 10 else None,
        confusion=confusion.tolist(), by_class=(100 * confusion.diag() / confusion.sum(1).clamp(min=1)).tolist())


def alignment_uniformity(a, b, z):
    """Wang and Isola 2020, of features [N, D] made unit length. a, b: of two views of the same recordings; z: of the recordings.

    alignment: mean |a - b|^2, best 0. uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over pairs i != j, best about -4.
    """
    a, b, z = (F.normalize(f, dim=1) for f in (a, b, z))
    return dict(alignment=(a - b).square().sum(1).mean().item(), uniformity=F.pdist(z).square().mul(-2).exp().mean().log().item())


def spike_figures(net, run, n, T):
    """Call run(), which passes n recordings of T steps through `net`, and sum up by forward hooks what its layers see.

    Returns run()'s result; a dict with MACs, operations and energy (uJ) of a recording, firing rate and silent neurons
    (no spike in any recording) in percent, in all and for each of its "layers"; and {layer: spikes [T, 16] of the first
    recording, of neurons drawn by lot}.
    """
    layers, spikes, rasters, calls = {}, {}, {}, Counter()

    def see(name, module, inputs, out):
        spiking = isinstance(module, neuron.LIF)
        calls[name, spiking] += 1
        if calls[name, spiking] > 1:  # one LIF may serve in several places, and an encoder may have a head of its own
            name = f"{name} ({calls[name, spiking]})"
        layer = layers.setdefault(name, dict(layer=name, macs=0, operations=0, energy=0))
        if spiking:
            spikes[name] = spikes.get(name, 0) + out.sum((0, 1), dtype=torch.float32)  # of every neuron
            some = torch.randperm(out[0, 0].numel(), generator=torch.Generator().manual_seed(0))[:16]
            rasters.setdefault(name, out[:, 0].flatten(1).cpu()[:, some])
            return
        if isinstance(module, models.ConvLIF):  # makes q, k and v [T, B, C, H, W] of an attention
            x = torch.stack(out.chunk(3, 2)[:2])  # q and k: the two products take 16 MACs for each of their values
            macs = 16 * x.numel()
        else:
            x, macs = inputs[0], out.numel() * module.weight[0].numel()
        real = calls.total() == 1 or bool((x != x.round()).any())  # frames enter the first, means over space the head
        operations = 0 if real else macs * x.mean(dtype=torch.float64).item()
        layer["macs"] += macs
        layer["operations"] += operations
        layer["energy"] += MAC * macs if real else AC * operations

    def rates(spikes):
        return dict(rate=100 * spikes.mean().item() / (n * T), silent=100 * (spikes == 0).float().mean().item())

    hooks = [net.register_forward_pre_hook(lambda *_: calls.clear())]
    for name, module in net.named_modules():
        if isinstance(module, (neuron.LIF, torch.nn.Conv2d, torch.nn.Linear, models.Attention)):
            name = re.sub(r"^encoder\.|\.conv$|\.lif$", "", name)
            hooks.append(getattr(module, "qkv", module).register_forward_hook(functools.partial(see, name)))
    result = run()
    for hook in hooks:
        hook.remove()
    sums = ("macs", "operations", "energy")
    for name, layer in layers.items():
        layer |= {k: layer[k] / n for k in sums} | (rates(spikes[name]) if name in spikes else {})
    total = {k: sum(layer[k] for layer in layers.values()) for k in sums}
    total |= rates(torch.cat([s.flatten() for s in spikes.values()])) if spikes else {}  # a network without spikes
    return result, total | dict(layers=[*layers.values()], energy_without_spikes=MAC * total["macs"]), rasters


def seconds(net, x):
    """Median time that `net` takes for x [T, B, 2, H, W], of ten after one to warm up."""
    times = []
    with torch.no_grad(), autocast(x.device):
        for _ in range(11):
            began = time.perf_counter()
            net(x).cpu()  # waits for a GPU
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def examine(path, ckpt, args):
    """All numbers about the checkpoint at `path`, a dict for text, JSON and pictures; draws these if args say where."""
    made, classes = ckpt["args"], ckpt["classes"]
    name = os.path.normpath(args.dataset or made["dataset"])
    own = name == made["dataset"]
    train, test = data.load(name, args.root or made["root"], made["n_frames"], made["image_size"],
                            made["skip_broken"] or args.skip_broken, args.sensor or (made.get("sensor") if own else None))
    data.compare_sensors(made, name, train)
    n, bank_labels, labels = len(test.labels), torch.tensor(train.labels), torch.tensor(test.labels)
    counts = f"{len(train.labels)}+{n}"
    if own and made.get("recordings", counts) != counts:
        warn(f"{name} holds {counts} recordings, {made['recordings']} when {path} was trained: "
             "some of those may be tested on now")

    net = restore(ckpt, args.device)
    encoder = net.encoder if ckpt["kind"] == "finetuned" else net
    before = copy.deepcopy(encoder.state_dict())
    run = functools.partial(over_split, batch_size=made["batch_size"], device=args.device)
    test_net = functools.partial(run, net, test, each_step=True)
    out, f, rasters = spike_figures(net, test_net, n, made["n_frames"])  # out: [T, N, classes or features]
    f |= dict(path=path, kind=ckpt["kind"], dataset=name, recordings=n, args=made, classes=classes, device=args.device)
    if dead := [layer["layer"] for layer in f["layers"] if layer.get("silent") == 100]:
        warn(f"{path}: {', '.join(dead)} never spike: nothing gets through them, and figures say nothing about the method")
    if ckpt["kind"] == "finetuned":
        f["strangers"] = [sorted(set(a) - set(b)) for a, b in ((test.classes, classes), (classes, test.classes))]
        if not any(f["strangers"]):
            index = torch.tensor([classes.index(c) for c in test.classes])
            f |= accuracy_figures(out, index[labels], classes)

    bank, z, view = run(encoder, train), run(encoder, test), functools.partial(data.augment, **made["views"])  # [N, D]
    if len(train.classes) > 1:
        f["knn"] = 100 * knn_accuracy(bank, bank_labels, z, labels)
        f["probe"] = 100 * probe_accuracy(bank, bank_labels, z, labels)
    torch.manual_seed(0)  # always the same views
    f |= alignment_uniformity(run(encoder, test, view=view), run(encoder, test, view=view), z)
    f["frozen"] = all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())

    x = next(data.batches(test, made["batch_size"], args.device))[0]  # [T, B, 2, H, W]
    f |= dict(parameters=sum(p.numel() for p in net.parameters()), batch=x.shape[1],
              per_second=x.shape[1] / seconds(net, x), latency=1000 * seconds(net, x[:, :1].contiguous()))
    if args.pictures:
        x = torch.as_tensor(test.frames[n // 2]).float()[:, None]  # [T, 1, 2, H, W]
        torch.manual_seed(0)
        show = dict(rasters=rasters, features=z, labels=labels, names=test.classes, frames=[x, view(x), view(x)])
        draw(f, show, Path(args.pictures))
    return f


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def tell(f):
    """Print the figures of one checkpoint."""
    made, T, few = f["args"], f["args"]["n_frames"], len(f["classes"]) <= 20
    size = f"{made['image_size']} x {made['image_size']}"
    print(f"{f['path']}: {f['kind']} {made['arch']}, T = {T}, {size} pixels, on {f['dataset']}")
    if any(f.get("strangers", ())):
        print("no accuracy, the classes do not agree: only in the data {}, only in the checkpoint {}".format(*f["strangers"]))
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
    print(f"the same network without spikes: {dense:.4f} uJ on the same {T} frames, {dense / T:.4f} uJ on a single one")
    print(ASSUMED)
    print("{parameters:,} parameters; on {device} {per_second:,.0f} recordings/s, {batch} at once; "
          "{latency:.2f} ms for one".format(**f))
    frozen = "unchanged" if f["frozen"] else "CHANGED"
    print(f"alignment {f['alignment']:.3f}, uniformity {f['uniformity']:.3f}; encoder {frozen} by all this")
    if "knn" in f:
        print("frozen features: kNN {knn:.2f} %, linear probe {probe:.2f} % ({recordings} test recordings)".format(**f))
    if "accuracy" in f:
        print(LAST_LINE.format(f["accuracy"], f["recordings"]))


def table(runs):
    """Print a row for each run, then mean and standard deviation (n - 1) of those that differ only in the seed.

    Returns these groups. A group is called by the settings that are not the same in all runs. Of a run from scratch those
    of pre-training do not count; of an encoder given by --init those of its pre-training do.
    """
    recipes = defaultdict(dict)
    for f in runs:
        settings = f["args"] | dict(kind=f["kind"], dataset=f["dataset"])
        aside = {"seed", "out", "root", "device", "resume", "no_compile", "init"}
        if not settings["pretrain_epochs"]:
            aside |= {*PRETRAINING, "pretrained_on"} - {"pretrain_epochs"}
        recipe = tuple((k, str(v)) for k, v in settings.items() if k not in aside)
        recipes[recipe][settings["seed"], settings.get("init")] = f  # of one seed and encoder, the last
    variants = Counter(k for k, _ in set().union(*recipes))  # how many values a setting has in all runs

    rows = [(f["path"], {k: [f[k]] for k in UNITS if k in f}) for f in runs]  # name, {figure: [value]}
    groups = []
    for recipe, by_seed in recipes.items():
        if len(by_seed) > 1:
            same = list(by_seed.values())
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


def draw(f, show, folder):
    """The figures as PNG files in `folder`, in colours that the colour-blind can tell apart; curves from log.csv beside the checkpoint."""
    from matplotlib.figure import Figure  # here, for it is optional
    log, made, pages = Path(f["path"]).with_name("log.csv"), f["args"], {}

    def page(name, width, height, *grid, **options):
        pages[name] = Figure((width, height), layout="constrained")
        pages[name].suptitle(f["path"], size=8, color="grey", parse_math=False)
        return pages[name], pages[name].subplots(*grid, squeeze=False, **options)
    log = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
    chance = dict(pretrain=(made["alpha"] + made["beta"]) * math.log(made["queue_size"] + 1), finetune=math.log(len(f["classes"])))
    phases = [phase for phase in chance if any(x["phase"] == phase for x in log)]
    for phase, (loss, share) in zip(phases, page("curves", 9, 4.6, 2, len(phases), sharex="col")[1].T if phases else ()):
        values = torch.tensor([[float(x[k] or "nan") for k in ("epoch", "loss", "accuracy", "knn")] for x in log if x["phase"] == phase])
        epochs, losses, accuracy, knn = (values * torch.tensor([1, 1, 100, 100])).T.numpy()
        loss.axhline(chance[phase], color="grey", ls="--", label="chance")
        style = dict(color=BLUE, marker="." if len(epochs) < 3 else None)
        loss.plot(epochs, losses, **style)
        loss.set(title=dict(pretrain="pre-training", finetune="fine-tuning")[phase], ylabel="loss",
                 ylim=(0, 1.08 * max(chance[phase], losses.max())))
        share.plot(epochs, accuracy, **style, label=dict(pretrain="own key nearer than the queue", finetune="training recordings")[phase])
        if phase == "pretrain":
            share.plot(epochs, knn, "o", color=RED, label="kNN, training recordings")
        share.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        share.xaxis.get_major_locator().set_params(integer=True)
        loss.legend(frameon=False), share.legend(frameon=False)
    draw_spikes(f, show, page)
    draw_classes(f, show, page)
    for name, figure in pages.items():
        figure.savefig(folder / f"{name}.png")


def draw_spikes(f, show, page):
    """The frames of a recording and two views of it; the spikes of a recording, and what every layer does."""
    from matplotlib.patches import Patch
    T, layers = f["args"]["n_frames"], f["layers"]
    steps = torch.linspace(0, T - 1, min(T, 8)).round().int().tolist()
    figure, grid = page("frames", 1.6 * len(steps) + 0.5, 5.2, 3, len(steps))
    for t, column in zip(steps, grid.T):
        column[0].set_title(f"t = {t + 1}")
        for ax, x, name in zip(column, show["frames"], ("recording", "a view of it", "another view")):
            off, on = (x[t, 0] / show["frames"][0].max().clamp(min=1)).sqrt()[..., None]  # [H, W, 1], taken away from white
            ax.imshow((1 - off * torch.tensor([0.16, 0.63, 1.0]) - on * torch.tensor([1.0, 0.55, 0.3])).clamp(0, 1).numpy())
            ax.set(xticks=[], yticks=[], ylabel=name if t == 0 else "")
    key = [Patch(color=RED, label="off events"), Patch(color=BLUE, label="on events")]
    figure.legend(handles=key, ncols=2, loc="outside lower center", frameon=False)
    if not show["rasters"]:
        return
    _, [[raster, *bars]] = page("spikes", 9, 1.6 + 0.4 * len(layers), 1, 4, sharey=True, width_ratios=[4, 2, 2, 2])
    for i, x in enumerate(layers):
        t, k = show["rasters"].get(x["layer"], torch.zeros(0, 2)).nonzero().T.numpy()  # none of what is no LIF
        raster.hlines(i + (k - 7.5) / 19, t + 0.6, t + 1.4, color="black", lw=1.5)
        raster.axhline(i + 0.5, color="lightgrey", lw=0.8)
    raster.set(title="16 neurons of each layer", xlabel="time step", yticks=range(len(layers)), yticklabels=[x["layer"] for x in layers],
               xlim=(0.5, T + 0.5), ylim=(len(layers) - 0.5, -0.5), xticks=range(1, T + 1, 1 + T // 9))
    for ax, key, label in zip(bars, ("rate", "silent", "energy"), ("firing rate, %", "silent neurons, %", "energy, µJ")):
        ax.barh(range(len(layers)), [x.get(key, 0) for x in layers], 0.7, color=BLUE)
        ax.set_xlabel(label)


def draw_classes(f, show, page):
    """Accuracy by time step and the confusion matrix, of a classifier; a map of the features by principal components."""
    names, T = show["names"], f["args"]["n_frames"]
    small, side = (9, 4.4) if len(names) <= 20 else (6, 4.4 + 0.11 * len(names))  # points; inches
    if "accuracy" in f:
        figure, [[steps, matrix]] = page("accuracy", 4.6 + side, side, 1, 2, width_ratios=[3.6, 1 + side])
        share, low, high = zip(*f["steps"])
        steps.fill_between(range(1, T + 1), low, high, color=BLUE, alpha=0.2, lw=0)
        steps.plot(range(1, T + 1), share, "o-", color=BLUE)
        steps.set(xlabel="time steps seen", ylabel="test accuracy and its 95 % interval, %", xticks=range(1, T + 1, 1 + T // 9))
        counts = torch.tensor(f["confusion"])
        percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
        figure.colorbar(matrix.imshow(percent, cmap="Blues", vmin=0, vmax=100), label="% of the class")
        for i, j in counts.nonzero().tolist():
            matrix.text(j, i, counts[i, j].item(), size=small, ha="center", va="center", color="white" if percent[i, j] > 50 else "black")
        matrix.set(xlabel="taken for", ylabel="class", xticks=range(len(names)), yticks=range(len(names)))
        matrix.set_xticklabels(f["classes"], rotation=90, size=small, parse_math=False)
        matrix.set_yticklabels(f["classes"], size=small, parse_math=False)
    z = show["features"] - show["features"].mean(0)
    variances, axes = torch.linalg.eigh(z.T @ z)
    points, percent = z @ axes[:, [-1, -2]], 100 * variances / variances.sum()  # [N, 2]
    _, [[ax]] = page("map", 1.6 * min(side, 9), 1.2 * min(side, 9))
    for c in show["labels"].unique().tolist():
        x, y = points[show["labels"] == c].T.numpy()
        ax.scatter(x, y, 18, COLOURS[c % 7], marker="o^sDv"[c % 5])
        ax.text(np.median(x), np.median(y), names[c], parse_math=False, size=small + 1, ha="center", va="center",
                bbox=dict(color="white", alpha=0.85, pad=1, lw=0))
    ax.set(xlabel=f"first principal component, {percent[-1]:.0f} % of the variance", ylabel=f"second, {percent[-2]:.0f} %")


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
        if args.pictures:
            Path(args.pictures).mkdir(parents=True, exist_ok=True)
        if args.json:
            open(args.json, "a").close()
        work = tqdm([*zip(args.ckpt, ckpts)], disable=None)  # on a terminal alone
        runs = [examine(path, ckpt, args) for path, ckpt in work]
        if len(runs) == 1:
            tell(runs[0])
        groups = table(runs) if len(runs) > 1 else []
        if args.json:
            Path(args.json).write_text(json.dumps(dict(units=UNITS, runs=runs, groups=groups)))


if __name__ == "__main__":
    main()
