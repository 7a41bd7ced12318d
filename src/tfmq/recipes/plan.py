"""Turn a recipe and a trace into a plan: the only place where rules meet layers."""

import warnings
from collections.abc import Mapping, Set

from tfmq.models.program import LayerTrace, Trace
from tfmq.nn.plan import Plan
from tfmq.nn.scheme import ActivationScheme, Key, LayerScheme, OperandScheme, WeightScheme
from tfmq.numerics.groups import group_widths
from tfmq.recipes.recipe import Activations, Recipe, Rule


def _roles(layer: LayerTrace, first: str, last: str) -> frozenset[str]:
    played = {
        "role:first": layer.name == first,
        "role:last": layer.name == last,
        "role:temporal": layer.temporal,
    }
    return frozenset(role for role, plays in played.items() if plays)


def _key(activations: Activations, *, temporal: bool) -> Key:
    """Return whether a quantizer has a grid for each timestep; those of the temporal block have in every
    scope but `none`.
    """
    scope = activations.per_step
    if temporal:
        return "none" if scope == "none" else "timestep"
    return "measured" if scope == "measured" else "timestep" if scope == "all" else "none"


def _activation(
    activations: Activations,
    *,
    segments: tuple[int, ...] = (),
    temporal: bool = False,
    exact: bool = False,
    tokenwise: bool = False,
    product: bool = False,
) -> ActivationScheme | None:
    """Return the scheme of a layer's input, or of both operands of a product; None in full precision."""
    grid = activations.format()
    if grid is None:
        return None
    return ActivationScheme(
        grid=grid,
        ranges="min_max" if exact else activations.ranges,
        segments=segments,
        key=_key(activations, temporal=temporal),
        shared=activations.zero_points in (("products", "shared") if product else ("shared",)),
        finite=temporal,
        tokens=activations.tokens if tokenwise and not temporal else "static",
    )


def _layer(recipe: Recipe, layer: LayerTrace, roles: frozenset[str]) -> LayerScheme | None:
    weights, activations, rescaling = recipe.scheme(layer.name, roles)
    weight = weights.format()
    if weight is None:
        return None
    segments = _segments(activations, layer)
    return LayerScheme(
        weight=WeightScheme(
            grid=weight,
            ranges=weights.ranges,
            segments=segments,
            group=weights.group,
            choices=weights.choices(),
        ),
        input=_activation(
            activations,
            segments=segments,
            temporal=layer.temporal,
            # A temporal feature takes finitely many values, so its exact extremes lose nothing to outliers
            # (TFMQ-DM, section 4.3).
            exact=layer.temporal and recipe.temporal.maintenance != "none",
            tokenwise=layer.tokenwise,
        ),
        rank=0 if layer.temporal or not recipe.branch.splitters else weights.rank,
        equalizers=() if layer.temporal else rescaling.equalizers,
        rotation=0 if layer.temporal else rescaling.rotation,
        clusters=0 if layer.temporal or not activations.bits else activations.clusters,
    )


def _segments(activations: Activations, layer: LayerTrace) -> tuple[int, ...]:
    """Return the widths of the segments of a layer's input that have scales of their own."""
    segments = activations.segments(layer.segments, direct=layer.direct)
    if not (activations.group and activations.bits and layer.tokenwise) or layer.temporal:
        return segments
    widths = group_widths(segments or (layer.channels,), activations.group)
    return widths if len(widths) > 1 else ()


def _product(activations: Activations) -> ActivationScheme | None:
    return _activation(activations, product=True) if activations.products else None


def _seeing(trace: Trace) -> list[str]:
    """Return the layers that the sample goes through, in execution order."""
    return [layer.name for layer in trace.layers if "sample" in layer.depends_on]


def last_layer(trace: Trace) -> str:
    """Return the name of the last layer that the sample goes through."""
    return _seeing(trace)[-1]


def _spares_what_it_quantizes(rule: Rule) -> bool:
    """Whether a rule gives bits to the inputs of layers that it leaves in full precision."""
    return rule.weights.get("bits", 0) is None and rule.activations.get("bits") is not None


def _check_rules(recipe: Recipe, roles: Mapping[str, frozenset[str]], owners: Set[str]) -> None:
    """Refuse a rule that matches nothing, and warn of one that changes nothing; `owners` are modules with
    products.
    """
    # The fields that the rules so far have decided on, by layer.
    said: dict[str, set[tuple[str, str]]] = {name: set() for name in roles}
    for rule in recipe.rules:
        matched = {name for name, played in roles.items() if rule.matches(name, played)}
        if not matched:
            raise ValueError(
                f"the rule {rule.match!r} of recipe {recipe.name} matches "
                "no layer; `tfmq inspect` lists their names"
            )
        if all(rule.changes <= said[name] for name in matched):
            warnings.warn(
                (
                    f"the rule {rule.match!r} of recipe {recipe.name} has no "
                    "effect: rules before it say the same of all its layers"
                ),
                stacklevel=3,
            )
        if _spares_what_it_quantizes(rule) and not matched & owners:
            warnings.warn(
                (
                    f"the rule {rule.match!r} of recipe {recipe.name} leaves its layers in full precision; "
                    "its activations.bits has no effect on their inputs"
                ),
                stacklevel=3,
            )
        for name in matched:
            said[name] |= rule.changes


def make_plan(recipe: Recipe, trace: Trace) -> Plan:
    """Return what every traced layer becomes under `recipe`.

    Raises:
        ValueError: a rule matches no layer, or nothing is left to quantize.
    """
    seeing = _seeing(trace)
    roles = {layer.name: _roles(layer, seeing[0], seeing[-1]) for layer in trace.layers}
    _check_rules(
        recipe,
        roles | dict.fromkeys((*trace.products, *trace.embeddings), frozenset()),
        frozenset(trace.products),
    )
    plans = {layer.name: _layer(recipe, layer, roles[layer.name]) for layer in trace.layers}
    layers = {name: plan for name, plan in plans.items() if plan}
    if not layers:
        raise ValueError(f"recipe {recipe.name} quantizes no layer of this model")
    products = {owner: (sites, _product(recipe.scheme(owner)[1])) for owner, sites in trace.products.items()}
    rows = {name: recipe.rows_of(name) for name in trace.embeddings}
    embeddings = {
        name: OperandScheme(grid=grid, ranges=recipe.scheme(name)[0].ranges)
        for name, grid in rows.items()
        if grid
    }
    return Plan(layers, products, embeddings)
