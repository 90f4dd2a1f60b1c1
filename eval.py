"""What a checkpoint is worth: accuracy of a fine-tuned classifier, kNN and linear probe of a pre-trained encoder.

    python eval.py --ckpt runs/toy/finetuned.pt        # test accuracy, per class, worst confusions
    python eval.py --ckpt runs/toy/pretrained.pt       # frozen features: kNN and linear probe, trained on the training labels
    python eval.py --ckpt runs/*/finetuned.pt          # one row each

Guarded by `python -m pytest test_all.py -k eval`.
"""
import argparse
import os
import pickletools
import re
import sys
import zipfile

import torch
import torch.nn.functional as F

import data
import models


def autocast(device):
    """bf16 on a GPU, where float16 would overflow in spiking nets; float32 on a CPU, where bf16 is mostly slower."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=torch.device(device).type == "cuda")


@torch.no_grad()
def over_split(model, split, batch_size, device):
    """The model's outputs over a split in evaluation mode, averaged over time: [T, B, D] -> float [N, D], on the CPU."""
    training = model.training
    model.eval()
    with autocast(device):
        out = [model(x).float().mean(0).cpu() for x, _ in data.batches(split, batch_size, device)]  # each [B, D]
    model.train(training)
    return torch.cat(out)


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
    """Accuracy on queries of a linear classifier fitted to the bank: standardised features, L2 penalty, L-BFGS to convergence."""
    mean, std = bank.mean(0), bank.std(0, unbiased=False) + 1e-6
    bank, queries = (bank - mean) / std, (queries - mean) / std
    bank_labels, labels = torch.as_tensor(bank_labels), torch.as_tensor(labels)
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


def read_checkpoint(path):
    """The dict in a file that torch.save wrote, or an exception. Runs no code of the file's and takes no memory for what it claims.

    Its pickle may name four harmless things and weights_only loads no others; its tensors are views of the file, mapped into
    memory, so none can be larger than the file; all must be dense and finite.
    """
    with zipfile.ZipFile(path) as z:
        entries = z.infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > os.path.getsize(path) or z.testzip():
            raise ValueError("compressed, which torch.save does not do, or damaged")
        (pickled,) = [name for name in z.namelist() if name.endswith("/data.pkl")]
        for op, arg, _ in pickletools.genops(z.read(pickled)):
            if "GLOBAL" in op.name and arg not in ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch LongStorage"):
                raise ValueError(f"asks for {arg}")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    todo = [content]
    for _ in range(10**6):  # a list that holds itself, or two of the next that holds two of the next, has no end
        if not todo and type(content) is dict:
            return content
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes() or not value.isfinite().all():
                raise ValueError("a tensor is larger than what it holds, or not finite")
    raise ValueError("too many parts")


def load_checkpoint(path):
    """A checkpoint of train.py as a dict: kind, args, classes, weights, all of which fit one another. Raises UserError."""
    try:
        open(path, "rb").close()
        ckpt = read_checkpoint(path)
        kind, args, classes, weights = (ckpt[k] for k in ("kind", "args", "classes", "weights"))
        sizes = [args[k] for k in ("image_size", "n_frames", "batch_size")]
        sound = (kind in ("pretrained", "finetuned") and classes and all(type(s) is str for s in [*classes, args["dataset"], args["root"]])
                 and all(type(n) is int and 0 < n <= 10**6 for n in sizes) and max(sizes[:2]) <= 1024
                 and int(re.search(r"\d+", args["arch"])[0]) <= len(weights))  # to build a depth of 99,999 would take minutes
        with torch.device("meta"):  # shapes only
            net = sound and models.build(args["arch"], args["image_size"])
            net = models.Classifier(net, len(classes)) if kind == "finetuned" else net
        if {k: (v.shape, v.dtype) for k, v in weights.items()} != {k: (v.shape, v.dtype) for k, v in net.state_dict().items()}:
            raise ValueError
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as e:
        raise data.UserError(f"{path}: cannot be read ({e.strerror}): pass a pretrained.pt or finetuned.pt of train.py")
    except Exception:
        raise data.UserError(f"{path}: is no checkpoint of train.py, or is damaged: pass a pretrained.pt or finetuned.pt")
    return ckpt


def restore(ckpt, device):
    """The network of a checkpoint, in evaluation mode: an encoder if pretrained, a Classifier if finetuned."""
    net = models.build(ckpt["args"]["arch"], ckpt["args"]["image_size"])
    if ckpt["kind"] == "finetuned":
        net = models.Classifier(net, len(ckpt["classes"]))
    net.load_state_dict(ckpt["weights"])
    return net.to(device).eval()


def accuracy_line(logits, labels):
    accuracy = 100 * (logits.argmax(1) == torch.as_tensor(labels)).float().mean().item()
    return f"test accuracy {accuracy:.2f} % (last epoch, {len(labels)} recordings)"


def report(logits, labels, classes):
    """Print the accuracy of every class and the five commonest confusions."""
    guesses, labels = logits.argmax(1), torch.as_tensor(labels)
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
    confusion.index_put_((labels, guesses), torch.tensor(1), accumulate=True)  # [true, guessed]
    for name, row, hits in zip(classes, confusion, confusion.diag()):
        print(f"  {name:24} {100 * hits / row.sum().clamp(min=1):6.2f} % of {row.sum()}")
    wrong = confusion - confusion.diag().diag()
    for n, i in zip(*wrong.flatten().topk(min(5, wrong.numel()))):
        if n:
            print(f"  {n} x {classes[i // len(classes)]} taken for {classes[i % len(classes)]}")


def evaluate(path, args, one_of_many):
    ckpt = load_checkpoint(path)
    made = ckpt["args"]
    train, test = data.load(args.dataset or made["dataset"], args.root or made["root"], made["n_frames"], made["image_size"])
    if test.classes != ckpt["classes"]:
        raise data.UserError(f"{path}: was trained on the classes {ckpt['classes']}, the data have {test.classes}: pass its own --dataset")
    net = restore(ckpt, args.device)
    out = over_split(net, test, made["batch_size"], args.device)
    if ckpt["kind"] == "finetuned":
        if not one_of_many:
            report(out, test.labels, test.classes)
        line = accuracy_line(out, test.labels)
    else:
        bank = over_split(net, train, made["batch_size"], args.device)
        knn = knn_accuracy(bank, train.labels, out, test.labels)
        probe = probe_accuracy(bank, train.labels, out, test.labels)
        line = f"frozen features: kNN {100 * knn:.2f} %, linear probe {100 * probe:.2f} % ({len(test.labels)} test recordings)"
    print(f"{path}  {line}" if one_of_many else line)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, help="pretrained.pt or finetuned.pt, one or more")
    parser.add_argument("--dataset", help="data to test on, if not those of the checkpoint")
    parser.add_argument("--root", help="folder of downloads and frames, if not that of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.error = lambda message: sys.exit(fail(message))
    args = parser.parse_args(argv)
    try:
        check_device(args.device)
        for path in args.ckpt:
            evaluate(path, args, len(args.ckpt) > 1)
    except (data.UserError, OSError) as e:
        sys.exit(fail(e))


def check_device(device):
    try:
        known = torch.device(device).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        known = False
    if not known:
        raise data.UserError(f"--device {device}: PyTorch has no such device here: try --device cpu")


def fail(message):
    """One line on stderr; the status of a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
