/* Tests of [CUDA-5] in ternary_cuda.cu. */

static void suite_cuda_trits()
{
}
