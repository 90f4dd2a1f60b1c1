"""NeuroMoCo from recordings to a test accuracy: pre-train without labels, fine-tune with labels.

    python train.py                                           # toy data, minutes on a laptop
    python train.py --dataset cifar10dvs                      # or dvsgesture, ncaltech101, nmnist
    python train.py --dataset path/to/folder --sensor W H     # your own recordings
    python train.py --dataset cifar10dvs --pretrain-epochs 0  # from scratch: the twin to compare
    python train.py --dataset cifar10dvs --help               # all flags, with its defaults
    python train.py --resume runs/toy                         # continue a run, with its flags

A run's folder holds pretrained.pt and finetuned.pt (weights of the last epoch, and all that eval.py
needs), log.csv (a row per epoch, and the test) and state.pt (all that --resume needs).
Tests: python -m pytest test_all.py -k train
"""
import argparse
import copy
import csv
import itertools
import math
import os
import shlex
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
from eval import accuracy_line, knn_accuracy, spike_stats
from loss import chance_level
from moco import MoCo


def main(argv=None):
    args, state = init_distributed(*parse_args(argv))  # state: of a run to resume, see read_state
    neuron.COMPILE = not args.no_compile

    # ============ data ============
    train, test, unlabelled = load_data(args)  # unlabelled: of --pretrain-on, or train
    labelled = few_shot_subset(train, args.labels_per_class, args.seed)

    # ============ encoder ============
    models.prepare_cpu(args.image_size)
    torch.manual_seed(args.seed)
    encoder = models.build(args.arch, args.image_size)
    if not args.init:
        state["seen"] = torch.tensor(unlabelled.ids if args.pretrain_epochs else [], dtype=int)
    elif "finetune" not in state:  # else state has the weights, and the checkpoint may be gone
        state["seen"] = load_pretrained_encoder(encoder, args)

    # ============ the run's folder ============
    open_run(args, state, train=train.ids, test=test.ids, unlabelled=unlabelled.ids)
    print(", ".join(f"{name} {value}" for name, value in vars(args).items()))
    print(f"{args.out}: the run {'continues' if 'args' in state else 'begins'}; "
          f"{len(train.labels)} recordings to train on, {len(test.labels)} to test, "
          f"{len(labelled.labels)} labels to fine-tune with")
    seen = torch.cat([state["seen"], torch.tensor(labelled.ids)]).unique()
    data.leave_out(test, seen, "to test are trained on, too")  # the warning only

    try:
        # ============ pre-training, without labels; skipped once fine-tuning has begun ============
        if args.pretrain_epochs and not args.init and "finetune" not in state:
            pretrain(encoder, unlabelled, args, state)
        if args.epochs == 0:
            print(f"to evaluate it: python eval.py --ckpt {shlex.quote(args.out)}/pretrained.pt")
            return

        # ============ fine-tuning, with labels ============
        classifier = finetune(encoder, labelled, args, state, seen)

        # ============ the only look at the test recordings ============
        batches = data.batches(test, args.batch_size, args.device)
        logits = models.predict(classifier, batches).mean(0)  # [N, classes]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; to continue: python train.py --resume {shlex.quote(args.out)}")
    correct = (logits.argmax(1) == torch.tensor(test.labels)).sum().item()
    write_log(args, state, [dict(phase="test", accuracy=f"{correct / len(logits):.4f}")])
    print(f"to evaluate it: python eval.py --ckpt {shlex.quote(args.out)}/finetuned.pt")
    print(accuracy_line(100 * correct / len(logits), len(logits)))


