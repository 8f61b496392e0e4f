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
echo "$passed passed, 0 failed"
