"""Train `text`: a Stable Diffusion pipeline in miniature, whose text encoder learns to read first, and then
on with its denoiser.

    python training/text.py --latents runs/latents --autoencoder runs/autoencoder/vae --output-dir runs/text

The UNet attends to the caption at two of three resolutions and predicts the velocity (Salimans and Ho, 2022,
appendix D) under a cosine schedule. One caption in ten is empty, for guidance (Ho and Salimans, 2022).
`--width` makes larger models of the same kind.
"""

import argparse
from pathlib import Path

import torch
from captions import learn_to_read
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import build_scheduler, draw_timesteps, noised, picture
from latents import read_pool
from loop import Run, Schedule, begun
from scenes import said
from tokens import LENGTH, build_tokenizer
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

# Share of captions that are empty.
EMPTY = 0.1
# What the picture of samples shows, and how it is guided.
SHOWN = (
    ("a bold red seven on a blue ground"),
    ("a white three left of a green five"),
    ("a thin slanted yellow two on a purple ground"),
    ("a black eight above an orange zero on a white ground"),
    ("an upright blue four on a yellow ground"),
    ("a purple nine right of a black one"),
    "a bold orange six on a green ground",
    "a green zero below a red five on a black ground",
)
GUIDANCE = 3.0


def build_text_encoder(width: float = 1.0) -> CLIPTextModel:
    """Three layers over the words of captions; twice the `width` is twice the channels."""
    ids = build_tokenizer()
    size = int(32 * width) * 4
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=size,
            intermediate_size=2 * size,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            pad_token_id=ids.pad_token_id,
        )
    )


def build_unet(width: float = 1.0) -> UNet2DConditionModel:
    """Three resolutions, one residual block each, attention to the caption at 8x8 and 4x4."""
    channels = tuple(16 * round(base * width / 16) for base in (64, 96, 96))
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=int(32 * width) * 4,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def assemble(
    vae: AutoencoderKL, encoder: CLIPTextModel, unet: UNet2DConditionModel, scheduler: object
) -> StableDiffusionPipeline:
    """Return the pipeline of these parts."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=build_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, *, steps: int, guidance: float) -> list[Tensor]:
    """Return two rows of images of `SHOWN`."""
    rows = []
    for seed in range(2):
        generators = [Generator().manual_seed(seed * 100 + index) for index in range(len(SHOWN))]
        images = pipeline(
            list(SHOWN),
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
        ).images
        rows.append(images)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--width", type=float, default=1.0, help="channels, relative to the model that the project has"
    )
    parser.add_argument("--steps", type=int, default=7_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    pools = {held: read_pool(options.latents, part) for held, part in ((False, "train"), (True, "held_out"))}
    tokenizer = build_tokenizer()
    torch.manual_seed(options.seed)
    module = nn.ModuleDict(
        {
            "text_encoder": build_text_encoder(options.width),
            "unet": build_unet(options.width).to(memory_format=torch.channels_last),
        }
    )
    schedule = Schedule(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        average=0.999,
        seed=options.seed,
        factors={"text_encoder.": 0.1},
    )
    if not begun(options.output_dir):
        print(
            (
                "the text encoder answers "
                f"{learn_to_read(module['text_encoder'], tokenizer, seed=options.seed):.1%} "
                "about captions"
            ),
            flush=True,
        )
    run = Run(options.output_dir, module, schedule)
    # Attention written out is twice as fast here as the fused kernel, whose backward is slow on CPUs.
    module["unet"].set_attn_processor(AttnProcessor())
    module["text_encoder"].set_attn_implementation("eager")
    unet = torch.compile(module["unet"]) if options.compile else module["unet"]

    def captions_of(rows: list, generator: Generator) -> Tensor:
        silent = torch.rand(len(rows), generator=generator) < EMPTY
        texts = [
            "" if empty else said(scene, generator).caption()
            for scene, empty in zip(rows, silent.tolist(), strict=True)
        ]
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def loss(generator: Generator, held: bool) -> Tensor:
        latents, scenes = pools[held]
        index = torch.randint(len(latents), (options.batch_size,), generator=generator)
        tokens = module["text_encoder"](
            captions_of([scenes[i] for i in index.tolist()], generator)
        ).last_hidden_state
        batch = noised(latents[index], draw_timesteps(options.batch_size, generator), generator)
        return (
            (unet(batch.noisy, batch.timesteps, tokens, return_dict=False)[0].float() - batch.velocity)
            .square()
            .mean()
        )

    def export(run: Run) -> None:
        average = nn.ModuleDict(
            {"text_encoder": build_text_encoder(options.width), "unet": build_unet(options.width)}
        )
        run.load_average(average)
        vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32)
        pipeline = assemble(vae, average["text_encoder"], average["unet"], build_scheduler())
        picture(sample(pipeline, steps=25, guidance=GUIDANCE), run.directory / "samples.png")
        pipeline.to(torch.float16).save_pretrained(run.directory / "export")

    run.train(loss, exported=export)


if __name__ == "__main__":
    main()
