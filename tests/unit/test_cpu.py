"""megatron-core on a CPU: what is replaced exists upstream, works, and is put back."""

from __future__ import annotations

import importlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mimo.cpu import REPLACEMENTS, Replacement, compiling_when_called, megatron_on_cpu
from tests.support.run_host import RunHost


def current(replacement: Replacement) -> Any:
    return attrgetter(replacement.name)(importlib.import_module(replacement.module))


def by_id(replacement: Replacement) -> str:
    return f"{replacement.module}.{replacement.name}"


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=by_id)
def test_target_exists_upstream(replacement):
    assert callable(current(replacement))
    assert replacement.reason


def test_no_target_is_replaced_twice():
    assert len({by_id(replacement) for replacement in REPLACEMENTS}) == len(REPLACEMENTS)


def test_everything_is_replaced_and_put_back():
    before = [current(replacement) for replacement in REPLACEMENTS]
    with megatron_on_cpu():
        inside = [current(replacement) for replacement in REPLACEMENTS]
        with megatron_on_cpu():
            pass
        assert [current(replacement) for replacement in REPLACEMENTS] == inside
    assert all(one is not two for one, two in zip(before, inside, strict=True))
    assert [current(replacement) for replacement in REPLACEMENTS] == before


def test_everything_is_put_back_after_an_exception():
    before = [current(replacement) for replacement in REPLACEMENTS]
    filters = list(logging.getLogger("megatron.core.tensor_parallel.random").filters)
    with pytest.raises(ZeroDivisionError, match="division by zero"), megatron_on_cpu():
        _ = 1 / 0
    assert [current(replacement) for replacement in REPLACEMENTS] == before
    assert logging.getLogger("megatron.core.tensor_parallel.random").filters == filters
    assert torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_cuda_means_cpu(device):
    with megatron_on_cpu():
        tensors = [
            torch.zeros(2, device=device),
            torch.arange(2, device=device),
            torch.tensor([1.0], device=device),
            torch.zeros_like(torch.zeros(2), device=device),
            torch.zeros(2).to(device),
            torch.zeros(2).to(device=device, dtype=torch.float64),
            torch.zeros(2).to(device, torch.float64),
            torch.zeros(2).cuda(),
            torch.nn.Parameter(torch.zeros(2)).to(device),
        ]
    assert {tensor.device for tensor in tensors} == {torch.device("cpu")}
    assert [tensor.dtype for tensor in tensors[5:7]] == [torch.float64] * 2


class _MakesOnCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.ones(2, device="cuda").cuda()


def test_cuda_means_cpu_in_backward_passes_and_other_threads():
    leaf = torch.zeros(2, requires_grad=True)
    with megatron_on_cpu(), ThreadPoolExecutor() as pool:
        _MakesOnCuda.apply(leaf).sum().backward()
        made = pool.submit(lambda: torch.empty_like(leaf, device="cuda").new_zeros(1, device="cuda:0")).result()
    assert leaf.grad.tolist() == [2, 2]
    assert made.device.type == "cpu"


def test_inherited_methods_are_inherited_again():
    before = dict(vars(torch.Tensor))
    with megatron_on_cpu():
        assert "to" in vars(torch.Tensor)
    assert dict(vars(torch.Tensor)) == before


def test_torch_still_knows_what_takes_a_device():
    with megatron_on_cpu(), torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    with torch.device("meta"):
        assert torch.arange(2).device.type == "meta"


def test_other_devices_are_left_alone():
    with megatron_on_cpu():
        assert torch.zeros(2, device="meta").device.type == "meta"
        assert torch.zeros(2).to("meta").device.type == "meta"


def test_module_moves_to_cuda():
    with megatron_on_cpu():
        layer = torch.nn.Linear(2, 2, device="cuda").cuda()
    assert {parameter.device.type for parameter in layer.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.float64, "torch.cuda.DoubleTensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.int64, "torch.LongTensor"),
    ],
)
def test_tensors_have_the_type_names_that_optimizers_compare_with(dtype, name):
    with megatron_on_cpu():
        assert torch.zeros(1, dtype=dtype).type() == name
        assert torch.nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False).type() == name


def test_type_with_an_argument_still_converts():
    with megatron_on_cpu():
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_current_device_and_streams():
    with megatron_on_cpu():
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.cuda.Event().query()
        torch.cuda.synchronize()


def test_cuda_generator_is_the_default_one():
    with torch.random.fork_rng(devices=[]), megatron_on_cpu():
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)


def test_rng_warning_is_muted_and_no_other(caplog):
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    with megatron_on_cpu(), caplog.at_level(logging.WARNING, logger=logger.name):
        logger.warning("CPU RNG state changed within GPU RNG context")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_function_is_compiled_when_it_is_first_called():
    given = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        given.append(graph)
        return graph

    with compiling_when_called():

        @torch.compile(backend=backend)
        def double(value: torch.Tensor) -> torch.Tensor:
            """Documented."""
            return value * 2

        @torch.compile(backend=backend, fullgraph=True)
        def quadruple(value: torch.Tensor) -> torch.Tensor:
            return double(double(value))

        module = torch.compile(torch.nn.Linear(2, 2), backend=backend)

    assert double.__name__ == "double"
    assert double.__doc__ == "Documented."
    assert isinstance(module, torch.nn.Module)
    assert not given
    value = torch.tensor([1.0, -3.0], requires_grad=True)
    assert quadruple(value).tolist() == [4.0, -12.0]
    assert len(given) == 1, "what it calls is a part of it"
    quadruple(value).sum().backward()
    assert value.grad.tolist() == [4.0, 4.0]
    assert double(value).tolist() == [2.0, -6.0]
    double(value)
    assert len(given) == 2


def fuse_without_compiler() -> None:
    """Runs in a process that has imported megatron-core as the command line does."""
    assert "megatron.core" in sys.modules
    assert "torch._inductor.compile_fx" not in sys.modules, "torch's compiler was imported"
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    torch.compiler.set_stance("force_eager")
    value, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.testing.assert_close(
        bias_gelu_impl(value, bias), torch.nn.functional.gelu(value + bias, approximate="tanh"), rtol=1e-5, atol=1e-5
    )


def test_megatron_is_imported_without_the_compiler(run_host: RunHost, tmp_path: Path):
    process = run_host.start(f"{__name__}:{fuse_without_compiler.__name__}", log=tmp_path / "log")
    assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
