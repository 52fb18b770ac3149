// The kernels as Python sees them: read the operands, then run where they are.
#include "kernels.hpp"

#include "operands.hpp"

namespace eigenfilter {
namespace {

// The lists that every kernel may have; those of its own are set after.
Tensors tensors(const Operands& o, void* const* g = nullptr, void* const* b = nullptr) {
    return {o.dtype(), o.size(), o.numel().data(), o.pointers(0), g, o.wide(), b};
}

Scalar one_or(const Operands& o, py::handle grad_scale) {
    return grad_scale.is_none() ? Scalar{1.0} : o.scalar("grad_scale", grad_scale);
}

// None rounds to nearest; and wide dtypes are not rounded at all.
bool is_stochastic(const Operands& o, py::handle rounding_seed) {
    return !rounding_seed.is_none() && size_of(o.dtype()) == 2;
}

Scalar seed_of(const Operands& o, py::handle rounding_seed) {
    return rounding_seed.is_none() ? Scalar{} : o.scalar("rounding_seed", rounding_seed);
}

// Throws unless the compiled kernels serve the operands' device.
void require_served(const Operands& o) {
    if (o.on_cpu()) return;
    if (o.device().type != dlpack::kCUDA)
        throw py::value_error(
            "the compiled kernels serve the CPU and NVIDIA GPUs: use backend=\"triton\" here");
    cuda::require();
}

// Runs an update where its operands are, without the GIL on the CPU.
template <class OnCPU, class OnCUDA>
void run(const Operands& o, OnCPU on_cpu, OnCUDA on_cuda) {
    if (o.on_cpu()) {
        const py::gil_scoped_release release;
        on_cpu();
    } else {
        on_cuda(o.device().id, o.stream());
    }
}

void ascend(py::handle params, py::handle grads, py::handle backups, py::handle alpha,
            bool adaptive, py::handle grad_scale, py::handle found_inf, int threads) {
    const Operands o{
        {"params", params, true}, {"grads", grads, false, false, true}, {"backups", backups, true}};
    require_served(o);
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2));
    const AscendScalars<Scalar> s{o.scalar("alpha", alpha), one_or(o, grad_scale), adaptive};
    const float* found = o.flag("found_inf", found_inf);
    run(
        o, [&] { cpu::ascend(t, {s.alpha.value, s.grad_scale.value, adaptive}, found, threads); },
        [&](int device, void* stream) { cuda::ascend(t, s, found, device, stream); });
    if (py::isinstance<TensorList>(backups)) backups.cast<TensorList&>().filled = true;
}

void ascend_again(py::handle params, py::handle grads, py::handle backups, py::handle alpha,
                  py::handle grad_scale, py::handle found_inf, int threads) {
    const Operands o{{"params", params, true},
                     {"grads", grads, false, false, true},
                     {"backups", backups, false, true}};
    require_served(o);
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2));
    const AscendScalars<Scalar> s{o.scalar("alpha", alpha), one_or(o, grad_scale), false};
    const float* found = o.flag("found_inf", found_inf);
    run(
        o,
        [&] { cpu::ascend_again(t, {s.alpha.value, s.grad_scale.value, false}, found, threads); },
        [&](int device, void* stream) { cuda::ascend_again(t, s, found, device, stream); });
}

void ascend_hvp(py::handle params, py::handle grads, py::handle base_grads, py::handle backups,
                py::handle alpha, py::handle eps, py::handle grad_scale, py::handle found_inf,
                int threads) {
    const Operands o{{"params", params, true},
                     {"grads", grads, false, false, true},
                     {"base_grads", base_grads, false, false, true},
                     {"backups", backups, false}};
    require_served(o);
    Tensors t = tensors(o, o.pointers(1), o.pointers(3));
    t.g0 = o.pointers(2);
    const HvpScalars<Scalar> s{o.scalar("alpha", alpha), o.scalar("eps", eps),
                               one_or(o, grad_scale)};
    const float* found = o.flag("found_inf", found_inf);
    run(
        o,
        [&] {
            cpu::ascend_hvp(t, {s.alpha.value, s.eps.value, s.grad_scale.value}, found, threads);
        },
        [&](int device, void* stream) { cuda::ascend_hvp(t, s, found, device, stream); });
}

