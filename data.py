"""Recordings of an event camera -> frames in one memory-mapped array -> augmented batches on the device.

    events (x, y, t, polarity)  --to_frames-->  uint8 [T, 2, size, size]  --load-->  .frames uint8 [N, T, 2, size, size]
    --batches-->  x float [T, B, 2, size, size], y int64 [B]  --augment-->  a random view of every recording

Data sets: `toy` (simulated here, no download), the public ones that tonic reads, any folder of recordings; see `load`.
Tested by `python -m pytest test_all.py -k data`.
"""
import contextlib
import ctypes
import difflib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# The one dial: --dataset picks a row, any flag overrides a value of it. Sources: [S] Spikformer's published schedule
# for CIFAR10-DVS, [N] NDA (Li et al. 2022), [E] EventRPG issue 1, [A] amazing-cls; all others chosen here. Queues stay
# well below the number of training recordings, or positives return as negatives. views, finetune: flags of augment().
STRONG, MILD = dict(operations=3, strength=2), dict(operations=1, strength=2)  # [N], best for contrast and for labels
COMMON = dict(
    n_frames=16, image_size=128, arch="spikformer-2-256",  # [S]
    pretrain_epochs=200,  # [A]
    queue_size=4096, momentum=0.999, temperature=0.1, alpha=0.5, beta=0.5, pretrain_lr=1e-3,
    epochs=106, lr=1e-3, weight_decay=0.06, batch_size=16,  # [S]
    labels_per_class=0, views=dict(STRONG, flip=True, min_scale=0.5), finetune=dict(MILD, flip=True, min_scale=1.0),
)
STILL = dict(views=dict(MILD, flip=False, min_scale=1.0), finetune=dict(MILD, flip=False, min_scale=1.0))
DATASETS = {
    "toy": COMMON | dict(
        n_frames=4, image_size=16, arch="spikformer-1-64", pretrain_epochs=40, queue_size=128, momentum=0.99,
        temperature=0.4, epochs=100, batch_size=32, labels_per_class=2),
    "cifar10dvs": COMMON,
    "dvsgesture": COMMON | STILL | dict(queue_size=512),  # mild throughout [E]; left and right are classes: no flip
    "ncaltech101": COMMON | dict(arch="sew-resnet-18"),  # the paper's best backbone there
    "nmnist": COMMON | STILL | dict(n_frames=10, image_size=34, pretrain_epochs=20, epochs=20, batch_size=128),
}
FOLDER = COMMON | STILL | dict(  # small enough for a laptop
    n_frames=4, image_size=None, arch="spikformer-1-64", pretrain_epochs=60, queue_size=512, epochs=100, lr=4e-3,
    batch_size=32)
# Chosen on N-MNIST's training recordings, a quarter held back: with crops, two operations a view, elastic warps, a
# temperature of 0.2 or 0.4, a queue of 128 with momentum 0.99, 250 epochs, or a pretrain_lr of 4e-3, it ended lower.

# uint8 [N, T, 2, size, size], int64 [N], list of names, (width, height) in pixels
Split = namedtuple("Split", "frames labels classes sensor", defaults=[None])


# -------------------------------------------------------------------------------------------------------- the main path

