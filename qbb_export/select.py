"""Which linear layers are quantised, and with which settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from qbb_export.errors import QbbError
from qbb_export.passes.linears import Linear, Rejected
from qbb_export.quantize import QuantizeSettings

# "layers.3." in "model.layers.3.mlp.up_proj", "/layer.3/" in an ONNX node's name: a member of a repeated block.
_NUMBERED = re.compile(r"(^|[./_])\d+[./]")
# What may stand between the head's product and the logits.
_BEHIND_HEADS = frozenset({"Add", "Mul", "Div", "Tanh", "Cast", "Where"})
_OVERRIDES = ("bases", "group_size", "offset")


@dataclass(frozen=True)
class Override:
    """Other settings for the layers whose name fits a pattern."""

    pattern: str
    values: dict[str, int | bool]

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read ``PATTERN:bases=3,group_size=64,offset=on`` (any of the three keys)."""
        pattern, separator, rest = text.rpartition(":")
        values: dict[str, int | bool] = {}
        for item in rest.split(","):
            key, _, value = item.partition("=")
            if key == "offset" and value in ("on", "off"):
                values[key] = value == "on"
            elif key in ("bases", "group_size") and value.isdigit():
                values[key] = int(value)
            else:
                separator = ""
        if not separator or not pattern:
            raise QbbError(
                "cannot read a layer override",
                where="--layer",
                expected="PATTERN:KEY=VALUE,… with bases=N, group_size=N, offset=on|off",
                got=text,
            )
        return cls(pattern, values)


