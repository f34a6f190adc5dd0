"""Capture of launches and execution of small CuTe DSL kernels, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cute_fmha.emulator import capture as cap
from cute_fmha.emulator.device import Device, DeviceTensor, Memory, emulated_device, merged
from cute_fmha.emulator.machine import EmulationError, Policy

pytest.importorskip("cutlass", reason="CuTe DSL (extra cu13) is not installed")

import capture_kernels as kernels
import cutlass
import cutlass.cute as cute

N = 512


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=generator), torch.full((N,), float("nan"))


both = pytest.mark.parametrize("tvm_ffi", [False, True], ids=["plain", "tvm-ffi"])


@both
def test_one_kernel(tvm_ffi: bool) -> None:
    a, b = data()
    report = cap.emulate(kernels.copy, a, b, tvm_ffi=tvm_ffi)
    assert torch.equal(a, b)
    (launch,) = report.launches
    assert (launch.grid, launch.block, launch.cluster) == ((4, 1, 1), (128, 1, 1), (1, 1, 1))
    assert launch.dynamic_shared == 0
    assert report.ok
    assert report.steps > 0
    assert "1 launches" in str(report)


@both
def test_kernels_of_one_host_function_run_in_order(tvm_ffi: bool) -> None:
    """b = a * 2; b[:100] += 1; b *= 3: the result depends on the order."""
    a, b = data(1)
    report = cap.emulate(kernels.scale_then_add, a, b, 2.0, 100, True, tvm_ffi=tvm_ffi)
    expected = a * 2
    expected[:100] += 1
    assert torch.equal(b, expected * 3)
    first, second, third = report.launches
    assert len({first.kernel, second.kernel, third.kernel}) == 3
    assert second.cluster == (2, 1, 1)
    assert second.dynamic_shared == 4096
    assert second.attributes["cluster"] == (2, 1, 1)


@both
def test_a_compiled_function_runs_again_with_other_arguments(tvm_ffi: bool) -> None:
    a, b = data(2)
    compiled = cap.compile_kernel(kernels.scale_then_add, a, b, 2.0, 100, False, tvm_ffi=tvm_ffi)
    for scale, n in ((3.0, 7), (-1.5, 512)):
        c = torch.zeros(N)
        report = cap.emulate(compiled, a, c, n=n, s=scale)
        expected = a * scale
        expected[:n] += 1
        assert torch.equal(c, expected)
        assert len(report.launches) == 2


@both
def test_scalars(tvm_ffi: bool) -> None:
    out = torch.zeros(8, dtype=torch.float64)
    values = (-7, 1.5, 2**40 + 1, True, 200, -3, 0.25)
    cap.emulate(kernels.scalars, out, *map(kernels.typed, values, kernels.TYPES), tvm_ffi=tvm_ffi)
    assert out[: len(values)].tolist() == [float(v) for v in values]


def test_parameters_are_those_of_the_ptx() -> None:
    a, b = data()
    captured = cap.capture(kernels.scale_then_add, a, b, 2.5, 100, False)
    kernels_of_ptx = cap.entries(captured.ptx)
    for launch in captured.launches:
        sizes = kernels_of_ptx[launch.kernel].sizes
        assert [len(p) for p in launch.parameters] == list(sizes)
    pointers = [int.from_bytes(p[:8], "little") for p in captured.launches[0].parameters[:2]]
    assert pointers == [a.data_ptr(), b.data_ptr()]
    assert captured.launches[0].parameters[2] == b"\x00\x00\x20\x40"


def test_cluster_and_shared_memory() -> None:
    """CTAs of a cluster write to each other's dynamic shared memory."""
    a, b = data(3)
    report = cap.emulate(kernels.swap_in_cluster, a, b)
    halves = a.view(2, 2, 128).flip(1).reshape(-1)
    assert torch.equal(b, halves)
    assert report.launches[0].cluster == (2, 1, 1)
    assert report.launches[0].dynamic_shared >= 512


def test_programmatic_launch_is_seen() -> None:
    a, b = data()
    captured = cap.capture(kernels.dependent, a, b)
    assert [launch.programmatic for launch in captured.launches] == [False, True]


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_policies(mode: str) -> None:
    a, b = data(4)
    cap.emulate(kernels.copy, a, b, policy=Policy(mode, seed=3))
    assert torch.equal(a, b)


def test_access_outside_of_a_tensor_names_it() -> None:
    a, _ = data()
    short = torch.zeros(N - 5)
    with pytest.raises(EmulationError, match="bounds") as caught:
        cap.emulate(kernels.copy, a, short)
    text = str(caught.value)
    assert "b" in text
    assert "PTX line" in text
    assert "capture_kernels.py" in text  # the Python line
    report = cap.emulate(kernels.copy, a, short, check=False)
    assert {finding.kind for finding in report.findings} == {"bounds"}
    assert torch.equal(short, a[: N - 5]) or report.findings[0].fatal


