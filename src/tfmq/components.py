"""What of a pipeline is quantized beside its denoiser: decoders and encoders, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import Sampler

DENOISER, EVERYTHING = "denoiser", "all"
Components = str | Sequence[str]


@dataclass(frozen=True)
class Networks:
    """What of a pipeline is quantized beside its denoiser: networks by component and by name, and why other
    components that were asked for are left in floating point.
    """

    components: Mapping[str, Mapping[str, Denoiser]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, Denoiser]:
        """Return every network by name."""
        return {name: network for part in self.components.values() for name, network in part.items()}


def chosen_networks(sampler: Sampler, components: Components | None) -> Networks:
    """Return what is quantized beside the denoiser of `sampler`.

    `components` is "denoiser", "all", or names of components, the denoiser's among them under its own name or
    that one. By default pipelines that draw from text are quantized as a whole, and of others the denoiser.

    Raises:
        ValueError: the pipeline has no such component, the denoiser is not among them, or there is no
            pipeline.
    """
    named = [part.strip() for part in components.split(",")] if isinstance(components, str) else components
    if not hasattr(sampler, "pipeline"):
        if named not in (None, [DENOISER]):
            raise ValueError(f"components={components!r} are for pipelines; a sampler has a denoiser alone")
        return Networks()
    from tfmq.integrations.diffusers.networks import find_networks
    from tfmq.integrations.diffusers.pipelines import PipelineSampler, find_denoisers

    assert isinstance(sampler, PipelineSampler)
    if named is None:
        named = [EVERYTHING if sampler.takes_prompts else DENOISER]
    found, left = find_networks(sampler.pipeline, find_denoisers(sampler.pipeline))
    if EVERYTHING in named:
        return Networks(found, left)
    _check_named(named, (DENOISER, sampler.component), (*found, *left))
    return Networks(
        {name: found[name] for name in named if name in found},
        {name: left[name] for name in named if name in left},
    )


def _check_named(named: Sequence[str], denoiser: Sequence[str], others: Sequence[str]) -> None:
    """Refuse components without one of `denoiser`, or with one that is in neither list."""
    if not {*denoiser} & {*named}:
        raise ValueError(
            f"{', '.join(named)} leave out the denoiser, on whose trajectory all are calibrated; "
            f"add {denoiser[0]}"
        )
    if unknown := sorted({*named} - {*denoiser, *others}):
        raise ValueError(
            f"the pipeline has no component {unknown[0]}; choose all, or of {', '.join((*denoiser, *others))}"
        )
