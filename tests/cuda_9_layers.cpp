/* Tests of [CUDA-9] in ternary_cuda.cu. */

static void suite_cuda_layers()
{
}
