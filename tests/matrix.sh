#!/bin/sh
# The compile matrix: warnings are errors, and every program built must still give the right bits.
#   matrix.sh          compilers x standards x optimisation, every switch, pair of switches, 16 random sets (SEED)
#   matrix.sh one ...  one case: compiler and options, run when it builds for this machine
set -u
cd "$(dirname "$0")/.." || exit 1
out=build/matrix
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wcast-align -Werror"

if [ "${1-}" = one ]; then
    number=$2
    shift 2
    case $1 in *++) language="-x c++";; *) language="-x c";; esac
    file=tests/units.c
    for word in "$@"; do case $word in *.c) file=$word; language=;; esac; done
    [ -z "$language" ] || set -- "$@" $language $file -x none
    if "$@" $warnings -I. -DTERNARY_IMPLEMENTATION -pthread -o $out/$number -lm > $out/$number.log 2>&1 &&
       { [ $file != tests/units.c ] || $out/$number >> $out/$number.log 2>&1; }
    then echo ok >> $out/results
    else echo FAIL >> $out/results; echo "FAIL $*"; sed 's/^/  /' $out/$number.log
    fi
    rm -f $out/$number
    exit
fi

switches="TERNARY_STATIC TERNARY_NO_STDIO TERNARY_NO_THREADS TERNARY_NO_SIMD TERNARY_NO_AVX2 TERNARY_NO_AVX512_VNNI
TERNARY_MALLOC=malloc;-DTERNARY_FREE=free;-includestdlib.h TERNARY_ASSERT=assert;-includeassert.h TERNARY_NO_TRAINING TERNARY_NO_FILES"
standards="gcc;-std=c99 gcc;-std=c11 g++;-std=c++11 g++;-std=c++17 clang;-std=c99 clang;-std=c11 clang++;-std=c++11 clang++;-std=c++17"
seed=${SEED:-$(date +%Y%m%d)}

cases() {
    for compiler in $standards; do
        for level in -O0 -O1 -O2 "-O3;-march=native"; do echo "$compiler $level"; done
        for switch in $switches; do echo "$compiler -O0 -D$switch"; done
    done
    # Pairs and sets take the compilers in turn.
    echo "$switches" | tr ' \n' '\n\n' | awk -v compilers="$standards" -v seed="$seed" '
        { s[++n] = $0 }
        function emit(set) { print compiler[turn++ % count + 1] " -O0" set }
        END {
            count = split(compilers, compiler, " ")
            for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) emit(" -D" s[i] " -D" s[j])
            srand(seed)
            for (k = 0; k < 16; k++) {
                set = ""
                for (i = 1; i <= n; i++) if (rand() < 0.5) set = set " -D" s[i]
                emit(set)
            }
            set = ""
            for (i = 1; i <= n; i++) set = set " -D" s[i]
            emit(set)
        }'
    for compiler in gcc clang; do
        for file in tests/tests.c bench/bench.c examples/*.c; do echo "$compiler -O2 $file"; done
    done
}

rm -rf $out
mkdir -p $out
cases | tr ';' ' ' | awk '{ print NR, $0 }' > $out/cases
echo "random sets of switches: SEED=$seed"
xargs -P "${JOBS:-2}" -L 1 sh tests/matrix.sh one < $out/cases
passed=$(grep -c ok $out/results)
failed=$(($(wc -l < $out/cases) - passed))
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
