"""Turn a recipe and a trace into a plan: the only place where rules meet layers."""

import warnings

from tfmq.models.program import LayerTrace, Trace
from tfmq.nn.plan import EmbeddingPlan, LayerPlan, Plan, QuantizerPlan, StepGrids
from tfmq.recipes.recipe import Recipe


def _roles(layer: LayerTrace, first: str, last: str) -> frozenset[str]:
    played = {
        "role:first": layer.name == first,
        "role:last": layer.name == last,
        "role:temporal": layer.temporal,
    }
    return frozenset(role for role, plays in played.items() if plays)


def _per_step(recipe: Recipe, *, temporal: bool) -> StepGrids:
    """Return whether a quantizer has a grid for each timestep; those of the temporal block have in every
    scope but `none`.
    """
    scope = recipe.activations.per_step
    if temporal:
        return scope != "none"
    return "measured" if scope == "measured" else scope == "all"


def _layer(recipe: Recipe, layer: LayerTrace, roles: frozenset[str]) -> LayerPlan | None:
    weight_bits, activation_bits = recipe.bits(layer.name, roles)
    weight = recipe.weights.format(weight_bits)
    if weight is None:
        return None
    activation = recipe.activations.format(activation_bits)
    temporal = layer.temporal and recipe.temporal.maintenance != "none"
    per_step = _per_step(recipe, temporal=layer.temporal)
    # A temporal feature takes finitely many values, so its exact extremes lose nothing to outliers (TFMQ-DM,
    # section 4.3).
    ranges = "min_max" if temporal else recipe.activations.ranges
    shared = recipe.activations.zero_points == "shared"
    tokens = recipe.activations.tokens if layer.tokenwise and not layer.temporal else "static"
    return LayerPlan(
        weight=weight,
        ranges=recipe.weights.ranges,
        segments=recipe.activations.segments(layer.segments, direct=layer.direct),
        input=QuantizerPlan(format=activation, per_step=per_step, ranges=ranges, tokens=tokens, shared=shared)
        if activation
        else None,
    )


def _seeing(trace: Trace) -> list[str]:
    """Return the layers that the sample goes through, in execution order."""
    return [layer.name for layer in trace.layers if "sample" in layer.depends_on]


def last_layer(trace: Trace) -> str:
    """Return the name of the last layer that the sample goes through."""
    return _seeing(trace)[-1]


def _check_rules(recipe: Recipe, roles: dict[str, frozenset[str]]) -> None:
    open_names = set(roles)
    for rule in recipe.rules:
        matched = {name for name, played in roles.items() if rule.matches(name, played)}
        if not matched:
            raise ValueError(
                f"the rule {rule.match!r} of recipe {recipe.name} matches "
                "no layer; `tfmq inspect` lists their names"
            )
        if not matched & open_names:
            warnings.warn(
                (
                    f"the rule {rule.match!r} of recipe {recipe.name} has no "
                    "effect: rules before it match all its layers"
                ),
                stacklevel=3,
            )
        open_names -= matched


def make_plan(recipe: Recipe, trace: Trace) -> Plan:
    """Return what every traced layer becomes under `recipe`.

    Raises:
        ValueError: a rule matches no layer, or nothing is left to quantize.
    """
    seeing = _seeing(trace)
    roles = {layer.name: _roles(layer, seeing[0], seeing[-1]) for layer in trace.layers}
    _check_rules(recipe, roles | dict.fromkeys((*trace.products, *trace.embeddings), frozenset()))
    plans = {layer.name: _layer(recipe, layer, roles[layer.name]) for layer in trace.layers}
    layers = {name: plan for name, plan in plans.items() if plan}
    if not layers:
        raise ValueError(f"recipe {recipe.name} quantizes no layer of this model")
    per_step, shared = _per_step(recipe, temporal=False), recipe.activations.zero_points == "shared"
    products = {}
    for owner, sites in trace.products.items():
        fmt = (
            recipe.activations.format(recipe.bits(owner, frozenset())[1])
            if recipe.activations.products
            else None
        )
        products[owner] = (
            sites,
            QuantizerPlan(format=fmt, per_step=per_step, ranges=recipe.activations.ranges, shared=shared)
            if fmt
            else None,
        )
    formats = {name: recipe.weights.format(recipe.embedding_bits(name)) for name in trace.embeddings}
    embeddings = {
        name: EmbeddingPlan(weight=fmt, ranges=recipe.weights.ranges) for name, fmt in formats.items() if fmt
    }
    return Plan(layers, products, embeddings)
