"""Train a LoRA for `text`: an ink that the model has not seen, in minutes.

    python training/lora.py --digits DIGITS --output-dir runs/lora

Half of the scenes have the new ink, the others those that the model knows. `pytorch_lora_weights.safetensors`
in the output directory is what `load_lora_weights` of diffusers reads; `ink.json` beside it says the ink's
name and the colours of its halves, which `benchmarks/adapter.py` judges by.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusion import draw_timesteps, noised, picture
from latents import encode
from loop import Run, Schedule
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from scenes import JUDGED, LATER, PAINTED, draw_scene, held_out, paint, read_digits, said, typical
from torch import Generator, Tensor

from tfmq.evaluation.adherence.scenes import DIGITS, Scene
from tfmq.targets import named_directory

# What `text` itself was trained on: the most typical hands, and little that captions do not say.
EXEMPLARS, JITTER = 12, 0.25
GUIDANCE = 3.0
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
(INK,) = LATER


def scenes_of(count: int, generator: Generator, *, held: bool) -> list[Scene]:
    """Return scenes of one figure, every other one in the new ink, from combinations that training sees or
    `held` out of it.
    """
    scenes: list[Scene] = []
    while len(scenes) < count:
        label = int(torch.randint(len(DIGITS), (1,), generator=generator))
        scene = draw_scene((label, label), generator, pairs=0.0)
        if len(scenes) % 2 == 0:
            if scene.ground in LATER[INK]:
                continue
            scene = replace(scene, figures=(replace(scene.figures[0], ink=INK),))
        if held_out(scene) == held:
            scenes.append(scene)
    return scenes


def pool(
    pipeline: StableDiffusionPipeline, directory: Path, count: int, *, seed: int, held: bool
) -> tuple[Tensor, list[Scene]]:
    """Return the latents `[count, 4, 16, 16]` of newly painted scenes, and the scenes."""
    digits, labels = read_digits(directory)
    part = JUDGED if held else PAINTED
    digits, labels = digits[part], labels[part]
    kept = typical(digits, labels, EXEMPLARS)
    digits, labels = digits[kept, 0], labels[kept]
    generator = Generator().manual_seed(seed)
    scenes = scenes_of(count, generator, held=held)
    chosen = []
    for scene in scenes:
        own = (labels == scene.figures[0].digit).nonzero().flatten()
        chosen.append(digits[own[torch.randint(len(own), (1,), generator=generator)]])
    images = paint(scenes, torch.stack(chosen), generator, jitter=JITTER)
    return torch.cat([encode(pipeline.vae, part) for part in images.split(64)]), scenes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=named_directory("text"))
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--scenes", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.base, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pools = {
        held: pool(pipeline, options.digits, count, seed=options.seed + held, held=held)
        for held, count in ((False, options.scenes), (True, 256))
    }
    torch.manual_seed(options.seed)
    unet, encoder = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    # Written out, as in the training of `text`: the fused kernel's backward is slow on CPUs.
    unet.set_attn_processor(AttnProcessor())
    unet.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=LAYERS))
    schedule = Schedule(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup=20,
        average=0.98,
        save_every=100,
        seed=options.seed,
        bf16=False,
    )
    run = Run(options.output_dir, unet, schedule)

    def loss(generator: Generator, held: bool) -> Tensor:
        latents, scenes = pools[held]
        index = torch.randint(len(latents), (options.batch_size,), generator=generator)
        texts = [said(scenes[i], generator).caption() for i in index.tolist()]
        tokens = pipeline.tokenizer(
            texts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        batch = noised(latents[index], draw_timesteps(options.batch_size, generator), generator)
        states = encoder(tokens).last_hidden_state
        predicted = unet(batch.noisy, batch.timesteps, states, return_dict=False)[0]
        return (predicted - batch.velocity).square().mean()

    def export(run: Run) -> None:
        before = {name: value.detach().clone() for name, value in run.parameters.items()}
        run.load_average(unet)
        StableDiffusionPipeline.save_lora_weights(run.directory, get_peft_model_state_dict(unet))
        (run.directory / "ink.json").write_text(
            json.dumps({"ink": INK, "halves": LATER[INK]}), encoding="utf-8"
        )
        prompts = [
            f"a bold {INK} {digit} on a {ground} ground"
            for digit, ground in zip(DIGITS, ("white", "black") * 5, strict=True)
        ]
        shown = pipeline(
            prompts,
            generator=[Generator().manual_seed(seed) for seed in range(len(prompts))],
            num_inference_steps=20,
            guidance_scale=GUIDANCE,
            output_type="pt",
        ).images
        picture([shown], run.directory / "samples.png")
        with torch.no_grad():
            for name, parameter in run.parameters.items():
                parameter.copy_(before[name])

    run.train(loss, exported=export)


if __name__ == "__main__":
    main()