def to_frames(events, n_frames, sensor_size, size):
    """Count the events of a recording into frames: uint8 [n_frames, 2, size, size], polarity 0 = off, 1 = on.

    events: structured array with fields x, y (pixels), t (any unit), p (> 0 is on); sensor_size: (W, H) pixels.
    Every frame takes len(events) // n_frames events in order of time, the last one the remainder too: none is lost. A
    pixel of the frame sums the sensor's pixels that fall into it; counts clip at 255. ValueError outside the sensor.
    """
    (width, height), n = sensor_size, len(events)
    t = np.ascontiguousarray(events["t"])  # fields lie apart: a copy of each makes the rest fast
    if (t[1:] < t[:-1]).any():
        events = events[np.argsort(t, kind="stable")]
    x, y = events["x"].astype(np.int32), events["y"].astype(np.int32)
    if n and not (0 <= x.min() and x.max() < width and 0 <= y.min() and y.max() < height):
        raise ValueError(f"outside the sensor of {width} x {height}: x {x.min()}-{x.max()}, y {y.min()}-{y.max()}")
    if (width, height) != (size, size):
        x, y = x * size // width, y * size // height
    pixel = y * size + x + (np.ascontiguousarray(events["p"]) > 0) * np.int32(size * size)
    frames = np.empty((n_frames, 2 * size * size), np.uint8)
    bounds = [i * (n // n_frames) for i in range(n_frames)] + [n]
    for i in range(n_frames):
        counts = np.bincount(pixel[bounds[i] : bounds[i + 1]], minlength=2 * size * size)
        frames[i] = counts if counts.max() < 256 else counts.clip(max=255)  # a fifth faster than to clip all
    return frames.reshape(n_frames, 2, size, size)


def load(name, root="data", n_frames=None, size=None, skip_broken=False, sensor=None):
    """The data set called `name`, or the folder of recordings at that path -> (train, test), each a Split.

    name: a row of DATASETS, downloaded by tonic into `root` if missing, or a folder of .bin, .aedat4, .npy recordings,
    FOLDER/<class>/<recording> or FOLDER/Train|Test/<class>/<recording>. Without an official split, the last tenth of
    every class, in numerical order of names, is for the test: the rule of SpikingJelly's split_to_train_test_set.
    n_frames T and size in pixels default to the data set's row, a folder's size to its sensor's (128 at most), its
    sensor (W, H) to as far as its events reach. skip_broken leaves out what its reader or check_events refuses; the
    others stay in the split they are in. Frames are made once, by all cores, and kept under root/frames; they are made
    anew when a recording is added, removed or changed, or a reader or to_frames here. Raises UserError. A script that
    calls this, other than train.py and eval.py, needs `if __name__ == "__main__":`, for workers may import it.
    """
    row, root = recipe(name), Path(root).expanduser()
    n_frames, size = n_frames or row["n_frames"], size or row["image_size"]
    # recordings: [("train" | "test", class, key)]; classes: their names; read(key) -> events; known: the sensor (W, H)
    if name == "toy":
        recordings, classes, read, known = toy_recordings()
    elif name in TONIC:
        recordings, classes, read, known = tonic_recordings(name, root)
    else:
        recordings, classes, read, known = folder_recordings(Path(name).expanduser())
    recordings.sort(key=lambda r: (r[0] == "test", classes.index(r[1]), natural(r[2])))
    files = [os.stat(key) for _, _, key in recordings if os.path.exists(key)]
    stamps = [(file.st_size, file.st_mtime_ns) for file in files]

    sources = [source(f) for f in (to_frames, toy_shapes, toy_events, read, *READERS.values())]

    def path_of(suffix, *settings):
        """Where what these recordings and readers give at these settings is kept."""
        made_from = repr((sources, recordings, stamps, skip_broken, settings))
        mark = hashlib.sha256(made_from.encode(errors="surrogateescape")).hexdigest()[:12]  # names may be no UTF-8
        return root / "frames" / f"{Path(name).name}-{mark}{suffix}"

    sensor = list(known or sensor or guess_sensor(path_of(".sensor"), recordings, read, skip_broken))
    size = size or min(128, max(8, *sensor))
    path = path_of(".frames", n_frames, sensor, size)
    good, frames = frames_of(path, recordings, read, n_frames, sensor, size, skip_broken)
    labels = np.array([classes.index(cls) for _, cls, _ in good])
    n = sum(split == "train" for split, _, _ in good)
    return Split(frames[:n], labels[:n], classes, sensor), Split(frames[n:], labels[n:], classes, sensor)


def cut(order, batch_size):
    """`order` in batches as equal as can be, batch_size at most, so that no tiny last one upsets batch norm."""
    return order.tensor_split(math.ceil(len(order) / batch_size))


def batches(split, batch_size, device="cpu", shuffle=False, generator=None, share=(0, 1)):
    """Every recording once: yields (x float [T, B, 2, H, W], y int64 [B]) on `device`, shuffled by `generator` or not.

    share = (rank, world): every world-th recording of each batch, for several processes whose generators are equal.
    """
    n, (rank, world) = len(split.labels), share
    frames = torch.as_tensor(split.frames)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    order = order.to(frames.device)  # once, as the labels: a copy a batch would wait for the GPU
    labels = torch.as_tensor(split.labels).to(frames.device)
    for batch in cut(order, batch_size):
        index = batch[rank::world]
        x, y = frames.index_select(0, index), labels[index]  # [B, T, 2, H, W] uint8: bytes travel, floats do not
        if torch.device(device).type == "cuda" and not x.is_cuda:  # the copy runs during the batch before
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        yield x.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format), y  # [T, B, 2, H, W]


def on_device(split, device):
    """The split with its frames on the GPU, if they take less than half of the memory free there; else as it is."""
    if torch.device(device).type != "cuda" or split.frames.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    return split._replace(frames=torch.as_tensor(split.frames).to(device))


def augment(x, operations=3, strength=2, flip=True, min_scale=0.5):
    """A random view of every recording in the batch, on x's device: NDA (Li et al. 2022), which the paper builds on.

    x: [T, B, 2, H, W] -> the same shape. Each recording has one draw for all its time steps and both polarities: a
    horizontal flip (p 0.5, if flip), a crop of min_scale to 1 of the area, enlarged again (1: none), then `operations`
    of roll by up to 1 + 2N pixels, rotation up to 15N degrees, a hole of 8N pixels, shear up to 0.15N, N = strength,
    pixels as of a width of 128. An image meets flip, shear, rotation with crop, hole and roll, in this order. All are
    one look-up, so they stand below inverted and last first: output pixel (u, v) shows the input pixel nearest to where
    the inverse maps take it, or 0 outside.
    """
    T, B, C, H, W = x.shape
    unit = W / 128

    def draw(*size):  # uniform in [-1, 1)
        return torch.rand(*size, device=x.device) * 2 - 1

    chosen = torch.rand(B, 4, device=x.device).argsort(1) < operations  # [B, 4], `operations` of them true
    roll, rotate, cutout, shear = chosen.float().T[..., None, None]  # 4 times [B, 1, 1], 0 or 1
    v, u = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)  # row and column of a pixel
    shift = (draw(2, B, 1, 1) * roll * (1 + 2 * strength) * unit).round()
    u, v = (u - shift[0]) % W - (W - 1) / 2, (v - shift[1]) % H - (H - 1) / 2  # [B, H, W], from the centre
    hole, reach = draw(2, B, 1, 1), cutout * 4 * strength * unit  # its middle, half its side
    seen = torch.maximum((u - hole[0] * W / 2).abs(), (v - hole[1] * H / 2).abs()) >= reach  # [B, H, W], not the hole

    side = (1 - torch.rand(B, 1, 1, device=x.device) * (1 - min_scale)).sqrt()
    angle, slant = draw(B, 1, 1) * rotate * math.radians(15 * strength), draw(B, 1, 1) * shear * 0.15 * strength
    mirror = torch.where(torch.rand(B, 1, 1, device=x.device) < 0.5 * flip, -1.0, 1.0)
    cos, sin, away = angle.cos() * side, angle.sin() * side, draw(2, B, 1, 1) * (1 - side)
    u, v = cos * u - sin * v + away[0] * W / 2, sin * u + cos * v + away[1] * H / 2
    u = mirror * (u + slant * v)
    u, v = (u + (W - 1) / 2).round().long(), (v + (H - 1) / 2).round().long()  # from the corner again: the input pixel
    seen &= (u >= 0) & (u < W) & (v >= 0) & (v < H)
    index = (v.clamp(0, H - 1) * W + u.clamp(0, W - 1)).flatten(1)  # [B, H*W]
    view = x.flatten(3).gather(3, index[None, :, None].expand(T, B, C, -1)).view(x.shape)  # [T, B, 2, H, W]
    return view * seen[None, :, None]


