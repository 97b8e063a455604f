"""Files that survive a killed process: written whole or not at all, checked when read."""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

UNFINISHED = ".unfinished-"  # how names of files begin that were being written
UNPACKED = 1 << 30  # bytes that any .npz file may unpack to
EXPANSION = 200  # larger ones at most so many times their own size
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def sweep_unfinished(folder: Path) -> int:
    "Remove what a killed writer left half done, and count it; the caller holds the folder."
    unfinished = list(Path(folder).rglob(f"{UNFINISHED}*"))
    for path in unfinished:
        path.unlink()
    return len(unfinished)


def write_atomic(
    path: Path,  # the final name
    write,  # function of a temporary path that writes the content
) -> Path:  # the final name
    "Write a file so that it is never seen half done. An error names the file, as a full disk does."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(
        dir=path.parent, prefix=f"{UNFINISHED}{path.stem}-", suffix=path.suffix
    )
    os.close(fd)  # numpy and others add a missing suffix
    try:
        os.chmod(tmp, 0o644)
        write(Path(tmp))
        with open(tmp, "rb+") as f:  # Windows syncs only what is open for writing
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException as e:
        Path(tmp).unlink(missing_ok=True)
        if not isinstance(e, Exception):
            raise
        # torch and safetensors report a full disk with errors of their own, without the file.
        number, why = getattr(e, "errno", None), getattr(e, "strerror", None)
        raise OSError(number or errno.EIO, why or f"{e} (no space left?)", str(path)) from e
    return path


def write_json(path: Path, obj) -> Path:
    "An object as indented JSON, whole or absent."
    text = json.dumps(obj, indent=1, sort_keys=True, default=str) + "\n"
    return write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


class FileError(ValueError):
    "A file that can't be used; the message says which, why, and what to do."

    def _render_traceback_(self):  # what Jupyter shows
        return [f"{type(self).__name__}: {self}"]


class DamagedFile(FileError):
    "A file that is not what was written; the message names it."


class CheckpointError(FileError):
    "A checkpoint that can't be used."


def _checksum(obj: dict) -> str:
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


def write_checked_json(path: Path, obj: dict) -> Path:
    "An object as JSON with a checksum of its own, for `read_checked_json`."
    plain = json.loads(json.dumps(obj, default=str))
    return write_json(path, {**plain, "checksum": _checksum(plain)})


def read_checked_json(path: Path) -> dict:
    "Read what `write_checked_json` wrote. Raises `FileNotFoundError` or `DamagedFile`."
    raw = Path(path).read_bytes()
    try:
        obj = json.loads(raw)
        checksum = obj.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedFile(f"{path} is damaged: no JSON object with a checksum") from None
    if checksum != _checksum(obj):
        raise DamagedFile(f"{path} is damaged: its content does not match its checksum")
    return obj


def sha256_file(path: Path) -> str:
    "The sha256 of a file's bytes."
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def weights_sum(
    state: dict,  # tensors by name
    parts=("",),  # only names that begin so
) -> str:  # hexadecimal
    "The sha256 of weights: names, shapes and values as float32, whatever file they came from."
    h = hashlib.sha256()
    for k in sorted(k for k in state if k.startswith(tuple(parts))):
        t = state[k].detach().float().cpu().contiguous()
        h.update(f"{k} {tuple(t.shape)}\n".encode())
        h.update(t.numpy().data)
    return h.hexdigest()


def printable(name) -> str:
    "A file name for a message: control characters, line ends and odd bytes are escaped."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def npz_names(path: Path) -> list[str]:
    "Names of the arrays of an .npz file, once what each header promises is what the file holds."
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if e.filename.endswith(".npy")]
        total = sum(e.file_size for e in entries)
        if total > max(UNPACKED, EXPANSION * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size:,} bytes would unpack to {total:,}")
        for e in entries:
            with archive.open(e) as f:
                read = READ_HEADER[np.lib.format.read_magic(f)]
                shape, _, dtype = read(f)
                promised = f.tell() + math.prod(shape) * dtype.itemsize
            if not dtype.hasobject and promised != e.file_size:
                raise ValueError(f"{e.filename} promises {promised:,} bytes, has {e.file_size:,}")
    return [e.filename.removesuffix(".npy") for e in entries]


