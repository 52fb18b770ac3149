#!/usr/bin/env bash
# run.sh SANITIZER ARGUMENT...: python with the emulated extension, none, address or thread sanitized.
# A sanitizer has to be there before anything else; the thread sanitizer wants plain addresses, too.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$root/.venv/bin/python
sanitizer=$1
shift
export EIGENFILTER_TEST_BACKEND=emulated OMP_NUM_THREADS=1
case $sanitizer in
none)
    exec "$python" "$@"
    ;;
address)
    export EIGENFILTER_TEST_BACKEND=emulated-address
    # Python keeps what it allocates; the emulator says where a wrong access was.
    export ASAN_OPTIONS=detect_leaks=0:handle_segv=0:log_path=stderr
    export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    exec "$python" "$@"
    ;;
thread)
    export EIGENFILTER_TEST_BACKEND=emulated-thread
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 suppressions=$root/tests/cuda_on_cpu/suppressions.txt"
    LD_PRELOAD=$(gcc -print-file-name=libtsan.so) exec setarch -R "$python" "$@"
    ;;
*)
    echo "run.sh: the sanitizer is none, address or thread" >&2
    exit 2
    ;;
esac