# --------------------------------------------------------------------------------------------- recordings: the toy data

# A shape, one of 10, turns and circles before an event camera, as in the saccades by which N-MNIST was recorded.
# Many unlabelled recordings in random poses and few labels are the setting in which pre-training earns its keep.
TOY_SEED, TOY_SENSOR, TOY_TRAIN, TOY_TEST = 0, 32, 2000, 500


def toy_shapes():
    """{class: its outline as radius at angle [0, 2 pi)}; the largest radius is about 1."""
    a = np.arange(720) * np.pi / 360

    def polygon(n):
        return math.cos(math.pi / n) / np.cos(a % (2 * np.pi / n) - np.pi / n)

    def box(w, h):
        return np.minimum(w / np.maximum(abs(np.cos(a)), 1e-9), h / np.maximum(abs(np.sin(a)), 1e-9))

    return {
        "disc": 0.8 + 0 * a, "triangle": polygon(3), "square": polygon(4), "bar": box(1, 0.3),
        "cross": np.maximum(box(1, 0.25), box(0.25, 1)),
        "trefoil": 0.6 + 0.4 * np.cos(3 * a), "star": 0.65 + 0.35 * np.cos(5 * a),
        "half disc": np.where(a < np.pi, 1, 0.05), "wedge": np.where(a < 1.5 * np.pi, 0.9, 0.1),
        "drop": 0.35 + 0.65 * np.cos(a / 2) ** 14,
    }


