// Lists of tensors that Python keeps.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "dlpack.hpp"

namespace eigenfilter {

namespace py = pybind11;

// A list that is passed again and again, an optimizer's own. With `trust` what is slow to check
// (lazy negation, inference mode) is checked when a tensor's memory is first seen and when it
// changes, and not at every use: for tensors that nobody else negates where they are. With `hold`
// the list owns a reference to each tensor beyond Python's, which makes reading it twice as fast
// (torch then need not keep the Python object's count in step); not for parameters, which torch may
// want to swap.
class TensorList {
 public:
    TensorList(py::handle tensors, bool hold, bool trust);
    std::size_t size() const { return PyTuple_GET_SIZE(tensors_.ptr()); }
    py::object get(py::handle index) const;
    const py::tuple& tensors() const { return tensors_; }
    // [n] data pointers found sound, or null without trust; shared, because Python code may end a
    // list that is being read.
    const std::shared_ptr<std::vector<void*>>& known() const { return known_; }

    // Whether a kernel has filled the tensors, these being backups. Set in the call that fills
    // them: no interrupt can come between.
    bool filled = false;

 private:
    py::tuple tensors_;
    std::shared_ptr<std::vector<void*>> known_;
    struct Release {
        void operator()(dlpack::Managed* t) const { t->deleter(t); }
    };
    std::vector<std::unique_ptr<dlpack::Managed, Release>> held_;
};

// The list that a Python object is, or nullptr for an object of another type; throws TypeError for
// one whose __init__ has not run.
TensorList* tensor_list(py::handle object);

}  // namespace eigenfilter
