"""The inputs of encoders: those of one sample read and counted, those of a microbatch put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad

from lightning_mimo.data.items import Inputs, ItemSizes, PerItem
from lightning_mimo.data.sample_format import Sample, SampleFormat
from lightning_mimo.data.tensors import as_tensor
from lightning_mimo.errors import DataError
from lightning_mimo.microbatch import Ragged


@dataclass(frozen=True, kw_only=True)
class EncoderInputs:
    """What one sample has for one module.

    Attributes:
        index: of the sample in the dataset.
        arguments: encoder -> argument -> values; empty where the sample has none.
        items: images, clips, ….
        embeddings: that they make, as far as it is known before the encoder has run.
        is_declared: whether that is what the encoder declares.
        rows: ``encoder.argument`` -> first dimension of its values.
        per_item: argument for every pipeline stage -> its numbers, for each item a row.
    """

    index: int
    arguments: Mapping[str, Inputs] = field(default_factory=dict)
    items: int = 0
    embeddings: int | None = 0
    is_declared: bool = False
    rows: Mapping[str, int] = field(default_factory=dict)
    per_item: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def check_modules(index: int, sample: Sample, modules: Sequence[str] | None) -> None:
    """Refuse inputs for modules that there are not.

    Raises:
        DataError: naming the sample and the module.
    """
    inputs = sample.get("modality_inputs") or {}
    if not isinstance(inputs, Mapping):
        raise DataError(
            f"Sample {index}: modality_inputs is a {type(inputs).__name__}, but must be a dict "
            f"{{module: {{encoder: {{argument: [items, ...]}}}}}}."
        )
    unknown = [name for name in inputs if modules is not None and name not in modules]
    if unknown:
        raise DataError(
            f"Sample {index}: modality_inputs has {unknown[0]!r}, but the encoder modules of the layout are "
            f"{list(modules or ())}. Use one of these names."
        )


def read_inputs(index: int, sample: Sample, module: str, expected: SampleFormat) -> EncoderInputs:
    """What a sample has for a module, checked and counted.

    Raises:
        DataError: naming the sample, the argument and the numbers.
    """
    given = (sample.get("modality_inputs") or {}).get(module)
    if not given:
        return EncoderInputs(index=index)
    declared = expected.encoders.get(module)
    _check_encoders(index, module, given, declared)
    arguments = {
        encoder: {name: _value(index, f"{module}.{encoder}.{name}", value) for name, value in inputs.items()}
        for encoder, inputs in given.items()
    }
    items, embeddings, is_declared = _count(index, module, arguments, declared or {})
    rows = {
        f"{encoder}.{name}": (value.values if isinstance(value, Ragged) else value).size(0)
        for encoder, inputs in arguments.items()
        for name, value in inputs.items()
    }
    per_item = {
        name: _per_stage(index, f"{module}.{encoder}.{name}", inputs.get(name), items)
        for encoder, inputs in arguments.items()
        for name in names_for_every_stage(expected, module)
    }
    return EncoderInputs(
        index=index,
        arguments=arguments,
        items=items,
        embeddings=embeddings,
        is_declared=is_declared,
        rows=rows,
        per_item=per_item,
    )


def names_for_every_stage(expected: SampleFormat, module: str) -> tuple[str, ...]:
    """Arguments that the encoder of a module wants on all of its pipeline stages."""
    declared = (sizes for sizes in (expected.encoders.get(module) or {}).values() if sizes is not None)
    return tuple(name for sizes in declared for name in sizes.every_stage)


def _per_stage(index: int, name: str, value: object, items: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of each item."""
    if not isinstance(value, torch.Tensor) or value.ndim > 2 or value.is_floating_point() or len(value) != items:
        raise DataError(
            f"Sample {index}: {name} must hold whole numbers, [items] or [items, n], because the encoder's item_sizes "
            f"has it in every_stage."
        )
    return tuple(tuple(row) for row in value.view(len(value), -1).tolist()) if items else ()