def toy_recordings():
    classes = list(toy_shapes())
    recordings = [("train" if i < TOY_TRAIN else "test", classes[i % 10], f"toy:{TOY_SEED}:{i}")
                  for i in range(TOY_TRAIN + TOY_TEST)]
    return recordings, classes, toy_events, (TOY_SENSOR, TOY_SENSOR)


def toy_events(key, steps=32, threshold=0.25):
    """One simulated recording: an event wherever the logarithm of brightness has changed by `threshold` since the last.

    Size, position, pose and turning are drawn anew for each recording, of any class alike: what the views of
    pre-training vary too. (If they differed in brightness too, which no view varies, that would tell recordings apart,
    and pre-training would learn it.)
    key: "toy:<seed>:<number>", the class is number % 10; steps: of 1 ms each; threshold: in units of the logarithm.
    Returns a structured array (x, y in pixels, t in us, p).
    """
    _, seed, i = key.split(":")
    rng = np.random.default_rng([int(seed), int(i)])
    outline = list(toy_shapes().values())[int(i) % 10]
    time = np.linspace(-0.5, 0.5, steps + 1)[:, None, None]
    pose = rng.uniform(-0.7, 0.7) + rng.uniform(-0.2, 0.2) * time  # radians
    radius, middle = rng.uniform(9, 12.5), (TOY_SENSOR - 1) / 2 + rng.uniform(-3, 3, 2)  # pixels
    y, x = np.mgrid[:TOY_SENSOR, :TOY_SENSOR]
    dx, dy = x - middle[0] - 2 * np.cos(2 * np.pi * time), y - middle[1] - 2 * np.sin(2 * np.pi * time)
    half_degrees = ((np.arctan2(dy, dx) - pose) * 360 / np.pi).astype(int) % 720
    edge = radius * outline[half_degrees] - np.hypot(dx, dy)  # pixels inside the outline
    log_brightness = 1 / (1 + np.exp(-1.5 * edge))  # [steps + 1, H, W]
    level, events = log_brightness[0].copy(), []  # level: that of each pixel's last event
    for step in range(steps):
        count = np.trunc((log_brightness[step + 1] - level) / threshold).astype(int)  # [H, W], below 0: off
        level += count * threshold
        count += rng.choice([-1, 0, 1], count.shape, p=[0.0005, 0.999, 0.0005])  # noise of the sensor
        ys, xs = np.repeat(np.nonzero(count), abs(count[count != 0]), axis=1)
        t, p = (step + rng.random(len(xs))) * 1000, count[ys, xs] > 0
        events.append(np.rec.fromarrays([xs, ys, t, p], names="x,y,t,p"))
    events = np.concatenate(events)
    return events[np.argsort(events["t"], kind="stable")]


# ------------------------------------------------------------------------------------------------- recordings: a folder

def folder_recordings(folder):
    """FOLDER/<class>/<recording> or FOLDER/Train|Test/<class>/<recording>; files of other kinds are passed over."""
    others = Counter()

    def inside(path):
        files = list(path.glob("*/*"))
        others.update(f.suffix or f.name for f in files if f.suffix not in READERS)
        return [(f.parent.name, str(f)) for f in files if f.suffix in READERS]

    parts = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    if {"train", "test"} <= set(parts):
        recordings = [(split, *r) for split in ("train", "test") for r in inside(parts[split])]
    else:
        recordings = split_by_class(inside(folder))
    passed = ", ".join(f"{n} {kind}" for kind, n in others.items())
    trained, tested = ({cls for split, cls, _ in recordings if split == which} for which in ("train", "test"))
    if not (trained and tested):
        raise UserError(f"{folder}: no recordings to {'test' if trained else 'train'} on: expected <class>/<recording> "
                        f"or Train|Test/<class>/<recording>, each {' or '.join(READERS)}, and at least two in a class; "
                        f"of other kinds: {passed or 'none'}")
    if others:
        print(f"{folder}: passed over {passed}")
    if odd := sorted(trained ^ tested, key=natural):
        print(f"warning: {folder}: not both to train and to test on: class {', '.join(odd)}")
    return recordings, sorted(trained | tested, key=natural), read_file, None


