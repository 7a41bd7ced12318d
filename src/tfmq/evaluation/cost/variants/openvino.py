"""OpenVINO: float32, and NNCF's static INT8 with its own calibration."""

import warnings
from typing import Any

import torch

from tfmq.backends.openvino import shared_core
from tfmq.errors import require
from tfmq.evaluation.cost.flat import Flat, flat_tensors
from tfmq.evaluation.cost.variant import PreparedStep, Setting, register_variant
from tfmq.models.denoiser import Inputs

FILE = "model.xml"


def _arrays(call: Inputs) -> list[Any]:
    return [tensor.contiguous().numpy() for tensor in flat_tensors(call)]


def _converted(setting: Setting) -> Any:
    """Return the original as an OpenVINO model of static shapes."""
    require("openvino", extra="bench")
    from tfmq.export.openvino import from_torch

    call = setting.calls()[0]
    example = flat_tensors(call)
    with warnings.catch_warnings():
        # The converter traces with what torch has deprecated.
        warnings.simplefilter("ignore")
        original = Flat(setting.source.view(setting.source.original()), call)
        model = from_torch(torch.jit.trace(original, example, check_trace=False))
    model.reshape({number: list(tensor.shape) for number, tensor in enumerate(example)})
    return model


def _compiled(setting: Setting) -> PreparedStep:
    require("openvino", extra="bench")
    path = setting.folder / FILE
    # Float stays float32: processors with native bfloat16 would otherwise compute in that.
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": setting.threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = shared_core().compile_model(str(path), "CPU", hints).create_infer_request()

    def step(call: Inputs) -> torch.Tensor:
        request.infer(_arrays(call), share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return PreparedStep(step, path.stat().st_size + path.with_suffix(".bin").stat().st_size)


@register_variant("openvino-fp32", "peer")
class FullPrecision:
    """The original, converted."""

    needs: tuple[str, ...] = ("openvino",)
    builds = True
    caches = False

    def build(self, setting: Setting) -> None:
        """Convert the original."""
        require("openvino", extra="bench").save_model(
            _converted(setting), setting.folder / FILE, compress_to_fp16=False
        )

    def prepare(self, setting: Setting) -> PreparedStep:
        """Compile the file."""
        return _compiled(setting)


@register_variant("openvino-nncf", "peer")
class Nncf:
    """The original, quantized by NNCF after training: weights and activations INT8, on the calls of the
    benchmark.
    """

    needs: tuple[str, ...] = ("openvino", "nncf")
    builds = True
    caches = False

    def build(self, setting: Setting) -> None:
        """Convert, calibrate and quantize the original."""
        nncf, openvino = require("nncf", extra="bench"), require("openvino", extra="bench")
        calls = setting.calls()
        model = nncf.quantize(_converted(setting), nncf.Dataset(calls, _arrays), subset_size=len(calls))
        openvino.save_model(model, setting.folder / FILE, compress_to_fp16=False)

    def prepare(self, setting: Setting) -> PreparedStep:
        """Compile the file."""
        return _compiled(setting)
