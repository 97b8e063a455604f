"""Records carried between machines: published into a folder there, verified and published here."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from uvit_repro.campaign.jobs import jobs
from uvit_repro.campaign.plan import state
from uvit_repro.campaign.verify import check_run
from uvit_repro.config import ParameterError, default_protocol
from uvit_repro.data.files import printable
from uvit_repro.runs.records import load_run, publish, published_root, runs_root

LARGEST_FILE = 64 * 2**20  # bytes of one file of a record
LARGEST_ARCHIVE = 2**30  # bytes of an archive, unpacked
MOST_FILES = 20_000  # in one archive


def publish_runs(
    what: str,  # as in `jobs`
    protocol: str = None,  # None: what this machine can do
    seeds=(0,),
    out_dir=None,  # folder of runs
    target=None,  # None: results/published
    say=print,
) -> list[str]:  # the published folders
    "Copy the evidence of finished runs, sealed, to results/published or to a folder to be carried."
    protocol, root = protocol or default_protocol(), Path(target or published_root())
    todo = {job.exp.run_id: job.exp for job in jobs(what, protocol, seeds)}
    done = [name for name, exp in todo.items() if state(exp, out_dir)[0] == "done"]
    if not done:
        raise ParameterError(f"{what!r} has no finished run of protocol {protocol} to publish")
    folders = [str(publish(runs_root(out_dir) / name, root)) for name in done]
    say(f"{len(done)} of {len(todo)} runs published under {root}")
    return folders


class Member(tarfile.TarInfo):
    "An entry of an archive, refused before anything of that size is read."

    @classmethod
    def frombuf(cls, *args):
        member = super().frombuf(*args)
        if not 0 <= member.size <= LARGEST_FILE:
            raise ValueError(f"{printable(member.name)} has {member.size:,} bytes")
        return member


def unpack(archive: Path, target: Path):
    "Write an archive's files below a folder, one block at a time. Raises for the first bad one."
    total = 0
    with tarfile.open(archive, tarinfo=Member) as tar:
        for count, member in enumerate(tar):
            total += max(member.size, 0)
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{printable(member.name)} is neither a file nor a folder")
            if member.size > LARGEST_FILE or total > LARGEST_ARCHIVE or count > MOST_FILES:
                raise ValueError(f"at {printable(member.name)} it is larger than records can be")
            path = (target / member.name).resolve()
            if not path.is_relative_to(target.resolve()):
                raise ValueError(f"{printable(member.name)} leads elsewhere")
            (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
            if member.isfile():  # without the owner, the mode and the links of the archive
                with tar.extractfile(member) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not any(target.rglob("run.json")):
        raise ValueError("it holds no record of a run")


def records_in(source: Path, scratch: Path, refused: list) -> Iterator[Path]:
    "Folders of runs in a folder or an archive; what is wrong with an archive goes to `refused`."
    archives = [source]
    if source.is_dir():
        yield from sorted(path.parent for path in source.rglob("run.json"))
        archives = sorted(path for path in source.glob("*.t*") if path.is_file())
    for archive in archives:
        target = scratch / archive.name
        try:
            unpack(archive, target)
        except Exception as error:  # damaged archives fail in many ways
            refused.append(f"{archive}: {type(error).__name__}: {error}")
        yield from sorted(path.parent for path in target.rglob("run.json"))


def problem(folder: Path) -> str:  # empty: none
    "Why a record is not to be published."
    for path in folder.rglob("*"):
        if path.is_symlink() or path.stat().st_size > LARGEST_FILE:
            return f"{path.name} is a link or too large"
    bad = [check for check in check_run(folder) if not check.ok]
    if bad:
        return f"{len(bad)} checks differ: {bad[0]}"
    status = load_run(folder)["status"]
    return "" if status == "ok" else f"the run is {status!r}"


def collect(
    sources: list,  # folders and archives of records
    target=None,  # None: results/published
    say=print,
) -> dict:  # published: folders; refused: reasons
    "Verify records that were carried here, and publish those that hold."
    published, refused = [], []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such folder or archive")
        before = len(published) + len(refused)
        with tempfile.TemporaryDirectory() as scratch:
            for folder in records_in(source, Path(scratch), refused):
                if why := problem(folder):
                    refused.append(f"{folder.name} of {source}: {why}")
                else:
                    published.append(str(publish(folder, target)))
                    say(f"published {folder.name}")
        if len(published) + len(refused) == before:
            refused.append(f"{source}: no record of a run in it")
    refused = [printable(reason) for reason in refused]
    for reason in refused:
        say(f"refused {reason}")
    return {"published": published, "refused": refused}
