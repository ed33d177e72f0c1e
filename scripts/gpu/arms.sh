#!/usr/bin/env bash
# Time the plans unfused, greedy and fused of every artifact of a folder on a GPU, in turn on the same data:
#
#   scripts/gpu/arms.sh DIR        DIR: what prepare_arms.py made
#
# Lines of JSON go to $OUT/arms.jsonl (default: DIR/out), a table to the terminal.
set -u
DIR=$(cd "$1" && pwd); OUT=${OUT:-$DIR/out}; HERE=$(cd "$(dirname "$0")" && pwd); mkdir -p "$OUT"
: > "$OUT/arms.jsonl"
for packed in "$DIR"/*.pav.xz; do
  artifact=${packed%.xz}; name=$(basename "$artifact" .pav)
  xz -dkf "$packed"
  [ -e "$DIR/$name.hollow.json" ] && python3 "$HERE/hollow.py" fill "$artifact" "$DIR/$name.npz"
  timeout 90 "$DIR/arms" "$artifact" "$DIR/$name.npz" cuda:0 "${PLANS:-unfused,greedy,fused}" "${ROUNDS:-60}" >> "$OUT/arms.jsonl" 2> "$OUT/err" \
    || echo "$name: ended with $?: $(head -c 400 "$OUT/err")"
  rm -f "$artifact"
done
python3 - "$OUT/arms.jsonl" <<'PY'
import json, math, sys
print(f"{'model':24s} {'launches':>14s} {'unfused us':>10s} {'greedy us':>10s} {'fused us':>10s} {'greedy/fused':>12s} {'kernels alone':>13s}  differs")
ratios = []
for line in open(sys.argv[1]):
    r = json.loads(line); name = r["model"].split("/")[-1].removesuffix(".pav")
    p = {x["plan"]: x for x in r["plans"]}; g, f = p["greedy"], p["fused"]
    ratios.append(g["median_us"] / f["median_us"])
    print(f"{name:24s} {'/'.join(str(x['launches']) for x in r['plans']):>14s} {p['unfused']['median_us']:10.1f} {g['median_us']:10.1f} {f['median_us']:10.1f} {ratios[-1]:12.3f} {g['kernels_us'] / f['kernels_us']:13.3f}  {g['differs']:.1e} {f['differs']:.1e}")
print(f"geometric mean greedy/fused {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f} of {len(ratios)}")
PY
rm -f "$OUT/err"
