"""Recordings of an event camera -> frames -> batches -> random views.

    events (x, y, t, p)  --to_frames-->  uint8 [T, 2, size, size]
    a data set           --load-->       train, test: .frames uint8 [N, T, 2, size, size], cached
    a split              --batches-->    x float [T, B, 2, size, size], y int64 [B]
    x                    --augment-->    a random view of every recording

Polarity 0 is off (darker), 1 is on (brighter). A data set is `toy` (simulated here), a public one
that tonic downloads, or a folder of recordings.
Tests: python -m pytest test_all.py -k data
"""
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# Defaults per data set: --dataset selects a row, any flag overrides one value.
# Sources: [S] Spikformer's published schedule for CIFAR10-DVS, [N] NDA (Li et al. 2022, the best
# policies for contrast and for labels), [E] EventRPG issue 1, [A] amazing-cls; the rest is chosen.
# A queue stays well below the number of recordings, or positives return as negatives.
STRONG_AUG = dict(num_ops=3, magnitude=2, flip=True, min_scale=0.5)  # [N], with crops
MILD_AUG = dict(num_ops=1, magnitude=2, flip=True, min_scale=1.0)  # [N]
DEFAULTS = dict(
    n_frames=16,  # [S]
    image_size=128,  # [S]
    labels_per_class=0,  # all
    arch="spikformer-2-256",  # [S]
    pretrain_epochs=200,  # [A]
    pretrain_lr=1e-3,
    pretrain_aug=STRONG_AUG,
    queue_size=4096,
    momentum=0.999,  # [A]
    temperature=0.1,
    alpha=0.5,
    beta=0.5,
    epochs=106,  # [S]
    lr=1e-3,  # [S]
    finetune_aug=MILD_AUG,
    weight_decay=0.06,  # [S]
    batch_size=16,  # [S]
)
PRETRAINING = [key for key in DEFAULTS if key.startswith("pretrain")] + [
    "queue_size", "momentum", "temperature", "alpha", "beta", "pretrained_on"]
NO_FLIP = dict(pretrain_aug=MILD_AUG | dict(flip=False), finetune_aug=MILD_AUG | dict(flip=False))
DATASETS = {
    "toy": DEFAULTS | dict(
        n_frames=4, image_size=16, labels_per_class=2, arch="spikformer-1-64", pretrain_epochs=40,
        queue_size=128, momentum=0.99, temperature=0.4, epochs=100, batch_size=32),
    "cifar10dvs": DEFAULTS,
    # Left and right are classes, so no flip; mild views throughout [E].
    "dvsgesture": DEFAULTS | NO_FLIP | dict(queue_size=512),
    "ncaltech101": DEFAULTS | dict(arch="sew-resnet-18"),  # the paper's best backbone there
    "nmnist": DEFAULTS | NO_FLIP | dict(
        n_frames=10, image_size=34, pretrain_epochs=20, epochs=20, batch_size=128),
}
# Chosen on training recordings of N-MNIST that were held back; image_size None: the sensor's.
FOLDER_DEFAULTS = DEFAULTS | NO_FLIP | dict(
    n_frames=4, image_size=None, arch="spikformer-1-64", pretrain_epochs=60, queue_size=512,
    epochs=100, lr=4e-3, batch_size=32)

# frames uint8 [N, T, 2, size, size], labels int64 [N], classes: names, sensor: [width, height]
Split = namedtuple("Split", "frames labels classes sensor", defaults=[None])