void descend(py::handle params, py::handle grads, py::handle momenta, py::handle backups,
             py::handle lr, py::handle momentum, py::handle dampening, py::handle weight_decay,
             bool nesterov, bool maximize, py::handle rounding_seed, py::handle grad_scale,
             py::handle found_inf, int threads) {
    const Operands o{{"params", params, true},
                     {"grads", grads, false, false, true},
                     {"momenta", momenta, true, true},
                     {"backups", backups, false, true}};
    require_served(o);
    Tensors t = tensors(o, o.pointers(1), o.pointers(3));
    t.m = o.pointers(2);
    const DescendScalars<Scalar> s{o.scalar("lr", lr),
                                   o.scalar("momentum", momentum),
                                   o.scalar("dampening", dampening),
                                   o.scalar("weight_decay", weight_decay),
                                   one_or(o, grad_scale),
                                   seed_of(o, rounding_seed),
                                   nesterov,
                                   maximize,
                                   is_stochastic(o, rounding_seed)};
    const float* found = o.flag("found_inf", found_inf);
    run(
        o,
        [&] {
            cpu::descend(
                t,
                {s.lr.value, s.momentum.value, s.dampening.value, s.weight_decay.value,
                 s.grad_scale.value, s.rounding_seed.value, nesterov, maximize, s.stochastic},
                found, threads);
        },
        [&](int device, void* stream) { cuda::descend(t, s, found, device, stream); });
}

void descend_adamw(py::handle params, py::handle grads, py::handle exp_avgs, py::handle exp_avg_sqs,
                   py::handle backups, py::handle lr, py::handle beta1, py::handle beta2,
                   py::handle eps, py::handle weight_decay, py::handle step, bool maximize,
                   py::handle rounding_seed, py::handle grad_scale, py::handle found_inf,
                   int threads) {
    const Operands o{{"params", params, true},
                     {"grads", grads, false, false, true},
                     {"exp_avgs", exp_avgs, true},
                     {"exp_avg_sqs", exp_avg_sqs, true},
                     {"backups", backups, false, true}};
    require_served(o);
    Tensors t = tensors(o, o.pointers(1), o.pointers(4));
    t.m = o.pointers(2);
    t.v = o.pointers(3);
    const AdamWScalars<Scalar> s{o.scalar("lr", lr),
                                 o.scalar("beta1", beta1),
                                 o.scalar("beta2", beta2),
                                 o.scalar("eps", eps),
                                 o.scalar("weight_decay", weight_decay),
                                 o.scalar("step", step),
                                 one_or(o, grad_scale),
                                 seed_of(o, rounding_seed),
                                 maximize,
                                 is_stochastic(o, rounding_seed)};
    const float* found = o.flag("found_inf", found_inf);
    run(
        o,
        [&] {
            cpu::descend_adamw(
                t,
                {s.lr.value, s.beta1.value, s.beta2.value, s.eps.value, s.weight_decay.value,
                 s.step.value, s.grad_scale.value, s.rounding_seed.value, maximize, s.stochastic},
                found, threads);
        },
        [&](int device, void* stream) { cuda::descend_adamw(t, s, found, device, stream); });
}

// The tensors of a reduction, and the weights if there are any, whose dtype they may exceed.
Operands reduced(py::handle list, py::handle weights = py::none()) {
    const Role tensors{"tensors", list, false, false, true};
    if (weights.is_none()) return Operands{tensors};
    return Operands{{"weights", weights, false}, tensors};
}

Tensors reduction(const Operands& o, bool weighted) {
    Tensors t = tensors(o, weighted ? o.pointers(0) : nullptr);
    if (weighted) t.x = o.pointers(1);
    return t;
}

