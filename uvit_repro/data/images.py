"""Images as one uint8 set with a checksum of its content; batches as a function of (seed, step)."""

import hashlib
import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import (
    CONTENT,
    DATASETS,
    PATHS,
    DataConfig,
    Experiment,
    ParameterError,
    data_root,
    key_seed,
    resolve_name,
)
from uvit_repro.data.files import printable


@dataclass(eq=False, repr=False)
class Data:
    "A data set, opened. Objects are shared between callers: do not write into them."

    name: str  # a key of DATASETS
    train_images: Tensor | None  # uint8 (N, C, H, W); None: read through `inputs`
    train_labels: Tensor  # int64 (N,); zeros when unlabelled
    test_images: Tensor  # uint8 (M, C, H, W), M may be 0
    test_labels: Tensor  # int64 (M,)
    num_classes: int  # labels are 0..num_classes-1; 0: unlabelled
    class_names: list[str]  # one for each class
    sha256: str  # checksum of the content, whatever path it came from
    notes: list[str] = field(default_factory=list)  # `kind: file (detail)`; see `summary`
    inputs: object = None  # large or latent sets: read(index, mirror) gives pixels or moments
    test_inputs: Tensor | None = None  # held-out images as the network sees them; None: pixels
    decode: object = None  # function of latents (B, C, h, w) and a decoder's name; gives pixels
    texts: object = None  # captions: read(index, u), test(index), prompts(n), prompt(i), null
    pixels_sha256: str = ""  # checksum of the pixels, where `sha256` is that of their latents
    judge: object = None  # function from samples in the order of `prompts` to statistics

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.test_images.shape[1:])

    def __len__(self) -> int:
        return len(self.train_labels)

    def __repr__(self):
        return (
            f"Data {self.name}: {len(self)} training images, {len(self.test_labels)} held out, "
            f"shape {self.shape}, {self.num_classes or 'no'} classes, checksum {self.sha256[:12]}"
        )


# ---------------------------------------------------------------- pictures
def to_model(
    u8: Tensor,  # uint8 images, any shape
) -> Tensor:  # float32 in [-1, 1]
    "Scale pixels for the network: x/127.5 - 1."
    return u8.float() / 127.5 - 1


