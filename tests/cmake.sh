#!/bin/sh
# A scratch project finds the library in each of the three ways that CMake users know, and runs it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/cmake
version=$(sed -n 's|^#define TERN_VERSION [0-9]* /\* \(.*\) \*/|\1|p' "$root/ternary.h")
rm -rf "$work"
mkdir -p "$work/project"

cmake -S "$root" -B "$work/library" -DCMAKE_INSTALL_PREFIX="$work/prefix"
cmake --install "$work/library"

cat > "$work/project/CMakeLists.txt" <<EOF
cmake_minimum_required(VERSION 3.14)
project(scratch LANGUAGES C)
if(WAY STREQUAL "add_subdirectory")
    add_subdirectory($root ternary)
elseif(WAY STREQUAL "FetchContent")
    include(FetchContent)
    FetchContent_Declare(ternary SOURCE_DIR $root)
    FetchContent_MakeAvailable(ternary)
else()
    find_package(ternary $version EXACT REQUIRED)
endif()
add_executable(scratch $root/tests/units.c)
target_compile_definitions(scratch PRIVATE TERNARY_IMPLEMENTATION)
target_link_libraries(scratch PRIVATE ternary::ternary)
EOF
passed=0
for way in add_subdirectory FetchContent find_package; do
    cmake -S "$work/project" -B "$work/$way" -DWAY=$way -DCMAKE_PREFIX_PATH="$work/prefix"
    cmake --build "$work/$way"
    "$work/$way/scratch"
    passed=$((passed + 1))
done

# The CUDA backend, where there is an nvcc: a program in C finds its library, and a GPU or an error that says there is none.
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null || true)
if [ -n "$nvcc" ]; then
    CUDACXX=$nvcc cmake -S "$root" -B "$work/library_cuda" -DTERNARY_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=80 \
        -DCMAKE_INSTALL_PREFIX="$work/prefix_cuda"
    cmake --build "$work/library_cuda"
    cmake --install "$work/library_cuda"
    mkdir "$work/project_cuda"
    cat > "$work/project_cuda/CMakeLists.txt" <<EOF
cmake_minimum_required(VERSION 3.14)
project(scratch LANGUAGES C)
find_package(ternary $version EXACT REQUIRED)
add_executable(scratch scratch.c)
target_link_libraries(scratch PRIVATE ternary::cuda)
EOF
    cat > "$work/project_cuda/scratch.c" <<'EOF'
#define TERNARY_IMPLEMENTATION
#include <ternary.h>
#include <stdio.h>
int main(void)
{
    tern_context_desc desc = {.backend = tern_cuda_backend(0)};
    tern_context *c = NULL;
    tern_error e;
    const tern_result result = tern_open(&c, &desc, &e);
    puts(result == TERN_OK ? tern_backend_name(c) : e.text);
    tern_close(c);
    return result != TERN_OK && result != TERN_E_DEVICE;
}
EOF
    cmake -S "$work/project_cuda" -B "$work/find_cuda" -DCMAKE_PREFIX_PATH="$work/prefix_cuda"
    cmake --build "$work/find_cuda"
    "$work/find_cuda/scratch"
    passed=$((passed + 1))
else
    echo "skipped: no nvcc"
fi
echo "$passed passed, 0 failed"
