"""NeuroMoCo from recordings to a test accuracy: pre-train without labels, fine-tune with labels, test once at the end.

    python train.py                                              # toy data, a few minutes on a laptop
    python train.py --dataset cifar10dvs                         # dvsgesture | ncaltech101 | nmnist | a folder of recordings
    python train.py --dataset cifar10dvs --pretrain-epochs 0     # the same recipe from scratch: the twin to compare with
    python train.py --dataset cifar10dvs --help                  # every flag, with the defaults for that data set

A run's folder holds pretrained.pt and finetuned.pt (weights of the last epoch, and all that eval.py needs), log.csv (one row
an epoch) and state.pt (all that --resume needs). Test recordings are not looked at before the last line.
Guarded by `python -m pytest test_all.py -k train`.
"""
import argparse
import csv
import ctypes
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
from eval import accuracy_line, autocast, check_device, fail, knn_accuracy, load_checkpoint, over_split
from moco import MoCo


def parse(argv):
    """Flags; their defaults are the row of data.DATASETS that --dataset picks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.error = lambda message: sys.exit(fail(message))

    def number(kind, low, high=math.inf):
        def check(text):
            if not low <= kind(text) <= high:
                raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
            return kind(text)
        check.__name__ = kind.__name__  # argparse says "invalid int value"
        return check

    group = parser.add_argument_group("data").add_argument
    group("--dataset", default="toy", help="toy, cifar10dvs, dvsgesture, ncaltech101, nmnist, or a folder of recordings")
    group("--root", default="data", help="folder of downloads and cached frames")
    group("--n-frames", type=number(int, 1), help="time steps T that a recording is cut into")
    group("--image-size", type=number(int, 8), help="width and height of a frame in pixels; None: the sensor's, 128 at most")
    group("--labels-per-class", type=number(int, 0), help="fine-tune on so many labels a class, 0: all; pre-training sees every recording, no label")
    group = parser.add_argument_group("model").add_argument
    group("--arch", help="sew-resnet-18[-<width>] or spikformer-<depth>-<dim>")
    group = parser.add_argument_group("pre-training").add_argument
    group("--pretrain-epochs", type=number(int, 0), help="0: none, fine-tune from scratch")
    group("--queue-size", type=number(int, 1), help="negatives K, well below the number of training recordings")
    group("--momentum", type=number(float, 0, 1), help="of the key encoder: 0 copies the query encoder, 1 stands still")
    group("--temperature", type=number(float, 1e-6), help="of InfoNCE")
    group("--alpha", type=number(float, 0), help="weight of MBC, InfoNCE of the average over time")
    group("--beta", type=number(float, 0), help="weight of MAC, average over time of InfoNCE")
    group("--pretrain-lr", type=number(float, 0), help="peak learning rate of pre-training")
    group("--init", help="skip pre-training, fine-tune the encoder of this checkpoint")
    group = parser.add_argument_group("fine-tuning").add_argument
    group("--epochs", type=number(int, 1), help="passes over the labelled recordings")
    group("--lr", type=number(float, 0), help="peak learning rate of fine-tuning")
    group = parser.add_argument_group("optimiser (AdamW, warm-up and cosine, in both phases)").add_argument
    group("--weight-decay", type=number(float, 0), help="of weights, not of biases and batch norm")
    group("--batch-size", type=number(int, 1), help="recordings a step")
    group = parser.add_argument_group("run").add_argument
    group("--out", help="the run's folder; None: runs/<dataset>, with a number if that exists")
    group("--seed", type=number(int, 0, 10**9), default=0, help="of weights, order, augmentation and choice of labels")
    group("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    group("--resume", action="store_true", help="go on where the run in --out, or the last one, stopped")
    group("--no-compile", action="store_true", help="never call a compiler: slower steps, the same numbers")

    early = argparse.ArgumentParser(add_help=False)
    early.error = parser.error
    early.add_argument("--dataset", default="toy")
    row = data.recipe(early.parse_known_args(argv)[0].dataset)
    parser.set_defaults(**row)
    args = parser.parse_args(argv)
    check_device(args.device)
    try:
        models.build(args.arch, 128)
    except ValueError as e:
        raise data.UserError(f"--arch: {e}")
    return args


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def keep_memory():
    """glibc gives every freed block of some size back to the kernel; the page faults to get it again cost a CPU run up to a fifth."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which shrinks only when 2 GiB at its end are free