def load_tensors(
    path: Path,  # .safetensors, or a file of torch.save
    device="cpu",  # where the tensors go
) -> dict:  # what was saved: tensors, numbers, containers of them
    """Read a checkpoint without running anything in it.

    Raises `CheckpointError` for a damaged or foreign file; whatever else prevents reading
    (permissions, a failing disk, too little memory) keeps its own exception."""
    import torch
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(device))
        if zipfile.is_zipfile(path):  # torch does not compare the checksums of its archive
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"its part {bad} is damaged")
        return torch.load(path, map_location=device, weights_only=True)
    except MemoryError:
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise  # EINVAL: an offset inside a damaged archive points nowhere
        if "memory" in str(e).lower():  # torch has no exception of its own for it on a CPU
            raise MemoryError(f"{path}: {e}") from None
        why = f"it is damaged, truncated or not a checkpoint ({path.stat().st_size:,} bytes; {e})"
        if "weights_only" in str(e).lower() or "unsupported" in str(e).lower():
            why = "it holds objects other than tensors and plain containers, which are never loaded"
    raise CheckpointError(
        f"{path} can't be used: {why[:250]}. Nothing was changed; fetch or make the file again."
    )


@dataclass(frozen=True)
class ReleasedWeights:
    "The state dictionary of a released network, and what to call it in messages."

    kind: str  # of network, as in "U-ViT"
    name: str  # of the file
    state: dict  # tensors by name

    @classmethod
    def read(
        cls,
        source,  # path of a checkpoint, or its state dictionary
        kind: str,  # of network
        needed: tuple,  # tensors that every such network has
        unwrap=lambda state: state,  # finds the network's tensors in what the file holds
    ) -> "ReleasedWeights":
        "Read released weights; `CheckpointError` for a file of another kind of network."
        is_dict = isinstance(source, dict)
        state = unwrap(source if is_dict else load_tensors(source))
        name = "the state dictionary" if is_dict else str(source)
        for tensor in needed:
            if tensor not in state:
                raise CheckpointError(
                    f"{name} is not a {kind} checkpoint: it has no {tensor} "
                    f"(it has {', '.join(list(state)[:4])}, ...)"
                )
        return cls(kind, name, state)

    def fill(self, net):
        "Load the weights into a network of their sizes, and return it in eval mode."
        try:
            net.load_state_dict(self.state)
        except RuntimeError as e:
            raise CheckpointError(
                f"{self.name} does not fit a {self.kind} of width {net.embed_dim} "
                f"with {net.depth} layers: {e}"
            ) from None
        return net.eval()


def set_aside(
    path: Path,  # a file that can't be used
) -> Path:  # its new name
    "Rename a damaged file, so that it is neither used nor lost."
    for n in range(1, 1000):
        new = path.with_name(f"{path.name}.damaged-{n}")
        if not new.exists():
            os.replace(path, new)
            return new
    raise OSError(f"{path}: a thousand damaged files beside it; look at them first")


@contextlib.contextmanager
def run_lock(
    folder: Path,  # the run's folder
    say=print,  # told when there is somebody to wait for
):
    "Hold the run. Others wait; a killed holder's lock is gone with it."
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0.05)
    except Timeout:
        say(f"another process works on {folder.name}; waiting for it")
        sys.stdout.flush()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def source_sum() -> str:
    "The sha256 of the package's modules: which code ran, also where no git is."
    h = hashlib.sha256()
    for p in sorted(Path(sys.modules["uvit_repro"].__file__).parent.rglob("*.py")):
        h.update(p.name.encode())
        h.update(p.read_bytes())
    return h.hexdigest()
