// The kernels as Python sees them: read the operands, then run where they are.
#include "kernels.hpp"

#include "arguments.hpp"
#include "operands.hpp"

namespace eigenfilter {
namespace {

constexpr std::int64_t kMostPasses = 100;     // twice is enough
constexpr std::int64_t kMostVectors = 65535;  // of a GPU's grid

// The lists that every kernel may have; those of its own are set after.
Tensors tensors(const Operands& o, void* const* g = nullptr, void* const* b = nullptr) {
    return {o.dtype(), o.size(), o.numel().data(), o.pointers(0), g, o.wide(), b};
}

// The loss scale; where the flag stops the update it may be anything.
Scalar scale_of(Operands& o, py::handle grad_scale, const float* flag = nullptr) {
    static const Range any{[](double) { return true; }, ""};
    if (grad_scale.is_none()) return Scalar{1.0};
    const bool stopped = flag != nullptr && o.on_cpu() && *flag != 0;
    return o.scalar("grad_scale", grad_scale, stopped ? any : kPositive);
}

// None rounds to nearest; and wide dtypes are not rounded at all.
bool is_stochastic(const Operands& o, py::handle rounding_seed) {
    return !rounding_seed.is_none() && size_of(o.dtype()) == 2;
}

Scalar seed_of(Operands& o, py::handle rounding_seed) {
    return rounding_seed.is_none() ? Scalar{} : o.scalar("rounding_seed", rounding_seed, kSeed);
}

// Throws unless the compiled kernels serve the operands' device.
void require_served(const Operands& o) {
    if (o.on_cpu()) return;
    if (o.device().type != dlpack::kCUDA)
        throw py::value_error(
            "the compiled kernels serve the CPU and NVIDIA GPUs: use backend=\"triton\" here");
    cuda::require();
}

// What was read, for backends that are written in Python: data pointers by role and tensor, element
// counts, and the gradients' dtypes, or nothing where all are the lists'.
py::tuple table_of(const Operands& o) {
    std::string pointers;
    for (std::size_t r = 0; r < Operands::kMaxRoles; ++r) {
        if (void* const* p = o.pointers(r))
            pointers.append(reinterpret_cast<const char*>(p), o.size() * sizeof(void*));
    }
    const auto* const dtypes = reinterpret_cast<const char*>(o.wide());
    return py::make_tuple(
        py::bytes(pointers),
        py::bytes(reinterpret_cast<const char*>(o.numel().data()), o.size() * sizeof(std::int64_t)),
        py::bytes(dtypes, dtypes != nullptr ? o.size() : 0));
}

// What a call returns: nothing, or, where it was a check, what that has read.
py::object outcome(bool ran, const Operands& o) {
    if (ran) return py::none();
    return table_of(o);
}

// Runs a kernel where its operands are, without the GIL on the CPU, and returns true. With no
// threads the call was a check of the arguments, which ends here.
template <class OnCPU, class OnCUDA>
bool run(const Operands& o, int threads, OnCPU on_cpu, OnCUDA on_cuda) {
    if (threads == 0) return false;
    require_served(o);
    if (o.on_cpu()) {
        const py::gil_scoped_release release;
        on_cpu();
    } else {
        on_cuda(o.device().id, o.stream());
    }
    return true;
}

py::object perturb(py::handle params, py::handle grads, py::handle backups, py::handle alpha,
                   py::handle adaptive_given, py::handle grad_scale, py::handle found_inf,
                   py::handle num_threads) {
    const bool adaptive = truth("adaptive", adaptive_given);
    const int threads = threads_of(num_threads);
    Operands o{
        {"params", params, true}, {"grads", grads, false, false, true}, {"backups", backups, true}};
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2));
    const float* flag = o.flag("found_inf", found_inf);
    const PerturbScalars<Scalar> s{o.scalar("alpha", alpha, kComputed),
                                   scale_of(o, grad_scale, flag), adaptive};
    const bool ran = run(
        o, threads,
        [&] { cpu::perturb(t, {s.alpha.value, s.grad_scale.value, adaptive}, flag, threads); },
        [&](int device, void* stream) { cuda::perturb(t, s, flag, device, stream); });
    if (TensorList* const list = tensor_list(backups); ran && list != nullptr) list->filled = true;
    return outcome(ran, o);
}

