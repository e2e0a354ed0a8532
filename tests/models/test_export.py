"""Graphs of the modules and models: `torch.export`, `torch.compile` and ONNX, one graph for all lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CASES, EXAMPLE, LENGTHS, Exported, N, agree, longvit, padded, slides
from torch import Tensor
from torch.export import Dim, export

from dilated_attention_pytorch import DilatedAttention
from dilated_attention_pytorch.models.slide.positions import sincos_table

# torch's own: exporters still use what it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tensors(x: Any) -> list[Tensor]:
    return [y for y in torch.utils._pytree.tree_leaves(x) if isinstance(y, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_one_exported_program_serves_all_lengths(name: str) -> None:
    """The op is in the graph as it is, so the numbers are the eager ones."""
    case: Exported = CASES[name]
    module = case.module.eval()
    program = export(module, (), case.inputs(EXAMPLE), dynamic_shapes=case.dynamic_shapes).module()
    for n in LENGTHS:
        inputs = case.inputs(n)
        torch.testing.assert_close(tensors(program(**inputs)), tensors(module(**inputs)))


@pytest.mark.parametrize("order", ["raster", "snake", "morton", "hilbert"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_one_exported_program_serves_all_images(positions: str, order: str) -> None:
    model = longvit(positions, order).eval()
    sides = {2: 4 * Dim("rows", min=2, max=1000), 3: 4 * Dim("columns", min=2, max=1000)}
    program = export(model, (torch.randn(2, 3, 20, 28),), dynamic_shapes=(sides,)).module()
    for height, width in ((8, 12), (16, 16), (36, 20)):
        images = torch.randn(2, 3, height, width)
        torch.testing.assert_close(tensors(program(images)), tensors(model(images)))


@pytest.mark.parametrize("name", ["SlideEncoder-none-mask", "SlideEncoder-zero_keys-mean-mask", "LongNetLM-mask"])
def test_compiles_whole_with_a_mask(name: str) -> None:
    case: Exported = CASES[name]
    module = case.module.eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in LENGTHS:
        inputs = case.inputs(n)
        torch.testing.assert_close(tensors(compiled(**inputs)), tensors(module(**inputs)))


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_longvit_compiles_whole(order: str) -> None:
    model = longvit("sincos", order).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 16, 20)
    torch.testing.assert_close(tensors(compiled(images)), tensors(model(images)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": padded(EXAMPLE).flip(1)}, "padded on the right"),
        ({"coords": slides(EXAMPLE)["coords"] - 1e5}, "coords"),
    ],
)
def test_a_graph_checks_values_where_it_runs(change: dict[str, Tensor], message: str) -> None:
    """Eager calls raise a ValueError before anything is computed; a graph cannot look before it runs."""
    case = CASES["SlideEncoder-zero_keys-mask"]
    program = export(case.module.eval(), (), case.inputs(EXAMPLE), dynamic_shapes=case.dynamic_shapes).module()
    with pytest.raises(RuntimeError, match=message):
        program(**case.inputs(EXAMPLE) | change)


def test_a_trace_leaves_nothing_behind() -> None:
    """Tables that are kept for the next call are no tracer's."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        sincos_table(12, 44, torch.device("cpu"))
    assert type(sincos_table(12, 44, torch.device("cpu"))) is Tensor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")  # the exporter's own, of inputs of one length
@pytest.mark.parametrize(
    "name",
    ["auto-mask", "auto-packed", "multihead-mask", "LongNetLM", "LongNetLM-mask", "SlideEncoder-none-mask",
     "SlideEncoder-zero_keys-mean-mask"],
)  # fmt: skip
def test_onnx_serves_all_lengths(name: str, tmp_path: Path) -> None:
    """onnxruntime's kernels add up in another order than torch's: 1e-4 of values near 1, in fp32."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    case: Exported = CASES[name]
    module, file = case.module.eval(), tmp_path / "model.onnx"
    inputs = case.inputs(EXAMPLE)
    torch.onnx.export(module, (), file, kwargs=inputs, dynamic_shapes=case.dynamic_shapes, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    for n in LENGTHS:
        inputs = case.inputs(n)
        with torch.no_grad():
            want = tensors(module(**inputs))
        got = session.run(None, {name: inputs[name].numpy() for name in names})
        agree([torch.from_numpy(x) for x in got], want, 1e-4)


def test_dropout_is_refused_where_the_op_is_written_out() -> None:
    module = DilatedAttention([16], [1], attention_dropout=0.1)
    op = torch.ops.dilated_attention_pytorch.attention.default
    table = torch._decomp.get_decompositions([op])
    program = export(module, tuple(torch.randn(1, EXAMPLE, 2, 8) for _ in range(3)), dynamic_shapes=({1: N},) * 3)
    with pytest.raises(NotImplementedError, match="dropout_p=0"):
        program.run_decompositions(table)
