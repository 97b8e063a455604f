"""How a network computes on this machine: attention, compiled blocks, recomputed activations."""

import contextlib
import functools
import inspect
import json
import os
import shutil
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from uvit_repro.config import Experiment, ParameterError, project_root
from uvit_repro.data.files import write_json
from uvit_repro.runs.timing import time_calls

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ------------------------------------------------------------------ attention

CUDA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ATTENTION_PATHS = ("sdpa", "math", *CUDA_KERNELS)


def attention(
    q: Tensor,  # queries (B, H, L, D/H)
    k: Tensor,  # keys, like q
    v: Tensor,  # values, like q
    path: str = "sdpa",  # one of ATTENTION_PATHS
) -> Tensor:  # (B, H, L, D/H)
    "Scaled dot-product attention: PyTorch's fused kernel, a chosen one, or two products."
    if path == "math":
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    if path in CUDA_KERNELS and q.is_cuda:
        with sdpa_kernel(CUDA_KERNELS[path]):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def set_attention(
    model: nn.Module,  # any network whose attention layers have a `path`
    path: str,  # one of ATTENTION_PATHS
):
    "Choose the attention path of every layer."
    if path not in ATTENTION_PATHS:
        raise ParameterError(f"attention = {path!r}: allowed are {', '.join(ATTENTION_PATHS)}")
    for m in model.modules():
        if getattr(m, "path", None) in ATTENTION_PATHS:
            m.path = path


def time_attention(
    shape: tuple,  # (B, H, L, D/H)
    device="cpu",
    dtype=torch.float32,  # the type under autocast
    repeats: int = 5,  # timed calls after one warm-up, ten times as many on a GPU
) -> dict:  # path -> seconds of one forward and backward pass, the fastest repetition
    "Time the attention paths that this machine has, on shapes like the model's."
    on_gpu = torch.device(device).type == "cuda"
    calls = repeats * (10 if on_gpu else 1)
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    seconds = {}
    for path in ATTENTION_PATHS if on_gpu else ("sdpa", "math"):

        def call(path=path):
            attention(*qkv, path).sum().backward()

        with contextlib.suppress(RuntimeError):  # this kernel refuses this shape or type
            seconds[path] = min(time_calls(call, device, calls, warmup=1))
    return seconds


def attention_shape(exp: Experiment, device: torch.device) -> tuple:
    "Shape (B, H, L, D/H) of the queries in an experiment's attention layers."
    m = exp.model
    extras = {"none": 1, "class": 2, "text": 1 + exp.data.text_tokens}[m.condition]
    batch = min(exp.train.batch_size, 16 if device.type == "cpu" else 128)
    length = (exp.data.img_size // m.patch_size) ** 2 + extras
    return batch, m.num_heads, length, m.embed_dim // m.num_heads


def attention_choice(
    exp: Experiment,
    device: torch.device,
    cache: Path = None,  # None: results/cache/attention.json
) -> dict:  # for the record: path, and the seconds of each path where timing chose it
    "The attention path for an experiment: the one it names, or the fastest on this machine."
    if exp.execution.attention != "auto":
        return {"path": exp.execution.attention}
    shape = attention_shape(exp, device)
    machine = f"cpu x{torch.get_num_threads()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    key = f"{machine}, torch {torch.__version__}, {exp.train.precision}, {shape}"
    cache = cache or project_root() / "results" / "cache" / "attention.json"
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text(encoding="utf-8"))
    if known.get(key, {}).get("path") not in ATTENTION_PATHS:  # never timed, or an older name
        dtype = AUTOCAST[exp.train.precision] or torch.float32
        seconds = time_attention(shape, device, dtype)
        known[key] = {"path": min(seconds, key=seconds.get), "seconds": seconds}
        with contextlib.suppress(OSError):  # a read-only folder only costs the timing again
            write_json(cache, known)
    return known[key]


def choose_attention(exp: Experiment, device: torch.device, cache: Path = None) -> str:
    "The path of `attention_choice`."
    return attention_choice(exp, device, cache)["path"]


def set_residual(net: nn.Module, kind: str):
    "Keep the residual stream in float32 (as released) or, under autocast, in bfloat16."
    if kind not in ("float32", "bfloat16"):
        raise ParameterError(f"residual = {kind!r}: allowed are 'float32', 'bfloat16'")
    if hasattr(net, "bf16_residual"):
        net.bf16_residual = kind == "bfloat16"
    elif kind == "bfloat16":
        raise ParameterError(f"residual = 'bfloat16': {type(net).__name__} has no such option")


# ------------------------------------------------------------------ compilation

GRAPHS = 64  # compiled graphs per block class; PyTorch's own limit of 8 ends in eager execution


@dataclass
class CompileReport:
    "What compilation did in one network, for the record of its run."

    graphs: int = 0  # compiled for this network
    fallbacks: int = 0  # calls that ran eagerly after a failure
    error: str = ""  # the failure


class CompiledMethod:
    "A compiled method that counts its graphs; after a tolerated failure it runs eagerly."

    def __init__(self, method, report: CompileReport, strict: bool, options: dict):
        self.eager, self.report, self.strict = method, report, strict
        self.compiled = torch.compile(method, **options)

    def __call__(self, *args, **kwargs):
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._dynamo.utils import counters

        if self.report.error:
            self.report.fallbacks += 1
            return self.eager(*args, **kwargs)
        before = counters["stats"]["unique_graphs"]
        try:
            return self.compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as e:
            if self.strict:
                raise
            self.report.error = f"{type(e).__name__}: {e}"[:1000]
            return self(*args, **kwargs)
        finally:
            self.report.graphs += counters["stats"]["unique_graphs"] - before


