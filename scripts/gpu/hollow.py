"""Artifacts without their large weights, for measuring times where only small files can be carried.

    python3 scripts/gpu/hollow.py empty FILE...    artifacts: floats of constants over 64 KiB become zeros, which pack to nothing
    python3 scripts/gpu/hollow.py fill FILE...     and random numbers again, with the mean and spread that they had

Cases (NAME.npz) lose their large arrays of floats likewise. What is filled in depends on a constant's number alone. A filled artifact computes something else than the model
did: it is good for times, not for results. Needs numpy. FORMAT.md describes the file.
"""
import json
import pathlib
import struct
import sys

import numpy as np

DTYPES = {"f32": np.float32, "f16": np.float16, "f64": np.float64}
LEAST = 1 << 16


def large(bytes_):
    """Index, dtype, offset and length of each large constant of floats, once each."""
    count = struct.unpack_from("<I", bytes_, 12)[0]
    segments = [struct.unpack_from("<I4xQQ", bytes_, 64 + 48 * i) for i in range(count)]
    _, at, length = next(s for s in segments if s[0] == 1)
    seen = set()
    for i, tensor in enumerate(json.loads(bytes(bytes_[at : at + length]))["tensors"]):
        data = tensor["data"].get("embedded")
        if data and tensor["dtype"] in DTYPES and data["len"] >= LEAST:
            begin = segments[data["segment"]][1] + data["offset"]
            if begin not in seen:
                seen.add(begin)
                yield i, DTYPES[tensor["dtype"]], begin, data["len"]


def case(path, mode):
    """The arrays of a case that are large become zeros, packed, or standard normal numbers again."""
    arrays = dict(np.load(path))
    for i, (name, array) in enumerate(arrays.items()):
        if array.dtype.kind == "f" and array.nbytes >= LEAST and (mode == "empty" or not array.any()):
            new = np.zeros(array.shape) if mode == "empty" else np.random.default_rng(i).standard_normal(array.shape, np.float32)
            arrays[name] = new.astype(array.dtype)
    (np.savez_compressed if mode == "empty" else np.savez)(path, **arrays)


mode, *paths = sys.argv[1:]
for path in map(pathlib.Path, paths):
    if path.suffix == ".npz":
        case(path, mode)
        continue
    content, notes = np.memmap(path, np.uint8, "r+"), path.with_suffix(".hollow.json")
    known = {} if mode == "empty" else json.loads(notes.read_text())
    for i, dtype, begin, length in large(content):
        values = content[begin : begin + length].view(dtype)
        if mode == "empty":
            wide = values.astype(np.float64)
            if np.isfinite(wide).all():
                known[str(i)] = [wide.mean(), wide.std()]
                values[:] = 0
        elif str(i) in known:
            mean, spread = known[str(i)]
            values[:] = (np.random.default_rng(i).standard_normal(values.shape, np.float32) * np.float32(spread) + np.float32(mean)).astype(dtype)
    content.flush()
    if mode == "empty":
        notes.write_text(json.dumps(known))
