"""Recordings of an event camera -> frames -> batches -> random views.

    events (x, y, t, p)  --to_frames-->  frames [T, 2, size, size]: counts, uint8 or int16
    a data set           --load-->       train, test: .frames [N, T, 2, size, size], cached
    a split              --batches-->    x float [T, B, 2, size, size], y int64 [B]
    x                    --augment-->    a random view of every recording

Polarity 0 is off (darker), 1 is on (brighter). A data set is `toy` (simulated here), a public one
that tonic downloads, or a folder of recordings.
Tests: python -m pytest test_all.py -k "data or own"
"""
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# Defaults per data set: --dataset selects a row, a flag overrides one value (none for the _aug).
# Sources: [S] Spikformer's published schedule for CIFAR10-DVS, less mixup and label smoothing,
# [N] NDA (Li et al. 2022, the best policies for contrast and for labels),
# [E] github.com/myuansun/EventRPG, issue 1, [A] github.com/StephenTaylor1998/amazing-cls; the rest
# is our choice.
# A queue stays below the number of recordings, or positives return as negatives.
STRONG_AUG = dict(num_ops=3, flip=True, min_scale=0.5)  # [N], with crops; see draw_view
MILD_AUG = dict(num_ops=1, flip=True, min_scale=1.0)  # [N]
NO_FLIP_AUG = MILD_AUG | dict(flip=False)  # [E] for gestures, to pre-train and to fine-tune
# Instead of NDA's: every view is shifted, resized, rotated and sheared; no hole. No flip, because
# left and right may differ: in gestures, digits, a folder.
AFFINE_AUG = dict(num_ops=4, flip=False, min_scale=0.6, max_scale=1.6, shift=0.08, rotation=25,
                  shear=0.25, cutout=0.0)
