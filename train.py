"""NeuroMoCo from recordings to a test accuracy: pre-train without labels, fine-tune with labels, test once at the end.

    python train.py                                           # toy data, a few minutes on a laptop
    python train.py --dataset cifar10dvs                      # dvsgesture | ncaltech101 | nmnist | your own folder
    python train.py --dataset cifar10dvs --pretrain-epochs 0  # the same recipe from scratch: the twin to compare with
    python train.py --dataset cifar10dvs --help               # every flag, with the defaults for that data set

A run's folder holds pretrained.pt and finetuned.pt (weights of the last epoch, and all that eval.py needs), log.csv (a
row per epoch) and state.pt (all that --resume needs). The network sees no test recording before the last line.
Tested by `python -m pytest test_all.py -k train`.
"""
import argparse
import ctypes
import importlib.util
import io
import itertools
import math
import os
import sys
import time
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import models
import neuron
from eval import PRETRAINING, accuracy_line, autocast, knn_accuracy, load_checkpoint, over_split, read_checkpoint
from loss import chance
from moco import MoCo


def parse(argv):
    """Flags; their defaults are the row of data.DATASETS that --dataset picks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False, add_help=False)
    parser.error = data.fail

    def number(kind, low, high):
        def check(text):
            if not low <= kind(text) <= high:  # nor is NaN
                raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
            return kind(text)
        check.__name__ = kind.__name__  # argparse says "invalid int value"
        return check

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="toy", help="toy, cifar10dvs, dvsgesture, ncaltech101, nmnist, or a folder of recordings")
    add("--root", default="data", help="folder of downloads and cached frames")
    add("--n-frames", type=number(int, 1, 1024), help="time steps T that a recording is cut into")
    add("--image-size", type=number(int, 8, 1024), help="side of a frame; if not given: the sensor's, at most 128")
    add("--sensor", type=number(int, 1, 4096), nargs=2, metavar=("W", "H"),
        help="size of a folder's sensor; if not given: as far as its events reach")
    add("--labels-per-class", type=number(int, 0, 10**6), help="for fine-tuning, 0: all; pre-training uses no labels")
    add("--skip-broken", action="store_true", help="go on without the recordings that cannot be read")
    add = parser.add_argument_group("model").add_argument
    add("--arch", help="sew-resnet-18[-<width>] or spikformer-<depth>-<dim>, dim a multiple of 16")
    add = parser.add_argument_group("pre-training").add_argument
    add("--pretrain-epochs", type=number(int, 0, 10**5), help="0: none, fine-tune from scratch")
    add("--queue-size", type=number(int, 1, 10**7), help="negatives K, well below the number of training recordings")
    add("--momentum", type=number(float, 0, 1), help="of the key encoder: 0 copies the query encoder, 1 freezes it")
    add("--temperature", type=number(float, 1e-3, 1e3), help="of InfoNCE")
    add("--alpha", type=number(float, 0, 1e3), help="weight of MBC, InfoNCE of the average over time")
    add("--beta", type=number(float, 0, 1e3), help="weight of MAC, average over time of InfoNCE")
    add("--pretrain-lr", type=number(float, 1e-9, 1e3), help="peak learning rate of pre-training")
    add("--init", help="skip pre-training: fine-tune the encoder of this checkpoint (its pre-training flags are kept)")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--epochs", type=number(int, 0, 10**5), help="passes over the labelled recordings; 0: pre-train only")
    add("--lr", type=number(float, 1e-9, 1e3), help="peak learning rate of fine-tuning")
    add = parser.add_argument_group("optimiser (AdamW, warm-up and cosine, in both phases)").add_argument
    add("--weight-decay", type=number(float, 0, 1e3), help="of weights, not of biases and batch norm")
    add("--batch-size", type=number(int, 1, 10**6), help="recordings per step, at most, over all processes")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder; if not given: runs/<dataset>, with a number if that exists")
    add("--seed", type=number(int, 0, 10**9), default=0, help="of weights, order, augmentation and choice of labels")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--resume", action="store_true", help="continue the run in --out, or the last one; start one if there is none")
    add("--no-compile", action="store_true", help="never call a compiler: slower steps, the same numbers")

    row = data.recipe(parser.parse_known_args(argv)[0].dataset)
    parser.set_defaults(**row)  # sets args.views and args.finetune too, which have no flags
    add("-h", "--help", action="help", help="show this and exit")  # last: it shows the defaults
    args = data.parse(parser, argv)
    if args.alpha == args.beta == 0:
        parser.error("--alpha 0 --beta 0 leave nothing to minimise in pre-training: raise one of them")
    if args.epochs == 0 and (args.init or args.pretrain_epochs == 0):
        parser.error("--epochs 0 leaves nothing to do without pre-training: raise it, or pre-train")
    args.dataset = os.path.normpath(args.dataset)  # a slash at the end of a folder makes no other data set
    args.pretrained_on = args.dataset  # --init replaces it by the checkpoint's
    data.check_device(args.device)
    try:
        with torch.device("meta"):  # takes no memory; any image size tells whether the name is right
            models.build(args.arch, 128)
    except ValueError as e:
        raise data.UserError(f"--arch: {e}{data.nearest(args.arch, ['sew-resnet-18', 'spikformer-2-256'])}")
    return args


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False  # not `in (None, False)`: it would hide 0
        return action.help if hidden else super()._get_help_string(action)


def keep_memory():
    """Have glibc keep large freed blocks: fetching them from the kernel again takes up to a fifth of a CPU run."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap shrinks only when 2 GiB at its end are free


