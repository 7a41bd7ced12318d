"""tfmq's own backends."""

from dataclasses import dataclass

from tfmq.artifact import stored_bytes
from tfmq.backends.backend import Options
from tfmq.evaluation.cost.variant import PreparedStep, Ready, Setting, add, placed


@dataclass(frozen=True)
class Executed(Ready):
    """The quantized model by one backend."""

    backend: str

    def prepare(self, setting: Setting) -> PreparedStep:
        """Load the checkpoint, ready to run."""
        module = setting.source.executed(
            self.backend, Options(compile=self.compiled, threads=setting.threads)
        )
        assert setting.source.quantized is not None
        return PreparedStep(placed(module, setting), stored_bytes(setting.source.quantized))


add("simulated", "backend", Executed("simulated"))
add("reference", "backend", Executed("reference"))
add("torch", "backend", Executed("torch"))
add("torch-compile", "backend", Executed("torch", compiled=True, caches=True))
add("openvino", "backend", Executed("openvino", needs=("openvino",), caches=True))
add("cuda", "backend", Executed("cuda", caches=True))
add("cuda-compile", "backend", Executed("cuda", compiled=True, caches=True))