DEFAULTS = dict(
    n_frames=16,  # [S]
    image_size=128,  # [S]
    frames_by="count",  # of events, or "time"
    labels_per_class=0,  # all
    arch="spikformer-2-256",  # [S]
    pretrain_epochs=200,  # [A]
    pretrain_lr=1e-3,
    pretrain_aug=STRONG_AUG,
    split_events=False,  # True: the two views share no event
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
# Chosen on training recordings of N-MNIST that were held back; see docs/experiments.md.
REAL = dict(pretrain_lr=2e-3, pretrain_aug=AFFINE_AUG, split_events=True, momentum=0.99,
            finetune_aug=NO_FLIP_AUG)
DATASETS = {
    "toy": DEFAULTS | dict(
        n_frames=4, image_size=16, labels_per_class=2, arch="spikformer-1-64", pretrain_epochs=30,
        queue_size=128, momentum=0.99, temperature=0.4, epochs=100, lr=1e-4, batch_size=32),
    "cifar10dvs": DEFAULTS,
    "dvsgesture": DEFAULTS | dict(
        pretrain_aug=NO_FLIP_AUG, finetune_aug=NO_FLIP_AUG, queue_size=512),
    "ncaltech101": DEFAULTS | dict(arch="sew-resnet-18"),  # the paper's best backbone there
    "nmnist": DEFAULTS | REAL | dict(
        n_frames=10, image_size=34, pretrain_epochs=20, epochs=20, batch_size=128),
}
FOLDER_DEFAULTS = DEFAULTS | REAL | dict(
    n_frames=4, image_size=None,  # None: the sensor's
    arch="spikformer-1-64", pretrain_epochs=60, queue_size=512, epochs=100, lr=2e-3, batch_size=32)

# frames [N, T, 2, size, size], labels int64 [N], classes: their names, sensor: [width, height],
# names: "<class>/<file>" of each recording
Split = namedtuple("Split", "frames labels classes sensor names", defaults=[None, None])


class UserError(Exception):
    """A mistake that the user can correct; its text says what is wrong, where, and what to do."""


def load(name, root="data", n_frames=None, size=None, skip_broken=False, sensor=None,
         frames_by="count", columns=None, only=None):
    """Load a data set -> (train, test), each a Split. Raises UserError.

    name: a key of DATASETS, downloaded into root if missing, or a folder: see list_folder. n_frames
    and size (pixels) default to the data set's row; a folder's size to its sensor's longer side,
    8 to 128, and its sensor (W, H) to infer_sensor_size. skip_broken leaves out the recordings
    that cannot be read, which otherwise are an error. frames_by: see to_frames; columns: the order
    of plain [N, 4] arrays, as "xytp". only: "train" or "test" leaves out a folder's other split, or
    puts all recordings of a folder without Train and Test into this one. Frames are made once, by
    all cores, and cached in root/frames, by cache_key. A script calls this in a block under
    `if __name__ == "__main__":`, because worker processes import the script.
    """
    name, root = resolve(name), Path(root).expanduser()
    config = default_config(name)
    # recordings: [("train" or "test", class, key)], key a path or toy:<...>; read(key) -> events
    if name == "toy":
        recordings, classes, read, known_sensor = list_toy()
    elif name in TONIC_DATASETS:
        recordings, classes, read, known_sensor = list_tonic(name, root)
    else:
        recordings, classes, read, known_sensor = list_folder(name, columns, only)
    recordings.sort(key=lambda r: (r[0] == "test", classes.index(r[1]), natural_key(r[2])))

    prefix = root / "frames" / Path(name).name
    sensor = list(known_sensor or sensor or infer_sensor_size(prefix, recordings, read))
    settings = dict(n_frames=n_frames or config["n_frames"], frames_by=frames_by, sensor=sensor,
                    size=size or config["image_size"] or min(128, max(8, *sensor)))
    path = Path(f"{prefix}-{cache_key(recordings, read, settings)}.npy")
    if not (path.exists() and path.with_suffix(".json").exists()):
        make_frames(path, recordings, read, **settings)
    about = json.loads(path.with_suffix(".json").read_text())
    if about["broken"]:
        report_broken(about["broken"], len(recordings), skip_broken)
    recordings = about["recordings"]  # without the broken ones
    frames = np.load(path, mmap_mode="c")  # "c", because torch wants memory that it could write to
    labels = np.array([classes.index(cls) for _, cls, _ in recordings], np.int64)
    names = [f"{cls}/{Path(key).name}" for _, cls, key in recordings]
    both = Split(frames[: len(names)], labels, classes, sensor, names)
    n = sum(split == "train" for split, _, _ in recordings)
    if (n == 0 and only != "test") or (n == len(names) and only != "train"):
        raise UserError(f"{name}: no recordings to {'train' if n == 0 else 'test'} on")
    return select(both, slice(None, n)), select(both, slice(n, None))


def select(split, index):
    """Keep the recordings of a split at index, a slice or a list of numbers."""
    names = split.names and np.array(split.names, object)[index].tolist()  # yours may be None
    return split._replace(frames=split.frames[index], labels=split.labels[index], names=names)


def fingerprint(train_names, test_names):
    """Hash the names of the recordings in both splits, to tell later whether they are the same."""
    # fsencode, because names of files need not be UTF-8
    return {split: hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()[:12]
            for split, names in (("train", train_names), ("test", test_names))}


def resolve(name):
    """Return a data set's name as it is, a folder's as an absolute path: "./toy" is a folder."""
    return name if name in DATASETS else os.path.abspath(os.path.expanduser(name))


def default_config(name):
    """Return the row of DATASETS, or FOLDER_DEFAULTS for a folder. Raises UserError otherwise."""
    if name in DATASETS:
        return DATASETS[name]
    if os.path.isdir(name):
        return FOLDER_DEFAULTS
    raise UserError(f"{name}: neither a folder nor one of {', '.join(DATASETS)}")


# ------------------------------------------------------------------------------- events to frames

def to_frames(events, n_frames, sensor_size, size, frames_by="count"):
    """Count the events of a recording -> [n_frames, 2, size, size], uint8 or, past 255, int16.

    events: structured array with fields x, y (pixels), t (any unit) and p (the larger of its two
    values is on; a single one is on above 0); sensor_size: (W, H) pixels. Each frame has equally
    many events or, if frames_by is "time", lasts equally long; the last one takes the remainder
    too (as in SpikingJelly). A pixel of the frame sums the sensor's pixels that fall into it, up to
    32,767 events. Raises ValueError for events outside the sensor, and if integer times are too few
    for frames of equal duration.
    """
    (width, height), n = sensor_size, len(events)
    t = np.ascontiguousarray(events["t"])  # a structured array interleaves its fields: slow to scan
    if (t[1:] < t[:-1]).any():
        order = np.argsort(t, kind="stable")
        events, t = events[order], t[order]
    x, y = events["x"].astype(np.int32), events["y"].astype(np.int32)
    if n and not (0 <= x.min() and x.max() < width and 0 <= y.min() and y.max() < height):
        raise ValueError(f"events outside the sensor of {width} x {height} pixels: "
                         f"x {x.min()} to {x.max()}, y {y.min()} to {y.max()}")
    if (width, height) != (size, size):
        x, y = x * size // width, y * size // height
    p = np.ascontiguousarray(events["p"])
    off = p.min() if n and p.min() < p.max() else 0
    pixel = ((p > off) * np.int32(size) + y) * size + x  # place in a flattened [2, size, size]
    if frames_by == "time" and n:
        t = t - t[0]  # small, because uint64 becomes float64 in the product below
        if t.dtype.kind in "iu":
            duration = t[-1] // n_frames  # as in SpikingJelly
            if t[-1] and not duration:
                raise ValueError(f"lasts {t[-1]} units of time, too few for {n_frames} frames")
        else:
            duration = t[-1] / n_frames  # 1.5 s // 4 would be 0 s
        starts = np.searchsorted(t, duration * np.arange(n_frames))
    else:
        starts = np.arange(n_frames) * (n // n_frames)
    frames = np.empty((n_frames, 2 * size * size), np.int16)
    for frame, part in zip(frames, np.split(pixel, starts[1:])):
        counts = np.bincount(part, minlength=len(frame))
        frame[:] = counts.clip(max=32767)
    frames = frames if frames.max() > 255 else frames.astype(np.uint8)
    return frames.reshape(n_frames, 2, size, size)


def make_frames(path, recordings, read, n_frames, size, sensor, frames_by):
    """Write the frames of all recordings to path and, in a .json beside it, what is in there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measure = functools.partial(frames_and_facts, n_frames=n_frames, sensor_size=sensor, size=size,
                                frames_by=frames_by)
    part, wide = (path.with_suffix(f".{os.getpid()}.{name}.part") for name in ("uint8", "int16"))
    shape = (len(recordings), n_frames, 2, size, size)
    valid, facts, broken = [], [], []
    try:
        frames = new_array(part, np.uint8, shape)
        for recording, result, error in map_recordings(measure, recordings, read):
            if error:
                broken.append(f"{recording[2]}: {error}")
                continue
            counts, fact = result
            if counts.itemsize > frames.itemsize:  # the first count past 255: all become int16
                narrow, frames = frames, new_array(wide, np.int16, shape)
                frames[: len(valid)] = narrow[: len(valid)]
                narrow = None  # Windows neither removes nor renames a file that is mapped
                part.unlink()
                part = wide
            frames[len(valid)] = counts  # rows behind the last valid recording stay unused
            valid.append(recording)
            facts.append(fact)
        warn_of_losses(facts, n_frames, size, sensor)
        # Only now do the files get their names: an interrupted run leaves nothing to train on.
        frames = None
        os.replace(part, path)
        write_json(path.with_suffix(".json"), dict(recordings=valid, broken=broken))
    finally:
        frames = None
        for leftover in part, wide:
            leftover.unlink(missing_ok=True)


def new_array(path, dtype, shape):
    """Create an .npy file -> the array in it, mapped into memory."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and a crash (SIGBUS) later
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array


def frames_and_facts(events, key, **settings):
    """Make the frames of a recording -> frames, (events, lowest, highest polarity)."""
    p = events["p"]
    return to_frames(events, **settings), (len(events), int(p.min()), int(p.max()))


def warn_of_losses(facts, n_frames, size, sensor):
    """Print what the frames do not show, and how a polarity other than 0 and 1 is read."""
    if few := sum(n < n_frames for n, _, _ in facts):
        print(f"warning: {few} recordings have fewer events than the {n_frames} frames")
    if size > max(sensor):
        print(f"warning: frames of {size} pixels are larger than the sensor, {sensor[0]} x "
              f"{sensor[1]}: {size - sensor[0]} of {size} columns stay empty, and "
              f"{size - sensor[1]} rows")
    pairs = {(low, high) for _, low, high in facts if low < high}
    for low, high in sorted(pairs - {(0, 1)}):
        print(f"polarity: {low} is read as off, {high} as on")
    off = {low for low, _ in pairs}
    if n := sum(low == high > 0 and low in off for _, low, high in facts):
        print(f"warning: {n} recordings have one polarity only, which is off in others: it is read "
              "as on")


def cache_key(recordings, read, settings):
    """Hash what the frames depend on: names, splits, sizes, times, settings, functions' own code.

    Not the code of what these functions call: after changing that, delete the cached frames.
    """
    files = [os.stat(key) for _, _, key in recordings if os.path.exists(key)]
    stats = [(f.st_size, f.st_mtime_ns) for f in files]
    endings = sorted({os.path.splitext(key)[1] for _, _, key in recordings})
    functions = [read, read_file, *(READERS[e] for e in endings if e in READERS), toy_outlines,
                 validate_events, sensor_of, to_frames]
    code = []
    for f in map(functools.partial, functions):  # all have .func and .keywords now
        try:
            code.append(inspect.getsource(f.func) + repr(f.keywords))
        except TypeError:  # no source: written in C, as np.fromfile, or an object
            code.append(re.sub(" at 0x[0-9A-Fa-f]+", "", repr(f)))
    made_from = json.dumps([recordings, stats, settings, code, FIELDS], sort_keys=True)
    return hashlib.sha256(made_from.encode()).hexdigest()[:12]


def infer_sensor_size(prefix, recordings, read):
    """Find, print and cache the sensor [W, H] that .aedat4 files name or that holds all events."""
    path = Path(f"{prefix}-{cache_key(recordings, read, {})}.sensor.json")
    if not path.exists():
        measured = list(map_recordings(sensor_of, recordings, read))
        sizes = [size for _, size, error in measured if not error]
        if not sizes:
            report_broken([f"{r[2]}: {error}" for r, _, error in measured], len(recordings), False)
        width, height = max(w for w, _, _ in sizes), max(h for _, h, _ in sizes)
        named = Counter((w, h) for w, h, is_named in sizes if is_named)
        source = "named by the recordings" if named else (
            "by the largest coordinates; if the camera's is larger, pass --sensor W H")
        print(f"sensor: {width} x {height} pixels, {source}")
        if len(named) > 1:
            print("warning: cameras of different sizes: "
                  + ", ".join(f"{n} recordings of {w} x {h}" for (w, h), n in named.items()))
        write_json(path, [width, height])
    return json.loads(path.read_text())


def sensor_of(events, key):
    """Tell the sensor of a recording -> (W, H, whether the file names it)."""
    if not key.endswith(".aedat4"):
        return 1 + int(events["x"].max()), 1 + int(events["y"].max()), False
    import aedat
    streams = aedat.Decoder(key).id_to_stream()
    stream = streams[min(i for i, s in streams.items() if s["type"] == "events")]
    return stream["width"], stream["height"], True


def map_recordings(measure, recordings, read):
    """Yield (recording, measure(its events, key), "") or (recording, None, what is wrong with it).

    All cores compute; the order is that of the recordings.
    """
    task = functools.partial(try_recording, measure=measure, read=read)
    pool = ProcessPoolExecutor(initializer=start_worker)
    try:
        results = pool.map(task, [key for _, _, key in recordings], chunksize=8)
        bar = tqdm(results, "recordings", len(recordings), disable=None)  # None: in a terminal only
        for recording, (result, error) in zip(recordings, bar):
            yield recording, result, error
    except BrokenProcessPool:
        raise UserError("a process that reads recordings was killed, perhaps for lack of memory, "
                        "or did not start, because your script calls data.load outside of "
                        "if __name__ == '__main__':")
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Leave Ctrl-C to the main process, and end when that ends, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)  # sys.exit would end this thread only
    threading.Thread(target=follow, daemon=True).start()


def report_broken(broken, total, skip_broken):
    """Raise UserError with the broken recordings, 20 at most; skip_broken: warn, if not all are."""
    remedy = ": left out" if skip_broken else ": remove them or pass --skip-broken"
    remedy = "" if len(broken) == total else remedy
    lines = broken[:20] + ([f"and {len(broken) - 20} more"] if len(broken) > 20 else [])
    text = "\n  ".join([f"{len(broken)} of {total} recordings are broken{remedy}:", *lines])
    if not skip_broken or len(broken) == total:
        raise UserError(text)
    print(f"warning: {text}")


def try_recording(key, measure, read):
    """Measure the events of one recording -> (result, ""), or (None, what is wrong with it)."""
    try:
        return measure(validate_events(read(key)), key), ""
    except KeyboardInterrupt:  # in eval.py --predict, which has no workers
        raise
    except BaseException as e:  # decoders in Rust raise PanicException, which is no Exception
        return None, format_error(e)


def validate_events(events):
    """Return the events of a recording, or raise ValueError for what no event camera writes."""
    if not {"x", "y", "t", "p"} <= set(events.dtype.names or ()):
        raise ValueError(f"expected an array with fields x, y, t, p, found {events.dtype}")
    if len(events) == 0:
        raise ValueError("holds no event")
    p = events["p"]
    if ((p != p.min()) & (p != p.max())).any():
        raise ValueError(f"more than two polarities between {p.min()} and {p.max()}")
    # Drivers deliver events a little out of order, which to_frames sorts. More than a hundredth of
    # the recording means that a clock was reset or that bytes are wrong.
    t = events["t"].astype(np.float64)
    back, duration = (np.maximum.accumulate(t) - t).max(), t.max() - t.min()
    if not back <= 0.01 * duration:  # NaN neither
        raise ValueError(f"time runs backwards, by {back:g} of {duration:g}")
    return events


def write_json(path, content):
    """Write a JSON file, all of it or nothing."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(content))
    os.replace(part, path)


def format_error(e):
    """Write an exception on one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


# ------------------------------------------------------------------------------ batches and views

def batches(split, batch_size, device="cpu", shuffle=False, generator=None, rank=0, world_size=1):
    """Yield recordings, each once: (x float [T, B, 2, H, W], y int64 [B]) on device.

    shuffle draws the order from generator. Of world_size processes with equal generators, each
    gets every world_size-th recording; up to world_size - 1 are left out to keep shares equal.
    """
    frames, labels = torch.as_tensor(split.frames), torch.as_tensor(split.labels)
    n, labels = len(labels), labels.to(frames.device)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    order = order[: n - n % world_size][rank::world_size].to(frames.device)
    # Batches are as equal as possible, because a small last one would upset batch norm.
    for index in order.tensor_split(math.ceil(len(order) / (batch_size // world_size))):
        x, y = frames.index_select(0, index), labels[index]  # integers [B, T, 2, H, W], [B]
        if torch.device(device).type == "cuda" and not x.is_cuda:  # copied while the GPU is at work
            x, y = (z.pin_memory().to(device, non_blocking=True) for z in (x, y))
        x, y = x.to(device), y.to(device)
        yield x.transpose(0, 1).contiguous().float(), y  # [T, B, 2, H, W], [B]


def to_gpu_if_fits(split, device):
    """Move the frames to the GPU if they take less than half of its free memory."""
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu or split.frames.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return split
    return split._replace(frames=torch.as_tensor(split.frames).to(device))


def split_events(x):
    """Deal the events of x [T, B, 2, H, W] at random to two halves of the same shape.

    Two views made of them share no event, so that what a query and its key have in common is what
    they show, and not the noise of one recording.
    """
    half = torch.binomial(x, torch.full_like(x, 0.5))
    return half, x - half


def augment(x, **ranges):
    """Draw a random view of every recording: x [T, B, 2, H, H] -> the same shape.

    One draw per recording holds for all its time steps and both polarities; for the ranges, see
    draw_view. Order: flip, shear, crop with shift, rotation, hole. All but the hole are one matrix
    theta, built backwards, from the view to the image: pixel (u, v) of the view shows the pixel of
    the image nearest to theta @ (u, v, 1), or 0 outside it. u runs to the right and v down, each
    from -1 to 1 between the outer edges, so a side is 2 long.
    """
    T, B, C, H, _ = x.shape
    draw = draw_view(B, x.device, **ranges)
    # from the view to the crop: rotation, size, place
    cos, sin = draw["side"] * draw["angle"].cos(), draw["side"] * draw["angle"].sin()
    row_u = torch.stack([cos, -sin, draw["centre"][0]], 1)  # [B, 3]
    row_v = torch.stack([sin, cos, draw["centre"][1]], 1)  # [B, 3]
    # on to the image: shear, flip
    row_u = draw["mirror"][:, None] * (row_u + draw["shear"][:, None] * row_v)
    theta = torch.stack([row_u, row_v], 1)  # [B, 2, 3]
    with torch.autocast(x.device.type, enabled=False):  # bf16 would be wrong by half a pixel
        grid = F.affine_grid(theta, [B, 1, H, H], align_corners=False)  # [B, H, H, 2]
    images = x.transpose(0, 1).flatten(1, 2)  # [B, T*2, H, H]
    views = F.grid_sample(images, grid, mode="nearest", align_corners=False)  # [B, T*2, H, H]
    # hole
    middle = (2 * torch.arange(H, device=x.device) + 1) / H - 1  # of each pixel, from -1 to 1
    far_u, far_v = ((middle - c[:, None]).abs() >= draw["half_hole"][:, None] for c in draw["hole"])
    views = views * (far_u[:, None] | far_v[:, :, None])[:, None]
    return views.unflatten(1, (T, C)).transpose(0, 1)  # [T, B, 2, H, H]


def draw_view(B, device, num_ops=3, flip=True, min_scale=0.5, max_scale=1.0, shift=0.04,
              rotation=30, shear=0.3, cutout=0.125):
    """Draw the parameters of B views -> dict of tensors [B], or [2, B] (x and y).

    NDA's operations (Li et al. 2022), which the paper builds on, with its ranges at magnitude 2 and
    128 pixels as defaults, and a crop. flip: mirror, p 0.5. min_scale, max_scale: the crop's share
    of the image's area; it is stretched to the view (1: no crop; above 1: the image shrinks). Then
    num_ops of the four below, drawn for each view: shift of the crop by up to this share of the
    image's side (what leaves is lost; in NDA it enters again); rotation by up to so many degrees;
    shear by up to so many columns per row; cutout, a square hole whose side is this share of the
    view's.
    """
    def uniform(*size):  # in [-1, 1)
        return torch.rand(*size, device=device) * 2 - 1

    # Each view draws a random order of 0 to 3; an operation is used if its number is below num_ops.
    shifted, rotated, sheared, cut = torch.rand(4, B, device=device).argsort(0) < num_ops  # [B]
    side = (min_scale + torch.rand(B, device=device) * (max_scale - min_scale)).sqrt()
    return dict(
        side=side,  # of the crop, by the image's
        centre=(1 - side) * uniform(2, B) + 2 * shift * shifted * uniform(2, B),  # of the crop
        angle=math.radians(rotation) * rotated * uniform(B),
        shear=shear * sheared * uniform(B),
        mirror=torch.where(torch.rand(B, device=device) < 0.5 * flip, -1.0, 1.0),
        hole=uniform(2, B), half_hole=cutout * cut)


# ---------------------------------------------------------- where recordings come from: toy data
#
# One of ten shapes turns and circles before the camera. Many unlabelled recordings in random poses
# and few labels are the setting in which pre-training helps.
TOY_SEED, TOY_SENSOR, TOY_TRAIN, TOY_TEST = 0, 32, 2000, 500


def list_toy():
    """List the toy data -> (recordings, classes, read, sensor), as load describes them."""
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
    event. Size, place, pose and turning do not depend on the class; the views of pre-training vary
    the first three. key: "toy:<seed>:<number>", of class number % 10; steps: of 1 ms.
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

def list_folder(folder, columns, only):
    """List the recordings of a folder -> (recordings, classes, read, None); name what is left out.

        FOLDER/Train|Test/<class>/<recording>
        FOLDER/<class>/<recording>             split by split_by_class
        FOLDER/<recording>                     one class: without labels, to pre-train only

    Raises UserError if there is no recording, OSError for a folder that cannot be read.
    """
    folder = Path(folder)
    paths = files_below(folder)
    shown = [f for f in paths if is_recording(f)]
    used = [f for f in shown if len(f.parts) == 3 and f.parts[0].lower() in ("train", "test")]
    if used:
        recordings = [(f.parts[0].lower(), f.parts[1], str(folder / f)) for f in used]
        recordings = [r for r in recordings if only in (None, r[0])]
    else:
        used = [f for f in shown if len(f.parts) == 2] or [f for f in shown if len(f.parts) == 1]
        if any(f.parts[0].lower() in ("train", "test") for f in used if len(f.parts) == 2):
            raise UserError(f"{folder}: Train and Test need a folder for each class, even for one")
        unsplit = [(f.parent.name or folder.name, str(folder / f)) for f in used]
        recordings = [(only, *r) for r in unsplit] if only else split_by_class(unsplit)

    if kinds := Counter(kind_of_unused(f) for f in set(paths) - set(used)):
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        print(f"{folder}: left out: {listed}")
    if not recordings:
        where = f" in {only.title()}" if used and only else ""
        raise UserError(f"{folder}: no recordings{where}: expected <class>/<recording> or "
                        f"Train|Test/<class>/<recording>, each {', '.join(READERS)}")
    train = {cls for split, cls, _ in recordings if split == "train"}
    test = {cls for split, cls, _ in recordings if split == "test"}
    stems = Counter(os.path.splitext(key)[0] for _, _, key in recordings)
    if twins := [stem for stem, n in stems.items() if n > 1]:
        print(f"warning: {len(twins)} recordings occur under two endings, as {twins[0]}.*")
    unpaired = sorted(train ^ test, key=natural_key)
    if unpaired and not only:
        print(f"warning: {folder}: not both to train and to test on: class {', '.join(unpaired)}")
    classes = sorted(train | test, key=natural_key)
    return recordings, classes, functools.partial(read_file, columns=columns), None


def files_below(folder):
    """List all files below a folder, and behind links there -> their paths in the folder."""
    def refuse(error):  # os.walk would pass over a folder that cannot be read
        raise error
    files = []
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        files += [Path(path, name).relative_to(folder) for name in names]
        here = Path(path).resolve()  # a link to a folder that holds it would never end
        folders[:] = [f for f in folders if (here / f).resolve() not in (here, *here.parents)]
    return files


def is_recording(f):
    """Tell whether a file is not hidden and has an ending of READERS; f: its path in the folder."""
    return f.suffix in READERS and not any(part[0] == "." for part in f.parts)


def kind_of_unused(f):
    """Name the kind of a file that is neither trained nor tested on; f: its path in the folder."""
    if hidden := [part for part in f.parts if part[0] == "."]:
        return f"hidden: {hidden[0]}"
    if f.suffix not in READERS:
        return f.suffix or f.name
    return f"in {f.parent}/" if len(f.parts) > 1 else "beside the folders"


def natural_key(name):
    """Make a sort key that counts: r2 before r10, and r1 and r01 always in the same order."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def split_by_class(recordings):
    """Split [(class, key)] -> [(split, class, key)] by nothing but the names.

    The last tenth of each class in natural order is for the test: rounded down, as in SpikingJelly,
    but at least one unless the class has a single recording.
    """
    keys_of, split = defaultdict(list), []
    for cls, key in recordings:
        keys_of[cls].append(key)
    for cls, keys in keys_of.items():
        n_train = len(keys) - max(len(keys) // 10, len(keys) > 1)
        keys.sort(key=natural_key)
        split += [("train" if i < n_train else "test", cls, key) for i, key in enumerate(keys)]
    return split


def read_file(path, columns=None):
    """Read a recording by the reader of its ending -> structured array with fields x, y, t, p."""
    ending = os.path.splitext(path)[1]
    if ending not in READERS:
        raise ValueError(f"no reader for {ending!r}, only for {', '.join(READERS)}")
    events = READERS[ending](path)
    if events.dtype.names:
        events.dtype.names = [FIELDS.get(name, name) for name in events.dtype.names]
    elif events.shape[1:] == (4,):
        if columns is None:
            raise ValueError("a plain [N, 4] array: pass its columns' order, as --columns xytp")
        events = np.rec.fromarrays(events.T, names=list(columns))
    return events


def read_atis(path):
    """Read the ATIS format of N-MNIST and N-Caltech101: 5 bytes an event, time in us."""
    import tonic  # here and below, because it takes two seconds
    if os.path.getsize(path) % 5:
        raise ValueError(f"truncated: {os.path.getsize(path)} bytes are not a multiple of 5")
    return tonic.io.read_mnist_file(path, np.dtype([(field, int) for field in "xytp"]))


def read_aedat4(path):
    """Read the first stream of events of an AEDAT4 file."""
    import tonic
    with open(path, "rb") as f:
        version = f.read(12)
    if version != b"#!AER-DAT4.0":
        raise ValueError(f"no AEDAT4 file: it begins with {version}")
    events = tonic.io.read_aedat4(path)
    events.dtype.names = "t", "x", "y", "p"
    return events


def read_npz(path):
    """Read arrays x, y, t and p, as SpikingJelly saves them; others are passed over."""
    with np.load(path) as file:
        names = {FIELDS.get(name, name): name for name in file}
        if not set("xytp") <= set(names):
            raise ValueError(f"expected arrays x, y, t and p, found {', '.join(file)}")
        return np.rec.fromarrays([file[names[field]] for field in "xytp"], names="x,y,t,p")


FIELDS = dict(ts="t", timestamp="t", timestamps="t", polarity="p", polarities="p")  # other names
READERS = {".bin": read_atis, ".aedat4": read_aedat4, ".npz": read_npz,
           ".npy": np.load}  # which refuses pickled objects


# ----------------------------------------------------- where recordings come from: public data

def read_ncaltech101(path):
    """Read a recording of N-Caltech101 and move it to the corner, as tonic does."""
    events = read_file(path)
    for side in "xy":
        events[side] -= events[side].min()
    return events


# tonic's class, sensor, number of recordings, reader, addresses to mend: those of figshare in
# tonic 1.7.0 answer with an empty file (tonic issues 329, 330); figshare's API has the same files.
# Other classes fit if their .data are paths and they have url, filename and md5.
FIGSHARE = "https://api.figshare.com/v2/file/download/"
TONIC_DATASETS = {
    "cifar10dvs": ("CIFAR10DVS", (128, 128), 10_000, read_file, dict(url=FIGSHARE + "38023437")),
    # Tonic stores plain [N, 4] arrays of x, y, p, ms.
    "dvsgesture": ("DVSGesture", (128, 128), 1_341, functools.partial(read_file, columns="xypt"),
                   dict(train_url=FIGSHARE + "38022171", test_url=FIGSHARE + "38020584")),
    # Recordings differ in size; this is the largest, and SpikingJelly's.
    "ncaltech101": ("NCALTECH101", (240, 180), 8_709, read_ncaltech101, {}),
    "nmnist": ("NMNIST", (34, 34), 70_000, read_file, {}),
}


def list_tonic(name, root):
    """List a public data set by tonic's class, which downloads, checks the md5 and extracts."""
    import tonic
    class_name, sensor, total, read, addresses = TONIC_DATASETS[name]
    tonic_class, folder = getattr(tonic.datasets, class_name), root / class_name
    for attribute, address in addresses.items():
        setattr(tonic_class, attribute, address)
    has_split = "train" in inspect.signature(tonic_class).parameters
    recordings = []
    for prefix in ("train_", "test_") if has_split else ("",):  # of tonic's attributes
        options = dict(train=prefix == "train_") if has_split else {}
        try:
            dataset = tonic_class(str(root), **options)
            if not dataset.data:  # N-Caltech101's archive holds another one, still packed
                inner = next(folder.rglob("Caltech101.zip"))
                tonic.download_utils.extract_archive(str(inner), str(folder))
                dataset = tonic_class(str(root), **options)
        except (Exception, SystemExit) as e:  # some of tonic's classes call exit()
            attributes = prefix + "url", prefix + "filename", (prefix or "file_") + "md5"
            url, file, md5 = (getattr(tonic_class, attribute) for attribute in attributes)
            raise UserError(f"{name} cannot be downloaded ({format_error(e)}): fetch {url} (md5 "
                            f"{md5}), put it at {folder / file}, run again")
        classes = list(getattr(dataset, "classes", sorted(set(dataset.targets))))
        recordings += [(prefix[:-1], target if isinstance(target, str) else classes[target], path)
                       for target, path in zip(dataset.targets, dataset.data)]
    if len(recordings) < total:
        print(f"warning: {len(recordings):,} of the {total:,} recordings of {name} are there; to "
              f"extract all again, remove the folders (not the archives) in {folder}")
    if not has_split:
        recordings = split_by_class([(cls, path) for _, cls, path in recordings])
    return recordings, classes, read, sensor
