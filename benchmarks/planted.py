"""Models with the same outputs and planted difficulty: outliers whose place and size are known, for methods
that must find them.

Small trained models have no outliers as large models do. Each function here returns a copy of a diffusers
denoiser in which one channel of each of its transformer blocks is `factor` times larger at some place, and
what reads it so many times smaller. With a power of two all values are scaled exactly, so the output is the
same to the last bit; adaLN's bias alone is rounded. A group norm before SiLU and a convolution admits no such
plant: SiLU is not homogeneous.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from torch import Generator, Tensor, nn

FACTOR = 64.0
# Value of a prompt's first token in the planted channel.
FIRST_TOKEN = 50.0


def _blocks(model: nn.Module) -> Iterator[BasicTransformerBlock]:
    found = [module for module in model.modules() if isinstance(module, BasicTransformerBlock)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer blocks to plant outliers in")
    yield from found


def _channel(width: int, generator: Generator) -> int:
    return int(torch.randint(width, (1,), generator=generator))


def _scale_rows(layer: nn.Linear, rows: int | slice, factor: float) -> None:
    layer.weight.data[rows] *= factor
    if layer.bias is not None:
        layer.bias.data[rows] *= factor


def _scale_columns(layers: list[nn.Linear], channel: int, factor: float) -> None:
    for layer in layers:
        layer.weight.data[:, channel] *= factor


def _scale_adaptive(norm: AdaLayerNormZero, part: int, channel: int, factor: float) -> None:
    """Scale one channel of what adaLN gives out: `part` 0 is its shift and scale of attention, 3 of the
    feed-forward layer.
    """
    width = norm.linear.out_features // 6
    shift, scale = part * width + channel, (part + 1) * width + channel
    _scale_rows(norm.linear, shift, factor)
    norm.linear.weight.data[scale] *= factor
    # The layer multiplies by one plus this.
    norm.linear.bias.data[scale] = factor * (norm.linear.bias.data[scale] + 1) - 1


def _inputs(attention: Attention) -> list[nn.Linear]:
    """Return the layers that read an attention's hidden states."""
    crossed = attention.to_k.in_features != attention.to_q.in_features or attention.is_cross_attention
    return [attention.to_q] if crossed else [attention.to_q, attention.to_k, attention.to_v]


def _readers(block: BasicTransformerBlock) -> list[tuple[nn.Module, int, list[nn.Linear]]]:
    """Return each norm of a block, the part of an adaptive one, and the layers that read it."""
    expand = block.ff.net[0].proj
    if isinstance(block.norm1, AdaLayerNormZero):
        return [(block.norm1, 0, _inputs(block.attn1)), (block.norm1, 3, [expand])]
    crossed = [] if block.attn2 is None else [(block.norm2, 0, _inputs(block.attn2))]
    return [(block.norm1, 0, _inputs(block.attn1)), *crossed, (block.norm3, 0, [expand])]


def norm_outliers(model: nn.Module, *, factor: float = FACTOR, seed: int = 0) -> nn.Module:
    """Return a copy with one outlier channel behind each affine layer norm, or adaLN, of each block.

    Raises:
        ValueError: no transformer blocks, or a norm that cannot be scaled.
    """
    planted, generator = deepcopy(model), Generator().manual_seed(seed)
    for block in _blocks(planted):
        for norm, part, layers in _readers(block):
            channel = _channel(layers[0].in_features, generator)
            if isinstance(norm, AdaLayerNormZero):
                _scale_adaptive(norm, part, channel, factor)
            elif isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
                norm.weight.data[channel] *= factor
                norm.bias.data[channel] *= factor
            else:
                raise ValueError(f"{type(norm).__name__} has no affine part that could be scaled")
            _scale_columns(layers, channel, 1 / factor)
    return planted


def _attentions(model: nn.Module) -> Iterator[Attention]:
    for block in _blocks(model):
        yield from (attention for attention in (block.attn1, block.attn2) if attention is not None)


def value_outliers(model: nn.Module, *, factor: float = FACTOR, seed: int = 0) -> nn.Module:
    """Return a copy with one outlier channel in the values of each attention, undone by its projection."""
    planted, generator = deepcopy(model), Generator().manual_seed(seed)
    for attention in _attentions(planted):
        channel = _channel(attention.to_v.out_features, generator)
        _scale_rows(attention.to_v, channel, factor)
        _scale_columns([attention.to_out[0]], channel, 1 / factor)
    return planted


def score_outliers(model: nn.Module, *, factor: float = FACTOR, seed: int = 0) -> nn.Module:
    """Return a copy with one channel of each attention's queries larger, and of its keys smaller."""
    planted, generator = deepcopy(model), Generator().manual_seed(seed)
    for attention in _attentions(planted):
        channel = _channel(attention.to_q.out_features, generator)
        _scale_rows(attention.to_q, channel, factor)
        _scale_rows(attention.to_k, channel, 1 / factor)
    return planted


def first_token_outlier(
    model: UNet2DConditionModel, *, size: float = FIRST_TOKEN
) -> tuple[UNet2DConditionModel, Callable[[Tensor], Tensor]]:
    """Return a copy that attends to tokens with one more channel, and the function that adds it to a prompt
    `[B, N, C]`.

    The channel is `size` in the first token and zero elsewhere, and no key or value reads it: outputs are the
    same, and a grid for all tokens is wasted on one.
    """
    config = {**model.config, "cross_attention_dim": model.config.cross_attention_dim + 1}
    planted = UNet2DConditionModel.from_config(config)
    state = dict(model.state_dict())
    for name, value in planted.state_dict().items():
        if value.shape != state[name].shape:
            state[name] = torch.cat([state[name], torch.zeros(len(value), 1)], 1)
    planted.load_state_dict(state)

    def widened(tokens: Tensor) -> Tensor:
        channel = torch.zeros(*tokens.shape[:2], 1, dtype=tokens.dtype, device=tokens.device)
        channel[:, 0] = size
        return torch.cat([tokens, channel], 2)

    return planted.to(model.dtype).train(model.training), widened