def join(args):
    """Under torchrun, join the other processes, if any: gloo for what is on CPUs, NCCL for GPUs; process 0 alone writes and prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=12))  # the others wait for downloads
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def processes():
    """(number of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run_folder(args):
    """--out, or runs/<dataset> with a number: the next free one, to resume the last one. Nothing is ever written over."""
    if args.out:
        out = Path(args.out)
        if not args.resume and (out / "log.csv").exists():
            raise data.UserError(f"--out {out}: holds a run already: add --resume to go on with it, or choose another folder")
        return out
    name, n = Path("runs") / Path(args.dataset).resolve().name, 1
    folders = [name]
    while folders[-1].exists():
        n += 1
        folders.append(name.with_name(f"{name.name}-{n}"))
    return folders[-2] if args.resume and n > 1 else folders[-1]


def load_state(out):
    """What state.pt in the folder `out` holds; None if no epoch of a run has ended there."""
    if not (out / "log.csv").exists() and not (out / "state.pt").exists():
        return None
    try:
        state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        if not {"phase", "epoch", "log", "args", "model", "optimizer", "schedule"} <= set(state):
            raise KeyError
        return state
    except Exception:
        raise data.UserError(f"--resume: {out / 'state.pt'} is missing or damaged: take another --out, or --init {out / 'pretrained.pt'}")


class Run:
    """The files of one run. Each is written beside its name first, then moved: a stop leaves the old one or the new one."""

    def __init__(self, args):
        found = [None, None]
        if processes()[0] == 0:
            out = run_folder(args)
            found = [out, load_state(out) if args.resume else None]
        if dist.is_initialized():  # process 0 alone looks: the others may not see its disk
            dist.broadcast_object_list(found)
        self.args, self.log, (self.out, self.state) = args, [], found
        self.out.mkdir(parents=True, exist_ok=True)
        if self.state:
            self.log, was = self.state["log"], self.state["args"]
            free = ("out", "resume", "device", "root", "no_compile")
            wrong = [f"--{k.replace('_', '-')} {was.get(k)}" for k, v in vars(args).items() if k not in free and was.get(k) != v]
            if wrong:
                raise data.UserError(f"--resume: the run in {self.out} was made with {', '.join(wrong)}: pass the same, or choose another --out")

    def save(self, name, content):
        if processes()[0] == 0:
            torch.save(content | {"args": vars(self.args)}, self.out / f"{name}.part")
            os.replace(self.out / f"{name}.part", self.out / name)

    def write_log(self):
        if processes()[0] == 0:
            with open(self.out / "log.csv.part", "w", newline="") as f:
                writer = csv.DictWriter(f, ["phase", "epoch", "loss", "accuracy", "lr", "knn", "seconds"])
                writer.writeheader()
                writer.writerows(self.log)
            os.replace(self.out / "log.csv.part", self.out / "log.csv")


def optimizer_of(model, lr, weight_decay, steps):
    """AdamW with weight decay on matrices and kernels only; warm-up over a twentieth of the steps, then a cosine to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))))
    return optimizer, schedule


def batch_sizes(split, args):
    """Of the batches that data.batches makes of `split`."""
    n, world = len(split.labels), processes()[1]
    sizes = [len(batch) for batch in torch.arange(n).tensor_split(math.ceil(n / args.batch_size))]
    if min(sizes) < world:
        raise data.UserError(f"{world} processes for batches of {min(sizes)}: raise --batch-size or start fewer")
    return sizes


def fit(run, phase, model, step, split, epochs, lr, watch):
    """Minimise step(x, y) -> (loss, accuracy) over `epochs` epochs of `split`; a row of log.csv and a state.pt after each.

    watch() gives a kNN accuracy for the log, ten times a phase, or None. Goes on from run.state if that is of this phase.
    """
    args, start, (rank, world) = run.args, 0, processes()
    sizes = batch_sizes(split, args)
    steps = len(sizes)
    optimizer, schedule = optimizer_of(model, lr, args.weight_decay, epochs * steps)
    if run.state and run.state["phase"] == phase:
        start = run.state["epoch"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(run.state[name])
    bar = tqdm(total=epochs * steps, initial=start * steps, desc=phase, unit=" steps", mininterval=0.5, disable=rank > 0)
    for epoch in range(start, epochs):
        seed = args.seed + 1_000_000 * (epoch + 1)  # an epoch's draws depend on nothing before it: resuming is exact
        order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed + 1000 * rank)
        began, total = time.time(), torch.zeros(2, device=args.device)
        model.train()
        batches = data.batches(split, args.batch_size, args.device, True, order, (rank, world))
        for (x, y), size in zip(batches, sizes):
            with autocast(args.device):
                loss, accuracy = step(x, y)
            share = len(y) / size  # 1 for a single process; gradients are averaged over processes, hence world below
            optimizer.zero_grad(set_to_none=True)
            (loss * (share * world)).backward()
            optimizer.step()
            schedule.step()
            total += share * torch.stack([loss.detach(), accuracy])
            bar.update()
        if world > 1:
            dist.all_reduce(total)
        loss, accuracy = (total / steps).tolist()  # the only wait for the device in an epoch
        if not math.isfinite(loss):
            raise data.UserError(f"the {phase} loss is {loss} in epoch {epoch + 1}: try a lower learning rate or a higher --temperature")
        knn = watch() if (epoch + 1) % max(1, epochs // 10) == 0 else None
        row = dict(phase=phase, epoch=epoch + 1, loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}", lr=f"{schedule.get_last_lr()[0]:.2e}",
                   knn="" if knn is None else f"{knn:.4f}", seconds=f"{time.time() - began:.1f}")
        bar.set_postfix({k: v for k, v in row.items() if v and k not in ("phase", "seconds")})
        run.log.append(row)
        run.save("state.pt", dict(phase=phase, epoch=epoch + 1, log=run.log, model=model.state_dict(),
                                  optimizer=optimizer.state_dict(), schedule=schedule.state_dict()))
        run.write_log()  # after the state, which holds it too: a stop between the two loses nothing
    bar.close()


def engine(model, args):
    """What to call to train `model`: itself, averaging gradients over processes, compiled as a whole on a GPU.

    Batch-norm statistics are those of all processes on GPUs, of each process on CPUs, where PyTorch has no such thing. On a CPU the
    LIF layers alone are compiled (neuron.py), for that pays sooner.
    """
    cuda = torch.device(args.device).type == "cuda"
    if dist.is_initialized():
        if cuda:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return torch.compile(model) if cuda and not args.no_compile else model


def pretrain(run, train, encoder):
    """NeuroMoCo: two views of every recording, no label. Leaves pretrained.pt."""
    args = run.args
    torch.manual_seed(args.seed)
    moco = MoCo(encoder, 128, args.queue_size, args.momentum, args.temperature, args.alpha, args.beta).to(args.device)
    moco.new_queue(args.n_frames)
    forward = engine(moco, args)

    def step(x, _):
        loss = forward(data.augment(x, **args.views), data.augment(x, **args.views))
        return loss, moco.accuracy

    every = max(1, len(train.labels) // 1000)
    probe = data.Split(train.frames[::every], train.labels[::every], train.classes)

    def watch():
        query = torch.arange(len(probe.labels)) % 5 == 0
        if query.all():  # a single recording
            return None
        features = over_split(encoder, probe, args.batch_size, args.device)
        return knn_accuracy(features[~query], probe.labels[~query], features[query], probe.labels[query])

    print(f"a contrastive loss of {(args.alpha + args.beta) * math.log(args.queue_size + 1):.3f} is the level of chance, log(K + 1)")
    if args.queue_size > len(train.labels) / 2:
        print(f"warning: a queue of {args.queue_size} holds most of the {len(train.labels)} recordings: their own keys return as negatives; lower --queue-size")
    fit(run, "pretrain", moco, step, train, args.pretrain_epochs, args.pretrain_lr, watch)
    run.save("pretrained.pt", dict(kind="pretrained", classes=train.classes, weights=encoder.state_dict()))


def finetune(run, train, encoder):
    """Cross-entropy of the logits averaged over time, on the labelled recordings. Leaves finetuned.pt."""
    args = run.args
    torch.manual_seed(args.seed)
    model = models.Classifier(encoder, len(train.classes)).to(args.device)
    forward = engine(model, args)

    def step(x, y):
        logits = forward(data.augment(x, **args.finetune)).float().mean(0)  # [B, classes]
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()

    fit(run, "finetune", model, step, train, args.epochs, args.lr, watch=lambda: None)
    run.save("finetuned.pt", dict(kind="finetuned", classes=train.classes, weights=model.state_dict()))
    return model


def labelled(train, per_class, seed):
    """The split that fine-tuning sees: per_class recordings of each class, drawn by seed, or all of them if 0."""
    if not per_class:
        return train
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).numpy()
    chosen = [i for c in range(len(train.classes)) for i in order[train.labels[order] == c][:per_class]]
    return data.Split(train.frames[chosen], train.labels[chosen], train.classes)


def train_and_test(args):
    init = load_checkpoint(args.init) if args.init else None
    keep_memory()
    join(args)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()  # the first process of a machine makes the frames, the others find them
    train, test = data.load(args.dataset, args.root, args.n_frames, args.image_size)
    if dist.is_initialized() and first:
        dist.barrier()
    args.image_size = train.frames.shape[-1]
    train = data.on_device(train, args.device)
    neuron.COMPILE_AFTER = None if args.no_compile else neuron.COMPILE_AFTER
    few = labelled(train, args.labels_per_class, args.seed)
    batch_sizes(train, args), batch_sizes(few, args)  # complain before the hours of pre-training
    run = Run(args)
    print(", ".join(f"{k} {v}" for k, v in vars(args).items()), f"\n{run.out}: {len(train.labels)} recordings to train on, {len(test.labels)} to test")
    torch.manual_seed(args.seed)
    encoder = models.build(args.arch, args.image_size)
    done = run.state is not None and run.state["phase"] == "finetune"
    if args.pretrain_epochs and not args.init and not done:
        pretrain(run, train, encoder)
    if init:
        load_encoder(encoder, init, args)
    model = finetune(run, few, encoder)
    print(accuracy_line(over_split(model, test, args.batch_size, args.device), test.labels))


def load_encoder(encoder, ckpt, args):
    """Copy a checkpoint's encoder, with or without a classifier on it, into `encoder`. T may differ: no weight depends on it."""
    weights = {k.removeprefix("encoder."): v for k, v in ckpt["weights"].items() if not k.startswith("head.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        was = ckpt["args"]
        raise data.UserError(f"--init {args.init}: holds {was['arch']} for {was['image_size']} pixels, this run builds {args.arch} "
                             f"for {args.image_size}: pass the same --arch and --image-size")


def main(argv=None):
    try:
        train_and_test(parse(argv))
    except (data.UserError, OSError) as e:
        sys.exit(fail(e))
    except KeyboardInterrupt:
        print("\nstopped: the same command with --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
