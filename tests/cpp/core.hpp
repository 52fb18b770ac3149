// What the tests of vectors include: the kernels' SIMD types, and the rules and the rounding that
// they share with CUDA. The order is that of loops.cpp: templates see the functions of vectors.
#pragma once

#include "simd.hpp"
//
#include "eigenfilter/rounding.hpp"
#include "eigenfilter/rules.hpp"
