"""The float backend: the dequantized weights in the model's own floating point, inputs as they come. As fast
as the full-precision model.
"""

from torch import nn

from tfmq.backends.backend import Coverage, Options, register_backend
from tfmq.nn.embedding import KeptRows
from tfmq.nn.packed_layer import StockExecution
from tfmq.nn.plan import packed_embeddings, packed_layers
from tfmq.nn.products import ProductQuantizers, StockProducts
from tfmq.nn.submodules import submodules


@register_backend("float")
class Float:
    """Dequantized layers: the fastest way for a small model, whose integer layers take longer to call than to
    compute.

    No input and no attention product is quantized. So the outputs are not those of the other backends: as a
    rule they are nearer to full precision.
    """

    def missing(self) -> str:
        """Return nothing: it runs wherever torch does."""
        return ""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Let every layer leave its input as it comes, and keep its weight in the model's dtype, if that is
        wanted.
        """
        dtype = next(
            (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None
        )
        layers, keep = packed_layers(module), options.weights == "unpacked"
        for layer in layers.values():
            layer.execute(StockExecution(layer.stock_weight.to(dtype).contiguous() if keep else None))
        for products in submodules(module, ProductQuantizers).values():
            products.execute(StockProducts())
        for embedding in packed_embeddings(module).values() if keep else ():
            embedding.execute(KeptRows(embedding.weight.to(embedding.dtype)))
        return Coverage(integer=(), floating=dict.fromkeys(layers, "float"))
