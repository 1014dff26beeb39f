"""One table of rules between the tensors of files and the parameters of a model: import and export follow from it.

A rule says of which rows of which tensors a Megatron parameter consists. Read forwards, and cut to a rank's shard, it
says which slices of the files to read; read backwards, where the rows of a file's tensor lie in the model.

Example, for the gated MLP of a layer with hidden size 4 and an MLP of width 6::

    Concatenate(
        "language.decoder.layers.0.mlp.linear_fc1.weight",                          # [12, 4]
        [
            Source(name="model.layers.0.mlp.gate_proj.weight", shape=(6, 4)),
            Source(name="model.layers.0.mlp.up_proj.weight", shape=(6, 4)),
        ],
    )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Protocol

import torch

from lightning_mimo.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor of the files, and how it is looked at.

    Attributes:
        name: in the files.
        shape: in the files.
        index: which entry along the first dimension, where tensors (of experts) are stacked; ``None`` for the whole.
        transposed: whether a matrix is stored ``[in, out]``; Megatron's are ``[out, in]``.
        flatten: whether all dimensions after the first become one, as for a convolution that is computed as a matrix.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    transposed: bool = False
    flatten: bool = False

    @cached_property
    def view(self) -> tuple[int, ...]:
        """Shape as it is looked at."""
        shape = self.shape if self.index is None else self.shape[1:]
        if self.transposed:
            shape = shape[::-1]
        return (shape[0], math.prod(shape[1:])) if self.flatten else shape

    def slices(self, rows: range, columns: range | None) -> tuple[int | slice, ...]:
        """Index into the file's tensor for rows and columns of the view; those of a flattened one are cut later."""
        cut = [slice(rows.start, rows.stop)]
        if columns is not None and not self.flatten:
            cut.append(slice(columns.start, columns.stop))
        elif self.transposed:
            cut.append(slice(None))
        if self.transposed:
            cut.reverse()
        return (*(() if self.index is None else (self.index,)), *cut)

    def as_viewed(self, piece: torch.Tensor) -> torch.Tensor:
        """What :meth:`slices` gave, in the shape of the view."""
        if self.transposed:
            piece = piece.transpose(0, 1)
        return piece.flatten(1) if self.flatten else piece

    def as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the view in the shape that they have in the file; the inverse of :meth:`as_viewed`."""
        if self.flatten:
            rows = rows.reshape(len(rows), *(self.shape[1:] if self.index is None else self.shape[2:]))
        return rows.transpose(0, 1) if self.transposed else rows


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of a source.

    Attributes:
        source: which tensor.
        rows: of its view.
    """

    source: Source
    rows: range


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one parameter consists of, along its first dimension.

    Attributes:
        target: global name of the parameter, as of :func:`lightning_mimo.mimo.parameter_names.named_parameters_of`.
        pieces: in order.
        padding: rows of zeros after them, which the files do not have.
    """

    target: str
    pieces: tuple[Piece, ...]
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        rows = sum(len(piece.rows) for piece in self.pieces) + self.padding
        return (rows, *self.pieces[0].source.view[1:])


def Rename(target: str, source: Source) -> Rule:  # noqa: N802 (entries of a table, one word each)
    """The same tensor under another name."""
    return Rule(target=target, pieces=(Piece(source=source, rows=range(source.view[0])),))


def PadVocabulary(target: str, source: Source, *, rows: int) -> Rule:  # noqa: N802
    """The same rows, and zeros up to a number that tensor parallelism divides.

    Args:
        target: a matrix with a row for each token.
        source: without padding.
        rows: of the target.
    """
    return Rule(target=target, pieces=Rename(target, source).pieces, padding=rows - source.view[0])


def Concatenate(target: str, sources: Sequence[Source]) -> Rule:  # noqa: N802
    """Several matrices one after the other, such as gate and up of a gated MLP."""
    return Rule(target=target, pieces=tuple(Piece(source=each, rows=range(each.view[0])) for each in sources))


def InterleaveGroups(target: str, sources: Sequence[Source], *, groups: int) -> Rule:  # noqa: N802
    """Queries, keys and values of the first query group, then those of the second and so on, as Megatron has them.

    Args:
        target: weight ``[(heads + 2 * groups) * head, hidden]`` or bias ``[(heads + 2 * groups) * head]``.
        sources: of queries, keys and values, each with the rows of all groups.
        groups: how many.
    """
    pieces = []
    for group in range(groups):
        for source in sources:
            rows = source.view[0] // groups
            pieces.append(Piece(source=source, rows=range(group * rows, (group + 1) * rows)))
    return Rule(target=target, pieces=tuple(pieces))


class Shard(Protocol):
    """What a rank holds of a parameter, as in :class:`lightning_mimo.checkpoint.shards.ShardSpec`."""

    @property
    def dim(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def tp_rank(self) -> int: ...
    @property
    def tp_size(self) -> int: ...


class SliceReader(Protocol):
    """Files that tensors can be read from in part."""

    def read(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor: ...
    def dtype(self, name: str) -> torch.dtype: ...


def read_shard(rule: Rule, files: SliceReader, shard: Shard) -> torch.Tensor:
    """Read what a rank holds of a parameter, and no more than that, in the dtype of the files.

    Args:
        rule: of the parameter.
        files: where its tensors are.
        shard: how it is cut: along the first dimension or the second.
    """
    shape = list(rule.shape)
    runs, columns = [range(shape[0])], None
    if shard.tp_size > 1:
        runs_of_dim = _runs(shape[shard.dim], shard)
        shape[shard.dim] //= shard.tp_size
        if shard.dim == 0:
            runs = runs_of_dim
        else:
            (columns,) = runs_of_dim
    pieces = [piece for run in runs for piece in _read_rows(rule, files, run, columns)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shape)


def _runs(size: int, shard: Shard) -> list[range]:
    """Rows (or columns) of the whole that a tensor-parallel shard has, as megatron-core cuts it."""
    length = size // (shard.tp_size * shard.stride)
    starts = [(i * shard.tp_size + shard.tp_rank) * length for i in range(shard.stride)]
    return [range(start, start + length) for start in starts]


def _read_rows(rule: Rule, files: SliceReader, run: range, columns: range | None) -> Iterator[torch.Tensor]:
    first = 0
    for piece in rule.pieces:
        start, stop = max(run.start, first), min(run.stop, first + len(piece.rows))
        if start < stop:
            source, shift = piece.source, piece.rows.start - first
            found = files.read(source.name, source.slices(range(start + shift, stop + shift), columns))
            viewed = source.as_viewed(found)
            yield viewed if columns is None or not source.flatten else viewed[:, columns.start : columns.stop]
        first += len(piece.rows)
    if missing := max(0, run.stop - max(run.start, first)):
        width = rule.shape[1:] if columns is None else (len(columns),)
        yield torch.zeros(missing, *width, dtype=files.dtype(rule.pieces[0].source.name))


class RuleTable:
    """The rules of a whole model. Every tensor of the files and every parameter has its place in it."""

    def __init__(self, rules: Iterable[Rule], *, kept: Sequence[str] = ()) -> None:
        """
        Args:
            rules: for every parameter.
            kept: patterns, with ``*``, of tensors of the files that the model has no use for. An export copies them.

        Raises:
            CheckpointError: naming a tensor of which the rules use rows twice or not at all.
        """
        self.rules: dict[str, Rule] = {}
        self.sources: dict[str, tuple[int, ...]] = {}
        self._uses: dict[str, list[tuple[str, int, Piece]]] = {}
        self._kept = tuple(kept)
        for rule in rules:
            if rule.target in self.rules:
                raise CheckpointError(f"Two rules are about the parameter {rule.target!r}.")
            self.rules[rule.target] = rule
            first = 0
            for piece in rule.pieces:
                self.sources[piece.source.name] = piece.source.shape
                self._uses.setdefault(piece.source.name, []).append((rule.target, first, piece))
                first += len(piece.rows)
        for name, uses in self._uses.items():
            _check_each_row_once(name, [piece for _, _, piece in uses])

    def is_kept(self, name: str) -> bool:
        """Whether the model has no use for a tensor of the files."""
        return name not in self.sources and any(fnmatchcase(name, pattern) for pattern in self._kept)

    def targets_in(self, names: Container[str]) -> list[str]:
        """Parameters of which every tensor is among the given names."""
        return [
            target for target, rule in self.rules.items() if all(piece.source.name in names for piece in rule.pieces)
        ]

    def check_files(
        self,
        shapes: Mapping[str, Sequence[int]],
        *,
        where: str,
        is_optional: Callable[[str], bool] = lambda target: False,
    ) -> None:
        """Compare with what is in the files.

        Args:
            shapes: name -> shape of every tensor.
            where: for the message.
            is_optional: whether the tensors of a parameter may be missing.

        Raises:
            ConfigError: naming a tensor that is missing, has another shape, or that no rule is about.
        """
        for name, shape in self.sources.items():
            if name not in shapes:
                targets = [target for target, _, _ in self._uses[name]]
                if all(map(is_optional, targets)):
                    continue
                raise ConfigError(
                    f"{where}: there is no tensor {name!r}, which this model consists of. Download the folder again; "
                    f"its config.json must belong to these files. What is to start from the seed is named: "
                    f"init_missing={sorted({'.'.join(target.split('.')[:2]) for target in targets})}."
                )
            if tuple(shapes[name]) != shape:
                raise ConfigError(
                    f"{where}: {name!r} has the shape {tuple(shapes[name])}, but config.json makes it {shape}. They do "
                    f"not belong together."
                )
        if unknown := sorted(name for name in shapes if name not in self.sources and not self.is_kept(name)):
            raise ConfigError(
                f"{where}: no rule is about {unknown[0]!r}"
                f"{f' and {len(unknown) - 1} more tensors' if len(unknown) > 1 else ''}. The model would ignore it, so "
                f"it computes something else; this kind of model is not supported."
            )

    def check_parameters(self, shapes: Mapping[str, Sequence[int]], *, all_of: bool) -> None:
        """Compare with parameters of a model.

        Args:
            shapes: global name -> shape of the whole.
            all_of: whether these are all parameters of the model, and not those of one rank.

        Raises:
            CheckpointError: naming a parameter that no rule is about, that has another shape, or that is missing.
        """
        for name, shape in shapes.items():
            if name not in self.rules:
                raise CheckpointError(f"No rule says what the parameter {name!r} {tuple(shape)} consists of.")
            if tuple(shape) != self.rules[name].shape:
                raise CheckpointError(
                    f"The parameter {name!r} has the shape {tuple(shape)}, but its rule gives {self.rules[name].shape}."
                )
        if all_of and (missing := sorted(self.rules.keys() - shapes.keys())):
            raise CheckpointError(f"There is no parameter {missing[0]!r}, which a rule is about.")

    def gather(self, name: str, whole: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the files, from the model.

        Args:
            name: in the files.
            whole: parameter's global name -> its values, unsharded.
        """
        shape = self.sources[name]
        result: torch.Tensor | None = None
        for target, first, piece in self._uses[name]:
            parameter = whole(target)
            rows = parameter[first : first + len(piece.rows)]
            if result is None:
                result = parameter.new_empty(shape)
            stored = piece.source.as_stored(rows)
            result[piece.source.slices(piece.rows, None)] = stored
        assert result is not None, "every source has a use"
        return result


def _check_each_row_once(name: str, pieces: Sequence[Piece]) -> None:
    sources = {(piece.source.shape, piece.source.transposed, piece.source.flatten) for piece in pieces}
    if len(sources) > 1:
        raise CheckpointError(f"The rules disagree on the shape of {name!r}: {sorted(sources)}.")
    source = pieces[0].source
    for entry in range(1) if source.index is None else range(source.shape[0]):
        row = 0
        of_entry = [piece.rows for piece in pieces if (piece.source.index or 0) == entry]
        for rows in sorted(of_entry, key=lambda each: each.start):
            if rows.start != row:
                raise CheckpointError(f"The rules use rows {rows.start} to {row} of {name!r} twice or not at all.")
            row = rows.stop
        if row != source.view[0]:
            raise CheckpointError(f"The rules use {row} rows of {name!r}; it has {source.view[0]}.")
