"""Recordings of an event camera -> frames -> batches -> random views.

    events (x, y, t, p)  --to_frames-->  frames [T, 2, size, size]: counts, uint8 or int16
    a data set           --load-->       train, test: .frames [N, T, 2, size, size], cached
    a split              --batches-->    x float [T, B, 2, size, size], y int64 [B]
    x                    --augment-->    a random view of every recording

Polarity 0 is off (darker), 1 on (brighter). Data: `toy` (simulated), tonic's sets, or a folder.
Tests: python -m pytest test_all.py -k "data or own"
"""
import contextlib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import threading
from collections import Counter, namedtuple
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

# Defaults per data set: --dataset selects a row, a flag overrides one value (none for the _aug,
# explained in draw_view). Sources: [S] Spikformer's schedule for CIFAR10-DVS, less mixup and label
# smoothing, [N] NDA (Li et al. 2022), [E] github.com/myuansun/EventRPG, issue 1, [A] github.com/
# StephenTaylor1998/amazing-cls; the rest is chosen.
STRONG_AUG = dict(num_ops=3, flip=True, min_scale=0.5)  # [N], with crops; see draw_view
MILD_AUG = dict(num_ops=1, flip=True, min_scale=1.0)  # [N]
NO_FLIP_AUG = MILD_AUG | dict(flip=False)  # [E] for gestures, to pre-train and to fine-tune
# Every view is shifted, resized, rotated and sheared, but not flipped: left and right may differ.
AFFINE_AUG = dict(num_ops=4, flip=False, min_scale=0.6, max_scale=1.6, shift=0.08, rotation=25,
                  shear=0.25, cutout=0.0)
DEFAULTS = dict(
    n_frames=16, frames_by="count", image_size=128, arch="spikformer-2-256",  # [S]
    pretrain_epochs=200, momentum=0.999,  # [A]
    epochs=106, lr=1e-3, weight_decay=0.06, batch_size=16,  # [S]
    pretrain_lr=1e-3, queue_size=4096, temperature=0.1, alpha=0.5, beta=0.5,
    pretrain_aug=STRONG_AUG, finetune_aug=MILD_AUG, crop_time=1.0,  # 1: a view shows all of it
    split_events=False, labels_per_class=0)  # True: the two views share no event; 0: all labels
# Chosen on held-back training recordings of N-MNIST and gestures; see docs/experiments.md.
REAL = dict(pretrain_lr=2e-3, pretrain_aug=AFFINE_AUG, split_events=True, crop_time=0.5,
            momentum=0.99, finetune_aug=NO_FLIP_AUG)
DATASETS = {
    "toy": DEFAULTS | dict(
        n_frames=4, image_size=16, labels_per_class=2, arch="spikformer-1-64", pretrain_epochs=30,
        queue_size=128, momentum=0.99, temperature=0.4, epochs=100, lr=1e-4, batch_size=32),
    "cifar10dvs": DEFAULTS,
    "dvsgesture": DEFAULTS | dict(
        pretrain_aug=NO_FLIP_AUG, finetune_aug=NO_FLIP_AUG, crop_time=0.5, queue_size=512),
    "ncaltech101": DEFAULTS | dict(arch="sew-resnet-18"),  # the paper's best backbone there
    "nmnist": DEFAULTS | REAL | dict(
        n_frames=10, image_size=34, pretrain_epochs=20, epochs=20, batch_size=128)}
FOLDER_DEFAULTS = DEFAULTS | REAL | dict(
    n_frames=4, image_size=None,  # None: the sensor's
    arch="spikformer-1-64", pretrain_epochs=60, queue_size=512, epochs=100, lr=2e-3, batch_size=32)

# frames [N, T, 2, size, size], labels int64 [N], classes: their names, sensor: [width, height],
# names: "<folder>/<file>" of each recording, ids int64 [N]: recording_id of each
Split = namedtuple("Split", "frames labels classes sensor names ids")


class UserError(Exception):
    """A mistake that the user can correct; its text says what is wrong, where, and what to do."""


