"""The page, made with Gradio; the only file that knows it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfmq.artifact import PIPELINE_FILE, holds_quantized, stored_manifest
from tfmq.backends.backend import Options
from tfmq.errors import require
from tfmq.report.pictures import enlarged
from tfmq.report.summary import megabytes
from tfmq.storage.atomic import read_json
from tfmq.storage.checkpoint import verify_architecture
from tfmq.storage.directory import CONFIG_FILE, components
from tfmq.storage.errors import CheckpointError
from tfmq.studio.origin import OwnPageOnly
from tfmq.studio.side import Drawn, Side, Wish
from tfmq.targets import known_names, named_directory

LOOPBACK = "127.0.0.1"
# Width in pixels that tiny images are enlarged to.
WIDTH = 512
# Denoising steps that the page offers for a model whose own number is not known.
STEPS = 50
# The model that the page opens with, and what it draws at first.
TEXT, PROMPT = "text", "a bold red seven on a blue ground"
# Fonts of the system: the usual theme fetches its own from elsewhere.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def find_models(folder: Path, *, depth: int = 2) -> list[str]:
    """Return the quantized models in a folder and, down to `depth`, in the folders below it."""
    if holds_quantized(folder):
        return [str(folder)]
    below = (
        sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if depth
        else []
    )
    return [model for path in below for model in find_models(path, depth=depth - 1)]


def figures(drawn: Drawn) -> str:
    """Return what is said below an image."""
    backend = f", backend {drawn.backend}" if drawn.backend else ""
    lines = [
        f"{drawn.seconds:.2f} s, {megabytes(drawn.memory_bytes)} of memory at most{backend}",
        *drawn.warnings,
    ]
    return "\n\n".join(lines)


def steps_of(model: str | None) -> int:
    """Return the number of steps that a model was calibrated on, as far as that is known."""
    if not model or not holds_quantized(Path(model)):
        return STEPS
    return stored_manifest(Path(model)).provenance.steps or STEPS


def _classes(pipeline: Path) -> dict[str, Any]:
    """Return the classes of a pipeline and of its components."""
    return {
        name: value
        for name, value in read_json(pipeline / PIPELINE_FILE).items()
        if name == "_class_name" or not name.startswith("_")
    }


def _made_from(model: Path, original: Path) -> bool:
    """Whether a quantized pipeline has the classes of `original`, and its quantized components seal the
    configurations of those there.
    """
    try:
        for folder, manifest in components(model).items():
            path = original / folder.relative_to(model) / CONFIG_FILE
            verify_architecture(read_json(path), manifest.values, source=path)
        return _classes(model) == _classes(original)
    except CheckpointError:
        return False


def original_of(model: str | None) -> str:
    """Return the name of the model of the project that `model` was made from, as far as its configuration
    tells; else the first to show.
    """
    names = known_names()
    if model and holds_quantized(Path(model)):
        folders = ((name, named_directory(name)) for name in names)
        if found := next(
            (name for name, folder in folders if folder is not None and _made_from(Path(model), folder)), None
        ):
            return found
    return TEXT if TEXT in names else "default"


def _side(gradio: Any, title: str) -> tuple[Any, Any]:
    """Place a column for what one model draws, and return the image and the figures below it."""
    with gradio.Column():
        image = gradio.Image(label=title, interactive=False, format="png", buttons=[], elem_classes="drawn")
        return image, gradio.Markdown(min_height=24)


class Studio:
    """What the page does.

    Args:
        models: the quantized models to choose from.
        reference: the original, as it is chosen at first; None is that of the first quantized model.
        backend: what the quantized model computes with.
        device: device that both models run on.
        options: options of the quantized model's backend.
    """

    def __init__(
        self,
        models: Sequence[str],
        reference: str | None = None,
        *,
        backend: str = "auto",
        device: str | None = None,
        options: Options | None = None,
    ) -> None:
        self.models = list(models)
        self.reference = reference or original_of(self.models[0] if self.models else None)
        quantized = Side(backend=backend, device=device, options=options)
        self.sides = {"reference": Side(device=device), "quantized": quantized}

    def draw(
        self, quantized: str, reference: str, prompt: str, label: float, seed: float, steps: float
    ) -> Iterator[tuple[Any, str, Any, str]]:
        """Yield image and figures of both sides, one after the other: drawn together, each would take the
        other's time.
        """
        gradio = require("gradio", extra="studio")
        wish = Wish(prompt=prompt.strip(), label=int(label), seed=int(seed), steps=int(steps))
        shown: list[Any] = [None, "drawing ...", None, ""]
        for place, (side, model) in enumerate((("reference", reference), ("quantized", quantized))):
            if not model:
                raise gradio.Error(f"Choose a {side} model first.", print_exception=False)
            shown[2 * place + 1] = "drawing ..."
            yield tuple(shown)
            try:
                drawn = self.sides[side].draw(model, wish)
            except (ValueError, RuntimeError, OSError, ImportError) as error:
                raise gradio.Error(f"{model}: {error}", print_exception=False) from error
            image = enlarged(drawn.image[None], width=WIDTH)[0]
            shown[2 * place : 2 * place + 2] = (
                image.repeat(3, axis=-1) if image.shape[-1] == 1 else image,
                figures(drawn),
            )
        yield tuple(shown)

    def page(self) -> Any:
        """Return the Gradio page.

        Raises:
            MissingExtraError: Gradio is not installed.
        """
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        gradio = require("gradio", extra="studio")
        with gradio.Blocks(title="tfmq studio", analytics_enabled=False) as page:
            gradio.Markdown("# tfmq studio\nThe same noise through a quantized model and its original.")
            with gradio.Row():
                chosen = self.models[0] if self.models else None
                quantized = gradio.Dropdown(
                    self.models, value=chosen, allow_custom_value=True, label="Quantized model"
                )
                originals = list(dict.fromkeys((self.reference, *known_names())))
                reference = gradio.Dropdown(
                    originals, value=self.reference, allow_custom_value=True, label="Reference"
                )
            with gradio.Row():
                prompt = gradio.Textbox(PROMPT, label="Prompt", info="for text-to-image models", scale=3)
                label = gradio.Number(
                    0, label="Class", info="for class-conditional models", precision=0, minimum=0
                )
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
                steps = gradio.Slider(1, 250, value=steps_of(chosen), step=1, label="Steps", scale=2)
            button = gradio.Button("Draw", variant="primary")
            with gradio.Row():
                outputs = [*_side(gradio, "Full precision"), *_side(gradio, "Quantized")]
            quantized.change(steps_of, quantized, steps)
            button.click(
                self.draw, [quantized, reference, prompt, label, seed, steps], outputs, concurrency_limit=1
            )
        return page

    def launch(self, *, port: int | None = None) -> Any:
        """Start the page on this machine alone, and return it with its `local_url`; `port` None is the first
        free one from 7860.

        Raises:
            ValueError: the port is taken, or all that are tried are.
        """
        page = self.page()
        theme = require("gradio", extra="studio").themes.Default(**FONTS)
        # Do without a Node server in front, which would send a Host header of its own.
        local = {"server_name": LOOPBACK, "server_port": port, "share": False, "ssr_mode": False}
        guard = {"middleware": [require("starlette.middleware", extra="studio").Middleware(OwnPageOnly)]}
        try:
            page.launch(
                **local,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                footer_links=[],
                theme=theme,
                app_kwargs=guard,
            )
        except OSError as error:
            raise ValueError(
                f"port {port or '7860 and those after it'} of {LOOPBACK} "
                "is taken; name a free one with --port"
            ) from error
        return page

    def serve(self, *, port: int | None = None, opened: Callable[[str], None]) -> None:
        """Start the page, tell `opened` its address, and wait for Ctrl-C, which passes on as
        `KeyboardInterrupt` once all processes have ended.

        Raises:
            ValueError: see `launch`.
        """
        page = self.launch(port=port)
        try:
            opened(page.local_url)
            while True:
                # Gradio's own way to wait would swallow the interruption.
                time.sleep(1)
        finally:
            self.close()
            page.close(verbose=False)

    def close(self) -> None:
        """End the models' processes, also those that are drawing."""
        for side in self.sides.values():
            side.close()
