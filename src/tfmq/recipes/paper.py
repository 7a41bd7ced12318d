"""The published experiments: how each model was sampled and calibrated, the results that were printed, and a
recipe that repeats it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tfmq.recipes.published import Published
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule, Spacing, Temporal, Weights
from tfmq.reconstruction.learning import Learning

# The columns of the published tables, with their weight and activation bits.
BITS: dict[str, tuple[int, int | None]] = {"w4a32": (4, None), "w8a8": (8, 8), "w4a8": (4, 8)}

# Layers, by diffusers' names, that the released code leaves in full precision: "W4" means all layers but
# these. Its quantizers of attention products are never switched on. As shortcuts are among these layers, no
# layer that reads a concatenation itself is left for its split grids in DDIM.
FULL_PRECISION = (
    "role:first",
    "role:last",
    "time_embedding.linear_1",
    "*.conv_shortcut",
    "*.downsamplers.*",
)
# Layers whose weights it quantizes, and whose inputs it does not.
FULL_INPUTS = ("time_embedding.linear_2", "down_blocks.0.resnets.0.conv1")

# Points of FID by which a reproduced figure may differ. Seeds, libraries and reference statistics move an FID
# by less; another scaling, sampler or set of weights moves it by more.
FID_TOLERANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Result:
    """Published figures of one column: FID, sFID, inception score, CLIP score; None where there is none."""

    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    clip_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One published experiment.

    Attributes:
        name: name of the recipes, which add the bits: `ldm4_bedrooms_w4a8`.
        model: what was quantized.
        sampler: the scheduler of the publication, and what is particular about its timesteps.
        calibration: trajectory, interval, samples at each step, eta, guidance.
        results: the published figures by bits; `fp` is full precision.
        num_images: number of images behind the figures.
    """

    name: str
    model: str
    sampler: str
    calibration: Calibration
    results: Mapping[str, Result]
    num_images: int = 50_000


def _calibration(
    steps: int,
    interval: int,
    *,
    samples: int = 256,
    eta: float | None = None,
    guidance: float | None = None,
    spacing: Spacing | None = None,
) -> Calibration:
    return Calibration(
        samples=samples,
        steps=steps,
        interval=interval,
        learned=None,
        batch_size=32,
        eta=eta,
        guidance_scale=guidance,
        spacing=spacing,
        judged=0.0,
    )


def _results(rows: Mapping[str, tuple[float, ...]], *further: str) -> dict[str, Result]:
    """Return rows of figures in the order FID, sFID, `further` as results."""
    names = ("fid", "sfid", *further)
    return {bits: Result(**dict(zip(names, figures, strict=False))) for bits, figures in rows.items()}