py::object perturb_again(py::handle params, py::handle grads, py::handle backups, py::handle alpha,
                         py::handle grad_scale, py::handle found_inf, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"params", params, true},
               {"grads", grads, false, false, true},
               {"backups", backups, false, true}};
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2));
    const float* flag = o.flag("found_inf", found_inf);
    const PerturbScalars<Scalar> s{o.scalar("alpha", alpha, kComputed),
                                   scale_of(o, grad_scale, flag), false};
    const bool ran = run(
        o, threads,
        [&] { cpu::perturb_again(t, {s.alpha.value, s.grad_scale.value, false}, flag, threads); },
        [&](int device, void* stream) { cuda::perturb_again(t, s, flag, device, stream); });
    return outcome(ran, o);
}

py::object perturb_hvp(py::handle params, py::handle grads, py::handle base_grads,
                       py::handle backups, py::handle alpha, py::handle eps, py::handle grad_scale,
                       py::handle found_inf, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"params", params, true},
               {"grads", grads, false, false, true},
               {"base_grads", base_grads, false, false, true},
               {"backups", backups, false}};
    Tensors t = tensors(o, o.pointers(1), o.pointers(3));
    t.g0 = o.pointers(2);
    const float* flag = o.flag("found_inf", found_inf);
    const HvpScalars<Scalar> s{o.scalar("alpha", alpha, kComputed), o.scalar("eps", eps, kNotZero),
                               scale_of(o, grad_scale, flag)};
    const bool ran = run(
        o, threads,
        [&] {
            cpu::perturb_hvp(t, {s.alpha.value, s.eps.value, s.grad_scale.value}, flag, threads);
        },
        [&](int device, void* stream) { cuda::perturb_hvp(t, s, flag, device, stream); });
    return outcome(ran, o);
}

py::object sgd_step(py::handle params, py::handle grads, py::handle momenta, py::handle backups,
                    py::handle lr, py::handle momentum, py::handle dampening,
                    py::handle weight_decay, py::handle nesterov_given, py::handle maximize_given,
                    py::handle rounding_seed, py::handle grad_scale, py::handle found_inf,
                    py::handle num_threads) {
    const bool nesterov = truth("nesterov", nesterov_given);
    const bool maximize = truth("maximize", maximize_given);
    const int threads = threads_of(num_threads);
    Operands o{{"params", params, true},
               {"grads", grads, false, false, true},
               {"momenta", momenta, true, true},
               {"backups", backups, false, true}};
    Tensors t = tensors(o, o.pointers(1), o.pointers(3));
    t.m = o.pointers(2);
    const float* flag = o.flag("found_inf", found_inf);
    const SgdScalars<Scalar> s{o.scalar("lr", lr, kFinite),
                               o.scalar("momentum", momentum, kFinite),
                               o.scalar("dampening", dampening, kFinite),
                               o.scalar("weight_decay", weight_decay, kFinite),
                               scale_of(o, grad_scale, flag),
                               seed_of(o, rounding_seed),
                               nesterov,
                               maximize,
                               is_stochastic(o, rounding_seed)};
    const bool ran = run(
        o, threads,
        [&] {
            cpu::sgd_step(
                t,
                {s.lr.value, s.momentum.value, s.dampening.value, s.weight_decay.value,
                 s.grad_scale.value, s.rounding_seed.value, nesterov, maximize, s.stochastic},
                flag, threads);
        },
        [&](int device, void* stream) { cuda::sgd_step(t, s, flag, device, stream); });
    return outcome(ran, o);
}

