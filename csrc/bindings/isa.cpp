// How the CPU kernels run: with which instruction set, and whether with one thread.
#include "../cpu/isa.hpp"

#include "../cpu/parallel.hpp"
#include "arguments.hpp"

namespace eigenfilter {
namespace {

py::list isas() {
    const cpu::Loops* tables[3];
    py::list names;
    for (int i = 0, count = cpu::available(tables); i < count; ++i) names.append(tables[i]->isa);
    return names;
}

void set_isa(py::handle name) {
    const char* const text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8(name.ptr()) : nullptr;
    if (text == nullptr) {
        PyErr_Clear();
        throw py::type_error("the name of an instruction set must be one of isas()");
    }
    if (!cpu::set_isa(text))
        throw py::value_error("this CPU has no kernels for \"" + std::string(text) +
                              "\": see isas()");
}

bool is_serial() { return cpu::is_serial(); }

std::string isa() { return cpu::loops().isa; }

}  // namespace

void register_isa(py::module_& module) {
    define(
        module, "is_serial", "",
        "Whether the CPU kernels use one thread: this process was forked from one that had more.",
        &is_serial);
    define(module, "isa", "",
           "The instruction set of the CPU kernels: \"baseline\", \"avx2\" or \"avx512\".", &isa);
    define(module, "isas", "",
           "All instruction sets of this build that this CPU has, lowest first.", &isas);
    define(module, "set_isa", "name",
           "Run the CPU kernels with one of `isas()`; for tests and benchmarks.", &set_isa);
}

}  // namespace eigenfilter
