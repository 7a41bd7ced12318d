"""The choice "auto": made at the first call of a kind, by a measurement of every candidate, and remembered on
disk.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.backends.backend import BACKENDS, Options, release
from tfmq.backends.caching import model_key
from tfmq.backends.choices import Choice, ChoiceFile, machine, versions
from tfmq.backends.fallback import beside_adapters, complain, first_that_runs, in_a_line
from tfmq.backends.measuring import Race, race, ranked
from tfmq.backends.prepared import Kind, Prepared, Way, differentiates, kind_of
from tfmq.errors import MissingExtraError
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import adapted, entered_steps, plain_forward, steps_of, timestep_of
from tfmq.numerics.trees import tensors_in
from tfmq.reconstruction.resources import free_bytes
from tfmq.stopwatch import call_seconds

# Backends that are measured, by kind of device, the quickest to prepare first. The first one, torch's own
# floating point, is the baseline.
CANDIDATES = {"cpu": ("float", "torch", "openvino"), "cuda": ("float", "cuda")}
ELSEWHERE = ("float",)
# Replaces "float" where the quality of the quantized model is judged: "float" does not quantize the inputs of
# layers.
JUDGED = "simulated"
# Bytes of memory for each weight that a backend of the CPU needs while it prepares.
BYTES = {"float": 4, JUDGED: 4, "torch": 2, "openvino": 10}
# Seconds. A longer call is measured on one row of its batch.
LONG = 2.0

# Backends that take so long to prepare that the log says so.
CONVERTING = ("openvino",)

log = logging.getLogger("tfmq")


def _device(arguments: Mapping[str, Any]) -> torch.device:
    return _sample(arguments).device


def _sample(arguments: Mapping[str, Any]) -> Tensor:
    """Return the first tensor of several axes, as `tfmq.export.capture.Call` does."""
    return next(tensor for tensor in tensors_in(dict(arguments)) if tensor.ndim > 1)


def _lack(module: nn.Module, name: str, options: Options) -> str:
    """Return what memory a candidate lacks, in words, or nothing."""
    each = 0 if options.weights == "packed" and name in ("float", JUDGED) else BYTES.get(name, 0)
    needed, free = (
        each * sum(math.prod(layer.shape) for layer in packed_layers(module).values()),
        free_bytes(),
    )
    return (
        ""
        if free is None or needed <= free
        else f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    )


def candidates(
    module: nn.Module, device: torch.device, options: Options, *, judged: bool
) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the ways to measure by name, the baseline first, and why others are not tried that could be."""
    ways: dict[str, Way] = {}
    untried: dict[str, str] = {}
    baseline, *others = CANDIDATES.get(device.type, ELSEWHERE)
    baseline, eager = JUDGED if judged else baseline, replace(options, compile=False)
    if lack := _lack(module, baseline, options) if device.type == "cpu" else "":
        if not judged:
            untried[baseline] = lack
        baseline, eager = JUDGED, replace(eager, weights="packed")
    ways[baseline] = Way(baseline, eager)
    for name in others:
        try:
            # Say nothing of what this machine cannot have: no installation would change that.
            if BACKENDS[name].missing():
                continue
        except MissingExtraError as error:
            untried[name] = str(error)
            continue
        if lack := _lack(module, name, options) if device.type == "cpu" else "":
            untried[name] = lack
        else:
            ways[name] = Way(name, options)
    return ways, untried


