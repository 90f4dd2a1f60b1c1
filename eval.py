"""What a checkpoint is worth: accuracy, representation, spikes and energy; text, JSON, pictures.

    python eval.py --ckpt runs/toy/finetuned.pt --pictures docs    # everything
    python eval.py --ckpt runs/*/finetuned.pt --json all.json      # a row each, mean over seeds
    python eval.py --ckpt runs/toy/pretrained.pt --dataset FOLDER  # transfer to other data

The prediction after t steps is the class with the largest mean logit over steps 1 to t. Features
are the outputs of the checkpoint's encoder (of finetuned.pt, the fine-tuned one), averaged over
time; kNN and linear probe learn from them with all training labels.
Tests: python -m pytest test_all.py -k eval
"""
import argparse
import copy
import csv
import functools
import importlib.util
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
import neuron
from data import UserError
from loss import chance_level

# The columns of a summary, and their units.
UNITS = dict(accuracy="%", knn="%", probe="%", alignment="", uniformity="", rate="%", energy="uJ")
# uJ of a multiply-accumulate (MAC; not the loss of that name) and of an accumulate, at 45 nm
E_MAC, E_AC = 4.6e-6, 0.9e-6
ENERGY_NOTE = """\
  theoretical energy at 45 nm: 4.6 pJ per multiply-accumulate (MAC) in the first layer and where the
  input is no sum of spikes, else 0.9 pJ per synaptic operation (MACs x mean input); batch norm is
  folded into the weights; membranes and memory cost nothing"""


# ----------------------------------------------------------- metrics: tensors in and numbers out

def wilson_interval(correct, n, z=1.959964):
    """Compute [share, lower, upper end of its 95 % interval] in percent (Wilson 1927)."""
    p, w = correct / n, z * z / n
    half = (w * p * (1 - p) + w * w / 4) ** 0.5
    low, high = (p + w / 2 - half) / (1 + w), (p + w / 2 + half) / (1 + w)
    return [100 * p, 100 * max(0.0, low), 100 * min(1.0, high)]


def accuracy_line(accuracy, recordings):
    """Write the line that ends train.py, and eval.py of a classifier; accuracy in percent."""
    return f"test accuracy {accuracy:.2f} % (last epoch, {recordings} recordings)"


