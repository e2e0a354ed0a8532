"""Checks the Triton kernels on a GPU, then times variants of them. One command, a short table last.

    python3 benchmarks/kernels.py [--seconds 330] [--only SUBSTRING]

Kernels are compiled first by worker processes that see no GPU; a variant that fails to compile, is wrong or runs out
of a resource is printed as such and not timed. Full numbers go to kernels.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver, jit

from dilated_attention_pytorch.core import reference
from dilated_attention_pytorch.core.pattern import DilatedPattern
from dilated_attention_pytorch.core.problem import Problem
from dilated_attention_pytorch.kernels.sdpa import backend as sdpa
from dilated_attention_pytorch.kernels.triton import backend, launch_aligned, launch_branches
from dilated_attention_pytorch.kernels.triton.configs import Config
from dilated_attention_pytorch.kernels.triton.replay import Tape
from dilated_attention_pytorch.kernels.triton.work import Work
from dilated_attention_pytorch.types import NO_MASKS, QKV, AttentionOutput, Masks, OutputGradient

WORKERS = 15
DEVICE = "cuda"
PAPER = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16)
PAPER12 = (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)
SLIDE = (1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16)
LONG, MIDDLE, SHORT = 1 << 20, 1 << 18, 1 << 16
CASES = (64, False), (128, False), (64, True), (128, True), (48, False)


class NoGPU:
    """Stands in for the driver while workers compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only():
    driver.set_active(NoGPU())
    original = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        with contextlib.suppress(Exception):  # the host's half of a launch is C code that is compiled and kept too
            CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    jit.JITFunction.run = run


def problem(pattern, heads, d, n, causal=False, **changes):
    settings = dict(
        pattern=DilatedPattern(*pattern, heads, changes.pop("offsets", "modulo")), is_causal=causal, scale=d**-0.5,
        dropout_p=0.0, q_start=0, k_start=0, seq_len=n, mixing_gradient="exact", padding="none",
    )  # fmt: skip
    return Problem(**(settings | changes))


# --- correctness: every mode against the dense reference in fp64 -------------------------------------------------------


