// A table of contents.
#include <pybind11/pybind11.h>

#include "isa.hpp"
#include "kernels.hpp"
#include "operands.hpp"
#include "parameters.hpp"

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled core of eigenfilter.";
    eigenfilter::register_operands(module);
    eigenfilter::register_isa(module);
    eigenfilter::register_kernels(module);
    eigenfilter::register_parameters(module);
}
