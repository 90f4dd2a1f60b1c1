"""What a checkpoint is worth: accuracy, representation, spikes and energy; text, JSON, pictures.

    python eval.py --ckpt runs/toy/finetuned.pt --pictures runs/toy  # everything
    python eval.py --ckpt runs/*/finetuned.pt --json all.json        # a row each, mean over seeds
    python eval.py --ckpt runs/toy/pretrained.pt --dataset FOLDER    # transfer to other data

The prediction after t steps is the class with the largest mean logit over steps 1 to t. Features
are the outputs of the checkpoint's encoder (of finetuned.pt, the fine-tuned one), averaged over
time; kNN and linear probe learn from them with all training labels.
Tests: python -m pytest test_all.py -k eval
"""
import argparse
import contextlib
import copy
import csv
import functools
import importlib.util
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import models
import neuron
from loss import chance_level

UNITS = dict(accuracy="%", knn="%", probe="%", alignment="", uniformity="", rate="%", energy="uJ")
E_MAC, E_AC = 4.6e-6, 0.9e-6  # uJ a multiply-accumulate (MAC; not the loss) and accumulate, 45 nm


def wilson_interval(correct, n, z=1.959964):
    """Compute [share, lower, upper end of its 95 % interval] in percent (Wilson 1927)."""
    p, w = correct / n, z * z / n
    half = (w * p * (1 - p) + w * w / 4) ** 0.5
    low, high = (p + w / 2 - half) / (1 + w), (p + w / 2 + half) / (1 + w)
    return [100 * p, 100 * max(0.0, low), 100 * min(1.0, high)]


def accuracy_line(accuracy, recordings):
    """Write the line that ends train.py, and eval.py of a classifier; accuracy in percent."""
    return f"test accuracy {accuracy:.2f} % (last epoch, {recordings} recordings)"