def small_cases():
    """(name, q shape, kv shape, dtype, problem, layout arguments)."""
    found = []

    def add(name, b, n, h, d, ws, rs, dtype=torch.bfloat16, h_kv=None, n_k=None, causal=False, layout=None, **changes):
        h_kv, n_k = h_kv or h, n_k or n
        end = max(changes.get("q_start", 0) + n, changes.get("k_start", 0) + n_k)
        p = problem((ws, rs), h_kv, d, changes.pop("seq_len", end), causal, **changes)
        found.append((name, (b, n, h, d), (b, n_k, h_kv, d), dtype, p, layout or {}))

    half, single = torch.float16, torch.float32
    add("plain", 2, 999, 4, 64, (128, 512), (1, 2))
    add("causal", 2, 999, 4, 64, (128, 512), (1, 2), causal=True)
    add("causal d128", 1, 1111, 4, 128, (128, 512, 4000), (1, 2, 3), causal=True)
    add("d48 fp16 blocked", 1, 1500, 6, 48, (100, 333, 2000), (1, 2, 5), half, offsets="blocked")
    add("d80", 1, 777, 3, 80, (100, 333), (1, 3))
    add("d256", 1, 600, 2, 256, (128, 512), (1, 2))
    add("d256 causal", 1, 600, 2, 256, (128, 512), (1, 2), causal=True)
    add("fp32 d64", 1, 900, 3, 64, (100, 512), (1, 3), single)
    add("fp32 d128 causal", 1, 900, 3, 128, (128, 512), (1, 3), single, causal=True)
    add("fp32 d256", 1, 400, 2, 256, (128, 512), (1, 3), single)
    add("gqa", 2, 999, 6, 64, (128, 512), (1, 2), h_kv=2)
    add("gqa causal", 2, 999, 6, 64, (128, 512), (1, 2), h_kv=2, causal=True)
    add("no rate 1", 1, 700, 4, 64, (128, 512), (2, 3))
    add("rate > length", 1, 700, 4, 64, (7, 512), (40, 3))
    add("aligned", 2, 4096, 4, 64, (1024, 2048, 4096), (1, 2, 4))
    add("aligned d128 gqa", 1, 4096, 4, 128, (1024, 2048, 4096), (1, 2, 4), h_kv=2)
    add("aligned ragged", 1, 3333, 4, 64, (1024, 2048, 9999), (1, 2, 4))
    add("aligned ragged views", 1, 3300, 4, 64, (1024, 2048, 9999), (1, 2, 4))
    add("aligned d48", 1, 3333, 4, 48, (1024, 2048, 9999), (1, 2, 4))
    add("even causal", 1, 4096, 4, 64, (1024, 2048, 4096), (1, 2, 4), causal=True)
    add("even causal d128", 2, 4096, 2, 128, (1024, 2048, 4096), (1, 2, 4), causal=True)
    mask = torch.ones(2, 999, dtype=torch.bool)
    mask[0, 700:] = False
    mask[1, ::3] = False
    add("mask", 2, 999, 4, 64, (128, 512), (1, 2), layout={"key_padding_mask": mask})
    add("mask causal", 2, 999, 4, 64, (128, 512), (1, 2), causal=True, layout={"key_padding_mask": mask})
    add("row_start", 2, 999, 4, 64, (128, 512), (1, 2), layout={"row_start": torch.tensor([0, 333])})
    bounds = torch.tensor([0, 5, 5, 600, 999])
    add("packed", 1, 999, 4, 64, (128, 512), (1, 2), layout={"cu_seqlens": bounds})
    add("packed causal", 1, 999, 4, 64, (128, 512), (1, 2), causal=True, layout={"cu_seqlens": bounds})
    add("dropout", 1, 999, 4, 64, (128, 512), (1, 2), dropout_p=0.2)
    add("dropout causal", 1, 999, 4, 64, (128, 512), (1, 2), causal=True, dropout_p=0.2)
    add("zero_keys", 1, 1069, 4, 48, (100, 333, 2000), (1, 2, 4), half, padding="zero_keys", offsets="blocked")
    add("decode", 2, 1, 4, 64, (128, 512), (1, 2), n_k=999, causal=True, q_start=998)
    add("partial", 1, 300, 4, 64, (128, 512), (1, 2), n_k=600, causal=True, q_start=500, k_start=100)
    add("tiny", 1, 5, 4, 64, (128, 512), (1, 2))
    return found


def small_inputs(case, device):
    name, q_shape, k_shape, dtype, p, layout = case
    generator = torch.Generator().manual_seed(len(name))
    shapes = q_shape, k_shape, k_shape, q_shape, (q_shape[0], q_shape[2], q_shape[1])
    tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    layout = {key: value.to(device) for key, value in layout.items()}
    if p.dropout_p:
        layout["seed"] = torch.tensor(-1234567890123, device=device)
    return tensors, layout


def run_small(case, device):
    (q, k, v, grad_out, grad_lse), layout = small_inputs(case, device)
    x, masks = QKV(q, k, v), Masks(*(layout.get(n) for n in ("key_padding_mask", "row_start", "cu_seqlens", "seed")))
    saved = backend.forward(x, case[4], masks)
    grad = OutputGradient(grad_out, grad_lse.float())
    return *saved, *backend.backward(grad, x, saved, case[4], masks)


