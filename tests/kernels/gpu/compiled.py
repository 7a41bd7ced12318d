"""Compile every Triton kernel for the architectures given, without a GPU, and launches for the last of them;
print what came out as one JSON object.

Run as a script of its own: in the process of the tests kernels are interpreted. `python compiled.py 80 90`.
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tfmq.kernels.gpu import multiply, norms, quantize
from tfmq.kernels.gpu.tiles import TILES, Tile

POINTERS = {
    "inputs": "*i8",
    "codes": "*i8",
    "out": "*bf16",
    "scale": "*fp32",
    "zero": "*u8",
    "index": "*i64",
    "weight_zero": "*i8",
    "weight_scale": "*fp32",
    "sums": "*i32",
    "bias": "*fp32",
    "residual": "*bf16",
    "x": "*bf16",
    "means": "*fp32",
    "deviations": "*fp32",
    "centre": "*fp32",
    "rate": "*fp32",
    "gain": "*bf16",
    "shift": "*bf16",
    "weight": "*bf16",
    "EPS": "fp32",
}
CODES = {"out": "*i8"}
IMAGE = {"G": 1, "LEVELS": 256, "PADDED": True, "BR": 16, "BC": 128}


def product(**changes: Any) -> dict[str, Any]:
    """Return the constants of `multiply`."""
    return {
        "KH": 1,
        "KW": 1,
        "IMAGE": False,
        "G": 1,
        "NIBBLES": False,
        "INTEGER": True,
        "ACTIVATION": "gelu_tanh",
        **changes,
    }


def convolution(**changes: Any) -> dict[str, Any]:
    return product(KH=3, KW=3, IMAGE=True, ACTIVATION="", **changes)


W8, W4 = {"weight": "*i8"}, {"weight": "*u8"}
FLOAT = {"inputs": "*bf16", "scale": None, "zero": None, "index": None, "sums": None, "residual": None}
W8A8, W8A16 = {**W8, "weight_zero": None}, {**W8, "weight_zero": None, **FLOAT}
# By name: kernel, types that differ from those above, constants, tile.
VARIANTS: dict[str, tuple[Any, dict[str, str | None], dict[str, Any], Tile | None]] = {
    "linear w8a8": (multiply.multiply, W8A8, product(), TILES[0]),
    # A large tile too, for the kernel that needs most of everything.
    "linear w4a8": (multiply.multiply, W4, product(), Tile(128, 128, 64, 8, 3)),
    "convolution w8a8": (multiply.multiply, W8A8, convolution(), TILES[0]),
    "convolution w8a8 split": (multiply.multiply, W8A8, convolution(G=2), TILES[0]),
    "convolution w4a8 split": (multiply.multiply, W4, convolution(G=2, NIBBLES=True), TILES[0]),
    "linear w4a16": (
        multiply.multiply,
        {**W4, **FLOAT},
        product(INTEGER=False, NIBBLES=True, ACTIVATION=""),
        Tile(16, 32, 128, 4, 4),
    ),
    "linear w8a16": (
        multiply.multiply,
        W8A16,
        product(INTEGER=False, ACTIVATION=""),
        Tile(16, 32, 128, 4, 4),
    ),
    "quantize": (quantize.quantize_rows, CODES, IMAGE, None),
    "quantize split": (quantize.quantize_rows, CODES, {**IMAGE, "G": 2}, None),
    "quantize tokens": (quantize.quantize_each_row, CODES, {"BC": 2048}, None),
    "channel moments": (norms.channel_moments, {}, {"BR": 32, "BC": 128}, None),
    "group moments": (norms.group_moments, {}, {"BS": 64, "BC": 16}, None),
    "group norm": (norms.normalise_rows, CODES, {**IMAGE, "ACTIVATION": "silu"}, None),
    "layer norm": (
        norms.normalise_token,
        {**CODES, "weight": None, "bias": None},
        {"G": 1, "LEVELS": 256, "BC": 2048},
        None,
    ),
}
VARIANTS["linear w4a8"][2]["NIBBLES"] = True


def compiled(name: str, capability: int) -> dict[str, Any]:
    """Return what the compiled kernel of a name uses: instructions of its inner loop, shared memory, spilled
    registers.
    """
    function, types, constants, tile = VARIANTS[name]
    if tile is not None:
        constants = constants | {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}
    kinds = POINTERS | types
    absent = {argument: None for argument in function.arg_names if kinds.get(argument, "") is None}
    constants = constants | absent
    signature = {
        argument: "constexpr" if argument in constants else kinds.get(argument, "i32")
        for argument in function.arg_names
    }
    # As a launch with sizes that 16 divides would have it; those of channels and lines decide how wide loads
    # are.
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or function.arg_names[i] in EVEN
    }
    positions = {(function.arg_names.index(argument),): value for argument, value in constants.items()}
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if tile is not None:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(function, signature, positions, even)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = built.asm["ptx"]
    integer, asynchronous = re.search(r"mma\S*\.s32\.s8\.s8", ptx), re.search(r"cp\.async|mbarrier", ptx)
    floating = re.search(r"mma\S*\.f32\.bf16\.bf16", ptx)
    return {
        "target": int(re.search(r"\.target sm_(\d+)", ptx).group(1)),
        "cubin": len(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "integer": bool(integer),
        "warpgroup": "wgmma.mma_async" in ptx,
        "floating": bool(floating),
        "asynchronous": bool(asynchronous),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
    }


EVEN = ("N", "C", "XC", "W0", "W1", "L0", "L1", "TAP", "XWC", "XHWC")


def main() -> None:
    assert not torch.cuda.is_available() or triton
    capabilities = [int(capability) for capability in sys.argv[1:]]
    kernels = {
        name: {capability: compiled(name, capability) for capability in capabilities} for name in VARIANTS
    }
    # Beside this file, where pytest, which reads every module for examples, does not look.
    from launched import failures

    print(json.dumps({"kernels": kernels, "failed": failures(capabilities[-1])}))


if __name__ == "__main__":
    main()