class AutoExecutor:
    """Computes each kind of call by what was the fastest for it.

    A call that gradients are asked of is simulated, and so is what somebody watches layer by layer before a
    choice was made. With `judged` every candidate computes the quantized model, so that who measures its
    quality does not measure another one's.
    """

    def __init__(self, options: Options, *, judged: bool = False) -> None:
        self.options = options
        self.judged = judged
        self.prepared = Prepared()
        self.key: str | None = None
        self.ways: dict[Kind, tuple[Way, ...]] = {}
        # What computes beside adapters, by device. It is not measured.
        self.beside: dict[torch.device, tuple[Way, ...]] = {}

    def __call__(self, module: nn.Module, arguments: Mapping[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return plain_forward(module, arguments)
        if adapted(module):
            return beside_adapters(self.prepared, module, self._beside(module, arguments), arguments)
        kind = kind_of(arguments)
        if differentiates(module, arguments) or (kind not in self.ways and _watched(module)):
            return self.prepared.run(module, Way(JUDGED, replace(self.options, compile=False)), arguments)
        if kind not in self.ways:
            self.ways[kind] = self._choose(module, kind, arguments)
            self.prepared.keep(module, [ways[0] for ways in self.ways.values()])
        output, self.ways[kind] = first_that_runs(self.prepared, module, self.ways[kind], arguments)
        return output

    def _beside(self, module: nn.Module, arguments: Mapping[str, Any]) -> tuple[Way, ...]:
        """Return what may compute beside adapters, the likely fastest first."""
        device = _device(arguments)
        if device not in self.beside:
            known, _ = candidates(module, device, self.options, judged=self.judged)
            # The last one is as a rule the fastest; the model in floating point is no quantized one.
            simulated = Way(JUDGED, replace(self.options, compile=False))
            self.beside[device] = (*(known[name] for name in reversed(known) if name != "float"), simulated)
        return self.beside[device]

    def _choose(self, module: nn.Module, kind: Kind, arguments: Mapping[str, Any]) -> tuple[Way, ...]:
        ways, untried = candidates(module, _device(arguments), self.options, judged=self.judged)
        subject = f"{type(module).__name__} at batch {len(_sample(arguments))}"
        baseline, *others = ways
        if not others:
            log.info(
                "%s",
                " ".join(
                    [f"auto: {baseline} computes {subject}; nothing else is there to try", *_said(untried)]
                ),
            )
            return (ways[baseline],)
        choice, origin, failed = self._measured(module, kind, ways, arguments)
        current = self.prepared.current
        order = ranked(dict(choice.milliseconds), baseline, current.backend if current else None)
        for name, error in failed.items():
            complain(ways[name], error, ways[order[0]], stacklevel=5)
        log.info("%s", _chosen(subject, order[0], choice, origin, untried))
        return tuple(ways[name] for name in order)

    def _measured(
        self, module: nn.Module, kind: Kind, ways: Mapping[str, Way], arguments: Mapping[str, Any]
    ) -> tuple[Choice, str, Mapping[str, Exception]]:
        """Return what the ways took, before or now, where that is from in words, and what failed now."""
        stored = self._stored(module, kind, ways, _device(arguments))
        known = stored.read(tuple(ways)) if stored else None
        if stored and known:
            return known, f"measured before ({stored.path})", {}
        found, rows = self._race(module, ways, arguments)
        failed = {name: in_a_line(error) for name, error in found.failed.items()}
        choice = Choice({name: 1e3 * seconds for name, seconds in found.seconds.items()}, failed)
        if stored:
            stored.write(choice)
        count = len(_sample(arguments))
        return choice, f"measured on {rows} of {count} rows" if rows < count else "", found.failed

    def _stored(
        self, module: nn.Module, kind: Kind, ways: Mapping[str, Way], device: torch.device
    ) -> ChoiceFile | None:
        """Return where the choice is kept; nowhere for a model whose values are elsewhere, as while it is
        offloaded.
        """
        try:
            self.key = self.key or model_key(module)
        except (ValueError, NotImplementedError):
            return None
        setting = {"threads": torch.get_num_threads(), "options": self.options, "candidates": list(ways)}
        return ChoiceFile(
            {
                "model": self.key,
                "kind": kind,
                "machine": machine(device),
                **setting,
                **versions(tuple(ways)),
            }
        )

    def _race(
        self, module: nn.Module, ways: Mapping[str, Way], arguments: Mapping[str, Any]
    ) -> tuple[Race, int]:
        """Measure; return the number of rows that were computed, too."""
        device, given, entered = _device(arguments), arguments, set[str]()

        def call(way: Way) -> None:
            self.prepared.run(module, way, given)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        def enter(name: str) -> Any:
            if name in CONVERTING and name not in entered:
                log.info(
                    "auto: preparing %s for %s; the first time may take minutes",
                    name,
                    type(module).__name__,
                    extra={"waiting": True},
                )
            entered.add(name)
            self.prepared.use(module, ways[name])
            return lambda: call(ways[name])

        def leave(name: str) -> None:
            self.prepared.drop(module, ways[name])

        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            given = self._affordable(module, next(iter(ways.values())), arguments)
            with entered_steps(module, given):
                return race(tuple(ways), enter, leave), len(_sample(given))

    def _affordable(
        self, module: nn.Module, baseline: Way, arguments: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the call, or its first row where the whole would take long."""
        sample = _sample(arguments)
        if len(sample) == 1:
            return arguments
        # One timestep serves a batch or each sample has one: the first is that of the first row.
        timestep = timestep_of(module, arguments)
        row: Mapping[str, Any] = (
            Inputs(sample, sample.new_zeros(len(sample)), {"row": dict(arguments)})
            .rows(0, 1)
            .conditions["row"]
        )
        steps = steps_of(module)
        try:
            with steps.first() if timestep is None else steps.at(timestep.flatten()[:1]):
                self.prepared.run(module, baseline, row)
                seconds = call_seconds(lambda: self.prepared.run(module, baseline, row))
        except (RuntimeError, ValueError):
            # Some argument has no row for each sample, so the batch cannot be cut.
            return arguments
        return row if seconds * len(sample) > LONG else arguments


def _watched(module: nn.Module) -> bool:
    """Whether somebody looks at the calls of layers: they would see those of the measurement, and none of an
    engine.
    """
    return any(
        child._forward_hooks or child._forward_pre_hooks for child in module.modules() if child is not module
    )


def _said(untried: Mapping[str, str]) -> list[str]:
    return [f"({name} was not tried: {reason})" for name, reason in untried.items()]


def _chosen(subject: str, name: str, choice: Choice, origin: str, untried: Mapping[str, str]) -> str:
    """Return the line that says what was chosen, why, and what to install for more."""
    times = choice.milliseconds
    others = ", ".join(
        f"{other} {times[other]:.1f}"
        for other in sorted(times, key=lambda other: times[other])
        if other != name
    )
    parts = [
        f"{times[name]:.1f} ms a call",
        *([f"against {others}"] if others else []),
        *([origin] if origin else []),
    ]
    parts += [f"{other} failed: {text}" for other, text in choice.failed.items()]
    return " ".join([f"auto: {name} computes {subject}: {'; '.join(parts)}", *_said(untried)])


def decide(denoiser: Denoiser, inputs: Inputs, options: Options, *, judged: bool) -> str:
    """Return the backend that is chosen for calls like `inputs`, at a timestep that was calibrated; the
    simulation is in place afterwards.
    """
    module = denoiser.module
    known = steps_of(module).timesteps
    timestep = known[len(known) // 2].to(inputs.timestep).expand(len(inputs))
    executor = AutoExecutor(options, judged=judged)
    release(module)
    module.tfmq_executor = executor  # type: ignore[assignment]
    try:
        with torch.no_grad():
            denoiser(Inputs(inputs.sample, timestep, inputs.conditions))
        assert executor.prepared.current is not None
        return executor.prepared.current.backend
    finally:
        release(module)
