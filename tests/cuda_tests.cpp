/* The tests of ternary_cuda.cu, against the scalar tier of ternary.h, byte by byte.
     g++ -std=c++17 -O1 -g -include tests/cuda.h tests/cuda_tests.cpp                  (on the emulator; also with -fsanitize=address)
     nvcc -std=c++17 -O3 -arch=native -fmad=false -x cu tests/cuda_tests.cpp           (on a device)
   A word on the command line selects tests by their names. */
#include "cuda_test.h"

#include "cuda_1_wrappers.cpp"
#include "cuda_2_device.cpp"
#include "cuda_4_pack.cpp"
#include "cuda_5_trits.cpp"
#include "cuda_6_floats.cpp"
#include "cuda_7_int8.cpp"
#include "cuda_8_elements.cpp"
#include "cuda_8_training.cpp"
#include "cuda_8_sparse.cpp"
#include "cuda_9_layers.cpp"
#include "cuda_9_rooms.cpp"
#include "cuda_faults.cpp"

int main(int argc, char **argv)
{
    if (argc > 1) test_filter = argv[1];
    suite_cuda_wrappers();
    suite_cuda_device();
    suite_cuda_pack();
    suite_cuda_trits();
    suite_cuda_floats();
    suite_cuda_int8();
    suite_cuda_elements();
    suite_cuda_training();
    suite_cuda_sparse();
    suite_cuda_layers();
    suite_cuda_rooms();
    suite_cuda_faults();
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed != 0;
}