def pretrain(encoder, unlabelled, args, state):
    """Pre-train the encoder on two views of every recording; only kNN, logged, looks at labels."""
    torch.manual_seed(args.seed)  # the draws do not depend on what ran before
    moco = MoCo(encoder, args.n_frames, queue_size=args.queue_size, momentum=args.momentum,
                temperature=args.temperature, alpha=args.alpha, beta=args.beta).to(args.device)
    model = wrap_model(moco, args)

    def compute_loss(x, y):
        x_q, x_k = data.split_events(x) if args.split_events else (x, x)
        view_q = data.augment(data.crop_time(x_q, args.crop_time), **args.pretrain_aug)
        view_k = data.augment(data.crop_time(x_k, args.crop_time), **args.pretrain_aug)
        return model(view_q, view_k), moco.accuracy

    N = len(unlabelled.labels)
    sample = data.select(unlabelled, slice(None, None, max(1, N // 1000)))  # 1,000 to 2,000, or all

    def monitor():
        """Classify every fifth recording by its nearest neighbours among the others."""
        batches = data.batches(sample, args.batch_size, args.device)
        z, y = models.predict(encoder, batches).mean(0), torch.tensor(sample.labels)
        fifth = torch.arange(len(y)) % 5 == 0
        return knn_accuracy(z[~fifth], y[~fifth], z[fifth], y[fifth])

    chance = chance_level(args.queue_size, args.alpha, args.beta)
    print(f"pre-training on {N} recordings; loss at the level of chance: {chance:.3f}")
    if args.queue_size >= N:
        print(f"warning: a queue of {args.queue_size} holds all {N} recordings: positives return "
              f"as negatives; try --queue-size {N // 4 + 1}")
    train_phase("pretrain", moco, encoder, compute_loss, unlabelled, args.pretrain_epochs,
                args.pretrain_lr, args, state,
                monitor if len(unlabelled.classes) > 1 and N > 1 else None)
    state["pretrain"] = copy.deepcopy(state["pretrain"])  # or fine-tuning would change its weights
    # Batch norm's statistics are those of views; take them again, from the recordings as they are.
    # Its variance is a mean over batches, so batches mix classes.
    with models.autocast(args.device):
        torch.optim.swa_utils.update_bn(mixed_batches(unlabelled, args), encoder)
    save("pretrained.pt", args, dict(kind="pretrained", classes=unlabelled.classes,
                                     weights=encoder.state_dict(), trained_on=state["seen"]))


def finetune(encoder, labelled, args, state, seen):
    """Train heads and encoder: cross-entropy of each step, averaged over time.

    The loss, our choice, is that of temporal efficient training (TET, Deng et al. 2022), less its
    regulariser: to labels what MAC is to keys.
    """
    torch.manual_seed(args.seed)
    pretrained, n_classes = bool(args.init or args.pretrain_epochs), len(labelled.classes)
    if frozen := pretrained and bool(torch.tensor(labelled.labels).bincount().median() < 5):
        print("fewer than 5 labels a class would harm the pre-trained encoder: it stays as it is")
    classifier = models.Classifier(encoder, n_classes, args.n_frames, frozen).to(args.device)
    # The gradients of random heads would undo a part of pre-training (Kumar et al. 2022).
    if pretrained and "finetune" not in state:  # a resumed run has its heads
        fit_heads(classifier, labelled, args)
    model = wrap_model(classifier, args)

    def compute_loss(x, y):
        logits = model(data.augment(x, **args.finetune_aug)).float()  # [T, B, classes]
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))  # of [T*B, classes]
        return loss, (logits.mean(0).argmax(1) == y).float().mean()

    train_phase("finetune", classifier, encoder, compute_loss, labelled, args.epochs, args.lr,
                args, state, None)
    save("finetuned.pt", args, dict(kind="finetuned", classes=labelled.classes,
                                    weights=classifier.state_dict(), trained_on=seen))
    return classifier


def fit_heads(classifier, labelled, args):
    """Fit each head to the frozen encoder's features at its step, of 1,000 views or more."""
    passes = math.ceil(1000 / len(labelled.labels))  # whole ones
    views = ((data.augment(x, **args.finetune_aug), y) for _ in range(passes)
             for x, y in data.batches(labelled, args.batch_size, args.device))
    features = models.predict(classifier.encoder, views)  # [T, passes * N, D]
    labels = torch.tensor(labelled.labels).repeat(passes)
    for head, z in zip(classifier.heads, features):
        head.load_state_dict(models.fit_linear(z, labels, len(labelled.classes)).state_dict())


def train_phase(phase, model, encoder, compute_loss, split, epochs, lr, args, state, monitor):
    """Train model for the epochs that are left; after each, write state.pt and log.csv.

    model: not wrapped, as in its checkpoints; compute_loss(x, y) -> (loss, accuracy of the batch);
    encoder: the part of model whose firing rate is logged; monitor() -> kNN accuracy, or None.
    """
    rank, world_size = rank_and_world_size()
    optimizer = build_optimizer(model, args.weight_decay)
    log = state[phase]["log"] if phase in state else []  # a row per epoch
    if log:
        model.load_state_dict(state[phase]["model"])
        optimizer.load_state_dict(state[phase]["optimizer"])
    # of an epoch, as data.batches counts them
    steps = math.ceil((len(split.labels) // world_size) / (args.batch_size // world_size))
    for epoch in range(len(log), epochs):
        began, name = time.time(), f"{phase} {epoch + 1}/{epochs}"
        seed = args.seed + 1_000_000 * (epoch + 1)  # no epoch's draws depend on earlier epochs
        order = torch.Generator().manual_seed(seed)  # the same in all processes
        torch.manual_seed(seed + 1000 * rank)  # of the views, different in each process
        batches = data.batches(split, args.batch_size, args.device, True, order, rank, world_size)
        lrs = [lr * warmup_cosine(epoch * steps + i, epochs * steps) for i in range(steps)]

        # one epoch, with a progress bar in the terminal (None: no bar elsewhere) of process 0
        bar = tqdm(batches, name, steps, leave=False, disable=True if rank else None)
        model.train()
        loss, accuracy = train_one_epoch(compute_loss, bar, optimizer, lrs)
        if not math.isfinite(loss):
            raise UserError(f"{name}: the loss is {loss}: begin anew at a lower learning rate")

        _, stats, _ = spike_stats(encoder, [next(mixed_batches(split, args))])
        due = monitor and (epoch + 1) % max(1, epochs // 10) == 0
        row = dict(loss=f"{loss:.4f}", accuracy=f"{accuracy:.4f}",
                   rate=f"{stats.get('rate', 0) / 100:.4f}", lr=f"{lrs[0]:.2e}",
                   knn=f"{monitor():.4f}" if due else "", seconds=f"{time.time() - began:.1f}")
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if v), flush=True)
        log.append(dict(phase=phase, epoch=epoch + 1) | row)
        state[phase] = dict(log=log, model=model.state_dict(), optimizer=optimizer.state_dict())
        save("state.pt", args, state)
        write_log(args, state)


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
    order = torch.Generator().manual_seed(args.seed)
    return data.batches(split, args.batch_size, args.device, shuffle=True, generator=order)


def build_optimizer(model, weight_decay):
    """Make AdamW; its first group, matrices and kernels, has weight decay, the second has none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}])


def warmup_cosine(step, steps):
    """Compute a step's share of the peak rate: the lower of a linear warm-up and a cosine."""
    warmup = max(5, steps // 20)  # AdamW's first step would be far too large for fitted heads
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def wrap_model(model, args):
    """Wrap the model for training: compiled on one GPU, distributed under torchrun, or neither."""
    on_gpu = torch.device(args.device).type == "cuda"
    if dist.is_initialized():
        if on_gpu:  # on CPUs, batch norm sees a process's own share: there is no SyncBatchNorm
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces its layers in place
        model = torch.nn.parallel.DistributedDataParallel(model)  # sends weights and queue to all
        model.broadcast_buffers = False  # not again at every step: the queues stay equal
    elif on_gpu and not args.no_compile and args.n_frames <= neuron.MAX_COMPILED_STEPS:
        print("the first steps compile the network: minutes; if that fails, pass --no-compile")
        model = torch.compile(model, dynamic=False)  # batches have two sizes at most
    return model


# ------------------------------------------------------------------------------------------- data

def load_data(args):
    """Load train, test and the recordings to pre-train on; set the sizes of sensor and image."""
    # The first process of a machine makes the frames; the others wait here, and then find them.
    if waits := dist.is_initialized() and os.environ["LOCAL_RANK"] != "0":
        dist.barrier()

    def load(name, only=None):
        return data.load(name, args.root, args.n_frames, args.image_size, args.skip_broken,
                         args.sensor, args.frames_by, args.columns, only)

    train, test = load(args.dataset)
    if args.sensor not in (None, train.sensor):
        raise UserError(f"--sensor {args.sensor}: the recordings' is {train.sensor}")
    args.image_size, args.sensor = train.frames.shape[-1], train.sensor
    unlabelled = train
    if args.pretrain_on:
        unlabelled, _ = load(args.pretrain_on, only="train")
        data.warn_of_other_frames("--pretrain-on", dict(sensor=unlabelled.sensor), vars(args))
        unlabelled = data.leave_out(unlabelled, test.ids, "to pre-train on are tested: left out")
    if dist.is_initialized() and not waits:
        dist.barrier()
    if len(unlabelled.labels) == 0:
        raise UserError(f"--pretrain-on {args.pretrain_on}: nothing is left")
    if len(train.classes) < 2 and args.epochs:
        raise UserError(f"{args.dataset}: a single class; --epochs 0 pre-trains only")
    return train, test, unlabelled


def few_shot_subset(train, labels_per_class, seed):
    """Keep labels_per_class recordings of each class, drawn by seed, or all if that is 0."""
    if not labels_per_class:
        return train
    generator, chosen = torch.Generator().manual_seed(seed), []
    order = torch.randperm(len(train.labels), generator=generator).numpy()
    for c, name in enumerate(train.classes):
        drawn = order[train.labels[order] == c][:labels_per_class]
        chosen += list(drawn)
        if len(drawn) < labels_per_class:
            print(f"warning: fewer than {labels_per_class} recordings in class {name}")
    return data.select(train, chosen)


def load_pretrained_encoder(encoder, args):
    """Copy the encoder of --init, of either kind -> ids it has seen; set args.pretrained."""
    source, checkpoint = models.load_model(args.init)
    was = args.pretrained = checkpoint["args"] | dict(kind=checkpoint["kind"])
    if was["kind"] == "finetuned":
        source = source.encoder
        print("warning: the encoder of --init has seen labels")
    try:
        encoder.load_state_dict(source.state_dict())
    except RuntimeError:  # other names or shapes of weights; the stem depends on the image size
        raise UserError(f"--init {args.init}: holds {was['arch']} for {was['image_size']} pixels, "
                        f"this run builds {args.arch} for {args.image_size}")
    data.warn_of_other_frames("--init", was, vars(args))
    return checkpoint["trained_on"]


# ------------------------------------------------------------------------------ the run's folder

def open_run(args, state, **ids):
    """Check that the recordings are the run's, wherever they lie, claim its folder, save state."""
    for split in state.get("ids", []):
        if not torch.equal(state["ids"][split], torch.tensor(ids[split])):
            raise UserError(f"--resume {args.resume}: began with other recordings in {split}")
    state["ids"] = {split: torch.tensor(ids[split]) for split in ids}
    named = args.resume or args.out
    first = args.out = Path(named or f"runs/{Path(args.dataset).name}").expanduser().as_posix()
    if rank_and_world_size()[0] == 0:
        for i in itertools.count(2):
            try:
                Path(args.out).mkdir(parents=True, exist_ok=bool(args.resume))
                break
            except FileExistsError:
                if named:
                    raise UserError(f"{first} exists; --resume {first} continues the run there")
                args.out = f"{first}-{i}"
    save("state.pt", args, state)


def read_state(folder):
    """Read the state.pt of a run, {} if there is none yet. Raises UserError.

    args: its flags; ids: see open_run; seen: ids of the recordings that its encoder was shown
    before fine-tuning; pretrain, finetune: log, model and optimizer after the last epoch.
    """
    path = Path(folder, "state.pt").expanduser()
    if not path.parent.is_file() and not list(path.parent.glob("*.pt")):
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["args"], state["ids"], state["seen"]  # or it is another file
        return state
    except Exception as e:  # there is no list of all that a foreign file may raise
        raise UserError(f"--resume {folder}: no state.pt of this train.py ({data.format_error(e)})")


def save(name, args, content):
    """Write a checkpoint into the run's folder, all of it or nothing. Raises UserError."""
    if rank_and_world_size()[0] == 0:
        try:
            with data.new_file(os.path.join(args.out, name)) as f:
                torch.save(content | dict(args=vars(args)), f)
        except (RuntimeError, OSError) as e:  # a full disk
            raise UserError(f"{args.out}/{name} cannot be written ({data.format_error(e)})")


def write_log(args, state, test=()):
    """Write log.csv: the rows of all epochs, then that of the test, which has few columns."""
    logs = [state[phase]["log"] for phase in ("pretrain", "finetune") if phase in state]
    try:
        if rank_and_world_size()[0] == 0:
            with open(os.path.join(args.out, "log.csv"), "w", newline="") as f:
                writer = csv.DictWriter(f, logs[0][0])
                writer.writeheader()
                writer.writerows(itertools.chain(*logs, test))
    except OSError as e:  # open in a spreadsheet? state.pt has the rows, and the next epoch comes
        print(f"warning: log.csv cannot be written now ({e})")


# --------------------------------------------------------------------------- processes and flags

def init_distributed(args, state):
    """Join the others under torchrun, NCCL on GPUs, gloo on CPUs -> args, state of process 0."""
    if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return args, state
    backend = "gloo"
    if torch.device(args.device).type == "cuda":
        backend, args.device = "cpu:gloo,cuda:nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group(backend, timeout=timedelta(hours=12))  # the others wait for a download
    if args.batch_size < 3 * dist.get_world_size():
        raise UserError(f"--batch-size {args.batch_size}: fewer than 3 for each process")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")
    found = [args, state]
    dist.broadcast_object_list(found)  # the others may see another disk
    found[0].device = args.device
    return found


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
    """Parse the flags, by default those of the run to resume or data set -> args, state or {}."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dataset", type=data.resolve,
                        help=f"{', '.join(data.DATASETS)}, or a folder of recordings")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", metavar="FOLDER", help="continue the run there, or begin one")
    folder.add_argument("--out", metavar="FOLDER", help="of a new run; None: runs/<dataset>[-<i>]")
    first = parser.parse_known_args(argv)[0]  # these decide the defaults of the others
    state = read_state(first.resume) if first.resume else {}
    if first.resume and not state and first.dataset is None:
        parser.error(f"--resume {first.resume}: no run there; to begin one, pass --dataset")
    own = dict(dataset="toy", pretrained=None) | state.get("args", {}) | dict(out=None, resume=None)
    if "LOCAL_RANK" in os.environ:  # of torchrun; the saved device is that of process 0
        own.pop("device", None)
    add_flags(parser)
    parser.set_defaults(**data.default_config(first.dataset or own["dataset"]) | own)
    args = parser.parse_args(argv)
    check_args(args, parser, state)
    return args, state


def add_flags(parser):
    """Add the flags that have defaults in the row of a data set, and others."""
    parser.add_argument("-h", "--help", action="help", help="show this text and stop")
    positive, learning_rate = in_range(int, 1), in_range(float, 1e-9)
    add = parser.add_argument_group("data").add_argument
    add("--root", default="data", help="folder of downloads and cached frames")
    add("--n-frames", type=positive, help="time steps T that a recording is cut into")
    add("--frames-by", choices=("count", "time"), help="frames equal in events or duration")
    add("--image-size", type=in_range(int, 8), help="side of a frame; None: the sensor's, <= 128")
    add("--sensor", type=positive, nargs=2, metavar=("W", "H"),
        help="size in pixels of a folder's sensor, unless .aedat4 files name it")
    add("--labels-per-class", type=in_range(int, 0), help="0: all; 1-4 freeze pre-trained encoders")
    add("--columns", choices=data.COLUMNS, metavar="XYTP", help="order in plain [N, 4] arrays")
    add("--skip-broken", action="store_true", help="leave out recordings that cannot be read")
    add = parser.add_argument_group("model and its pre-training, without labels").add_argument
    add("--arch", help="sew-resnet-18[-<width>] or spikformer-<depth>-<dim>")
    add("--pretrain-epochs", type=in_range(int, 0), help="0: fine-tune from scratch")
    add("--pretrain-lr", type=learning_rate, help="peak learning rate")
    add("--split-events", action=argparse.BooleanOptionalAction, help="views that share no event")
    add("--crop-time", type=in_range(float, 0.01, 1), help="least share of a recording in a view")
    add("--queue-size", type=positive, help="negatives K, well below the number of recordings")
    add("--momentum", type=in_range(float, 0, 1), help="of the key encoder; 0: a copy, 1: frozen")
    add("--temperature", type=in_range(float, 1e-3), help="of InfoNCE")
    add("--alpha", type=in_range(float, 0), help="weight of MBC, InfoNCE of the average over time")
    add("--beta", type=in_range(float, 0), help="weight of MAC, average over time of InfoNCE")
    add("--pretrain-on", type=data.resolve, help="pre-train on this folder or data set instead")
    add("--init", type=os.path.abspath, help="fine-tune this checkpoint's encoder instead")
    add = parser.add_argument_group("fine-tuning, with labels").add_argument
    add("--epochs", type=in_range(int, 0), help="0: pre-train only")
    add("--lr", type=learning_rate, help="peak learning rate")
    add = parser.add_argument_group("AdamW, in both").add_argument
    add("--weight-decay", type=in_range(float, 0), help="of matrices and kernels only")
    # at least 3, because 2 may leave a batch of one recording, too few for batch norm
    add("--batch-size", type=in_range(int, 3), help="recordings per step, over all processes")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=in_range(int, 0, 10**9), default=0, help="of weights, order, views, labels")
    add("--device", type=models.device, help="cpu; untested: cuda[:N], mps",
        default=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="never call a compiler: slower")


def check_args(args, parser, state):
    """Refuse flags that cannot work; drop the fine-tuning that more pre-training makes void."""
    may_change = ("out", "resume", "epochs", "pretrain_epochs", "device", "root", "no_compile",
                  "dataset", "pretrain_on")  # data may have moved: open_run compares recordings
    was = state.get("args", vars(args))  # a new run agrees with itself
    for name, value in vars(args).items():
        if name not in may_change and (old := was.get(name)) != value:  # None: of an older version
            parser.error(f"--{name.replace('_', '-')}: the run in {args.resume} has {old}")
    if not args.init and args.pretrain_epochs > len(state.get("pretrain", {"log": []})["log"]):
        state.pop("finetune", None)  # begins anew
    for phase, epochs in ("pretrain", args.pretrain_epochs), ("finetune", args.epochs):
        if phase in state and len(state[phase]["log"]) > epochs:
            parser.error(f"--resume {args.resume}: more than {epochs} epochs of {phase} are done")
    if (args.pretrain_on or args.epochs == 0) and (args.init or args.pretrain_epochs == 0):
        parser.error("--pretrain-on and --epochs 0 need pre-training, and no --init")
    try:
        models.build(args.arch, 128)  # any image size tells whether the name is right
    except ValueError as e:
        parser.error(f"--arch: {e}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a name
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt as e:
        sys.exit(f"\nstopped{e}")
