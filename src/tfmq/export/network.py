"""Networks of a pipeline beside its denoiser as graphs: a text encoder, and the decoder of an autoencoder.

What is quantized of them computes at its first and only bin; what is not is captured as it is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tfmq.export.capture import Call, Graph
from tfmq.nn.swap import is_quantized, plain_forward, steps_of


class Network(nn.Module):
    """A function of one tensor whose first axis is the batch, called `reads`; its outputs are called
    `outputs`.
    """

    # A signature looks for the timestep of a call under this name.
    tfmq_timestep = None
    reads: str
    outputs: tuple[str, ...]


class TextEncoder(Network):
    """A text encoder of transformers as a function of tokens `[B, L]`.

    Its outputs are those of the model in their order, the hidden states `[B, L, D]` of every layer last where
    `hidden_states` asks for them. A first call tells their names.
    """

    reads = "input_ids"

    def __init__(self, encoder: nn.Module, tokens: Tensor, *, hidden_states: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.asked: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
        names: list[str] = []
        with torch.no_grad():
            for name, value in self._output(tokens).items():
                count = 1 if isinstance(value, Tensor) else len(value)
                names += [name] if isinstance(value, Tensor) else [f"{name}.{i}" for i in range(count)]
        self.outputs = tuple(names)

    def _output(self, tokens: Tensor) -> Any:
        return _computed(self.encoder, input_ids=tokens, **self.asked)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for tokens `[B, L]`."""
        return tuple(tree_flatten(self._output(input_ids).to_tuple())[0])


class Decoder(Network):
    """The decoder of an autoencoder as a function of latents `[B, C, H, W]`, which yields images
    `[B, 3, ...]` in [-1, 1]; whoever calls it has undone the scaling of the latents.
    """

    reads, outputs = "latent_sample", ("sample",)

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.before = getattr(autoencoder, "post_quant_conv", None) or nn.Identity()
        self.decoder = autoencoder.decoder

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """Return the images of latents."""
        return (_computed(self.decoder, sample=self.before(latent_sample)),)


def _computed(module: nn.Module, **arguments: Any) -> Any:
    """Call a module; one that is quantized at its first bin, and without the care for NaN, which branches."""
    if not is_quantized(module):
        return module(**arguments)
    with steps_of(module).first():
        return plain_forward(module, module.tfmq_signature.bind(**arguments).arguments)  # type: ignore[operator, union-attr]


class NetworkGraph(Graph):
    """A `Network` as a function `tensor -> tensors`."""

    kind = "network"
    positions = 1

    @classmethod
    def of(cls, network: Network, example: Tensor) -> tuple["NetworkGraph", Call]:
        """Return the graph of a network and the call that an example of its input is."""
        call = Call.of(network, {network.reads: example})
        return cls(network, call.signature), call

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name of the input: there are no bins among the inputs."""
        return self.signature.names

    def arguments(self, bins: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the tensors of a call."""
        return tuple(tensors)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the network."""
        return tuple(self.module(*inputs))
