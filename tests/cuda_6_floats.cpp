/* Tests of [CUDA-6] in ternary_cuda.cu. */

static void suite_cuda_floats()
{
}
