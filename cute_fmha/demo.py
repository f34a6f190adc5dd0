"""``python -m cute_fmha.demo``: a small DeepSeek-V3 on this package, compared with eager attention.

The model is Transformers' own `DeepseekV3ForCausalLM` with random weights (fixed seed, nothing is
downloaded): multi-head latent attention with DeepSeek's dimensions (192 and 128 per head, a latent
of 512 + 64), YaRN, and mixture-of-experts layers. It reads the bundled text byte by byte.

1. Prefill and greedy decoding with eager attention, then the same tokens again with ours, so that
   every step is comparable. In FP32 the logits must agree to a bound. In BF16 and FP16 rounding
   alone moves them, and now and then sends a token to another expert, so eager attention in FP32
   is the yardstick: ours may not be further from it than eager attention in the same dtype is.
2. The last layer's attention again in absorbed form, `mla_decode` over a paged latent cache made
   from the model's own projections, compared with what that layer computed in eager mode.

The exit code is 1 when a bound is exceeded, 2 when the named backend cannot run the model, 0
otherwise. Speeds are printed as information.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.resources
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from cute_fmha.adapters import hf
from cute_fmha.api import mla_decode
from cute_fmha.dispatch import BACKENDS, select
from cute_fmha.problem import Problem, target_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FP32_BOUND = 2e-4
"""Largest logit difference in FP32, relative to the RMS logit. Measured: 2.4e-5."""

MEDIAN_RATIO, MEAN_RATIO = 1.25, 2.0
"""Largest ratios of our error per token to eager attention's, both against FP32, in BF16 and FP16.

The median is what rounding does; measured 0.9 to 1.0. The mean has the tokens in it that went to
another expert, and is only stable over the many tokens of the prefill.
"""

AGREEMENT = {torch.float32: 1.0, torch.bfloat16: 0.8, torch.float16: 0.9}
"""Share of greedy tokens that must agree. Random weights leave near-ties that rounding decides."""

MLA_BOUND = {torch.float32: 64.0, torch.bfloat16: 8.0, torch.float16: 8.0}
"""Largest `mla_decode` difference, in units of the dtype's rounding of the largest output.

Measured: 18 in FP32, where scores of up to 25 lose what a unit of 1 does not, 2 in BF16 and FP16.
"""

MANY_TOKENS = 1024
PAGE_SIZE = 64
OP = "cute_fmha::attention"


@dataclass
class Run:
    """Logits and greedy tokens of one pass: prefill ``[P, V]``, steps ``[N, V]``, both FP32."""

    prefill: torch.Tensor
    steps: torch.Tensor
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens(self) -> torch.Tensor:
        return self.steps.argmax(-1)


@dataclass
class Captured:
    """What went through one attention layer: its input, rotary tables and pre-projection output."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    rotary: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    output: list[torch.Tensor] = field(default_factory=list)


