"""Search for the recipe of a model: which fields, put into a scheme's, bring images nearer to full
precision's.

    python benchmarks/search.py dit --bits w4a8 --output-dir runs/search
    python benchmarks/search.py NAME=FILE.py:FUNCTION --bits w4a4 --minutes 60

A move changes a recipe in one respect. First each is tried by itself; then those that gained are put on top
of each other, the greatest gain first, each staying where the images of the same noise gain by it beyond the
95 % interval of the paired difference. A recipe whose file grows beyond `--bytes` times the scheme's is left
out. `--minutes` bounds the search: no trial starts after so long.

A search over many trials on one noise finds what suits that noise. So what it found is judged once more, on
noise of other seeds and by calibrations of other seeds, against the scheme; that difference is the result.

A finished trial is a JSON file and stays. The same command goes on with what is missing.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from contestants import Contestant, find
from leaderboard_page import mean_interval
from methods import BITS
from names import names_of
from reference import IMAGE_SEED, Reference, environment
from scoring import executed

import tfmq
from tfmq.artifact import stored_bytes
from tfmq.cli.progress import shown_progress
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.progress import Progress
from tfmq.recipes.presets import tuned
from tfmq.recipes.recipe import Branch, Recipe
from tfmq.storage.atomic import read_json, write_json

Move = Callable[[Recipe], Recipe]


def with_weights(**changes: Any) -> Move:
    """Return the move that changes how weights are quantized."""
    return lambda recipe: replace(recipe, weights=replace(recipe.weights, **changes))


def with_activations(**changes: Any) -> Move:
    """Return the move that changes how inputs are quantized."""
    return lambda recipe: replace(recipe, activations=replace(recipe.activations, **changes))


def with_rescaling(**changes: Any) -> Move:
    """Return the move that changes how inputs are rescaled or rotated."""
    return lambda recipe: replace(recipe, rescaling=replace(recipe.rescaling, **changes))


def with_branch(recipe: Recipe) -> Recipe:
    """Give layers a low-rank branch, but the first and the last."""
    fine = recipe.activations.bits == 8
    return replace(
        recipe,
        weights=replace(recipe.weights, rank=16),
        branch=Branch(dtype="int8" if fine else "float16"),
        rules=tuple(replace(rule, weights={**rule.weights, "rank": 0}) for rule in recipe.rules),
    )


def with_unit_gain(recipe: Recipe) -> Recipe:
    """Let each channel follow full precision with gain one."""
    return replace(recipe, rounding=replace(recipe.rounding, unit_gain=True))


def every_step(recipe: Recipe) -> Recipe:
    """Let units learn from every step."""
    return replace(recipe, calibration=replace(recipe.calibration, interval=1))


MOVES: dict[str, Move] = {
    "tokens": with_activations(tokens="measured"),
    "groups": with_weights(group=128, groups=(64, 32)),
    "rotation": with_rescaling(rotation=256),
    "ranges": with_rescaling(equalizers=("ranges",)),
    "peaks": with_rescaling(equalizers=("peaks",)),
    "clusters": with_activations(clusters=4),
    "floats": with_weights(grids=("e2m1", "e3m0")),
    "branch": with_branch,
    "products": with_activations(products=False),
    "unit-gain": with_unit_gain,
    "every-step": every_step,
    "tuning": tuned,
}
# Seeds of the last comparison: of the calibration, and of the images' noise.
HELD_OUT = ((1, IMAGE_SEED + 1), (2, IMAGE_SEED + 2), (3, IMAGE_SEED + 3))


def possible(bits: str, moves: Sequence[str]) -> list[str]:
    """Return the moves that the recipe of a scheme has room for: groups need few bits, rescaling needs grids
    of inputs. Say which there is none for.
    """
    found = []
    for move in moves:
        try:
            MOVES[move](tfmq.scheme(bits))
        except ValueError as error:
            print(f"{move} is left out: {error}", file=sys.stderr, flush=True)
        else:
            found.append(move)
    return found


@dataclass(frozen=True)
class Trial:
    """What a recipe did: PSNR in dB of each image, the bytes of the denoiser, seconds of the processor."""

    psnr_db: list[float]
    bytes: int
    cpu_seconds: float

    def gain(self, other: "Trial") -> tuple[float, float]:
        """Return by how many dB its images are better, and half the 95 % interval."""
        return mean_interval((np.array(self.psnr_db) - np.array(other.psnr_db)).tolist())


class Trials:
    """Makes and keeps the trials of one model.

    Args:
        model: the model.
        bits: of the scheme.
        num_images: drawn of each trial.
        directory: where trials and full precision's images stay.
    """

    def __init__(
        self, model: Contestant, bits: str, *, num_images: int, directory: Path, progress: Progress
    ) -> None:
        self.model, self.bits, self.num_images = model, bits, num_images
        self.directory, self.progress = directory, progress
        self.described = {**model.describe(), "num_images": num_images}

    def reference(self, noise: int) -> Reference:
        """Return full precision's images of a noise, drawn once."""
        name = f"{self.model.name}-{self.described['weights']}-{self.described['prompts']}-{noise}"
        running = self.model.running
        found = Reference(
            self.model.sampler,
            self.directory / "references" / f"{name}-{running.steps}-{running.guidance}",
            self.num_images,
            steps=running.steps,
            batch_size=50,
            seed=noise,
        )
        found.prepare_images(self.progress)
        return found

    def of(self, moves: Sequence[str], *, seed: int = 0, noise: int = IMAGE_SEED) -> Trial:
        """Return the trial of a scheme with some moves.

        Raises:
            SystemExit: it was made under other settings.
        """
        name = "-".join((self.model.name, self.bits, *(moves or ("scheme",)), str(seed)))
        path = self.directory / f"{name}.json"
        if not path.exists():
            print(name, file=sys.stderr, flush=True)
            found = self._made(moves, seed, self.reference(noise), self.directory / name)
            write_json(path, {"settings": self.described, **environment("benchmarks/search.py"), **found})
        kept = read_json(path)
        if kept["settings"] != self.described:
            raise SystemExit(
                f"error: {path.name} has other settings; give another --output-dir, or delete it"
            )
        return Trial(kept["psnr_db"], kept["bytes"], kept["cpu_seconds"])

    def _made(self, moves: Sequence[str], seed: int, reference: Reference, folder: Path) -> dict[str, Any]:
        recipe = tfmq.scheme(self.bits)
        for move in moves:
            recipe = MOVES[move](recipe)
        # The rest of a trial that was killed.
        for rest in (folder, folder.with_name(f"{folder.name}.job")):
            shutil.rmtree(rest, ignore_errors=True)
        began = time.process_time()
        self.model.quantize(
            self.model.recipe(recipe, iterations=None), seed=seed, folder=folder, progress=self.progress
        )
        spent, sampler = time.process_time() - began, self.model.quantized(folder)
        executed(sampler)
        pairs = reference.fidelity(reference.draw(sampler, self.progress))
        size = stored_bytes(folder)
        shutil.rmtree(folder)
        return {
            "psnr_db": np.round(pairs.psnr_db, 3).tolist(),
            "bytes": size,
            "cpu_seconds": spent,
        }


