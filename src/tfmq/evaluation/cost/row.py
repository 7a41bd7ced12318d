"""One line of a cost table."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What one variant costs at one batch size.

    Args:
        backend: name of the variant.
        model: what was measured.
        scheme: the recipe behind a variant of tfmq; None for the others.
        batch: rows of one denoiser call (a pipeline with guidance makes two an image).
        ms_per_step: median over the kept rounds of the time of one denoiser call.
        speedup: time of eager float32 torch in the same rounds over `ms_per_step`.
        images_per_second: rate of a full sampling run, from `ms_per_step` and the pipeline's own time around
            the calls.
        sqnr_db: mean over calls of the output's SQNR against the original; None for the original itself, or
            where there is no original.
        load_s: seconds from the start of a fresh process until it can compute a step, with what a library
            quantizes or compiles by then.
        compile_s: seconds of the first step after that.
        restart_s: both in a warm start: a later process finds on disk what the first one converted or
            compiled.
        peak_rss_bytes: peak memory of the warm start, to the second step; `first_peak_rss_bytes` is that of
            the cold start.
        baseline_rss_bytes: memory of the warm start after imports, before the model is loaded.
        disk_bytes: size of the stored model, or of the state dict's tensors for a library that quantizes when
            it loads.
        rounds: rounds behind the median; `rounds_dropped` showed foreign work on the processors.
        clean: whether foreign work was absent from the kept rounds; otherwise too few were, and the least
            loaded ones were kept.
    """

    backend: str
    model: str
    scheme: str | None
    batch: int
    ms_per_step: float
    speedup: float
    images_per_second: float
    sqnr_db: float | None
    load_s: float
    compile_s: float
    restart_s: float
    peak_rss_bytes: int
    first_peak_rss_bytes: int
    baseline_rss_bytes: int
    disk_bytes: int
    rounds: int
    rounds_dropped: int
    clean: bool
