"""NeuroMoCo from recordings to a test accuracy: pre-train without labels, fine-tune with labels.

    python train.py                                           # toy data, minutes on a laptop
    python train.py --dataset cifar10dvs                      # or dvsgesture, ncaltech101, nmnist
    python train.py --dataset path/to/folder                  # your own recordings
    python train.py --dataset cifar10dvs --pretrain-epochs 0  # from scratch: the twin to compare
    python train.py --dataset cifar10dvs --help               # all flags, with its defaults

A run's folder holds pretrained.pt and finetuned.pt (weights of the last epoch, and all that eval.py
needs), log.csv (a row per epoch) and state.pt (all that --resume needs).
Tests: python -m pytest test_all.py -k train
"""
import argparse
import copy
import csv
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import models
import neuron
from data import UserError
from eval import accuracy_line, knn_accuracy
from loss import chance_level
from moco import MoCo


def main(argv=None):
    args = parse_args(argv)
    init_distributed(args)
    neuron.COMPILE = not args.no_compile

    # ============ data ============
    train, test = load_data(args)
    labelled = few_shot_subset(train, args.labels_per_class, args.seed)

    # ============ encoder ============
    torch.manual_seed(args.seed)
    encoder = models.build(args.arch, args.image_size)
    if args.init:
        load_pretrained_encoder(encoder, args)

    # ============ the run's folder, and where it stopped ============
    state = make_run_dir(args, train.classes)
    print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    print(f"{args.out}: {len(train.labels)} recordings to train on, {len(test.labels)} to test")

    # ============ pre-training, without labels ============
    if args.pretrain_epochs and not args.init:
        pretrain(encoder, train, args, state)
    if args.epochs == 0:
        print(f"to evaluate it: python eval.py --ckpt {args.out}/pretrained.pt")
        return

    # ============ fine-tuning, with labels ============
    classifier = finetune(encoder, labelled, args, state)

    # ============ the only look at the test recordings ============
    logits = models.predict(classifier, data.batches(test, args.batch_size, args.device)).mean(0)
    correct = (logits.argmax(1) == torch.tensor(test.labels)).sum().item()
    print(f"to evaluate it: python eval.py --ckpt {args.out}/finetuned.pt")
    print(accuracy_line(100 * correct / len(logits), len(logits)))