def found_moves(
    trials: Trials, moves: Sequence[str], *, growth: float, deadline: float
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the moves that stay, and what every trial said."""
    base = trials.of(())
    kept, best = [], base
    seen: list[dict[str, Any]] = []

    def tried(chosen: list[str], against: Trial) -> Trial | None:
        if time.monotonic() > deadline:
            return None
        trial = trials.of(chosen)
        mean, half = trial.gain(against)
        growing = trial.bytes / base.bytes
        seen.append({"moves": chosen, "gain_db": mean, "half_interval_db": half, "bytes": growing})
        print(f"{'+'.join(chosen)}: {mean:+.2f} ± {half:.2f} dB, {growing:.3f} of the bytes", flush=True)
        return trial if growing <= growth else None

    alone = {move: trial.gain(base) for move in moves if (trial := tried([move], base)) is not None}
    for move in sorted(alone, key=lambda name: -alone[name][0]):
        mean, half = alone[move]
        if not kept and mean > half:
            kept, best = [move], trials.of((move,))
        elif kept and mean > 0:
            trial = tried([*kept, move], best)
            gain, around = trial.gain(best) if trial is not None else (0.0, 0.0)
            if trial is not None and gain > around:
                kept, best = [*kept, move], trial
    return kept, seen


def held_out(trials: Trials, kept: Sequence[str]) -> dict[str, Any]:
    """Return what the found recipe gains over the scheme on noise and calibrations that the search did not
    see.
    """
    differences: list[float] = []
    for seed, noise in HELD_OUT:
        ours, theirs = (trials.of(moves, seed=seed, noise=noise) for moves in (kept, ()))
        differences += (np.array(ours.psnr_db) - np.array(theirs.psnr_db)).tolist()
    mean, half = mean_interval(differences)
    return {"gain_db": mean, "half_interval_db": half, "images": len(differences)}


def main() -> None:
    """Search, judge and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a name, a directory of a pipeline, or NAME=FILE.py:FUNCTION")
    parser.add_argument("--bits", choices=BITS, default="w4a8")
    parser.add_argument(
        "--moves", type=names_of(MOVES), default=list(MOVES), help="some of " + ", ".join(MOVES)
    )
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--bytes", type=float, default=1.1, help="most bytes, as multiples of the scheme's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after so long")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the model's")
    parser.add_argument("--samples", type=int, help="images of a calibration; by default the model's")
    parser.add_argument("--prompts", type=Path, help="file of prompts to measure on, one a line")
    parser.add_argument("--calibration-prompts", type=Path, help="file of prompts to calibrate on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs", "search"))
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    model = find(options.model, options)
    if model is None:
        parser.error(f"the model {options.model} is not here")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with quiet(), shown_progress() as progress:
        trials = Trials(
            model,
            options.bits,
            num_images=options.num_images,
            directory=options.output_dir,
            progress=progress,
        )
        moves = possible(options.bits, options.moves)
        kept, seen = found_moves(trials, moves, growth=options.bytes, deadline=deadline)
        judged = held_out(trials, kept) if kept else None
    result = {"model": model.name, "bits": options.bits, "kept": kept, "held_out": judged, "trials": seen}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
