"""Any diffusers pipeline as a sampler."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tfmq.integrations.diffusers.precision import component_modules
from tfmq.integrations.diffusers.spacing import spaced
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import image_generator
from tfmq.nn.swap import is_quantized
from tfmq.nn.watch import ModuleCall, watched

# Where a pipeline has more than one module that takes a timestep (ControlNets), these are the denoiser.
COMPONENTS = ("unet", "transformer", "prior")

DEFAULT_PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "a bowl of oranges on a wooden table, morning light",
    "an old lighthouse on a cliff during a storm",
    "a watercolour painting of a fox in the snow",
    "a crowded street market at night, neon signs",
    "a glass of water with a lemon slice, macro photograph",
    "portrait of an elderly fisherman, black and white",
    "a small wooden cabin beside a mountain lake",
    "a robot reading a newspaper in a cafe",
    "an astronaut riding a horse through a desert",
    "a pile of colourful knitted sweaters",
    "aerial view of a river delta at sunset",
    "a grey cat asleep on a stack of books",
    "a bowl of ramen with egg and spring onions",
    "a yellow tram climbing a steep street",
    "an oil painting of sunflowers in a blue vase",
)


# Options that are no argument of a pipeline's call.
SPACING = "spacing"


class _Reached(Exception):
    """Ends a pipeline call at its first denoiser call."""


def find_denoisers(pipeline: DiffusionPipeline) -> dict[str, Denoiser]:
    """Return every component whose `forward` takes a sample and a timestep, by name, the one that is
    quantized by default first.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for name, component in component_modules(pipeline).items():
        try:
            found[name] = Denoiser(component)
        except TypeError:
            continue
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no component that takes a sample and "
            f"a timestep; it has {', '.join(pipeline.components)}"
        )
    order = sorted(found, key=lambda name: (*COMPONENTS, name).index(name))
    return {name: found[name] for name in order}