def to_uint8(
    x: Tensor,  # images in [-1, 1], values outside are clamped
) -> Tensor:  # uint8
    "Samples as pixels: clamp, scale, round."
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(
    u8,  # uint8 images (N, C, H, W), tensor or array, C 1 or 3
    nrow: int,  # images in a row
    pad: int = 1,  # white pixels between images
    scale: int = 1,  # each pixel becomes scale x scale
) -> np.ndarray:  # uint8 (H, W, 3)
    "Images side by side, row by row."
    u8 = u8.detach().cpu().numpy() if isinstance(u8, Tensor) else np.asarray(u8)
    if u8.dtype != np.uint8 or u8.ndim != 4 or u8.shape[1] not in (1, 3):
        found = f"{u8.dtype} of shape {u8.shape}"
        raise ValueError(f"image_grid takes uint8 (N, 1 or 3, H, W), got {found}; see to_uint8")
    n, _, h, w = u8.shape
    rows = math.ceil(n / nrow)
    grid = np.full((rows * (h + pad) + pad, nrow * (w + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(u8):
        y, x = (i // nrow) * (h + pad) + pad, (i % nrow) * (w + pad) + pad
        grid[y : y + h, x : x + w] = image.transpose(1, 2, 0)
    return grid.repeat(scale, 0).repeat(scale, 1)


def show_images(
    u8,  # uint8 images (N, C, H, W)
    nrow: int,  # images in a row
    ax=None,  # axes to draw on; None: new ones
    title=None,  # above the picture
):  # the axes
    "Draw a grid of images without axes."
    import matplotlib.pyplot as plt

    grid = image_grid(u8, nrow)
    if ax is None:
        width = min(12, 0.6 * nrow)
        ax = plt.subplots(figsize=(width, width * grid.shape[0] / grid.shape[1]))[1]
    ax.imshow(grid, interpolation="nearest")
    ax.set_axis_off()
    if title:
        ax.set_title(title, fontsize=10)
    return ax


# ---------------------------------------------------------------- order, checksum, split
def canonical(
    images: np.ndarray,  # uint8 (N, H, W, C)
    labels: np.ndarray,  # integers (N,)
) -> tuple[np.ndarray, np.ndarray]:  # the same, sorted by (label, pixel bytes)
    "The canonical order of a labelled set of images: independent of the order given."
    images, labels = np.ascontiguousarray(images), np.asarray(labels)
    keys = [(y, image.tobytes()) for y, image in zip(labels.tolist(), images, strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return images[order], labels[order]


def ordered_sum(
    *splits,  # (images uint8 (N, H, W, C), labels (N,)) in canonical order, for each split
) -> str:  # hexadecimal
    "The sha256 of a data set's content: shape, labels and pixels of each split."
    h = hashlib.sha256()
    for images, labels in splits:
        h.update(str(images.shape).encode())
        h.update(labels.astype("<i8").tobytes())
        h.update(images.tobytes())
    return h.hexdigest()


def check_content(name: str, sha256: str, source: str):
    "Raise when a named set is not what its name promises."
    if sha256 != CONTENT[name]:
        text = f"what was read from {source} is not {name}: its checksum is {sha256}"
        raise ValueError(f"{text}, expected {CONTENT[name]}. Remove it and get it again")


def hold_out(
    labels,  # integers (N,), in canonical order
    n: int,  # images to keep from training, below N
    sha256: str,  # checksum of the content: the key of the permutation
) -> tuple[Tensor, Tensor]:  # indices of training and of held-out images, both ascending
    "Split by class in proportion (largest remainder), keyed by content and not by the run's seed."
    labels = np.asarray(labels)
    N = len(labels)
    if n >= N:
        raise ParameterError(f"holdout = {n}: of {N} images at most {N - 1} can be held out")
    classes, where, counts = np.unique(labels, return_inverse=True, return_counts=True)
    take, rest = counts * n // N, counts * n % N
    take[np.argsort(-rest, kind="stable")[: n - take.sum()]] += 1
    order = torch.randperm(N, generator=_generator("holdout", sha256)).numpy()
    held = np.zeros(N, bool)
    for c in range(len(classes)):
        held[order[where[order] == c][: take[c]]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))


def check_size(what: str, shape: tuple, cfg: DataConfig, own_test_split=False):
    "Raise `ParameterError` when images (H, W, C) are not what the configuration says."
    h, w, c = shape
    if own_test_split and cfg.holdout:
        text = f"holdout = {cfg.holdout}: {what} has a test split of its own; use holdout = 0"
        raise ParameterError(text)
    if (h, w, c) != (cfg.img_size, cfg.img_size, cfg.in_chans):
        todo = f"add -p img_size {h} -p in_chans {c}" if h == w else "crop them to squares"
        raise ParameterError(
            f"{what}: images of {h}x{w} pixels and {c} channel(s), but img_size = "
            f"{cfg.img_size} and in_chans = {cfg.in_chans}; {todo}"
        )


def to_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    "(N, H, W, C) and (N,) arrays as uint8 (N, C, H, W) and int64 (N,) tensors."
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))


def from_arrays(
    name: str,  # of the set
    images: np.ndarray,  # uint8 (N, H, W, C), in any order
    labels: np.ndarray,  # integers (N,), zeros where there are no classes
    num_classes: int,  # 0: no labels
    holdout: int,  # images to keep from training
    notes: list[str] = (),
) -> Data:
    "A data set in memory, in canonical order, some of its images held out."
    images, labels = canonical(images, labels)
    (x, y), sha256 = to_tensors(images, labels), ordered_sum((images, labels))
    train, test = hold_out(labels, holdout, sha256)
    classes = num_classes, [str(i) for i in range(num_classes)]
    return Data(name, x[train], y[train], x[test], y[test], *classes, sha256, list(notes))


# ---------------------------------------------------------------- opening
def locate(dataset: str, root) -> Path:
    "The path after `folder:`, `latents:` or `npz:`: as given, else under the folder of data sets."
    kind, _, given = dataset.partition(":")
    path = Path(given).expanduser()
    places = list(dict.fromkeys([path.absolute(), (Path(root or ".") / path).absolute()]))
    for p in places:
        if p.exists():
            if p.is_dir() == (kind != "npz"):
                return p
            found, wanted = ("folder", "file") if p.is_dir() else ("file", "folder")
            raise ValueError(f"{printable(p)} is a {found}; {kind}:PATH takes a {wanted}")
    looked = " and ".join(map(printable, places))
    raise FileNotFoundError(f"dataset = {dataset!r}: nothing there; looked for {looked}")


def _load(cfg: DataConfig, root: str) -> Data:
    return resolve_name(DATASETS, cfg.dataset.partition(":")[0])(cfg, Path(root))


_load_once = lru_cache(maxsize=4)(_load)  # sets whose content never changes


def _with_classes(data: Data, cfg: DataConfig) -> Data:
    "The data with as many classes as the configuration says."
    found, wanted = data.num_classes, cfg.num_classes
    if wanted and found > wanted:
        text = f"num_classes = {wanted}: {cfg.dataset} has labels 0..{found - 1}"
        raise ParameterError(f"{text}; set num_classes = {found}, or 0 for as many as there are")
    if not found or wanted in (0, found):
        return data
    names = data.class_names + [str(i) for i in range(found, wanted)]
    return replace(data, num_classes=wanted, class_names=names)


def _check_condition(exp: Experiment, data: Data):
    "Raise `ParameterError` when the data lack what the model is conditioned on."
    cfg, condition, problem = exp.data, exp.model.condition, ""
    if condition == "class" and not data.num_classes:
        problem = "has no labels: use condition = 'none', p_uncond = 0, cfg_scale = 1, or add them"
    elif condition == "text" and data.texts is None:
        problem = "has no captions: use mscoco256 or shapes"
    elif condition == "text" and data.texts.null.shape != (cfg.text_tokens, cfg.text_dim):
        problem = f"has captions of {tuple(data.texts.null.shape)}: set text_tokens and text_dim"
    if problem:
        raise ParameterError(f"condition = {condition!r}, but {cfg.dataset} {problem}")


def open_data(
    exp: Experiment,  # what is to be trained
) -> tuple[Experiment, Data]:  # with data_sha256 and num_classes filled in, and its images
    "Open the data set of an experiment, under `data_root` or `UVIT_DATA` or data/ in the project."
    cfg, kind = exp.data, exp.data.dataset.partition(":")[0]
    root = str(data_root(exp.execution.data_root).absolute())
    key = replace(cfg, flip=True, data_sha256="", num_classes=0)  # what decides the images
    load = _load if kind in PATHS else _load_once
    data = _with_classes(load(key, root), cfg)
    if cfg.data_sha256 not in ("", data.sha256):
        raise ValueError(
            f"{cfg.dataset}: the experiment's data had checksum {cfg.data_sha256[:16]}, the files "
            f"there have {data.sha256[:16]}: bring back the old ones, or leave data_sha256 empty"
        )
    _check_condition(exp, data)
    sha256 = "" if kind in CONTENT else data.sha256
    opened = replace(cfg, num_classes=data.num_classes, data_sha256=sha256)
    return replace(exp, data=opened), data


# ---------------------------------------------------------------- batches
def _generator(*key) -> torch.Generator:
    return torch.Generator().manual_seed(key_seed(*key))


def _send(t: Tensor, device: torch.device) -> Tensor:
    "To the device, without waiting for it."
    if device.type == "cuda" and not t.is_cuda:
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def draw_latents(
    moments: Tensor,  # (B, 2C, h, w): mean and log-variance
    noise: Tensor,  # standard normal, (B, C, h, w)
    scale: float,  # factor on the latents
) -> Tensor:  # float32 (B, C, h, w)
    "Latents for the network: scale (mean + exp(log-variance / 2) noise)."
    mean, logvar = moments.float().chunk(2, 1)
    return scale * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise)


@lru_cache(maxsize=3)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    "The permutation of one epoch, (N,)."
    return torch.randperm(n, generator=_generator(seed, "order", epoch))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    "Which examples make up the whole batch of a step, (B,); batches run across the end of epochs."
    start, out = step * batch_size, []
    while start < (step + 1) * batch_size:
        epoch, i = divmod(start, n)
        out.append(epoch_order(n, seed, epoch)[i : i + (step + 1) * batch_size - start])
        start += len(out[-1])
    return torch.cat(out)


def _read_ahead(read, steps):
    "(step, read(step)) for each step, two of them read in a thread while the caller computes."
    with ThreadPoolExecutor(1) as pool:
        ahead = deque((s, pool.submit(read, s)) for s in itertools.islice(steps, 2))
        while ahead:
            s, result = ahead.popleft()
            ahead.extend((k, pool.submit(read, k)) for k in itertools.islice(steps, 1))
            yield s, result.result()


@dataclass(eq=False, repr=False)
class Batches:
    """Training batches: `at(step)` gives x0, float32 (B, C, H, W), and y, labels int64 (B,) or
    captions float32 (B, L, D), as a pure function of (seed, step)."""

    data: Data
    batch_size: int  # images per step, over all processes
    seed: int  # of the run
    flip: bool  # random horizontal flip
    p_uncond: float  # conditions replaced by the null condition
    null_class: int | None  # its id, num_classes
    device: str | torch.device = "cpu"  # where batches are put together
    part: tuple = (0, 1)  # (rank, processes): rows rank::processes of the global batch
    condition: str = "class"  # what y is: text for encoded captions, else labels
    latent_scale: float = 1.0  # factor on latents

    def __post_init__(self):
        self.device, self.rows = torch.device(self.device), slice(self.part[0], None, self.part[1])
        self.texts = self.data.texts if self.condition == "text" else None
        self.null = self.null_class
        if self.texts is not None:
            self.null = self.texts.null.float().to(self.device)
        if self.data.inputs is None:
            self.images = self.data.train_images.to(self.device)
        self.labels = self.data.train_labels.to(self.device)

    def uniform(self, what: str, step: int) -> Tensor:
        "Random numbers of this part of a batch, in [0, 1)."
        u = torch.rand(self.batch_size, generator=_generator(self.seed, what, step))
        return u[self.rows]

    def fetch(self, step: int) -> tuple[Tensor, Tensor]:
        "Pixels or moments, and the conditions, as they lie in memory or on disk."
        i = batch_indices(len(self.data), self.batch_size, self.seed, step)[self.rows]
        there = _send(i, self.device)
        y = self.labels[there]
        if self.texts is not None:
            y = self.texts.read(i, self.uniform("caption", step))
        if self.data.inputs is None:
            return self.images[there], y
        mirror = self.uniform("flip", step) < (0.5 if self.flip else 0)
        return self.data.inputs.read(i, mirror), y

    def finish(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        "Flip or draw, drop conditions, scale; randomness of the whole batch, then this part of it."
        x, y = _send(x, self.device), _send(y, self.device)
        if x.dtype == torch.uint8:
            if self.flip:
                flipped = _send(self.uniform("flip", step) < 0.5, self.device)
                x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
            x = to_model(x)
        else:
            x = self.draw(step, x)
        if self.texts is not None:
            y = y.float()
        if self.p_uncond:
            dropped = _send(self.uniform("drop", step) < self.p_uncond, self.device)
            y = torch.where(dropped.view(-1, *[1] * (y.dim() - 1)), self.null, y)
        return x, y

    def draw(self, step: int, moments: Tensor) -> Tensor:
        "Latents drawn afresh for this step."
        generator = torch.Generator(self.device).manual_seed(key_seed(self.seed, "latent", step))
        _, channels, h, w = moments.shape
        size = (self.batch_size, channels // 2, h, w)
        noise = torch.randn(size, generator=generator, device=self.device)
        return draw_latents(moments, noise[self.rows], self.latent_scale)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        "The batch of one step."
        return self.finish(step, *self.fetch(step))

    def iterate(self, start_step: int = 0):
        "at(start_step), at(start_step + 1), ... without end; what lies on disk is read ahead."
        steps = itertools.count(start_step)
        if self.data.inputs is None and self.texts is None:
            ahead = ((s, self.fetch(s)) for s in steps)
        else:
            ahead = _read_ahead(self.fetch, steps)
        for s, (x, y) in ahead:
            yield self.finish(s, x, y)
