#!/usr/bin/env bash
# The whole chain on two cores: text -> shards -> a hybrid trained, killed, resumed -> Hugging Face.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run=runs/demo
corpus=corpora/stdlib
began=$SECONDS

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

say "1. Text becomes a tokenizer and shards (Python's standard library: real text, no download)"
rm -rf "$run" "$corpus"
mkdir -p corpora
show plait data tokenizer corpora/stdlib.model --corpus stdlib --vocab-size 4096
show plait data build "$corpus" --corpus stdlib --tokenizer corpora/stdlib.model

say "2. A hybrid of Mamba-2, attention, MLP and experts learns on two ranks, each with half of every sequence and of the experts"
printf '\033[2m$ plait launch local configs/demo.yaml parallel.sp=2 parallel.ep=2\033[0m\n'
plait launch local configs/demo.yaml parallel.sp=2 parallel.ep=2 &
launcher=$!
until [ -f "$run/metrics.jsonl" ] && [ "$(wc -l <"$run/metrics.jsonl")" -ge 90 ]; do
    kill -0 "$launcher" 2>/dev/null || { wait "$launcher"; exit 1; }
    sleep 0.2
done
# The first word of the run's lock is the process of rank 0.
kill -9 "$(cut -d ' ' -f 1 "$run/.lock")"
say "3. A rank was killed: all start again from the last whole checkpoint, and go on to the bit"
wait "$launcher"

say "4. The loss curve, how even the experts are, and the export to Hugging Face's format"
show plait plot "$run"
show plait plot "$run" --metric max_violation
show plait export "$run" "$run/hf"

say "5. transformers reads the export and goes on writing"
python - "$run" "$corpus" <<'PYTHON'
import json, sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
run, corpus = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(run / "hf")
model = AutoModelForCausalLM.from_pretrained(run / "hf")
prompt = tokenizer("class Reader:\n    def __init__(self, ", return_tensors="pt")
text = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
print("\033[36m" + tokenizer.decode(text[0], skip_special_tokens=True) + "\033[0m")

entropy = json.loads((corpus / "manifest.json").read_text())["unigram_entropy"]
records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
losses = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
loss = losses[max(losses)]
print(f"\nunigram entropy  {entropy:.3f} nats a token: what knowing the tokens' frequencies gives")
print(f"validation loss  {loss:.3f} nats a token: {1 - loss / entropy:.0%} below it")
PYTHON

say "Done in $((SECONDS - began)) s"
cat <<NEXT
  loss curve     $run/loss.png
  balance        $run/max_violation.png (0 is even; 1: the fullest expert has twice the mean)
  TensorBoard    .venv/bin/tensorboard --logdir $run/tensorboard
  the model      $run/hf  (AutoModelForCausalLM.from_pretrained)
  the run        $run     (config.yaml, metrics.jsonl, checkpoints/)
Next: your own text (.venv/bin/plait data build --help), a longer run
(.venv/bin/plait train configs/demo.yaml run.dir=runs/longer train.steps=3000), or docs/.
NEXT
