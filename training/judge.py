"""Train the digit classifier of the judge, and measure the judge on scenes whose truth is known.

    python training/judge.py --digits DIR --output-dir runs/judge

Digits of the split `JUDGED` train it, cut out of painted scenes as the judge cuts them; digits of `TESTED`,
which nothing else sees, measure it: the share of scenes in which each attribute is read as it was drawn, and
as something else where the prompt is wrong.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import Run, Schedule
from safetensors.torch import save_file
from scenes import JUDGED, TESTED, read_digits, scene_batch
from torch import Generator, Tensor

from tfmq.evaluation.adherence.classifier import DigitClassifier
from tfmq.evaluation.adherence.figures import crop, find_blobs, shear, stroke_width
from tfmq.evaluation.adherence.scene_judge import SceneJudge


def crops(
    digits: Tensor, labels: Tensor, count: int, generator: Generator
) -> tuple[Tensor, Tensor, list[tuple[str, str, float, float]]]:
    """Return masks `[M, 1, 28, 28]` and labels `[M]` of about `count` figures, and (stroke, slant, width,
    shear) of those alone.
    """
    scenes, images = scene_batch(digits, labels, count, generator, pairs=0.3)
    masks, truth, measured = [], [], []
    for scene, image in zip(scenes, images, strict=True):
        _, blobs = find_blobs(image, len(scene.figures))
        if len(blobs) != len(scene.figures):
            continue
        # The order of two blobs is by place.
        blobs.sort(key=lambda blob: float(blob.centre[0 if scene.place in ("left of", "right of") else 1]))
        figures = scene.figures if scene.place not in ("right of", "below") else scene.figures[::-1]
        for figure, blob in zip(figures, blobs, strict=True):
            masks.append(crop(blob.mask))
            truth.append(figure.digit)
        if len(blobs) == 1:
            measured.append(
                (
                    scene.figures[0].stroke or "",
                    scene.figures[0].slant or "",
                    stroke_width(blobs[0].mask),
                    shear(blobs[0].mask),
                )
            )
    return torch.stack(masks), torch.tensor(truth), measured


def threshold(values: dict[str, list[float]], low: str, high: str) -> tuple[float, float]:
    """Return the value that parts two kinds best, and the share on the right side."""
    both = sorted(values[low] + values[high])
    shares = {
        v: (
            sum(x <= v for x in values[low]) / len(values[low])
            + sum(x > v for x in values[high]) / len(values[high])
        )
        / 2
        for v in both[::5]
    }
    best = max(shares, key=lambda value: shares[value])
    return best, shares[best]


def measure(
    judge: SceneJudge, digits: Tensor, labels: Tensor, count: int = 1000
) -> dict[str, dict[str, float]]:
    """Return how often each attribute is read as drawn, and how often it passes where the caption belongs to
    another scene.
    """
    scenes, images = scene_batch(digits, labels, count, Generator().manual_seed(5))
    captions = [scene.caption() for scene in scenes]
    shares = {}
    for kind, said in (("right", captions), ("wrong", captions[1:] + captions[:1])):
        verdicts = judge(images, said)
        known = {name: [v for v in values if v is not None] for name, values in verdicts.items()}
        shares[kind] = {name: round(sum(values) / len(values), 4) for name, values in known.items()}
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits, labels = read_digits(options.digits)
    torch.manual_seed(options.seed)
    masks, truth, measured = crops(
        digits[JUDGED], labels[JUDGED], options.scenes, Generator().manual_seed(options.seed)
    )
    unseen, unseen_truth, _ = crops(
        digits[TESTED], labels[TESTED], 1000, Generator().manual_seed(options.seed + 1)
    )
    for name, kinds, place in (("stroke", ("thin", "bold"), 2), ("slant", ("upright", "slanted"), 3)):
        column = 0 if name == "stroke" else 1
        values = {kind: [row[place] for row in measured if row[column] == kind] for kind in kinds}
        print({name: threshold(values, *kinds)}, flush=True)
    module = DigitClassifier()
    run = Run(
        options.output_dir,
        module,
        Schedule(
            steps=options.steps,
            batch_size=128,
            learning_rate=2e-3,
            average=0.998,
            seed=options.seed,
            bf16=False,
        ),
    )

    def loss(generator: Generator, held: bool) -> Tensor:
        data, wanted = (unseen, unseen_truth) if held else (masks, truth)
        index = torch.randint(len(data), (128,), generator=generator)
        return F.cross_entropy(module(data[index]), wanted[index], label_smoothing=0.0 if held else 0.05)

    def export(run: Run) -> None:
        average = DigitClassifier()
        run.load_average(average)
        average.eval()
        accuracy = float((average(unseen).argmax(1) == unseen_truth).float().mean())
        print({"step": run.step, "held_out_accuracy": round(accuracy, 4)}, flush=True)
        save_file(
            {name: value.half().contiguous() for name, value in average.state_dict().items()},
            run.directory / "scenes.safetensors",
        )

    run.train(loss, exported=export)
    final = DigitClassifier()
    run.load_average(final)
    print(measure(SceneJudge(final.eval()), digits[TESTED], labels[TESTED]), flush=True)


if __name__ == "__main__":
    main()
