"""The numbers of a sample as tensors: converted where that is exact, refused by name where it is not."""

from __future__ import annotations

import numpy as np
import torch

from lightning_mimo.errors import DataError

IGNORED = -100
"""The label of a position where nothing is to be predicted, as in torch and transformers."""


def whole_numbers(index: int, key: str, value: object, *, dimensions: tuple[int, ...] = (1,)) -> torch.Tensor:
    """A tensor, an array or a list as int64, where nothing is lost by it.

    Raises:
        DataError: for other types, dtypes and shapes.
    """
    tensor = as_tensor(index, key, value)
    if tensor.dtype == torch.int64 and tensor.ndim in dimensions:
        return tensor  # as nearly all are; every operation of torch costs a microsecond
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)  # an empty list has no dtype
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(
            f"Sample {index}: {key} has the dtype {dtype_name(tensor.dtype)}, but tokens, labels and positions are "
            f"whole numbers. Make them int64: torch.as_tensor({key}, dtype=torch.int64)."
        )
    if key == "labels" and not tensor.dtype.is_signed:
        wrapped = IGNORED % 2 ** (8 * tensor.itemsize)
        if bool((tensor.to(torch.int64) == wrapped).any()):
            raise DataError(
                f"Sample {index}: labels has the dtype {dtype_name(tensor.dtype)}, which cannot hold -100, and "
                f"{wrapped}, which -100 becomes in it, is among them. Make labels int64 before -100 is written."
            )
    if tensor.ndim not in dimensions:
        wanted = " or ".join("[S]" if each == 1 else "[3, S]" for each in dimensions)
        remedy = f" Take {key}[0]: a tokenizer with return_tensors adds a batch dimension." if tensor.ndim == 2 else ""
        raise DataError(
            f"Sample {index}: {key} has the shape {list(tensor.shape)}, but must be {wanted}, S being the number of "
            f"tokens.{remedy}"
        )
    return tensor.to(torch.int64)


def as_tensor(index: int, key: str, value: object) -> torch.Tensor:
    """A tensor of the same values, from a tensor, an array or a list of numbers.

    Raises:
        DataError: for anything else.
    """
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
            kind = "nested" if value.is_nested else "sparse" if value.layout != torch.strided else value.device.type
            raise DataError(
                f"Sample {index}: {key} is a {kind} tensor, but workers collate dense tensors on the CPU. Return "
                f"those; the strategy moves a batch to its device."
            )
        return value.detach() if value.requires_grad else value
    if isinstance(value, np.ndarray | list | tuple):
        try:
            return _from_array(value) if isinstance(value, np.ndarray) else torch.from_numpy(_array_of(value))
        except (TypeError, ValueError, RuntimeError):
            pass
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
    remedy = " For items of different sizes use lightning_mimo.Ragged." if isinstance(value, list | tuple) else ""
    raise DataError(
        f"Sample {index}: {key} is {what} that is no rectangular array of numbers. Give a tensor, a numpy array or a "
        f"list of numbers.{remedy}"
    )


def _from_array(array: np.ndarray) -> torch.Tensor:
    """A tensor of an array in any order of bytes or elements."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy())


def _array_of(value: list | tuple) -> np.ndarray:
    """An array of a list, with floats in single precision, as ``torch.tensor`` reads it."""
    array = np.array(value)
    is_wide = array.dtype == np.float64 and not isinstance(value[0] if value else None, np.generic | np.ndarray)
    return array.astype(np.float32) if is_wide else array


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``"""
    return str(dtype).removeprefix("torch.")