def load(name, root="data", n_frames=None, size=None, skip_broken=False, sensor=None):
    """Load a data set -> (train, test), each a Split.

    name: a key of DATASETS, downloaded into root if missing, or a folder of .bin, .aedat4 and .npy
    recordings, FOLDER/<class>/<recording> or FOLDER/Train|Test/<class>/<recording>. Without an
    official split the last tenth of every class, in numerical order of names, is for the test (as
    in SpikingJelly). n_frames and size (pixels) default to the data set's row; a folder's size to
    its sensor's, 128 at most, and its sensor (W, H) to the largest coordinates. skip_broken leaves
    out recordings that cannot be read. Frames are made once, by all cores, and cached in
    root/frames; a change of recordings, readers or to_frames makes them anew. Raises UserError.
    Scripts call this under `if __name__ == "__main__":`, because worker processes import them.
    """
    config, root = default_config(name), Path(root).expanduser()
    if name == "toy":
        recordings, classes, read, known_sensor = list_toy()
    elif name in TONIC_DATASETS:
        recordings, classes, read, known_sensor = list_tonic(name, root)
    else:
        recordings, classes, read, known_sensor = list_folder(Path(name).expanduser())
    recordings.sort(key=lambda r: (r[0] == "test", classes.index(r[1]), natural_key(r[2])))

    settings = dict(n_frames=n_frames or config["n_frames"], size=size or config["image_size"],
                    sensor=known_sensor or sensor)
    path = root / "frames" / f"{Path(name).name}-{cache_key(recordings, read, settings)}.npy"
    if not path.with_suffix(".json").exists():
        make_frames(path, recordings, read, skip_broken, **settings)
    about = json.loads(path.with_suffix(".json").read_text())
    labels = np.array([classes.index(cls) for _, cls, _ in about["recordings"]])
    frames = np.load(path, mmap_mode="c")  # "c", because torch wants memory it could write to
    train = sum(split == "train" for split, _, _ in about["recordings"])
    return tuple(Split(frames[part], labels[part], classes, about["sensor"])
                 for part in (slice(0, train), slice(train, len(labels))))


# ------------------------------------------------------------------------------- events to frames

