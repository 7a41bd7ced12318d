"""Find the fastest of several ways to compute by timing some calls of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from tfmq.stopwatch import call_seconds

# Seconds that all timed calls together may take. What engines need to prepare comes on top.
SECONDS = 4.0
# A backend that takes this many times as long as the fastest one drops out.
FAR = 2.0
# Number of rounds in which the backends take turns, and timed calls of each backend in a round.
ROUNDS, CALLS = 5, 3
# Backends whose times differ by less than this share count as equally fast.
MARGIN = 0.05


@dataclass
class Race:
    """Seconds of a call by name, and what those said that could not run it."""

    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, RuntimeError] = field(default_factory=dict)


def race(
    names: Sequence[str], enter: Callable[[str], Callable[[], object]], leave: Callable[[str], object]
) -> Race:
    """Return the median seconds of a call by each of `names`.

    Each is called by itself first: once untimed, which prepares it, and then as often as a fraction of the
    time allows. One that is far behind leaves, so that its memory is free before the next one comes. The rest
    take turns, so that other load on the machine slows all of them.

    Args:
        names: names of the ways, in the order in which they are prepared. The first one is the baseline: an
            error of it passes on, while any other that fails is out.
        enter: gets one ready, and returns a call of it.
        leave: lets one go.
    """
    result, samples = Race(), dict[str, list[float]]()
    for name in names:
        try:
            run = enter(name)
            run()
            samples[name] = _some(run, SECONDS / (4 * len(names)))
        except RuntimeError as error:
            if name == names[0]:
                raise
            result.failed[name] = error
            leave(name)
            continue
        result.seconds[name] = median(samples[name])
        best = min(result.seconds.values())
        for far in [other for other in samples if result.seconds[other] > FAR * best]:
            leave(far)
            del samples[far]
    spent = sum(map(sum, samples.values()))
    for _ in range(ROUNDS if len(samples) > 1 else 0):
        if spent > SECONDS:
            break
        for name, times in samples.items():
            run = enter(name)
            # The backend before has filled the caches with its own weights, so this call does not count.
            spent += call_seconds(run)
            new = [call_seconds(run) for _ in range(CALLS)]
            times += new
            spent += sum(new)
    return Race({**result.seconds, **{name: median(times) for name, times in samples.items()}}, result.failed)


def _some(run: Callable[[], object], seconds: float) -> list[float]:
    times = [call_seconds(run)]
    while len(times) < CALLS and sum(times) < seconds:
        times.append(call_seconds(run))
    return times


def ranked(seconds: dict[str, float], baseline: str, held: str | None = None) -> tuple[str, ...]:
    """Return who computes, who does where that one fails, and so on up to the baseline.

    The baseline is preferred to who is hardly faster, and otherwise the one that is `held` already, so that
    nobody is prepared for nothing.

    >>> ranked({"float": 3.1, "torch": 43.6, "openvino": 1.4}, "float")
    ('openvino', 'float')
    >>> ranked({"float": 3.1, "openvino": 3.0}, "float")
    ('float',)
    >>> ranked({"float": 3.1, "torch": 2.0, "openvino": 1.95}, "float", "torch")
    ('torch', 'openvino', 'float')
    """
    order = sorted(seconds, key=lambda name: seconds[name])
    enough = (1 + MARGIN) * seconds[order[0]]
    first = next((name for name in (baseline, held) if name in seconds and seconds[name] <= enough), order[0])
    if first == baseline:
        return (baseline,)
    faster = [name for name in order if name != first and seconds[name] < seconds.get(baseline, float("inf"))]
    return (first, *faster, baseline)