def join(args):
    """Under torchrun, join the other processes: gloo on CPUs, NCCL on GPUs. Only process 0 writes and prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    cuda = torch.device(args.device).type == "cuda"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        data.check_device(args.device)
        torch.cuda.set_device(args.device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # the others wait for downloads
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def processes():
    """(rank, world size); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run_folder(args):
    """(the run's folder, its lock). No run is overwritten, and no two runs write to one folder. Raises UserError.

    It is --out, or the first of runs/<dataset>, runs/<dataset>-2, ... without a run; with --resume the last of them.
    """
    first = Path(args.out).expanduser() if args.out else Path("runs") / Path(os.path.abspath(args.dataset)).name
    numbered = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    folders = [first] if args.out else itertools.chain([first], numbered)
    if args.resume:  # the last that exists, else the first
        folders = [*itertools.takewhile(Path.exists, folders)][-1:] or [first]
    for out in folders:
        try:
            if args.resume or not holds_run(out):
                return out, data.lock(out)
        except BlockingIOError:
            if args.out or args.resume:
                raise data.UserError(f"{out}: another run is at work there: wait for its end, or choose another --out")
    raise data.UserError(f"--out {out}: holds a run already: add --resume to go on with it, or choose another folder")


def holds_run(out):
    return (out / "log.csv").exists() or (out / "state.pt").exists()


def load_state(out):
    """What state.pt in the folder `out` holds; None if no epoch of a run has ended there."""
    if not holds_run(out):
        return None
    try:
        state = read_checkpoint(out / "state.pt")
        complete = {"phase", "epoch", "log", "args", "model", "optimizer", "schedule"} <= set(state)
        if not complete or {type(part) for part in (state["args"], *state["log"])} != {dict}:
            raise ValueError
        if type(state["epoch"]) is not int or not 0 < state["epoch"] == state["log"][-1]["epoch"]:
            raise ValueError
        return state
    except Exception:
        raise data.UserError(f"--resume: {out / 'state.pt'} is missing or damaged: "
                             f"choose another --out, or pass --init {out / 'pretrained.pt'}")


