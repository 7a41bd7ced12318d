"""The openvino backend: the whole denoiser as one OpenVINO model, its layers fused to INT8 with our scales on
the CPU, the one device that has been tested.
"""

import os
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.allocator import give_back, page_out
from tfmq.backends.backend import Coverage, EngineError, Options, by_input, register_backend
from tfmq.backends.caching import cache_directory, model_key
from tfmq.backends.graph import GraphExecutor, Run
from tfmq.backends.openvino_blame import blamed
from tfmq.backends.openvino_device import CPU, check_device, on_cpu, settings_for
from tfmq.backends.openvino_kept import compiled_file, read_compiled, write_compiled
from tfmq.errors import require
from tfmq.export.capture import Call, Graph
from tfmq.export.fake_quantize import graph_kernels
from tfmq.kernels.halves import saturates
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers

# Part of the cache key. Raise it when converted models change, so that no older one is read.
CONVERSION = "9"
ASYMMETRIC = "its integer weights do not fit into eight signed bits (an asymmetric 8-bit grid)"

GROUPED = "it is a grouped transposed convolution, whose weight has no axis for its scales"


@cache
def shared_core() -> Any:
    """Return the one `openvino.Core` of this process, which lives as long as the process.

    A core's CPU plug-in gives the process a stack for signals and, when it ends, puts back the one it had
    found. Two cores that do not end in the reverse order of their making leave a stack that is freed already,
    and the next signal, a Ctrl-C for one, ends in a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


@register_backend("openvino")
class OpenVINO:
    """INT8 linear layers and convolutions of OpenVINO's plug-in for a device. A converted model is kept on
    disk, compiled ones too; any batch is compiled for.
    """

    def missing(self) -> str:
        """Return nothing.

        Raises:
            MissingExtraError: OpenVINO is not installed.
        """
        require("openvino", extra="openvino")
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Let the denoiser run as OpenVINO models; a first call with a new shape converts and compiles.

        Raises:
            ValueError: OpenVINO sees no such device.
        """
        check_device(shared_core(), options.device)
        layers, floating = by_input(module)
        floating |= {name: ASYMMETRIC for name, layer in layers.items() if not _narrow(layer)}
        floating |= {name: GROUPED for name, layer in layers.items() if layer.operation.stored_axis is None}
        integer = tuple(name for name in layers if name not in floating)
        module.tfmq_executor = GraphExecutor(module, _Builder(module, options), engine="OpenVINO")  # type: ignore[assignment]
        return Coverage(integer=integer, floating=floating)


def _narrow(layer: PackedLayer) -> bool:
    """Whether the integer weight fits into eight signed bits. Codes of an asymmetric 8-bit grid alone have to
    be unpacked to see.
    """
    return layer.format.bits < 8 or layer.format.symmetric or layer.integer_weight().narrow


def _compiles(core: Any, model: Any, device: str, settings: Mapping[str, Any]) -> bool:
    try:
        core.compile_model(model, device, settings)
    except RuntimeError:
        return False
    return True


def _let_go(module: nn.Module) -> None:
    """Let go of the packed codes, of which a compiled model has its own form."""
    for layer in packed_layers(module).values():
        page_out(layer.packed)


def _position(graph: Graph, port: Any) -> int:
    """Return the place of a port among the inputs of a graph."""
    return next(place for place, name in enumerate(graph.names) if name in port.get_names())


