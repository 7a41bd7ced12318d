"""Quantized models on disk: a diffusers pipeline directory, or a bare checkpoint for a module that diffusers
does not know.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tfmq.backends.backend import Options
from tfmq.backends.execution import AUTO, execute
from tfmq.nn.structure import assemble, describe
from tfmq.storage.atomic import full_disk_named, read_json, write_json
from tfmq.storage.checkpoint import MANIFEST_FILE, load_checkpoint, save_checkpoint, seal
from tfmq.storage.digest import remember_digest
from tfmq.storage.directory import (
    PIPELINE_FILE,
    REPORT_FILE,
    check_files,
    components,
    holds_quantized,
    relist,
    stored_bytes,
    stored_manifest,
    verified,
    verify_files,
)
from tfmq.storage.errors import ForeignFileError, MissingFileError
from tfmq.storage.fit import check_parts
from tfmq.storage.listing import FILES, write_listing
from tfmq.storage.manifest import Manifest

__all__ = [
    "PIPELINE_FILE",
    "REPORT_FILE",
    "check_quantizable",
    "holds_quantized",
    "load",
    "mark",
    "relist",
    "remark",
    "save",
    "stored_architecture",
    "stored_bytes",
    "stored_manifest",
    "stored_state",
    "verify_files",
]


def check_quantizable(module: nn.Module) -> None:
    """Raise `ValueError` for a diffusers model whose quantized form could not be loaded again; any other
    module passes.
    """
    if "diffusers" in sys.modules:
        from tfmq.integrations.diffusers.adapters import check_fused

        check_fused(module)


def stored_architecture(module: nn.Module) -> Mapping[str, Any]:
    """Return what a model of diffusers or transformers saves of its architecture, for its manifest to seal;
    nothing of any other module.
    """
    if "diffusers" not in sys.modules:
        return {}
    from tfmq.integrations.diffusers.architecture import configuration

    return configuration(module) or (text.configuration(module) if (text := _text()) else {})


def stored_state(module: nn.Module) -> Mapping[str, Tensor]:
    """Return the tensors of a module as they are saved: a text encoder leaves out tied ones."""
    text = _text()
    return text.stored_state(module) if text and text.reads_text(module) else module.state_dict()


def _text() -> ModuleType | None:
    """Return what knows of transformers, where a model of it may be loaded."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from tfmq.integrations import text

    return text