@dataclass(frozen=True)
class Selection:
    """What the user asked for.

    Args:
        include: name patterns (``*``, ``?``, ``[…]``) of layers to add to the default choice.
        exclude: name patterns of layers to take out of the default choice.
        overrides: settings of single layers; a later one wins.
        head_bases: of the output head, which is left as it is without.
        embedding_bases: of the table of embeddings, which is left as it is without; one that is also the head shares
            the head's bits, so the numbers have to be equal.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    head_bases: int | None = None
    embedding_bases: int | None = None


def select_layers(
    model: ir.Model,
    linears: Sequence[Linear],
    rejected: Sequence[Rejected],
    selection: Selection,
    settings: QuantizeSettings,
    owners: Mapping[str, str] | None = None,
) -> dict[str, QuantizeSettings]:
    """The chosen layers' names, in execution order, each with its settings.

    1. by default: the linear layers of numbered blocks (``layers.0.…``); all of them where no name has a number;
       never one whose product is a graph output (the head), unless nothing else is left
    2. minus ``exclude``, plus ``include``: so ``--exclude '*' --include X`` is X alone
    3. plus the head, with ``head_bases``
    4. ``overrides`` change settings, they choose nothing

    Args:
        model: the graph.
        linears: its linear layers.
        rejected: its matrix products that cannot be replaced.
        selection: what the user asked for.
        settings: of all layers without an override.
        owners: kind of the module that owns each parameter, for messages about those that are no linear layers.

    Raises:
        QbbError: a pattern that fits no linear layer, or no layer chosen.
    """
    names = list(dict.fromkeys(linear.name for linear in linears))
    for option, patterns in (
        ("--include", selection.include),
        ("--exclude", selection.exclude),
        ("--layer", tuple(override.pattern for override in selection.overrides)),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise _no_match(option, pattern, names, rejected, _kinds(model, owners or {}))
    chosen = [name for name in default_layers(linears) if not _fits(name, selection.exclude)]
    heads = {linear.name for linear in linears if _is_head(linear)} if selection.head_bases is not None else set()
    if selection.head_bases is not None and not heads:
        raise QbbError("no linear layer gives an output of the model", where="--head-bases")
    chosen = [name for name in names if name in {*chosen, *heads} or _fits(name, selection.include)]
    if not chosen:
        reasons = sorted({r.reason for r in rejected})
        raise QbbError(
            "no linear layer to quantise",
            expected="MatMul or Gemm with a constant float weight",
            got="; ".join(reasons) or f"{len(names)} linear layers, all excluded" if names or reasons else "none",
        )
    result = {}
    for name in chosen:
        result[name] = replace(settings, bases=selection.head_bases) if name in heads else settings  # type: ignore[arg-type]
        for override in selection.overrides:
            if fnmatchcase(name, override.pattern):
                result[name] = replace(result[name], **override.values)  # type: ignore[arg-type]
    return result


def default_layers(linears: Sequence[Linear]) -> list[str]:
    """Rule 1 of :func:`select_layers`."""
    names = list(dict.fromkeys(linear.name for linear in linears))
    candidates = [name for name in names if _NUMBERED.search(name)] or names
    heads = {linear.name for linear in linears if _is_head(linear)}
    return [name for name in candidates if name not in heads] or candidates


def _is_head(linear: Linear) -> bool:
    """Whether the product is a graph output: as it is, or with a bias, a scale or a soft cap, in another type."""
    value = linear.node.outputs[0]
    while not value.is_graph_output():
        users = {usage.node for usage in value.uses()}
        if len(users) != 1 or (node := users.pop()).op_type not in _BEHIND_HEADS:
            return False
        value = node.outputs[0]
    return True


def select_lookups(
    lookups: Sequence[Linear],
    linears: Sequence[Linear],
    chosen: Mapping[str, QuantizeSettings],
    selection: Selection,
    settings: QuantizeSettings,
) -> dict[str, QuantizeSettings]:
    """The tables of embeddings to quantise, each with its settings; none without ``embedding_bases``.

    Args:
        lookups: of the graph, see ``find_lookups``.
        linears: all linear layers of the graph.
        chosen: those to quantise and their settings; a table that is also one of them has its settings.
        selection: what the user asked for.
        settings: of all layers without an override.

    Raises:
        QbbError: no table in the graph, or one that is also a layer with another number of bases, or a float one.
    """
    bases = selection.embedding_bases
    if bases is None:
        return {}
    # The largest one is of tokens; others are of positions and segments.
    tables = sorted({lookup.name: lookup for lookup in lookups}.values(), key=lambda table: table.out_features)[-1:]
    if not tables:
        raise QbbError("no table of embeddings in the graph", where="--embedding-bases")
    (table,) = tables
    if table.name in chosen:
        if chosen[table.name].bases != bases:
            got = f"{bases} and {chosen[table.name].bases}"
            raise QbbError("embedding and head are one matrix", where=table.name, expected="equal bases", got=got)
        return {table.name: chosen[table.name]}
    if any(linear.weight is table.weight for linear in linears):
        expected = f"--head-bases {bases}, too"
        raise QbbError("embedding and head are one matrix", where=table.name, expected=expected)
    return {table.name: replace(settings, bases=bases)}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kinds(model: ir.Model, owners: Mapping[str, str]) -> dict[str, str]:
    """What each parameter and initializer belongs to: a class of modules, or the operators that read it."""
    readers = {
        name: ", ".join(sorted({usage.node.op_type for usage in value.uses()})) or "nothing"
        for name, value in model.graph.initializers.items()
    }
    return readers | dict(owners)


def _no_match(
    option: str, pattern: str, names: Sequence[str], rejected: Sequence[Rejected], kinds: Mapping[str, str]
) -> QbbError:
    """Say why a pattern fits nothing: the layer cannot be replaced, is of another kind, or does not exist."""
    where = f"{option} {pattern}"
    for item in rejected:
        if fnmatchcase(item.name, pattern):
            return QbbError("layer cannot be quantised", where=where, got=f"{item.name}, {item.reason}")
    for name, kind in kinds.items():
        if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern):
            return QbbError(
                "only linear layers can be quantised",
                where=where,
                expected="MatMul or Gemm with a constant float weight",
                got=f"{name} ({kind})",
            )
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
    return QbbError("no such layer", where=where, expected=f"a name such as {close[0]}" if close else None)
