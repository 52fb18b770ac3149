// Which instruction set the CPU kernels use.
#include "isa.hpp"

#include "../cpu/loops.hpp"

namespace eigenfilter {
namespace {

namespace py = pybind11;

py::list isas() {
    const cpu::Loops* found[3];
    py::list names;
    for (int i = 0, count = cpu::available(found); i < count; ++i) names.append(found[i]->isa);
    return names;
}

void set_isa(const std::string& name) {
    if (!cpu::set_isa(name.c_str()))
        throw py::value_error("this CPU has no kernels for \"" + name + "\": see isas()");
}

}  // namespace

void register_isa(py::module_& module) {
    module.def("isa", [] { return cpu::loops().isa; });
    module.def("isas", &isas);
    module.def("set_isa", &set_isa);
}

}  // namespace eigenfilter
