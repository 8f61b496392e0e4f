/* Tests of [CUDA-2] in ternary_cuda.cu. */

static void suite_cuda_device()
{
}
