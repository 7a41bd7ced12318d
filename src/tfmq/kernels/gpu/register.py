"""Registered by being imported: CUDA tensors use the kernels of this folder from then on."""

import torch
from torch import Tensor

from tfmq.kernels.gpu import multiply, norms, quantize
from tfmq.kernels.operators import multiply as multiply_operators
from tfmq.kernels.operators import norms as norm_operators
from tfmq.kernels.operators import product as product_operators
from tfmq.kernels.operators import quantize as quantize_operators


def product_codes(
    left: Tensor,
    left_scale: Tensor,
    left_zero: Tensor,
    left_levels: int,
    right: Tensor,
    right_scale: Tensor,
    right_zero: Tensor,
    right_levels: int,
) -> Tensor:
    """Compute `tfmq::product_codes` by the library's batched product: bfloat16 holds every integer up to 256,
    the sums are float32.
    """
    a = product_operators.centred(left, left_scale, left_zero, left_levels).to(torch.bfloat16)
    b = product_operators.centred(right, right_scale, right_zero, right_levels).to(torch.bfloat16)
    sums = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return product_operators.rescaled(
        sums.reshape(*left.shape[:-1], right.shape[-1]), left_scale, right_scale, left.dtype
    )


for _operators, _kernels, _names in (
    (quantize_operators, quantize, ("quantize_codes", "quantize_tokens")),
    (multiply_operators, multiply, ("linear_codes", "convolution_codes", "linear_weight_only")),
    (norm_operators, norms, ("group_norm_codes", "layer_norm_codes")),
):
    for _name in _names:
        getattr(_operators, _name).register_kernel("cuda")(getattr(_kernels, _name))
product_operators.product_codes.register_kernel("cuda")(product_codes)
