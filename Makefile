# Everything is built into build/. CC and CFLAGS may be given: make test CC=clang CFLAGS="-O3 -march=native"
CC      = cc
CFLAGS  = -O2
LDLIBS  = -pthread -lm
PREFIX  = /usr/local
HEADERS = ternary.h tests/test.h tests/amx.h

# CUDA: of CUDA_ARCHS what this nvcc knows, and PTX of the newest for GPUs to come. make cuda CUDA_ARCHS=90a NVCC=path
# Only code for sm_90a, not sm_90, has wgmma; both run on the same GPUs.
NVCC       = $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
NVCCFLAGS  = -O3 -std=c++17 -fmad=false
CUDA_ARCHS = 75 80 86 89 90a 100 120
known      = $(if $(NVCC),$(patsubst sm_%,%,$(shell $(NVCC) --list-gpu-code)))
archs      = $(filter $(CUDA_ARCHS),$(known) $(addsuffix a,$(filter 90,$(known))))
newest     = $(lastword $(filter $(CUDA_ARCHS:%a=%),$(known)))
gpus       = $(shell command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=compute_cap --format=csv,noheader)
native     = -arch=$(if $(filter 9.0,$(gpus)),$(if $(filter-out 9.0,$(gpus)),native,sm_90a),native)
fat        = -t 0 $(foreach arch,$(archs),-gencode arch=compute_$(arch),code=sm_$(arch)) -gencode arch=compute_$(newest),code=compute_$(newest)
sanitizer  = $(firstword $(shell command -v compute-sanitizer) $(wildcard $(dir $(NVCC))compute-sanitizer))

examples: build/quickstart build/image_classifier build/finetune build/language_model build/node_classifier build/npc_brain
demo: build/language_model          # trains a language model on TEXT (default: ternary.h), packs it, lets it write
	build/language_model $(if $(TEXT),--text "$(TEXT)") --out build
test:                               # all tests; the last line is "N passed, M failed"
	@CC="$(CC)" CFLAGS="$(CFLAGS)" LDLIBS="$(LDLIBS)" sh tests/run.sh $(ONLY)
bench: build/bench                  # the machine's limits, then each operation as a fraction of them
	build/bench
install:                            # the header and the source beside it
	mkdir -p "$(DESTDIR)$(PREFIX)/include" && cp ternary.h ternary_cuda.cu "$(DESTDIR)$(PREFIX)/include/"
clean:
	rm -rf build

cuda: build/ternary_cuda.o          # the CUDA backend for programs to link, for every architecture in one object
test-cuda: build/tests-cuda         # its tests on a GPU, then under compute-sanitizer where there is one
	build/tests-cuda $(ONLY)
	$(if $(sanitizer),$(sanitizer) --tool memcheck --error-exitcode 1 build/tests-cuda $(ONLY),@echo "skipped: no compute-sanitizer")
	$(if $(sanitizer),$(sanitizer) --tool racecheck --error-exitcode 1 build/tests-cuda $(ONLY))
bench-cuda: build/bench-cuda        # the GPU's limits, then each operation as a fraction of them
	build/bench-cuda

# The stricter checks. ONLY=part, here and for test, runs the tests whose names contain it.
sanitize: build/tests-asan build/tests-amx build/tests-emulated # addresses and undefined behaviour; AMX and CUDA in software
	build/tests-amx kernels && build/tests-asan $(ONLY) && build/tests-emulated $(ONLY)
tsan: build/tests-tsan              # data races; the tiers share what runs in threads, so three of them do
	TERNARY_ISA=avx2 build/tests-tsan $(ONLY)
msan: build/tests-msan              # uninitialised memory; needs clang
	build/tests-msan $(ONLY)
valgrind: build/tests-plain         # leaks and uninitialised memory, on the scalar tier
	TERNARY_ISA=scalar valgrind -q --leak-check=full --error-exitcode=1 build/tests-plain $(ONLY)
cross: build/tests-aarch64 build/tests-s390x        # the same bits on Arm and on big-endian, under qemu
	qemu-aarch64 build/tests-aarch64 $(ONLY) && qemu-s390x build/tests-s390x $(ONLY)