def to_frames(events, n_frames, sensor_size, size):
    """Count the events of a recording -> uint8 [n_frames, 2, size, size].

    events: structured array with fields x, y (pixels), t (any unit), p (> 0 is on);
    sensor_size: (W, H) pixels. Every frame takes len(events) // n_frames events in order of time,
    the last one the remainder too, so none is lost. A pixel of the frame sums the sensor's pixels
    that fall into it; counts clip at 255. Raises ValueError for events outside the sensor.
    """
    (width, height), n = sensor_size, len(events)
    t = np.ascontiguousarray(events["t"])  # the fields lie apart: a copy makes the rest fast
    if (t[1:] < t[:-1]).any():
        events = events[np.argsort(t, kind="stable")]
    x, y = events["x"].astype(np.int32), events["y"].astype(np.int32)
    if n and not (0 <= x.min() and x.max() < width and 0 <= y.min() and y.max() < height):
        raise ValueError(f"events outside the sensor of {width} x {height} pixels: "
                         f"x {x.min()} to {x.max()}, y {y.min()} to {y.max()}")
    if (width, height) != (size, size):
        x, y = x * size // width, y * size // height
    on = np.ascontiguousarray(events["p"]) > 0
    pixel = (on * np.int32(size) + y) * size + x  # place in a flattened frame [2, size, size]
    frames = np.empty((n_frames, 2 * size * size), np.uint8)
    bounds = [i * (n // n_frames) for i in range(n_frames)] + [n]
    for i in range(n_frames):
        counts = np.bincount(pixel[bounds[i] : bounds[i + 1]], minlength=2 * size * size)
        frames[i] = counts.clip(max=255)
    return frames.reshape(n_frames, 2, size, size)


def make_frames(path, recordings, read, skip_broken, n_frames, size, sensor):
    """Write the frames of all recordings to path and, in a .json beside it, what is in there.

    Complete files get their names at the end: an interrupted run leaves nothing to train on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sensor = sensor or infer_sensor_size(recordings, read, skip_broken)
    size = size or min(128, max(8, *sensor))
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        shape = len(recordings), n_frames, 2, size, size
        frames, valid = np.lib.format.open_memmap(part, "w+", np.uint8, shape), []
        measure = functools.partial(to_frames, n_frames=n_frames, sensor_size=sensor, size=size)
        for recording, result in over_recordings(measure, recordings, read, skip_broken):
            frames[len(valid)] = result  # rows behind the last valid recording stay unused
            valid.append(recording)
        os.replace(part, path)
        part.write_text(json.dumps(dict(sensor=sensor, recordings=valid)))
        os.replace(part, path.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)


def cache_key(recordings, read, settings):
    """Hash all that the frames depend on: names, sizes, times, settings and the code."""
    files = [os.stat(key) for _, _, key in recordings if os.path.exists(key)]
    code = [inspect.getsource(f) for f in (to_frames, toy_outlines, read, *READERS.values())]
    made_from = repr((recordings, [(f.st_size, f.st_mtime_ns) for f in files], settings, code))
    return hashlib.sha256(made_from.encode(errors="surrogateescape")).hexdigest()[:12]


def infer_sensor_size(recordings, read, skip_broken):
    """Take the smallest sensor [W, H] that holds the events of all recordings, and print it."""
    found = over_recordings(largest_coordinates, recordings, read, skip_broken)
    width, height = (1 + np.max([corner for _, corner in found], 0)).tolist()
    print(f"sensor: {width} x {height} pixels, by the largest coordinates; --sensor W H tells more")
    return [width, height]


def largest_coordinates(events):
    return int(events["x"].max()), int(events["y"].max())


def over_recordings(measure, recordings, read, skip_broken):
    """Yield (recording, measure(its events)) for all that can be read, computed by all cores.

    Then raise UserError with the broken ones (20 at most), or warn of them if skip_broken.
    """
    try_one = functools.partial(try_recording, measure=measure, read=read)
    # Only the parent process answers Ctrl-C.
    pool = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    broken, total = [], len(recordings)
    try:
        results = pool.map(try_one, [key for _, _, key in recordings], chunksize=8)
        bar = tqdm(results, "recordings", total, disable=None)
        for recording, (result, error) in zip(recordings, bar):
            if error:
                broken.append(f"\n  {recording[2]}: {error}")
            else:
                yield recording, result
    finally:
        pool.shutdown(cancel_futures=True)
    if broken:
        more = [f"\n  and {len(broken) - 20} more"] if len(broken) > 20 else []
        text = f"{len(broken)} of {total} recordings are broken:" + "".join(broken[:20] + more)
        if not skip_broken or len(broken) == total:
            raise UserError(f"{text}\nfetch them again, remove them, or pass --skip-broken")
        print(f"warning: {text}")


def try_recording(key, measure, read):
    """Measure the events of one recording -> (result, ""), or (None, what is wrong with it)."""
    try:
        return measure(validate_events(read(key))), ""
    except BaseException as e:  # decoders in Rust raise PanicException, which is no Exception
        return None, format_error(e)


def validate_events(events):
    """Return the events of a recording, or raise ValueError for what no event camera writes."""
    if not {"x", "y", "t", "p"} <= set(events.dtype.names or ()):
        raise ValueError(f"expected an array with fields x, y, t, p, found {events.dtype}")
    if len(events) == 0:
        raise ValueError("holds no event")
    if not np.isin(events["p"], (-1, 0, 1)).all():
        raise ValueError("a polarity beside -1, 0 and 1")
    # Drivers deliver events a little out of order, which to_frames sorts. More than a hundredth of
    # the recording means that a clock was reset or that bytes are wrong.
    t = events["t"].astype(np.float64)
    back, duration = (np.maximum.accumulate(t) - t).max(), t.max() - t.min()
    if back > 0.01 * duration:
        raise ValueError(f"time runs backwards, by {back:g} of {duration:g}")
    return events


def format_error(e):
    """Write an exception on one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


# ------------------------------------------------------------------------------ batches and views

def batches(split, batch_size, device="cpu", shuffle=False, generator=None, rank=0, world_size=1):
    """Yield every recording once: (x float [T, B, 2, H, W], y int64 [B]) on device.

    shuffle draws the order from generator. Of world_size processes with equal generators, each
    gets every world_size-th recording; up to world_size - 1 are left out to keep shares equal.
    """
    n = len(split.labels)
    frames, labels = torch.as_tensor(split.frames), torch.as_tensor(split.labels)
    labels = labels.to(frames.device)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    order = order[: n - n % world_size][rank::world_size].to(frames.device)
    for index in split_into_batches(order, batch_size // world_size):
        x, y = frames.index_select(0, index), labels[index]  # [B, T, 2, H, W] in bytes, [B]
        if torch.device(device).type == "cuda" and not x.is_cuda:
            x, y = x.pin_memory(), y.pin_memory()  # copied while the GPU is at work
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        x = x.transpose(0, 1)  # [T, B, 2, H, W]
        yield x.to(torch.float32, memory_format=torch.contiguous_format), y


def split_into_batches(order, batch_size):
    """Cut a tensor into batches of at most batch_size, as equal as possible.

    A small last batch would upset batch norm.
    """
    return order.tensor_split(math.ceil(len(order) / batch_size))


def to_gpu_if_fits(split, device):
    """Move the frames to the GPU if they take less than half of its free memory."""
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu or split.frames.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    return split._replace(frames=torch.as_tensor(split.frames).to(device))


def augment(x, num_ops=3, magnitude=2, flip=True, min_scale=0.5):
    """Draw a random view of every recording: x [T, B, 2, H, W] -> the same shape.

    NDA (Li et al. 2022), which the paper builds on: a horizontal flip (p 0.5, if flip), a crop of
    min_scale to 1 of the area, enlarged again (1: none), then num_ops of: shear by up to 0.15 N,
    rotation by up to 15 N degrees, cutout of a square of 8 N pixels, roll by up to 1 + 2 N pixels,
    where N = magnitude and pixels are those of a width of 128. One draw per recording holds for
    all its time steps and both polarities.

    Order: flip, shear, rotate + crop, cutout, roll. We invert them, last first, to find for every
    output pixel the input pixel it comes from; one gather then does it all.
    """
    T, B, C, H, W = x.shape
    draw = draw_view(B, num_ops, magnitude, flip, min_scale, W, x.device)
    v, u = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
    u, v = (u - draw["roll"][0]) % W, (v - draw["roll"][1]) % H  # [B, H, W], column and row
    u, v = u - (W - 1) / 2, v - (H - 1) / 2  # from the centre
    visible = ~cutout_mask(u, v, draw, H, W)
    u, v = inverse_map(u, v, draw, H, W)
    u, v = (u + (W - 1) / 2).round().long(), (v + (H - 1) / 2).round().long()  # from the corner
    visible &= (u >= 0) & (u < W) & (v >= 0) & (v < H)
    index = (v.clamp(0, H - 1) * W + u.clamp(0, W - 1)).flatten(1)  # [B, H*W]
    index = index[None, :, None].expand(T, B, C, -1)  # [T, B, 2, H*W]
    return x.flatten(3).gather(3, index).view(x.shape) * visible[None, :, None]


def draw_view(B, num_ops, magnitude, flip, min_scale, W, device):
    """Draw the parameters of B views -> dict of tensors [B, 1, 1] or [2, B, 1, 1] (x and y)."""
    def uniform(*size):  # in [-1, 1)
        return torch.rand(*size, device=device) * 2 - 1

    chosen = torch.rand(B, 4, device=device).argsort(1) < num_ops  # [B, 4], num_ops of them true
    roll, rotate, cutout, shear = chosen.float().T[..., None, None]  # each [B, 1, 1], 0 or 1
    pixel = W / 128
    return dict(
        roll=(uniform(2, B, 1, 1) * roll * (1 + 2 * magnitude) * pixel).round(),
        cutout_centre=uniform(2, B, 1, 1),  # in half images
        cutout_half=cutout * 4 * magnitude * pixel,
        side=(1 - torch.rand(B, 1, 1, device=device) * (1 - min_scale)).sqrt(),  # of the crop
        angle=uniform(B, 1, 1) * rotate * math.radians(15 * magnitude),
        shear=uniform(B, 1, 1) * shear * 0.15 * magnitude,
        mirror=torch.where(torch.rand(B, 1, 1, device=device) < 0.5 * flip, -1.0, 1.0),
        crop_centre=uniform(2, B, 1, 1),  # in half the image's sides that the crop leaves over
    )


def cutout_mask(u, v, draw, H, W):
    """Tell which pixels (u, v), counted from the centre, lie in the hole: bool [B, H, W]."""
    centre = draw["cutout_centre"]
    distance = torch.maximum((u - centre[0] * W / 2).abs(), (v - centre[1] * H / 2).abs())
    return distance < draw["cutout_half"]


def inverse_map(u, v, draw, H, W):
    """Undo rotation with crop, shear and flip at (u, v), counted from the centre: [B, H, W]."""
    cos, sin = draw["angle"].cos() * draw["side"], draw["angle"].sin() * draw["side"]
    away = draw["crop_centre"] * (1 - draw["side"])
    u, v = cos * u - sin * v + away[0] * W / 2, sin * u + cos * v + away[1] * H / 2
    return draw["mirror"] * (u + draw["shear"] * v), v


# ---------------------------------------------------------- where recordings come from: toy data
#
# Every source lists its recordings -> ([("train" | "test", class, key)], names of the classes,
# read(key) -> events, the sensor (W, H) or None if the recordings have to tell).

# One of ten shapes turns and circles before the camera, as in N-MNIST's saccades. Many unlabelled
# recordings in random poses and few labels are the setting in which pre-training earns its keep.
TOY_SEED, TOY_SENSOR, TOY_TRAIN, TOY_TEST = 0, 32, 2000, 500


def list_toy():
    classes = list(toy_outlines())
    recordings = [("train" if i < TOY_TRAIN else "test", classes[i % 10], f"toy:{TOY_SEED}:{i}")
                  for i in range(TOY_TRAIN + TOY_TEST)]
    return recordings, classes, simulate_toy, (TOY_SENSOR, TOY_SENSOR)


def toy_outlines():
    """Draw the ten shapes: {class: radius at 720 angles from 0 to 2 pi}, the largest about 1."""
    a = np.arange(720) * np.pi / 360

    def polygon(n):
        return math.cos(math.pi / n) / np.cos(a % (2 * np.pi / n) - np.pi / n)

    def box(w, h):
        cos, sin = np.maximum(abs(np.cos(a)), 1e-9), np.maximum(abs(np.sin(a)), 1e-9)
        return np.minimum(w / cos, h / sin)

    return {
        "disc": 0.8 + 0 * a, "triangle": polygon(3), "square": polygon(4), "bar": box(1, 0.3),
        "cross": np.maximum(box(1, 0.25), box(0.25, 1)),
        "trefoil": 0.6 + 0.4 * np.cos(3 * a), "star": 0.65 + 0.35 * np.cos(5 * a),
        "half disc": np.where(a < np.pi, 1, 0.05), "wedge": np.where(a < 1.5 * np.pi, 0.9, 0.1),
        "drop": 0.35 + 0.65 * np.cos(a / 2) ** 14,
    }


def simulate_toy(key, steps=32, threshold=0.25):
    """Simulate one recording -> events, a structured array (x, y in pixels, t in us, p).

    A pixel fires when the logarithm of its brightness has changed by threshold since its last
    event. Size, place, pose and turning are drawn for each recording, independent of the class:
    all that varies within a class, the views of pre-training vary too.
    key: "toy:<seed>:<number>", of class number % 10; steps: of 1 ms.
    """
    _, seed, i = key.split(":")
    rng = np.random.default_rng([int(seed), int(i)])
    outline = list(toy_outlines().values())[int(i) % 10]
    time = np.linspace(-0.5, 0.5, steps + 1)[:, None, None]
    pose = rng.uniform(-0.7, 0.7) + rng.uniform(-0.2, 0.2) * time  # radians
    radius, middle = rng.uniform(9, 12.5), (TOY_SENSOR - 1) / 2 + rng.uniform(-3, 3, 2)  # pixels
    y, x = np.mgrid[:TOY_SENSOR, :TOY_SENSOR]
    dx = x - middle[0] - 2 * np.cos(2 * np.pi * time)
    dy = y - middle[1] - 2 * np.sin(2 * np.pi * time)
    half_degrees = ((np.arctan2(dy, dx) - pose) * 360 / np.pi).astype(int) % 720
    edge = radius * outline[half_degrees] - np.hypot(dx, dy)  # pixels inside the outline
    log_brightness = 1 / (1 + np.exp(-1.5 * edge))  # [steps + 1, H, W]
    level, events = log_brightness[0].copy(), []  # level: that of each pixel's last event
    for step in range(steps):
        change = log_brightness[step + 1] - level
        count = np.trunc(change / threshold).astype(int)  # [H, W], negative: off events
        level += count * threshold
        count += rng.choice([-1, 0, 1], count.shape, p=[0.0005, 0.999, 0.0005])  # sensor noise
        ys, xs = np.repeat(np.nonzero(count), abs(count[count != 0]), axis=1)
        t, p = (step + rng.random(len(xs))) * 1000, count[ys, xs] > 0
        events.append(np.rec.fromarrays([xs, ys, t, p], names="x,y,t,p"))
    events = np.concatenate(events)
    return events[np.argsort(events["t"], kind="stable")]


# ---------------------------------------------------------- where recordings come from: a folder

def list_folder(folder):
    """List FOLDER/<class>/<recording> or FOLDER/Train|Test/<class>/<recording>."""
    ignored = Counter()

    def inside(path):
        files = list(path.glob("*/*"))
        ignored.update(f.suffix or f.name for f in files if f.suffix not in READERS)
        return [(f.parent.name, str(f)) for f in files if f.suffix in READERS]

    parts = {p.name.lower(): p for p in folder.iterdir() if p.is_dir()}
    if {"train", "test"} <= set(parts):
        recordings = [(split, *r) for split in ("train", "test") for r in inside(parts[split])]
    else:
        recordings = split_by_class(inside(folder))
    train, test = ({cls for part, cls, _ in recordings if part == split}
                   for split in ("train", "test"))
    if not (train and test):
        raise UserError(f"{folder}: no recordings to {'test' if train else 'train'} on: expected "
                        "<class>/<recording> or Train|Test/<class>/<recording>, at least two in a "
                        f"class, each {' or '.join(READERS)}")
    if ignored:
        print(f"{folder}: passed over " + ", ".join(f"{n} {kind}" for kind, n in ignored.items()))
    if unpaired := sorted(train ^ test, key=natural_key):
        print(f"warning: {folder}: not both to train and to test on: class {', '.join(unpaired)}")
    return recordings, sorted(train | test, key=natural_key), read_file, None


def natural_key(name):
    """Make a sort key that counts: r2 before r10, and r1 and r01 always in the same order."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def split_by_class(recordings):
    """Split [(class, key)] -> [(split, class, key)] by nothing but the names.

    Of n recordings of a class, in natural order, the last n // 10 (at least 1 of 2) are for test.
    """
    total, count, split = Counter(cls for cls, _ in recordings), Counter(), []
    for cls, key in sorted(recordings, key=lambda r: natural_key(r[1])):
        n = total[cls]
        split.append(("train" if count[cls] < n - max(n // 10, n > 1) else "test", cls, key))
        count[cls] += 1
    return split


def read_file(path):
    return READERS[os.path.splitext(path)[1]](path)


def read_atis(path):
    """Read the ATIS format of N-MNIST and N-Caltech101: 5 bytes an event, time in us."""
    import tonic  # here and below, because it takes two seconds
    return tonic.io.read_mnist_file(path, np.dtype([(field, int) for field in "xytp"]))


def read_aedat4(path):
    """Read the first stream of events of an AEDAT4 file."""
    import tonic
    events = tonic.io.read_aedat4(path)
    events.dtype.names = "t", "x", "y", "p"
    return events


def read_npy(path):
    """Read a structured array with fields x, y, t, p; np.load refuses pickled objects."""
    return np.load(path)


READERS = {".bin": read_atis, ".aedat4": read_aedat4, ".npy": read_npy}


# ----------------------------------------------------- where recordings come from: public data

def read_ncaltech101(path):
    """Read a recording of N-Caltech101 and move it to the corner, as tonic does."""
    events = read_atis(path)
    for side in "xy":
        events[side] -= events[side].min()
    return events


def read_dvsgesture(path):
    """Read a recording of DVS128 Gesture as tonic stores it: [events, 4] of x, y, p, ms."""
    return np.rec.fromarrays(np.load(path).T, names="x,y,p,t")


# tonic's class, sensor, number of recordings, reader, addresses to mend: those of figshare in
# tonic 1.7.0 answer with an empty file (tonic issues 329, 330); figshare's API has the same files.
FIGSHARE = "https://api.figshare.com/v2/file/download/"
TONIC_DATASETS = {
    "cifar10dvs": ("CIFAR10DVS", (128, 128), 10_000, read_aedat4, dict(url=FIGSHARE + "38023437")),
    "dvsgesture": ("DVSGesture", (128, 128), 1_341, read_dvsgesture,
                   dict(train_url=FIGSHARE + "38022171", test_url=FIGSHARE + "38020584")),
    # Recordings differ in size; this is the largest, and SpikingJelly's.
    "ncaltech101": ("NCALTECH101", (240, 180), 8_709, read_ncaltech101, {}),
    "nmnist": ("NMNIST", (34, 34), 70_000, read_atis, {}),
}


def list_tonic(name, root):
    """List a public data set by tonic's class, which downloads, checks the md5 and extracts."""
    import tonic
    class_name, sensor, total, read, addresses = TONIC_DATASETS[name]
    tonic_class, folder = getattr(tonic.datasets, class_name), root / class_name
    for attribute, address in addresses.items():
        setattr(tonic_class, attribute, address)
    official = "train" in inspect.signature(tonic_class).parameters
    recordings = []
    for split in ("train", "test") if official else ("file",):
        options = dict(train=split == "train") if official else {}
        try:
            dataset = tonic_class(str(root), **options)
            # N-Caltech101's archive holds another one, which tonic does not extract.
            for inner in folder.rglob("Caltech101.zip") if not dataset.data else ():
                tonic.download_utils.extract_archive(str(inner), str(folder))
                dataset = tonic_class(str(root), **options)
        except Exception as e:
            about = vars(tonic_class)
            url, file = (about.get(k) or about[f"{split}_{k}"] for k in ("url", "filename"))
            raise UserError(f"{name} cannot be downloaded ({format_error(e)}): fetch {url} (md5 "
                            f"{about[f'{split}_md5']}), put it at {folder / file}, run again")
        classes = list(getattr(dataset, "classes", sorted(set(dataset.targets))))
        recordings += [(split, target if isinstance(target, str) else classes[target], path)
                       for target, path in zip(dataset.targets, dataset.data)]
    if len(recordings) < total:
        print(f"warning: {len(recordings):,} of the {total:,} recordings of {name} are there; to "
              f"extract all again, remove the folders (not the archives) in {folder}")
    if not official:
        recordings = split_by_class([(cls, path) for _, cls, path in recordings])
    return recordings, classes, read, sensor


# ---------------------------------------------------------------------------------------- settings

class UserError(Exception):
    """A mistake that the user can correct; its text says what is wrong, where, and what to do."""


def default_config(name):
    """Return the row of DATASETS, or FOLDER_DEFAULTS for a folder. Raises UserError otherwise."""
    if name in DATASETS:
        return DATASETS[name]
    if Path(name).expanduser().is_dir():
        return FOLDER_DEFAULTS
    raise UserError(f"--dataset {name}: neither a folder nor one of {', '.join(DATASETS)}")