def mark(module: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Make a model of diffusers or transformers that was quantized in memory save with its manifest; any
    other module is left alone.
    """
    if text := _text():
        text.mark_quantized(module, manifest)
    if "diffusers" in sys.modules:
        from tfmq.integrations.diffusers.quantizer import mark_quantized

        mark_quantized(module, manifest)


def remark(module: nn.Module, **provenance: Any) -> None:
    """Seal a quantized diffusers model again after its tables changed, with more `provenance`; any other
    module is left alone.
    """
    if "diffusers" not in sys.modules:
        return
    from tfmq.integrations.diffusers.architecture import manifest_of

    manifest = manifest_of(module)
    if manifest is not None:
        fields = {
            **manifest,
            "structure": describe(module),
            "provenance": {**manifest["provenance"], **provenance},
        }
        mark(module, seal(module.state_dict(), fields, table=False))


def _forget_origin(directory: Path) -> None:
    """Drop the path that diffusers notes in every configuration: where a model came from must not change the
    bytes of the result.
    """
    for path in sorted(directory.rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _take_place(partial: Path, directory: Path) -> None:
    """Give a finished directory its name, which an empty one may have."""
    try:
        partial.replace(directory)
    except OSError:
        # Windows renames nothing to a name that is taken. One that holds something stays, with the error.
        if not directory.is_dir() or any(directory.iterdir()):
            raise
        directory.rmdir()
        partial.replace(directory)


def save(
    owner: Any, directory: Path, *, manifest: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write a quantized pipeline, diffusers model or plain module to `directory`, which appears complete or
    not at all.

    Args:
        owner: what has `save_pretrained`, or an `nn.Module` without it.
        directory: must not exist, or be empty.
        manifest: the sealed manifest.
        extra: further JSON files by name, which a pipeline's list has too; that of `REPORT_FILE` gets the
            digest of the list instead, so that a list cannot go missing.

    Raises:
        StorageFullError: no space is left; nothing is kept of the attempt.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(partial):
            if hasattr(owner, "save_pretrained"):
                owner.save_pretrained(str(partial))
                _forget_origin(partial)
            else:
                save_checkpoint(partial, owner.state_dict(), manifest)
            for name in extra.keys() - {REPORT_FILE}:
                write_json(partial / name, extra[name])
            listed = (
                {FILES: write_listing(partial, components=components(partial))}
                if (partial / PIPELINE_FILE).exists()
                else {}
            )
            if REPORT_FILE in extra:
                write_json(partial / REPORT_FILE, {**extra[REPORT_FILE], **listed})
            _take_place(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(
    directory: str | Path,
    *,
    module: nn.Module | None = None,
    backend: str = AUTO,
    options: Options | None = None,
) -> Any:
    """Load a model from a directory, ready to run: a pipeline, a diffusers component, or with `module` a bare
    checkpoint.

    What "auto", `cuda` and `operators` prepare moves with the model; what another backend prepares stays
    where the model was loaded to: after moving the model to another device, call `tfmq.execute` again.

    Args:
        directory: written by `tfmq.quantize` or `save_pretrained`.
        module: the full-precision architecture (its weights do not matter), for models that diffusers cannot
            build by itself. It is changed in place and returned.
        backend: what computes, see `tfmq.execute`. "auto" measures at the first call, and leaves a
            full-precision pipeline as it is; "simulated" is bitwise what `tfmq.quantize` left in memory.
        options: memory and compilation; see `tfmq.Options`.

    Raises:
        CheckpointError: a damaged, truncated, foreign or incomplete checkpoint.
        ValueError: the architecture does not fit; a bare checkpoint without `module`; no such backend, or the
            machine lacks what it needs.
        MissingExtraError: the backend's library is not installed.
    """
    path = Path(directory)
    loaded = _load(path, module)
    if backend != AUTO or holds_quantized(path):
        execute(loaded, backend, options=options)
    return loaded


def _load(path: Path, module: nn.Module | None) -> Any:
    if not path.is_dir():
        raise MissingFileError(f"{path} is not a directory; pass what tfmq quantize wrote")
    if (path / MANIFEST_FILE).exists() or module is not None:
        return _load_into(path, module)
    # The quantizer compares the tensors of each component with their digest when it reads them.
    check_files(path)
    if not (path / PIPELINE_FILE).exists() and not components(path):
        raise ForeignFileError(f"{path} holds no model quantized by tfmq")
    from tfmq.integrations.diffusers.saved import load_component, load_pipeline

    if (path / PIPELINE_FILE).exists():
        return load_pipeline(path)
    return load_component(path, str(read_json(path / "config.json").get("_class_name")))


def _load_into(path: Path, module: nn.Module | None) -> nn.Module:
    if module is None:
        raise ValueError(
            f"{path} is a bare checkpoint; pass the architecture: tfmq.load(directory, module=...)"
        )
    tensors, manifest = (
        _load_checkpoint(path) if (path / MANIFEST_FILE).exists() else _load_only_component(path)
    )
    assemble(module, manifest.values["structure"])
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the architecture it is loaded into: {' '.join(str(error).split())}"
        ) from error
    mark(module, manifest.values)
    module.requires_grad_(False).eval()
    remember_digest(module, manifest.digest, tensors)
    return module


def _load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Manifest]:
    # Check this first: it costs nothing and says more than a seal that does not match.
    manifest = stored_manifest(path)
    tensors, _ = load_checkpoint(path)
    check_parts(tensors, manifest.structure, source=path / MANIFEST_FILE)
    return tensors, manifest


def _load_only_component(path: Path) -> tuple[dict[str, Tensor], Manifest]:
    check_files(path)
    found = list(verified(path))
    if len(found) != 1:
        raise ForeignFileError(
            f"{path} holds {len(found)} models quantized by tfmq; pass the directory of one"
        )
    return found[0]