def accuracy_metrics(logits, labels, classes):
    """Compare logits [T, N, C] with labels [N] -> dict.

    In percent: accuracy and its interval [low, high]; steps: [accuracy, low, high] after each of 1
    to T steps; top5 (None up to 10 classes); by_class (None: no test recordings). In recordings:
    confusion [C][C], a row per true class; worst: the five most frequent errors [count, true,
    predicted].
    """
    _, N, C = logits.shape
    preds = logits.cumsum(0).argmax(2)  # [T, N]; the largest sum of steps 1 to t
    steps = [wilson_interval(correct, N) for correct in (preds == labels).sum(1).tolist()]
    top5 = None
    if C > 10:
        is_hit = logits.sum(0).topk(5).indices == labels[:, None]  # [N, 5]
        top5 = 100 * is_hit.sum().item() / N
    confusion = torch.bincount(labels * C + preds[-1], minlength=C * C).view(C, C).tolist()
    errors = [[n, classes[i], classes[j]] for i, row in enumerate(confusion)
              for j, n in enumerate(row) if n and i != j]
    return dict(
        accuracy=steps[-1][0], interval=steps[-1][1:], steps=steps, confusion=confusion, top5=top5,
        by_class=[100 * row[c] / sum(row) if any(row) else None for c, row in enumerate(confusion)],
        worst=sorted(errors, reverse=True)[:5])


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Compute weighted k-NN accuracy (Wu et al. 2018) of features [N, D], [M, D] -> 0 to 1.

    The k nearest training features vote, each weighted by exp(cosine / temperature).
    """
    train_features = F.normalize(train_features, dim=1)
    correct, k = 0, min(k, len(train_features))
    for z, y in zip(test_features.split(1024), test_labels.split(1024)):
        cosine, nearest = (F.normalize(z, dim=1) @ train_features.T).topk(k)  # [m, k]
        votes = F.one_hot(train_labels[nearest]) * (cosine / temperature).exp()[..., None]
        correct += (votes.sum(1).argmax(1) == y).sum().item()  # of votes [m, k, classes]
    return correct / len(test_labels)


def linear_probe_accuracy(train_features, train_labels, test_features, test_labels):
    """Fit a linear classifier to features [N, D], test it on [M, D] -> accuracy, 0 to 1."""
    classifier = models.fit_linear(train_features, train_labels, int(train_labels.max()) + 1)
    return (classifier(test_features).argmax(1) == test_labels).float().mean().item()


def alignment_uniformity(a, b, z):
    """Compute both measures of Wang and Isola 2020: features a, b of two views and z, all [N, D].

    Of unit vectors, alignment is the mean of |a - b|^2, best 0, and uniformity the log of the mean
    of exp(-2 |z_i - z_j|^2) over pairs, best about -4, NaN of a single recording.
    """
    a, b, z = (F.normalize(features.double(), dim=1) for features in (a, b, z))
    total = sum(torch.cdist(rows, z).square().mul(-2).exp().sum() for rows in z.split(1024))
    pairs = len(z) * (len(z) - 1)  # total counts each recording with itself, as 1
    return dict(alignment=(a - b).square().sum(1).mean().item(),
                uniformity=((total - len(z)) / pairs).log().item())


def spike_stats(model, batches):
    """Run a network over batches and count, by forward hooks, what its layers do.

    Returns its outputs [T, N, D]; a dict of firing rate and silent neurons (no spike at all) in
    percent, MACs, synaptic operations (0 where MACs are counted instead) and energy (uJ) per
    recording, in all and by "layers"; and {layer: spikes [T, 16]}, of 16 neurons in the first
    recording.
    """
    model = copy.deepcopy(model)  # because the hooks stay
    layers, spikes, rasters = {}, {}, {}  # by name, in the order of calls
    names = {module: re.sub(r"^encoder\.|\.conv$|\.lif$", "", name)
             for name, module in model.named_modules()}  # conv and lif of a block are one layer

    def count(name, x, macs):
        # Analog, counted as multiply-accumulates: the first layer, on frames, and the head, on a
        # mean over space. Elsewhere x is a sum of spikes, and an input of n counts as n operations.
        analog = not layers or bool((x != x.round()).any())
        layer = layers.setdefault(name, dict(layer=name, macs=0, operations=0.0, analog=False))
        layer["macs"] += macs
        layer["operations"] += macs * x.mean(dtype=torch.float32).item()
        layer["analog"] |= analog

    def on_product(module, inputs, out):
        count(names[module], inputs[0], out.numel() * module.weight[0].numel())

    def on_qkv(module, inputs, out):  # out: [T, B, 3C, H, W]
        # A spike in k or q adds a row of 16 numbers, of v or of k^T v; in the row of the attention.
        q_and_k = torch.stack(out.chunk(3, 2)[:2])
        count(names[module].removesuffix(".qkv"), q_and_k, 16 * q_and_k.numel())

    def on_lif(module, inputs, out):  # out: [T, B, ...]
        name = names[module]
        if name not in layers:  # no convolution has its name: in a backbone of your own
            count(name, out.new_zeros(1), 0)
        spikes[name] = spikes.get(name, 0) + out.sum((0, 1), dtype=torch.float32)
        neurons = torch.linspace(0, out[0, 0].numel() - 1, 16).long()
        rasters.setdefault(name, out[:, 0].flatten(1).float().cpu()[:, neurons])

    for module in names:
        if isinstance(module, neuron.LIF):
            module.register_forward_hook(on_lif)
        elif isinstance(module, models.SpikingSelfAttention):
            module.qkv.register_forward_hook(on_qkv)
        elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(on_product)
    outputs = models.predict(model, batches)
    return outputs, summarise(list(layers.values()), spikes, *outputs.shape[:2]), rasters


def summarise(layers, spikes, T, N):
    """Turn what spike_stats counted in N recordings of T steps into its dict."""
    def firing(counts):
        return dict(rate=100 * counts.mean().item() / (T * N),
                    silent=100 * (counts == 0).float().mean().item())

    for layer in layers:
        analog = layer.pop("analog")
        layer["macs"] /= N
        layer["operations"] = 0.0 if analog else layer["operations"] / N
        layer["energy"] = E_MAC * layer["macs"] if analog else E_AC * layer["operations"]
        if layer["layer"] in spikes:
            layer |= firing(spikes[layer["layer"]])
    stats = {k: sum(layer[k] for layer in layers) for k in ("macs", "operations", "energy")}
    if spikes:  # a network of other neurons has none
        stats |= firing(torch.cat([counts.flatten() for counts in spikes.values()]))
    return stats | dict(layers=layers, energy_dense=E_MAC * stats["macs"])


# ------------------------------------------------------------------------------- one checkpoint

def evaluate(path, args):
    """Evaluate a checkpoint -> (results: a dict of all numbers, plots: what the pictures need)."""
    model, checkpoint = models.load_model(path, args.device)
    train_args, classes, kind = (checkpoint[k] for k in ("args", "classes", "kind"))
    models.limit_threads(train_args["image_size"])  # as train.py
    train, test = load_data(path, checkpoint, args)
    train_labels, test_labels = torch.tensor(train.labels), torch.tensor(test.labels)

    def batches(split):
        return data.batches(split, train_args["batch_size"], args.device)

    # accuracy, spikes and energy
    outputs, results, rasters = spike_stats(model, batches(test))  # [T, N, classes or features]
    results |= dict(path=path, kind=kind, dataset=args.dataset or train_args["dataset"],
                    recordings=len(test_labels), args=train_args, classes=classes,
                    parameters=sum(p.numel() for p in model.parameters()))
    if kind == "finetuned" and set(test.classes) <= set(classes):
        checkpoint_label = torch.tensor([classes.index(c) for c in test.classes])
        results |= accuracy_metrics(outputs, checkpoint_label[test_labels], classes)

    # the frozen encoder
    encoder = model.encoder if kind == "finetuned" else model
    features = outputs.mean(0)  # [N, D]
    if kind == "finetuned":  # outputs are logits
        features = models.predict(encoder, batches(test)).mean(0)
    train_features = features[:0]
    if len(train_labels):  # none if all recordings of --dataset are tested
        train_features = models.predict(encoder, batches(train)).mean(0)
    if len(train_labels) and len(train.classes) > 1:
        splits = train_features, train_labels, features, test_labels
        results |= dict(knn=100 * knn_accuracy(*splits), probe=100 * linear_probe_accuracy(*splits))
    if args.features:
        arrays = dict(classes=test.classes, train_names=train.names, test_names=test.names,
                      train_labels=train_labels, test_labels=test_labels,
                      train_features=train_features, test_features=features)
        if kind == "finetuned":
            head = copy.deepcopy(model.head).cpu().requires_grad_(False)
            # linear, so of mean features the mean logits
            arrays |= dict(logit_classes=classes, train_logits=head(train_features),
                           test_logits=head(features))
        Path(args.features).parent.mkdir(parents=True, exist_ok=True)
        np.savez(args.features, **arrays)

    # two views as in pre-training, but without --split-events
    torch.manual_seed(0)  # always the same ones
    view = functools.partial(data.augment, **train_args["pretrain_aug"])
    a, b = (models.predict(encoder, ((view(x), y) for x, y in batches(test))).mean(0)
            for _ in range(2))
    results |= alignment_uniformity(a, b, features)
    return results, dict(test=test, view=view, features=features, rasters=rasters)


def load_data(path, checkpoint, args):
    """Load the data of a checkpoint, or of --dataset -> (train, test); warn of what differs."""
    train_args, classes = checkpoint["args"], checkpoint["classes"]
    name = data.resolve(args.dataset or train_args["dataset"])
    same = name == train_args["dataset"]
    load = functools.partial(
        data.load, name, args.root or train_args["root"], train_args["n_frames"],
        train_args["image_size"], train_args["skip_broken"] or args.skip_broken,
        args.sensor or (train_args["sensor"] if same else None), train_args["frames_by"],
        args.columns or train_args["columns"])
    # A classifier that knows the classes of another folder has nothing to learn from it: it is
    # tested on the folder's Test, or on all recordings if there is neither Train nor Test.
    test_only = not same and checkpoint["kind"] == "finetuned"
    train, test = load(only="test" if test_only else None)
    if test_only:
        # Split as in training, do the names match? Then it is that folder at another place, and its
        # training recordings must not be tested. New classes have to be learned by kNN and probe.
        parts = data.split_by_class([(name.split("/")[0], name) for name in test.names])
        split = data.fingerprint(*(
            [name for part, _, name in parts if part == wanted] for wanted in ("train", "test")))
        if split == train_args["recordings"]:
            print(f"warning: {name} has the names of the training folder, so only its test "
                  "recordings are tested", file=sys.stderr)
        if split == train_args["recordings"] or not set(test.classes) <= set(classes):
            train, test = load()
    if same and data.fingerprint(train.names, test.names) != train_args["recordings"]:
        print(f"warning: {name} holds other recordings than when {path} was trained: some of those "
              "may be tested on now", file=sys.stderr)
    if train_args["sensor"] != train.sensor:
        print(f"warning: the sensor of {name} is {train.sensor}, the checkpoint's "
              f"{train_args['sensor']}: if the camera is the same, pass --sensor", file=sys.stderr)
    return train, test


def predict_files(args):
    """Classify files, or all recordings below folders -> [{path, predicted, probability}]."""
    model, checkpoint = models.load_model(args.ckpt[0], args.device)
    train_args, classes = checkpoint["args"], checkpoint["classes"]
    models.limit_threads(train_args["image_size"])
    if checkpoint["kind"] != "finetuned":
        raise UserError(f"{args.ckpt[0]}: holds no classifier; pass a finetuned.pt")
    files, rows = [], []
    for path in map(Path, args.predict):
        if path.is_dir():
            files += sorted(path / f for f in data.files_below(path) if data.is_recording(f))
        else:
            files.append(path)
    if not files:
        raise UserError(f"--predict: no recordings in {', '.join(args.predict)}")

    def to_frames(events, key):
        return data.to_frames(events, *(
            train_args[k] for k in ("n_frames", "sensor", "image_size", "frames_by")))
    read = functools.partial(data.read_file, columns=args.columns or train_args["columns"])
    if train_args["dataset"] in data.TONIC_DATASETS:
        _, _, _, read, _ = data.TONIC_DATASETS[train_args["dataset"]]
    for path in files:
        frames, error = data.try_recording(str(path), to_frames, read)
        if error and args.skip_broken:
            print(f"warning: left out: {path}: {error}", file=sys.stderr)
            continue
        if error:
            raise UserError(f"{path}: {error}")
        x = torch.from_numpy(frames)[:, None].float().to(args.device)  # [T, 1, 2, H, W]
        probability = models.predict(model, [(x, None)]).mean(0)[0].softmax(0)  # [classes]
        rows.append(dict(path=str(path), predicted=classes[probability.argmax()],
                         probability=round(probability.max().item(), 4)))
    return rows


def print_report(results):
    """Print the numbers of one checkpoint."""
    few = len(results["classes"]) <= 20
    print("{path}: {kind} {arch}, T = {n_frames}, {image_size} x {image_size} pixels, on {dataset}"
          .format(**results["args"] | results))
    if "accuracy" in results:
        print("accuracy by class" + (", confusion matrix (rows: true)" if few else ""))
        for name, share, row in zip(results["classes"], results["by_class"], results["confusion"]):
            counts = "".join(f"{n or '.':>4}" for n in row) if few else ""
            share = "-" if share is None else f"{share:.2f} %"
            print(f"  {name:18} {share:>8} of {sum(row):<6}{counts}")
        for n, true, pred in results["worst"]:
            print(f"  {n} x {true} taken for {pred}")
        steps = ", ".join(f"{accuracy:.2f}" for accuracy, _, _ in results["steps"])
        print(f"accuracy after 1 to {len(results['steps'])} time steps: {steps} %")
        top5 = "" if results["top5"] is None else f"; top-5 {results['top5']:.2f} %"
        print("95 % interval {:.2f} to {:.2f} %".format(*results["interval"]) + top5)
    elif results["kind"] == "finetuned":
        print(f"no accuracy: the checkpoint has other classes, {', '.join(results['classes'])}")
    print("layer               rate, % silent, %           MACs     operations  energy, uJ")
    for row in results["layers"] + [results | dict(layer="all")]:
        rate = f"{row['rate']:9.2f} {row['silent']:9.2f}" if "rate" in row else " " * 19
        print(f"{row['layer']:18} {rate} {row['macs']:14,.0f} {row['operations']:14,.0f} "
              f"{row['energy']:11.4f}")
    print(f"the same network without spikes, at all T steps: {results['energy_dense']:.4f} uJ")
    print(ENERGY_NOTE)
    print("{parameters:,} parameters; alignment {alignment:.3f}, uniformity {uniformity:.3f}"
          .format(**results))
    if "knn" in results:
        print("frozen features: kNN {knn:.2f} %, linear probe {probe:.2f} % ({recordings} test "
              "recordings)".format(**results))
    if "accuracy" in results:
        print(accuracy_line(results["accuracy"], results["recordings"]))


def print_summary(runs):
    """Print a row per run, then mean ± deviation of those that differ only in the seed.

    Of several with the same seed, the first one counts.
    """
    by_recipe, rows = defaultdict(dict), []
    for run in runs:
        settings = run["args"] | dict(kind=run["kind"], dataset=run["dataset"])
        # what may differ between seeds, each of which may have its own --init
        for name in ("seed", "out", "root", "device", "resume", "no_compile", "init"):
            del settings[name]
        by_recipe[json.dumps(settings)].setdefault(run["args"]["seed"], run)
        rows.append((run["path"], [run]))
    rows += [(f"mean of {len(same)} seeds, {same[0]['path']} ...", same)
             for same in (list(runs.values()) for runs in by_recipe.values()) if len(same) > 1]
    width = max(len(name) for name, _ in rows)
    print(" " * width, *(f"{k}, {unit}".strip(", ").rjust(15) for k, unit in UNITS.items()))
    for name, same in rows:
        cells = []
        for k, unit in UNITS.items():
            values, digits = [run[k] for run in same if k in run], 2 if unit else 3
            cell = f"{np.mean(values):.{digits}f}" if len(values) == len(same) else "-"
            if len(same) == len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):.{digits}f}"
            cells.append(cell.rjust(15))
        print(name.ljust(width), *cells)


# ------------------------------------------------------------------------------------- pictures

def plot_all(results, plots, folder):
    """Draw the results as PNG files into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = dict(frames=plot_frames(plots))
    if len(plots["features"]) > 1:
        figures["map"] = plot_map(plots)
    if Path(results["path"]).with_name("log.csv").exists():
        figures["curves"] = plot_curves(results)
    if plots["rasters"]:  # a network of other neurons has none
        figures["spikes"] = plot_spikes(results, plots["rasters"])
    if "accuracy" in results:
        figures["accuracy"] = plot_accuracy(results)
    for name, figure in figures.items():
        figure.suptitle(results["path"], size=8, color="grey", parse_math=False)
        figure.savefig(folder / f"{name}.png")