def load(name, root="data", n_frames=None, size=None, skip_broken=False, sensor=None,
         frames_by="count", columns=None, only=None):
    """Load a data set -> (train, test), each a Split. Raises UserError.

    name: a key of DATASETS, downloaded into root if missing, or a folder: see list_folder. n_frames
    and size (pixels): by default its row's; a folder's size is its sensor's longer side, but 8 to
    128. sensor: (W, H) in pixels, of recordings that do not name it. skip_broken leaves out those
    that cannot be read. columns: of plain [N, 4] arrays, as "xytp". only: "train" or "test", that
    part of a folder, or all of one that has neither. Frames are made once, by processes that import
    your script, so call this under `if __name__ == "__main__":`.
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
    class_index = {cls: i for i, cls in enumerate(classes)}
    recordings.sort(key=lambda r: (r[0] == "test", class_index[r[1]], natural_key(r[2])))
    sensor = list(known_sensor or sensor or (0, 0))
    settings = dict(
        n_frames=n_frames or config["n_frames"], sensor_size=sensor, frames_by=frames_by,
        size=size or config["image_size"] or min(128, max(8, *sensor)))
    if sensor == [0, 0]:  # all events are outside of it, and the error says how far they reach
        *_, hint = try_recording(recordings[0][2], read, settings)
        raise UserError(f"{name}: pass --sensor W H in pixels (the first recording: {hint})")
    # in NumPy's format; called .npy, it would be a recording, where root is a folder of them
    path = root / "frames" / f"{Path(name).name}-{cache_key(recordings, read, settings)}.frames"
    frames, about = read_cache(path) or make_frames(path, recordings, read, settings)
    for warning in about["warnings"]:
        print(f"warning: {warning}")
    report_broken(about["broken"], len(recordings), skip_broken)
    recordings = [r for r in recordings if r[2] not in about["broken"]]
    labels = np.array([class_index[cls] for _, cls, _ in recordings], np.int64)
    names = np.array(["/".join(Path(key).parts[-2:]) for _, _, key in recordings])
    both = Split(frames[: len(names)], labels, classes, sensor, names, np.array(about["ids"]))
    n = sum(split == "train" for split, _, _ in recordings)
    for part in ("train", "test") if only is None else (only,):
        present = {cls for split, cls, _ in recordings if split == part}
        if not present:
            raise UserError(f"{name}: no recordings to {part} on")
        if absent := [cls for cls in classes if cls not in present]:
            print(f"warning: {name}: no recordings to {part} on of class {', '.join(absent)}")
    return select(both, slice(None, n)), select(both, slice(n, None))


def select(split, index):
    """Keep the recordings of a split at index: a slice, a list of numbers, or a mask."""
    kept = {field: getattr(split, field)[index] for field in ("frames", "labels", "names", "ids")}
    return split._replace(**kept)


def leave_out(split, ids, why):
    """Warn of the recordings of a split that are among ids -> the others, copied into memory."""
    known = np.isin(split.ids, ids)
    if known.any():
        print(f"warning: {known.sum()} of {len(known)} recordings {why}")
        split = select(split, ~known)
    return split


def warn_of_other_frames(what, found, expected):
    """Print which flags that frames depend on differ between two dicts of flags."""
    names = "sensor", "frames_by", "n_frames", "image_size"
    differ = [f"{name} {found[name]}, not {expected[name]}" for name in names
              if name in found and found[name] != expected[name]]
    if differ:
        print(f"warning: {what}: {'; '.join(differ)}")


def resolve(name):
    """Return a data set's name as it is, a folder's as an absolute path: "./toy" is a folder."""
    return name if name in DATASETS else os.path.abspath(os.path.expanduser(name))


def default_config(name):
    """Return the row of DATASETS, or FOLDER_DEFAULTS for a folder. Raises UserError otherwise."""
    if name not in DATASETS and not os.path.isdir(name):
        raise UserError(f"{name}: neither a folder nor one of {', '.join(DATASETS)}")
    return DATASETS.get(name, FOLDER_DEFAULTS)


# ------------------------------------------------------------------------------- events to frames

def to_frames(events, n_frames, sensor_size, size, frames_by="count"):
    """Count the events of a recording -> [n_frames, 2, size, size], uint8 or, past 255, int16.

    events: structured array with fields x, y (pixels), t (any unit) and p (on above 0, else off);
    sensor_size: (W, H) pixels. Each frame has equally many events or, if frames_by is "time", lasts
    equally long; the last one takes the remainder too (as in SpikingJelly). A pixel of the frame
    sums the sensor's pixels in it, to 32,767 at most. Raises ValueError for events off the sensor.
    """
    (width, height), n, on = sensor_size, len(events), events["p"] > 0
    x, y, t = (np.ascontiguousarray(events[f]) for f in "xyt")  # interleaved fields are slow
    if (t[1:] < t[:-1]).any():
        order = np.argsort(t, kind="stable")
        x, y, t, on = x[order], y[order], t[order], on[order]
    if n and not (0 <= x.min() and x.max() < width and 0 <= y.min() and y.max() < height):
        raise ValueError(f"events outside the sensor of {width} x {height} pixels: "
                         f"x {x.min()} to {x.max()}, y {y.min()} to {y.max()}")
    x, y = x.astype(np.int32), y.astype(np.int32)
    if (width, height) != (size, size):
        x, y = x * size // width, y * size // height
    pixel = (on * np.int32(size) + y) * size + x  # in a flattened [2, size, size]
    if frames_by == "time" and n:
        t = t - t[0]  # small, because uint64 becomes float64 in the product below
        # Whole units of time, as in SpikingJelly; but 1.5 s // 4 would be 0 s.
        duration = t[-1] // n_frames if t.dtype.kind in "iu" else t[-1] / n_frames
        starts = np.searchsorted(t, duration * np.arange(n_frames))
    else:
        starts = np.arange(n_frames) * (n // n_frames)
    frames = np.empty((n_frames, 2 * size * size), np.int16)
    for frame, part in zip(frames, np.split(pixel, starts[1:])):
        frame[:] = np.bincount(part, minlength=len(frame)).clip(max=32767)
    frames = frames.reshape(n_frames, 2, size, size)
    return frames if frames.max() > 255 else frames.astype(np.uint8)


def recording_id(events):
    """Hash what a recording holds -> int64, whatever its name, folder, format, T and size.

    All (x, y, p), from its corner, and sorted, as copies differ in their order. Never change it.
    """
    x, y = ((events[axis] - events[axis].min()).astype(np.uint32) for axis in "xy")
    code = x << 17 | y << 1  # 15 bits of x, 16 of y, 1 of p
    code = np.sort(code | (events["p"] > 0)).astype("<u4")
    digest = hashlib.blake2b(code.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def validate_events(events):
    """Return the events of a recording, or raise ValueError for what no event camera writes."""
    if events.ndim != 1 or not {"x", "y", "t", "p"} <= set(events.dtype.names or ()):
        raise ValueError(f"expected one dimension and fields x, y, t, p, found {events.dtype}")
    if len(events) == 0:
        raise ValueError("holds no event")
    if (events["x"] % 1 != 0).any() or (events["y"] % 1 != 0).any():  # also of NaN
        raise ValueError("x and y must be whole numbers of pixels")
    p = events["p"]
    if not (((p == 0) | (p == 1)).all() or ((p == -1) | (p == 1)).all()):
        found = np.unique(p)
        remedy = ": store p == 2" if list(found) == [1, 2] else ""
        raise ValueError(f"polarities {' and '.join(map(str, found[:4]))}{remedy}")
    # A little out of order is usual, and to_frames sorts it; more is a reset clock or wrong bytes.
    t = (events["t"] + 0).astype(np.float64)  # a time is no string
    back, duration = (np.maximum.accumulate(t) - t).max(), t.max() - t.min()
    if not back <= 0.01 * duration:  # also of NaN
        raise ValueError(f"time runs backwards, by {back:g} of {duration:g}")
    return events


def format_error(e):
    """Write an exception on one line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


