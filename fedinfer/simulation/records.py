"""Flower's records for many replies at little cost: bytes are made when somebody asks for them, and not before."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray
from torch import Tensor

from fedinfer.local_app import reply_content


class LazyArray(Array):
    """A Flower `Array` of numbers that are already in memory; `data` is their serialisation, made on demand."""

    # Flower writes the name of a record's class in front of its bytes.
    __qualname__ = Array.__qualname__

    def __init__(self, values: NDArray[Any], dtype: str) -> None:
        self.__dict__.update(dtype=dtype, shape=values.shape, stype="numpy.ndarray", values=values)

    @property
    def data(self) -> bytes:
        if "serialised" not in self.__dict__:
            buffer = BytesIO()
            np.save(buffer, self.__dict__["values"], allow_pickle=False)
            self.__dict__["serialised"] = buffer.getvalue()
        return bytes(self.__dict__["serialised"])

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["serialised"] = value
        self.__dict__["values"] = Array(self.dtype, self.shape, self.stype, value).numpy()

    def numpy(self) -> NDArray[Any]:
        return np.array(self.__dict__["values"])

    def __reduce__(self) -> tuple[object, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


class Replies:
    """Makes the replies of clients that were sent the same state: what training does not move is shared by all."""

    def __init__(self, sent: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        arrays = {name: tensor.cpu().numpy() for name, tensor in sent.items()}
        self._fixed = {
            name: LazyArray(array, str(array.dtype)) for name, array in arrays.items() if name not in aliases
        }
        self._names = list(sent)
        self._aliases = aliases
        self._dtypes = {name: str(arrays[name].dtype) for name in aliases}

    def reply(
        self,
        message: Message,
        weights: Mapping[str, NDArray[Any]],
        row: int,
        loss: float | None,
        examples: int,
        controls: Mapping[str, NDArray[Any]],
    ) -> Message:
        """The answer to `message` with row `row` of the stacked `weights`, and of `controls` if there are any."""
        record = ArrayRecord()
        for name in self._names:
            if name in self._aliases:
                record[name] = LazyArray(weights[self._aliases[name]][row], self._dtypes[name])
            else:
                record[name] = self._fixed[name]
        control = row_record({name: values[row] for name, values in controls.items()}) if controls else None
        return Message(reply_content(record, loss, examples, control), reply_to=message)


def row_record(values: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """A record of arrays that are in memory."""
    record = ArrayRecord()
    for name, array in values.items():
        record[name] = LazyArray(array, str(array.dtype))
    return record


def stacked_arrays(weights: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Stacked tensors (C, *shape) as arrays."""
    return {name: weight.cpu().numpy() for name, weight in weights.items()}