void norm(py::handle list, py::handle weights, py::handle out, py::handle grad_scale,
          py::handle workspace, int threads) {
    const Operands o = reduced(list, weights);
    require_served(o);
    const Tensors t = reduction(o, !weights.is_none());
    const Scalar scale = one_or(o, grad_scale);
    bool is_double = py::getattr(out, "itemsize", py::int_(4)).equal(py::int_(8));
    for (std::size_t i = 0; i < t.n; ++i) is_double |= t.gradient(i) == DType::f64;
    void* result = o.output("out", out, 1, is_double ? 64 : 32);
    double value = 0;
    run(
        o, [&] { value = cpu::norm(t, threads) * (1 / scale.value); },
        [&](int device, void* stream) {
            auto* sums =
                static_cast<double*>(o.output("workspace", workspace, cuda::norm_workspace(t), 64));
            cuda::norm(t, scale, result, is_double, sums, device, stream);
        });
    if (!o.on_cpu()) return;
    if (is_double)
        *static_cast<double*>(result) = value;
    else
        *static_cast<float*>(result) = static_cast<float>(value);
}

std::int64_t norm_workspace(py::handle list) {
    return cuda::norm_workspace(reduction(reduced(list), false));
}

void flag_nonfinite(py::handle list, py::handle found_inf, int threads) {
    const Operands o = reduced(list);
    require_served(o);
    const Tensors t = reduction(o, false);
    float* found = o.flag("found_inf", found_inf);
    if (found == nullptr) throw py::type_error("found_inf must be a tensor");
    run(
        o,
        [&] {
            if (cpu::has_nonfinite(t, threads)) *found = 1;
        },
        [&](int device, void* stream) { cuda::flag_nonfinite(t, found, device, stream); });
}

// Vectors and a basis are lists of one, so that they are read and checked as all tensors are.
void project_out(py::handle vectors, py::handle basis, std::int64_t count, std::int64_t rows,
                 py::handle coefficients, py::handle norms, py::handle workspace, int passes,
                 int threads) {
    const Operands w{{"w", vectors, true}}, q{{"basis", basis, false}};
    require_served(w);
    const std::int64_t columns = w.numel()[0] / count;
    if (w.dtype() != DType::f32 && w.dtype() != DType::f64)
        throw py::type_error("w must be float32 or float64");
    if (q.numel()[0] != rows * columns || q.device().type != w.device().type ||
        q.device().id != w.device().id)
        throw py::value_error("basis must be [m, n] for w [n] or [b, n], on the same device");
    const Projection p{
        q.dtype(),
        w.dtype(),
        rows,
        columns,
        count,
        q.pointers(0)[0],
        w.pointers(0)[0],
        static_cast<double*>(w.output("coefficients", coefficients, count * rows, 64)),
        static_cast<double*>(w.output("norms", norms, count, 64)),
        passes};
    run(
        w, [&] { cpu::project_out(p, threads); },
        [&](int device, void* stream) {
            const std::int64_t size = cuda::project_workspace(rows, columns, count);
            auto* sums = static_cast<double*>(w.output("workspace", workspace, size, 64));
            cuda::project_out(p, sums, device, stream);
        });
}

// Rows of vectors, as many columns each as the elements make.
std::int64_t columns_of(const Operands& o, std::int64_t rows) {
    if (o.dtype() != DType::f32 && o.dtype() != DType::f64)
        throw py::type_error("vectors must be float32 or float64");
    return o.numel()[0] / rows;
}

double* doubles(const Operands& o, const char* name, py::handle tensor, std::int64_t numel) {
    return static_cast<double*>(o.output(name, tensor, numel, 64));
}

double* workspace_of(const Operands& o, py::handle workspace, std::int64_t sums,
                     std::int64_t columns) {
    return doubles(o, "workspace", workspace, cuda::sums_workspace(sums, columns));
}

void row_dots(py::handle q, py::handle w, std::int64_t rows, py::handle sums, py::handle workspace,
              int threads) {
    const Operands o{{"q", q, false}, {"w", w, false}};
    require_served(o);
    const Recurrence r{o.dtype(),
                       rows,
                       columns_of(o, rows),
                       nullptr,
                       o.pointers(0)[0],
                       o.pointers(1)[0],
                       nullptr,
                       doubles(o, "sums", sums, 2 * rows)};
    run(
        o, [&] { cpu::row_dots(r, threads); },
        [&](int device, void* stream) {
            cuda::row_dots(r, workspace_of(o, workspace, 2 * rows, r.columns), device, stream);
        });
}

