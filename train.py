"""NeuroMoCo from recordings to a test accuracy: pre-train without labels, fine-tune with labels.

    python train.py                                           # toy data, minutes on a laptop
    python train.py --dataset cifar10dvs                      # or dvsgesture, ncaltech101, nmnist
    python train.py --dataset path/to/folder                  # your own recordings
    python train.py --dataset cifar10dvs --pretrain-epochs 0  # from scratch: the twin to compare
    python train.py --dataset cifar10dvs --help               # all flags, with its defaults

A run's folder holds pretrained.pt and finetuned.pt (weights of the last epoch, and all that eval.py
needs), log.csv (a row per epoch, and the test) and state.pt (all that --resume needs).
Tests: python -m pytest test_all.py -k train
"""
import argparse
import copy
import csv
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn
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
    train, test, unlabelled = load_data(args)  # unlabelled: of --pretrain-on, or train
    labelled = few_shot_subset(train, args.labels_per_class, args.seed)

    # ============ encoder ============
    models.limit_threads(args.image_size)
    torch.manual_seed(args.seed)
    encoder = models.build(args.arch, args.image_size)
    if args.init:
        load_pretrained_encoder(encoder, args)

    # ============ the run's folder, and the state that --resume continues ============
    state = make_run_dir(args, train.classes)
    print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    print(f"{args.out}: {len(train.labels)} recordings to train on, {len(test.labels)} to test, "
          f"{len(labelled.labels)} labels to fine-tune with")

    # ============ pre-training, without labels; over once there is fine-tuning ============
    if args.pretrain_epochs and not args.init and "finetune" not in state:
        pretrain(encoder, unlabelled, args, state)
    if args.epochs == 0:
        print(f"to evaluate it: python eval.py --ckpt {shlex.quote(args.out)}/pretrained.pt")
        return

    # ============ fine-tuning, with labels ============
    classifier = finetune(encoder, labelled, args, state)

    # ============ the only look at the test recordings ============
    logits = models.predict(classifier, data.batches(test, args.batch_size, args.device)).mean(0)
    correct = (logits.argmax(1) == torch.tensor(test.labels)).sum().item()
    row = dict(phase="test", accuracy=f"{correct / len(logits):.4f}")
    write_log(args, state["log"] + [row])
    print(f"to evaluate it: python eval.py --ckpt {shlex.quote(args.out)}/finetuned.pt")
    print(accuracy_line(100 * correct / len(logits), len(logits)))


