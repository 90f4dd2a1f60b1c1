"""What a checkpoint is worth: accuracy, representation, spikes and energy; text, JSON, pictures.

    python eval.py --ckpt runs/toy/finetuned.pt --pictures docs    # everything
    python eval.py --ckpt runs/*/finetuned.pt --json all.json      # a row each, mean over seeds
    python eval.py --ckpt runs/toy/pretrained.pt --dataset FOLDER  # transfer to other data

A prediction after t steps is the mean of the logits over steps 1 to t. Features are the frozen
encoder's, averaged over time; kNN and linear probe learn from all training labels.
Tests: python -m pytest test_all.py -k eval
"""
import argparse
import csv
import functools
import importlib.util
import json
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
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
E_MAC, E_AC = 4.6e-6, 0.9e-6  # uJ of a multiply-accumulate, of an accumulate, at 45 nm
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
    return [100 * p, 100 * max(0.0, low), 100 * high]


def accuracy_line(accuracy, recordings):
    """Write the last line of train.py and eval.py; accuracy in percent."""
    return f"test accuracy {accuracy:.2f} % (last epoch, {recordings} recordings)"


def accuracy_metrics(logits, labels, classes):
    """Compute what logits [T, N, C] say of labels [N] -> dict.

    In percent: accuracy, interval [low, high], top5 (None up to 10 classes), by_class, and steps,
    [accuracy, low, high] after 1 to T steps. In recordings: confusion [C][C], rows are the true
    classes, and worst, the five most frequent errors [count, true, predicted].
    """
    _, N, C = logits.shape
    preds = logits.cumsum(0).argmax(2)  # [T, N]; the largest sum of steps 1 to t
    steps = [wilson_interval(correct, N) for correct in (preds == labels).sum(1).tolist()]
    top5 = logits.sum(0).topk(min(5, C)).indices  # [N, 5]
    confusion = torch.bincount(labels * C + preds[-1], minlength=C * C).view(C, C)
    errors = confusion - confusion.diag().diag()
    worst = [[errors[i, j].item(), classes[i], classes[j]] for i, j in errors.nonzero().tolist()]
    return dict(
        accuracy=steps[-1][0], interval=steps[-1][1:], steps=steps, confusion=confusion.tolist(),
        top5=100 * (top5 == labels[:, None]).sum().item() / N if C > 10 else None,
        by_class=(100 * confusion.diag() / confusion.sum(1).clamp(min=1)).tolist(),
        worst=sorted(worst, reverse=True)[:5])


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Compute weighted k-NN accuracy (Wu et al. 2018) of features [N, D], [M, D] -> 0 to 1.

    The k nearest training features vote, each weighted by exp(cosine / temperature).
    """
    train_features = F.normalize(train_features, dim=1)
    correct, k = 0, min(k, len(train_features))
    for z, y in zip(test_features.split(1024), test_labels.split(1024)):
        cosine, nearest = (F.normalize(z, dim=1) @ train_features.T).topk(k)  # [m, k]
        votes = F.one_hot(train_labels[nearest]) * (cosine / temperature).exp()[..., None]
        correct += (votes.sum(1).argmax(1) == y).sum().item()  # votes: [m, k, classes]
    return correct / len(test_labels)


def linear_probe_accuracy(train_features, train_labels, test_features, test_labels,
                          weight_decay=1e-3):
    """Fit a linear classifier to features [N, D], test it on [M, D] -> accuracy, 0 to 1.

    Features standardised by the training set, L2 penalty, at most 200 iterations of L-BFGS.
    """
    mean, std = train_features.mean(0), train_features.std(0, unbiased=False) + 1e-6
    train_features, test_features = (train_features - mean) / std, (test_features - mean) / std
    head = torch.nn.Linear(train_features.shape[1], int(train_labels.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(train_features), train_labels)
        loss = loss + weight_decay / 2 * head.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return (head(test_features).argmax(1) == test_labels).float().mean().item()


def alignment_uniformity(a, b, z):
    """Compute both of Wang and Isola 2020 from unit vectors: a, b of two views, z: [N, D].

    alignment: mean |a - b|^2, best 0. uniformity: log of the mean of exp(-2 |z_i - z_j|^2) over
    pairs, best about -4.
    """
    a, b, z = (F.normalize(features.double(), dim=1) for features in (a, b, z))
    total = sum(torch.cdist(rows, z).square().mul(-2).exp().sum() for rows in z.split(1024))
    pairs = len(z) * (len(z) - 1)  # total counts each recording with itself, as 1
    return dict(alignment=(a - b).square().sum(1).mean().item(),
                uniformity=((total - len(z)) / pairs).log().item())


def spike_stats(model, batches):
    """Run a network over batches and count, by forward hooks, what its layers do.

    Returns its outputs [T, N, D]; a dict of firing rate and silent neurons (no spike at all) in
    percent, MACs, synaptic operations and energy (uJ) per recording, in all and by "layers"; and
    {layer: spikes [T, 16]}, of 16 neurons in the first recording.
    """
    totals, spikes, rasters, hooks = defaultdict(Counter), {}, {}, []  # layers in order of calls

    def count(name, x, macs):
        analog = len(totals) == 0 or bool((x != x.round()).any())  # frames, or a mean over space
        operations = macs * x.mean(dtype=torch.float64).item()  # a sum of two spikes counts twice
        totals[name].update(macs=macs, operations=operations, analog=analog)  # update adds

    def on_product(name, module, inputs, out):
        count(name, inputs[0], out.numel() * module.weight[0].numel())

    def on_qkv(name, module, inputs, out):  # out: [T, B, 3C, H, W]
        q_and_k = torch.stack(out.chunk(3, 2)[:2])  # a spike of either adds a row of 16 numbers
        count(name, q_and_k, 16 * q_and_k.numel())

    def on_lif(name, module, inputs, out):  # out: [T, B, ...]
        totals[name].update()  # a layer of its own in a network without convolutions
        spikes[name] = spikes.get(name, 0) + out.sum((0, 1), dtype=torch.float32)
        if name not in rasters:
            some = torch.linspace(0, out[0, 0].numel() - 1, 16).long()
            rasters[name] = out[:, 0].flatten(1).cpu()[:, some]

    for name, module in model.named_modules():
        name = re.sub(r"^encoder\.|\.conv$|\.lif$", "", name)
        hook = on_lif if isinstance(module, neuron.LIF) else on_product
        if isinstance(module, models.SpikingSelfAttention):
            module, hook = module.qkv, on_qkv
        elif not isinstance(module, (neuron.LIF, torch.nn.Conv2d, torch.nn.Linear)):
            continue
        hooks.append(module.register_forward_hook(functools.partial(hook, name)))
    outputs = models.predict(model, batches)
    for hook in hooks:
        hook.remove()

    T, N = outputs.shape[:2]
    layers = []
    for name, total in totals.items():
        macs, operations = total["macs"] / N, 0.0 if total["analog"] else total["operations"] / N
        energy = E_MAC * macs if total["analog"] else E_AC * operations
        layers.append(dict(layer=name, macs=macs, operations=operations, energy=energy))
        if name in spikes:
            layers[-1] |= firing(spikes[name], T * N)
    stats = {k: sum(layer[k] for layer in layers) for k in ("macs", "operations", "energy")}
    if spikes:  # a network of other neurons has none
        stats |= firing(torch.cat([counts.flatten() for counts in spikes.values()]), T * N)
    return outputs, stats | dict(layers=layers, energy_dense=E_MAC * stats["macs"]), rasters


def firing(counts, steps):
    """Compute the firing rate and the share of silent neurons, in percent, from spike counts."""
    return dict(rate=100 * counts.mean().item() / steps,
                silent=100 * (counts == 0).float().mean().item())


# ------------------------------------------------------------------------------- one checkpoint

def evaluate(path, args):
    """Evaluate a checkpoint -> (results: a dict of all numbers, plots: what the pictures need)."""
    try:
        model, checkpoint = models.load_model(path, args.device)
    except ValueError as e:
        raise UserError(e)
    train_args, classes, kind = (checkpoint[k] for k in ("args", "classes", "kind"))
    train, test = load_data(path, train_args, args)
    train_labels, test_labels = torch.tensor(train.labels), torch.tensor(test.labels)

    def batches(split, view=lambda x: x):
        for x, y in data.batches(split, train_args["batch_size"], args.device):
            yield view(x), y

    # accuracy, spikes and energy
    outputs, results, rasters = spike_stats(model, batches(test))  # [T, N, classes or features]
    results |= dict(path=path, kind=kind, dataset=args.dataset or train_args["dataset"],
                    recordings=len(test_labels), args=train_args, classes=classes,
                    parameters=sum(p.numel() for p in model.parameters()))
    if kind == "finetuned" and set(classes) == set(test.classes):
        order = torch.tensor([classes.index(c) for c in test.classes])
        results |= accuracy_metrics(outputs, order[test_labels], classes)

    # the frozen encoder
    encoder = model.encoder if kind == "finetuned" else model
    features = models.predict(encoder, batches(test)).mean(0)  # [N, D]
    if len(train.classes) > 1:
        train_features = models.predict(encoder, batches(train)).mean(0)
        given = train_features, train_labels, features, test_labels
        results |= dict(knn=100 * knn_accuracy(*given), probe=100 * linear_probe_accuracy(*given))
    torch.manual_seed(0)  # always the same views
    view = functools.partial(data.augment, **train_args["pretrain_aug"])
    a, b = (models.predict(encoder, batches(test, view)).mean(0) for _ in range(2))
    results |= alignment_uniformity(a, b, features)
    return results, dict(test=test, view=view, features=features, rasters=rasters)


def load_data(path, train_args, args):
    """Load the data of a checkpoint, or those of --dataset; warn of what makes results differ."""
    name = args.dataset or train_args["dataset"]
    same = os.path.abspath(name) == os.path.abspath(train_args["dataset"])
    train, test = data.load(
        name, args.root or train_args["root"], train_args["n_frames"], train_args["image_size"],
        train_args["skip_broken"] or args.skip_broken,
        args.sensor or (train_args["sensor"] if same else None))
    recordings = f"{len(train.labels)}+{len(test.labels)}"
    if same and recordings != train_args["recordings"]:
        print(f"warning: {name} holds {recordings} recordings, {train_args['recordings']} when "
              f"{path} was trained: some of those may be tested on now", file=sys.stderr)
    if train_args["sensor"] != train.sensor:
        print(f"warning: the sensor of {name} is {train.sensor}, the checkpoint's "
              f"{train_args['sensor']}: if the camera is the same, pass --sensor", file=sys.stderr)
    return train, test


def print_report(results):
    """Print the numbers of one checkpoint."""
    few = len(results["classes"]) <= 20
    print("{path}: {kind} {arch}, T = {n_frames}, {image_size} x {image_size} pixels, on {dataset}"
          .format(**results["args"] | results))
    if "accuracy" in results:
        print("accuracy by class" + (", confusion matrix (rows: true)" if few else ""))
        for name, share, row in zip(results["classes"], results["by_class"], results["confusion"]):
            counts = "".join(f"{n or '.':>4}" for n in row) if few else ""
            print(f"  {name:18} {share:6.2f} % of {sum(row):<6}{counts}")
        for n, true, pred in results["worst"]:
            print(f"  {n} x {true} taken for {pred}")
        steps = ", ".join(f"{accuracy:.2f}" for accuracy, _, _ in results["steps"])
        print(f"accuracy after 1 to {len(results['steps'])} time steps: {steps} %")
        print("95 % interval {:.2f} to {:.2f} %".format(*results["interval"])
              + (f"; top-5 {results['top5']:.2f} %" if results["top5"] is not None else ""))
    elif results["kind"] == "finetuned":
        print(f"no accuracy: the checkpoint has other classes, {', '.join(results['classes'])}")
    print("layer               rate, % silent, %           MACs     operations  energy, uJ")
    for row in results["layers"] + [results | dict(layer="all")]:
        rate = "{rate:9.2f} {silent:9.2f}".format(**row) if "rate" in row else ""
        print("{layer:18} {rate:19} {macs:14,.0f} {operations:14,.0f} {energy:11.4f}"
              .format(**row | dict(rate=rate)))
    print(f"the same network without spikes: {results['energy_dense']:.4f} uJ\n{ENERGY_NOTE}")
    print("{parameters:,} parameters; alignment {alignment:.3f}, uniformity {uniformity:.3f}"
          .format(**results))
    if "knn" in results:
        print("frozen features: kNN {knn:.2f} %, linear probe {probe:.2f} % ({recordings} test "
              "recordings)".format(**results))
    if "accuracy" in results:
        print(accuracy_line(results["accuracy"], results["recordings"]))


def print_summary(runs):
    """Print a row per run, then mean ± deviation of those that differ only in the seed."""
    rows, by_recipe = [], defaultdict(list)
    for run in runs:
        rows.append((run["path"], {k: [run[k]] for k in UNITS if k in run}))
        settings = run["args"] | dict(kind=run["kind"], dataset=run["dataset"])
        for name in ("seed", "out", "root", "device", "resume", "no_compile", "init"):
            del settings[name]
        by_recipe[json.dumps(settings)].append(run)
    for same in by_recipe.values():
        if len(same) > 1:
            rows.append((f"mean of {len(same)} seeds, {same[0]['path']} ...", {
                k: [f([run[k] for run in same]) for f in (statistics.mean, statistics.stdev)]
                for k in UNITS if all(k in run for run in same)}))
    width = max(len(name) for name, _ in rows)
    print(" " * width, *(f"{k}, {unit}".strip(", ").rjust(15) for k, unit in UNITS.items()))
    for name, values in rows:
        cells = [" ± ".join(f"{v:.{2 if unit else 3}f}" for v in values.get(k, [])) or "-"
                 for k, unit in UNITS.items()]
        print(name.ljust(width), *(cell.rjust(15) for cell in cells))


# ------------------------------------------------------------------------------------- pictures

def plot_all(results, plots, folder):
    """Draw the results as PNG files into folder."""
    figures = dict(frames=plot_frames(plots))
    if len(plots["features"]) > 1:
        figures["map"] = plot_map(plots)
    if Path(results["path"]).with_name("log.csv").exists():
        figures["curves"] = plot_curves(results)
    if plots["rasters"]:  # a network of other neurons has none
        figures["spikes"] = plot_spikes(results, plots["rasters"])
    if "accuracy" in results:
        figures["accuracy"] = plot_accuracy(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.suptitle(results["path"], size=8, color="grey", parse_math=False)
        figure.savefig(folder / f"{name}.png")


def new_figure(width, height, rows=1, columns=1, **options):
    """Make a figure of width x height inches -> (figure, its axes [rows, columns])."""
    from matplotlib.figure import Figure  # here, because it is optional
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_frames(plots):
    """Plot a recording and two views of it, eight frames at most."""
    test, view = plots["test"], plots["view"]
    x = torch.as_tensor(test.frames[len(test.labels) // 2])[:, None].float()  # [T, 1, 2, H, W]
    torch.manual_seed(0)
    rows, steps = [x, view(x), view(x)], range(0, len(x), math.ceil(len(x) / 8))
    figure, axes = new_figure(1.6 * len(steps) + 0.5, 5.2, 3, len(steps))
    for row, name, line in zip(rows, ("recording", "a view of it", "another view"), axes):
        line[0].set_ylabel(name)
        for ax, t in zip(line, steps):
            off, on = (row[t, 0] / x.max().clamp(min=1)).sqrt()  # [H, W]
            ax.imshow(1 - torch.stack([on, (on + off) / 2, off], -1).numpy())
            ax.set(xticks=[], yticks=[], xlabel=f"t = {t + 1}")
    figure.supxlabel("events: off orange, on blue, both black", size=10)
    return figure


def plot_map(plots):
    """Plot the first two principal components of the features [N, D], coloured by class."""
    test, z = plots["test"], plots["features"] - plots["features"].mean(0)
    _, s, directions = torch.linalg.svd(z, full_matrices=False)
    points, percent = z @ directions[:2].T, 100 * s.square() / s.square().sum()  # [N, 2]
    width = max(9, len(test.classes) / 7)
    figure, [[ax]] = new_figure(width, 0.75 * width)
    for c in np.unique(test.labels):
        x, y = points[test.labels == c].T.numpy()
        ax.scatter(x, y, 18, f"C{c % 10}", marker="o^sDv"[c % 5])
        ax.text(np.median(x), np.median(y), test.classes[c], size=8, parse_math=False,
                bbox=dict(color="white", alpha=0.8, pad=1))
    ax.set(xlabel=f"principal component 1, {percent[0]:.0f} % of the variance",
           ylabel=f"principal component 2, {percent[1]:.0f} %")
    return figure


def plot_curves(results):
    """Plot loss and accuracy by epoch, from the log.csv beside the checkpoint."""
    args, log = results["args"], defaultdict(list)
    with open(Path(results["path"]).with_name("log.csv")) as f:
        for row in csv.DictReader(f):
            columns = [row[k] for k in ("epoch", "loss", "accuracy", "knn")]
            log[row["phase"]].append([float(value or "nan") for value in columns])
    about = dict(  # phase: the level of chance, what its accuracy is
        pretrain=(chance_level(args["queue_size"], args["alpha"], args["beta"]),
                  "own key nearer than the queue"),
        finetune=(math.log(len(results["classes"])), "training recordings"))
    figure, axes = new_figure(9, 4.6, 2, len(log), sharex="col")
    for (phase, rows), (top, bottom) in zip(log.items(), axes.T):
        (chance, label), (epoch, loss, accuracy, knn) = about[phase], np.array(rows).T
        top.axhline(chance, color="grey", ls="--", label="chance")
        top.plot(epoch, loss, ".-", ms=4)
        top.set(title=phase, ylabel="loss", ylim=(0, 1.08 * max(chance, loss.max())))
        bottom.plot(epoch, 100 * accuracy, ".-", ms=4, label=label)
        bottom.plot(epoch, 100 * knn, "o", label="kNN" if phase == "pretrain" else None)
        bottom.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 103))
        top.legend()
        bottom.legend()
    return figure


def plot_spikes(results, rasters):
    """Plot sixteen neurons of each layer over time, rasters {layer: [T, 16]}, and its figures."""
    T, layers = results["args"]["n_frames"], results["layers"]
    names, y = [layer["layer"] for layer in layers], np.arange(len(layers))
    figure, [[raster, *bars]] = new_figure(
        9, 1.6 + 0.4 * len(y), 1, 4, sharey=True, width_ratios=[4, 2, 2, 2])
    for i, name in enumerate(names):
        t, j = rasters.get(name, torch.zeros(T, 16)).nonzero().T.numpy()  # step and neuron
        raster.hlines(i - 0.5 + (j + 0.5) / 16, t + 0.6, t + 1.4, color="black", lw=1.5)
    raster.hlines(y + 0.5, 0.5, T + 0.5, color="lightgrey", lw=0.8)
    raster.set(title="16 neurons of each layer", xlabel="time step", yticks=y, yticklabels=names,
               xlim=(0.5, T + 0.5), ylim=(len(y) - 0.5, -0.5))
    for ax, key, label in zip(bars, ("rate", "silent", "energy"),
                              ("firing rate, %", "silent neurons, %", "energy, µJ")):
        ax.barh(y, [layer.get(key, 0) for layer in layers], 0.7)
        ax.set_xlabel(label)
    return figure


def plot_accuracy(results):
    """Plot accuracy by time step, and the confusion matrix."""
    classes, counts = results["classes"], np.array(results["confusion"])
    percent, side = 100 * counts / counts.sum(1, keepdims=True).clip(min=1), 3.4 + len(counts) / 8
    figure, [[curve, matrix]] = new_figure(4 + side, side, 1, 2, width_ratios=[3.6, side])
    accuracy, low, high = zip(*results["steps"])
    steps = range(1, len(accuracy) + 1)
    curve.fill_between(steps, low, high, alpha=0.2, lw=0)
    curve.plot(steps, accuracy, "o-")
    curve.set(xlabel="time steps seen", ylabel="test accuracy and its 95 % interval, %")
    curve.xaxis.get_major_locator().set_params(integer=True)
    matrix.imshow(percent, "Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(counts):
        matrix.text(j, i, counts[i, j], size=8, ha="center", va="center",
                    color="white" if percent[i, j] > 50 else "black")
    matrix.set(title="recordings; colour: share of the class", xlabel="predicted", ylabel="class")
    matrix.set_xticks(range(len(counts)), classes, rotation=90, size=8)
    matrix.set_yticks(range(len(counts)), classes, size=8)
    return figure


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="pretrained.pt or finetuned.pt, one or more")
    add("--dataset", help="data to test on, if not those of the checkpoint")
    add("--root", help="folder of downloads and frames, if not that of the checkpoint")
    add("--sensor", type=int, nargs=2, metavar=("W", "H"), help="size of a folder's sensor")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add("--pictures", metavar="DIR", help="draw one checkpoint as PNG files into this folder")
    add("--json", metavar="FILE", help="write all numbers to this file")
    add("--device", type=models.device, help="cpu or cuda[:N]",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="never call a compiler: slower, the same numbers")
    args = parser.parse_args(argv)
    if args.pictures and len(args.ckpt) > 1:
        parser.error("--pictures shows one checkpoint: pass a single --ckpt")
    if args.pictures and not importlib.util.find_spec("matplotlib"):
        parser.error("--pictures needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    args = parse_args(argv)
    neuron.COMPILE = not args.no_compile
    evaluated = [evaluate(path, args) for path in args.ckpt]
    runs = [results for results, _ in evaluated]
    if args.json:
        Path(args.json).write_text(json.dumps(dict(units=UNITS, runs=runs)))
    if len(runs) == 1:
        print_report(runs[0])
    else:
        print_summary(runs)
    if args.pictures:
        plot_all(*evaluated[0], Path(args.pictures))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
