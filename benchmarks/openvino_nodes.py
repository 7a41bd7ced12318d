"""Where the time of an exported denoiser's step goes, by kind of node, as OpenVINO's own counters have it.

    tfmq export DIR --to openvino --output-dir exported
    python benchmarks/openvino_nodes.py exported/denoiser.xml --threads 2

The models that the `openvino` backend keeps in its cache (`$TFMQ_CACHE/openvino`) will do too. Counting costs
a little, so the sum is no benchmark; shares are what to read. Nodes that the plug-in leaves out at run time
are not listed.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino


def inputs(model: Any, batch: int) -> dict[str, np.ndarray]:
    """Return noise for every input of floating point, and the first timestep or index for every other."""
    generator = np.random.default_rng(0)
    arrays = {}
    for port in model.inputs:
        shape = [batch if size.is_dynamic else size.get_length() for size in port.partial_shape]
        floating = port.element_type.is_real()
        arrays[port.get_any_name()] = (
            generator.standard_normal(shape).astype(np.float32)
            if floating
            else np.zeros(shape, dtype=np.int64)
        )
    return arrays


def compiled(path: Path, *, batch: int, threads: int, **hints: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a request of the model in a file, for a batch, and inputs for it."""
    core = openvino.Core()
    model = core.read_model(path)
    arrays = inputs(model, batch)
    model.reshape({name: list(array.shape) for name, array in arrays.items()})
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        **hints,
    }
    return core.compile_model(model, "CPU", hints).create_infer_request(), arrays


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="steps that are counted")
    parser.add_argument("--warm", type=int, default=5, help="steps before them")
    parser.add_argument("--precision", default="f32", help="of what is not integer: f32 or bf16")
    options = parser.parse_args()
    request, arrays = compiled(
        options.model,
        batch=options.batch,
        threads=options.threads,
        PERF_COUNT=True,
        INFERENCE_PRECISION_HINT=options.precision,
    )
    for _ in range(options.warm):
        request.infer(arrays)
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        request.infer(arrays)
        for node in request.profiling_info:
            if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                spent[node.node_type, node.exec_type].append(node.real_time.total_seconds() * 1e3)
    total = sum(map(sum, spent.values()))
    print(f"{total / options.rounds:.2f} ms a step\n")
    print("| node | kernel | nodes | ms | share |\n|---|---|---|---|---|")
    for (kind, kernel), times in sorted(spent.items(), key=lambda item: -sum(item[1])):
        print(
            f"| {kind} | {kernel} | {len(times) // options.rounds} | "
            f"{sum(times) / options.rounds:.3f} | {sum(times) / total:.3f} |"
        )


if __name__ == "__main__":
    main()