class _Builder:
    """Converts a captured graph, or reads it from the cache, and compiles it for the batch of the call."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.options = options
        self.key = model_key(module)
        # Other devices than the CPU have integer units of their own.
        self.halved = on_cpu(options.device) and saturates()
        # Kinds of graphs and calls of which one batch has shown that the model's code fixes it.
        self.fixed: set[str] = set()
        _let_go(module)

    def __call__(self, graph: Graph, call: Call) -> Run:
        core = shared_core()
        threads = self.options.threads or torch.get_num_threads()
        # What is not in integers stays in float32, also where the processor has bfloat16, for parity with the
        # other backends.
        wanted = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled, memory = self._from_disk(core, wanted, graph, call)
        request, outputs = compiled.create_infer_request(), len(compiled.outputs)
        # A compiled model may call its inputs by more names.
        order = [_position(graph, port) for port in compiled.inputs]

        # With `held` what the request computes with lives as long as this function.
        def run(
            bins: Tensor, tensors: tuple[Tensor, ...], held: Any = (compiled, memory)
        ) -> tuple[Tensor, ...]:
            given = (bins, *tensors)
            request.infer(
                {
                    position: given[index].detach().contiguous().numpy()
                    for position, index in enumerate(order)
                },
                share_inputs=True,
            )
            return tuple(torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(outputs))

        return run

    def _from_disk(self, core: Any, wanted: Mapping[str, Any], graph: Graph, call: Call) -> tuple[Any, Any]:
        """Return the compiled model, and what has to live as long as it: read from disk, or made and kept
        there, by ourselves for the CPU and by OpenVINO's own cache for other devices.
        """
        device, directory = self.options.device, cache_directory("openvino")
        if device != CPU:
            settings = settings_for(core, device, {**wanted, "CACHE_DIR": str(directory)})
            return self._compiled(core, self._read(core, graph, call), settings, graph, call), None
        key = self._path(graph, call, str(call.batch)).stem
        file = compiled_file(directory, core, device, key, wanted)
        if found := read_compiled(core, file, device, wanted):
            return found
        compiled = self._compiled(core, self._read(core, graph, call), wanted, graph, call)
        write_compiled(compiled, file)
        return compiled, None

    def _read(self, core: Any, graph: Graph, call: Call) -> Any:
        """Return the converted model for the batch of a call."""
        from tfmq.export.openvino import sizes

        path = self._converted(graph, call)
        # Give back what conversion has freed before compilation asks for memory.
        _let_go(graph.module)
        give_back()
        try:
            model = core.read_model(path)
        except RuntimeError:
            # A file that was cut off or changed: nothing is lost by making it again.
            path.unlink()
            model = core.read_model(self._converted(graph, call))
        shapes = sizes(graph, call, call.batch)
        model.reshape({port.get_any_name(): shapes[port.get_any_name()] for port in model.inputs})
        return model

    def _compiled(self, core: Any, model: Any, settings: Mapping[str, Any], graph: Graph, call: Call) -> Any:
        device = self.options.device
        try:
            return core.compile_model(model, device, settings)
        except RuntimeError as error:
            where = blamed(
                model,
                packed_layers(graph.module),
                lambda part: _compiles(core, part, device, {**settings, "CACHE_DIR": ""}),
            )
            last = str(error).split("\n\n")[0].strip().splitlines()[-1]
            on = "" if device == CPU else f" on {device}"
            text = f"OpenVINO cannot compile the denoiser for a batch of {call.batch}{on}: {last}"
            raise EngineError(f"{text}; at {where}" if where else text) from error

    def _converted(self, graph: Graph, call: Call) -> Path:
        import openvino as ov

        from tfmq.export.openvino import convert

        for batch in ("any", str(call.batch)):
            path = self._path(graph, call, batch)
            if path.exists():
                return path
        from openvino import frontend

        with graph_kernels(graph.module, halved=self.halved):
            try:
                model = convert(graph, call, fixed=call.signature.key in self.fixed)
            except (
                frontend.GeneralFailure,
                frontend.NotImplementedFailure,
                frontend.OpConversionFailure,
                frontend.OpValidationFailure,
            ) as error:
                raise EngineError(
                    f"OpenVINO cannot convert the denoiser: {' '.join(str(error).split())}"
                ) from error
        fixed = all(port.partial_shape.is_static for port in model.inputs)
        if fixed:
            self.fixed.add(call.signature.key)
        path = self._path(graph, call, str(call.batch) if fixed else "any")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.xml")
        ov.save_model(model, partial, compress_to_fp16=False)
        os.replace(partial.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(partial, path)
        return path

    def _path(self, graph: Graph, call: Call, batch: str) -> Path:
        import openvino as ov

        text = "\n".join(
            [
                f"{CONVERSION} in halves" if self.halved else CONVERSION,
                self.key,
                call.signature.key,
                batch,
                ov.__version__,
                torch.__version__,
            ]
        )
        return cache_directory("openvino") / f"{sha256(text.encode()).hexdigest()[:32]}.xml"
