"""Make rows of the README's table of results from runs, or draw that table.

    python docs/labels.py runs/*       # folders of fine-tuned runs -> rows, printed
    python docs/labels.py              # the table in README.md -> docs/labels.png

A run counts as pre-trained if it had --init or epochs of pre-training, else as from scratch. A row
has means and standard deviations over seeds. The gain is paired by seed: the mean over seeds of the
difference, and its standard deviation divided by the root of their number.
"""
import argparse
import csv
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import train as training


def class_means_accuracy(flags):
    """Give test recordings the class whose mean of labelled raw frames is nearest -> percent."""
    args = argparse.Namespace(**flags)
    train, test, _ = training.load_data(args)
    few = training.few_shot_subset(train, args.labels_per_class, args.seed)
    z, z_test = (torch.tensor(s.frames[:]).float().flatten(1) for s in (few, test))  # [N, T*2*H*W]
    means = torch.stack([z[few.labels == c].mean(0) for c in range(len(few.classes))])
    nearest = (F.normalize(z_test) @ F.normalize(means).T).argmax(1)  # by cosine
    return 100 * (nearest == torch.tensor(test.labels)).float().mean().item()


def print_rows(folders):
    """Print a row for each data set and number of labels a class (0: all)."""
    accuracy = defaultdict(dict)  # of (data set, labels), then of (column, seed): percent
    for folder in folders:
        args = torch.load(folder / "finetuned.pt", weights_only=True)["args"]
        with open(folder / "log.csv") as f:
            test = list(csv.DictReader(f))[-1]
        pretrained = args["init"] or args["pretrain_epochs"]
        run = "pre-trained" if pretrained else "from scratch", args["seed"]
        recipe = accuracy[Path(args["dataset"]).name, args["labels_per_class"]]
        assert test["phase"] == "test" and run not in recipe, folder
        recipe[run] = 100 * float(test["accuracy"])
        if pretrained:
            recipe["no network", args["seed"]] = class_means_accuracy(args)
    for (name, n), recipe in sorted(accuracy.items()):
        no_network, without, with_ = (
            {seed: v for (column, seed), v in recipe.items() if column == wanted}
            for wanted in ("no network", "from scratch", "pre-trained"))
        gain = np.array([with_[s] - without[s] for s in with_ if s in without])
        cells = [f"{np.mean([*no_network.values()]):.1f}"]
        cells += [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}"
                  for v in ([*without.values()], [*with_.values()])]
        print(f"| {name} | {n or 'all'} | {' | '.join(cells)} | {gain.mean():+.1f} ± "
              f"{gain.std(ddof=1) / len(gain) ** 0.5:.1f} |  {len(gain)} pairs: {gain.round(1)}")


def draw_table():
    """Draw the three means of each row, two with their deviations, one below the other."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    number = r"([\d.]+) ± ([\d.]+) \| "
    rows = re.findall(rf"\| ([^|]+) \| ([^|]+) \| ([\d.]+) \| {number}{number}", readme)
    y, values = -np.arange(len(rows)), np.array([row[2:] for row in rows], float)
    figure = Figure((7, 0.4 * len(rows) + 0.9), layout="constrained")
    ax = figure.subplots()
    ax.hlines(y, values[:, 1], values[:, 3], "0.8", lw=4)
    ax.plot(values[:, 0], y, "x", color="0.5", label="no network")
    for column, label, place in (1, "from scratch", -0.12), (3, "pre-trained", 0.12):
        ax.errorbar(values[:, column], y + place, xerr=values[:, column + 1], fmt="o", label=label)
    ax.set_yticks(y, [f"{name}, {labels}" for name, labels, *_ in rows])
    ax.set(xlabel="test accuracy, % (bars: standard deviation over seeds)", ylabel="labels a class")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    print_rows([Path(folder) for folder in sys.argv[1:]]) if sys.argv[1:] else draw_table()