def natural(name):
    """A sort key that counts: r2 before r10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def split_by_class(recordings):
    """[(class, key)] -> [(split, class, key)]: of n recordings of a class, in natural order, the last n // 10 (at least
    1 of 2) are for the test. Depends on nothing but the names."""
    total, seen, split = Counter(cls for cls, _ in recordings), Counter(), []
    for cls, key in sorted(recordings, key=lambda r: natural(r[1])):
        n = total[cls]
        split.append(("train" if seen[cls] < n - max(n // 10, n > 1) else "test", cls, key))
        seen[cls] += 1
    return split


def read_file(path):
    return READERS[os.path.splitext(path)[1]](path)


def read_bin(path):
    """ATIS format of N-MNIST and N-Caltech101, 5 bytes an event: x, y, 1 bit polarity, 23 bits time in us."""
    raw = np.fromfile(path, np.uint8)
    if raw.size % 5:
        raise ValueError(f"truncated: {raw.size} bytes are not a multiple of 5")
    x, y, high, middle, low = raw.reshape(-1, 5).astype(int).T  # each [events]
    wrapped = y == 240  # no event: the clock has gone round, by 2^13 us (tonic.io.read_mnist_file)
    t = ((high & 127) << 16 | middle << 8 | low) + 2**13 * np.cumsum(wrapped)
    return np.rec.fromarrays([x, y, t, high >> 7], names="x,y,t,p")[~wrapped]


def read_aedat4(path):
    """The file's first stream of events, as tonic.io.read_aedat4 reads it; ValueError if it is truncated or damaged.

    The decoder cannot be trusted with that: it takes a lost packet for the end of the file, and allocates any size that
    a packet claims. So first the packets' sizes are followed: they must end where the table behind them begins, or the
    file ends. Layout: 14 bytes of version; at 14 the size of the header, which starts at 18; then packets, each 4 bytes
    of stream, 4 of size.
    """
    import aedat
    raw = Path(path).read_bytes()

    def number(at, size=4):
        return int.from_bytes(raw[at : at + size], "little", signed=True)

    head = 18 + number(18)  # a FlatBuffer's table, whose second field is where the packets end, -1 or absent if unknown
    fields = head - number(head)
    where = number(fields + 6, 2) if number(fields, 2) > 6 else 0
    at, end = 18 + number(14), number(head + where, 8) if where else -1
    end = end if end >= 0 else len(raw)
    while 0 <= at < min(end, len(raw)):
        at += 8 + max(number(at + 4), 0)
    if not at == end <= len(raw):
        raise ValueError(f"truncated or damaged: its packets do not end where they should, at byte {end}")
    decoder = aedat.Decoder(path)
    streams = {i: stream for i, stream in decoder.id_to_stream().items() if stream["type"] == "events"}
    packets = [packet["events"] for packet in decoder if packet["stream_id"] == min(streams)]
    events = np.concatenate(packets) if packets else np.empty(0, "u8, u2, u2, ?")
    events.dtype.names = "t", "x", "y", "p"
    width, height = (streams[min(streams)][side] for side in ("width", "height"))
    if len(events) and not (events["x"].max() < width and events["y"].max() < height):
        raise ValueError(f"an event lies outside the sensor of {width} x {height} pixels that the file names")
    return events


def read_npy(path):
    return np.load(path)  # refuses pickled objects


READERS = {".bin": read_bin, ".aedat4": read_aedat4, ".npy": read_npy}  # a function for each ending


# ----------------------------------------------------------------------------------------- recordings: public data sets

def read_caltech(path):
    """A recording of N-Caltech101, moved to the corner, as tonic does: each has a size of its own."""
    events = read_bin(path)
    for side in "xy":
        events[side] -= events[side].min()
    return events


def read_gesture(path):
    """A recording of DVS128 Gesture as tonic keeps it: integers [events, 4], which are x, y, polarity and ms."""
    return np.rec.fromarrays(np.load(path).T, names="x,y,p,t")


# tonic's class, its sensor, how many recordings there are, their reader, addresses to mend. Those of figshare in tonic
# 1.7.0 answer 202 with nothing in it (tonic issues 329, 330); the same files through figshare's API do not.
FIGSHARE = "https://api.figshare.com/v2/file/download/"
TONIC = {
    "cifar10dvs": ("CIFAR10DVS", (128, 128), 10_000, read_aedat4, dict(url=FIGSHARE + "38023437")),
    "dvsgesture": ("DVSGesture", (128, 128), 1_341, read_gesture,
                   dict(train_url=FIGSHARE + "38022171", test_url=FIGSHARE + "38020584")),
    "ncaltech101": ("NCALTECH101", (240, 180), 8_709, read_caltech, {}),  # the largest; SpikingJelly's size too
    "nmnist": ("NMNIST", (34, 34), 70_000, read_bin, {}),
}


def tonic_recordings(name, root):
    """A public data set through tonic's own class, which downloads what is missing, checks its md5 and extracts it."""
    import tonic
    class_name, sensor, total, read, addresses = TONIC[name]
    tonic_class = getattr(tonic.datasets, class_name)
    for attribute, address in addresses.items():
        setattr(tonic_class, attribute, address)
    tonic.download_utils._ARCHIVE_EXTRACTORS |= {".zip": extract, ".tar": extract}
    official = "train" in inspect.signature(tonic_class).parameters
    parts = dict(train=dict(train=True), test=dict(train=False)) if official else {"": {}}
    recordings = []
    for split, options in parts.items():
        dataset = tonic_class.__new__(tonic_class)  # apart from __init__, to know what it was after when that fails
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                dataset.__init__(str(root), **options)
                inner = list(Path(dataset.location_on_system).rglob("Caltech101.zip"))
                if inner and not dataset.data:  # N-Caltech101's archive holds another, which tonic leaves as it is
                    tonic.download_utils.extract_archive(str(inner[0]), dataset.location_on_system)
                    dataset.__init__(str(root), **options)
            if not dataset.data:
                raise ValueError(f"no recordings in {dataset.location_on_system}, which is to be removed")
        except Exception as e:
            raise UserError(f"{name} cannot be downloaded ({reason(e)}): fetch {dataset.url} (md5 {dataset.file_md5}), "
                            f"put it at {dataset.location_on_system}/{dataset.filename}, run again")
        classes = list(getattr(dataset, "classes", sorted(set(dataset.targets))))
        recordings += [(split, target if isinstance(target, str) else classes[target], path)
                       for target, path in zip(dataset.targets, dataset.data)]
    if len(recordings) < total:
        print(f"warning: {len(recordings):,} of the {total:,} recordings of {name} are there; to extract all of them "
              f"again, remove the folders (not the archives) in {dataset.location_on_system}")
    if not official:
        recordings = split_by_class([(cls, path) for _, cls, path in recordings])
    return recordings, classes, read, sensor


