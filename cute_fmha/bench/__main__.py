"""``python -m cute_fmha.bench {prefill,decode,mla-decode}``: time ours against its peers.

Examples:

    python -m cute_fmha.bench prefill --preset anchors --ceilings --out results
    python -m cute_fmha.bench mla-decode --peers flashmla --shapes 128,1,128,4096 1,1,16,131072
    python -m cute_fmha.bench prefill --skip 0.1 --low-share 0.7 --causal --peers fa4

Times are medians with their 10th and 90th percentile. TFLOP/s count 2·B·Hq·Sq·Sk·(D+Dv), halved
for a causal prefill; GB/s count what a call must move: q, keys and values (the latent once), the
output. ``time/ours`` 1.10 means that the peer takes 1.10 times as long as cute_fmha. The full
record goes to ``<out>/<command>.json``, the plot to ``<out>/<command>.png``. Nothing here checks
correctness.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cute_fmha.bench.measure import (
    Contestant,
    Failure,
    Settings,
    Summary,
    describe,
    measure,
    measure_ceilings,
)
from cute_fmha.bench.peers import (
    DEFAULT_PEERS,
    CuteFmha,
    Implementation,
    all_peers,
    choose_peers,
)
from cute_fmha.bench.problems import (
    COMMANDS,
    DTYPES,
    FIELDS,
    PRESETS,
    Inputs,
    Shape,
    input_sets,
    make_inputs,
    make_shapes,
)
from cute_fmha.bench.report import Report, Row, preamble, table_rows, write_json, write_plot
from cute_fmha.dispatch import BACKENDS


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number > 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number in [0, 1)")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name and name != "none")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cute_fmha.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--peers", type=_names, help=f"comma-separated, of {', '.join(all_peers())}; or none")
    add("--mode", choices=("graph", "plain"), default="graph",
        help="graph: CUDA-graph replay (default); plain: event-timed calls")  # fmt: skip
    add("--device", default="auto", help="auto (CUDA if there is one), cuda, cuda:1, cpu")
    fields = "; ".join(f"{name}: {','.join(order)}" for name, order in FIELDS.items())
    add("--shapes", nargs="+", metavar="N,N,…", help=fields)
    add("--preset", choices=tuple(PRESETS), help="default: anchors on CUDA, cpu on a CPU")
    add("--dtype", choices=tuple(DTYPES), default="bf16")
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--causal", action="store_true", help="causal only (default for decode)")
    masks.add_argument("--full", action="store_true", help="full only; prefill measures both")
    add("--page-size", type=int, help="paged keys: default 64 for mla-decode, else contiguous")
    add("--skip", type=float, nargs="+", default=[], metavar="λ",
        help="also measure skip-softmax at these thresholds")  # fmt: skip
    add("--low-share", type=_share, default=0.0, metavar="SHARE",
        help="share of 128-key blocks made unimportant, so that --skip has work")  # fmt: skip
    add("--backend", choices=BACKENDS, default="auto", help="backend of cute_fmha")
    add("--ceilings", action="store_true", help="also measure copy bandwidth and a matrix product")
    add("--seconds", type=_positive, default=0.3, help="measuring time per contestant and shape")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder for the JSON file and the plot")
    add("--name", help="file name there without suffix (default: the command)")
    return parser


def choose_device(text: str) -> torch.device:
    """``auto`` is CUDA where there is a device.

    Raises:
        ValueError: a CUDA device is named and there is none.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {text}; there is no CUDA device here")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def choose_shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """The shapes that the command line asks for."""
    command = options.command
    preset = options.preset or ("anchors" if device.type == "cuda" else "cpu")
    texts = tuple(options.shapes) if options.shapes else PRESETS[preset][command]
    causal: tuple[bool, ...] = (True, False) if command == "prefill" else (True,)
    if options.causal or options.full:
        causal = (bool(options.causal),)
    page_size = options.page_size
    if page_size is None:
        page_size = 64 if command == "mla-decode" else 0
    if page_size < 0 or (command == "mla-decode" and not page_size):
        raise ValueError(f"--page-size: got {page_size}; mla-decode takes integers >= 1")
    return make_shapes(command, texts, causal, DTYPES[options.dtype], page_size)


def _contestant(
    implementation: Implementation, shape: Shape, sets: list[Inputs]
) -> Contestant | Failure:
    reason = implementation.supports(shape)
    if reason is not None:
        return Failure(reason)
    try:
        calls = tuple(implementation.prepare(shape, inputs) for inputs in sets)
    except Exception as error:  # whatever a peer raises is its result
        return Failure(describe(error))
    return Contestant(implementation.name, calls)


def run_shape(
    shape: Shape,
    implementations: list[Implementation],
    device: torch.device,
    settings: Settings,
    seed: int = 0,
    low_share: float = 0.0,
) -> Row:
    """Measure all implementations on one shape."""
    count = 1
    if device.type == "cuda":
        count = input_sets(shape, torch.cuda.get_device_properties(device).L2_cache_size)
    sets = [make_inputs(shape, device, seed + index, low_share) for index in range(count)]
    entries = {i.name: _contestant(i, shape, sets) for i in implementations}
    ready = [entry for entry in entries.values() if isinstance(entry, Contestant)]
    measured = measure(ready, device, settings)
    results: dict[str, Summary | Failure] = {
        name: measured[name] if isinstance(entry, Contestant) else entry
        for name, entry in entries.items()
    }
    return Row(shape, results)


def run(options: argparse.Namespace, argv: tuple[str, ...]) -> Report:
    """Measure what ``options`` asks for, printing as it goes.

    Raises:
        ValueError: an option is out of range.
    """
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    settings = Settings(mode=options.mode, seconds=options.seconds)
    if device.type != "cuda":
        settings = Settings(
            "plain", min(options.seconds, 0.1), sample_us=0.0, min_rounds=5, max_rounds=20
        )
    shapes = choose_shapes(options, device)
    names = DEFAULT_PEERS[options.command] if options.peers is None else options.peers
    report = Report(options.command, device, settings, argv)
    implementations: list[Implementation] = [CuteFmha(options.backend)]
    implementations += [CuteFmha(options.backend, skip) for skip in options.skip]
    for peer in choose_peers(names):
        reason = peer.available(device)
        if reason is None:
            implementations.append(peer)
        else:
            report.absent[peer.name] = reason
    report.versions = {i.name: i.version() for i in implementations}
    if options.ceilings and device.type == "cuda":
        report.ceilings = measure_ceilings(settings)
    print(preamble(report), end="\n\n", flush=True)
    for shape in shapes:
        row = run_shape(shape, implementations, device, settings, options.seed, options.low_share)
        report.rows.append(row)
        print(table_rows([row]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.out is not None:
            write_json(report, options.out / f"{options.name or options.command}.json")
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        with torch.inference_mode():
            report = run(options, tuple(arguments))
    except ValueError as error:
        parser.error(str(error))
    if options.out is not None:
        stem = options.out / (options.name or options.command)
        reason = write_plot(report, stem.with_name(stem.name + ".png"))
        print(f"wrote {stem}.json" + (f" and {stem}.png" if reason is None else ""))
        if reason is not None:
            print(f"no plot: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
