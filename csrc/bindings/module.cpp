// A table of contents.
#include <pybind11/pybind11.h>

namespace eigenfilter {
void register_isa(pybind11::module_& module);          // isa.cpp
void register_ops(pybind11::module_& module);          // ops.cpp
void register_param_lists(pybind11::module_& module);  // param_lists.cpp
void register_tensor_args(pybind11::module_& module);  // tensor_args.cpp
}  // namespace eigenfilter

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled core of eigenfilter.";
    eigenfilter::register_tensor_args(module);
    eigenfilter::register_isa(module);
    eigenfilter::register_ops(module);
    eigenfilter::register_param_lists(module);
}
