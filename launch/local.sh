#!/usr/bin/env bash
# SkySense end to end on this machine: environment, synthetic rasters, records, pretraining, evaluation, export.
#   ./launch/local.sh [WORKDIR]        WORKDIR: ./workdir by default. Run it again to
#                                      continue, or to hear that it is done.
# PYTHON and VENV as in launch/setup.sh. CONFIG: the configuration (configs/skysense_smoke.py). PLACES: how many to
# render (320).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir=${1:-$root/workdir}
config=${CONFIG:-$root/configs/skysense_smoke.py}
places=${PLACES:-320}

"$root/launch/setup.sh"
cli=${VENV:-$root/.venv}/bin/skysense-jax
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
started=$SECONDS
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# Compiled programs are kept, so that a second start does not compile again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/compile_cache}

# What a workdir was begun with stays: another size or configuration belongs in another folder.
asked="config=$(basename "$config") places=$places"
if [ -f "$workdir/asked" ] && [ "$(cat "$workdir/asked")" != "$asked" ]; then
    echo "local: $workdir was begun with '$(cat "$workdir/asked")', now asked '$asked'; give another WORKDIR" >&2
    exit 78
fi
echo "$asked" > "$workdir/asked"

say() { printf '\n== %s  [%d s]\n' "$1" $((SECONDS - started)); }

say "1/6 synthetic rasters: $places places as GeoTIFFs and a catalog"
[ -f "$workdir/rasters/catalog.csv" ] && echo "already rendered: $workdir/rasters/catalog.csv" || \
    "$cli" data synth --places "$places" --out "$workdir/rasters"  # the catalog is written last
say "2/6 GeoTIFFs -> records (TFDS, ArrayRecord)"
"$cli" data build --catalog "$workdir/rasters/catalog.csv" --out "$workdir/data"
say "3/6 per-band statistics"
"$cli" data stats "$workdir/data"
say "4/6 pretraining ($(basename "$config"))"
"$cli" train --config "$config" --workdir "$workdir/run" --config.data.dir="$workdir/data" || {
    code=$?; echo "local: training stopped with code $code; run the same command again to continue" >&2; exit $code; }
say "5/6 evaluation: frozen features beside two baselines"
[ -f "$workdir/eval.json" ] && echo "already evaluated: $workdir/eval.json" || \
    "$cli" eval "$workdir/run" --data "$workdir/data" --out "$workdir/eval.json"
say "6/6 weights for PyTorch"
[ -f "$workdir/export/model.safetensors" ] && echo "already exported: $workdir/export" || \
    "$cli" export-torch "$workdir/run" --out "$workdir/export"

say "done"
cat <<EOF
workdir    $workdir
rasters    $workdir/rasters        (SYNTHETIC GeoTIFFs, catalog.csv)
records    $workdir/data           skysense-jax inspect $workdir/data
run        $workdir/run            metrics.jsonl, TensorBoard, checkpoints
evaluation $workdir/eval.json
weights    $workdir/export         model.safetensors, config.json, modeling_skysense.py
EOF
