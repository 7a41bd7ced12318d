"""Every variant, registered by being imported. The libraries behind them are only imported once a variant
runs.
"""

from tfmq.evaluation.cost.variants import full, onnxruntime, openvino, quantized, quanto, sdnq, torchao  # noqa: F401