def compile_blocks(
    net: nn.Module,  # with blocks: modules whose `is_block` is True
    strict: bool = True,  # False: record a compilation failure and run eagerly
    backend: str = "inductor",
) -> CompileReport:  # filled while the network is called
    "Compile each block, and the methods named in `net.compiled_methods`; equal blocks share code."
    blocks = [m for m in net.modules() if getattr(m, "is_block", False)]
    if not blocks:
        raise ParameterError(f"{type(net).__name__} has no blocks to compile: set compile = 'off'")
    options = {"dynamic": False, "fullgraph": True, "backend": backend}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = GRAPHS
    else:  # before PyTorch 2.13 the limit is one for the whole process
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    report = CompileReport()
    parts = [(b, "forward") for b in blocks]
    parts += [(net, name) for name in getattr(net, "compiled_methods", ())]
    compiled = {}
    for module, name in parts:
        method = getattr(type(module), name)
        if method not in compiled:
            compiled[method] = CompiledMethod(method, report, strict, options)
        setattr(module, name, types.MethodType(compiled[method], module))
    return report


def uncompile(net: nn.Module) -> nn.Module:
    "Undo `compile_blocks`, in a copy for example; returns the network."
    for module in net.modules():
        for name, value in list(vars(module).items()):
            if isinstance(getattr(value, "__func__", None), CompiledMethod):
                delattr(module, name)
    return net


def wants_compile(
    choice: str,  # compile of the experiment: auto | on | off
    device: torch.device,
    n_steps: int,  # of the run
) -> bool:
    "Whether to compile: `auto` does on a GPU with a C compiler, for runs of 1,000 steps or more."
    if choice != "auto":
        return choice == "on"
    if device.type != "cuda" or n_steps < 1000:
        return False
    from torch.utils._triton import has_triton

    has_compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    return has_triton() and bool(has_compiler)


class Positional(nn.Module):
    "A network whose conditions are given by position, as CUDA graphs want it."

    def __init__(self, net: nn.Module, names: tuple):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, t: Tensor, *cond):
        return self.net(x, t, **dict(zip(self.names, cond, strict=True)))


def graph_pass(
    net: nn.Module,  # in training mode, on a GPU
    x: Tensor,  # an image batch of the shape that will come
    t: Tensor,  # times, likewise
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


# ------------------------------------------------------------------ recomputed activations

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
FUSED_ATTENTION = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
    if hasattr(torch.ops.aten, name)
)
# Rate of fused attention over that of a matrix product: about half for long sequences, and
# 257 tokens are padded to 384 rows. An estimate for ranking, not a measurement.
ATTENTION_RATE = 0.3


def run_block(block: nn.Module, *args):
    "Call `block.body`, recomputing activations in the backward pass if `set_checkpoint` said so."
    if block.recompute and block.training:
        return checkpoint(block.body, *args, **block.recompute)
    return block.body(*args)


def keep_policy(shapes: frozenset, attended: bool, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    "Keep products of weights of these shapes, and fused attention; recompute the rest."
    kept_product = op in PRODUCTS and tuple(args[-1].shape) in shapes
    if kept_product or (attended and op in FUSED_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def activation_values(
    block: nn.Module,  # a transformer block, with the released names where it has them
    tokens: int,  # sequence length L
    dim: int,  # width D
) -> dict:  # name -> (size in (B, L, D) tensors, time saved per tensor, in operations of a product)
    "What keeping each activation of a block costs and saves."
    values, modules = {}, dict(block.named_modules())
    for name in ("skip_linear", "mlp.fc1", "attn.qkv", "attn.proj"):
        layer = modules.get(name)
        if layer is not None:
            values[name] = (layer.out_features / dim, 2 * layer.in_features * dim)
    values["attention"] = (1, 4 * tokens * dim / ATTENTION_RATE)
    return values


def set_checkpoint(
    model: nn.Module,  # with blocks in in_blocks, mid_block, out_blocks
    on: bool,  # recompute activations in training
    budget: float = 0.0,  # kept activations per block, in (B, L, D) tensors; 0: none, as released
) -> list:  # the names of what each block keeps
    "Turn activation checkpointing on or off; within the budget, keep what saves most per byte."
    blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
    tokens = model.extras + (model.img_size // model.patch_size) ** 2
    offers = [
        (-worth, name, i, size)
        for i, block in enumerate(blocks)
        for name, (size, worth) in activation_values(block, tokens, model.embed_dim).items()
    ]
    kept, left = [[] for _ in blocks], budget * len(blocks)
    for _, name, i, size in sorted(offers):  # equals by name: fewer kinds of blocks to compile
        if size <= left:
            kept[i].append(name)
            left -= size
    for block, names in zip(blocks, kept, strict=True):
        block.recompute = recompute_options(block, names) if on else None
    return kept


def recompute_options(block: nn.Module, names: list) -> dict:
    "Arguments of `torch.utils.checkpoint.checkpoint` that keep the named activations."
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if names:
        layers = [block.get_submodule(n) for n in names if n != "attention"]
        shapes = frozenset((m.in_features, m.out_features) for m in layers)
        policy = functools.partial(keep_policy, shapes, "attention" in names)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    return options