def build_model(
    seed: int, device: torch.device, dtype: torch.dtype, positions: int
) -> DeepseekV3ForCausalLM:
    """The demo's model, in eval mode; ``positions`` is the longest sequence it will see."""
    config = DeepseekV3Config(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=512,
        q_lora_rank=256,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        initializer_range=0.04,
        max_position_embeddings=max(4096, positions),
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    for layer in model.model.layers:
        # Untrained attention is almost uniform, and then no mistake in it reaches the logits. Six
        # times larger queries give scores with a standard deviation of about 4: few keys win.
        layer.self_attn.q_b_proj.weight.mul_(6.0)
    return model.to(device=device, dtype=dtype)


def bundled_text() -> torch.Tensor:
    """The bytes of the bundled text, int64 ``[1, N]``."""
    text = importlib.resources.files("cute_fmha").joinpath("data/alice.txt").read_bytes()
    return torch.tensor(list(text), dtype=torch.int64)[None]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def run_model(
    model: DeepseekV3ForCausalLM,
    implementation: str,
    ids: torch.Tensor,
    steps: int,
    forced: torch.Tensor | None,
    bar: tqdm,
) -> Run:
    """Prefill ``ids`` ``[1, P]`` and take ``steps`` greedy steps (or follow the tokens ``forced``).

    Step i has the logits for the i-th new token; the first comes from the prefill.
    """
    model.set_attn_implementation(implementation)
    cache = DynamicCache(config=model.config)
    _synchronize(ids.device)
    start = time.perf_counter()
    prefill = model(ids, past_key_values=cache, use_cache=True).logits[0].float()
    _synchronize(ids.device)
    prefill_seconds = time.perf_counter() - start
    bar.update(ids.shape[1])
    logits = [prefill[-1]]
    start = time.perf_counter()
    for step in range(1, steps):
        token = logits[-1].argmax() if forced is None else forced[step - 1]
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        logits.append(out.logits[0, -1].float())
        bar.update(1)
    _synchronize(ids.device)
    decode_seconds = time.perf_counter() - start
    bar.update(1)
    return Run(prefill, torch.stack(logits), prefill_seconds, decode_seconds)


@contextmanager
def capture(attention: deepseek.DeepseekV3Attention) -> Iterator[Captured]:
    """Record what goes through ``attention`` while the context is open."""
    seen = Captured()

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        seen.hidden.append(kwargs["hidden_states"])
        seen.rotary.append(kwargs["position_embeddings"])

    handles = (
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.o_proj.register_forward_pre_hook(
            lambda module, args: seen.output.append(args[0])
        ),
    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Launches:
    """Calls of our op in one step, and what they did on the device (None without one)."""

    calls: int
    launches: int | None
    synchronizations: int | None


class _CallCounter(TorchDispatchMode):
    """Counts calls of our op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func is torch.ops.cute_fmha.attention.default
        return func(*args, **(kwargs or {}))


def _profile(step: Callable[[], Any]) -> Launches:
    """Run ``step`` on the GPU under the profiler and count what happens inside our op."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    events = list(profile.events() or ())
    calls = [event.time_range for event in events if event.name == OP]

    def inside(*names: str) -> int:
        ranges = [event.time_range for event in events if any(name in event.name for name in names)]
        return sum(any(c.start <= r.start and r.end <= c.end for c in calls) for r in ranges)

    return Launches(len(calls), inside("cudaLaunchKernel", "cuLaunchKernel"), inside("Synchronize"))


@torch.inference_mode()
def count_launches(model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> tuple[Launches, Launches]:
    """What one prefill and one decode step with our attention launch."""
    cache = DynamicCache(config=model.config)
    counts = []
    for tokens in (ids, ids[:, -1:]):
        step = functools.partial(model, tokens, past_key_values=cache, use_cache=True)
        if ids.device.type == "cuda":
            counts.append(_profile(step))
        else:
            with _CallCounter() as counter:
                step()
            counts.append(Launches(counter.calls, None, None))
    return counts[0], counts[1]


def _describe(what: str, count: Launches, layers: int) -> str:
    text = f"{what}: {count.calls} op calls, {count.calls / layers:g} per layer"
    if count.launches is None:
        return text + " (no device, so no kernel launches)"
    return (
        f"{text}; {count.launches} kernel launches, {count.launches / layers:g} per layer; "
        f"{count.synchronizations} synchronisations"
    )


def _backends(model: DeepseekV3ForCausalLM, keys: int, device: torch.device, backend: str) -> str:
    """The backend that each kind of call runs on."""
    dtype, heads = model.dtype, model.config.num_attention_heads
    prefill = Problem(
        op="attention", layout="dense", packed_q=False, dtype=dtype, out_dtype=dtype, batch=1,
        seqlen_q=keys, seqlen_k=keys, heads_q=heads, heads_kv=heads, head_dim=192, head_dim_v=128,
        window_right=0,
    )  # fmt: skip
    mla = replace(
        prefill, op="mla_decode", layout="paged", seqlen_q=2, heads_kv=1, head_dim=576,
        head_dim_v=512, page_size=PAGE_SIZE, batch=3,
    )  # fmt: skip
    problems = {"prefill": prefill, "decode": replace(prefill, seqlen_q=1), "mla_decode": mla}
    target = target_of(device)
    return ", ".join(
        f"{name} {select(problem, target, backend).__name__.rsplit('.', 1)[-1]}"
        for name, problem in problems.items()
    )


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _against_fp32(eager: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor) -> tuple[str, bool]:
    """How far both are from FP32 logits ``[N, V]``, and whether ours is too far."""
    theirs, mine = ((x - exact).square().mean(-1).sqrt() for x in (eager, ours))
    medians, means = (theirs.median(), mine.median()), (theirs.mean(), mine.mean())
    failed = not medians[1] <= MEDIAN_RATIO * medians[0]
    text = (
        f"RMS error per token against FP32, eager and ours: median {medians[0]:.2e} and "
        f"{medians[1]:.2e} (ratio {medians[1] / medians[0]:.2f}, bound {MEDIAN_RATIO}), mean "
        f"{means[0]:.2e} and {means[1]:.2e} (ratio {means[1] / means[0]:.2f}"
    )
    if len(mine) < MANY_TOKENS:
        return text + ")", failed
    return f"{text}, bound {MEAN_RATIO})", failed or not means[1] <= MEAN_RATIO * means[0]


def compare_runs(eager: Run, ours: Run, exact: Run | None, dtype: torch.dtype) -> list[str]:
    """Print how two runs differ; returns what exceeds its bound."""
    failures = []
    for name in ("prefill", "steps"):
        want, got = getattr(eager, name), getattr(ours, name)
        scale, worst = _rms(want), float((got - want).abs().max())
        label = "prefill logits" if name == "prefill" else "decode logits"
        line = f"{label}: max difference {worst:.3e} (RMS logit {scale:.3f})"
        if exact is None:
            line += f", bound {FP32_BOUND * scale:.3e}"
            failed = not worst <= FP32_BOUND * scale
        else:
            text, failed = _against_fp32(want, got, getattr(exact, name))
            line += "\n  " + text
        print(line + ("  FAILED" if failed else ""))
        if failed:
            failures.append(label)
    worst_steps = (ours.steps - eager.steps).abs().amax(-1)
    for start in range(0, len(worst_steps), 16):
        values = worst_steps[start : start + 16].tolist()
        print("  max per step:", " ".join(f"{value:.1e}" for value in values))
    same = ours.tokens == eager.tokens
    share, needed = same.float().mean().item(), AGREEMENT[dtype]
    top = eager.steps.topk(2).values
    margins = (top[:, 0] - top[:, 1])[~same]
    line = f"greedy tokens: {int(same.sum())} of {len(same)} agree, at least {needed:.0%} must"
    if len(margins):
        line += f"; eager's margin where they differ: {', '.join(f'{m:.2e}' for m in margins)}"
    failed = share < needed
    print(line + ("  FAILED" if failed else ""))
    return failures + (["greedy tokens"] if failed else [])


def _latent_inputs(
    module: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Absorbed queries ``[S, H, 576]``, latent rows ``[S, 576]`` and W_UV ``[H, 128, 512]``.

    ``module`` is a `DeepseekV3Attention` with low-rank queries.
    """
    length = hidden.shape[1]
    rank, nope, v_dim = module.kv_lora_rank, module.qk_nope_head_dim, module.v_head_dim
    q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
    q = q.view(1, length, module.num_heads, module.qk_head_dim).transpose(1, 2)
    q_nope, q_rope = q.split([nope, module.qk_rope_head_dim], dim=-1)
    latent, k_rope = module.kv_a_proj_with_mqa(hidden).split([rank, module.qk_rope_head_dim], -1)
    latent = module.kv_a_layernorm(latent)
    rotate = (
        deepseek.apply_rotary_pos_emb_interleave
        if module.config.rope_interleave
        else deepseek.apply_rotary_pos_emb
    )
    q_rope, k_rope = rotate(q_rope, k_rope[:, None], *rotary)
    weight = module.kv_b_proj.weight.view(module.num_heads, nope + v_dim, rank)
    w_uk, w_uv = weight.split([nope, v_dim], dim=1)
    q_latent = torch.einsum("hsd,hdr->shr", q_nope[0], w_uk)
    absorbed = torch.cat((q_latent, q_rope[0].transpose(0, 1)), dim=-1)
    return absorbed, torch.cat((latent[0], k_rope[0, 0]), dim=-1), w_uv


def _paged_cache(
    rows: torch.Tensor, lengths: list[int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence is the first ``length`` rows, in shuffled pages; unused memory is NaN."""
    per_sequence = -(-max(lengths) // PAGE_SIZE)
    table = torch.randperm(per_sequence * len(lengths), generator=generator)
    table = table.view(len(lengths), per_sequence).to(rows.device)
    cache = rows.new_full((table.numel() * PAGE_SIZE, rows.shape[1]), math.nan)
    for pages, length in zip(table, lengths, strict=True):
        slots = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=rows.device)
        cache[slots.flatten()[:length]] = rows[:length]
    return cache.view(-1, PAGE_SIZE, 1, rows.shape[1]), table.to(torch.int32)


@torch.inference_mode()
def check_mla(
    module: deepseek.DeepseekV3Attention, seen: Captured, backend: str, seed: int
) -> list[str]:
    """`mla_decode` on one layer's own latents against that layer's eager output."""
    hidden, expanded = seen.hidden[0], seen.output[0]
    absorbed, rows, w_uv = _latent_inputs(module, hidden, seen.rotary[0])
    total, new = hidden.shape[1], 2
    lengths = [total, total - 37, PAGE_SIZE + 1]
    cache, table = _paged_cache(rows, lengths, torch.Generator().manual_seed(seed))
    last = torch.tensor([[n - new + i for i in range(new)] for n in lengths], device=rows.device)
    out = mla_decode(
        absorbed[last],
        cache,
        table,
        torch.tensor(lengths, dtype=torch.int32, device=rows.device),
        scale=module.scaling,
        backend=backend,
    )
    assert isinstance(out, torch.Tensor)
    got = torch.einsum("bshr,hdr->bshd", out, w_uv).float()
    want = expanded[0].unflatten(-1, (module.num_heads, -1))[last].float()
    unit = torch.finfo(expanded.dtype).eps * float(want.abs().max())
    worst = float((got - want).abs().max())
    bound = MLA_BOUND[expanded.dtype]
    failed = not worst <= bound * unit
    print(
        f"mla_decode ({len(lengths)} sequences of {', '.join(map(str, lengths))} tokens, {new} new "
        f"each, pages of {PAGE_SIZE}) against the layer's eager attention: max difference "
        f"{worst:.3e} = {worst / unit:.2f} roundings of the largest output, bound {bound:g}"
        + ("  FAILED" if failed else "")
    )
    return ["mla_decode"] if failed else []


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.demo", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="greedy tokens after it")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: bf16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    longest = bundled_text().shape[1]
    if not 2 * PAGE_SIZE <= args.prefill <= longest:
        parser.error(f"--prefill: got {args.prefill}; allowed: {2 * PAGE_SIZE} to {longest}")
    if args.decode < 1:
        parser.error(f"--decode: got {args.decode}; allowed: at least 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bf16" if args.device == "cuda" else "fp32"
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    args = parse(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    hf.register(backend=args.backend)
    model = build_model(args.seed, device, dtype, args.prefill + args.decode)
    layers = model.config.num_hidden_layers
    ids = bundled_text()[:, : args.prefill].to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"device: {name}; dtype: {args.dtype}; model: {layers} layers, 8 heads (192, 128)")
    try:
        print(f"backend: {_backends(model, args.prefill, device, args.backend)}")
    except NotImplementedError as error:
        print(error)
        return 2

    passes = 2 if dtype == torch.float32 else 3
    attention = model.model.layers[-1].self_attn
    total = passes * (args.prefill + args.decode)
    with tqdm(total=total, unit="token", mininterval=0.5) as bar:
        bar.set_description("eager")
        with capture(attention) as seen:
            eager = run_model(model, "eager", ids, args.decode, None, bar)
        bar.set_description("cute_fmha")
        ours = run_model(model, hf.NAME, ids, args.decode, eager.tokens, bar)
        exact = None
        if passes == 3:
            bar.set_description("eager FP32")
            exact = run_model(
                copy.deepcopy(model).float(), "eager", ids, args.decode, eager.tokens, bar
            )
        bar.set_description("done")

    # What a layer launches does not depend on the length; a short prompt is quick on a CPU.
    sample = ids if device.type == "cuda" else ids[:, :PAGE_SIZE]
    prefill, decode = count_launches(model, sample)
    print(_describe("prefill", prefill, layers))
    print(_describe("decode step", decode, layers))
    failures = compare_runs(eager, ours, exact, dtype)
    if prefill.calls != layers or decode.calls != layers:
        failures.append("one op call per layer")
    failures += check_mla(attention, seen, args.backend, args.seed)
    for label, run in (("eager", eager), ("ours", ours)):
        rate = (args.decode - 1) / run.decode_seconds if args.decode > 1 else math.nan
        print(
            f"{label}: prefill {args.prefill / run.prefill_seconds:.0f} tokens/s, "
            f"decode {rate:.1f} tokens/s (first run, kernel compilation included)"
        )
    print("FAILED: " + ", ".join(failures) if failures else "passed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
