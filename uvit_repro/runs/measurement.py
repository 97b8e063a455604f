"""Samples measured beside real images: statistics are stored, every number follows from them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from uvit_repro import metrics
from uvit_repro.config import ParameterError
from uvit_repro.data import features, references
from uvit_repro.data.references import FeatureStatistics, RealImages

PROMPTS = tuple(
    f"prompt_{what}_{which}"
    for what in ("colour", "shape", "position", "count", "exact")
    for which in ("seen", "unseen")
)


@dataclass(frozen=True)
class MeasureOptions:
    "How samples are measured."

    features: str = "none"  # a key of FEATURE_EXTRACTORS, or none
    device: str = "cpu"  # where networks and distances run
    cache_dir: Path = None  # folder of statistics of real images, or None
    patch_size: int = None  # of the network that made them; None: no seam energy
    mirror: bool = False  # training used flips: a mirrored copy is a copy
    reference: Path = None  # file of statistics in place of the training images'
    made: dict = None  # features of the samples, where they are known


class Measurement:
    "Samples beside real images: what every statistic is computed from."

    def __init__(self, images: Tensor, labels, data, options: MeasureOptions):
        self.images, self.labels, self.data, self.options = images, labels, data, options
        self.network = features.FeatureNetwork(options.features, options.device)
        file, reference = options.reference, None
        if file:
            reference = references.read_reference(file, options.features)
        self.real = RealImages(data, self.network, options.cache_dir, reference)

    @cached_property
    def made(self) -> dict:  # features, logits and spatial features of the samples
        return self.options.made or self.network.extract(self.images)

    def floor(self) -> FeatureStatistics:
        "Of real training images, as many as there are samples."
        x, name = self.real.features("train"), f"{self.network.spec.short} distance of real images"
        return FeatureStatistics.of(x[references.subset(len(x), len(self.images), "real")], name)

    def manifolds(self) -> np.ndarray:
        some = references.subset(len(self.images), 10_000, "made")
        return metrics.precision_recall(self.made["features"][some], self.real.features("train"))

    def classes(self, labels=None) -> np.ndarray:
        name = self.options.features
        if not features.knows_classes(name, self.data):
            raise ValueError(f"{name} does not tell apart the classes of these data")
        return metrics.class_counts(self.made["logits"], labels)

    def seams(self) -> np.ndarray:
        pair = self.images, self.real.pixels("train", 10_000)
        return np.stack([metrics.patch_seam_energy(x, self.options.patch_size) for x in pair])

    def _neighbours(self, images: Tensor) -> np.ndarray:
        most = min(50_000, max(1000, 2**31 // self.images[0].numel()))
        train, options = self.real.pixels("train", most), self.options
        how = min(10, len(train)), options.device, options.mirror
        return metrics.nearest_training(images, train, *how)[1][:, [0, -1]].numpy()

    @cached_property
    def sample_neighbours(self) -> np.ndarray:  # nearest and tenth nearest, (N, 2)
        return self._neighbours(self.images[references.subset(len(self.images), 2000, "nn")])

    @cached_property
    def heldout_neighbours(self) -> np.ndarray:  # the same of held-out images
        return self._neighbours(self.real.pixels("test", 2000))

    def statistics(self) -> dict[str, Callable]:
        "What these samples, labels and features call for: name in the file -> computation."
        real, spec = self.real, self.network.spec
        chosen = {
            "nn_sample": lambda: self.sample_neighbours[:, 0],
            "nn_heldout": lambda: self.heldout_neighbours[:, 0],
            "nn10_sample": lambda: self.sample_neighbours,
            "nn10_heldout": lambda: self.heldout_neighbours,
        }
        if self.options.patch_size is not None:
            chosen["border"] = self.seams
        if spec is features.NO_FEATURES:
            return chosen
        name = f"{spec.short} distance"
        chosen |= {
            "sample": lambda: FeatureStatistics.of(self.made["features"], name),
            "train": lambda: real.statistics("train"),
            "test": lambda: real.statistics("test"),
            "kid": lambda: metrics.kid_subsets(self.made["features"], real.features("test")),
            "neighbours": self.manifolds,
            "classes": self.classes,
        }
        if spec.spatial:
            chosen["spatial"] = lambda: FeatureStatistics.of(self.made["spatial"], "sFID")
            chosen["spatial_train"] = lambda: real.statistics("train", "spatial")
            chosen["scores"] = lambda: metrics.inception_scores(self.made["logits"])
        else:
            chosen["real"] = self.floor
        if self.labels is not None:
            chosen["confusion"] = lambda: self.classes(self.labels)
        return chosen


@dataclass(frozen=True)
class Metric:
    "A number about samples; in its name {net} is the feature network, {p} the patch size."

    name: str  # as recorded
    needs: tuple  # statistics
    value: Callable  # of the arrays
    num_samples: Callable = lambda s: s["n"]  # how many samples the value is about


def _distance(name: str, a: str, b: str) -> Metric:
    "The Frechet distance of two stored statistics."

    def value(s: dict) -> float:
        return metrics.frechet(FeatureStatistics.read(s, a), FeatureStatistics.read(s, b))

    return Metric(name, (f"{a}_n", f"{b}_n"), value, lambda s: s[f"{a}_n"])


def _share(name: str, statistic: str, row: int = 0) -> Metric:
    "A share stored as [counted, total], or as a row of such pairs."

    def value(s: dict) -> float:
        counted, total = np.atleast_2d(s[statistic])[row]
        return counted / total

    return Metric(name, (statistic,), value, lambda s: np.atleast_2d(s[statistic])[0, 1])


def _of_neighbours(name: str, value: Callable, *needs: str) -> Metric:
    "A metric of distances to the nearest training images."
    return Metric(name, needs, lambda s: value(*map(s.get, needs)), lambda s: len(s[needs[0]]))


def _ratio_of_medians(sample: np.ndarray, heldout: np.ndarray) -> float:
    return np.median(sample) / np.median(heldout)


def _closer_than_heldout(sample: np.ndarray, heldout: np.ndarray) -> float:
    "Share of samples closer to a training image than 99 % of held-out images; no sign of copying."
    return (sample <= np.percentile(heldout, 1)).mean()


def _relative_seams(s: dict) -> float:
    (across, inside), (real_across, real_inside) = s["border"]
    return across / inside / (real_across / real_inside)


def _agreement(s: dict) -> float:
    return np.trace(s["confusion"]) / s["confusion"].sum()


# A new metric needs a new statistic, above: computed from those that published runs hold, it would
# be one more value of each, without its row in their measurements.csv, and `verify` would fail.
METRICS = (
    _distance("fd_{net}_train", "sample", "train"),
    _distance("fd_{net}_test", "sample", "test"),
    _distance("fd_{net}_real", "real", "test"),
    _distance("sfid", "spatial", "spatial_train"),
    Metric("kid_{net}_test", ("kid",), lambda s: s["kid"].mean()),
    Metric("inception_score", ("scores",), lambda s: s["scores"].mean()),
    _share("precision_{net}", "neighbours"),
    _share("recall_{net}", "neighbours", row=1),
    Metric("class_agreement", ("confusion",), _agreement),
    Metric("class_entropy", ("classes",), lambda s: metrics.entropy(s["classes"])),
    Metric("patch_seam_energy_p{p}", ("border",), _relative_seams),
    _of_neighbours("nn_train_median", np.median, "nn_sample"),
    _of_neighbours("nn_heldout_median", np.median, "nn_heldout"),
    _of_neighbours("nn_ratio", _ratio_of_medians, "nn_sample", "nn_heldout"),
    _of_neighbours("nn_close", _closer_than_heldout, "nn_sample", "nn_heldout"),
    _of_neighbours("memorized", metrics.memorized_share, "nn10_sample", "nn10_heldout"),
    *(_share(name, name) for name in PROMPTS),
)
MOMENTS = ("sample", "train", "test", "real", "spatial", "spatial_train")  # stored as three arrays


def metric_name(
    template: str,  # of a `Metric`
    features_name: str,  # a key of FEATURE_EXTRACTORS, or none
    patch_size=0,  # of the network that made the samples
) -> str:  # as in measurements.csv
    "Only the distance to the training images over Inception features is called FID."
    name = template.format(net=features.feature_extractor(features_name).short, p=patch_size)
    return "fid" if name == "fd_inception_train" else name


def recompute(
    stats: dict,  # arrays of `measure_images`, perhaps read from an npz file
) -> list:  # rows {metric, value, num_samples}, and `why` where there is no value
    "Every value from its stored statistics alone."
    s, rows = {k: np.asarray(v) for k, v in stats.items()}, []
    why, about = json.loads(str(s["why"])), (str(s["features"]), int(s["patch_size"]))
    for m in METRICS:
        name, missing = metric_name(m.name, *about), [why[k] for k in m.needs if k in why]
        if all(k in s for k in m.needs):
            n, value = int(m.num_samples(s)), float(m.value(s))
            rows.append({"metric": name, "value": value, "num_samples": n})
        elif missing:
            n = int(s["n"])
            rows.append({"metric": name, "value": None, "num_samples": n, "why": missing[0]})
    return rows


def measure_images(
    images: Tensor,  # samples, uint8, (N, C, H, W); may be a memory-mapped file
    labels,  # the classes asked for, (N,), or None
    data,  # `uvit_repro.data.images.Data` that they should look like
    options: MeasureOptions,
    extra: dict = None,  # statistics of the data set's own judge, by name
) -> tuple:  # (rows {metric, value, num_samples[, why]}, statistics by name)
    "Measure samples against training and held-out images."
    got, want = tuple(images.shape[1:]), tuple(data.shape)
    if got != want:
        raise ParameterError(f"images {got}: the data's are {want}")
    m, why = Measurement(images, labels, data, options), {}
    s = {
        "features": np.array(options.features),
        "weights_sha256": np.array(m.network.spec.sha256),
        "data_sha256": np.array(data.sha256),
        "n": np.int64(len(images)),
        "patch_size": np.int64(options.patch_size or 0),
    }
    if m.real.reference:
        s["reference_sha256"] = np.array(m.real.reference.sha256)
    if options.features == "inception":
        s["spatial_layer"] = np.array(features.SPATIAL_LAYER)
    for name, compute in m.statistics().items():
        try:
            v = compute()
            s |= v.named(name) if name in MOMENTS else {name: v}
        except ParameterError:
            raise  # a wrong request is not a property of the data
        except (ValueError, FileNotFoundError) as e:
            why[f"{name}_n" if name in MOMENTS else name] = str(e)
    for name, v in (extra or {}).items():
        if name in PROMPTS and v[1] == 0:
            why[name] = "no such prompt was drawn"
        else:
            s[name] = np.asarray(v)
    s["why"] = np.array(json.dumps(why))
    return recompute(s), s