def accepted_options(pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `options` that the pipeline's call has an argument for; warn about the others."""
    parameters = inspect.signature(pipeline.__call__).parameters
    known = parameters.keys() | {SPACING}
    for name in options.keys() - known:
        warnings.warn(f"{name} has no effect: {type(pipeline).__name__} takes none", stacklevel=3)
    return {name: value for name, value in options.items() if name in known}


@contextmanager
def _noted_decoding(component: Any, noted: list[Tensor]) -> Iterator[None]:
    """Append the first argument of every call of `component.decode` while the context is open."""
    decode = component.decode

    def note(latent: Tensor, *args: Any, **kwargs: Any) -> Any:
        noted.append(latent.detach().clone())
        return decode(latent, *args, **kwargs)

    component.decode = note
    try:
        yield
    finally:
        del component.decode


def _keep_class_names(pipeline: DiffusionPipeline) -> None:
    """Let a pipeline save the names of its classes, as the published DiT pipelines have them: `DiTPipeline`
    reads them from its configuration, and does not keep them there.
    """
    names: dict[str, int] = getattr(pipeline, "labels", None) or {}
    if names and pipeline.config.get("id2label") is None:
        found: dict[str, str] = {}
        for name, index in names.items():
            found[str(index)] = f"{found[str(index)]}, {name}" if str(index) in found else name
        pipeline.register_to_config(id2label=found)


class PipelineSampler:
    """Draws images with a pipeline; see `tfmq.models.sampler.Sampler`.

    Args:
        pipeline: unconditional, class-conditional (`class_labels`) or text-to-image (`prompt`).
        prompts: used in turn by text-to-image pipelines.
        options: further arguments of the pipeline's call, such as `guidance_scale` or `eta`; and `spacing` of
            the timesteps, see `spaced`.
        labels: classes that class-conditional pipelines draw in turn; by default they are spread over all
            there are.
        component: name of the denoiser, for pipelines that call two in turn; by default `unet`, `transformer`
            or what else there is.

    Raises:
        ValueError: the pipeline has no denoiser, or none of that name.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        prompts: tuple[str, ...] = DEFAULT_PROMPTS,
        options: dict[str, Any] | None = None,
        labels: tuple[int, ...] = (),
        component: str | None = None,
    ) -> None:
        self.pipeline = pipeline
        found = find_denoisers(pipeline)
        if component is not None and component not in found:
            raise ValueError(
                f"{type(pipeline).__name__} has no denoiser {component}; it has {', '.join(found)}"
            )
        self.component = component or next(iter(found))
        self.denoiser = found[self.component]
        self._chosen = component is not None
        self.prompts = prompts
        self.options = dict(options or {})
        self.labels = labels
        self.spacing = self.options.pop(SPACING, None)
        pipeline.set_progress_bar_config(disable=True)
        _keep_class_names(pipeline)

    @property
    def takes_prompts(self) -> bool:
        """Whether the pipeline draws from text."""
        return "prompt" in inspect.signature(self.pipeline.__call__).parameters

    @property
    def others(self) -> tuple[str, ...]:
        """Names of further full-precision denoisers that the pipeline calls in turn with this one; none where
        this one was chosen by name.
        """
        found = () if self._chosen else find_denoisers(self.pipeline).items()
        return tuple(
            n
            for n, other in found
            if n != self.component and not n.startswith("controlnet") and not is_quantized(other.module)
        )

    def prompts_of(self, indices: range) -> list[str]:
        """Return the texts that a text-to-image pipeline draws these images from."""
        return [self.prompts[index % len(self.prompts)] for index in indices]

    @property
    def class_names(self) -> dict[int, str]:
        """Names of the classes that a class-conditional pipeline draws, where it gives them
        (`DiTPipeline.labels`).
        """
        return {index: name for name, index in (getattr(self.pipeline, "labels", None) or {}).items()}

    def _classes(self, indices: range) -> list[int]:
        """Return the class of each image, the same for an image whatever its batch.

        Raises:
            ValueError: a label that the model does not have.
        """
        named = sorted(self.class_names)
        count = (
            getattr(self.pipeline, "num_classes", None)
            or getattr(self.denoiser.module.config, "num_embeds_ada_norm", None)
            or 1000
        )
        if self.labels:
            if max(self.labels) >= count:
                raise ValueError(
                    f"there is no class {max(self.labels)}: the model has the classes 0 to {count - 1}"
                )
            return [self.labels[index % len(self.labels)] for index in indices]
        # Spread the images over the named classes: other rows of the table no training has seen.
        return [named[index * 367 % len(named)] if named else index * 367 % count for index in indices]

    def asked(self, indices: range) -> list[str] | None:
        """Return what these images are asked to show: their prompts, or the names of their classes; None
        where there are none.
        """
        if self.takes_prompts:
            return self.prompts_of(indices)
        names = self.class_names
        return [names[index] for index in self._classes(indices)] if names else None

    def _content(self, indices: range) -> dict[str, Any]:
        parameters = inspect.signature(self.pipeline.__call__).parameters
        if self.takes_prompts:
            return {"prompt": self.prompts_of(indices)}
        if "class_labels" in parameters:
            return {"class_labels": self._classes(indices)}
        return {"batch_size": len(indices)}

    @torch.no_grad()
    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Draw images `[N, C, H, W]` in [0, 1]; see `Sampler`."""
        generators = [image_generator(seed, index) for index in indices]
        with spaced(self.pipeline, self.spacing):
            output = self.pipeline(
                **self._content(indices),
                generator=generators,
                num_inference_steps=steps,
                output_type="np",
                **self.options,
            )
        if "frames" in output:
            # Show a video `[N, F, H, W, C]` as one image, its frames side by side.
            return torch.from_numpy(np.asarray(output.frames)).permute(0, 4, 2, 1, 3).flatten(3)
        return torch.from_numpy(np.asarray(output.images)).permute(0, 3, 1, 2)

    @contextmanager
    def noted_latents(self) -> Iterator[list[Tensor]]:
        """Collect what the pipeline's autoencoder decodes while the context is open; nothing where it has
        none.
        """
        noted: list[Tensor] = []
        with ExitStack() as stack:
            for component in component_modules(self.pipeline).values():
                if hasattr(component, "decode"):
                    stack.enter_context(_noted_decoding(component, noted))
            yield noted

    def describe(self) -> dict[str, Any]:
        """Return what the drawn images depend on beside the denoiser's weights; see `Sampler`."""
        scheduler = self.pipeline.scheduler
        settings = {
            "class": type(scheduler).__name__,
            **{k: repr(v) for k, v in scheduler.config.items() if not k.startswith("_")},
        }
        prompts = list(self.prompts) if self.takes_prompts else []
        options = {name: repr(value) for name, value in self.options.items()} | (
            {SPACING: self.spacing} if self.spacing else {}
        )
        described = {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": settings,
            "prompts": prompts,
            "options": options,
        }
        chosen = {"labels": list(self.labels)} if self.labels else {}
        return described | chosen | ({"component": self.component} if self._chosen else {})

    def example(self) -> Inputs:
        """Return the inputs of the denoiser's first call, one sample; the denoiser itself is not run.

        Raises:
            ValueError: the pipeline does not call it, or draws from an image and was given none.
        """
        calls: list[Inputs] = []

        def reach(call: ModuleCall) -> None:
            calls.append(self.denoiser.bind(call.args, call.kwargs))
            raise _Reached

        try:
            with watched(self.denoiser.module, before=reach):
                self.run(range(1), steps=2, seed=0)
        except _Reached:
            return calls[0].rows(0, 1)
        except (AttributeError, TypeError, ValueError) as error:
            if "image" not in inspect.signature(self.pipeline.__call__).parameters or "image" in self.options:
                raise
            lack = (
                f"{type(self.pipeline).__name__} could not be called without an "
                f"image ({str(error).strip().splitlines()[0]})"
            )
            raise ValueError(
                f"{lack}; give it one: tfmq.PipelineSampler(pipeline, options={{'image': ...}})"
            ) from error
        raise ValueError(f"{type(self.pipeline).__name__} drew an image without calling its {self.component}")
