"""SDNQ: INT8 linear layers and convolutions with dynamic scales of the inputs, no calibration."""

import torch

from tfmq.errors import require
from tfmq.evaluation.cost.variant import PreparedStep, Setting, register_variant
from tfmq.nn.size import state_bytes


@register_variant("sdnq-int8", "peer")
class Sdnq:
    """The original, quantized when it is loaded; it compiles its own kernels."""

    needs: tuple[str, ...] = ("sdnq",)
    builds = False
    caches = True

    def build(self, setting: Setting) -> None:
        """Write nothing: quantizing takes as long as reading a file."""

    def prepare(self, setting: Setting) -> PreparedStep:
        """Quantize the original."""
        sdnq = require("sdnq", extra="bench")
        products = {"use_quantized_matmul": True, "use_quantized_matmul_conv": True}
        module = sdnq.sdnq_post_load_quant(
            setting.source.original(),
            weights_dtype="int8",
            quant_conv=True,
            torch_dtype=torch.float32,
            **products,
        )
        return PreparedStep(setting.source.view(module), state_bytes(module))
