"""ONNX Runtime: static INT8 by its own quantization tool, in QDQ form."""

import warnings
from typing import Any

import torch

from tfmq.errors import require
from tfmq.evaluation.cost.flat import Flat, flat_tensors
from tfmq.evaluation.cost.variant import PreparedStep, Setting, register_variant
from tfmq.models.denoiser import Inputs

FULL, READY, QUANTIZED = "full.onnx", "ready.onnx", "model.onnx"
# Version of ONNX's operators that the model is exported in.
OPSET = 17


def _feed(call: Inputs) -> dict[str, Any]:
    return {
        f"input_{number}": tensor.contiguous().numpy() for number, tensor in enumerate(flat_tensors(call))
    }


@register_variant("onnxruntime-int8", "peer")
class OnnxRuntime:
    """The original, exported, and quantized with a scale for each output channel of a weight, on the calls of
    the benchmark.
    """

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    builds = True
    caches = False

    def build(self, setting: Setting) -> None:
        """Export, calibrate and quantize the original."""
        quantization = require("onnxruntime.quantization", extra="bench")
        shapes = require("onnxruntime.quantization.shape_inference", extra="bench")
        full, ready = setting.folder / FULL, setting.folder / READY
        calls = setting.calls()
        names = list(_feed(calls[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = Flat(setting.source.view(setting.source.original()), calls[0])
            torch.onnx.export(
                flat, flat_tensors(calls[0]), str(full), dynamo=False, opset_version=OPSET, input_names=names
            )
        shapes.quant_pre_process(str(full), str(ready))

        class Calls(quantization.CalibrationDataReader):  # type: ignore[name-defined]
            """Hands out the calls, one at a time."""

            def __init__(self) -> None:
                self.left = iter(calls)

            def get_next(self) -> dict[str, Any] | None:
                call = next(self.left, None)
                return None if call is None else _feed(call)

        kinds = {
            "activation_type": quantization.QuantType.QUInt8,
            "weight_type": quantization.QuantType.QInt8,
        }
        quantization.quantize_static(
            str(ready), str(setting.folder / QUANTIZED), Calls(), per_channel=True, **kinds
        )
        full.unlink()
        ready.unlink()

    def prepare(self, setting: Setting) -> PreparedStep:
        """Open the file."""
        runtime = require("onnxruntime", extra="bench")
        path = setting.folder / QUANTIZED
        options = runtime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        known = {entry.name for entry in session.get_inputs()}

        def step(call: Inputs) -> torch.Tensor:
            return torch.from_numpy(
                session.run(None, {name: value for name, value in _feed(call).items() if name in known})[0]
            )

        return PreparedStep(step, path.stat().st_size)
