"""How a network computes on this machine: attention, compiled blocks, recomputed activations."""

import contextlib
import functools
import json
import math
import os
import shutil
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointPolicy

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


def time_attention(shape: tuple, device: torch.device, dtype: torch.dtype) -> dict:
    "Seconds of a forward and backward pass, the fastest of several, by attention path."
    on_gpu = device.type == "cuda"
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    seconds = {}
    for path in ATTENTION_PATHS if on_gpu else ("sdpa", "math"):

        def call(path=path):
            attention(*qkv, path).sum().backward()

        with contextlib.suppress(RuntimeError):  # this kernel refuses this shape or type
            seconds[path] = min(time_calls(call, device, 50 if on_gpu else 5, warmup=1))
    return seconds


def attention_choice(
    exp: Experiment,
    device: torch.device,
    cache: Path = None,  # None: results/cache/attention.json
) -> dict:  # for the record: path, and the seconds of each path where timing chose it
    "The attention path for an experiment: the one it names, or the fastest on this machine."
    if exp.execution.attention != "auto":
        return {"path": exp.execution.attention}
    m, on_gpu = exp.model, device.type == "cuda"
    extras = {"none": 1, "class": 2, "text": 1 + exp.data.text_tokens}[m.condition]
    length = (exp.data.img_size // m.patch_size) ** 2 + extras
    batch = min(exp.train.batch_size, 128 if on_gpu else 16)
    shape = (batch, m.num_heads, length, m.embed_dim // m.num_heads)
    name = torch.cuda.get_device_name(device) if on_gpu else f"cpu x{torch.get_num_threads()}"
    key = f"{name}, torch {torch.__version__}, {exp.train.precision}, {shape}"
    cache, known = cache or project_root() / "results" / "cache" / "attention.json", {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text(encoding="utf-8"))
    if known.get(key, {}).get("path") not in ATTENTION_PATHS:  # never timed, or an older name
        seconds = time_attention(shape, device, AUTOCAST[exp.train.precision] or torch.float32)
        known[key] = {"path": min(seconds, key=seconds.get), "seconds": seconds}
        with contextlib.suppress(OSError):  # a read-only folder only costs the timing again
            write_json(cache, known)
    return known[key]


def set_residual(net: nn.Module, kind: str):
    "Keep the residual stream in float32 (as released) or, under autocast, in bfloat16."
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

    def __init__(self, method, report: CompileReport, strict: bool, backend: str):
        self.eager, self.report, self.strict = method, report, strict
        self.compiled = torch.compile(method, dynamic=False, fullgraph=True, backend=backend)

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
    parts = [(m, "forward") for m in net.modules() if getattr(m, "is_block", False)]
    if not parts:
        raise ParameterError(f"{type(net).__name__} has no blocks to compile: set compile = 'off'")
    parts += [(net, name) for name in getattr(net, "compiled_methods", ())]
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    report, compiled = CompileReport(), {}
    for module, name in parts:
        method = getattr(type(module), name)
        if method not in compiled:
            compiled[method] = CompiledMethod(method, report, strict, backend)
        setattr(module, name, types.MethodType(compiled[method], module))
    return report


def wants_compile(
    choice: str,  # compile of the experiment: auto | on | off
    device: torch.device,
    n_steps: int,  # of the run
) -> bool:
    "Whether to compile: `auto` does on a GPU with a C compiler, for runs of 1,000 steps or more."
    if choice != "auto" or device.type != "cuda" or n_steps < 1000:
        return choice == "on"
    from torch.utils._triton import has_triton

    return has_triton() and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc")))


# ------------------------------------------------------------------ recomputed activations

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# What a block keeps first, by computation saved per byte. `skip_linear` reads two inputs; a fused
# attention kernel runs at about 0.3 of a product's rate, so its output is worth more than that of
# any other product once there are more than 0.15 D tokens.
KEPT_FIRST = ("skip_linear", "attention", "attn.proj", "attn.qkv", "mlp.fc1")


def run_block(block: nn.Module, *args):
    "Call `block.body`, recomputing activations in the backward pass if `set_checkpoint` said so."
    if block.recompute and block.training:
        return checkpoint.checkpoint(block.body, *args, **block.recompute)
    return block.body(*args)


def set_checkpoint(
    model: nn.Module,  # with blocks in in_blocks, mid_block, out_blocks
    on: bool,  # recompute activations in training
    budget: float = 0.0,  # kept activations per block, in (B, L, D) tensors; 0: none, as released
) -> list:  # the names of what each block keeps
    "Turn activation checkpointing on or off; within the budget, keep what saves most per byte."
    blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
    layers, kept = [dict(block.named_modules()) for block in blocks], [[] for _ in blocks]
    left = budget * len(blocks)
    for name in KEPT_FIRST:
        for own, names in zip(layers, kept, strict=True):
            size = 1.0 if name == "attention" else math.inf
            if name in own:
                size = own[name].out_features / model.embed_dim
            if size <= left:
                names.append(name)
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
        make = checkpoint.create_selective_checkpoint_contexts
        options["context_fn"] = functools.partial(make, policy)
    return options


def keep_policy(shapes: frozenset, attended: bool, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    "Keep products of weights of these shapes, and fused attention; recompute the rest."
    kept_product = op in PRODUCTS and tuple(args[-1].shape) in shapes
    if kept_product or (attended and op in FUSED_ATTENTION):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
