"""optimum-quanto: INT8 weights and activations."""

import torch

from tfmq.errors import require
from tfmq.evaluation.cost.variant import PreparedStep, Setting, register_variant
from tfmq.nn.size import state_bytes


@register_variant("quanto-int8", "peer")
class Quanto:
    """The original, quantized and calibrated on the calls of the benchmark when it is loaded."""

    needs: tuple[str, ...] = ("optimum.quanto",)
    builds = False
    caches = False

    def build(self, setting: Setting) -> None:
        """Write nothing: quantizing takes as long as reading a file."""

    @torch.no_grad()
    def prepare(self, setting: Setting) -> PreparedStep:
        """Quantize the original."""
        quanto = require("optimum.quanto", extra="bench")
        module = setting.source.original()
        denoiser = setting.source.view(module)
        quanto.quantize(module, weights=quanto.qint8, activations=quanto.qint8)
        with quanto.Calibration():
            for call in setting.calls():
                denoiser(call)
        quanto.freeze(module)
        return PreparedStep(denoiser, state_bytes(module))
