#!/usr/bin/env bash
# All GPU checks and measurements in one go, on a machine with an NVIDIA GPU, its driver and Python with PyTorch:
#
#   scripts/gpu/run.sh DIR [PART...]      parts: models hopper whole nodes (default: all)
#
# DIR is what scripts/gpu/prepare.sh makes where the compiler is: the runtime-only program, artifacts, cases and PTX.
# The node tests take some 12 minutes with both plans: PART=1/2 and PART=2/2 run half of them each.
# Results as JSON lines go to $OUT (default: DIR/out); a table comes last.
set -u
DIR=$(cd "$1" && pwd); shift
OUT=${OUT:-$DIR/out}; mkdir -p "$OUT"
HERE=$(cd "$(dirname "$0")" && pwd)
PARTS=${*:-models hopper whole nodes}
case " $PARTS " in *" models "*)
  for packed in "$DIR"/artifacts/*.pav.xz; do [ -e "$packed" ] && xz -dkf "$packed"; done
  : > "$OUT/models.jsonl"
  for artifact in "$DIR"/artifacts/*.pav; do
    name=$(basename "$artifact" .pav)
    for plan in fused unfused; do
      timeout 60 "$DIR/embed" "$artifact" "$DIR/cases/$name.npz" cuda:0 $plan 100 >> "$OUT/models.jsonl" 2> "$OUT/err" \
        || printf '{"model":"%s","plan":"%s","error":"%s"}\n' "$name" $plan "$(tr '\n"\\' '   ' < "$OUT/err" | cut -c1-600)" >> "$OUT/models.jsonl"
    done
  done;;
esac
case " $PARTS " in *" hopper "*)
  timeout 420 python3 "$HERE/check_hopper.py" "$DIR" all > "$OUT/hopper.txt" 2>&1 || echo "check_hopper.py ended with $?" >> "$OUT/hopper.txt"
  grep -E "WRONG|HANG|TIME|ended with" "$OUT/hopper.txt";;
esac
case " $PARTS " in *" whole "*) OUT=$OUT timeout 300 python3 "$HERE/whole_path.py" "$DIR" 2>&1 | tee "$OUT/whole_path.txt";; esac
case " $PARTS " in *" nodes "*)
  [ -e "$DIR/nodes.bin.xz" ] && xz -dkf "$DIR/nodes.bin.xz"
  timeout 540 "$DIR/nodes" "$DIR" cuda:0 "$OUT/nodes.jsonl" "${WORKERS:-14}" "${PART:-1/1}" > "$OUT/nodes.txt" 2>&1 || echo "nodes ended with $?" >> "$OUT/nodes.txt"
  tail -n "${LINES_SHOWN:-60}" "$OUT/nodes.txt";;
esac
[ -e "$OUT/models.jsonl" ] && python3 - "$OUT/models.jsonl" <<'PY'
import json, sys
print(f"{'model':28s} {'plan':8s} {'kernels':>7s} {'p50 ms':>9s} {'beyond':>7s} top1  max abs")
for line in open(sys.argv[1]):
    r = json.loads(line); name = r["model"].split("/")[-1].removesuffix(".pav")
    if "error" in r: print(f"{name:28s} {r['plan']:8s} ERROR {r['error'][:150]}"); continue
    o = r["outputs"].values()
    print(f"{name:28s} {r['plan']:8s} {r['kernels']:7d} {r['median_ms']:9.3f} {sum(x['beyond'] for x in o):7d} {str(all(x['top1'] for x in o)):5s} {max(x['max_abs'] for x in o):.2e}")
PY
rm -f "$OUT/err"