def test_views_are_bounded_by_their_own_elements() -> None:
    whole = torch.zeros(3, N)
    a, _ = data()
    captured = cap.capture(kernels.copy, a, whole[1])
    named = {m.name: m for m in captured.memory}
    assert named["b"].address == whole[1].data_ptr()
    assert named["b"].bytes == 4 * N
    overlapping = merged([Memory("x", 1000, 64), Memory("y", 1032, 64), Memory("z", 2000, 8)])
    assert [(m.name, m.address, m.bytes) for m in overlapping] == [
        ("x and y", 1000, 96),
        ("z", 2000, 8),
    ]


def test_arguments_in_containers() -> None:
    a, b = data(5)
    captured = cap.capture(kernels.copy_pair, (a, b))
    assert {m.name for m in captured.memory} == {"pair[0]", "pair[1]"}
    cap.execute(captured)
    assert torch.equal(a, b)


def test_fp8_tensors_are_handed_over() -> None:
    a = torch.arange(N, dtype=torch.float32).mul(0.25).to(torch.float8_e4m3fn)
    b = torch.zeros(N, dtype=torch.float8_e4m3fn)
    cap.emulate(kernels.copy, a, b)
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_ordinary_use_afterwards() -> None:
    """The compiled function still has the engine that it was made with."""
    a, b = data()
    compiled = cap.compile_kernel(kernels.copy, a, b)
    engine = compiled.engine
    cap.capture(compiled, a, b)
    assert compiled.engine is engine
    dsl = cutlass.cutlass_dsl.CuTeDSL._get_dsl()
    before = dict(vars(dsl.envar))
    environment = dict(os.environ)
    cap.emulate(kernels.copy, a, b)
    assert dict(vars(dsl.envar)) == before
    assert dict(os.environ) == environment


def test_ptx_must_have_been_kept() -> None:
    a, b = (cap.device_tensor(x).mark_layout_dynamic() for x in data())
    compiled = cute.compile(kernels.copy, a, b, options="--gpu-arch sm_100a")
    with pytest.raises(cap.CaptureError, match="without keeping its PTX"):
        cap.capture(compiled, a, b)
    kept = cap.compile_kernel(kernels.copy, a, b)
    captured = cap.capture(compiled, a, b, ptx=cap._ptx_of(kept))
    assert len(captured.launches) == 1


def test_cute_tensors_as_arguments() -> None:
    a, b = data(6)
    tensors = [cap.device_tensor(x) for x in (a, b)]  # static layouts
    report = cap.emulate(kernels.copy, *tensors)
    assert torch.equal(a, b)
    assert {m.bytes for m in report.capture.memory} == {4 * N}


def test_device_queries() -> None:
    from cutlass.utils import HardwareInfo

    before = HardwareInfo.__init__, torch.cuda.device_count
    with emulated_device(Device(arch="sm_103a", sms=152)) as device:
        info = HardwareInfo()
        assert info.get_device_multiprocessor_count() == 152
        assert info.get_max_active_clusters(2) == device.max_active_clusters(2) == 76
        assert torch.cuda.get_device_capability() == (10, 3)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 152
    assert before == (HardwareInfo.__init__, torch.cuda.device_count)


def test_other_architecture() -> None:
    a, b = data(7)
    captured = cap.capture(kernels.copy, a, b, arch="sm_103a")
    assert ".target sm_103a" in captured.ptx


def test_dlpack_shows_a_cuda_device() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    shown = DeviceTensor(tensor)
    assert shown.__dlpack_device__() == (2, 0)
    assert cap.device_tensor(tensor).data_ptr == tensor.data_ptr()


def test_without_cutlass() -> None:
    """The emulator imports without CuTe DSL, and says what is missing when it is needed."""
    code = (
        "import sys; sys.modules['cutlass'] = None\n"
        "from cute_fmha.emulator import capture, programs\n"
        "try: capture.capture(lambda: None)\n"
        "except capture.CaptureError as error: assert 'cu13' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whole_programs() -> None:
    """Unmodified code for CUDA tensors: `cute.jit` functions called directly, and compiled."""
    from cute_fmha.emulator.programs import emulating

    with emulating(Policy("lazy")) as reports:
        assert torch.cuda.is_available()
        a = torch.arange(N, dtype=torch.float32, device="cuda")
        b = torch.zeros(N).cuda()
        tensors = [cute.runtime.from_dlpack(x, assumed_align=16) for x in (a, b)]
        kernels.copy(*tensors)
        compiled = cute.compile(kernels.copy, *tensors)
        host = b.cpu()
        b.zero_()
        assert torch.equal(host, a.cpu())
        compiled(*tensors)
        assert torch.equal(a, b)
    assert len(reports) == 2
    assert not torch.cuda.is_available() or torch.version.cuda