# --------------------------------------------------------------- frames of all recordings, cached
NOT_OPENED = "cannot be opened: "  # recordings with this error are tried again, once they can be


def cache_key(recordings, read, settings):
    """Hash what frames depend on: names, splits, sizes, times, settings, code that makes them."""
    files = [os.stat(key) for _, _, key in recordings if os.path.exists(key)]
    stats = [(f.st_size, f.st_mtime_ns) for f in files]
    endings = sorted({ending_of(key) for _, _, key in recordings} & set(READERS))
    functions = [getattr(read, "func", read), read_file, *(READERS[e] for e in endings),
                 toy_outlines, validate_events, to_frames]
    code = [inspect.getsource(f) if inspect.isfunction(f) else repr(f) for f in functions]
    made_from = [recordings, stats, settings, code, FIELDS, getattr(read, "keywords", None)]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]


def read_cache(path):
    """Read what make_frames returned; None if it is missing, cut short, or to be made again."""
    try:
        frames = np.load(path, mmap_mode="c")  # "c", because torch wants memory it could write to
        about = json.loads(path.with_suffix(".json").read_text())
        frames[:0], about["ids"], about["warnings"]  # or it is another file
        closed = [key for key, why in about["broken"].items() if why.startswith(NOT_OPENED)]
    except Exception:  # there is no list of all that a damaged file may raise
        return None
    return None if any(os.access(key, os.R_OK) for key in closed) else (frames, about)


