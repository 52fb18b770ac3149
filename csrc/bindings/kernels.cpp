// The kernels as Python sees them: read the operands, then run where they are.
#include "kernels.hpp"

#include "operands.hpp"

namespace eigenfilter {
namespace {

Tensors tensors(const Operands& o, void* const* g, void* const* m, void* const* b) {
    return {o.dtype(), o.size(), o.numel().data(), o.pointers(0), g, m, b};
}

Scalar one_or(const Operands& o, py::handle grad_scale) {
    return grad_scale.is_none() ? Scalar{1.0} : o.scalar("grad_scale", grad_scale);
}

// Throws unless the compiled kernels serve the operands' device.
void require_served(const Operands& o) {
    if (o.on_cpu()) return;
    if (o.device().type != dlpack::kCUDA)
        throw py::value_error(
            "the compiled kernels serve the CPU and NVIDIA GPUs: use backend=\"triton\" here");
    cuda::require();
}

void ascend(py::handle params, py::handle grads, py::handle backups, py::handle alpha,
            py::handle grad_scale, py::handle found_inf, int threads) {
    const Operands o{{"params", params, true}, {"grads", grads, false}, {"backups", backups, true}};
    require_served(o);
    const Tensors t = tensors(o, o.pointers(1), nullptr, o.pointers(2));
    const AscendScalars<Scalar> s{o.scalar("alpha", alpha), one_or(o, grad_scale)};
    const float* found = o.flag("found_inf", found_inf);
    if (o.on_cpu()) {
        const py::gil_scoped_release release;
        cpu::ascend(t, {s.alpha.value, s.grad_scale.value}, found, threads);
    } else {
        cuda::ascend(t, s, found, o.device().id, o.stream());
    }
    if (py::isinstance<TensorList>(backups)) backups.cast<TensorList&>().filled = true;
}

void descend(py::handle params, py::handle grads, py::handle momenta, py::handle backups,
             py::handle lr, py::handle momentum, py::handle dampening, py::handle weight_decay,
             bool nesterov, bool maximize, py::handle grad_scale, py::handle found_inf,
             int threads) {
    const Operands o{{"params", params, true},
                     {"grads", grads, false},
                     {"momenta", momenta, true},
                     {"backups", backups, false}};
    require_served(o);
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2), o.pointers(3));
    const DescendScalars<Scalar> s{o.scalar("lr", lr),
                                   o.scalar("momentum", momentum),
                                   o.scalar("dampening", dampening),
                                   o.scalar("weight_decay", weight_decay),
                                   one_or(o, grad_scale),
                                   nesterov,
                                   maximize};
    const float* found = o.flag("found_inf", found_inf);
    if (o.on_cpu()) {
        const py::gil_scoped_release release;
        cpu::descend(t,
                     {s.lr.value, s.momentum.value, s.dampening.value, s.weight_decay.value,
                      s.grad_scale.value, nesterov, maximize},
                     found, threads);
    } else {
        cuda::descend(t, s, found, o.device().id, o.stream());
    }
}

void norm(py::handle list, py::handle out, py::handle grad_scale, py::handle workspace,
          int threads) {
    const Operands o{{"tensors", list, false}};
    require_served(o);
    const Tensors t = tensors(o, nullptr, nullptr, nullptr);
    const Scalar scale = one_or(o, grad_scale);
    const bool is_double = o.dtype() == DType::f64;
    void* result = o.output("out", out, 1, is_double ? 64 : 32);
    if (o.on_cpu()) {
        double value;
        {
            const py::gil_scoped_release release;
            value = cpu::norm(t, threads) * (1 / scale.value);
        }
        if (is_double)
            *static_cast<double*>(result) = value;
        else
            *static_cast<float*>(result) = static_cast<float>(value);
    } else {
        const std::int64_t size = cuda::norm_workspace(o.dtype(), o.size(), o.numel().data());
        auto* sums = static_cast<double*>(o.output("workspace", workspace, size, 64));
        cuda::norm(t, scale, result, sums, o.device().id, o.stream());
    }
}

std::int64_t norm_workspace(py::handle list) {
    const Operands o{{"tensors", list, false}};
    return cuda::norm_workspace(o.dtype(), o.size(), o.numel().data());
}

void flag_nonfinite(py::handle list, py::handle found_inf, int threads) {
    const Operands o{{"tensors", list, false}};
    require_served(o);
    const Tensors t = tensors(o, nullptr, nullptr, nullptr);
    float* found = o.flag("found_inf", found_inf);
    if (found == nullptr) throw py::type_error("found_inf must be a tensor");
    if (o.on_cpu()) {
        const py::gil_scoped_release release;
        if (cpu::has_nonfinite(t, threads)) *found = 1;
    } else {
        cuda::flag_nonfinite(t, found, o.device().id, o.stream());
    }
}

// Roles whose names and flags come from Python; the names must outlive the Operands.
class NamedRoles {
 public:
    NamedRoles(const py::sequence& names, const py::sequence& lists, const py::sequence& written) {
        if (lists.size() != names.size() || written.size() != names.size() ||
            names.size() > Operands::kMaxRoles)
            throw py::value_error("names, lists and written must have equal lengths, at most 4");
        for (std::size_t r = 0; r < names.size(); ++r) {
            names_[r] = names[r].cast<std::string>();
            lists_[r] = lists[r];
            roles_[r] = {names_[r].c_str(), lists_[r], written[r].cast<bool>()};
        }
        count_ = names.size();
    }
    Operands read() const { return Operands(roles_.data(), count_); }

 private:
    std::array<std::string, Operands::kMaxRoles> names_;
    std::array<py::object, Operands::kMaxRoles> lists_;
    std::array<Role, Operands::kMaxRoles> roles_;
    std::size_t count_;
};

void check(const py::sequence& names, const py::sequence& lists, const py::sequence& written) {
    NamedRoles(names, lists, written).read();
}

py::tuple table(const py::sequence& names, const py::sequence& lists, const py::sequence& written) {
    const Operands o = NamedRoles(names, lists, written).read();
    std::vector<void*> pointers;
    for (std::size_t r = 0; r < names.size(); ++r) {
        if (void* const* p = o.pointers(r)) pointers.insert(pointers.end(), p, p + o.size());
    }
    return py::make_tuple(
        py::bytes(reinterpret_cast<const char*>(pointers.data()), pointers.size() * sizeof(void*)),
        py::bytes(reinterpret_cast<const char*>(o.numel().data()),
                  o.size() * sizeof(std::int64_t)));
}

}  // namespace

void register_kernels(py::module_& module) {
    module.attr("cuda_compiled") = cuda::compiled();
    module.def("require_cuda", &cuda::require);
    module.def("check", &check);
    module.def("table", &table);
    module.def("ascend", &ascend);
    module.def("descend", &descend);
    module.def("norm", &norm);
    module.def("norm_workspace", &norm_workspace);
    module.def("flag_nonfinite", &flag_nonfinite);
}

}  // namespace eigenfilter
