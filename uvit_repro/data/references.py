"""Real images as a reference: cached statistics and features of data sets and reference files."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import ParameterError, digest, key_seed
from uvit_repro.data.features import (
    NO_FEATURES,
    SPATIAL_LAYER,
    FeatureNetwork,
    feature_extractor,
)
from uvit_repro.data.files import npz_names, sha256_file, write_atomic

MOST = 10_000  # images whose features are kept, for kernel distance, precision and recall
PART = 50_000  # images whose features are held at a time while a whole split is read


def require_samples(
    n: int,  # images
    dim: int,  # features of the network
    name: str,  # what was to be computed, for the message
):
    "Refuse a covariance that cannot have full rank."
    if n <= dim:
        raise ValueError(
            f"{name}: {n} images for {dim} features; "
            f"a Frechet distance needs at least {dim + 1} images"
        )


@dataclass(frozen=True)
class FeatureStatistics:
    "Number, mean and covariance of features, all that a Frechet distance needs; float64."

    n: int  # 0: not stated, as in the released reference files
    mean: np.ndarray  # (F,)
    cov: np.ndarray  # (F, F), divided by n - 1

    @classmethod
    def of(cls, features: Tensor, name="features") -> "FeatureStatistics":
        require_samples(*features.shape, name)
        x = features.double().cpu().numpy()
        return cls(len(x), x.mean(0), np.cov(x, rowvar=False))

    @classmethod
    def merge(cls, parts: list) -> "FeatureStatistics":
        "Statistics of all images, from those of their parts."
        if len(parts) == 1:
            return parts[0]
        n = sum(p.n for p in parts)
        mean = sum(p.n * p.mean for p in parts) / n
        within = sum((p.n - 1) * p.cov for p in parts)
        between = sum(p.n * np.outer(p.mean - mean, p.mean - mean) for p in parts)
        return cls(n, mean, (within + between) / (n - 1))

    @classmethod
    def read(cls, arrays: dict, who: str) -> "FeatureStatistics":
        "The statistics that `named` stored."
        return cls(int(arrays[f"{who}_n"]), arrays[f"{who}_mean"], arrays[f"{who}_cov"])

    def named(self, who: str) -> dict:  # arrays by name
        "As arrays for a file of statistics."
        arrays = {"n": np.int64(self.n), "mean": self.mean, "cov": self.cov}
        arrays["sha256"] = np.array(self.sha256)
        return {f"{who}_{name}": v for name, v in arrays.items()}

    @property
    def sha256(self) -> str:
        arrays = (np.int64(self.n), self.mean, self.cov)
        return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()


def subset(
    n: int,  # how many there are
    most: int,  # how many are wanted at most
    *key,  # what for
) -> Tensor:  # increasing indices, the same for the same arguments
    "A fixed random choice, for metrics that cannot afford all images."
    if n <= most:
        return torch.arange(n)
    g = torch.Generator().manual_seed(key_seed("subset", n, most, *key))
    return torch.randperm(n, generator=g)[:most].sort().values


@dataclass(frozen=True)
class ReferenceFile:
    "Statistics of real images from a file, in the form of guided-diffusion's reference batches."

    path: Path
    sha256: str  # of the file
    features: FeatureStatistics  # pooled features
    spatial: FeatureStatistics | None  # spatial features, where the file has them
    images: bool  # whether the file has images (`arr_0`)


def _moments(z, suffix: str, dim: int) -> FeatureStatistics:
    "A checked mean and covariance of an open npz file. Raises `ValueError`."
    m, c = (z[name + suffix] for name in ("mu", "sigma"))
    if {m.dtype.kind, c.dtype.kind} != {"f"} or (m.shape, c.shape) != ((dim,), (dim, dim)):
        raise ValueError(
            f"mu{suffix} is {m.dtype} {m.shape} and sigma{suffix} {c.dtype} {c.shape}; "
            f"expected floats of shapes ({dim},) and ({dim}, {dim})"
        )
    m, c = m.astype(np.float64), c.astype(np.float64)
    if not (np.isfinite(m).all() and np.isfinite(c).all()):
        raise ValueError(f"mu{suffix} or sigma{suffix} has values that are not finite")
    if np.abs(c - c.T).max() > 1e-5 * np.abs(c).max() or np.diag(c).min() < 0:
        raise ValueError(f"sigma{suffix} is not symmetric, or has a negative variance")
    return FeatureStatistics(int(z["n"]) if "n" in z.files else 0, m, c)


def read_reference(
    path,  # npz file with mu, sigma, perhaps mu_s, sigma_s, arr_0
    features: str,  # a key of FEATURE_EXTRACTORS, whose features they are of
) -> ReferenceFile:
    "Checked reference statistics. Raises `FileNotFoundError` or `ParameterError`."
    path, spec, spatial = Path(path).expanduser(), feature_extractor(features), None
    what = f"reference statistics {path}"
    if spec is NO_FEATURES:
        raise ParameterError(f"{what} with features = none: name the network they were made with")
    if not path.is_file():
        raise FileNotFoundError(
            f"{what}: no such file; fetch it, or save mu and sigma of the reference images' "
            f"{features} features under this name with numpy.savez"
        )
    try:
        names = npz_names(path)
        if not {"mu", "sigma"} <= set(names):
            raise ValueError(f"mu and sigma are needed, it has {', '.join(names)}")
        with np.load(path, allow_pickle=False) as z:
            pooled = _moments(z, "", spec.dim)
            if spec.spatial and "mu_s" in names:
                spatial = _moments(z, "_s", spec.spatial)
    except Exception as e:  # zipfile and numpy have many ways to meet damage
        raise ParameterError(f"{what} can't be used: {str(e) or type(e).__name__}") from None
    if spatial and (spatial.mean < 0).any():
        spatial = None  # of the same convolution before its ReLU: another layer
    return ReferenceFile(path, sha256_file(path), pooled, spatial, "arr_0" in names)


class RealImages:
    "Statistics and features of a data set's images; a file can stand in for the training images."

    def __init__(
        self,
        data,  # `uvit_repro.data.images.Data`
        network: FeatureNetwork,  # whose features they are
        cache_dir=None,  # folder of kept statistics and features, or None
        reference: ReferenceFile = None,  # in place of the training images
    ):
        self.data, self.network, self.cache_dir = data, network, cache_dir
        self.reference, self._statistics = reference, {}

    def _images(self, split: str) -> tuple:
        "How many images a split has, and a function that reads some; `ValueError` without any."
        data, which = self.data, "held-out" if split == "test" else "training"
        images, n = getattr(data, f"{split}_images"), len(getattr(data, f"{split}_labels"))
        if n == 0:
            raise ValueError(f"the data have no {which} images; open them with holdout > 0")
        if images is not None and len(images):
            return n, images.__getitem__
        if split == "train" and data.inputs is not None and data.decode is None:
            return n, data.inputs.read
        cure = "; reference=PATH gives their statistics" if split == "train" else ""
        raise ValueError(f"the pixels of the {which} images are not available{cure}")

    def _reference_images(self) -> tuple:
        "The same for the images in the reference file."
        c, h, w = self.data.shape
        with np.load(self.reference.path, allow_pickle=False) as z:
            x = z["arr_0"]
        if x.dtype != np.uint8 or x.shape[1:] != (h, w, c):
            raise ValueError(
                f"reference statistics {self.reference.path}: arr_0 is {x.dtype} {x.shape}; "
                f"expected uint8 (N, {h}, {w}, {c})"
            )
        return len(x), torch.from_numpy(x).permute(0, 3, 1, 2).__getitem__

    def _extract(self, read, index: Tensor) -> dict:
        "Features of some images, with at most a gigabyte of pixels in memory."
        rows = max(64, min(10_000, 2**30 // int(np.prod(self.data.shape))))
        out = [self.network.extract(read(i)) for i in index.split(rows)]
        return {kind: torch.cat([o[kind] for o in out]) for kind in out[0]}

    def _cached(self, what: str, split: str, compute) -> dict:
        "Arrays of a split, from a file that is whole or else computed and written."
        if self.cache_dir is None:
            return compute()
        data, spec = self.data, self.network.spec  # users' files are read at any size
        source = data.sha256, len(getattr(data, f"{split}_labels")), data.shape, spec.sha256
        file = self.reference.sha256 if self.reference else ""
        path = Path(self.cache_dir) / f"{what}-{digest([split, MOST, *source, file], 16)}.npz"
        try:
            with np.load(path, allow_pickle=False) as z:  # every member carries a CRC
                return {k: z[k] for k in z.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            arrays = compute()  # absent, truncated, or another file of this name
        write_atomic(path, lambda p: np.savez(p, **arrays))
        return arrays

    def _whole_split(self, split: str) -> dict:
        "Statistics of a whole split as arrays, all kinds of features from one pass."
        n, read = self._images(split)
        require_samples(n, self.network.spec.dim, f"{self.network.name} statistics of {split}")
        kinds, parts = ("features", "spatial") if self.network.spec.spatial else ("features",), []
        for i in torch.arange(n).tensor_split(-(-n // PART)):
            out = self._extract(read, i)
            parts.append([FeatureStatistics.of(out[kind]) for kind in kinds])
        merged = map(FeatureStatistics.merge, zip(*parts, strict=True))
        named = [s.named(kind) for kind, s in zip(kinds, merged, strict=True)]
        return {name: array for arrays in named for name, array in arrays.items()}

    def statistics(
        self,
        split: str,  # train | test
        kind="features",  # features | spatial
    ) -> FeatureStatistics:
        "Mean and covariance of the features of a whole split, or of the reference file."
        if split == "train" and self.reference:
            if getattr(self.reference, kind) is None:
                raise ValueError(
                    f"reference statistics {self.reference.path} have no mu_s and sigma_s of "
                    f"Inception's {SPATIAL_LAYER} behind its ReLU"
                )
            return getattr(self.reference, kind)
        if split not in self._statistics:
            found = self._cached("stats", split, lambda: self._whole_split(split))
            self._statistics[split] = found
        return FeatureStatistics.read(self._statistics[split], kind)

    def features(self, split: str) -> Tensor:  # (N, F), N at most MOST
        "Features of a fixed choice of images of a split, or of those in the reference file."
        from_file = split == "train" and self.reference and self.reference.images

        def compute():
            n, read = self._reference_images() if from_file else self._images(split)
            return {"features": self._extract(read, subset(n, MOST, split))["features"].numpy()}

        return torch.from_numpy(self._cached("features", split, compute)["features"])

    def pixels(self, split: str, most: int) -> Tensor:  # uint8, (N, C, H, W)
        "A fixed choice of images of a split."
        n, read = self._images(split)
        return read(subset(n, most, "nn"))