def new_figure(width, height, rows=1, columns=1, **options):
    """Make a figure of width x height inches -> (figure, its axes [rows, columns])."""
    from matplotlib.figure import Figure  # here, because it is optional
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_frames(plots):
    """Plot a recording and two views of it, a row each, eight frames at most."""
    test, view = plots["test"], plots["view"]
    x = torch.as_tensor(test.frames[len(test.labels) // 2])[:, None].float()  # [T, 1, 2, H, W]
    torch.manual_seed(0)
    rows = {"recording": x, "a view of it": view(x), "another view": view(x)}
    shown = range(0, len(x), math.ceil(len(x) / 8))
    figure, axes = new_figure(1.6 * len(shown) + 0.5, 5.2, 3)
    for [ax], (name, row) in zip(axes, rows.items()):
        # the root makes single events visible; white less red is bluish, white less blue orange
        off, on = (row[shown, 0] / x.max().clamp(min=1)).sqrt().unbind(1)  # [frames, H, W]
        colours = 1 - torch.stack([on, (on + off) / 2, off], -1)  # [frames, H, W, 3]
        ax.imshow(torch.cat(list(F.pad(colours, (0, 0, 1, 1), value=0.8)), 1).numpy())
        ax.set(ylabel=name, xticks=[], yticks=[])
    numbers = ", ".join(str(t + 1) for t in shown)
    ax.set_xlabel(f"frames {numbers}; off orange, on blue, both black", size=8)
    return figure


def plot_map(plots):
    """Plot the first two principal components of the features [N, D], coloured by class."""
    test, z = plots["test"], plots["features"] - plots["features"].mean(0)
    _, s, directions = torch.linalg.svd(z, full_matrices=False)
    points, percent = z @ directions[:2].T, 100 * s.square() / s.square().sum()  # [N, 2]
    figure, [[ax]] = new_figure(9, 6.8)
    for c in np.unique(test.labels):
        x, y = points[test.labels == c].T.numpy()
        ax.scatter(x, y, 18, f"C{c % 10}", marker="o^sDv"[(c + c // 10) % 5])  # 50 classes differ
        ax.text(np.median(x), np.median(y), test.classes[c], size=8, parse_math=False,
                bbox=dict(color="white", alpha=0.8, pad=1))
    ax.set(xlabel=f"principal component 1, {percent[0]:.0f} % of the variance",
           ylabel=f"principal component 2, {percent[1]:.0f} %")
    return figure


def plot_curves(results):
    """Plot loss and accuracy by epoch, from the log.csv beside the checkpoint."""
    args, log = results["args"], defaultdict(list)
    chance = dict(pretrain=chance_level(*(
        args[k] for k in ("queue_size", "n_frames", "alpha", "beta"))))
    if results["kind"] == "finetuned":
        chance["finetune"] = math.log(len(results["classes"]))
    with open(Path(results["path"]).with_name("log.csv")) as f:
        for row in csv.DictReader(f):
            if row["phase"] in chance:
                log[row["phase"]].append(row)
    meaning = dict(pretrain="own key nearer than the queue", finetune="training recordings")
    figure, axes = new_figure(9, 4.6, 2, len(log), sharex="col")
    for (phase, rows), (top, bottom) in zip(log.items(), axes.T):
        epoch, loss, accuracy, knn = np.array([
            [float(row[k] or "nan") for row in rows] for k in ("epoch", "loss", "accuracy", "knn")])
        top.plot(epoch, loss, ".-", ms=4)
        top.axhline(chance[phase], color="grey", ls="--", label="chance")
        top.set(title=phase, ylabel="loss", ylim=(0, 1.08 * max(chance[phase], *loss)))
        bottom.plot(epoch, 100 * accuracy, ".-", ms=4, label=meaning[phase])
        bottom.plot(epoch, 100 * knn, "o", label="kNN" if phase == "pretrain" else None)
        bottom.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        top.legend()
        bottom.legend()
    return figure


def plot_spikes(results, rasters):
    """Plot 16 neurons of each layer over time, rasters {layer: [T, 16]}, and its rates, energy."""
    T, layers = results["args"]["n_frames"], results["layers"]
    names, y = [layer["layer"] for layer in layers], range(len(layers))
    figure, [[raster, *bars]] = new_figure(
        9, 1.6 + 0.4 * len(y), 1, 4, sharey=True, width_ratios=[4, 2, 2, 2])
    neurons = torch.cat([rasters.get(name, torch.zeros(T, 16)) for name in names], 1)
    labels = dict(rate="firing rate, %", silent="silent neurons, %", energy="energy, µJ")
    for ax, (key, label) in zip(bars, labels.items()):
        ax.barh(y, [layer.get(key, 0) for layer in layers])
        ax.set_xlabel(label)
    raster.imshow(neurons.T.numpy(), "Greys", aspect="auto", interpolation="none",
                  extent=(0.5, T + 0.5, len(y) - 0.5, -0.5))
    raster.hlines([i + 0.5 for i in y], 0.5, T + 0.5, color="C1", lw=0.8)  # between layers
    raster.set(title="16 neurons of each layer", xlabel="time step", yticks=y, yticklabels=names)
    raster.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_accuracy(results):
    """Plot accuracy by time step, and the confusion matrix."""
    classes, counts = results["classes"], np.array(results["confusion"])
    percent, side = 100 * counts / counts.sum(1, keepdims=True).clip(min=1), 3.4 + len(counts) / 8
    figure, [[curve, matrix]] = new_figure(4 + side, side, 1, 2, width_ratios=[3.6, side])
    steps, (accuracy, low, high) = range(1, 1 + len(results["steps"])), zip(*results["steps"])
    curve.fill_between(steps, low, high, alpha=0.2, lw=0)
    curve.plot(steps, accuracy, "o-")
    curve.set(xlabel="time steps seen", ylabel="test accuracy and its 95 % interval, %")
    curve.xaxis.get_major_locator().set_params(integer=True)
    matrix.imshow(percent, "Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(counts):
        matrix.text(j, i, counts[i, j], size=8, ha="center", va="center",
                    color="white" if percent[i, j] > 50 else "black")
    matrix.set(title="recordings; colour: share of the class", xlabel="predicted", ylabel="class")
    matrix.set_xticks(range(len(counts)), classes, rotation=90, size=8, parse_math=False)
    matrix.set_yticks(range(len(counts)), classes, size=8, parse_math=False)
    return figure


def parse_args(argv):
    """Parse the flags; what is left out is as it was in training."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="pretrained.pt or finetuned.pt, one or more")
    add("--dataset", help="data to test on, if not those of the checkpoint")
    add("--root", help="folder of downloads and frames, if not that of the checkpoint")
    add("--sensor", type=int, nargs=2, metavar=("W", "H"), help="size of a folder's sensor")
    add("--columns", help="order of the columns of plain [N, 4] arrays, as xytp")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add("--predict", nargs="+", metavar="PATH",
        help="classify these recordings or folders of them, with the sensor of training")
    add("--features", metavar="FILE", help="write features, logits, labels and names as .npz")
    add("--pictures", metavar="DIR", help="draw one checkpoint as PNG files into this folder")
    add("--json", metavar="FILE", help="write all numbers to this file")
    add("--device", type=models.device, help="cpu; untested: cuda[:N], mps",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="never call a compiler: slower, the same numbers")
    args = parser.parse_args(argv)
    if len(args.ckpt) > 1 and (args.pictures or args.predict or args.features):
        parser.error("--pictures, --predict and --features take a single --ckpt")
    if args.predict and (args.dataset or args.sensor or args.features or args.pictures):
        parser.error("--predict does not go with --dataset, --sensor, --features or --pictures")
    if args.pictures and not importlib.util.find_spec("matplotlib"):
        parser.error("--pictures needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    args = parse_args(argv)
    neuron.COMPILE = not args.no_compile
    if args.predict:
        rows = predict_files(args)
        writer = csv.DictWriter(
            sys.stdout, ["path", "predicted", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if args.json:
            data.write_json(args.json, rows)
        return
    runs, failed = [], []
    for path in args.ckpt:
        try:
            results, plots = evaluate(path, args)
            runs.append(results)
        except (UserError, OSError) as e:  # the others' results stand
            failed.append(str(e) if path in str(e) else f"{path}: {e}")
    if len(args.ckpt) > 1 and runs:
        print_summary(runs)
    elif runs:
        print_report(results)
    if args.json and runs:
        data.write_json(args.json, dict(units=UNITS, runs=runs))
    if args.pictures and runs:
        plot_all(results, plots, Path(args.pictures))
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a name ends no run
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
