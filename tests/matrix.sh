#!/bin/sh
# The compile matrix: warnings are errors, and every build of units.c must still give the right bits.
#   matrix.sh           the cases below, on JOBS lanes
#   matrix.sh cases     lists them
#   matrix.sh one N FILE COMPILER...      case N
# Covered, in few builds:
# - switches, at -O0: sets drawn (SEED) until every three of them have met in each of their eight states, and each compiler has
#   met each switch on and off. A tier's switch counts where the tier would be there. Besides: each switch alone, and all.
# - optimisation: each compiler at -O0, and -O1 to -O3 under the one or the other standard, for the warnings that only they find.
# - programs at -O2 on the scalar tier, since the others' code is that of units.c. .ci/run builds tests.c with these warnings.
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
# SWITCH>OTHER,...: with the switch the others decide nothing
switches="TERNARY_NO_SIMD>TERNARY_NO_SSE41,TERNARY_NO_AVX2,TERNARY_NO_AVX_VNNI,TERNARY_NO_AVX512_VNNI,\
TERNARY_NO_AVX512_VBMI,TERNARY_NO_AMX_INT8
TERNARY_NO_AVX512_VNNI>TERNARY_NO_AVX512_VBMI,TERNARY_NO_AMX_INT8 TERNARY_NO_AVX512_VBMI>TERNARY_NO_AMX_INT8 TERNARY_NO_AMX_INT8
TERNARY_NO_SSE41 TERNARY_NO_AVX2 TERNARY_NO_AVX_VNNI TERNARY_STATIC TERNARY_NO_STDIO TERNARY_NO_THREADS
TERNARY_MALLOC=malloc;-DTERNARY_FREE=free;-include;stdlib.h TERNARY_ASSERT=assert;-include;assert.h
TERNARY_NO_TRAINING TERNARY_NO_MOE TERNARY_NO_GRAPH TERNARY_NO_FILES TERNARY_USE_CBLAS"
seed=${SEED:-$(date +%Y%m%d)}

# A set is a state (0, 1) of each switch. Each begins with what has not been met yet; of some such sets the best is taken.
switch_sets() {
    echo $switches | tr ' ' '\n' | awk -v compilers="$(echo $compilers)" -v seed="$seed" '
        { split($0, part, ">"); name[++n] = part[1]; hides[n] = "," part[2] ","; define[n] = " -D" part[1] }
        function seen(i, set, m) {
            for (m = 1; m <= n; m++) if (set[m] && hidden[m, i]) return 0
            return 1
        }
        # How much of a set is new; with `take` it is met from now on.
        function news(set, take, i, j, k, found, list, count, key) {
            for (i = 1; i <= n; i++) if (seen(i, set)) list[++count] = i
            for (i = 1; i <= count; i++) {
                key = turn SUBSEP list[i] SUBSEP set[list[i]]
                if (key in open) { found += 10; if (take) { delete open[key]; left-- } }
                for (j = i + 1; j <= count; j++) for (k = j + 1; k <= count; k++) {
                    key = list[i] SUBSEP list[j] SUBSEP list[k] SUBSEP set[list[i]] set[list[j]] set[list[k]]
                    if (key in open) { found++; if (take) { delete open[key]; left-- } }
                }
            }
            return found + 0
        }
        function draw(set, i, key, p, count) {
            for (i = 1; i <= n; i++) set[i] = rand() < (hides[i] == ",," ? 0.5 : 0.25)
            for (key in open) {
                count = split(key, p, SUBSEP)
                if (count == 3 && p[1] != turn) continue
                if (count == 3) force(set, p[2], p[3])
                else for (i = 1; i <= 3; i++) force(set, p[i], substr(p[4], i, 1))
                return
            }
        }
        function force(set, i, state, m) { set[i] = state + 0; for (m = 1; m <= n; m++) if (hidden[m, i]) set[m] = 0 }
        function emit(set, i, text) {
            for (i = 1; i <= n; i++) if (set[i]) text = text define[i]
            print "tests/units.c", compiler[turn], "-O0 -DTERNARY_IMPLEMENTATION" text
        }
        END {
            compilers = split(compilers, compiler, " ")
            srand(seed)
            for (m = 1; m <= n; m++) for (i = 1; i <= n; i++) if (index(hides[m], "," name[i] ",")) hidden[m, i] = 1
            for (i = 1; i <= n; i++) for (turn = 1; turn <= compilers; turn++) for (state = 0; state < 2; state++) {
                open[turn, i, state]
                left++
            }
            for (i = 1; i <= n; i++) for (j = i + 1; j <= n; j++) for (k = j + 1; k <= n; k++) for (s = 0; s < 8; s++) {
                a = s % 2; b = int(s / 2) % 2; c = int(s / 4)
                if (a && (hidden[i, j] || hidden[i, k]) || b && (hidden[j, i] || hidden[j, k]) ||
                    c && (hidden[k, i] || hidden[k, j])) continue
                open[i, j, k, a b c]
                left++
            }
            for (turn = 1; left; turn = turn % compilers + 1) {
                best = -1
                for (try = 0; try < 30; try++) {
                    draw(set)
                    got = news(set, 0)
                    if (got > best) { best = got; for (i = 1; i <= n; i++) kept[i] = set[i] }
                }
                if (news(kept, 1)) emit(kept)
            }
        }'
}

cases() {
    for compiler in $compilers; do echo "tests/units.c $compiler -O0 -DTERNARY_IMPLEMENTATION"; done
    set -- $compilers
    for build in "$1;-O2" "$6;-O2" "$7;-O2" "$4;-O2" "$5;-O1" "$8;-O1" "$2;-O3;-march=native" "$3;-O3;-march=native"; do
        echo "tests/units.c $build -DTERNARY_IMPLEMENTATION"
    done
    all=
    for switch in $switches; do
        echo "tests/units.c $1 -O0 -DTERNARY_IMPLEMENTATION -D${switch%>*}"
        all="$all -D${switch%>*}"
        set -- "$2" "$3" "$4" "$5" "$6" "$7" "$8" "$1"
    done
    for compiler in "$1" "$2" "$3" "$4"; do echo "tests/units.c $compiler -O0 -DTERNARY_IMPLEMENTATION$all"; done
    switch_sets
    for compiler in gcc clang; do
        for file in bench/bench.c examples/*.c; do
            [ $file = examples/train_mpi.c ] || { echo "$file $compiler -O2 -DTERNARY_NO_SIMD"; continue; }
            ! command -v mpicc > /dev/null || echo "$file env OMPI_CC=$compiler mpicc -O2 -DTERNARY_NO_SIMD"
        done
        echo "tests/tests.c $compiler -O0 -DTEST_AMX"
    done
    for compiler in g++ clang++; do echo "tests/cuda_emulator.cpp $compiler -std=c++17 -O1 -include tests/cuda.h"; done
}

if [ "${1-}" = cases ]; then
    cases | tr ';' ' '
    exit
fi
rm -rf $out
mkdir -p $out
echo "sets of switches: SEED=$seed"
cases | tr ';' ' ' | awk '{ print NR, $0 }' > $out/cases
xargs -P "${JOBS:-2}" -L 1 sh tests/matrix.sh one < $out/cases > $out/results
grep -v '^ok$' $out/results
passed=$(grep -c '^ok$' $out/results)
failed=$(($(wc -l < $out/cases) - passed))
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