def concatenate(
    module: str, samples: Sequence[EncoderInputs], expected: SampleFormat
) -> dict[str, dict[str, torch.Tensor | Ragged]] | None:
    """``{encoder: {argument: [items of all samples, ...]}}``, or None where there is nothing to encode.

    Where there is not one item, an item of zeros stands in, because few encoders take an empty batch; the model drops
    its embeddings again, so every parameter still gets its (zero) gradient. No zeros can stand in for ragged items:
    then there is None.

    Raises:
        DataError: if samples differ in their arguments, or in dtype or shape of an argument.
    """
    filled = [sample for sample in samples if sample.arguments]
    if not filled:
        return None
    _check_alike(module, filled, expected)
    is_empty = not any(sample.items for sample in filled)
    if is_empty and _is_ragged(module, filled[0], expected):
        return None
    result: dict[str, dict[str, torch.Tensor | Ragged]] = {}
    for encoder, inputs in filled[0].arguments.items():
        result[encoder] = {}
        for name in inputs:
            values = [sample.arguments[encoder][name] for sample in filled]
            if name in _padded(module, encoder, expected):
                values = _filled_up(values)
            together = _join(values)
            if is_empty and isinstance(together, torch.Tensor):
                together = together.new_zeros((1, *together.shape[1:]))
            result[encoder][name] = together
    return result


def check_same_arguments(module: str, samples: Sequence[EncoderInputs]) -> None:
    """Refuse an argument that only some samples of a global batch have.

    Raises:
        DataError: naming both samples and the argument.
    """
    filled = [sample for sample in samples if sample.arguments]
    for other in filled[1:]:
        for encoder, inputs in filled[0].arguments.items():
            if difference := sorted(inputs.keys() ^ other.arguments.get(encoder, {}).keys()):
                has, lacks = (filled[0], other) if difference[0] in inputs else (other, filled[0])
                raise DataError(
                    f"Sample {has.index} has {module}.{encoder}.{difference[0]} in modality_inputs, but sample "
                    f"{lacks.index} has not. Every sample must have the same arguments; with no item in them, where a "
                    f"sample has none."
                )


def _check_encoders(index: int, module: str, given: object, declared: Mapping[str, object] | None) -> None:
    where = f"Sample {index}: modality_inputs[{module!r}]"
    if not isinstance(given, Mapping) or not all(isinstance(inputs, Mapping) for inputs in given.values()):
        raise DataError(f"{where} must be a dict {{encoder: {{argument: [items, ...]}}}}.")
    if declared is not None and given.keys() != declared.keys():
        raise DataError(
            f"{where} has the encoders {sorted(given)}, but the module has {sorted(declared)}. Use the same names."
        )


def _value(index: int, name: str, value: object) -> torch.Tensor | Ragged:
    if isinstance(value, Ragged):
        values, lengths = as_tensor(index, name, value.values), as_tensor(index, f"{name}.lengths", value.lengths)
        if lengths.ndim != 1 or lengths.is_floating_point() or int(lengths.sum()) != len(values):
            raise DataError(
                f"Sample {index}: {name} is Ragged with {len(values)} rows, but its lengths {lengths.tolist()} add up "
                f"to {lengths.sum().item():g}. lengths holds the rows of each item, [items], whole numbers."
            )
        return Ragged(values=values, lengths=lengths.to(torch.int64))
    tensor = as_tensor(index, name, value)
    if tensor.ndim == 0:
        raise DataError(
            f"Sample {index}: {name} is a single number, but the first dimension of an argument counts items. Give it "
            f"the shape [items]."
        )
    return tensor


def _count(
    index: int, module: str, arguments: Mapping[str, Inputs], declared: Mapping[str, ItemSizes | None]
) -> tuple[int, int | None, bool]:
    """Items, embeddings as far as known, and whether these are declared; checked over all arguments."""
    numbers: dict[str, int] = {}
    embeddings: list[int | None] = []
    for encoder, inputs in arguments.items():
        sizes = declared.get(encoder)
        where = f"Sample {index}: {module}.{encoder}"
        if sizes is not None:
            per_item = _per_item(where, "embeddings", sizes.embeddings, inputs)
            numbers[f"{encoder}.item_sizes.embeddings"] = len(per_item)
            embeddings.append(sum(per_item))
        else:
            embeddings.append(_rows_of_ragged(inputs))
        ragged = {} if sizes is None else sizes.rows
        for name, value in inputs.items():
            if isinstance(value, Ragged):
                numbers[f"{encoder}.{name}"] = len(value.lengths)
            elif name in ragged:
                rows = _per_item(where, f"rows[{name!r}]", ragged[name], inputs)
                numbers[f"{encoder}.item_sizes.rows[{name!r}]"] = len(rows)
                _check_rows(where, name, rows, len(value))
            else:
                numbers[f"{encoder}.{name}"] = value.size(0)
    if len(set(numbers.values())) > 1:
        raise DataError(
            f"Sample {index}: the inputs of module {module!r} differ in their first dimension, the number of items: "
            f"{numbers}. They must agree. For an argument whose rows are not items, the encoder declares item_sizes = "
            f"lightning_mimo.ItemSizes(...), or the sample holds lightning_mimo.Ragged(values, lengths)."
        )
    items = next(iter(numbers.values()), 0)
    together = None if None in embeddings else sum(each for each in embeddings if each is not None)
    return items, 0 if items == 0 else together, all(declared.get(encoder) is not None for encoder in arguments)