def make_frames(path, recordings, read, settings, dtype=np.uint8):
    """Make and cache the frames of all recordings -> (frames [N, T, 2, size, size], about).

    about: ids, the recording_id of each row; broken, {key: what is wrong}, without a row; warnings.
    """
    path.with_suffix(".json").unlink(missing_ok=True)  # it may be of other frames
    T, size, dtype = settings["n_frames"], settings["size"], np.dtype(dtype)
    shape, keys = (len(recordings), T, 2, size, size), [key for _, _, key in recordings]
    about, notes = dict(ids=[], broken={}), Counter()  # notes: how many recordings are how
    try:
        with new_file(path) as f:
            header = dict(descr=dtype.str, fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(f, header)
            for _, counts, id_ in map_recordings(keys, read, settings, about["broken"]):
                if counts.itemsize > dtype.itemsize:
                    raise OverflowError("a count above 255")
                f.write(counts.astype(dtype).tobytes())
                about["ids"].append(id_)
                sizes = counts.sum((1, 2, 3), dtype=int)  # [T]: events of each frame
                notes[f"fewer events than the {T} frames"] += sizes.sum() < T
                notes["32,767 events or more in a pixel: cut there"] += counts.max() == 32767
                crowded = settings["frames_by"] == "time" and sizes.max() > 0.9 * sizes.sum()
                notes[f"nearly all events in one frame of {T}"] += crowded and T > 1
            # zeros at the end, which load drops, make up the shape: a row a broken recording
            f.truncate(f.tell() + len(about["broken"]) * math.prod(shape[1:]) * dtype.itemsize)
    except OverflowError:  # begin again, with room for larger counts
        return make_frames(path, recordings, read, settings, np.int16)
    about["warnings"] = [f"{n} recordings with {what}" for what, n in notes.items() if n]
    write_json(path.with_suffix(".json"), about)  # last: without it, the frames do not count
    return np.load(path, mmap_mode="c"), about


def map_recordings(keys, read, settings, broken):
    """Yield (key, frames, id) of what can be read, in order, by all cores; broken gets the rest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = DataLoader(
        keys, batch_size=None, num_workers=min(cores, len(keys)), worker_init_fn=end_with_parent,
        collate_fn=partial(try_recording, read=read, settings=settings),
        generator=torch.Generator())  # its own, or later draws depend on whether frames are cached
    try:
        for key, frames, id_, error in tqdm(loader, "recordings", disable=None):
            if error:
                broken[key] = error
            else:
                yield key, frames, id_
    except RuntimeError:
        raise UserError("a process that reads recordings was killed (out of memory?) or did not "
                        "start (data.load outside of a script's if __name__ == '__main__':)")


def end_with_parent(worker):
    """End a worker process when its parent ends, even by kill -9."""
    threading.Thread(target=lambda: os._exit(parent_process().join() or 1), daemon=True).start()


def try_recording(key, read, settings):
    """Make the frames of a recording -> (key, frames, recording_id, what is wrong, or "")."""
    try:
        events = validate_events(read(key))
        return key, to_frames(events, **settings), recording_id(events), ""
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # decoders in Rust raise PanicException, which is no Exception
        opened = not isinstance(e, (OSError, MemoryError))
        return key, None, None, ("" if opened else NOT_OPENED) + format_error(e)


def report_broken(broken, total, skip_broken):
    """Raise UserError with what is broken, {key: why}; or, if skip_broken, only print it."""
    if broken:
        remedy = "left out" if skip_broken else "remove them or pass --skip-broken"
        lines = [f"{key}: {why}" for key, why in broken.items()][:20] + ["..."] * (len(broken) > 20)
        text = "\n  ".join([f"{len(broken)} of {total} recordings are broken: {remedy}", *lines])
        if len(broken) == total or not skip_broken:
            raise UserError(text)
        print(f"warning: {text}")


@contextlib.contextmanager
def new_file(path):
    """Open a file that gets the name path when it is complete, and has a random one until then."""
    part = f"{path}.{os.urandom(8).hex()}.part"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # or a crash of the machine could leave the name without content
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def write_json(path, content):
    """Write a JSON file, all of it or nothing; NaN, which JSON lacks, becomes null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with new_file(path) as f:
        f.write(json.dumps(content).encode())


# ------------------------------------------------------------------------------ batches and views

def batches(split, batch_size, device="cpu", shuffle=False, generator=None, rank=0, world_size=1):
    """Yield recordings, each once: (x float [T, B, 2, H, W], y int64 [B]) on device.

    shuffle draws the order from generator. Of world_size processes with equal generators, each
    gets every world_size-th recording; up to world_size - 1 are left out to keep shares equal.
    """
    frames, labels = torch.as_tensor(split.frames), torch.as_tensor(split.labels)
    n = len(labels)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    order = order[: n - n % world_size][rank::world_size]
    # Batches are as equal as possible, because a small last one would upset batch norm.
    for index in order.tensor_split(math.ceil(len(order) / (batch_size // world_size))):
        x, y = frames[index], labels[index]  # integers [B, T, 2, H, W], [B]
        if torch.device(device).type == "cuda":  # copied while the GPU is at work
            x, y = (z.pin_memory().to(device, non_blocking=True) for z in (x, y))
        yield x.to(device).transpose(0, 1).contiguous().float(), y.to(device)  # [T, B, 2, H, W]


def split_events(x):
    """Deal the events of x [T, B, 2, H, W] at random to two halves, so that they share no noise."""
    half = torch.binomial(x, torch.full_like(x, 0.5))
    return half, x - half


def crop_time(x, shortest):
    """Spread a random part of every recording over all T frames: x [T, B, 2, H, W] -> same shape.

    It lasts shortest to 1 times the recording. A frame of the view sums what it overlaps of
    each frame of x, as if its events were evenly spread, so half a recording has half the events.
    """
    if shortest == 1:
        return x
    T, B = x.shape[:2]
    length = 1 - (1 - shortest) * torch.rand(B, device=x.device)
    begin = (1 - length) * torch.rand(B, device=x.device)
    t = torch.arange(T + 1, device=x.device)[:, None]  # [T + 1, 1]
    cuts = T * begin + length * t  # [T + 1, B]: ends of the view's frames, in frames of x
    before = (cuts[:, None] - t[:-1]).clamp(0, 1)  # [T + 1, T, B]: the share of x[t] before a cut
    share = before.diff(dim=0)  # [T, T, B]: of frame t of x in frame v of the view
    with torch.autocast(x.device.type, enabled=False):  # bf16 would round the counts
        return torch.einsum("vtb,tbchw->vbchw", share, x)  # [T, B, 2, H, W]


def augment(x, **ranges):
    """Draw a random view of every recording: x [T, B, 2, H, H] -> the same shape.

    All its time steps and both polarities share one; ranges: see draw_view. Order: flip, shear,
    crop with shift, rotation, hole. All but the hole are a matrix: pixel (u, v) of the view shows
    the image's pixel nearest to theta @ (u, v, 1), else 0. u runs right, v down, edges at -1 and 1.
    """
    T, B, C, H, _ = x.shape
    draw = draw_view(B, x.device, **ranges)
    # backwards, from the view to the crop: rotation, size, place; on to the image: shear, flip
    cos, sin = draw["side"] * draw["angle"].cos(), draw["side"] * draw["angle"].sin()
    row_u = torch.stack([cos, -sin, draw["centre"][0]])  # [3, B]
    row_v = torch.stack([sin, cos, draw["centre"][1]])
    row_u = draw["mirror"] * (row_u + draw["shear"] * row_v)
    theta = torch.stack([row_u, row_v]).permute(2, 0, 1)  # [B, 2, 3]
    with torch.autocast(x.device.type, enabled=False):  # bf16 would be wrong by half a pixel
        grid = F.affine_grid(theta, [B, 1, H, H], align_corners=False)  # [B, H, H, 2]
    images = x.transpose(0, 1).flatten(1, 2)  # [B, T*2, H, H]
    views = F.grid_sample(images, grid, mode="nearest", align_corners=False)  # [B, T*2, H, H]
    middle = (2 * torch.arange(H, device=x.device) + 1) / H - 1  # of each pixel, from -1 to 1
    far_u, far_v = (middle - draw["hole"][..., None]).abs() >= draw["half_hole"][:, None]  # [B, H]
    views = views * (far_u[:, None] | far_v[:, :, None])[:, None]  # 0 in the hole
    return views.unflatten(1, (T, C)).transpose(0, 1)  # [T, B, 2, H, H]


def draw_view(B, device, num_ops=3, flip=True, min_scale=0.5, max_scale=1.0, shift=0.04,
              rotation=30, shear=0.3, cutout=0.125):
    """Draw the parameters of B views -> dict of tensors [B], or [2, B] (x and y).

    NDA's operations (Li et al. 2022; defaults: its ranges at magnitude 2, 128 pixels) and a crop.
    flip: mirror, p 0.5. min_scale, max_scale: the crop's share of the image's area, stretched to
    the view (above 1: the image shrinks). Then num_ops of four, drawn for each view: shift of the
    crop in sides of the image (what leaves is lost; in NDA it enters again); rotation in degrees;
    shear in columns per row; cutout, a square hole in sides of the view.
    """
    def uniform(*size):  # in [-1, 1)
        return torch.rand(*size, device=device) * 2 - 1
    # Each view draws a random order of 0 to 3; an operation is used if its number is below num_ops.
    shifted, rotated, sheared, cut = torch.rand(4, B, device=device).argsort(0) < num_ops  # [B]
    side = (min_scale + torch.rand(B, device=device) * (max_scale - min_scale)).sqrt()
    return dict(
        side=side,  # of the crop, by the image's
        centre=(1 - side) * uniform(2, B) + 2 * shift * shifted * uniform(2, B),  # of the crop
        angle=math.radians(rotation) * rotated * uniform(B), shear=shear * sheared * uniform(B),
        mirror=torch.where(torch.rand(B, device=device) < 0.5 * flip, -1.0, 1.0),
        hole=uniform(2, B), half_hole=cutout * cut)


# ------------------------------------ where recordings come from: toy data, a folder, public data
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
        "cross": np.maximum(box(1, 0.25), box(0.25, 1)), "trefoil": 0.6 + 0.4 * np.cos(3 * a),
        "star": 0.65 + 0.35 * np.cos(5 * a), "half disc": np.where(a < np.pi, 1, 0.05),
        "wedge": np.where(a < 1.5 * np.pi, 0.9, 0.1), "drop": 0.35 + 0.65 * np.cos(a / 2) ** 14}


def simulate_toy(key, steps=32, threshold=0.25):
    """Simulate one recording -> events, a structured array (x, y in pixels, t in us, p).

    A shape turns and circles before the camera; a pixel fires when its log brightness has changed
    by threshold since its last event. Size, place, pose and turning do not depend on the class;
    views vary the first three. steps: of 1 ms. key: "toy:<seed>:<number>", of class number % 10.
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
    for step, brightness in enumerate(log_brightness[1:]):
        count = np.trunc((brightness - level) / threshold).astype(int)  # [H, W], below 0: off
        level += count * threshold
        count += rng.choice([-1, 0, 1], count.shape, p=[0.0005, 0.999, 0.0005])  # sensor noise
        ys, xs = np.repeat(np.nonzero(count), abs(count[count != 0]), axis=1)
        t, p = (step + rng.random(len(xs))) * 1000, count[ys, xs] > 0
        events.append(np.rec.fromarrays([xs, ys, t, p], names="x,y,t,p"))
    events = np.concatenate(events)
    return events[np.argsort(events["t"], kind="stable")]


def list_folder(folder, columns, only):
    """List the recordings of a folder -> (recordings, classes, read, the sensor that they name).

    Raises UserError if there is no recording, OSError for a folder that cannot be read. Layouts:
        FOLDER/Train|Test/<class>/<recording>
        FOLDER/<class>/<recording>             split by split_by_class
        FOLDER/<recording>                     one class: without labels, to pre-train only
    """
    found = find_recordings(folder)  # ("Train", class, file), (class, file) or (file,)
    presplit = [f for f in found if len(f) == 3 and f[0].lower() in ("train", "test")]
    used = presplit or [f for f in found if len(f) == 2] or [f for f in found if len(f) == 1]
    if unused := Counter(os.path.join(folder, *f[:-1]) for f in set(found) - set(used)):
        print("left out:", ", ".join(f"{n} in {place}" for place, n in sorted(unused.items())))
    recordings = [((os.path.basename(folder), *f)[-2], os.path.join(folder, *f)) for f in used]
    if not presplit and {f[0].lower() for f in used if len(f) == 2} & {"train", "test"}:
        raise UserError(f"{folder}: Train and Test need a folder for each class, even for one")
    if presplit:
        recordings = [(f[0].lower(), *r) for f, r in zip(presplit, recordings)
                      if only in (None, f[0].lower())]
    else:
        recordings = [(only, *r) for r in recordings] if only else split_by_class(recordings)
    if not recordings:
        raise UserError(f"{folder}: no recordings to {only or 'train'} on: expected <class>/"
                        f"<recording> or Train|Test/<class>/<recording>, each {', '.join(READERS)}")
    classes = sorted({cls for _, cls, _ in recordings}, key=natural_key)
    read = partial(read_file, columns=columns)
    return recordings, classes, read, named_sensor([key for _, _, key in recordings])


def find_recordings(folder):
    """Find recordings below a folder, also by links -> path parts in it; print what is left out."""
    def refuse(error):  # os.walk would pass over a folder that cannot be read
        raise error
    found, counts = [], Counter()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here, below = Path(path).resolve(), Path(path).relative_to(folder).parts
        counts["hidden"] += sum(f[0] == "." for f in folders)
        # a link to a folder that holds it would list its recordings again and again
        folders[:] = [f for f in folders
                      if f[0] != "." and (here / f).resolve() not in (here, *here.parents)]
        kinds = ["hidden" if name[0] == "." else ending_of(name) or "no ending" for name in names]
        counts.update(kinds)
        found += [(*below, name) for name, kind in zip(names, kinds) if kind in READERS]
        counts[f"without a recording: {Path(*below)}"] += not (folders or READERS.keys() & kinds)
    if rest := [f"{n} {kind}" for kind, n in sorted(counts.items()) if n and kind not in READERS]:
        print(f"{folder}: left out: {', '.join(rest)}")
    return found


def ending_of(path):
    """Return a path's ending as READERS has it: .NPY is .npy."""
    return os.path.splitext(path)[1].lower()


def natural_key(name):
    """Make a sort key that counts: r2 before r10, and r1 and r01 always in the same order."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)], name


def split_by_class(recordings):
    """Split [(class, key)] -> [(split, class, key)]: the last tenth of a class is the test."""
    split, recordings = [], sorted(recordings, key=lambda r: (r[0], natural_key(r[1])))
    for cls, group in itertools.groupby(recordings, key=lambda r: r[0]):
        keys = [key for _, key in group]
        # in natural order; rounded down, as in SpikingJelly, but at least one of two recordings
        n_train = len(keys) - max(len(keys) // 10, len(keys) > 1)
        split += [("train" if i < n_train else "test", cls, key) for i, key in enumerate(keys)]
    return split


def read_file(path, columns=None):
    """Read a recording by the reader of its ending -> structured array with fields x, y, t, p.

    columns: of a plain [N, 4] array, as "xytp".
    """
    if ending_of(path) not in READERS:
        raise ValueError(f"no reader for {path}, only for {', '.join(READERS)}")
    events = READERS[ending_of(path)](path)
    if events.dtype.names:
        events.dtype.names = [FIELDS.get(name, name) for name in events.dtype.names]
    elif events.shape[1:] == (4,):
        if columns is None:
            raise ValueError("a plain [N, 4] array: pass its columns' order, as --columns xytp")
        events = np.rec.fromarrays(events.T, names=list(columns))
    return events


def named_sensor(paths):
    """Return the [W, H] that .aedat4 files name, or None. Raises UserError where they differ."""
    found = Counter()
    for path in [path for path in paths if ending_of(path) == ".aedat4"]:
        import aedat
        try:
            streams = aedat.Decoder(path).id_to_stream()
            first = min(i for i, stream in streams.items() if stream["type"] == "events")
            found[streams[first]["width"], streams[first]["height"]] += 1
        except KeyboardInterrupt:
            raise
        except BaseException:  # panics of Rust, too; reading will tell
            pass
    if len(found) > 1:
        sizes = ", ".join(f"{w} x {h} ({n} recordings)" for (w, h), n in found.most_common())
        raise UserError(f"recordings name different sensors: {sizes}")
    return next(map(list, found), None)


def read_atis(path):
    """Read the ATIS format of N-MNIST and N-Caltech101: 5 bytes an event, time in us."""
    import tonic  # here and below, because it takes two seconds
    if os.path.getsize(path) % 5:
        raise ValueError(f"truncated: {os.path.getsize(path)} bytes are not a multiple of 5")
    return tonic.io.read_mnist_file(path, np.dtype([(field, int) for field in "xytp"]))


def read_aedat4(path):
    """Read the first stream of events of an AEDAT4 file."""
    import tonic
    open(path, "rb").close()  # an OSError where it cannot be opened; tonic's is another one
    events = tonic.io.read_aedat4(path)
    events.dtype.names = "t", "x", "y", "p"
    return events


def read_npz(path):
    """Read arrays x, y, t and p, as SpikingJelly saves them, or of other names: see FIELDS."""
    with np.load(path) as file:
        names = {FIELDS.get(name, name): name for name in sorted(file, key="xytp".count)}
        if not set("xytp") <= set(names):
            raise ValueError(f"expected arrays x, y, t and p, found {', '.join(file)}")
        return np.rec.fromarrays([file[names[field]] for field in "xytp"], names="x,y,t,p")


COLUMNS = ["".join(order) for order in itertools.permutations("xytp")]
FIELDS = dict(ts="t", timestamp="t", timestamps="t", polarity="p", polarities="p")  # other names
READERS = {".bin": read_atis, ".aedat4": read_aedat4, ".npz": read_npz, ".npy": np.load}

# tonic's class (its .data are paths, and it has url, filename, md5), sensor, number of recordings,
# reader, and addresses to mend: tonic 1.7.0's answer with an empty file (tonic issues 329, 330).
FIGSHARE = "https://api.figshare.com/v2/file/download/"
TONIC_DATASETS = {
    "cifar10dvs": ("CIFAR10DVS", (128, 128), 10_000, read_file, dict(url=FIGSHARE + "38023437")),
    # Tonic stores plain [N, 4] arrays of x, y, p, ms.
    "dvsgesture": ("DVSGesture", (128, 128), 1_341, partial(read_file, columns="xypt"),
                   dict(train_url=FIGSHARE + "38022171", test_url=FIGSHARE + "38020584")),
    "ncaltech101": ("NCALTECH101", (240, 180), 8_709, read_file, {}),  # the largest of its sizes
    "nmnist": ("NMNIST", (34, 34), 70_000, read_file, {})}


def list_tonic(name, root):
    """List a public data set by tonic's class, which downloads, checks the md5 and extracts."""
    import tonic
    class_name, sensor, total, read, addresses = TONIC_DATASETS[name]
    tonic_class, folder, recordings = getattr(tonic.datasets, class_name), root / class_name, []
    for attribute, address in addresses.items():
        setattr(tonic_class, attribute, address)
    has_split = "train" in inspect.signature(tonic_class).parameters
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
