#pragma once

#include <pybind11/pybind11.h>

namespace eigenfilter {

void register_isa(pybind11::module_& module);

}  // namespace eigenfilter
