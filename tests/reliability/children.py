"""Work in a process of its own that can be killed at any of its writes."""

import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["reliability.warm"])
TESTS = str(Path(__file__).resolve().parent.parent)  # the server finds this package there
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
LONGEST = 300  # seconds that a piece of work may take
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


@dataclass(frozen=True)
class Harm:
    "What is done to a process while it works."

    at_write: int = 0  # killed just before this write below `folder`; 0: never
    after: float = 0.0  # killed after so many seconds; 0: never
    largest_file: int = 0  # bytes; 0: any


@dataclass(frozen=True)
class Ending:
    "How a piece of work ended."

    value: object = None
    error: str = ""  # the type and message of an exception
    place: str = ""  # its traceback
    killed: bool = False
    writes: int = 0  # seen below the folder


def is_write(event: str, arguments: tuple) -> bool:
    "Whether an audit event changes files."
    if event != "open":
        return event in WRITES
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def watch_writes(folder: Path, harm: Harm) -> list:  # one entry for each write
    "Count the writes below a folder, and die at the chosen one."
    seen, root, die = [], str(folder), os.kill

    def hook(event, arguments):
        if event in WRITES and is_write(event, arguments) and str(arguments[0]).startswith(root):
            seen.append(event)
            if len(seen) == harm.at_write:
                die(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def child(connection, work, arguments: tuple, folder: Path, harm: Harm):
    "What the other process does."
    import torch

    torch.set_num_threads(1)
    if harm.largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (harm.largest_file, harm.largest_file))
    if harm.after:
        timer = threading.Timer(harm.after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    writes = watch_writes(folder, harm)
    value, error, place = None, "", ""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            value = work(*arguments)
        except BaseException as e:
            error, place = f"{type(e).__name__}: {e}", traceback.format_exc()
    connection.send(Ending(value, error, place, False, len(writes)))


def start(work, arguments: tuple, folder: Path, harm: Harm = Harm()):  # noqa: B008  (it is frozen)
    "Start a function of this package in another process."
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=child, args=(there, work, arguments, folder, harm))
    process.start()
    there.close()
    return process, here


def finish(process, connection) -> Ending:
    "Wait for a started process."
    try:
        ended = connection.poll(LONGEST)
        ending = connection.recv() if ended else Ending(error="TimeoutError: it hangs")
    except EOFError:
        ending = Ending(killed=True)
    if ending.error.startswith("TimeoutError"):
        process.kill()
    process.join()
    connection.close()
    return ending


def in_child(work, arguments: tuple, folder: Path, harm: Harm = Harm()) -> Ending:  # noqa: B008
    "Do a piece of work in another process and wait for it."
    return finish(*start(work, arguments, folder, harm))