matrix:                             # every three switches in few builds, four language standards, gcc and clang
	sh tests/matrix.sh
fuzz: build/fuzz build/fuzz-seed    # damaged model files, from a sound one on, for SECONDS; needs clang
	mkdir -p build/fuzz-files && build/fuzz-seed > build/fuzz-files/seed
	build/fuzz build/fuzz-files -max_total_time=$(or $(SECONDS),60) -timeout=10 -rss_limit_mb=2048

build:
	mkdir -p build
compiler = $(CC)
build/train_mpi build/train_mpi_cuda: compiler = OMPI_CC="$(CC)" mpicc
build/%: examples/%.c ternary.h | build
	$(compiler) $(CFLAGS) -I. $< -o $@ $(LDLIBS)
# For --cuda: build/finetune_cuda and the like
build/%_cuda: examples/%.c build/ternary_cuda.o
	$(compiler) $(CFLAGS) -I. -DUSE_CUDA $^ -o $@ -L$(dir $(NVCC))../lib64 -lcudart_static -ldl -lrt -lstdc++ $(LDLIBS)
build/bench: bench/bench.c ternary.h | build
	$(CC) $(CFLAGS) -I. $< -o $@ $(LDLIBS) -ldl
build/ternary_cuda.o: ternary_cuda.cu ternary.h | build nvcc
	$(NVCC) $(NVCCFLAGS) $(fat) -c $< -o $@
build/tests-cuda: tests/cuda_tests.cpp $(wildcard tests/cuda*) ternary_cuda.cu ternary.h | build nvcc
	$(NVCC) $(NVCCFLAGS) $(native) -lineinfo -x cu $< -o $@
build/bench-cuda: bench/cuda.cu ternary_cuda.cu ternary.h | build nvcc
	$(NVCC) $(NVCCFLAGS) $(native) $< -o $@ -ldl
nvcc:
	@test -n "$(NVCC)" || { echo "no nvcc: install the CUDA Toolkit (12 or newer) and put its bin on the PATH, or say make NVCC=path"; exit 1; }
build/tests-plain:   TEST_CC = $(CC) $(CFLAGS) -g -DTEST_THREADS=3
build/tests-asan:    TEST_CC = $(CC) -O1 -g -DTEST_THREADS=3 -fsanitize=address,undefined -fno-sanitize-recover=all
build/tests-amx:     TEST_CC = $(CC) -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DTEST_AMX
build/tests-tsan:    TEST_CC = $(CC) -O1 -g -DTEST_THREADS=3 -fsanitize=thread
build/tests-msan:    TEST_CC = clang -O1 -g -DTEST_THREADS=3 -fsanitize=memory -fno-omit-frame-pointer
build/tests-aarch64: TEST_CC = aarch64-linux-gnu-gcc -O2 -DTEST_THREADS=3 -static
build/tests-s390x:   TEST_CC = s390x-linux-gnu-gcc -O2 -DTEST_THREADS=3 -static
build/tests-emulated: tests/cuda_tests.cpp $(wildcard tests/cuda*) ternary_cuda.cu ternary.h | build
	g++ -std=c++17 -O1 -g -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all -include tests/cuda.h -I. $< -o $@
build/tests-%: tests/tests.c $(wildcard tests/*.c) $(HEADERS) | build
	$(TEST_CC) -I. $< -o $@ $(LDLIBS)
# The reader of files knows no tiers, and without them this build takes a quarter of the time.
build/fuzz: tests/fuzz.c ternary.h | build
	clang -DFUZZER -DTERNARY_NO_SIMD -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. $< -o $@ $(LDLIBS)
build/fuzz-seed: tests/fuzz.c ternary.h | build
	$(CC) -DTERNARY_NO_SIMD -I. $< -o $@ $(LDLIBS)

.PHONY: examples demo test bench install clean cuda test-cuda bench-cuda nvcc sanitize tsan msan valgrind cross matrix fuzz