def pretrain(encoder, unlabelled, args, state):
    """Pre-train the encoder by NeuroMoCo, on two views of every recording.

    If the recordings have labels after all, only the kNN accuracy in the log looks at them.
    """
    torch.manual_seed(args.seed)  # the draws do not depend on what ran before
    moco = MoCo(encoder, 128, args.queue_size, args.momentum, args.temperature, args.alpha,
                args.beta).to(args.device)  # 128: size of an embedding
    moco.init_queue(args.n_frames)  # now, because a resumed and a compiled step need its shape
    model = wrap_model(moco, args)

    def compute_loss(x, y):
        x_q, x_k = data.split_events(x) if args.split_events else (x, x)
        view_q = data.augment(x_q, **args.pretrain_aug)
        view_k = data.augment(x_k, **args.pretrain_aug)
        loss = model(view_q, view_k)
        return loss, moco.accuracy

    stride = max(1, len(unlabelled.labels) // 1000)  # 1,000 to 2,000 recordings, or all of few
    sample = data.select(unlabelled, slice(None, None, stride))

    def monitor():
        """Classify every fifth recording by its nearest neighbours among the others."""
        batches = data.batches(sample, args.batch_size, args.device)
        z, y = models.predict(encoder, batches).mean(0), torch.tensor(sample.labels)
        fifth = torch.arange(len(y)) % 5 == 0
        return knn_accuracy(z[~fifth], y[~fifth], z[fifth], y[fifth])

    N, classes = len(unlabelled.labels), len(unlabelled.classes)
    chance = chance_level(args.queue_size, args.n_frames, args.alpha, args.beta)
    print(f"pre-training on {N} recordings; loss at the level of chance: {chance:.3f}")
    if args.queue_size >= N:
        print(f"warning: a queue of {args.queue_size} holds all {N} recordings: positives return "
              f"as negatives; try --queue-size {N // 4 + 1}")
    # moco, not model: wrapping renames the parameters
    train_phase("pretrain", moco, encoder, compute_loss, unlabelled, args.pretrain_epochs,
                args.pretrain_lr, args, state, monitor if classes > 1 and N > 1 else None)
    # Fine-tuning changes the weights in place, and state.pt has to keep those of pre-training.
    state["pretrain"] = copy.deepcopy(state["pretrain"])
    # The statistics of batch norm stem from the last views. Fine-tuning keeps them fixed, so they
    # are taken again, from all recordings as they are. The variance is the mean of those of
    # batches, hence batches of mixed classes.
    with models.autocast(args.device):
        update_bn(mixed_batches(unlabelled, args), encoder)
    save("pretrained.pt", args, dict(
        kind="pretrained", classes=unlabelled.classes, weights=encoder.state_dict()))


def finetune(encoder, labelled, args, state):
    """Train encoder and linear head by the cross-entropy of the logits averaged over time.

    After pre-training, the head is first fitted to the frozen encoder, and batch norm keeps its
    statistics.
    """
    torch.manual_seed(args.seed)
    pretrained = bool(args.init or args.pretrain_epochs)
    classifier = models.Classifier(encoder, len(labelled.classes), freeze_norm=pretrained)
    classifier.to(args.device)
    if pretrained and "finetune" not in state:  # a resumed run has a head
        fit_head(classifier, labelled, args)
    model = wrap_model(classifier, args)

    def compute_loss(x, y):
        logits = model(data.augment(x, **args.finetune_aug)).float().mean(0)  # [B, classes]
        return F.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()

    train_phase("finetune", classifier, encoder, compute_loss, labelled, args.epochs, args.lr,
                args, state, None)
    save("finetuned.pt", args, dict(
        kind="finetuned", classes=labelled.classes, weights=classifier.state_dict()))
    return classifier


def fit_head(classifier, labelled, args):
    """Fit the head to the frozen encoder's features of 1,000 or more views, in whole passes.

    The gradients of a random head would undo a part of pre-training (Kumar et al. 2022).
    """
    passes = math.ceil(1000 / len(labelled.labels))
    views = ((data.augment(x, **args.finetune_aug), y) for _ in range(passes)
             for x, y in data.batches(labelled, args.batch_size, args.device))
    features = models.predict(classifier.encoder, views).mean(0)  # [passes * N, D]
    labels = torch.tensor(labelled.labels).repeat(passes)
    head = models.fit_linear(features, labels, len(labelled.classes))
    classifier.head.load_state_dict(head.state_dict())


def train_phase(phase, model, encoder, compute_loss, split, epochs, lr, args, state, monitor):
    """Train model for the epochs that are left; after each, write log.csv and state.pt.

    compute_loss(x, y) -> (loss, accuracy of the batch); encoder: the part of model whose firing
    rate is logged; monitor() -> kNN accuracy, logged 19 times at most, or None.
    """
    rank, world_size = rank_and_world_size()
    optimizer = build_optimizer(model, args.weight_decay)
    start = 0
    if phase in state:
        start = state[phase]["epoch"]
        model.load_state_dict(state[phase]["model"])
        optimizer.load_state_dict(state[phase]["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the flag may have changed
    # the number of batches that data.batches yields, as it counts them
    steps = math.ceil((len(split.labels) // world_size) / (args.batch_size // world_size))
    for epoch in range(start, epochs):
        began, name = time.time(), f"{phase} {epoch + 1}/{epochs}"
        seed = args.seed + 1_000_000 * (epoch + 1)  # no epoch's draws depend on earlier epochs
        generator = torch.Generator().manual_seed(seed)  # of the order, the same in all processes
        torch.manual_seed(seed + 1000 * rank)  # of the views, different in each process
        batches = data.batches(
            split, args.batch_size, args.device, shuffle=True, generator=generator, rank=rank,
            world_size=world_size)
        lrs = [lr * warmup_cosine(epoch * steps + i, epochs * steps) for i in range(steps)]

        # one epoch, with a progress bar in the terminal (None: no bar elsewhere) of process 0
        bar = tqdm(batches, name, steps, leave=False, disable=True if rank else None)
        model.train()
        loss, accuracy = train_one_epoch(compute_loss, bar, optimizer, lrs)
        if not math.isfinite(loss):
            raise UserError(f"{name}: the loss is {loss}: take a lower learning rate; --resume "
                            "continues after the last epoch in state.pt, if there is one")

        # log and state; the rate, of the same batch each epoch, comes before monitor(), which sets
        # evaluation mode
        x, _ = next(mixed_batches(split, args))
        rate = firing_rate(encoder, x)
        due = monitor and (epoch + 1) % max(1, epochs // 10) == 0
        row = dict(loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}", rate=f"{rate:.4f}",
                   lr=f"{lrs[0]:.2e}", knn=f"{monitor():.4f}" if due else "",
                   seconds=f"{time.time() - began:.1f}")
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if v), flush=True)
        state["log"].append(dict(phase=phase, epoch=epoch + 1) | row)
        state[phase] = dict(
            epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        write_log(args, state["log"])
        save("state.pt", args, state)


def train_one_epoch(compute_loss, batches, optimizer, lrs):
    """Take one step per batch, each at its learning rate -> mean loss and mean accuracy."""
    history = []
    for (x, y), lr in zip(batches, lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        with models.autocast(x.device):
            loss, accuracy = compute_loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(torch.stack([loss.detach(), accuracy]))
    means = torch.stack(history).mean(0)
    if dist.is_initialized():
        dist.all_reduce(means)  # sums
    return (means / rank_and_world_size()[1]).tolist()  # only now does the CPU wait for a GPU


def mixed_batches(split, args):
    """Yield batches in random order, and so of mixed classes, the same at every call."""
    generator = torch.Generator().manual_seed(args.seed)
    return data.batches(split, args.batch_size, args.device, shuffle=True, generator=generator)


@torch.no_grad()
def firing_rate(encoder, x):
    """Compute the share of neurons x time steps that spike at x, in the encoder's present mode."""
    encoder = copy.deepcopy(encoder)  # because in training mode, its running statistics change
    counts = []  # of each layer: spikes, neurons x time steps

    def count(layer, inputs, out):
        counts.append((out.sum(dtype=torch.float32), out.numel()))
    for layer in encoder.modules():
        if isinstance(layer, neuron.LIF):
            layer.register_forward_hook(count)
    with models.autocast(x.device):
        encoder(x)
    return float(sum(spikes for spikes, _ in counts)) / max(1, sum(total for _, total in counts))


def build_optimizer(model, weight_decay):
    """Make AdamW; its first group, matrices and kernels, has weight decay, the second has none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}])


def warmup_cosine(step, steps):
    """Compute a step's share of the learning rate: a cosine from 1 to 0, or the warm-up if lower.

    The warm-up lasts a twentieth of all steps, but at least 5: in a network whose batch norm has
    fixed statistics, a full first step of AdamW is far too large for the fitted head.
    """
    warmup = max(5, steps // 20)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def wrap_model(model, args):
    """Wrap the model for training: compiled on one GPU, distributed under torchrun, or neither."""
    on_gpu = torch.device(args.device).type == "cuda"
    if dist.is_initialized():
        if on_gpu:  # on CPUs, batch norm sees a process's own share: there is no SyncBatchNorm
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces its layers in place
        model = torch.nn.parallel.DistributedDataParallel(model)  # sends weights and queue to all
        model.broadcast_buffers = False  # not again at every step: the queues stay equal
        return model
    if on_gpu and not args.no_compile:
        print("the first steps compile the network: minutes; if that fails, pass --no-compile")
        return torch.compile(model, dynamic=False)  # batches have two sizes at most
    return model


# ------------------------------------------------------------------------------------------- data

def load_data(args):
    """Load train, test and the recordings to pre-train on; set in args what only these tell."""
    waits = dist.is_initialized() and os.environ["LOCAL_RANK"] != "0"
    # One barrier at two places: the first process of a machine makes the frames and then reaches
    # it, below; until then, the others wait for it here, after which they find the frames.
    if waits:
        dist.barrier()
    settings = dict(root=args.root, n_frames=args.n_frames, skip_broken=args.skip_broken,
                    sensor=args.sensor, frames_by=args.frames_by, columns=args.columns)
    train, test = data.load(args.dataset, size=args.image_size, **settings)
    args.image_size = train.frames.shape[-1]
    args.pretrain_size = args.image_size  # --init will replace it by that of its own run
    train = unlabelled = data.to_gpu_if_fits(train, args.device)
    if args.pretrain_on and args.pretrain_on != args.dataset:
        unlabelled, _ = data.load(
            args.pretrain_on, size=args.image_size, only="train", **settings)
        unlabelled = data.to_gpu_if_fits(unlabelled, args.device)
        if unlabelled.sensor != train.sensor:
            print(f"warning: the sensor of --pretrain-on is {unlabelled.sensor}, that of --dataset "
                  f"{train.sensor}: if the camera is the same, pass --sensor")
    if dist.is_initialized() and not waits:
        dist.barrier()
    if len(train.classes) < 2 and args.epochs:
        raise UserError(f"{args.dataset}: a single class; --epochs 0 pre-trains only")
    args.sensor = train.sensor
    args.recordings = data.fingerprint(train.names, test.names)
    return train, test, unlabelled


def few_shot_subset(train, labels_per_class, seed):
    """Keep labels_per_class recordings of each class, drawn by seed, or all if that is 0."""
    if not labels_per_class:
        return train
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=generator).numpy()
    chosen = []
    for c, name in enumerate(train.classes):
        candidates = order[train.labels[order] == c]
        chosen += list(candidates[:labels_per_class])
        if len(candidates) < labels_per_class:
            print(f"warning: fewer than {labels_per_class} recordings in class {name}")
    if len(chosen) < rank_and_world_size()[1]:
        raise UserError(f"--labels-per-class {labels_per_class}: fewer labels than processes")
    return data.select(train, chosen)


# The flags of each phase. --init takes those of pre-training from its checkpoint, and --resume
# keeps those of a phase that is over. Batch size and weight decay serve both phases, to the end.
PRETRAINING = [
    "pretrain_epochs", "pretrain_lr", "pretrain_aug", "pretrain_on", "pretrain_size",
    "split_events", "queue_size", "momentum", "temperature", "alpha", "beta"]
FINETUNING = ["labels_per_class", "lr", "finetune_aug", "weight_decay", "batch_size"]


def load_pretrained_encoder(encoder, args):
    """Copy the encoder of the checkpoint --init, of either kind, and the flags that made it."""
    source, checkpoint = models.load_model(args.init)
    was = checkpoint["args"]
    if checkpoint["kind"] == "finetuned":
        source = source.encoder
        args.init_kind = "finetuned"  # it has seen labels, so eval.py keeps it apart
    try:
        encoder.load_state_dict(source.state_dict())
    except RuntimeError:  # other names or shapes of weights; the stem depends on the image size
        raise UserError(f"--init {args.init}: holds {was['arch']} for {was['image_size']} pixels, "
                        f"this run builds {args.arch} for {args.image_size}")
    vars(args).update({name: was[name] for name in PRETRAINING if name in was})
    if args.pretrain_on is None and was["dataset"] != args.dataset:
        args.pretrain_on = was["dataset"]
    if args.pretrain_size != args.image_size:
        print(f"warning: --init was pre-trained at {args.pretrain_size} pixels, this run has "
              f"{args.image_size}: the network pools at other places and sees other sizes")


# ------------------------------------------------------------------------------ the run's folder

def make_run_dir(args, classes):
    """Claim the run's folder and set args.out to it -> the state that --resume continues.

    It is --out or, of runs/<dataset>, runs/<dataset>-2, ..., the one after the last that exists;
    with --resume, the last. The state is {"log": rows, "classes": names} and, for each phase begun,
    {phase: its last epoch, model and optimizer}.
    """
    found = [None, {"log": [], "classes": classes}]  # folder and state, for all processes
    if rank_and_world_size()[0] == 0:
        if args.out:
            out = Path(args.out).expanduser()
        else:
            first = Path("runs", Path(args.dataset).name)
            folders = [first] + [first.with_name(f"{first.name}-{i}") for i in range(2, 10_000)]
            last = max((i for i, folder in enumerate(folders) if folder.exists()), default=-1)
            out = folders[max(last, 0) if args.resume else last + 1]
        out.mkdir(parents=True, exist_ok=bool(args.out or args.resume))
        log, kept = out / "log.csv", [path.name for path in out.glob("*.pt")]
        if args.resume and "state.pt" in kept:
            found[1] = load_state(out / "state.pt", args, classes)
        elif kept and (args.resume or not log.exists()):
            raise UserError(f"--out {out}: holds {', '.join(kept)}, but not both state.pt and "
                            "log.csv to continue that run")
        elif args.resume:
            print(f"{out}: no run to continue, a new one starts")
        try:
            open(log, "a" if args.resume else "x").close()  # "x": no two runs share a folder
        except FileExistsError:
            raise UserError(f"--out {out}: holds a run already: add --resume to continue it")
        found[0] = out.as_posix()
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # the other processes may not see this disk
    args.out, state = found
    return state


def load_state(path, args, classes):
    """Read state.pt -> the state to continue; print the flags that change.

    Those of a phase that is over keep their old values; others that cannot change raise UserError.
    """
    given = vars(args) | {"classes": classes}
    fixed = ["classes", "arch", "image_size", "n_frames", "frames_by", "sensor", "seed", "init"]
    if not args.init:
        fixed.append("pretrain_on")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "pretrain" in state:
            fixed.append("queue_size")
        saved = state["args"] | {"classes": state["classes"]}
        wrong = [f"{name} {saved[name]}, not {given[name]}" for name in fixed
                 if saved[name] != given[name]]
        if saved["recordings"] != args.recordings:
            wrong.append("recordings of other names or in another split")
        if saved["dataset"] != args.dataset and not args.out:  # both are runs/<the same name>
            wrong.append(f"dataset {saved['dataset']}, not {args.dataset}; if that has moved, pass "
                         "--out")
        pretrain_log = [row for row in state["log"] if row["phase"] == "pretrain"]
    except Exception as e:  # there is no list of all that a foreign file may raise
        raise UserError(f"--resume: {path}: {data.format_error(e)}")
    too_late = []  # flags of phases that are over
    if not args.init and len(pretrain_log) < args.pretrain_epochs:
        if not pretrain_log:  # the state is of fine-tuning
            wrong.append("no pre-training")
        state.pop("finetune", None)  # it starts again when pre-training has ended
        state["log"] = pretrain_log
    elif pretrain_log:
        too_late += [name for name in PRETRAINING if name != "pretrain_epochs"]
    if "finetune" in state and args.epochs == state["finetune"]["epoch"]:
        too_late += FINETUNING
    for phase, epochs in ("pretrain", args.pretrain_epochs), ("finetune", args.epochs):
        if phase in state and epochs < state[phase]["epoch"]:
            wrong.append(f"{state[phase]['epoch']} epochs of {phase}, not {epochs}")
    if wrong:
        raise UserError(f"--resume: {path} was made with {wrong[0]}")
    for name, value in vars(args).items():
        was = saved.get(name)  # None: of a flag that train.py has got since
        if value == was or name in ("out", "root", "device", "resume", "no_compile"):
            continue
        if name in too_late and name in saved:
            print(f"too late, its phase is over: {name} stays {was}, not {value}")
            setattr(args, name, was)
        else:
            print(f"from here on: {name} {value}, not {was}")
    return state


def save(name, args, content):
    """Write a checkpoint into the run's folder; os.replace leaves the old file or the new one."""
    if rank_and_world_size()[0] == 0:
        path = os.path.join(args.out, name)
        try:
            torch.save(content | {"args": vars(args)}, path + ".part")
        except RuntimeError as e:  # a full disk
            raise OSError(f"{path} cannot be written ({data.format_error(e)})")
        os.replace(path + ".part", path)


def write_log(args, log):
    """Write log.csv, with the columns of the first row; the test has a few of them only."""
    if rank_and_world_size()[0] == 0:
        with open(os.path.join(args.out, "log.csv"), "w", newline="") as f:
            writer = csv.DictWriter(f, log[0])
            writer.writeheader()
            writer.writerows(log)


# --------------------------------------------------------------------------- processes and flags

def init_distributed(args):
    """Join the other processes under torchrun: NCCL on GPUs, gloo on CPUs; process 0 prints."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not by torchrun: unset it, or start with torchrun")
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                            timeout=timedelta(hours=12))  # the others wait for a download
    rank, world_size = rank_and_world_size()
    if args.batch_size < 3 * world_size:
        raise UserError(f"--batch-size {args.batch_size}: fewer than 3 for each of {world_size} "
                        "processes")
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


def parse_args(argv):
    """Parse the flags; their defaults are the row of data.DATASETS that --dataset selects."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", default="toy", type=data.resolve,
                        help=f"{', '.join(data.DATASETS)}, or a folder of recordings")
    dataset = parser.parse_known_args(argv)[0].dataset  # before the flags that it has defaults for
    parser.set_defaults(**data.default_config(dataset))
    parser.add_argument("-h", "--help", action="help", help="show this text and stop")
    positive, learning_rate = in_range(int, 1), in_range(float, 1e-9)
    add = parser.add_argument_group("data").add_argument
    add("--root", default="data", help="folder of downloads and cached frames")
    add("--n-frames", type=positive, help="time steps T that a recording is cut into")
    add("--frames-by", choices=("count", "time"), help="frames equal in events or duration")
    add("--image-size", type=in_range(int, 8), help="side of a frame; None: the sensor's, <= 128")
    add("--sensor", type=positive, nargs=2, metavar=("W", "H"),
        help="size of a folder's sensor; None: as named, or the largest coordinates")
    add("--labels-per-class", type=in_range(int, 0), help="for fine-tuning; 0: all")
    add("--columns", help="order of the columns of plain [N, 4] arrays, as xytp")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add = parser.add_argument_group("model and its pre-training, without labels").add_argument
    add("--arch", help="sew-resnet-18[-<width>] or spikformer-<depth>-<dim>")
    add("--pretrain-epochs", type=in_range(int, 0), help="0: fine-tune from scratch")
    add("--pretrain-lr", type=learning_rate, help="peak learning rate")
    add("--split-events", action=argparse.BooleanOptionalAction,
        help="deal the events of a recording to the two views, which then share none")
    add("--queue-size", type=positive, help="negatives K, well below the number of recordings")
    add("--momentum", type=in_range(float, 0, 1), help="of the key encoder; 0: a copy, 1: frozen")
    add("--temperature", type=in_range(float, 1e-3), help="of InfoNCE")
    add("--alpha", type=in_range(float, 0), help="weight of MBC, InfoNCE of the average over time")
    add("--beta", type=in_range(float, 0), help="weight of MAC, average over time of InfoNCE")
    add("--pretrain-on", type=data.resolve, help="pre-train on this folder or data set instead")
    add("--init", help="fine-tune the encoder of this checkpoint instead of pre-training one")
    add = parser.add_argument_group("fine-tuning, with labels").add_argument
    add("--epochs", type=in_range(int, 0), help="0: pre-train only")
    add("--lr", type=learning_rate, help="peak learning rate")
    add = parser.add_argument_group("AdamW, in both").add_argument
    add("--weight-decay", type=in_range(float, 0), help="of matrices and kernels only")
    # at least 3, because 2 may leave a batch of one recording, too few for batch norm
    add("--batch-size", type=in_range(int, 3), help="recordings per step, over all processes")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder; None: a new one, runs/<dataset>[-<number>]")
    add("--seed", type=in_range(int, 0, 10**9), default=0, help="of weights, order, views, labels")
    add("--device", type=models.device, help="cpu; untested: cuda[:N], mps",
        default=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue the run in --out, or the last one")
    add("--no-compile", action="store_true", help="never call a compiler: slower, the same numbers")
    return check_args(parser.parse_args(argv), parser)


def check_args(args, parser):
    """Return the flags, but refuse combinations that cannot work."""
    if args.columns and sorted(args.columns) != sorted("xytp"):
        parser.error(f"--columns {args.columns}: an order of x, y, t and p, as xytp")
    if args.alpha == args.beta == 0:
        parser.error("--alpha 0 --beta 0 leave nothing to minimise in pre-training")
    if args.epochs == 0 and (args.init or args.pretrain_epochs == 0):
        parser.error("--epochs 0 without pre-training leaves nothing to do")
    if args.pretrain_on and (args.init or args.pretrain_epochs == 0):
        parser.error("--pretrain-on is of no use with --init or without pre-training")
    try:
        models.build(args.arch, 128)  # any image size tells whether the name is right
    except ValueError as e:
        parser.error(f"--arch: {e}")
    return args


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a name ends no run
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\nstopped: --resume continues a run that has begun, after its last whole epoch",
              file=sys.stderr)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # ends a loop of the shell, too