def accuracy_metrics(logits, labels):
    """Compare logits [T, N, C] with labels [N] -> dict, in percent but for confusion.

    steps: [accuracy, low, high] after 1 to T; confusion [C][C]: recordings, a row per true class.
    """
    _, N, C = logits.shape
    preds = logits.cumsum(0).argmax(2)  # [T, N]; the largest sum of steps 1 to t
    steps = [wilson_interval(correct, N) for correct in (preds == labels).sum(1).tolist()]
    confusion = torch.bincount(labels * C + preds[-1], minlength=C * C).view(C, C).tolist()
    by_class = [100 * row[c] / sum(row) if any(row) else None for c, row in enumerate(confusion)]
    return dict(accuracy=steps[-1][0], interval=steps[-1][1:], steps=steps, confusion=confusion,
                by_class=by_class)


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Compute weighted k-NN accuracy (Wu et al. 2018) of features [N, D] and [M, D] -> 0 to 1."""
    train_features = F.normalize(train_features, dim=1)
    correct, k = 0, min(k, len(train_features))
    for z, y in zip(test_features.split(1024), test_labels.split(1024)):
        cosine, nearest = (F.normalize(z, dim=1) @ train_features.T).topk(k)  # [m, k]
        votes = F.one_hot(train_labels[nearest]) * (cosine / temperature).exp()[..., None]
        correct += (votes.sum(1).argmax(1) == y).sum().item()  # of [m, k, classes]
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
    others = total - len(z)  # less each recording with itself, which counts 1
    return dict(alignment=(a - b).square().sum(1).mean().item(),
                uniformity=(others / (len(z) * (len(z) - 1))).log().item())


def spike_stats(model, batches):
    """Run a network over batches and count, by forward hooks, what its layers do.

    Returns outputs [T, N, D]; a dict, in all and by "layers": firing rate and silent neurons (no
    spike in any recording) in percent; a recording's MACs, synaptic operations (0 where MACs take
    the energy) and energy in uJ; and {layer: spikes [T, 16]} of 16 neurons, first recording.
    """
    totals, spikes, rasters = defaultdict(lambda: np.zeros(3)), {}, {}  # by layer
    model = copy.deepcopy(model)  # because the hooks stay
    qkv = [m.qkv for m in model.modules() if isinstance(m, models.SpikingSelfAttention)]

    def count(name, x, macs):
        # Event counts (first layer) and means over space (heads) are multiplied; spikes, added.
        real = not totals or (x != x.round()).any().item()
        totals[name] += macs, macs * x.mean(dtype=torch.float32).item(), real

    def hook(name, module, inputs, out):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            count(name, inputs[0], out.numel() * module.weight[0].numel())
        elif module in qkv:  # a spike in k or q adds a row of 16 numbers, of v or of k^T v
            q_and_k = torch.stack(out.chunk(3, 2)[:2])  # of [T, B, 3C, H, W]
            count(name.removesuffix(".qkv"), q_and_k, 16 * q_and_k.numel())
        elif isinstance(module, neuron.LIF):  # out: [T, B, ...]
            totals[name] += 0  # a layer of the report, even where no convolution shares its name
            spikes[name] = spikes.get(name, 0) + out.sum((0, 1), dtype=torch.float32)
            if name not in rasters:
                neurons = torch.linspace(0, out[0, 0].numel() - 1, 16).long()
                rasters[name] = out[:, 0].flatten(1)[:, neurons].float().cpu()

    for name, module in model.named_modules():  # conv and lif of a block are one layer
        layer = name.removeprefix("encoder.").removesuffix(".conv").removesuffix(".lif")
        layer = "heads" if name.startswith("heads.") else layer
        module.register_forward_hook(functools.partial(hook, layer))
    outputs = models.predict(model, batches)
    T, N, _ = outputs.shape
    if spikes:  # a network of other neurons has none
        spikes["all layers"] = torch.cat([counts.flatten() for counts in spikes.values()])
    firing = {name: dict(rate=100 * counts.mean().item() / (T * N),
                         silent=100 * (counts == 0).float().mean().item())
              for name, counts in spikes.items()}
    layers = []
    for name, total in totals.items():
        macs, operations, real = (total / (N, N, 1)).tolist()
        layer = dict(layer=name, macs=macs, operations=0.0 if real else operations)
        layer["energy"] = E_MAC * macs if real else E_AC * operations
        layers.append(layer | firing.get(name, {}))
    stats = {k: sum(layer[k] for layer in layers) for k in ("macs", "operations", "energy")}
    stats |= firing.get("all layers", {}) | dict(layers=layers, energy_dense=E_MAC * stats["macs"])
    return outputs, stats, rasters


def evaluate(path, args):
    """Evaluate a checkpoint -> (results: a dict of all numbers, plots: what the pictures need)."""
    model, checkpoint = models.load_model(path, args.device)
    was, classes, kind = (checkpoint[k] for k in ("args", "classes", "kind"))
    encoder = model.encoder if kind == "finetuned" else model
    models.prepare_cpu(was["image_size"])  # as train.py
    train, test = load_data(checkpoint, args)
    y, y_test = torch.tensor(train.labels), torch.tensor(test.labels)
    batches = functools.partial(data.batches, batch_size=was["batch_size"], device=args.device)

    outputs, results, rasters = spike_stats(model, batches(test))  # [T, N, classes or features]
    results |= dict(path=path, kind=kind, dataset=args.dataset or was["dataset"], args=was,
                    recordings=len(y_test), classes=classes,
                    parameters=sum(p.numel() for p in model.parameters()))
    if kind == "finetuned" and set(test.classes) <= set(classes):
        place = torch.tensor([classes.index(c) for c in test.classes])
        results |= accuracy_metrics(outputs, place[y_test])

    def encode(split, view=lambda x: x):
        views = ((view(x), None) for x, _ in batches(split))
        return models.predict(encoder, views).mean(0)  # [N, D]
    z_test = encode(test)
    z = encode(train) if len(y) else z_test[:0]
    if len(y) and len(train.classes) > 1:
        results |= dict(knn=100 * knn_accuracy(z, y, z_test, y_test),
                        probe=100 * linear_probe_accuracy(z, y, z_test, y_test))
    if args.features:
        logits = dict(test_logits=outputs.mean(0), logit_classes=classes)
        Path(args.features).parent.mkdir(parents=True, exist_ok=True)
        np.savez(args.features, classes=test.classes, train_names=train.names, train_labels=y,
                 train_features=z, test_names=test.names, test_labels=y_test, test_features=z_test,
                 **(logits if kind == "finetuned" else {}))

    view = functools.partial(data.augment, **was["pretrain_aug"])  # of all events, all the time
    torch.manual_seed(0)  # always the same views
    results |= alignment_uniformity(encode(test, view), encode(test, view), z_test)
    return results, dict(test=test, view=view, features=z_test, rasters=rasters)


def load_data(checkpoint, args):
    """Load the data of a checkpoint, or --dataset without what was trained on -> (train, test)."""
    was = checkpoint["args"]
    name = data.resolve(args.dataset or was["dataset"])
    # To a classifier, a folder is a test set: its Test, or else all; it has nothing to learn.
    only = "test" if args.dataset and checkpoint["kind"] == "finetuned" else None
    with contextlib.redirect_stdout(sys.stderr):  # what is said of the data is no result
        train, test = data.load(
            name, args.root or was["root"], was["n_frames"], was["image_size"],
            was["skip_broken"] or args.skip_broken, args.sensor or was["sensor"],
            was["frames_by"], args.columns or was["columns"], only)
        data.warn_of_other_frames(name, dict(sensor=test.sensor), was)
        seen = np.union1d(checkpoint["trained_on"], train.ids)  # kNN and probe learn from train
        left = ": left out" if args.dataset else ""  # else it is a warning only
        rest = data.leave_out(test, seen, f"were trained on{left}")
        test = rest if args.dataset else test
    if not len(test.labels):
        raise data.UserError(f"{name}: no recording that was not trained on")
    return train, test


def predict_files(args):
    """Classify files, or all recordings below folders -> [{path, predicted, probability}]."""
    model, checkpoint = models.load_model(args.ckpt[0], args.device)
    was, classes = checkpoint["args"], checkpoint["classes"]
    models.prepare_cpu(was["image_size"])
    if checkpoint["kind"] != "finetuned":
        raise data.UserError(f"{args.ckpt[0]}: holds no classifier; pass a finetuned.pt")
    files = []
    for path in args.predict:
        found = sorted(data.find_recordings(path)) if os.path.isdir(path) else [()]  # itself
        files += [os.path.join(path, *parts) for parts in found]
    if not files:
        raise data.UserError(f"--predict: no recordings in {', '.join(args.predict)}")
    *_, read, _ = data.TONIC_DATASETS.get(was["dataset"], (data.read_file, None))
    if columns := args.columns or was["columns"]:  # else as the reader of training has it
        read = functools.partial(read, columns=columns)
    sensor = data.named_sensor(files) or args.sensor or was["sensor"]
    data.warn_of_other_frames("--predict", dict(sensor=sensor), was)
    settings = dict(n_frames=was["n_frames"], sensor_size=sensor, size=was["image_size"],
                    frames_by=was["frames_by"])
    rows, broken = [], {}
    for path, frames, _ in data.map_recordings(files, read, settings, broken):
        x = torch.from_numpy(frames)[:, None].float().to(args.device)  # [T, 1, 2, H, W]
        probability, c = models.predict(model, [(x, None)]).mean(0)[0].softmax(0).max(0)
        rows.append(dict(path=path, predicted=classes[c], probability=round(probability.item(), 4)))
    data.report_broken(broken, len({*files}), was["skip_broken"] or args.skip_broken)
    return rows


def print_report(results):
    """Print the numbers of one checkpoint."""
    few = len(results["classes"]) <= 20
    print("{path}: {kind} {arch}, T = {n_frames}, {image_size} x {image_size} pixels, on {dataset}"
          .format(**results["args"] | results))
    if "accuracy" in results:
        print("accuracy by class" + (", confusion matrix (rows: true)" if few else ""))
        for name, share, row in zip(results["classes"], results["by_class"], results["confusion"]):
            counts = "".join(f"{n or '.':>5}" for n in row) if few else ""
            share = "-" if share is None else f"{share:.2f} %"
            print(f"  {name:18} {share:>8} of {sum(row):<6}{counts}")
        steps = ", ".join(f"{accuracy:.2f}" for accuracy, _, _ in results["steps"])
        print(f"accuracy after 1 to {len(results['steps'])} time steps: {steps} %")
        print("95 % interval {:.2f} to {:.2f} %".format(*results["interval"]))
    elif results["kind"] == "finetuned":
        print(f"no accuracy: the checkpoint has other classes, {', '.join(results['classes'])}")
    print("layer               rate, % silent, %     dense MACs     operations  energy, uJ")
    for row in results["layers"] + [results | dict(layer="all")]:
        rate = "{rate:9.2f} {silent:9.2f}".format(**row) if "rate" in row else " " * 19
        print("{layer:19}{} {macs:14,.0f} {operations:14,.0f} {energy:11.4f}".format(rate, **row))
    print(f"the same network without spikes, at all T steps: {results['energy_dense']:.4f} uJ")
    print("a recording, 45 nm: 4.6 pJ a MAC of real numbers, 0.9 pJ an operation (MACs x input)")
    print("{parameters:,} parameters; alignment {alignment:.3f}, uniformity {uniformity:.3f}"
          .format(**results))
    if "knn" in results:
        print("frozen features: kNN {knn:.2f} %, linear probe {probe:.2f} % ({recordings} test "
              "recordings)".format(**results))
    if "accuracy" in results:
        print(accuracy_line(results["accuracy"], results["recordings"]))


def drop(flags, names):
    """Drop flags by name, also inside pretrained: None, or the flags of --init's own run."""
    kept = {name: value for name, value in flags.items() if name not in names}
    return kept | dict(pretrained=kept["pretrained"] and drop(kept["pretrained"], names))