def _per_item(where: str, what: str, function: PerItem, inputs: Inputs) -> list[int]:
    try:
        numbers = function(inputs)
    except KeyError as error:
        raise DataError(
            f"{where} has the arguments {sorted(inputs)} in modality_inputs, but the encoder's item_sizes.{what} asks "
            f"for {error.args[0]!r}. Give it in every sample."
        ) from error
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return [int(number) for number in (numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers)]


def _check_rows(where: str, name: str, rows: Sequence[int], given: int) -> None:
    if sum(rows) != given:
        raise DataError(
            f"{where}.{name} has {given} rows, but its items have {' + '.join(map(str, rows)) or 0} = {sum(rows)} by "
            f"the encoder's item_sizes. Both must come from the same call of the processor."
        )


def _rows_of_ragged(inputs: Inputs) -> int | None:
    """Rows of all items, where the arguments agree on them."""
    found = {len(value.values) for value in inputs.values() if isinstance(value, Ragged)}
    return found.pop() if len(found) == 1 else None


def _is_ragged(module: str, sample: EncoderInputs, expected: SampleFormat) -> bool:
    declared = expected.encoders.get(module) or {}
    return any(
        declared.get(encoder) is not None or any(isinstance(value, Ragged) for value in inputs.values())
        for encoder, inputs in sample.arguments.items()
    )


def _padded(module: str, encoder: str, expected: SampleFormat) -> tuple[str, ...]:
    """Arguments in whose later dimensions samples may differ."""
    sizes = (expected.encoders.get(module) or {}).get(encoder)
    return () if sizes is None else sizes.padded


def _filled_up(values: list[Any]) -> list[Any]:
    """Tensors ``[n, ...]`` with zeros at the end of all dimensions but the first, so that they fit together."""
    if isinstance(values[0], Ragged):
        return values
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    missing = [[large - size for size, large in zip(value.shape[1:], shape, strict=True)] for value in values]
    # torch.nn.functional.pad begins with the last dimension.
    return [
        pad(value, [number for each in reversed(sizes) for number in (0, each)]) if any(sizes) else value
        for value, sizes in zip(values, missing, strict=True)
    ]


def _check_alike(module: str, samples: Sequence[EncoderInputs], expected: SampleFormat) -> None:
    first = samples[0]
    for other in samples[1:]:
        for encoder, inputs in first.arguments.items():
            for name, value in inputs.items():
                any_size = name in _padded(module, encoder, expected)
                mine, theirs = (_kind(each, any_size) for each in (value, other.arguments[encoder][name]))
                if mine != theirs:
                    raise DataError(
                        f"Sample {other.index}: {module}.{encoder}.{name} is {theirs}, but {mine} in sample "
                        f"{first.index}, and the items of a microbatch are put into one tensor. Give all samples the "
                        f"same; for items of different sizes give rows, [rows, ...], and say how many belong to each "
                        f"item: lightning_mimo.Ragged, or item_sizes of the encoder."
                    )


def _kind(value: torch.Tensor | Ragged, any_size: bool = False) -> str:
    """``float32 [n, 3, 16, 16]``, or ``float32 [n, any, any, any]``"""
    if isinstance(value, Ragged):
        return f"Ragged {_kind(value.values, any_size)}"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype} [{', '.join(['n', *('any' if any_size else str(size) for size in value.shape[1:])])}]"


def _join(values: Sequence[Any]) -> torch.Tensor | Ragged:
    if isinstance(values[0], Ragged):
        return Ragged(
            values=torch.cat([each.values for each in values]), lengths=torch.cat([each.lengths for each in values])
        )
    return torch.cat(list(values))