class Run:
    """The files of one run, locked against other runs; what --resume goes on from."""

    def __init__(self, args):
        found = [None, None]
        if processes()[0] == 0:
            out, self.lock = run_folder(args)
            found = [out, load_state(out) if args.resume else None]
        if dist.is_initialized():  # process 0 alone looks: the others may not see its disk
            dist.broadcast_object_list(found)
        self.args, self.warned = args, set()
        self.out, self.state = found
        if args.resume and not self.state:
            print(f"{self.out}: holds no run to go on with, a new one starts")
        self.log = self.state["log"] if self.state else []
        self.check_flags()
        if self.state:
            self.write_log()  # it may lack the last row: see fit

    def check_flags(self):
        """UserError if the run to resume was made with other flags. Called again once the data are known."""
        free, other = ("out", "resume", "device", "root", "no_compile", "pretrained_on"), []
        for name, was in self.state["args"].items() if self.state else ():
            now = getattr(self.args, name, was)
            unknown = not now and name in ("image_size", "sensor")
            if name not in free and not unknown and str(now) != str(was):
                flag = name if name in ("views", "finetune", "recordings") else "--" + name.replace("_", "-")
                other.append(f"{flag} {was}")
        if other:
            raise data.UserError(f"--resume: the run in {self.out} was made with {', '.join(other)}: "
                                 "pass the same, or choose another --out")

    def save(self, name, content):
        if processes()[0] == 0:
            held = io.BytesIO()  # on a full disk torch.save would raise a RuntimeError, f.write an OSError
            torch.save(content | {"args": vars(self.args)}, held)
            with data.whole(self.out / name) as f:
                f.write(held.getbuffer())

    def write_log(self):
        columns = self.log[-1].keys()
        if processes()[0] == 0:
            with data.whole(self.out / "log.csv") as f:
                for row in (columns, *([row.get(column, "") for column in columns] for row in self.log)):
                    f.write((",".join(map(str, row)) + "\n").encode())