def extract(path, folder, _):
    """In place of tonic's two, which let entries and links leave the folder; Python 3.11.2 has no filter to ask for."""
    if str(path).endswith(".zip"):
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
    else:
        archive = tarfile.open(path)
        names = [name for member in archive for name in (member.name, member.linkname)]
    with archive:
        for name in names:
            if name.startswith("/") or ".." in Path(name).parts:
                raise ValueError(f"its entry {name} points outside the folder")
        archive.extractall(folder)


# ------------------------------------------------------------------------------------------- frames, made once and kept

def source(f):
    """The text of a function, or its name if it has none, as one typed into a prompt."""
    try:
        return inspect.getsource(f)
    except (OSError, TypeError):
        return getattr(f, "__qualname__", "")


def kept(path, make, read):
    """What read() finds in `path`, made by make() if it is not there: in one process, for which the others wait."""
    if not path.exists():
        with lock(path.parent, wait=True):
            if not path.exists():  # another process may have made it
                make()
    try:
        return read()
    except (OSError, ValueError):
        raise UserError(f"{path}: is damaged: remove it, so that it is made anew")


def frames_of(path, recordings, read, n_frames, sensor, size, skip_broken):
    """The recordings that are not broken, and their frames, kept in `path`: the bytes of uint8 [N, T, 2, size, size].

    A .tsv beside it lists which recording is in which split, or broken, and why. Frames are appended one by one to a
    file that gets its name when it is complete: nothing that stops it leaves zeros to train on.
    """
    tsv = path.with_suffix(".tsv")

    def make():
        need = len(recordings) * n_frames * 2 * size * size
        if need > shutil.disk_usage(path.parent).free:
            raise UserError(f"{path.parent}: frames need {need / 1e9:.3g} GB, more than is free: choose another --root")
        frames_from = functools.partial(to_frames, n_frames=n_frames, sensor_size=sensor, size=size)
        rows, title = [("split", "class", "recording", "why broken")], f"frames {n_frames} x {size} x {size}"
        with whole(path) as f:
            for (split, cls, key), frames, why in parallel(read, frames_from, recordings, title, skip_broken):
                rows.append(("broken" if why else split, cls, key, why))
                if not why:
                    f.write(frames)
            with whole(tsv) as listing:
                for row in rows:
                    line = "\t".join(" ".join(text.split()) for text in row)  # a name may hold a tab or a line break
                    listing.write(f"{line}\n".encode(errors="surrogateescape"))

    def find():  # with a ValueError if list and frames do not match
        lines = tsv.read_text("utf-8", "surrogateescape").splitlines()[1:]
        good = [r for r, line in zip(recordings, lines, strict=True) if line.startswith(f"{r[0]}\t")]
        frames = np.memmap(path, mode="c")  # read when touched; "c": torch takes it, and nothing is ever written
        return good, frames.reshape(len(good), n_frames, 2, size, size)

    good, frames = kept(path, make, find)
    if n := len(recordings) - len(good):
        print(f"warning: {n} of {len(recordings)} recordings are broken and left out: {tsv} says why")
    return good, frames


