"""Similarity matrices kept beside a run: stats/cka-HASH.npz, named by the settings inside."""

import json
import zipfile
from pathlib import Path

import numpy as np

from uvit_repro.config import digest
from uvit_repro.data.files import write_atomic


def similarity_path(
    folder: Path,  # of a run
    settings: dict,  # how the matrices are measured
) -> Path:
    "Where the matrices of these settings are kept."
    return Path(folder) / "stats" / f"cka-{digest(settings, 8)}.npz"


def write_similarity(folder: Path, settings: dict, hsic: np.ndarray) -> None:
    "Keep the mean HSIC of all pairs of layers. Raises `ValueError` where it is not finite."
    if not np.isfinite(hsic).all():
        raise ValueError(f"{folder.name}: a block's outputs are not finite")
    text, path = np.array(json.dumps(settings, sort_keys=True)), similarity_path(folder, settings)
    write_atomic(path, lambda p: np.savez_compressed(p, hsic=hsic, settings=text))


def read_similarity(path: Path) -> tuple[dict, np.ndarray]:  # settings, HSIC
    "Read kept matrices. Raises `ValueError` for a damaged file."
    try:
        with np.load(path) as arrays:
            settings, hsic = json.loads(str(arrays["settings"])), arrays["hsic"]
        if path == similarity_path(path.parents[1], settings):
            return settings, hsic
        why = "does not hold what its name says"
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        why = f"can't be read ({type(e).__name__})"
    raise ValueError(f"{path} {why}: remove it and run chapter 09_representations again")


def kept_similarities(folder: Path) -> list[tuple[dict, np.ndarray]]:
    "All kept matrices of a run, here or published."
    return [read_similarity(p) for p in sorted((Path(folder) / "stats").glob("cka-*.npz"))]
