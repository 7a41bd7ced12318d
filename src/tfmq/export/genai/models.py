"""The OpenVINO models of a pipeline's components, with the inputs and outputs that GenAI sets and reads."""

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor

from tfmq.export.capture import Call, KeyedGraph
from tfmq.export.fake_quantize import graph_kernels
from tfmq.export.network import Network, NetworkGraph
from tfmq.export.openvino import convert


def denoiser_model(graph: KeyedGraph, call: Call, outputs: tuple[str, ...], *, timestep: str) -> ov.Model:
    """Return the model of a denoiser, whose timesteps `[1]` or `[B]` are the input `timestep` of this dtype.

    Raises:
        ValueError: its code fixes the batch, which guidance doubles.
    """
    model = _named(convert(graph, call), outputs)
    batched = dict(zip(graph.names, graph.batched, strict=True))
    if any(batched[port.get_any_name()] and port.partial_shape[0].is_static for port in model.inputs):
        raise ValueError(
            f"OpenVINO can convert the denoiser for a batch of {call.batch} alone, and GenAI draws with "
            "guidance in batches of two"
        )
    if call.signature.timestep is not None:
        _retime(model, call.signature.names[call.signature.timestep], timestep)
    for port in model.inputs:
        # Conditions of diffusers come in dicts; GenAI calls them by their own names.
        port.set_names({port.get_any_name().rpartition(".")[2]})
    return model


def network_model(network: Network, example: Tensor, *, halved: bool) -> ov.Model:
    """Return the model of a text encoder or a decoder for any batch, its weights of eight bits `halved` or
    whole; other sizes are the example's.
    """
    with torch.no_grad(), graph_kernels(network, halved=halved):
        graph, call = NetworkGraph.of(network, example)
        return _named(convert(graph, call), network.outputs)


def _named(model: ov.Model, outputs: tuple[str, ...]) -> ov.Model:
    for port, name in zip(model.outputs, outputs, strict=True):
        port.set_names({name})
    return model


def _retime(model: ov.Model, name: str, dtype: str) -> None:
    """Let an input of timesteps `[B]` be `[1]` too, for the whole batch, and of this dtype, in place."""
    old = model.input(name).get_node()
    other = next(port for port in model.inputs if port.get_any_name() != name)
    new = ops.parameter([-1], np.dtype(dtype), name=name)
    new.output(0).set_names({name})
    batch = ops.gather(ops.shape_of(other), np.array([0]), np.array(0))
    value = ops.convert(ops.broadcast(new, batch), old.get_element_type().to_string())
    for target in old.output(0).get_target_inputs():
        target.replace_source_output(value.output(0))
    model.remove_parameter(old)
    model.add_parameters([new])
    model.validate_nodes_and_infer_types()
