"""What is noted of one traced call of a model: what each tensor depends on, and the program that makes it."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tfmq.models.program import TIMESTEP, Call, LayerTrace, Program, Ref, Segments, sliced
from tfmq.numerics.trees import map_tensors, tensors_in

# Inputs with finitely many values. A computation that reads no other input can be tabulated.
FINITE = frozenset({TIMESTEP, "class_labels"})


@dataclass(frozen=True)
class Label:
    """What a tensor was computed from: inputs, temporal layers whose outputs have met no other data yet, and
    the concatenation that it carries.
    """

    sources: frozenset[str] = frozenset()
    producers: frozenset[str] = frozenset()
    segments: Segments | None = None


NOTHING = Label()


@dataclass
class Record:
    """One call as it is traced: labels and places of its tensors, the calls so far, and what layers are like.

    `spatial` are the inputs with positions; whatever depends on one of them is no part of a program.
    `owners` are the modules that run now, `inside` counts those among them that are single calls.
    """

    spatial: frozenset[str]
    labels: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    refs: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    calls: list[Call | None] = field(default_factory=list)
    layers: dict[str, LayerTrace] = field(default_factory=dict)
    outputs: dict[str, Ref] = field(default_factory=dict)
    embeddings: dict[str, None] = field(default_factory=dict)
    unusual: set[str] = field(default_factory=set)
    features: dict[str, None] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    owners: list[str] = field(default_factory=list)
    inside: int = 0

    def label(self, tensor: Tensor) -> Label:
        """Return what is known of a tensor."""
        return self.labels.get(tensor, NOTHING)

    def record(self, call: Call, args: Any, kwargs: Any, output: Any, label: Label) -> None:
        """Note a call and give its outputs a label and a place in the program."""
        program_call = None
        if not label.sources & self.spatial:
            program_call = Call(
                call.function,
                call.module,
                map_tensors(self.reference, args),
                map_tensors(self.reference, kwargs),
            )
        self.calls.append(program_call)
        for leaf, tensor in enumerate(tensors_in(output)):
            self.labels[tensor] = label
            self.refs[tensor] = Ref(len(self.calls) - 1, leaf)

    def reference(self, tensor: Tensor) -> Any:
        """Return the place in the program where a tensor is made; itself where it is a constant."""
        return self.refs.get(tensor, tensor)

    def combine(self, inputs: list[Tensor]) -> Label:
        """Return the label of what is computed from `inputs`; note the temporal layers whose output meets
        other data here.
        """
        labels = [self.label(tensor) for tensor in inputs]
        sources = frozenset().union(*(label.sources for label in labels))
        producers = frozenset().union(*(label.producers for label in labels))
        for label in labels:
            leaves_finite = label.sources <= FINITE and not sources <= FINITE
            meets_positions = not label.sources & self.spatial and sources & self.spatial
            if leaves_finite or meets_positions:
                self.features.update(dict.fromkeys(sorted(label.producers)))
                producers -= label.producers
        return Label(sources, producers)

    def program(self, names: Collection[str]) -> Program:
        """Return the program that makes the outputs of those submodules among `names` that were called."""
        return sliced(self.calls, {name: ref for name, ref in self.outputs.items() if name in names})
