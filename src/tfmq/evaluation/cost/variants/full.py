"""Full precision in torch: eager, in channels-last memory format, compiled."""

from dataclasses import dataclass

import torch

from tfmq.evaluation.cost.variant import BASE, PreparedStep, Ready, Setting, add, placed


@dataclass(frozen=True)
class FullPrecision(Ready):
    """The original in float32."""

    channels_last: bool = False

    def prepare(self, setting: Setting) -> PreparedStep:
        """Load the original."""
        module = setting.source.original()
        if self.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            module.compile(dynamic=False)
        return PreparedStep(placed(module, setting), setting.source.original_bytes())


add(BASE, "peer", FullPrecision())
add("fp32-channels-last", "peer", FullPrecision(channels_last=True))
add("fp32-compile", "peer", FullPrecision(compiled=True, caches=True))
