"""Print what a frozen encoder knows, the columns of experiments.md's tables of frozen features.

    python docs/frozen.py runs/*/pretrained.pt

A row a checkpoint, accuracy in percent on the test set of its data set: kNN, then linear
classifiers that learn from all labels, 5 and 1 a class (mean of ten draws); first of features
averaged over time, then of those of all T steps side by side.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import eval as evaluation
import models
import train as training


def columns(train, test, z, z_test):
    """Compute the four columns from features z [N, D] and z_test [M, D]."""
    y, y_test = torch.tensor(train.labels), torch.tensor(test.labels)
    yield evaluation.knn_accuracy(z, y, z_test, y_test)
    yield evaluation.linear_probe_accuracy(z, y, z_test, y_test)
    features = train._replace(frames=z)  # a split whose recordings are drawn with their features
    for labels_per_class in 5, 1:
        draws = [training.few_shot_subset(features, labels_per_class, seed) for seed in range(10)]
        accuracies = [evaluation.linear_probe_accuracy(
            few.frames, torch.tensor(few.labels), z_test, y_test) for few in draws]
        yield sum(accuracies) / len(draws)


def main(paths):
    for path in paths:
        encoder, checkpoint = models.load_model(path)
        was = argparse.Namespace(**checkpoint["args"])
        models.prepare_cpu(was.image_size)
        train, test = training.load_data(was)[:2]
        z, z_test = (models.predict(encoder, data.batches(split, was.batch_size))
                     for split in (train, test))  # [T, N, D]
        mean = columns(train, test, z.mean(0), z_test.mean(0))
        whole = columns(train, test, *(f.transpose(0, 1).flatten(1) for f in (z, z_test)))
        cells = (", ".join(f"{100 * share:.1f}" for share in kind) for kind in (mean, whole))
        print(f"| {path} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