py::object adamw_step(py::handle params, py::handle grads, py::handle exp_avgs,
                      py::handle exp_avg_sqs, py::handle backups, py::handle lr, py::handle beta1,
                      py::handle beta2, py::handle eps, py::handle weight_decay, py::handle step,
                      py::handle maximize_given, py::handle rounding_seed, py::handle grad_scale,
                      py::handle found_inf, py::handle num_threads) {
    const bool maximize = truth("maximize", maximize_given);
    const int threads = threads_of(num_threads);
    Operands o{{"params", params, true},
               {"grads", grads, false, false, true},
               {"exp_avgs", exp_avgs, true},
               {"exp_avg_sqs", exp_avg_sqs, true},
               {"backups", backups, false, true}};
    Tensors t = tensors(o, o.pointers(1), o.pointers(4));
    t.m = o.pointers(2);
    t.v = o.pointers(3);
    const float* flag = o.flag("found_inf", found_inf);
    const AdamWScalars<Scalar> s{o.scalar("lr", lr, kFinite),
                                 o.scalar("beta1", beta1, kFraction),
                                 o.scalar("beta2", beta2, kFraction),
                                 o.scalar("eps", eps, kNotNegative),
                                 o.scalar("weight_decay", weight_decay, kFinite),
                                 o.scalar("step", step, kCount),
                                 scale_of(o, grad_scale, flag),
                                 seed_of(o, rounding_seed),
                                 maximize,
                                 is_stochastic(o, rounding_seed)};
    const bool ran = run(
        o, threads,
        [&] {
            cpu::adamw_step(
                t,
                {s.lr.value, s.beta1.value, s.beta2.value, s.eps.value, s.weight_decay.value,
                 s.step.value, s.grad_scale.value, s.rounding_seed.value, maximize, s.stochastic},
                flag, threads);
        },
        [&](int device, void* stream) { cuda::adamw_step(t, s, flag, device, stream); });
    return outcome(ran, o);
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

py::object norm(py::handle list, py::handle weights, py::handle out, py::handle grad_scale,
                py::handle workspace, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    bool is_double = py::getattr(out, "itemsize", py::int_(4)).equal(py::int_(8));
    Operands o = reduced(list, weights);
    const Tensors t = reduction(o, !weights.is_none());
    const Scalar scale = scale_of(o, grad_scale);
    for (std::size_t i = 0; i < t.n; ++i) is_double |= t.gradient(i) == DType::f64;
    void* result = o.single("out", out, 1, is_double ? 64 : 32, true);
    double value = 0;
    const bool ran = run(
        o, threads, [&] { value = cpu::norm(t, threads) * (1 / scale.value); },
        [&](int device, void* stream) {
            const std::int64_t size = cuda::norm_workspace(t);
            auto* sums = static_cast<double*>(o.single("workspace", workspace, size, 64, true));
            cuda::norm(t, scale, result, is_double, sums, device, stream);
        });
    if (ran && o.on_cpu() && is_double)
        *static_cast<double*>(result) = value;
    else if (ran && o.on_cpu())
        *static_cast<float*>(result) = static_cast<float>(value);
    return outcome(ran, o);
}

std::int64_t norm_workspace(py::handle list) {
    return cuda::norm_workspace(reduction(reduced(list), false));
}

py::object flag_nonfinite(py::handle list, py::handle found_inf, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o = reduced(list);
    const Tensors t = reduction(o, false);
    float* flag = o.flag("found_inf", found_inf, true);
    if (flag == nullptr) throw py::type_error("found_inf must be a tensor");
    const bool ran = run(
        o, threads,
        [&] {
            if (cpu::has_nonfinite(t, threads)) *flag = 1;
        },
        [&](int device, void* stream) { cuda::flag_nonfinite(t, flag, device, stream); });
    return outcome(ran, o);
}

double* doubles(Operands& o, const char* name, py::handle tensor, std::int64_t numel,
                bool written) {
    return static_cast<double*>(o.single(name, tensor, numel, 64, written));
}

void require_one(const Operands& o) {
    if (o.size() != 1 || !o.contiguous())
        throw py::value_error("pass lists of one contiguous tensor, whose rows are vectors");
}

// Vectors and a basis are lists of one, so that they are read and checked as all tensors are.
void orthogonalize(py::handle vectors, py::handle basis, py::handle count_given,
                   py::handle rows_given, py::handle coefficients, py::handle norms,
                   py::handle workspace, py::handle passes_given, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const std::int64_t count = whole("count", count_given, 1, INT64_MAX);
    const std::int64_t rows = whole("rows", rows_given, 0, INT64_MAX);
    const auto passes = static_cast<int>(whole("passes", passes_given, 1, kMostPasses));
    Operands w{{"w", vectors, true}};
    Operands q{{"basis", basis, false}};
    require_one(w);
    require_one(q);
    if (w.dtype() != DType::f32 && w.dtype() != DType::f64)
        throw py::type_error("w must be float32 or float64");
    const std::int64_t columns = w.numel()[0] / count;
    if (columns * count != w.numel()[0] || q.numel()[0] != product(rows, columns) ||
        q.device().type != w.device().type || q.device().id != w.device().id)
        throw py::value_error("basis must be [m, n] for w [n] or [b, n], on the same device");
    w.keep_apart("basis", q.pointers(0)[0], q.numel()[0] * size_of(q.dtype()), false);
    const Projection p{q.dtype(),
                       w.dtype(),
                       rows,
                       columns,
                       count,
                       q.pointers(0)[0],
                       w.pointers(0)[0],
                       doubles(w, "coefficients", coefficients, product(count, rows), true),
                       doubles(w, "norms", norms, count, true),
                       passes};
    q.require_unchanged();
    run(
        w, threads, [&] { cpu::orthogonalize(p, threads); },
        [&](int device, void* stream) {
            const std::int64_t size = cuda::orthogonalize_workspace(rows, columns, count);
            cuda::orthogonalize(p, doubles(w, "workspace", workspace, size, true), device, stream);
        });
}

// Rows of vectors, as many columns each as the elements make.
std::int64_t columns_of(const Operands& o, std::int64_t rows) {
    require_one(o);
    if (o.dtype() != DType::f32 && o.dtype() != DType::f64)
        throw py::type_error("vectors must be float32 or float64");
    if (o.numel()[0] % rows != 0)
        throw py::value_error(
            "vectors must be rows of equal length: " + std::to_string(o.numel()[0]) +
            " elements are no " + std::to_string(rows) + " rows");
    return o.numel()[0] / rows;
}

double* workspace_of(Operands& o, py::handle workspace, std::int64_t sums, std::int64_t columns) {
    return doubles(o, "workspace", workspace, cuda::sums_workspace(sums, columns), true);
}

void row_dots(py::handle q, py::handle w, py::handle rows_given, py::handle sums,
              py::handle workspace, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const std::int64_t rows = whole("rows", rows_given, 1, kMostVectors);
    Operands o{{"q", q, false}, {"w", w, false}};
    const Recurrence r{o.dtype(),
                       rows,
                       columns_of(o, rows),
                       nullptr,
                       o.pointers(0)[0],
                       o.pointers(1)[0],
                       nullptr,
                       doubles(o, "sums", sums, 2 * rows, true)};
    run(
        o, threads, [&] { cpu::row_dots(r, threads); },
        [&](int device, void* stream) {
            cuda::row_dots(r, workspace_of(o, workspace, 2 * rows, r.columns), device, stream);
        });
}

void lanczos_step(py::handle u, py::handle q, py::handle w, py::handle rows_given,
                  py::handle factors, py::handle sums, py::handle workspace,
                  py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const std::int64_t rows = whole("rows", rows_given, 1, kMostVectors);
    Operands o{{"u", u, true}, {"q", q, false}, {"w", w, false}};
    const Recurrence r{o.dtype(),
                       rows,
                       columns_of(o, rows),
                       o.pointers(0)[0],
                       o.pointers(1)[0],
                       o.pointers(2)[0],
                       doubles(o, "factors", factors, 3 * rows, false),
                       doubles(o, "sums", sums, 2 * rows, true)};
    run(
        o, threads, [&] { cpu::lanczos_step(r, threads); },
        [&](int device, void* stream) {
            cuda::lanczos_step(r, workspace_of(o, workspace, 2 * rows, r.columns), device, stream);
        });
}

void gram(py::handle vectors, py::handle rows_given, py::handle out, py::handle workspace,
          py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const std::int64_t rows = whole("rows", rows_given, 1, kMostRows);
    Operands o{{"vectors", vectors, false}};
    const Rows v{o.dtype(), rows, columns_of(o, rows), o.pointers(0)[0]};
    double* products = doubles(o, "out", out, rows * rows, true);
    run(
        o, threads, [&] { cpu::gram(v, products, threads); },
        [&](int device, void* stream) {
            cuda::gram(v, products, workspace_of(o, workspace, rows * rows, v.columns), device,
                       stream);
        });
}

void mix_rows(py::handle vectors, py::handle rows_given, py::handle factors,
              py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const std::int64_t rows = whole("rows", rows_given, 1, kMostRows);
    Operands o{{"vectors", vectors, true}};
    const Rows v{o.dtype(), rows, columns_of(o, rows), o.pointers(0)[0]};
    const double* lower = doubles(o, "factors", factors, rows * rows, false);
    run(
        o, threads, [&] { cpu::mix_rows(v, lower, threads); },
        [&](int device, void* stream) { cuda::mix_rows(v, lower, device, stream); });
}

// What names a list of gradients in Python.
bool names_gradients(const std::string& name) {
    return name == "grads" || name == "base_grads" || name == "tensors";
}

// Roles whose names and flags come from Python; the names must outlive the Operands.
class NamedRoles {
 public:
    NamedRoles(py::handle names, py::handle lists, py::handle written)
        : names_(items_of("names", names, "")),
          lists_(items_of("lists", lists, "")),
          written_(items_of("written", written, "")) {
        if (lists_.size() != size() || written_.size() != size() || size() < 1 ||
            size() > Operands::kMaxRoles)
            throw py::value_error("names, lists and written must have equal lengths, 1 to 5");
        for (std::size_t r = 0; r < size(); ++r) {
            const py::object name = names_[r];
            const char* const text =
                PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8(name.ptr()) : nullptr;
            if (text == nullptr) {
                PyErr_Clear();
                throw py::type_error("names must be strings");
            }
            roles_[r] = {text, py::object(lists_[r]), truth("written", py::object(written_[r])),
                         r > 0, names_gradients(text)};
        }
    }
    std::size_t size() const { return names_.size(); }
    Operands read() const { return Operands(roles_.data(), size()); }

 private:
    py::tuple names_, lists_, written_;
    std::array<Role, Operands::kMaxRoles> roles_;
};

py::tuple check(py::handle names, py::handle lists, py::handle written) {
    return table_of(NamedRoles(names, lists, written).read());
}

// Sizes of workspaces, for what a call may be given.
std::int64_t orthogonalize_workspace(py::handle rows, py::handle columns, py::handle count) {
    const std::int64_t m = whole("rows", rows, 0, INT64_MAX / 2);
    const std::int64_t n = whole("columns", columns, 0, INT64_MAX / 2);
    const std::int64_t b = whole("count", count, 0, INT64_MAX / 2);
    product(product(m + 1, n + 2), b);
    return cuda::orthogonalize_workspace(m, n, b);
}

std::int64_t sums_workspace(py::handle sums, py::handle columns) {
    const std::int64_t s = whole("sums", sums, 0, INT64_MAX / 2);
    const std::int64_t n = whole("columns", columns, 0, INT64_MAX / 2);
    product(s, n + 1);
    return cuda::sums_workspace(s, n);
}

void require_cuda() { cuda::require(); }

// What the CUDA kernels were compiled for, in CMake's words.
py::tuple cuda_architectures() {
#ifdef EIGENFILTER_CUDA_ARCHITECTURES
    return py::tuple(py::str(EIGENFILTER_CUDA_ARCHITECTURES).attr("split")(","));
#else
    return py::tuple();
#endif
}

}  // namespace

void register_kernels(py::module_& module) {
    module.attr("cuda_compiled") = cuda::compiled();
    module.attr("cuda_architectures") = cuda_architectures();
    module.attr("cuda_device_type") = kCudaDeviceType;
    define(module, "require_cuda", &require_cuda);
    define(module, "check", &check);
    define(module, "perturb", &perturb);
    define(module, "perturb_again", &perturb_again);
    define(module, "perturb_hvp", &perturb_hvp);
    define(module, "sgd_step", &sgd_step);
    define(module, "adamw_step", &adamw_step);
    define(module, "norm", &norm);
    define(module, "norm_workspace", &norm_workspace);
    define(module, "flag_nonfinite", &flag_nonfinite);
    define(module, "orthogonalize", &orthogonalize);
    define(module, "orthogonalize_workspace", &orthogonalize_workspace);
    define(module, "sums_workspace", &sums_workspace);
    define(module, "row_dots", &row_dots);
    define(module, "lanczos_step", &lanczos_step);
    define(module, "gram", &gram);
    define(module, "mix_rows", &mix_rows);
}

}  // namespace eigenfilter
