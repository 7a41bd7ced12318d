"""torchao: PT2E quantization for x86, compiled by inductor."""

from operator import attrgetter
from typing import Any

import torch

from tfmq.errors import require
from tfmq.evaluation.cost.flat import Flat, flat_tensors
from tfmq.evaluation.cost.variant import PreparedStep, Setting, register_variant
from tfmq.models.denoiser import Inputs


@register_variant("torchao-pt2e", "peer")
class Pt2e:
    """The original, exported, calibrated on the calls of the benchmark, converted and compiled: all of it
    when it is loaded.
    """

    needs: tuple[str, ...] = ("torchao",)
    builds = False
    caches = True

    def build(self, setting: Setting) -> None:
        """Write nothing: there is no file format but pickled graphs."""

    @torch.no_grad()
    def prepare(self, setting: Setting) -> PreparedStep:
        """Quantize the original."""
        import torch._inductor.config as inductor

        pt2e = require("torchao.quantization.pt2e.quantize_pt2e", extra="bench")
        x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", extra="bench")
        calls = setting.calls()
        flat = Flat(setting.source.view(setting.source.original()), calls[0])
        exported = torch.export.export(flat, flat_tensors(calls[0]), strict=True).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        for call in calls:
            prepared(*flat_tensors(call))
        converted = pt2e.convert_pt2e(prepared)
        inductor.freezing = True
        compiled = torch.compile(converted, dynamic=False)

        def step(call: Inputs) -> torch.Tensor:
            output: torch.Tensor = compiled(*flat_tensors(call))
            return output

        return PreparedStep(step, _constant_bytes(converted))


def _constant_bytes(graph: Any) -> int:
    """Return the bytes of the tensors that a graph reads; the module keeps the float weights beside the
    integers that replaced them.
    """
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    values = (attrgetter(name)(graph) for name in names)
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
