"""Reads a PyTorch state dict (.pth, zip or legacy format) without torch and without running code from it."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np

DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Storage:
    def __init__(self, dtype):
        self.dtype, self.data = np.dtype(dtype), None


class Tensor:
    def __init__(self, storage, offset, size, stride, *_):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), stride

    def array(self):
        data = self.storage.data[self.offset :]
        strides = [s * data.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(data, self.size, strides).copy()


class Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; refuses everything else."""

    def __init__(self, file, storages):
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return Tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module.startswith("torch") and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"refused {module}.{name}")

    def persistent_load(self, pid):
        _, kind, key = pid[:3]
        return self.storages.setdefault(key, Storage(DTYPES[kind]))


def load(path):
    """Arrays by name."""
    storages = {}
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        [index] = [n for n in archive.namelist() if n.endswith("data.pkl")]
        state = Unpickler(io.BytesIO(archive.read(index)), storages).load()
        for key, storage in storages.items():
            storage.data = np.frombuffer(archive.read(f"{index[:-8]}data/{key}"), storage.dtype)
    else:
        with open(path, "rb") as file:
            for _ in range(3):
                Unpickler(file, {}).load()
            state = Unpickler(file, storages).load()
            for key in Unpickler(file, {}).load():
                (count,) = struct.unpack("<q", file.read(8))
                storage = storages[key]
                storage.data = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
    return {name: t.array() for name, t in state.items() if isinstance(t, Tensor)}