PROTOCOLS = (
    Protocol(
        name="cifar10_ddim",
        model="DDIM, CIFAR-10, 32x32",
        sampler="DDIM, quadratic spacing of the timesteps",
        calibration=_calibration(100, 5, eta=0.0, spacing="quadratic"),
        results=_results({"w4a32": (4.73,), "w4a8": (4.78,)}),
    ),
    Protocol(
        name="ldm4_bedrooms",
        model="LDM-4, LSUN-Bedrooms, 256x256",
        sampler="DDIM",
        calibration=_calibration(200, 10, eta=1.0),
        results=_results(
            {"fp": (2.98, 7.09), "w4a32": (3.60, 7.61), "w8a8": (3.14, 7.26), "w4a8": (3.68, 7.65)}
        ),
    ),
    Protocol(
        name="ldm8_churches",
        model="LDM-8, LSUN-Churches, 256x256",
        sampler="DDIM",
        calibration=_calibration(400, 25, eta=0.0),
        results=_results(
            {"fp": (4.12, 10.89), "w4a32": (4.07, 11.41), "w8a8": (4.01, 10.98), "w4a8": (4.14, 11.46)}
        ),
    ),
    Protocol(
        name="ldm4_celebahq",
        model="LDM-4, CelebA-HQ, 256x256",
        sampler="DDIM",
        calibration=_calibration(200, 10, eta=0.0),
        results=_results(
            {"fp": (8.74, 10.16), "w4a32": (8.74, 10.18), "w8a8": (8.71, 10.20), "w4a8": (8.76, 10.26)}
        ),
    ),
    Protocol(
        name="ldm4_ffhq",
        model="LDM-4, FFHQ, 256x256",
        sampler="DDIM",
        calibration=_calibration(200, 10, eta=1.0),
        results=_results(
            {"fp": (9.36, 8.67), "w4a32": (9.89, 9.06), "w8a8": (9.46, 8.73), "w4a8": (9.97, 9.14)}
        ),
    ),
    Protocol(
        name="ldm4_imagenet",
        model="LDM-4, ImageNet, 256x256, class-conditional",
        sampler="DDIM",
        # The interval of these 20 steps is not published: every one is used.
        calibration=_calibration(20, 1, guidance=3.0),
        results=_results(
            {
                "fp": (10.91, 7.67, 235.64),
                "w4a32": (10.50, 7.98, 223.81),
                "w8a8": (10.79, 7.65, 198.86),
                "w4a8": (10.29, 7.35, 221.82),
            },
            "inception_score",
        ),
    ),
    Protocol(
        name="sd14_coco",
        model="Stable Diffusion v1.4, MS-COCO prompts",
        sampler="PLMS (PNDM without its Runge-Kutta steps)",
        # One image for each of 128 prompts, both halves of the guidance; the interval is not published.
        calibration=_calibration(50, 1, samples=128, guidance=7.5),
        results=_results(
            {
                "fp": (13.15, 19.31, 0.3146),
                "w4a32": (13.21, 19.03, 0.3144),
                "w8a8": (13.09, 19.91, 0.3134),
                "w4a8": (13.36, 20.14, 0.3128),
            },
            "clip_score",
        ),
        num_images=30_000,
    ),
)


def published(protocol: Protocol) -> tuple[Published, ...]:
    """Return the FID that full precision must reach before `tfmq evaluate` judges a model of this experiment;
    nothing where none was printed.
    """
    full = protocol.results.get("fp")
    if full is None:
        return ()
    figure = Published(
        metric="fid",
        value=full.fid,
        tolerance=FID_TOLERANCE,
        num_images=protocol.num_images,
        steps=protocol.calibration.steps,
        source="arXiv 2311.16503",
    )
    return (figure,)


# What the released code leaves in full precision, besides attention products.
EXCEPTIONS = (
    *(Rule(match=match, weights={"bits": None}) for match in FULL_PRECISION),
    *(Rule(match=match, activations={"bits": None}) for match in FULL_INPUTS),
)


def released(recipe: Recipe) -> Recipe:
    """Return a recipe with exactly the exceptions of the released code, and those of no other rule."""
    return replace(
        recipe,
        name=recipe.name.replace("tfmq", "released"),
        weights=replace(recipe.weights, embeddings=None),
        activations=replace(recipe.activations, products=False),
        rules=EXCEPTIONS,
    )


def reproduce(protocol: Protocol, bits: str) -> Recipe:
    """Return the recipe that repeats `protocol` at the bits of one published column.

    TIAR, finite set calibration of every activation and the released budget (20 000 iterations at 1e-3);
    temporal features come from the learned block, not from a table, which the later publication added.
    What stays in full precision is what the released code leaves there.
    """
    weight, activation = BITS[bits]
    return Recipe(
        name=f"{protocol.name}_{bits}",
        weights=Weights(bits=weight, embeddings=None),
        activations=Activations(
            bits=activation, products=False, per_step="none" if activation is None else "all"
        ),
        temporal=Temporal(maintenance="block", learning=Learning()),
        learning=Learning(),
        calibration=protocol.calibration,
        rules=EXCEPTIONS,
        published=published(protocol),
    )


PAPER: dict[str, Callable[[], Recipe]] = {
    f"{protocol.name}_{bits}": (lambda protocol=protocol, bits=bits: reproduce(protocol, bits))  # type: ignore[misc]
    for protocol in PROTOCOLS
    for bits in BITS
}
