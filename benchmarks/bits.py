"""Whether two versions of the package quantize to the same bits: digests of tensors, predictions and exported
graphs.

    python benchmarks/bits.py --output before.json                   # with the one version
    python benchmarks/bits.py --output after.json --against before.json

Every preset quantizes the embedded model, and every preset each tiny model of the tests, by a short
calibration with a fixed seed. Of each the digest of all tensors is kept, and for every backend that this
machine has the digest of its predictions at a calibrated timestep and at one that is not; of exported graphs
that of what they compute. With `--against` it prints what differs and exits with 1 if anything does.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from loading import loaded
from names import names_of
from torch import Tensor

import tfmq
from tfmq.backends.backend import BACKENDS, Options
from tfmq.cli.progress import shown_progress
from tfmq.errors import MissingExtraError
from tfmq.export.capture import Call
from tfmq.export.directory import export
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.recipes.presets import PRESETS
from tfmq.recipes.recipe import Recipe
from tfmq.storage.digest import tensor_digest
from tfmq.targets import open_sampler

ROOT = Path(__file__).resolve().parents[1]
TINY = loaded(ROOT / "tests" / "conftest.py")
EMBEDDED = "default"


def short(recipe: Recipe, *, steps: int, samples: int) -> Recipe:
    """Return a recipe that takes seconds and still goes through every stage."""
    calibration = replace(recipe.calibration, steps=steps, samples=samples, interval=1, batch_size=samples)
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=3))
    tuning = replace(recipe.tuning, iterations=min(2, recipe.tuning.iterations))
    learning = replace(recipe.learning, iterations=3)
    return replace(recipe, calibration=calibration, temporal=temporal, learning=learning, tuning=tuning)


def digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def calls(sampler: Sampler) -> dict[str, Inputs]:
    """Return a batch of two at a calibrated timestep, and at one that is not."""
    timesteps, example = sampler.denoiser.module.tfmq_steps.timesteps, sampler.example().resized(2)
    noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
    at = {"known": timesteps[0], "unseen": (timesteps[0] + timesteps[1]) / 2}
    return {name: Inputs(noise, value.long().expand(2), example.conditions) for name, value in at.items()}


@torch.no_grad()
def predictions(sampler: Sampler) -> dict[str, str]:
    """Return the digests of what each backend predicts."""
    found = {}
    # Layer by layer: what torch compiles differs from machine to machine, and takes a minute a model.
    for backend in sorted(BACKENDS):
        try:
            tfmq.execute(sampler.denoiser.module, backend, options=Options())
        except (MissingExtraError, ValueError):
            continue
        for name, inputs in calls(sampler).items():
            found[f"{backend} {name}"] = digest(sampler.denoiser(inputs))
    return found


@torch.no_grad()
def exported(sampler: Sampler) -> dict[str, str]:
    """Return the digest of what an exported OpenVINO graph computes; nothing without OpenVINO."""
    try:
        import openvino
    except ImportError:
        return {}
    denoiser, inputs = sampler.denoiser, calls(sampler)["known"]
    call = Call.of(
        denoiser.module,
        {denoiser.sample: inputs.sample, denoiser.timestep: inputs.timestep, **inputs.conditions},
    )
    with tempfile.TemporaryDirectory() as folder:
        names = [
            given["name"]
            for given in export(denoiser, sampler.example(), Path(folder), to="openvino")["inputs"]
        ]
        core = openvino.Core()
        model = core.compile_model(
            core.read_model(Path(folder) / "denoiser.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        outputs = model({name: tensor.numpy() for name, tensor in zip(names, call.tensors, strict=True)})
    return {"exported": digest(torch.from_numpy(outputs[0]))}


def bits(make: Callable[[], Sampler], recipe: Recipe) -> dict[str, str]:
    """Return every digest of one model under one recipe; what the recipe refuses is a result too."""
    sampler = make()
    try:
        tfmq.quantize(sampler, recipe, seed=0)
    except ValueError as error:
        return {"refused": str(error)}
    return {
        "tensors": tensor_digest(sampler.denoiser.module.state_dict()),
        **predictions(sampler),
        **exported(sampler),
    }


def cases(models: list[str], presets: list[str]) -> dict[str, Callable[[], dict[str, str]]]:
    """Return what is measured, by name."""
    found: dict[str, Callable[[], dict[str, str]]] = {}
    for model in models:
        embedded = model == EMBEDDED
        make = partial(open_sampler, EMBEDDED) if embedded else partial(TINY.tiny_sampler, model)
        for preset in presets:
            recipe = short(tfmq.scheme(preset), steps=4 if embedded else 3, samples=2)
            found[f"{model} {preset}"] = partial(bits, make, recipe)
    return found


def main() -> None:
    models, presets = [EMBEDDED, *TINY.MODELS], [*PRESETS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--models", type=names_of(models), default=models)
    parser.add_argument("--presets", type=names_of(presets), default=presets)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found, wanted = {}, cases(options.models, options.presets)
    with shown_progress() as progress, progress("quantizing", len(wanted)) as advance:
        for name, measure in wanted.items():
            found[name] = measure()
            advance()
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    count = sum(map(len, found.values()))
    if options.against is None:
        print(f"{count} digests of {len(found)} quantized models")
        return
    before = json.loads(options.against.read_text(encoding="utf-8"))
    keys = [(name, key) for name in found for key in before.get(name, {}).keys() | found[name].keys()]
    changed = sorted(
        f"{name}: {key}" for name, key in keys if before.get(name, {}).get(key) != found[name].get(key)
    )
    print(f"{count} digests of {len(found)} quantized models, {len(changed)} differ", *changed, sep="\n")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