def optimizer_of(model, lr, weight_decay, steps):
    """AdamW, weight decay on matrices and kernels alone; warm-up over a twentieth of all steps, then a cosine to 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ], lr)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    return optimizer, schedule


def batch_sizes(split, args):
    """Sizes of the batches that data.batches makes of `split`. UserError if one is too small."""
    sizes = [len(batch) for batch in data.cut(torch.arange(len(split.labels)), args.batch_size)]
    world = processes()[1]
    if min(sizes) < world:
        raise data.UserError(f"{world} processes for batches of {min(sizes)}: raise --batch-size or start fewer")
    if min(sizes) // world * args.n_frames < 2:
        raise data.UserError("a batch of one frame has no statistics for batch norm: "
                             "raise --batch-size or --n-frames, or label more recordings")
    return sizes


def fit(run, phase, model, step, split, epochs, lr, watch):
    """Minimise the loss of step(x, y) -> (loss, accuracy); after every epoch write a row of log.csv and state.pt.

    watch(steps done), called about ten times a phase, gives a kNN accuracy for the log, or None.
    Continues run.state if that is of this phase.
    """
    args, start, (rank, world) = run.args, 0, processes()
    sizes = batch_sizes(split, args)
    steps = len(sizes)
    if epochs * steps < 50:
        print(f"warning: {phase}: {epochs * steps} steps are few: batch norm's statistics settle after 50, before "
              "kNN and the final test may be at chance")
    optimizer, schedule = optimizer_of(model, lr, args.weight_decay, epochs * steps)
    if run.state and run.state["phase"] == phase:
        start = run.state["epoch"]
        try:
            for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
                part.load_state_dict(run.state[name])
            if any(v.ndim and v.shape != p.shape for p, kept in optimizer.state.items() for v in kept.values()):
                raise ValueError
        except Exception:
            raise data.UserError(f"--resume: {run.out / 'state.pt'} is of another network or optimiser: change --out")
    hidden = True if rank else None  # None: shown on a terminal only
    with tqdm(total=epochs * steps, initial=start * steps, desc=phase, mininterval=0.5, disable=hidden,
              bar_format="{desc} {percentage:.0f} %, {elapsed}, {remaining} left") as bar:
        for epoch in range(start, epochs):
            seed = args.seed + 1_000_000 * (epoch + 1)  # no epoch's draws depend on earlier ones: resuming is exact
            generator = torch.Generator().manual_seed(seed)  # for the order of recordings, the same in all processes
            torch.manual_seed(seed + 1000 * rank)  # for the views, different in each process
            began, rate = time.time(), schedule.get_last_lr()[0]  # rate: at the epoch's start
            seen = torch.zeros(steps, 2, device=args.device)  # loss and accuracy of each step
            model.train()
            batches = data.batches(split, args.batch_size, args.device, True, generator, (rank, world))
            for i, ((x, y), size) in enumerate(zip(batches, sizes)):
                with autocast(args.device):
                    loss, accuracy = step(x, y)
                share = len(y) / size  # 1 for one process; DDP averages gradients, hence `world` below
                optimizer.zero_grad(set_to_none=True)
                (loss * (share * world)).backward()
                optimizer.step()
                schedule.step()
                seen[i] = share * torch.stack([loss.detach(), accuracy])
                bar.update()
            if world > 1:
                dist.all_reduce(seen)
            seen = seen.cpu()  # the first wait for the device in an epoch (but SyncBatchNorm's own)
            check_finite(run, phase, epoch, seen[:, 0], model, rate, lr)
            loss, accuracy = seen.mean(0).tolist()
            knn = watch((epoch + 1) * steps) if (epoch + 1) % max(1, epochs // 10) == 0 else None
            row = dict(phase=phase, epoch=epoch + 1, loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}", lr=f"{rate:.2e}",
                       knn="" if knn is None else f"{knn:.4f}", seconds=f"{time.time() - began:.1f}")
            bar.write(f"{phase} {epoch + 1}/{epochs}: " + ", ".join(f"{k} {v}" for k, v in list(row.items())[2:] if v))
            sys.stdout.flush()  # so that it shows at once in a file as well
            run.log.append(row)
            run.save("state.pt", dict(phase=phase, epoch=epoch + 1, log=run.log, model=model.state_dict(),
                                      optimizer=optimizer.state_dict(), schedule=schedule.state_dict()))
            run.write_log()  # after the state, which holds it too: a stop between the two loses nothing


def check_finite(run, phase, epoch, losses, model, rate, peak):
    """Stop before an epoch whose losses, or weights at its end, are not finite replaces the last good state."""
    broken = (~losses.isfinite()).nonzero().flatten().tolist()  # steps
    if not broken and torch.stack([v.isfinite().all() for v in model.state_dict().values()]).all():
        return
    i = broken[0] if broken else len(losses) - 1
    flag, also = ("--pretrain-lr", " or a higher --temperature") if phase == "pretrain" else ("--lr", "")
    kept = f"{run.out / 'state.pt'} keeps the epoch before" if run.log else "no epoch was whole"
    raise data.UserError(
        f"{phase}: loss or weights are no longer finite (loss {losses[i]:g}) at step {i + 1} of epoch {epoch + 1}, "
        f"learning rate {rate:.2e} at its start: start again with {flag} {peak / 3:.1g}{also}; {kept}")


def engine(model, args):
    """What to call to train `model`: itself; on one GPU, compiled; with several processes, averaging gradients.

    With several, batch-norm statistics are taken over all of them on GPUs (SyncBatchNorm) and over each one's own share
    on CPUs, for which PyTorch has no SyncBatchNorm. It would break a compiled graph at every layer, so there,
    as always on a CPU, only the LIF layers are compiled (neuron.py).
    """
    cuda = torch.device(args.device).type == "cuda"
    if dist.is_initialized():
        if cuda:
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # what it proposes instead still syncs buffers
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels, all formats alike
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    able = cuda and importlib.util.find_spec("triton") and torch.cuda.get_device_capability(args.device)[0] >= 7
    if able and not args.no_compile:
        torch._dynamo.config.suppress_errors = True  # if compiling fails, it warns and runs uncompiled
        warnings.filterwarnings("ignore", "TensorFloat32")  # the loss is meant to be in float32
        print("the first steps compile the whole network: minutes, more for more time steps (--no-compile: never)")
        return torch.compile(model, dynamic=False)  # batches have at most two sizes: one fast graph for each
    return model


def subset(split):
    """Every n-th recording of the split, 1,000 to 2,000 of them, or all of a smaller split."""
    every = max(1, len(split.labels) // 1000)
    return split._replace(frames=split.frames[::every], labels=split.labels[::every])


def look(run, encoder, split, done):
    """Features [N, D] of a split after `done` steps. Warns, once a run, of dead neurons and of features all alike."""
    rates, found = defaultdict(list), {}

    def see(name, spikes):
        if len(spikes) != run.args.n_frames:
            raise data.UserError(f"{name}: gets {len(spikes)} time steps, not {run.args.n_frames}: unflatten T*B first")
        rates[name].append(spikes.float().mean())

    hooks = [layer.register_forward_hook(lambda _, __, spikes, name=name: see(name, spikes))
             for name, layer in encoder.named_modules() if isinstance(layer, neuron.LIF)]
    features = over_split(encoder, split, run.args.batch_size, run.args.device)
    for hook in hooks:
        hook.remove()
    for rate, how in ((0, "never spike"), (1, "spike at every time step")):
        if layers := [name for name, seen in rates.items() if (torch.stack(seen) == rate).all()]:
            found[how] = f"the neurons of {', '.join(layers)} {how}, whatever they see: nothing gets through them"
    spread = (features - features.mean(0)).norm() / features.norm()
    if len(features) > 1 and not spread > 0.03:  # or NaN; two features' mean cosine is above 0.999 (toy data: 0.77)
        found["alike"] = "the features of all recordings are alike (a collapse): nothing can be told from them"
    for kind, what in found.items():
        if kind not in run.warned and done >= 50:  # earlier, batch norm's running statistics do not fit the data yet
            print(f"warning: {what}; a lower learning rate or another seed may help")
            run.warned.add(kind)
    return features


def pretrain(run, train, encoder):
    """NeuroMoCo: two views of every recording, no label. Writes pretrained.pt."""
    args = run.args
    torch.manual_seed(args.seed)
    moco = MoCo(encoder, 128, args.queue_size, args.momentum, args.temperature, args.alpha, args.beta).to(args.device)
    moco.new_queue(args.n_frames)  # now: --resume and a compiled step need its final shape
    forward = engine(moco, args)

    def step(x, _):
        loss = forward(data.augment(x, **args.views), data.augment(x, **args.views))
        return loss, moco.accuracy

    seen = subset(train)

    def watch(done):
        features = look(run, encoder, seen, done)
        query = torch.arange(len(seen.labels)) % 5 == 0  # every fifth; the others are the neighbours
        if query.all() or len(seen.classes) == 1:  # a single recording or class: nothing to classify
            return None
        return knn_accuracy(features[~query], seen.labels[~query], features[query], seen.labels[query])

    level = chance(args.queue_size, args.alpha, args.beta)
    print(f"the contrastive loss at the level of chance is {level:.3f}, (alpha + beta) log(K + 1)")
    if args.queue_size >= len(train.labels):
        print(f"warning: a queue of {args.queue_size} holds all {len(train.labels)} recordings: positives return "
              f"as negatives; --queue-size {len(train.labels) // 4 + 1} may do better")
    fit(run, "pretrain", moco, step, train, args.pretrain_epochs, args.pretrain_lr, watch)
    run.save("pretrained.pt", dict(kind="pretrained", classes=train.classes, weights=encoder.state_dict()))


def finetune(run, train, encoder):
    """Cross-entropy of the logits averaged over time, on the labelled recordings. Writes finetuned.pt."""
    args = run.args
    torch.manual_seed(args.seed)
    model = models.Classifier(encoder, len(train.classes)).to(args.device)
    forward, seen = engine(model, args), subset(train)

    def step(x, y):
        logits = forward(data.augment(x, **args.finetune)).float().mean(0)  # [B, classes]
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()

    def watch(done):
        look(run, encoder, seen, done)

    fit(run, "finetune", model, step, train, args.epochs, args.lr, watch)
    run.save("finetuned.pt", dict(kind="finetuned", classes=train.classes, weights=model.state_dict()))
    return model


def labelled(train, per_class, seed):
    """The split that fine-tuning sees: per_class recordings of each class, drawn by seed, or all if that is 0."""
    if not per_class:
        return train
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if few := [c for c, n in zip(train.classes, counts) if n < per_class]:
        print(f"warning: fewer than {per_class} recordings to label in class {', '.join(few)}")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed)).numpy()
    chosen = [i for c in range(len(train.classes)) for i in order[train.labels[order] == c][:per_class]]
    return train._replace(frames=train.frames[chosen], labels=train.labels[chosen])


def train_and_test(args):
    """A whole run: frames, pre-training (unless --init or --pretrain-epochs 0), fine-tuning, one test at the end."""
    init = load_checkpoint(args.init) if args.init else None
    if init:  # the new checkpoints are to say how their encoder was pre-trained; idle: flags that play no part
        was, row = init["args"], data.recipe(args.dataset)
        idle = [f"--{k.replace('_', '-')}" for k in PRETRAINING if vars(args)[k] not in (was[k], row[k])]
        vars(args).update({k: was[k] for k in (*PRETRAINING, "pretrained_on")})
    keep_memory()
    join(args)
    run = Run(args)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()  # the first process of a machine makes the frames, the others find them
    train, test = data.load(args.dataset, args.root, args.n_frames, args.image_size, args.skip_broken, args.sensor)
    if dist.is_initialized() and first:
        dist.barrier()
    args.image_size, args.sensor = train.frames.shape[-1], train.sensor
    args.recordings = f"{len(train.labels)}+{len(test.labels)}"
    run.check_flags()
    if args.epochs and len(train.classes) == 1:
        raise data.UserError(f"{args.dataset}: has a single class: nothing to tell apart; --epochs 0 pre-trains only")
    if args.batch_size > len(train.labels) and args.batch_size != data.recipe(args.dataset)["batch_size"]:
        raise data.UserError(f"--batch-size {args.batch_size}: only {len(train.labels)} recordings to train on")
    train = data.on_device(train, args.device)
    if args.no_compile:
        neuron.COMPILE_AFTER = None
    few = labelled(train, args.labels_per_class, args.seed)
    for split in (train, few):
        batch_sizes(split, args)  # complains before the hours of pre-training
    print(", ".join(f"{k} {v}" for k, v in vars(args).items()))
    if init:
        data.compare_sensors(init["args"], args.dataset, train)
    if init and idle:
        print(f"warning: without effect: {', '.join(idle)}; the encoder of --init was pre-trained as printed above")
    print(f"{run.out}: {len(train.labels)} recordings to train on, {len(test.labels)} to test")
    if neuron.COMPILE_AFTER:
        print("the first steps compile the LIF layers: half a minute once, then seconds a run (--no-compile: never)")
    torch.manual_seed(args.seed)
    encoder = models.build(args.arch, args.image_size)
    if init:
        load_encoder(encoder, init, args)
    elif args.pretrain_epochs and not (run.state and run.state["phase"] == "finetune"):
        pretrain(run, train, encoder)
    model = finetune(run, few, encoder) if args.epochs else None
    print(f"to evaluate it: python eval.py --ckpt {run.out / ('finetuned.pt' if model else 'pretrained.pt')}")
    if model:
        print(accuracy_line(over_split(model, test, args.batch_size, args.device), test.labels))
    if dist.is_initialized():
        dist.destroy_process_group()


def load_encoder(encoder, ckpt, args):
    """Copy the encoder of a checkpoint of either kind into `encoder`. T may differ: no weight depends on it."""
    weights = ckpt["weights"]
    if ckpt["kind"] == "finetuned":
        weights = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError:
        was = ckpt["args"]
        raise data.UserError(f"--init {args.init}: holds {was['arch']} for {was['image_size']} pixels, this run builds "
                             f"{args.arch} for {args.image_size}: pass the same --arch and --image-size")


def main(argv=None):
    with data.answers("lower --batch-size, --n-frames or --image-size, or take a smaller --arch",
                      ": the same command with --resume goes on after the last whole epoch, if there is one"):
        train_and_test(parse(argv))


if __name__ == "__main__":
    main()
