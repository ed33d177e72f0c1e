#!/usr/bin/env python3
"""Writes ir/tests/golden/narrow_floats.txt: what ml_dtypes makes of every code of the floats of at most 8 bits, and of
f32 values at, just below and just above every rounding boundary. Needs numpy and ml_dtypes.

One line a dtype: its name, then CODE=BITS for each code (the f32 it is), then BITS>CODE for each conversion from f32.
Signs of NaN differ between implementations, so they are left out; float8_e8m0fnu of ml_dtypes rounds ties its own way,
so for it only values off the ties are listed."""
import pathlib

import ml_dtypes
import numpy as np

DTYPES = {
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
    "f8e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "f8e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "f8e8m0": ml_dtypes.float8_e8m0fnu,
    "f4e2m1": ml_dtypes.float4_e2m1fn,
}
lines = []
for name, dtype in DTYPES.items():
    codes = np.arange(16 if name == "f4e2m1" else 256, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    words = [f"{c:02x}={v:08x}" for c, v in zip(codes, values.view(np.uint32)) if not np.isnan(values[c])]
    words += [f"{c:02x}=nan" for c in codes if np.isnan(values[c])]
    finite = np.unique(values[np.isfinite(values) & (values >= 0)].astype(np.float64))
    beyond = finite[-1] + (finite[-1] - finite[-2]) / 2
    ties = np.append((finite[1:] + finite[:-1]) / 2, beyond).astype(np.float32)
    down, up = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
    middle = [] if name == "f8e8m0" else [ties]
    probes = np.concatenate([down, up, finite.astype(np.float32), *middle])
    if name == "f8e8m0":
        probes = probes[probes >= np.float32(2.0**-126)]
    else:
        probes = np.concatenate([probes, -probes, np.array([np.inf, -np.inf], np.float32)])
    for x, c in zip(probes, probes.astype(dtype)):
        code = np.array(c).view(np.uint8)
        nan = np.isnan(np.float32(c))
        words.append(f"{x.view(np.uint32):08x}>{'nan' if nan else format(int(code), '02x')}")
    lines.append(f"{name} {' '.join(words)}\n")
path = pathlib.Path(__file__).parent.parent / "ir/tests/golden/narrow_floats.txt"
path.write_text("".join(lines))