def print_summary(runs):
    """Print a row per run, then mean ± deviation of those that differ only in their seeds."""
    by_recipe, rows = defaultdict(dict), []
    for run in runs:
        flags = drop(run["args"], ["out", "root", "device", "resume", "no_compile", "init"])
        tested = run["kind"], run["dataset"], run["recordings"]
        same = by_recipe[tested, json.dumps(drop(flags, ["seed"]))]
        if same.setdefault(json.dumps(flags), run) is not run:
            print(f"left out of the mean, since it repeats a run: {run['path']}", file=sys.stderr)
        rows.append((run["path"], [run]))
    rows += [(f"mean of {len(same)} runs, {next(iter(same.values()))['path']} ...", same.values())
             for same in by_recipe.values() if len(same) > 1]
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
    pictures = [("frames", plot_frames, True),
                ("map", plot_map, len(plots["features"]) > 1),
                ("curves", plot_curves, Path(results["path"]).with_name("log.csv").exists()),
                ("spikes", plot_spikes, plots["rasters"]),  # a network of other neurons has none
                ("accuracy", plot_accuracy, "accuracy" in results)]
    for name, plot, possible in pictures:
        if possible:
            figure = plot(results | plots)
            figure.suptitle(results["path"], size=8, color="grey", parse_math=False)
            figure.savefig(folder / f"{name}.png")