def guess_sensor(path, recordings, read, skip_broken):
    """The smallest sensor [W, H] that holds the events of all recordings, kept in `path`."""
    def make():
        tried = parallel(read, corner, recordings, "sensor size", skip_broken)
        corners = {key: reach for (_, _, key), reach, why in tried if not why}
        width, height = np.max(list(corners.values()), 0).tolist()
        farthest = max(corners, key=lambda key: max(corners[key]))
        usual = np.median([max(c) for c in corners.values()])
        odd = bool(max(width, height) > 2 * usual)  # by a wrong byte, say
        print(f"{odd * 'warning: '}sensor: {width} x {height} pixels, as far as events reach; the farthest are in "
              f"{farthest}{odd * ', most others reach not half so far'}")
        with whole(path) as f:
            f.write(json.dumps([width, height]).encode())

    return kept(path, make, lambda: json.loads(path.read_text()))


def corner(events):
    """The smallest sensor (W, H) that holds them."""
    return int(events["x"].max()) + 1, int(events["y"].max()) + 1


def check_broken(broken, recordings, skip_broken):
    """A UserError that names up to 20 of {recording: why broken}, unless they are to be skipped and enough are left."""
    left = {recording[0] for recording in recordings if recording not in broken}
    if not broken or skip_broken and left == {"train", "test"}:
        return
    remedy = "or leave them out with --skip-broken"
    if skip_broken:
        remedy = f"for none is left to {'test' if 'train' in left else 'train'} on"
    lines = [f"{key}: cannot be read ({why})" for (_, _, key), why in broken.items()]
    if len(lines) > 20:
        lines[20:] = [f"and {len(lines) - 20} more"]
    head = f"{len(broken)} of {len(recordings)} recordings are broken: fetch them again, remove them, {remedy}:"
    raise UserError((" " if len(lines) == 1 else "\n  ").join([head, *lines]))


def check_events(events):
    """The events of a recording as they are, or a ValueError that says what no event camera writes.

    Drivers hand over packets a little out of order, which to_frames sorts. An event earlier than one before it by more
    than a hundredth of the recording means that a clock was reset or bytes are wrong. (800 of N-MNIST are in order.)
    """
    if events.ndim != 1 or not {"x", "y", "t", "p"} <= set(events.dtype.names or ()):
        raise ValueError(f"expected a structured array with fields x, y, t, p, found {events.ndim}-d {events.dtype}")
    x, y, t, p = fields = [events[field] for field in "xytp"]
    if not len(events):
        raise ValueError("holds no event")
    if any(v.dtype.kind not in "biuf" or not np.isfinite(v).all() for v in fields):
        raise ValueError("x, y, t and p must be finite numbers")
    if any(v.min() < 0 or v.max() >= 4096 or (np.trunc(v) != v).any() for v in (x, y)):
        raise ValueError(f"x from {x.min()} to {x.max()}, y from {y.min()} to {y.max()}: no pixels of an event camera")
    if ((p != 0) & (p != 1)).any():
        raise ValueError(f"polarity must be 0 (off) or 1 (on), not {p.min()} to {p.max()}: store p > 0")
    if t.dtype.kind == "f" and t.dtype.itemsize < 8 and len(t) > 1 and np.spacing(t.max()) > 0.01 * (t.max() - t.min()):
        raise ValueError(f"time is too coarse: {t.max():g} in {t.dtype} has steps of {np.spacing(t.max()):g}")
    t = t.astype(np.float64)
    back, duration = (np.maximum.accumulate(t) - t).max(), t.max() - t.min()
    if back > 0.01 * duration:
        raise ValueError(f"time runs backwards, by {back:g} of {duration:g}")
    return events


