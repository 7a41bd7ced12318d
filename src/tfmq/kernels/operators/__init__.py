"""Integer operators of a layer as `torch.library` operators: codes in, codes or floating point out, each
defined by its pure-torch default.

Activations are codes shifted to signed bytes, `u = q - 128`, channels last: tokens `[..., C]`, images `[B, H,
W, C]`. A grid is a table of scales and zero-points `[S, G]` with `index` `[R]`, the table row of every `M /
R` consecutive rows of the input: one row for all, one for each sample, or one for each token. `G` counts the
channel segments `segments`, the sources of a concatenation; empty means one.

No operator looks at a value on the host, and each has a fake kernel: `torch.compile(fullgraph=True)` and CUDA
graphs take them whole. What runs on a GPU is in `tfmq.kernels.gpu`; anywhere else the definitions here run.
"""
