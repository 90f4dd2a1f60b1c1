"""Plot test accuracy against labels per class, one panel per data set, and print the table.

    python docs/labels.py runs/*       # folders of fine-tuned runs -> docs/labels.png

A run counts as pre-trained if it had --init or epochs of pre-training, else as from scratch. Bands
are one standard deviation over seeds. The gain is paired by seed: the mean over seeds of the
difference, and its standard deviation divided by the root of their number.
"""
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

accuracy = defaultdict(dict)  # of (data set, labels, whether pre-trained): {seed: percent}
for folder in map(Path, sys.argv[1:]):
    args = torch.load(folder / "finetuned.pt", weights_only=True)["args"]
    with open(folder / "log.csv") as f:
        test = list(csv.DictReader(f))[-1]
    recipe = Path(args["dataset"]).name, args["labels_per_class"], bool(
        args["init"] or args["pretrain_epochs"])
    assert test["phase"] == "test" and args["seed"] not in accuracy[recipe], folder
    accuracy[recipe][args["seed"]] = 100 * float(test["accuracy"])

datasets = sorted({name for name, _, _ in accuracy})
figure = Figure((4.2 * len(datasets), 3.4), layout="constrained")
for ax, name in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets):
    labels = sorted({n for d, n, _ in accuracy if d == name}, key=lambda n: n or np.inf)
    for pretrained, label in (True, "pre-trained"), (False, "from scratch"):
        values = [list(accuracy[name, n, pretrained].values()) for n in labels]
        mean = np.array([np.mean(v) for v in values])
        std = np.array([np.std(v, ddof=1) for v in values])
        ax.plot(mean, "o-", label=label)
        ax.fill_between(range(len(labels)), mean - std, mean + std, alpha=0.25, lw=0)
    ax.set_xticks(range(len(labels)), [n or "all" for n in labels])
    ax.set(title=name, xlabel="labels per class", ylabel="test accuracy, %")
    ax.legend(loc="lower right")
    for n in labels:
        with_, without = accuracy[name, n, True], accuracy[name, n, False]
        gain = np.array([with_[s] - without[s] for s in with_ if s in without])
        cells = [f"{np.mean(list(v.values())):.1f} ± {np.std(list(v.values()), ddof=1):.1f}"
                 for v in (without, with_)]
        print(f"| {name}, {n or 'all'} | {' | '.join(cells)} | {gain.mean():+.1f} ± "
              f"{gain.std(ddof=1) / len(gain) ** 0.5:.1f} ({len(gain)} seeds) |")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