def parallel(read, f, recordings, title, skip_broken):
    """Yield (recording, f(its events), "") in order, computed by all cores, or (recording, None, why it is broken).

    Broken is what read, check_events or f refuses. Every recording is tried; then a UserError names the broken ones,
    unless they are to be skipped. A decoder that takes its process down breaks the pool: then each recording of that
    block gets a process of its own, which tells the culprit from its neighbours. Block by block, so that results do not
    pile up in memory.
    """
    job, pool, size, broken = functools.partial(attempt, read, f), workers(), 16 * os.cpu_count(), {}
    try:
        with tqdm(desc=title, total=len(recordings), unit=" recordings", disable=None) as bar:
            for block in (recordings[i : i + size] for i in range(0, len(recordings), size)):
                keys = [key for _, _, key in block]
                try:
                    results = list(pool.map(job, keys, chunksize=4))
                except BrokenProcessPool:
                    results, pool = [alone(job, key) for key in keys], workers()
                for recording, (result, why) in zip(block, results):
                    bar.update()
                    if why:
                        broken[recording] = why
                    yield recording, result, why
    finally:
        pool.shutdown(cancel_futures=True)
    check_broken(broken, recordings, skip_broken)


def start_worker():
    """A worker leaves Ctrl-C to its parent, dies with it, and shows nothing of what a decoder says as it crashes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: else workers of a killed run wait for ever


workers = functools.partial(ProcessPoolExecutor, initializer=start_worker)


def attempt(read, f, key):
    """(f(events), ""), or (None, why that failed)."""
    try:
        return f(check_events(read(key))), ""
    except BaseException as e:  # decoders written in Rust raise PanicException, which is no Exception
        return None, reason(e)


def reason(e):
    """An exception on one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


def alone(job, key):
    with workers(1) as pool:
        try:
            return pool.submit(job, key).result()
        except BrokenProcessPool:
            return None, "its reader crashed, or ran out of memory"


# -------------------------------------------------------------- mistakes, files and locks, for train.py and eval.py too

class UserError(Exception):
    """A mistake the user can mend; its one line says what is wrong, where, and what to do."""


def fail(message):
    """End the program with one line on stderr and the status of a user's mistake."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def answers(out_of_memory, stopped):
    """Around a main(): one line, no traceback, for what is no fault of the program; the arguments say what to do."""
    try:
        yield
    except (UserError, OSError) as e:
        fail(e)
    except RuntimeError as e:
        if "out of memory" in str(e) or "can't allocate memory" in str(e):
            fail(f"out of memory: {out_of_memory}")
        if "closed by peer" in str(e):
            fail("another process has ended: its message says why")
        raise
    except KeyboardInterrupt:
        print(f"\nstopped{stopped}", file=sys.stderr)
        sys.exit(130)


def recipe(name):
    """The row of DATASETS for a data set's name or a folder. Raises UserError if it is neither."""
    if name not in DATASETS and not Path(name).expanduser().is_dir():
        raise UserError(f"--dataset {name}: neither a folder, seen from {os.getcwd()}, nor one of {', '.join(DATASETS)}"
                        f"{nearest(str(name), DATASETS)}")
    return DATASETS.get(name, FOLDER)


def parse(parser, argv):
    """The flags that `parser` knows; for any other, one line that says which was meant."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], parser._option_string_actions)}")
    return args


def nearest(name, known):
    """What to add to a message about an unknown name."""
    return "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(name, known, 1))


def check_device(device):
    """Raises UserError if PyTorch cannot compute there; wakes no GPU."""
    gpus = [name for i in range(torch.cuda.device_count()) for name in ("cuda", f"cuda:{i}")]
    if device not in ["cpu", *gpus]:
        raise UserError(f"--device {device}: PyTorch has no such device here: try --device cpu")


def compare_sensors(made, name, split):
    """Warn if a checkpoint with the settings `made` is of another sensor than the folder `name`."""
    told = made.get("sensor") or split.sensor  # earlier checkpoints do not say
    if name not in DATASETS and told != split.sensor:
        print("warning: the sensor is {} x {} pixels, that of the checkpoint {} x {}: if the camera is the same, "
              "pass --sensor {} {}".format(*split.sensor, *told, *told))


@contextlib.contextmanager
def whole(path):
    """A binary file to write, called `path` only when all of it is on the disk: a stop leaves the old or the new."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}): make room or choose another folder")
    finally:
        part.unlink(missing_ok=True)


def lock(folder, wait=False):
    """Take `folder` for this process until the file returned is closed or the process ends, be it by kill -9.

    Another process that has it is waited for, or answered with BlockingIOError. Half-written files of killed ones are
    removed. Workers do not inherit this kind of lock. File systems that know no locks are left as they are.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        f = open(folder / "lock", "w")
    except OSError as e:
        raise UserError(f"{folder}: cannot be written ({e.strerror}): choose another folder for --out or --root")
    try:
        import fcntl  # Windows has none: two runs at once are not told apart there
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        print(f"waiting for another run that is at work in {folder}")
        fcntl.lockf(f, fcntl.LOCK_EX)
    except (OSError, ImportError):
        return f
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)
    return f