void three_term(py::handle u, py::handle q, py::handle w, std::int64_t rows, py::handle factors,
                py::handle sums, py::handle workspace, int threads) {
    const Operands o{{"u", u, true}, {"q", q, false}, {"w", w, false}};
    require_served(o);
    const Recurrence r{o.dtype(),
                       rows,
                       columns_of(o, rows),
                       o.pointers(0)[0],
                       o.pointers(1)[0],
                       o.pointers(2)[0],
                       doubles(o, "factors", factors, 3 * rows),
                       doubles(o, "sums", sums, 2 * rows)};
    run(
        o, [&] { cpu::three_term(r, threads); },
        [&](int device, void* stream) {
            cuda::three_term(r, workspace_of(o, workspace, 2 * rows, r.columns), device, stream);
        });
}

void gram(py::handle vectors, std::int64_t rows, py::handle out, py::handle workspace,
          int threads) {
    const Operands o{{"vectors", vectors, false}};
    require_served(o);
    const Rows v{o.dtype(), rows, columns_of(o, rows), o.pointers(0)[0]};
    double* products = doubles(o, "out", out, rows * rows);
    run(
        o, [&] { cpu::gram(v, products, threads); },
        [&](int device, void* stream) {
            cuda::gram(v, products, workspace_of(o, workspace, rows * rows, v.columns), device,
                       stream);
        });
}

void mix_rows(py::handle vectors, std::int64_t rows, py::handle factors, int threads) {
    const Operands o{{"vectors", vectors, true}};
    require_served(o);
    const Rows v{o.dtype(), rows, columns_of(o, rows), o.pointers(0)[0]};
    const double* lower = doubles(o, "factors", factors, rows * rows);
    run(
        o, [&] { cpu::mix_rows(v, lower, threads); },
        [&](int device, void* stream) { cuda::mix_rows(v, lower, device, stream); });
}

// What names a list of gradients in Python.
bool names_gradients(const std::string& name) {
    return name == "grads" || name == "base_grads" || name == "tensors";
}

// Roles whose names and flags come from Python; the names must outlive the Operands.
class NamedRoles {
 public:
    NamedRoles(const py::sequence& names, const py::sequence& lists, const py::sequence& written) {
        if (lists.size() != names.size() || written.size() != names.size() ||
            names.size() > Operands::kMaxRoles)
            throw py::value_error("names, lists and written must have equal lengths, at most 5");
        for (std::size_t r = 0; r < names.size(); ++r) {
            names_[r] = names[r].cast<std::string>();
            lists_[r] = lists[r];
            roles_[r] = {names_[r].c_str(), lists_[r], written[r].cast<bool>(), true,
                         names_gradients(names_[r])};
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
    const auto* const dtypes = reinterpret_cast<const char*>(o.wide());
    return py::make_tuple(
        py::bytes(reinterpret_cast<const char*>(pointers.data()), pointers.size() * sizeof(void*)),
        py::bytes(reinterpret_cast<const char*>(o.numel().data()), o.size() * sizeof(std::int64_t)),
        py::bytes(dtypes, dtypes != nullptr ? o.size() : 0));
}

}  // namespace

void register_kernels(py::module_& module) {
    module.attr("cuda_compiled") = cuda::compiled();
    module.def("require_cuda", &cuda::require);
    module.def("check", &check);
    module.def("table", &table);
    module.def("ascend", &ascend);
    module.def("ascend_again", &ascend_again);
    module.def("ascend_hvp", &ascend_hvp);
    module.def("descend", &descend);
    module.def("descend_adamw", &descend_adamw);
    module.def("norm", &norm);
    module.def("norm_workspace", &norm_workspace);
    module.def("flag_nonfinite", &flag_nonfinite);
    module.def("project_out", &project_out);
    module.def("project_workspace", &cuda::project_workspace);
    module.def("sums_workspace", &cuda::sums_workspace);
    module.def("row_dots", &row_dots);
    module.def("three_term", &three_term);
    module.def("gram", &gram);
    module.def("mix_rows", &mix_rows);
}

}  // namespace eigenfilter
