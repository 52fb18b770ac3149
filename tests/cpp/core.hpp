// What the tests of vectors include: the kernels' SIMD types, and the rules and the rounding that
// they share with CUDA. The order is that of loops.cpp: templates see the functions of vectors.
#pragma once

#include "simd.hpp"
//
#include "core/rounding.hpp"
#include "core/rules.hpp"

// The hyperparameters of the rules, whose fields the tests set by name.
using PerturbOptions = eigenfilter::PerturbScalars<double>;
using PerturbHvpOptions = eigenfilter::PerturbHvpScalars<double>;
using SgdStepOptions = eigenfilter::SgdStepScalars<double>;
using AdamWStepOptions = eigenfilter::AdamWStepScalars<double>;
