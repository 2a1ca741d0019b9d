#!/usr/bin/env bash
# The kernels' tests, watched: by AddressSanitizer and UndefinedBehaviorSanitizer, then by ThreadSanitizer.
#
#     native/sanitize.sh python folder
#
# Builds the module twice into `folder`, each time beside a copy of the package, which is what the tests import.
# A report ends the process that it is about, and makes this script fail. Wants g++ and its sanitizers.
set -euo pipefail
python=$(realpath --no-symlinks "$1")
folder=$(realpath --canonicalize-missing "$2")
cd "$(dirname "$0")/.."
PATH=$(dirname "$python"):$PATH
packages=$("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("site-packages")), sep=":")')

library() { g++ -print-file-name="$1"; }

build() {  # sanitizers, folder
  cmake -S native -B "$2/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_COMPILER=g++ -DPython_EXECUTABLE="$python" -DWKV_SANITIZE="$1"
  cmake --build "$2/build"
  rm -rf "$2/site"
  mkdir "$2/site"
  cp -r src/wkv "$2/site/wkv"
  rm -f "$2"/site/wkv/_native*.so
  cmake --install "$2/build" --prefix "$2/site"
}

# The Python itself is not watched, so the sanitizer's library is loaded ahead of all others. -S: no finder of an
# editable installation, which would come before PYTHONPATH. Tests ask for one thread, mostly: three see more.
run_tests() {  # folder, libraries, arguments of pytest
  PYTHONPATH=$1/site:$packages LD_PRELOAD=$2 "$python" -S - "$1" -q -p no:cacheprovider --capture=sys "${@:3}" <<< '
import sys
import pytest
import wkv._native as module
from wkv.ops import native
assert module.__file__.startswith(sys.argv[1]), f"not the watched module: {module.__file__}"
asked = native.threads
native.threads = lambda: max(3, asked())
sys.exit(pytest.main(sys.argv[2:]))'
}

mkdir -p "$folder"
for kind in address,undefined thread; do
  echo "building for -fsanitize=$kind"
  build "$kind" "$folder/$kind" > "$folder/$kind.log" 2>&1 || { cat "$folder/$kind.log"; exit 1; }
done

# Python and torch leave memory behind on purpose. libstdc++: where __cxa_throw is looked for.
echo "bounds, lifetimes and undefined behaviour"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
run_tests "$folder/address,undefined" "$(library libasan.so) $(library libstdc++.so)" \
  tests/test_compiled.py tests/test_quantized.py tests/test_ops.py tests/test_time_mix.py -k "compiled_form or not (bits_depend or test_ops)"

# What torch's own threads do is none of our business, and their locks cannot be seen. Without the tests that
# fork: this sanitizer knows no threads in a child.
echo "races"
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1"
run_tests "$folder/thread" "$(library libtsan.so)" tests/test_compiled.py tests/test_quantized.py tests/test_ops.py \
  tests/test_engine_faults.py -k "any_number_of_threads or longer_than or meets_a_zero or slot or every_output or more_sequences or products_of \
    or take_turns or those_of_the_stored or ctrl_c or looks_for_signals"
