"""How a network runs on this machine: device, attention path, compilation, activation checkpointing, processes."""

import contextlib
import functools
import json
import os
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from uvit_repro.config import Experiment, ParameterError, project_root
from uvit_repro.data.files import write_json

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PROCESS_TIMEOUT = timedelta(days=2)
_ops = torch.ops.aten
PRODUCTS = (_ops.mm.default, _ops.addmm.default)
FUSED = tuple(
    getattr(_ops, n).default
    for n in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(_ops, n)
)


def set_attention(
    model: nn.Module,  # any model made of these layers
    path: str,  # sdpa | matrix
):
    "Choose the attention path of every layer."
    if path not in ("sdpa", "math"):
        raise ParameterError(f"attention = {path!r}: allowed are 'sdpa', 'math'")
    for m in model.modules():
        if getattr(m, "path", None) in ("sdpa", "math"):
            m.path = path


def time_attention(
    batch: int,
    heads: int,
    length: int,
    width: int,  # B, H, L, D/H
    device="cpu",
    dtype=torch.float32,
    repeats=5,  # where, autocast type, timed repetitions
) -> dict:  # seconds, forward and backward, the fastest repetition of each path
    "Time both attention paths on shapes like the model's."
    from uvit_repro.layers import attention

    device, res = torch.device(device), {}
    qkv = [
        torch.randn(batch, heads, length, width, device=device, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    sync = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    for path in ("sdpa", "math"):
        best = float("inf")
        for _ in range(repeats + 1):  # the first is warm-up and rarely the fastest
            sync()
            start = time.perf_counter()
            attention(*qkv, path).sum().backward()
            sync()
            best = min(best, time.perf_counter() - start)
        res[path] = best
    return res


def compile_blocks(
    net: nn.Module,  # a network with blocks: modules whose class says `is_block = True`
    strict: bool = True,  # False: what can't be compiled on this machine runs as it is, with a warning
) -> nn.Module:  # the same network
    "Compile each block; equal blocks share their code. One graph for each kind of block, shape and mode (training, inference)."
    blocks = [m for m in net.modules() if getattr(m, "is_block", False)]
    if not blocks:
        raise ParameterError(f"{type(net).__name__} has no blocks to compile: set compile = 'off'")
    import torch._dynamo

    torch._dynamo.config.suppress_errors = not strict
    for m in blocks:
        m.compile(dynamic=False)
    return net


def keep_policy(
    shapes: frozenset,  # (inputs, outputs) of the linear layers whose results are kept
    fused: bool,  # keep the result of fused attention too
    ctx,
    op,
    *args,
    **kwargs,  # as `create_selective_checkpoint_contexts` calls it
) -> CheckpointPolicy:
    "Keep or recompute one operation of a block."
    keep = tuple(args[-1].shape) in shapes if op in PRODUCTS else fused and op in FUSED
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def set_checkpoint(
    model: nn.Module,  # with blocks in in_blocks, mid_block, out_blocks
    on: bool,  # recompute activations in training
    keep: float = 0.0,  # budget per block in tensors (B, L, D); 0: as released
) -> list:  # the names of what each block keeps, in the order of the blocks
    "Turn gradient checkpointing on or off."
    blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
    shape = {
        n: (m.in_features, m.out_features)
        for n, m in blocks[-1].named_modules()
        if isinstance(m, nn.Linear)
    }
    dim, kept, left = model.embed_dim, [[] for _ in blocks], keep * len(blocks)
    for name in ("skip_linear", "mlp.fc1", "attn.qkv", "attn.proj", "attention"):
        for b, names in zip(blocks, kept):
            size = (
                1
                if name == "attention"
                else dict(b.named_modules()).get(name) and shape[name][1] / dim
            )
            if size and size <= left:
                names.append(name)
                left -= size
    for b, names in zip(blocks, kept):
        policy = functools.partial(
            keep_policy,
            frozenset(shape[n] for n in names if n in shape),
            "attention" in names,
        )
        b.recompute = (
            dict(
                use_reentrant=False,
                preserve_rng_state=False,
                **(
                    {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}
                    if names
                    else {}
                ),
            )
            if on
            else None
        )
    return kept


def pick_device(
    device: str = "auto",  # auto, cpu, cuda, cuda:1
) -> torch.device:  # an existing one; a GPU always with its number
    "The device to compute on; `cuda` alone is this process's own GPU. Raises `ParameterError`."
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ParameterError(f"device = {device!r}: allowed are auto, cpu, cuda, cuda:N")
    if chosen.type == "cpu":
        return chosen
    if chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.index >= count:
        raise ParameterError(
            f"device = {str(device)!r}: this machine has {count} CUDA devices; try device = 'cpu'"
        )
    return chosen


@contextlib.contextmanager
def thread_count(
    n: int,  # CPU threads; 0: PyTorch's default
):
    "Compute with n threads inside the block, and with as many as before after it."
    before = torch.get_num_threads()
    try:
        if n:
            torch.set_num_threads(n)
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def tf32_off():
    "Multiply and convolve float32 in full precision on a GPU, where numbers are compared."
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def make_accelerator(
    precision: str,  # fp32 | bf16 | fp16
    device: torch.device,  # where to compute
):  # accelerate.Accelerator
    "An `Accelerator` for one run; an earlier one of another precision in this process is forgotten."
    from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    if precision == "fp16" and device.type == "cpu":
        raise ParameterError("precision = 'fp16' needs a GPU; try precision = 'bf16' or 'fp32'")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Each weight is used once a pass: a cache of its casts would only hold memory.
    handlers = [
        AutocastKwargs(cache_enabled=False),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        kwargs_handlers=handlers,
    )


class Positional(nn.Module):
    "A network whose conditions are given by position, as CUDA graphs want it."

    def __init__(self, net: nn.Module, names: tuple):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, t: Tensor, *cond):
        return self.net(x, t, **dict(zip(self.names, cond, strict=True)))


def graph_pass(
    net: nn.Module,  # in training mode, on a GPU
    x: Tensor,
    t: Tensor,  # inputs of the shapes that will come
    cond: dict,  # conditions, likewise
):  # called like the network
    "Capture a network's forward and backward pass as CUDA graphs; later calls replay them."
    if x.device.type != "cuda":
        raise ParameterError("cuda_graph = True needs a GPU; leave it out on a CPU")
    passes = torch.cuda.make_graphed_callables(
        Positional(net, tuple(cond)).train(),
        tuple(v.detach().clone() for v in (x, t, *cond.values())),
    )
    return lambda x, t, **cond: passes(x, t, *cond.values())


def wants_compile(
    choice: str,  # compile of the experiment: auto | on | off
    device: torch.device,  # where it runs
    n_steps: int,  # of the run
) -> bool:
    "Whether to compile: `auto` does on a GPU where a compiler is at hand, for runs long enough to earn it back."
    from torch.utils._triton import has_triton

    return choice == "on" or (
        choice == "auto"
        and device.type == "cuda"
        and n_steps >= 1000
        and has_triton()
        and bool(shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc"))
    )


def choose_attention(
    exp: Experiment,
    device: torch.device,  # what will run where
    cache: Path = None,  # None: results/cache/attention.json
) -> str:  # sdpa | matrix
    "The faster attention path for this experiment on this machine; `attention` of the experiment overrules."
    if exp.execution.attention != "auto":
        return exp.execution.attention
    m, dtype = (
        exp.model,
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[exp.train.precision],
    )
    length = (exp.data.img_size // m.patch_size) ** 2 + dict(
        none=1, **{"class": 2}, text=1 + exp.data.text_tokens
    )[m.condition]
    shape = (
        min(exp.train.batch_size, 16 if device.type == "cpu" else 128),
        m.num_heads,
        length,
        m.embed_dim // m.num_heads,
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu x{torch.get_num_threads()}"
    )
    key = f"{name}, torch {torch.__version__}, {exp.train.precision}, {shape}"
    cache = cache or project_root() / "results" / "cache" / "attention.json"
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    if key not in known:
        secs = time_attention(*shape, device=device, dtype=dtype)
        known[key] = {"path": min(secs, key=secs.get), "seconds": secs}
        with contextlib.suppress(OSError):
            write_json(cache, known)  # a folder that can't be written only costs the timing again
    return known[key]["path"]


@dataclass(frozen=True)
class DistributedContext:
    "The processes of one run, seen from one of them."

    rank: int = 0
    size: int = 1

    @property
    def part(self) -> slice:
        "This process's rows of a batch."
        return slice(self.rank, None, self.size)

    def mean(self, x: Tensor) -> Tensor:
        "The mean over the processes; the device is not waited for."
        if self.size > 1:
            torch.distributed.all_reduce(x)
            x = x / self.size
        return x

    def gather(self, obj) -> list:
        "Every process's object, in the order of the ranks, everywhere."
        everyone = [obj] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(everyone, obj)
        return everyone

    def first(self, work):
        "The result of `work()` on the first process, everywhere; its exception, too."
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as e:
                error = e
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result


def join_processes(
    processes: int,  # as the experiment says
    device: torch.device,  # where this process computes
) -> DistributedContext:  # rank and size
    "Join the processes that torchrun started. Raises `ParameterError` when their number is not as asked."
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size != processes:
        raise ParameterError(
            f"processes = {processes}, but this is one of {size}: start it with torchrun "
            f"--nproc_per_node {processes}, or let run_experiment do it"
        )
    if size == 1:
        return DistributedContext()
    from accelerate import PartialState

    # The first process computes FID or waits for a lock while the others wait in a collective:
    # torch's own limit of ten minutes would end them. torchrun stops all when one has died.
    state = PartialState(cpu=device.type == "cpu", timeout=PROCESS_TIMEOUT)
    return DistributedContext(state.process_index, state.num_processes)