def pretrain(encoder, train, args, state):
    """Pre-train the encoder by NeuroMoCo: two views of every recording, and no label."""
    torch.manual_seed(args.seed)
    moco = MoCo(encoder, 128, args.queue_size, args.momentum, args.temperature, args.alpha,
                args.beta).to(args.device)
    moco.init_queue(args.n_frames)  # now, because a resumed and a compiled step need its shape
    model = wrap_model(moco, args)

    def compute_loss(x, y):
        view_q, view_k = (data.augment(x, **args.pretrain_aug) for _ in range(2))
        return model(view_q, view_k), moco.accuracy

    every = max(1, len(train.labels) // 1000)  # 1,000 to 2,000 recordings, or all of a small set
    sample = train._replace(frames=train.frames[::every], labels=train.labels[::every])

    def monitor():
        """Classify every fifth recording by its nearest neighbours among the others."""
        batches = data.batches(sample, args.batch_size, args.device)
        z, y = models.predict(encoder, batches).mean(0), torch.tensor(sample.labels)
        fifth = torch.arange(len(y)) % 5 == 0
        return knn_accuracy(z[~fifth], y[~fifth], z[fifth], y[fifth])

    level = chance_level(args.queue_size, args.alpha, args.beta)
    print(f"loss at the level of chance: {level:.3f} = (alpha + beta) log(K + 1)")
    if args.queue_size >= len(train.labels):
        print(f"warning: a queue of {args.queue_size} holds all {len(train.labels)} recordings: "
              f"positives return as negatives; try --queue-size {len(train.labels) // 4 + 1}")
    train_phase("pretrain", moco, encoder, compute_loss, train, args.pretrain_epochs,
                args.pretrain_lr, args, state, monitor if len(train.classes) > 1 else None)
    state["pretrain"] = copy.deepcopy(state["pretrain"])  # fine-tuning changes the encoder in place
    save("pretrained.pt", args, dict(
        kind="pretrained", classes=train.classes, weights=encoder.state_dict()))


def finetune(encoder, labelled, args, state):
    """Train encoder and linear head by the cross-entropy of the logits averaged over time."""
    torch.manual_seed(args.seed)
    classifier = models.Classifier(encoder, len(labelled.classes)).to(args.device)
    model = wrap_model(classifier, args)

    def compute_loss(x, y):
        logits = model(data.augment(x, **args.finetune_aug)).float().mean(0)  # [B, classes]
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()

    train_phase("finetune", classifier, encoder, compute_loss, labelled, args.epochs, args.lr,
                args, state, None)
    save("finetuned.pt", args, dict(
        kind="finetuned", classes=labelled.classes, weights=classifier.state_dict()))
    return classifier


def train_phase(phase, model, encoder, compute_loss, split, epochs, lr, args, state, monitor):
    """Train for the epochs that are left; after each, write log.csv and state.pt.

    compute_loss(x, y) -> (loss, accuracy); monitor() -> kNN accuracy, about ten times, or None.
    """
    rank, world_size = rank_and_world_size()
    optimizer, start = build_optimizer(model, args.weight_decay), 0
    if phase in state:
        start = state[phase]["epoch"]
        model.load_state_dict(state[phase]["model"])
        optimizer.load_state_dict(state[phase]["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # it may have changed
    steps = math.ceil((len(split.labels) // world_size) / (args.batch_size // world_size))
    for epoch in range(start, epochs):
        began = time.time()
        seed = args.seed + 1_000_000 * (epoch + 1)  # no epoch's draws depend on earlier epochs
        generator = torch.Generator().manual_seed(seed)  # of the order, the same in all processes
        torch.manual_seed(seed + 1000 * rank)  # of the views, different in each process
        batches = data.batches(
            split, args.batch_size, args.device, True, generator, rank, world_size)
        rates = [lr * warmup_cosine(epoch * steps + i, epochs * steps) for i in range(steps)]
        name = f"{phase} {epoch + 1}/{epochs}"
        bar = tqdm(batches, name, steps, leave=False, disable=True if rank else None)

        # one epoch
        model.train()
        loss, accuracy = train_one_epoch(compute_loss, bar, optimizer, rates, args.device)
        if not math.isfinite(loss):
            raise UserError(f"{name}: the loss is {loss}; state.pt holds the epoch before; start "
                            "again with a lower learning rate")

        # log and state
        x, _ = next(data.batches(split, args.batch_size, args.device))
        row = dict(phase=phase, epoch=epoch + 1, loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}",
                   rate=f"{firing_rate(encoder, x):.4f}", lr=f"{rates[0]:.2e}", knn="")
        if monitor and (epoch + 1) % max(1, epochs // 10) == 0:
            row["knn"] = f"{monitor():.4f}"
        row["seconds"] = f"{time.time() - began:.1f}"
        shown = ", ".join(f"{key} {value}" for key, value in list(row.items())[2:] if value)
        print(f"{name}: {shown}", flush=True)
        state["log"].append(row)
        state[phase] = dict(
            epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        write_log(args, state["log"])
        save("state.pt", args, state)


def train_one_epoch(compute_loss, batches, optimizer, rates, device):
    """Take one step per batch, at its learning rate -> mean loss and mean accuracy."""
    history = []
    for (x, y), rate in zip(batches, rates):
        for group in optimizer.param_groups:
            group["lr"] = rate

        # forward
        with models.autocast(device):
            loss, accuracy = compute_loss(x, y)

        # backward
        optimizer.zero_grad()
        loss.backward()

        # step
        optimizer.step()
        history.append(torch.stack([loss.detach(), accuracy]))
    means = torch.stack(history).mean(0)
    if dist.is_initialized():
        dist.all_reduce(means)
    return (means / rank_and_world_size()[1]).tolist()  # only now does the CPU wait for a GPU


@torch.no_grad()
def firing_rate(encoder, x):
    """Compute the share of neurons x time steps that spike at x, with batch norm as in training."""
    encoder = copy.deepcopy(encoder).train()  # a copy, because its running statistics change
    spikes, total = 0.0, 0

    def count(layer, inputs, out):
        nonlocal spikes, total
        spikes, total = spikes + out.sum(dtype=torch.float32), total + out.numel()
    for layer in encoder.modules():
        if isinstance(layer, neuron.LIF):
            layer.register_forward_hook(count)
    with models.autocast(x.device):
        encoder(x)
    return float(spikes) / max(1, total)


def build_optimizer(model, weight_decay):
    """Make AdamW with weight decay for matrices and kernels only; its rate is set at each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}])


def warmup_cosine(step, steps):
    """Compute a step's share of the learning rate: a twentieth of warm-up, then a cosine to 0."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def wrap_model(model, args):
    """Wrap the model for training: compiled on one GPU, distributed under torchrun, else as it is.

    With several GPUs, batch norm takes its statistics over all of them; on CPUs, for which PyTorch
    has no SyncBatchNorm, over each process's own share.
    """
    on_gpu = torch.device(args.device).type == "cuda"
    if dist.is_initialized():
        if on_gpu:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if on_gpu and not args.no_compile:
        print("the first steps compile the network: minutes (--no-compile: never)")
        return torch.compile(model, dynamic=False)  # batches have two sizes at most
    return model


# ------------------------------------------------------------------------------------------- data

def load_data(args):
    """Load train and test, and note in args what the recordings tell: image size and sensor."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not is_first:
        dist.barrier()  # the first process of a machine makes the frames, the others find them
    train, test = data.load(args.dataset, args.root, args.n_frames, args.image_size,
                            args.skip_broken, args.sensor)
    if dist.is_initialized() and is_first:
        dist.barrier()
    if len(train.classes) < 2 and args.epochs:
        raise UserError(f"{args.dataset}: a single class; --epochs 0 pre-trains only")
    args.image_size, args.sensor = train.frames.shape[-1], train.sensor
    args.recordings = f"{len(train.labels)}+{len(test.labels)}"
    return data.to_gpu_if_fits(train, args.device), test


def few_shot_subset(train, labels_per_class, seed):
    """Keep labels_per_class recordings of each class, drawn by seed, or all if that is 0."""
    if not labels_per_class:
        return train
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=generator).numpy()
    chosen = []
    for c, name in enumerate(train.classes):
        chosen += list(order[train.labels[order] == c][:labels_per_class])
        if (train.labels == c).sum() < labels_per_class:
            print(f"warning: fewer than {labels_per_class} recordings in class {name}")
    return train._replace(frames=train.frames[chosen], labels=train.labels[chosen])


def load_pretrained_encoder(encoder, args):
    """Copy the encoder of the checkpoint --init, of either kind, and the flags that made it."""
    try:
        source, checkpoint = models.load_model(args.init)
        source = source.encoder if checkpoint["kind"] == "finetuned" else source
        encoder.load_state_dict(source.state_dict())
    except ValueError as e:
        raise UserError(f"--init {e}")
    except RuntimeError:
        arch = checkpoint["args"]["arch"]
        raise UserError(f"--init {args.init}: holds {arch}, this run builds {args.arch}")
    vars(args).update({name: checkpoint["args"][name] for name in data.PRETRAINING})


# ------------------------------------------------------------------------------ the run's folder

def make_run_dir(args, classes):
    """Set args.out to the run's folder, claimed by mkdir -> the state that --resume continues.

    It is --out, or the first new one of runs/<dataset>, runs/<dataset>-2, ...; with --resume, the
    last of them that exists. state: log, classes, and for each phase begun its last epoch.
    """
    found = [None, {"log": [], "classes": classes}]
    if rank_and_world_size()[0] == 0:
        first = Path(args.out or Path("runs") / Path(args.dataset).resolve().name).expanduser()
        folders = [first] + [first.with_name(f"{first.name}-{i}") for i in range(2, 10_000)]
        free = next(i for i, folder in enumerate(folders) if not folder.exists())
        out = folders[0 if args.out else max(0, free - 1) if args.resume else free]
        out.mkdir(parents=True, exist_ok=bool(args.out or args.resume))
        try:
            open(out / "log.csv", "a" if args.resume else "x").close()  # "x": no two runs share it
        except FileExistsError:
            raise UserError(f"--out {out}: holds a run already: add --resume to continue it")
        if (out / "state.pt").exists():
            found[1] = load_state(out / "state.pt", args, classes)
        elif args.resume:
            print(f"{out}: no run to continue, a new one starts")
        found[0] = str(out)
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # the other processes may not see this disk
    args.out, state = found
    return state


def load_state(path, args, classes):
    """Read state.pt; if pre-training is to continue, fine-tuning starts anew."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        fixed = ("arch", "n_frames", "queue_size") if "pretrain" in state else ("arch",)
        saved = {name: state["args"][name] for name in fixed}
        saved["classes"], log = state["classes"], state["log"]
    except Exception as e:
        raise UserError(f"--resume: {path}: {data.format_error(e)}")
    given = vars(args) | dict(classes=classes)
    for name, value in saved.items():
        if value != given[name]:
            raise UserError(f"--resume: {path} has {name} {value}, not {given[name]}")
    if state.get("pretrain", {"epoch": 0})["epoch"] < args.pretrain_epochs and not args.init:
        state.pop("finetune", None)
        state["log"] = [row for row in log if row["phase"] == "pretrain"]
    return state


def save(name, args, content):
    """Write a checkpoint into the run's folder; os.replace leaves the old file or the new one."""
    if rank_and_world_size()[0] == 0:
        path = os.path.join(args.out, name)
        torch.save(content | {"args": vars(args)}, path + ".part")
        os.replace(path + ".part", path)


def write_log(args, log):
    """Write log.csv, a row per epoch."""
    if rank_and_world_size()[0] == 0:
        with open(os.path.join(args.out, "log.csv"), "w", newline="") as f:
            writer = csv.DictWriter(f, log[-1])  # earlier rows may lack a new column
            writer.writeheader()
            writer.writerows(log)


# --------------------------------------------------------------------------- processes and flags

def init_distributed(args):
    """Join the other processes under torchrun: NCCL on GPUs, gloo on CPUs; process 0 prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                            timeout=timedelta(hours=12))  # the others wait for a download
    rank, world_size = rank_and_world_size()
    if args.batch_size < world_size:
        raise UserError(f"--batch-size {args.batch_size}: fewer than {world_size} processes")
    if rank:
        sys.stdout = open(os.devnull, "w")


def rank_and_world_size():
    """Return (rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_range(kind, low, high=math.inf):
    """Make a type for argparse: an int or a finite float from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # NaN is not in any range
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_args(argv):
    """Parse the flags; their defaults are the row of data.DATASETS that --dataset selects."""
    dataset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dataset.add_argument("--dataset", default="toy", help="toy, cifar10dvs, dvsgesture, "
                         "ncaltech101, nmnist, or a folder of recordings")
    parser = argparse.ArgumentParser(parents=[dataset], description=__doc__, allow_abbrev=False,
                                     formatter_class=Help)
    positive, share, rate = in_range(int, 1), in_range(float, 0, 1), in_range(float, 1e-9)

    add = parser.add_argument_group("data").add_argument
    add("--root", default="data", help="folder of downloads and cached frames")
    add("--n-frames", type=positive, help="time steps T that a recording is cut into")
    add("--image-size", type=in_range(int, 8), help="side of a frame; None: the sensor's, <= 128")
    add("--sensor", type=positive, nargs=2, metavar=("W", "H"),
        help="size of a folder's sensor; None: the largest coordinates")
    add("--labels-per-class", type=in_range(int, 0), help="for fine-tuning; 0: all")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add = parser.add_argument_group("model").add_argument
    add("--arch", help="sew-resnet-18[-<width>] or spikformer-<depth>-<dim>")
    add = parser.add_argument_group("pre-training, without labels").add_argument
    add("--pretrain-epochs", type=in_range(int, 0), help="0: fine-tune from scratch")
    add("--pretrain-lr", type=rate, help="peak learning rate")
    add("--queue-size", type=positive, help="negatives K, well below the number of recordings")
    add("--momentum", type=share, help="of the key encoder; 0: a copy, 1: frozen")
    add("--temperature", type=in_range(float, 1e-3), help="of InfoNCE")
    add("--alpha", type=in_range(float, 0), help="weight of MBC, InfoNCE of the average over time")
    add("--beta", type=in_range(float, 0), help="weight of MAC, average over time of InfoNCE")
    add("--init", help="fine-tune the encoder of this checkpoint instead of pre-training one")
    add = parser.add_argument_group("fine-tuning, with labels").add_argument
    add("--epochs", type=in_range(int, 0), help="0: pre-train only")
    add("--lr", type=rate, help="peak learning rate")
    add = parser.add_argument_group("optimiser: AdamW, warm-up and cosine, twice").add_argument
    add("--weight-decay", type=in_range(float, 0), help="of matrices and kernels only")
    add("--batch-size", type=positive, help="recordings per step, over all processes")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder; None: a new one, runs/<dataset>[-<number>]")
    add("--seed", type=in_range(int, 0, 10**9), default=0, help="of weights, order and views")
    add("--device", type=models.device, help="cpu or cuda[:N]",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue the run in --out, or the last one")
    add("--no-compile", action="store_true", help="never call a compiler: slower, the same numbers")

    name = dataset.parse_known_args(argv)[0].dataset
    parser.set_defaults(**data.default_config(name), pretrained_on=name)
    args = parser.parse_args(argv)
    if args.alpha == args.beta == 0:
        parser.error("--alpha 0 --beta 0 leave nothing to minimise in pre-training")
    if args.epochs == 0 and (args.init or args.pretrain_epochs == 0):
        parser.error("--epochs 0 without pre-training leaves nothing to do")
    try:
        with torch.device("meta"):  # takes no memory; any image size tells if the name is right
            models.build(args.arch, 128)
    except ValueError as e:
        parser.error(f"--arch: {e}")
    return args


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command with --resume continues after the last whole epoch")