def distance(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check_small(case):
    """Relative errors of out, lse, dq, dk, dv, and the bound: four roundings of the dtype."""
    (q, k, v, grad_out, grad_lse), layout = small_inputs(case, DEVICE)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.attention(*exact, case[4], **layout)
    seen = torch.isfinite(lse)
    total = (out * grad_out.double()).sum() + (lse.masked_fill(~seen, 0.0) * grad_lse.double()).sum()
    grads = torch.autograd.grad(total, exact)
    results = run_small(case, DEVICE)
    if not torch.equal(torch.isfinite(results[1]), seen):
        return [float("nan")] * 5, 0.0
    mine = [results[0], results[1].masked_fill(~seen, 0.0), *results[2:]]
    errors = [distance(a, b) for a, b in zip(mine, (out, lse.masked_fill(~seen, 0.0), *grads), strict=True)]
    return errors, {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[q.dtype]


# --- variants --------------------------------------------------------------------------------------------------------


def variants():
    """(label, kind, D, causal, config)."""
    found = []

    def add(kind, d, causal, *configs):
        for config in configs:
            mode = "causal" if causal else "full"
            found.append((f"{kind} d{d} {mode} {short(config)}", kind, d, causal, config))

    c, e = Config, {"early": True}
    add("aligned_forward", 64, False, c(64, 128, 4, 2), c(64, 128, 4, 3), c(128, 64, 8, 3), c(128, 64, 8, 4),
        c(64, 64, 4, 3), c(64, 64, 4, 4), c(128, 64, 4, 4), c(128, 128, 8, 3))  # fmt: skip
    add("aligned_forward", 128, False, c(128, 64, 8, 3), c(128, 64, 8, 4), c(64, 64, 4, 3), c(64, 64, 4, 4),
        c(128, 128, 8, 3), c(128, 32, 8, 4), c(64, 32, 4, 4))  # fmt: skip
    add("aligned_dq", 64, False, c(64, 64, 4, 3), c(64, 64, 4, 4), c(128, 64, 8, 3), c(128, 64, 8, 4),
        c(64, 128, 4, 2), c(64, 128, 4, 3))  # fmt: skip
    add("aligned_dq", 128, False, c(128, 64, 8, 3), c(128, 64, 8, 4), c(64, 64, 4, 3), c(128, 128, 8, 2),
        c(64, 32, 4, 4))  # fmt: skip
    add("aligned_dkv", 64, False, c(64, 64, 4, 3, **e), c(64, 64, 4, 4, **e), c(64, 128, 8, 4, **e), c(64, 64, 4, 3),
        c(32, 64, 4, 4, **e), c(128, 64, 4, 2, **e))  # fmt: skip
    add("aligned_dkv", 128, False, c(64, 64, 4, 2), c(64, 64, 4, 3), c(64, 128, 8, 3, **e), c(64, 128, 8, 3),
        c(32, 64, 4, 3), c(32, 128, 8, 4, **e))  # fmt: skip
    add("forward", 64, True, c(128, 64, 4, 3), c(128, 64, 4, 4), c(128, 64, 8, 3), c(128, 64, 8, 4), c(64, 64, 4, 3),
        c(64, 64, 4, 4), c(64, 128, 4, 2), c(64, 128, 4, 3))  # fmt: skip
    add("forward", 128, True, c(128, 64, 8, 3), c(128, 64, 8, 4), c(64, 64, 4, 3), c(64, 32, 4, 4), c(128, 32, 8, 4))
    add("dq", 64, True, c(64, 64, 4, 3), c(64, 64, 4, 4), c(128, 64, 8, 4), c(64, 128, 4, 2))
    add("dq", 128, True, c(64, 64, 4, 2), c(64, 64, 4, 3), c(128, 64, 8, 3), c(64, 32, 4, 4))
    add("dkv", 64, True, c(64, 64, 4, 2, **e), c(64, 64, 4, 3, **e), c(64, 64, 4, 4, **e), c(64, 64, 4, 3))
    add("dkv", 128, True, c(64, 64, 4, 2), c(64, 64, 4, 3), c(64, 128, 8, 3, **e), c(64, 128, 8, 3), c(32, 64, 4, 3))
    add("forward", 48, False, c(128, 64, 8, 3), c(128, 64, 4, 3), c(128, 64, 8, 4), c(64, 64, 4, 3), c(64, 64, 4, 4),
        c(64, 128, 4, 2), c(128, 64, 8, 3, descriptors=False))  # fmt: skip
    add("dq", 48, False, c(64, 64, 4, 3), c(64, 64, 4, 4), c(128, 64, 8, 3), c(64, 64, 4, 3, descriptors=False))
    add("dkv", 48, False, c(64, 64, 4, 2, **e), c(64, 64, 4, 3, **e), c(64, 64, 4, 4, **e),
        c(64, 64, 4, 3, descriptors=False, **e))  # fmt: skip
    return found


def short(config):
    name = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    return name + (" early" if config.early else "") + ("" if config.descriptors else " ptr")


FACTOR = {"aligned_forward": 4, "forward": 4, "aligned_dq": 6, "dq": 6, "aligned_dkv": 8, "dkv": 8}


class Data:
    """Inputs of the paper's case at one length and head width."""

    def __init__(self, d, n, device, causal):
        heads = 768 // d
        pattern, offsets = (SLIDE, "blocked") if d == 48 else (PAPER, "modulo")
        make = torch.randn if device == DEVICE else torch.empty
        *x, grad_out = (make(1, n, heads, d, device=device, dtype=torch.bfloat16) for _ in range(4))
        self.x, self.grad = QKV(*x), OutputGradient(grad_out, None)
        self.problem = problem(pattern, heads, d, n, causal, offsets=offsets)
        self.work = Work(self.x, self.problem, NO_MASKS)
        if device == DEVICE:
            out, lse = (x.detach() for x in sdpa.forward(self.x, self.problem))
        else:
            out, lse = torch.empty_like(self.x.q), torch.empty(1, heads, n)
        self.saved = AttentionOutput(out.to(torch.bfloat16), lse)

    @functools.cached_property
    def aligned_terms(self):
        """What the one-launch dK/dV pass reads, as the dQ pass leaves it."""
        terms = launch_aligned.terms_buffer(self.work, Tape(), 128)
        if terms.is_cuda:
            launch_aligned.backward_dq(self.work, self.grad, self.saved, terms, Tape(), Config(128, 64, 4, 2))
        return terms

    @functools.cached_property
    def query_terms(self):
        delta = launch_branches.compute_delta(self.work, self.grad, self.saved, Tape())
        return launch_branches.QueryTerms(self.grad.out, self.saved.lse, delta)


def run_variant(data, kind, config):
    """Runs one variant; returns what it computes."""
    work, tape = data.work, Tape()
    if kind == "aligned_forward":
        return launch_aligned.forward(work, tape, config)
    if kind == "forward":
        return launch_branches.forward(work, tape, config)
    if kind == "aligned_dq":
        terms = launch_aligned.terms_buffer(work, tape, 128)
        return (launch_aligned.backward_dq(work, data.grad, data.saved, terms, tape, config),)
    if kind == "aligned_dkv":
        return launch_aligned.backward_dkv(work, data.grad, data.aligned_terms, tape, config)
    if kind == "dq":
        return (launch_branches.backward_dq(work, data.query_terms, tape, config),)
    return launch_branches.backward_dkv(work, data.query_terms, tape, config)


def expected(data, kind):
    if kind.endswith("forward"):
        return data.saved
    if not hasattr(data, "grads"):
        data.grads = sdpa.backward(data.grad, data.x, data.saved, data.problem)
    return data.grads[:1] if kind.endswith("dq") else data.grads[1:]


def row_errors(results, wanted):
    """(relative norm, worst row's error against the typical row's norm) of the worst tensor."""
    whole, worst = 0.0, 0.0
    for a, b in zip(results, wanted, strict=True):
        difference, b = (a.float() - b.float()), b.float()
        whole = max(whole, float(difference.norm() / b.norm()))
        if b.dim() == 4:
            worst = max(worst, float(difference.norm(dim=-1).max() / b.norm(dim=-1).mean()))
    return (float("nan"), float("nan")) if any(not torch.isfinite(x).all() for x in results) else (whole, worst)


def milliseconds(call, repeats=5):
    call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def dense(d, causal, n=SHORT):
    """TFLOP/s of cuDNN's dense attention: forward, backward, both."""
    heads = 768 // d
    x = [torch.randn(1, heads, n, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    flops = 4 * n * n * heads * d / (2 if causal else 1) / 1e9
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        call = lambda: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=causal)
        with torch.no_grad():
            forward = milliseconds(call)
        out = call()
        grad = torch.randn_like(out)
        backward = milliseconds(lambda: torch.autograd.grad(out, x, grad, retain_graph=True))
    return flops / forward, 2.5 * flops / backward, 3.5 * flops / (forward + backward)


# --- the whole -------------------------------------------------------------------------------------------------------


def jobs(device):
    """What must be compiled: (label, callable)."""
    for case in () if os.environ.get("SKIP_MODES") else small_cases():
        yield f"case {case[0]}", lambda case=case: run_small(case, device)
    for label, kind, d, causal, config in variants():
        yield (
            label,
            lambda kind=kind, d=d, causal=causal, config=config: run_variant(
                Data(d, SHORT, device, causal), kind, config
            ),
        )


def compile_worker(index):
    torch.set_num_threads(1)
    compile_only()
    for i, (label, job) in enumerate(jobs("cpu")):
        if i % WORKERS == index:
            try:
                job()
            except Exception as error:
                print(f"did not compile: {label}: {type(error).__name__} {str(error)[:300]}", flush=True)


def section(title):
    print(f"\n== {title}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--worker", type=int)
    parser.add_argument("--skip-modes", action="store_true", help="go straight to the variants")
    options = parser.parse_args()
    if options.worker is not None:
        return compile_worker(options.worker)

    began = time.monotonic()
    left = lambda: options.seconds - (time.monotonic() - began)
    # The workers must not hold a CUDA context each, nor ask for one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SKIP_MODES": "1" if options.skip_modes else ""}
    workers = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(i)], env=environment) for i in range(WORKERS)
    ]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.monotonic() - began:.0f} s; {torch.cuda.get_device_name()}, torch {torch.__version__}, "
          f"triton {triton.__version__}")  # fmt: skip
    torch.manual_seed(0)
    numbers = {}
    # Fresh tensors come filled with NaN: an output that no program wrote shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True

    section("modes against the fp64 reference: relative error of out, lse, dq, dk, dv")
    wrong = 0
    for case in () if options.skip_modes else small_cases():
        if options.only and options.only not in case[0]:
            continue
        try:
            errors, bound = check_small(case)
            good = max(errors) < bound
        except Exception as error:
            errors, good = [], False
            print(f"{case[0]}: {type(error).__name__} {str(error)[:300]}")
        numbers[f"case {case[0]}"] = errors
        if not good:
            wrong += 1
            print(f"WRONG {case[0]:24s} " + " ".join(f"{e:.1e}" for e in errors))
    print(f"{len(small_cases()) - wrong} of {len(small_cases())} modes right, {time.monotonic() - began:.0f} s")

    section("variants checked at N=65536 against sdpa")
    good = set()
    for d, causal in CASES:
        data = Data(d, SHORT, DEVICE, causal)
        for label, kind, width, is_causal, config in variants():
            if (width, is_causal) != (d, causal) or options.only not in label:
                continue
            try:
                errors = row_errors(run_variant(data, kind, config), expected(data, kind))
            except Exception as error:
                print(f"FAILED {label}: {type(error).__name__} {str(error)[:160]}")
                continue
            numbers[label] = {"errors": errors}
            if errors[0] < 1.5e-2 and errors[1] < 0.2:
                good.add(label)
            else:
                print(f"WRONG {label}: {errors[0]:.1e}, worst row {errors[1]:.1e}")
        del data
    print(f"{len(good)} of {len(variants())} variants right, {time.monotonic() - began:.0f} s")
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False

    section("N=1,048,576, w=2048..32768, r=1,2,4,8,16, bf16: ms and TFLOP/s by the products each pass computes")
    best = {}
    for d, causal in CASES:
        torch.cuda.empty_cache()
        n = MIDDLE if d == 48 else LONG
        data = Data(d, n, DEVICE, causal)
        rates = dense(max(d, 64), causal)
        numbers[f"dense d{d} {'causal' if causal else 'full'}"] = rates
        print(f"-- d{d} {'causal' if causal else 'full'}: dense cuDNN at N=65536 "
              f"{rates[0]:.0f} forward, {rates[1]:.0f} backward, {rates[2]:.0f} both")  # fmt: skip
        pairs = data.problem.pattern.pairs(n, is_causal=causal)
        for label, kind, width, is_causal, config in variants():
            if (width, is_causal) != (d, causal) or label not in good or left() < 60:
                continue
            time_ms = milliseconds(lambda: run_variant(data, kind, config))
            rate = FACTOR[kind] * pairs * d / time_ms / 1e9
            numbers[label] |= {"ms": time_ms, "tflops": rate}
            name = "forward" if kind == "aligned_forward" else kind.removeprefix("aligned_")
            key = d, causal, name
            best[key] = min(best.get(key, (1e9, "")), (time_ms, f"{kind} {short(config)}"))
            print(f"{kind:16s}{short(config):28s}{time_ms:8.2f} ms {rate:6.0f}", flush=True)
        parts = [best.get((d, causal, name), (float("nan"),))[0] for name in ("forward", "dq", "dkv")]
        flops = 4 * pairs * d / 1e9
        print(f"   best: forward {flops / parts[0]:.0f} = {flops / parts[0] / rates[0]:.2f} of dense; forward+backward "
              f"{3.5 * flops / sum(parts):.0f} = {3.5 * flops / sum(parts) / rates[2]:.2f} of dense")  # fmt: skip
        del data

    section("other patterns, bf16: ms of this backend and of sdpa, forward and forward+backward")
    for name, pattern, heads, d, n, offsets in (
        ("rates 1,2,4,6,12", PAPER12, 12, 64, LONG, "modulo"), ("slide", SLIDE, 16, 48, 10_000, "blocked"),
        ("slide", SLIDE, 16, 48, 46_000, "blocked"), ("slide", SLIDE, 16, 48, 262_144, "blocked"),
        ("slide", SLIDE, 16, 48, LONG, "blocked"),
    ):  # fmt: skip
        if left() < 25:
            break
        torch.cuda.empty_cache()
        p = problem(pattern, heads, d, n, offsets=offsets)
        *x, grad_out = (torch.randn(1, n, heads, d, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
        x, grad, results = QKV(*x), OutputGradient(grad_out, None), []
        for module in (backend, sdpa):
            out, lse = module.forward(x, p)
            saved = AttentionOutput(out.to(torch.bfloat16), lse)
            results.append((*saved, *module.backward(grad, x, saved, p)))
        errors = row_errors(*results)
        repeats = 3
        forwards = [milliseconds(lambda b=b: b.forward(x, p), repeats) for b in (backend, sdpa)]
        saved = AttentionOutput(*results[0][:2])
        del results
        backwards = [milliseconds(lambda b=b: b.backward(grad, x, saved, p), repeats) for b in (backend, sdpa)]
        rate = 4 * d * p.pattern.pairs(n) / forwards[0] / 1e9
        numbers[f"{name} {n}"] = {"forward": forwards, "backward": backwards, "errors": errors}
        both = [f + b for f, b in zip(forwards, backwards, strict=True)]
        print(f"{name:18s} N={n:8d} forward {forwards[0]:8.2f} ({rate:.0f} TFLOP/s), sdpa {forwards[1]:8.2f}: "
              f"{forwards[1] / forwards[0]:.1f}x; both {both[0]:8.2f}, sdpa {both[1]:8.2f}: {both[1] / both[0]:.1f}x; "
              f"difference {errors[0]:.1e}", flush=True)  # fmt: skip

    Path("kernels.json").write_text(json.dumps(numbers, indent=1, default=str))
    section(f"summary after {time.monotonic() - began:.0f} s: {wrong} modes wrong")
    for (d, causal, name), (time_ms, label) in best.items():
        print(f"d{d} {'causal' if causal else 'full':6s} {name:8s}{time_ms:8.2f} ms  {label}")


if __name__ == "__main__":
    main()
