#!/bin/sh
# The compile matrix: warnings are errors, and every build of units.c must still give the right bits.
#   matrix.sh           compilers x standards x optimisation, compilers x switches, every pair of switches, random sets (SEED)
#   matrix.sh one N FILE COMPILER...      case N
set -u
cd "$(dirname "$0")/.." || exit 1
out=build/matrix
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wcast-align -Werror"

if [ "${1-}" = one ]; then
    number=$2 file=$3
    shift 3
    if "$@" $warnings -I. "$file" -o $out/"$number" -pthread -lm -ldl > $out/"$number".log 2>&1 &&
       { [ "$file" != tests/units.c ] || $out/"$number" >> $out/"$number".log 2>&1; }
    then echo ok
    else echo "FAIL $* $file"; sed 's/^/  /' $out/"$number".log
    fi
    rm -f $out/"$number"
    exit
fi

compilers="gcc;-std=c99 g++;-std=c++11 clang;-std=c99 clang++;-xc++;-std=c++11
gcc;-std=c11 g++;-std=c++17 clang;-std=c11 clang++;-xc++;-std=c++17"
switches="TERNARY_STATIC TERNARY_NO_STDIO TERNARY_NO_THREADS TERNARY_NO_SIMD TERNARY_NO_SSE41 TERNARY_NO_AVX2 TERNARY_NO_AVX_VNNI TERNARY_NO_AVX512_VNNI TERNARY_NO_AVX512_VBMI TERNARY_NO_AMX_INT8
TERNARY_MALLOC=malloc;-DTERNARY_FREE=free;-include;stdlib.h TERNARY_ASSERT=assert;-include;assert.h
TERNARY_NO_TRAINING TERNARY_NO_FILES"
seed=${SEED:-$(date +%Y%m%d)} turn=first

cases() {
    for compiler in $compilers; do
        for level in -O0 -O1 -O2 "-O3;-march=native"; do echo "tests/units.c $compiler $level -DTERNARY_IMPLEMENTATION"; done
    done
    # A switch meets each compiler under the one or the other standard; pairs and sets take the compilers in turn.
    set -- $compilers
    for switch in $switches; do
        case $turn in first) turn=second four="$5 $2 $7 $4" ;; *) turn=first four="$1 $6 $3 $8" ;; esac
        for compiler in $four; do echo "tests/units.c $compiler -DTERNARY_IMPLEMENTATION -D$switch"; done
    done
    echo $switches | tr ' ' '\n' | awk -v compilers="$(echo $compilers)" -v seed="$seed" '
        { s[++n] = " -D" $0 }
        function emit(set) { print "tests/units.c", compiler[turn++ % count + 1], "-DTERNARY_IMPLEMENTATION" set }
        END {
            count = split(compilers, compiler, " ")
            srand(seed)
            for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) emit(s[i] s[j])
            for (k = 0; k < 16; k++) {
                set = ""
                for (i = 1; i <= n; i++) if (rand() < 0.5) set = set s[i]
                emit(set)
            }
            for (i = 1; i <= n; i++) all = all s[i]
            for (k = 0; k < count; k++) emit(all)
        }'
    for compiler in gcc clang; do
        for file in tests/tests.c bench/bench.c examples/*.c; do
            [ $file = examples/train_mpi.c ] || { echo "$file $compiler -O2"; continue; }
            ! command -v mpicc > /dev/null || echo "$file env OMPI_CC=$compiler mpicc -O2"
        done
        echo "tests/tests.c $compiler -O2 -DTEST_AMX"
    done
    for compiler in g++ clang++; do echo "tests/cuda_emulator.cpp $compiler -std=c++17 -O1 -include tests/cuda.h"; done
}

rm -rf $out
mkdir -p $out
echo "random sets of switches: SEED=$seed"
cases | tr ';' ' ' | awk '{ print NR, $0 }' > $out/cases
xargs -P "${JOBS:-2}" -L 1 sh tests/matrix.sh one < $out/cases > $out/results
grep -v '^ok$' $out/results
passed=$(grep -c '^ok$' $out/results)
failed=$(($(wc -l < $out/cases) - passed))
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
