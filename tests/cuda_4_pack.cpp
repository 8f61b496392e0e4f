/* Tests of [CUDA-4] in ternary_cuda.cu. */

static void suite_cuda_pack()
{
}
