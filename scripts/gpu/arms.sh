#!/usr/bin/env bash
# Time the plans unfused, greedy and fused of every artifact of a folder on a GPU, in turn on the same data, hold each kernel's
# predicted time against the measured one, and tune some models:
#
#   scripts/gpu/arms.sh DIR [PART...]        DIR: what prepare_arms.py made; parts: arms residual tune (default: all)
#
# JSON goes to $OUT (default: DIR/out): arms.jsonl, residual.jsonl, tune.txt; tables to the terminal.
set -u
DIR=$(cd "$1" && pwd); OUT=${OUT:-$DIR/out}; HERE=$(cd "$(dirname "$0")" && pwd); mkdir -p "$OUT"; shift
PARTS=${*:-arms residual tune}
has() { case " $PARTS " in *" $1 "*) true;; *) false;; esac }
[ -e "$DIR/pavage.xz" ] && xz -dkf "$DIR/pavage.xz" && chmod +x "$DIR/pavage"
pavage() { LD_LIBRARY_PATH=$DIR timeout 120 "$DIR/pavage" "$@"; }
: > "$OUT/arms.jsonl"; : > "$OUT/residual.jsonl"; : > "$OUT/tune.txt"
for packed in "$DIR"/*.pav.xz; do
  artifact=${packed%.xz}; name=$(basename "$artifact" .pav)
  xz -dkf "$packed"
  [ -e "$DIR/$name.hollow.json" ] && python3 "$HERE/hollow.py" fill "$artifact" "$DIR/$name.npz"
  has arms && { timeout 90 "$DIR/arms" "$artifact" "$DIR/$name.npz" cuda:0 "${PLANS:-unfused,greedy,fused}" "${ROUNDS:-60}" >> "$OUT/arms.jsonl" 2> "$OUT/err" \
    || echo "$name: ended with $?: $(head -c 400 "$OUT/err")"; }
  has residual && { pavage bench "$artifact" --device cuda:0 --inputs "$DIR/$name.npz" --residual --json --iterations 20 --duration 0.3 2> "$OUT/err" | tr -d '\n' \
    | sed "s/^{/{\"model\":\"$name\",/" >> "$OUT/residual.jsonl"; echo >> "$OUT/residual.jsonl"; [ -s "$OUT/err" ] && echo "$name: $(head -c 300 "$OUT/err")"; }
  rm -f "$artifact"
done
has tune && for model in "$DIR"/*.onnx; do
  name=$(basename "$model" .onnx); lock=$OUT/$name.lock
  pavage tune "$model" --device cuda:0 --inputs "$DIR/$name.npz" --duration 2 -o "$lock" 2>&1 | tee -a "$OUT/tune.txt"
done
has residual && python3 - "$OUT/residual.jsonl" <<'PY'
import json, sys
print(f"{'model':24s} {'launches':>8s} {'measured us':>11s} {'predicted us':>12s} {'median':>7s} {'p10':>6s} {'p90':>6s}  (predicted / measured)")
for line in filter(str.strip, open(sys.argv[1])):
    r = json.loads(line)
    print(f"{r['model']:24s} {len(r['launches']):8d} {r['measured_us']:11.1f} {r['predicted_us']:12.1f} {r['median_ratio']:7.2f} {r['p10_ratio']:6.2f} {r['p90_ratio']:6.2f}")
PY
has arms && python3 - "$OUT/arms.jsonl" <<'PY'
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
