/* Tests of [CUDA-7] in ternary_cuda.cu. */

static void suite_cuda_int8()
{
}