def new_figure(width, height, rows=1, columns=1, **options):
    """Make a figure of width x height inches -> (figure, its axes [rows, columns])."""
    from matplotlib.figure import Figure  # here, because it is optional
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_frames(results):
    """Plot a recording and two views of it, a row each, eight frames at most."""
    test, view = results["test"], results["view"]
    x = torch.as_tensor(test.frames[len(test.labels) // 2])[:, None].float()  # [T, 1, 2, H, W]
    torch.manual_seed(0)
    rows = {"recording": x, "a view of it": view(x), "another view": view(x)}
    shown = range(0, len(x), int(np.ceil(len(x) / 8)))
    figure, axes = new_figure(1.6 * len(shown) + 0.5, 5.2, 3)
    for [ax], (name, row) in zip(axes, rows.items()):
        # the root makes single events visible; white less red is bluish, white less blue orange
        off, on = (row[shown, 0] / x.max()).sqrt().unbind(1)  # [frames, H, W]
        colours = 1 - torch.stack([on, (on + off) / 2, off], -1)  # [frames, H, W, 3]
        ax.imshow(torch.cat(list(F.pad(colours, (0, 0, 1, 1), value=0.8)), 1).numpy())
        ax.set(ylabel=name, xticks=[], yticks=[])
    numbers = ", ".join(str(t + 1) for t in shown)
    ax.set_xlabel(f"frames {numbers}; off orange, on blue, both black", size=8)
    return figure


def plot_map(results):
    """Plot the first two principal components of the features [N, D], coloured by class."""
    test, z = results["test"], results["features"] - results["features"].mean(0)
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
    log = np.genfromtxt(Path(results["path"]).with_name("log.csv"), "U8, f8, f8, f8, f8",
                        delimiter=",", names=True, ndmin=1,
                        usecols=("phase", "epoch", "loss", "accuracy", "knn"))
    args = results["args"]
    chance = chance_level(args["queue_size"], args["alpha"], args["beta"])
    panels = [("pretrain", chance, "own key nearer than the queue", "kNN")]
    if results["kind"] == "finetuned":
        panels += [("finetune", np.log(len(results["classes"])), "training recordings", None)]
    panels = [panel for panel in panels if panel[0] in log["phase"]]
    figure, axes = new_figure(9, 4.6, 2, len(panels), sharex="col")
    for (phase, chance, meaning, knn), (top, bottom) in zip(panels, axes.T):
        rows = log[log["phase"] == phase]
        top.plot(rows["epoch"], rows["loss"], ".-", ms=4)
        top.axhline(chance, color="grey", ls="--", label="chance")
        top.set(title=phase, ylabel="loss", ylim=(0, 1.08 * max(chance, *rows["loss"])))
        bottom.plot(rows["epoch"], 100 * rows["accuracy"], ".-", ms=4, label=meaning)
        bottom.plot(rows["epoch"], 100 * rows["knn"], "o", label=knn)
        bottom.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        bottom.xaxis.get_major_locator().set_params(integer=True)
        top.legend()
        bottom.legend()
    return figure


def plot_spikes(results):
    """Plot 16 neurons of each layer over time, and its firing rate, silent neurons, energy."""
    T, layers = results["args"]["n_frames"], results["layers"]
    names, y = [layer["layer"] for layer in layers], np.arange(len(layers))
    figure, [[raster, *bars]] = new_figure(
        9, 1.6 + 0.4 * len(y), 1, 4, sharey=True, width_ratios=[4, 2, 2, 2])
    neurons = torch.cat([results["rasters"].get(name, torch.zeros(T, 16)) for name in names], 1)
    labels = dict(rate="firing rate, %", silent="silent neurons, %", energy="energy, µJ")
    for ax, (key, label) in zip(bars, labels.items()):
        ax.barh(y, [layer.get(key, 0) for layer in layers])
        ax.set_xlabel(label)
    raster.imshow(neurons.T.numpy(), "Greys", aspect="auto", interpolation="none",
                  extent=(0.5, T + 0.5, len(y) - 0.5, -0.5))
    raster.hlines(y + 0.5, 0.5, T + 0.5, color="C1", lw=0.8)  # between layers
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
    add("--columns", choices=data.COLUMNS, metavar="XYTP", help="order in plain [N, 4] arrays")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add("--predict", nargs="+", metavar="PATH",
        help="classify these recordings or folders of them, with the sensor of training")
    add("--features", metavar="FILE", help="write features, logits, labels and names as .npz")
    add("--pictures", metavar="DIR", help="draw one checkpoint as PNG files into this folder")
    add("--json", metavar="FILE", help="write all numbers of each checkpoint to this file")
    add("--device", type=models.device, help="cpu; untested: cuda[:N], mps",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="never call a compiler: slower, the same numbers")
    args = parser.parse_args(argv)
    if len(args.ckpt) > 1 and (args.pictures or args.predict or args.features):
        parser.error("--pictures, --predict and --features take a single --ckpt")
    if args.predict and (args.dataset or args.features or args.pictures):
        parser.error("--predict does not go with --dataset, --features or --pictures")
    if args.pictures and not importlib.util.find_spec("matplotlib"):
        parser.error("--pictures needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    args = parse_args(argv)
    neuron.COMPILE = not args.no_compile
    if args.predict:
        with contextlib.redirect_stdout(sys.stderr):  # what is said of the data is no result
            rows = predict_files(args)
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
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
        except (data.UserError, OSError) as e:  # the others' results stand
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
        raise data.UserError("; ".join(failed))


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name
    try:
        main()
    except (data.UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
