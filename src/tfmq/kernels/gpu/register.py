"""Registered by being imported: CUDA tensors use the kernels of this folder from then on."""

from tfmq.kernels.gpu import multiply, norms, quantize
from tfmq.kernels.operators import multiply as multiply_operators
from tfmq.kernels.operators import norms as norm_operators
from tfmq.kernels.operators import quantize as quantize_operators

for _operators, _kernels, _names in (
    (quantize_operators, quantize, ("quantize_codes", "quantize_tokens")),
    (multiply_operators, multiply, ("linear_codes", "convolution_codes", "linear_weight_only")),
    (norm_operators, norms, ("group_norm_codes", "layer_norm_codes")),
):
    for _name in _names:
        getattr(_operators, _name).register_kernel("cuda")(getattr(_kernels, _name))
