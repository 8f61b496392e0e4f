/* All tests in one program: `tests [part of a name]`. One file per room of ternary.h, in its order. */
#define _DEFAULT_SOURCE /* setenv and the like under -std=c99 */
#define TERNARY_IMPLEMENTATION
#define TERN__TASK_COST 1000
#define TERN__INTEGER_PART 2048
#define TERN__CACHE 300
#define TERN__HOP_ROWS 3
#define TERN__HOP_TURNS 1
#define TERN__HOP_SHARE 2
#define TERN__MOE_PART 8
#include "amx.h"
#include "../ternary.h"
#include "test.h"

#define SUITES(X) \
    X(platform)   \
    X(memory)     \
    X(numbers)    \
    X(ternarize)  \
    X(pack)       \
    X(activations) \
    X(kernels)    \
    X(backends)   \
    X(bitlinear)  \
    X(embedding)  \
    X(moe)        \
    X(graph)      \
    X(optimizers) \
    X(true_ternary) \
    X(files)      \
    X(selftest)

#define SUITE(name) static void suite_##name(void);
SUITES(SUITE)
#undef SUITE

#include "04_platform.c"
#include "05_memory.c"
#include "06_numbers.c"
#include "07_ternarize.c"
#include "08_pack.c"
#include "09_activations.c"
#include "10_kernels.c"
#include "14_backends.c"
#include "15_bitlinear.c"
#include "16_embedding.c"
#include "17_moe.c"
#include "18_graph.c"
#include "19_optimizers.c"
#include "20_true_ternary.c"
#include "21_files.c"
#include "22_selftest.c"

int main(int argc, char **argv)
{
    int i;
    test_only = argc > 1 ? argv[1] : NULL;
    printf("numbers of threads compared:");
    for (i = 0; i < TEST_THREAD_COUNTS; i++) printf(" %d", (int)test_threads[i]);
    printf("\n");
#define SUITE(name) printf("-- %s\n", #name); suite_##name();
    SUITES(SUITE)
#undef SUITE
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}
