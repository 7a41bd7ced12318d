"""Open a pipeline from a directory or the hub, whole and in float32."""

from pathlib import Path

from diffusers import DiffusionPipeline

from tfmq.integrations.diffusers.precision import component_modules, in_float32
from tfmq.integrations.diffusers.saved import absent_components


def _check_source(source: str | Path, path: Path) -> None:
    """Refuse what is neither a pipeline's directory nor looks like a hub id."""
    if path.is_dir() and not (path / "model_index.json").exists():
        raise ValueError(f"{path} is not a pipeline directory: it has no model_index.json")
    if not path.exists() and (
        path.is_absolute() or str(source).count("/") != 1 or str(source).startswith(".")
    ):
        raise ValueError(f"{source} does not exist, and is not a hub id (owner/name)")


def _check_whole(pipeline: DiffusionPipeline, source: str | Path) -> None:
    """Refuse a pipeline that lacks weights, which diffusers leaves on the meta device: a quantized model that
    lost its manifest is one.
    """
    for name, component in component_modules(pipeline).items():
        absent = [key for key, tensor in component.state_dict().items() if tensor.is_meta]
        if absent:
            raise ValueError(
                f"{source} lacks {len(absent)} tensors of {name}, such as {absent[0]}: "
                "its files are not those of its config.json; copy it again"
            )


def open_pipeline(source: str | Path) -> DiffusionPipeline:
    """Load a pipeline from a directory or a hub id, in float32.

    Raises:
        ValueError: there is no pipeline, or it lacks weights.
    """
    path = Path(source)
    _check_source(source, path)
    try:
        absent = absent_components(path) if path.is_dir() else {}
        pipeline = DiffusionPipeline.from_pretrained(str(source), **absent)
    except OSError as error:
        raise ValueError(
            f"cannot load a pipeline from {source}: {str(error).strip().splitlines()[0]}"
        ) from error
    _check_whole(pipeline, source)
    return in_float32(pipeline)


def open_file(path: Path) -> DiffusionPipeline:
    """Return the pipeline of a single file, in float32.

    Raises:
        CheckpointError: a damaged or foreign file.
        ValueError: a layout that is not known, or a part is missing.
    """
    from tfmq.integrations.diffusers.original.single_file import open_single_file

    return in_float32(open_single_file(path))
