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
                   py::handle save_given, py::handle adaptive_given, py::handle grad_scale,
                   py::handle found_inf, py::handle num_threads) {
    const bool save = truth("save", save_given);
    const bool adaptive = truth("adaptive", adaptive_given);
    const int threads = threads_of(num_threads);
    if (save && backups.is_none())
        throw py::value_error(
            "save=True needs backups: pass tensors like the parameters, or save=False");
    Operands o{{"params", params, kWritten},
               {"grads", grads, kGradients},
               {"backups", backups, save ? kWritten : kOptional}};
    const Tensors t = tensors(o, o.pointers(1), o.pointers(2));
    const float* flag = o.flag("found_inf", found_inf);
    const PerturbScalars<Scalar> s{o.scalar("alpha", alpha, kComputed),
                                   scale_of(o, grad_scale, flag), adaptive, save};
    const bool ran = run(
        o, threads,
        [&] {
            cpu::perturb(t, {s.alpha.value, s.grad_scale.value, adaptive, save}, flag, threads);
        },
        [&](int device, void* stream) { cuda::perturb(t, s, flag, device, stream); });
    TensorList* const list = save ? tensor_list(backups) : nullptr;
    if (ran && list != nullptr) list->filled = true;
    return outcome(ran, o);
}

py::object perturb_hvp(py::handle params, py::handle grads, py::handle base_grads,
                       py::handle backups, py::handle alpha, py::handle eps, py::handle grad_scale,
                       py::handle found_inf, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"params", params, kWritten},
               {"grads", grads, kGradients},
               {"base_grads", base_grads, kGradients},
               {"backups", backups, kRead}};
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
    Operands o{{"params", params, kWritten},
               {"grads", grads, kGradients},
               {"momenta", momenta, kWritten | kOptional},
               {"backups", backups, kOptional}};
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
    if (momenta.is_none() && (nesterov || is_tensor(momentum) || s.momentum.value != 0))
        throw py::value_error("momentum and nesterov need momenta: pass buffers, zeros at first");
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
    Operands o{{"params", params, kWritten},
               {"grads", grads, kGradients},
               {"exp_avgs", exp_avgs, kWritten},
               {"exp_avg_sqs", exp_avg_sqs, kWritten},
               {"backups", backups, kOptional}};
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
    const Role tensors{"tensors", list, kGradients};
    if (weights.is_none()) return Operands{tensors};
    return Operands{{"weights", weights, kRead}, tensors};
}

Tensors reduction(const Operands& o, bool weighted) {
    Tensors t = tensors(o, weighted ? o.pointers(0) : nullptr);
    if (weighted) t.x = o.pointers(1);
    return t;
}

py::object norm(py::handle list, py::handle out, py::handle weights, py::handle grad_scale,
                py::handle num_threads) {
    const int threads = threads_of(num_threads);
    bool is_double = py::getattr(out, "itemsize", py::int_(4)).equal(py::int_(8));
    Operands o = reduced(list, weights);
    const Tensors t = reduction(o, !weights.is_none());
    const Scalar scale = scale_of(o, grad_scale);
    for (std::size_t i = 0; i < t.n; ++i) is_double |= t.gradient(i) == DType::f64;
    void* result = o.single("out", out, {1}, is_double ? 64 : 32, true);
    double value = 0;
    const bool ran = run(
        o, threads, [&] { value = cpu::norm(t, threads) * (1 / scale.value); },
        [&](int device, void* stream) {
            double* const workspace = o.workspace(cuda::norm_workspace(t));
            cuda::norm(t, scale, result, is_double, workspace, device, stream);
        });
    if (ran && o.on_cpu() && is_double)
        *static_cast<double*>(result) = value;
    else if (ran && o.on_cpu())
        *static_cast<float*>(result) = static_cast<float>(value);
    return outcome(ran, o);
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

double* doubles(Operands& o, const char* name, py::handle tensor, const Shape& shape,
                bool written) {
    return static_cast<double*>(o.single(name, tensor, shape, 64, written));
}

void require_at_most(std::int64_t most, const char* name, std::int64_t vectors) {
    if (vectors > most)
        fail(PyExc_ValueError, std::string(name) + " must be of at most " + std::to_string(most) +
                                   " vectors, not " + std::to_string(vectors));
}

// w [n] or [b, n], basis [m, n], coefficients [m] or [b, m], norms [] or [b]. They have dtypes and
// shapes of their own, and so are read apart.
void orthogonalize(py::handle w_given, py::handle basis, py::handle coefficients, py::handle norms,
                   py::handle passes_given, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    const auto passes = static_cast<int>(whole("passes", passes_given, 1, kMostPasses));
    Operands w{{"w", w_given, kWritten | kOneTensor}};
    Operands q{{"basis", basis, kOneTensor}};
    const Shape of_w = w.shape(), of_q = q.shape();
    if (of_q.size() != 2 || of_w.empty() || of_w.size() > 2 || of_w.back() != of_q[1])
        fail(PyExc_ValueError, "basis must be [m, n] and w [n] or [b, n]: got " + describe(of_q) +
                                   " and " + describe(of_w));
    w.require_vectors();
    q.require_contiguous();
    if (q.device().type != w.device().type || q.device().id != w.device().id)
        throw py::value_error("w and basis are on different devices: move one of them");
    const std::int64_t count = of_w.size() == 2 ? of_w[0] : 1, rows = of_q[0], columns = of_q[1];
    require_at_most(kMostVectors, "w", count);
    w.keep_apart("basis", q.pointers(0)[0], q.numel()[0] * size_of(q.dtype()), false);
    const Shape of_each(of_w.begin(), of_w.end() - 1);
    Shape of_coefficients = of_each;
    of_coefficients.push_back(rows);
    const Projection p{q.dtype(),
                       w.dtype(),
                       rows,
                       columns,
                       count,
                       q.pointers(0)[0],
                       w.pointers(0)[0],
                       doubles(w, "coefficients", coefficients, of_coefficients, true),
                       doubles(w, "norms", norms, of_each, true),
                       passes};
    q.require_unchanged();
    if (count * columns == 0) return;
    run(
        w, threads, [&] { cpu::orthogonalize(p, threads); },
        [&](int device, void* stream) {
            const std::int64_t size = cuda::orthogonalize_workspace(rows, columns, count);
            cuda::orthogonalize(p, w.workspace(size), device, stream);
        });
}

// The shape [b, n] of vectors, of which there may be `most`.
Shape shape_of_vectors(const Operands& o, const char* name, std::int64_t most) {
    if (o.shape().size() != 2)
        fail(PyExc_ValueError,
             std::string(name) + " must be [b, n]: its shape is " + describe(o.shape()));
    o.require_vectors();
    require_at_most(most, name, o.shape()[0]);
    return o.shape();
}

// Runs a kernel over vectors [b, n]; where they have no elements it has nothing to do.
template <class OnCPU, class OnCUDA>
void run_over(Operands& o, std::int64_t sums, int threads, OnCPU on_cpu, OnCUDA on_cuda) {
    const Shape shape = o.shape();
    if (shape[0] * shape[1] == 0) return;
    run(o, threads, on_cpu, [&](int device, void* stream) {
        double* const workspace =
            sums > 0 ? o.workspace(cuda::sums_workspace(sums, shape[1])) : nullptr;
        on_cuda(workspace, device, stream);
    });
}

// q, w [b, n]; sums [2, b]
void row_dots(py::handle q, py::handle w, py::handle sums, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"q", q, kOneTensor}, {"w", w, kOneTensor}};
    const Shape shape = shape_of_vectors(o, "q", kMostVectors);
    const Recurrence r{o.dtype(),        shape[0],
                       shape[1],         nullptr,
                       o.pointers(0)[0], o.pointers(1)[0],
                       nullptr,          doubles(o, "sums", sums, {2, shape[0]}, true)};
    run_over(
        o, 2 * r.rows, threads, [&] { cpu::row_dots(r, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::row_dots(r, workspace, device, stream);
        });
}

// u, q, w [b, n]; factors [3, b]; sums [2, b]
void lanczos_step(py::handle u, py::handle q, py::handle w, py::handle factors, py::handle sums,
                  py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"u", u, kWritten | kOneTensor}, {"q", q, kOneTensor}, {"w", w, kOneTensor}};
    const Shape shape = shape_of_vectors(o, "u", kMostVectors);
    const Recurrence r{o.dtype(),
                       shape[0],
                       shape[1],
                       o.pointers(0)[0],
                       o.pointers(1)[0],
                       o.pointers(2)[0],
                       doubles(o, "factors", factors, {3, shape[0]}, false),
                       doubles(o, "sums", sums, {2, shape[0]}, true)};
    run_over(
        o, 2 * r.rows, threads, [&] { cpu::lanczos_step(r, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::lanczos_step(r, workspace, device, stream);
        });
}

// vectors [b, n]; out [b, b]
void gram(py::handle vectors, py::handle out, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"vectors", vectors, kOneTensor}};
    const Shape shape = shape_of_vectors(o, "vectors", kMostRows);
    const Rows v{o.dtype(), shape[0], shape[1], o.pointers(0)[0]};
    double* products = doubles(o, "out", out, {v.rows, v.rows}, true);
    run_over(
        o, v.rows * v.rows, threads, [&] { cpu::gram(v, products, threads); },
        [&](double* workspace, int device, void* stream) {
            cuda::gram(v, products, workspace, device, stream);
        });
}

// vectors [b, n]; factors [b, b]
void mix_rows(py::handle vectors, py::handle factors, py::handle num_threads) {
    const int threads = threads_of(num_threads);
    Operands o{{"vectors", vectors, kWritten | kOneTensor}};
    const Shape shape = shape_of_vectors(o, "vectors", kMostRows);
    const Rows v{o.dtype(), shape[0], shape[1], o.pointers(0)[0]};
    const double* lower = doubles(o, "factors", factors, {v.rows, v.rows}, false);
    run_over(
        o, 0, threads, [&] { cpu::mix_rows(v, lower, threads); },
        [&](double*, int device, void* stream) { cuda::mix_rows(v, lower, device, stream); });
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
            const bool written = truth("written", py::object(written_[r]));
            roles_[r] = {text, py::object(lists_[r]),
                         (written ? kWritten : kRead) | (r > 0 ? kOptional : kRead) |
                             (names_gradients(text) ? kGradients : kRead)};
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
    define(module, "require_cuda", "",
           "Raise RuntimeError, with what to do, unless the CUDA kernels were compiled.",
           &require_cuda);
    define(
        module, "check", "names lists written",
        "Raise what the kernels raise for lists that do not go together; None is an absent list.",
        &check);
    // With num_threads 0 a kernel checks its arguments and does nothing else; those of lists return
    // what they have read.
    define(
        module, "perturb",
        "params grads backups alpha save adaptive grad_scale found_inf num_threads",
        "Perturb parameters along their gradients, from their values or from backups.\n\n"
        "    save:  b <- x,  x <- x + alpha g / grad_scale\n"
        "    else:  x <- b + alpha g / grad_scale, or x + alpha g / grad_scale without backups\n\n"
        "With `adaptive`, g is multiplied by the square of what x starts from. Where found_inf is "
        "set, x stays, and save still saves it.",
        &perturb);
    define(module, "perturb_hvp",
           "params grads base_grads backups alpha eps grad_scale found_inf num_threads",
           "Perturb the backups along a Hessian-vector product by finite differences.\n\n"
           "    x <- b + alpha (g - g0) / (eps grad_scale)",
           &perturb_hvp);
    define(module, "sgd_step",
           "params grads momenta backups lr momentum dampening weight_decay nesterov maximize "
           "rounding_seed grad_scale found_inf num_threads",
           "Restore the parameters from backups, if there are any, and take one step of SGD.\n\n"
           "    d = g / grad_scale + wd x,  m <- momentum m + (1 - dampening) d,  x <- x - lr m",
           &sgd_step);
    define(
        module, "adamw_step",
        "params grads exp_avgs exp_avg_sqs backups lr beta1 beta2 eps weight_decay step maximize "
        "rounding_seed grad_scale found_inf num_threads",
        "Restore the parameters from backups, if there are any, and take one step of AdamW.\n\n"
        "    d = g / grad_scale,  m <- beta1 m + (1 - beta1) d,  v <- beta2 v + (1 - beta2) d^2\n"
        "    x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)",
        &adamw_step);
    define(module, "norm", "tensors out weights grad_scale num_threads",
           "Euclidean norm of all elements of all tensors, or of their products with weights.\n\n"
           "    out <- sqrt(sum_i sum_j (w_i[j] t_i[j])^2) / grad_scale",
           &norm);
    define(module, "flag_nonfinite", "tensors found_inf num_threads",
           "Set a flag where any element is infinite or NaN.\n\n"
           "    found_inf <- 1 if some t_i[j] is not finite, else unchanged",
           &flag_nonfinite);
    // Of vectors without elements the following write nothing: results are to be zero before.
    define(module, "orthogonalize", "w basis coefficients norms passes num_threads",
           "Orthogonalize vectors w in place against a basis Q, `passes` times.\n\n"
           "    c <- c + Q w,  w <- w - Q^T (Q w);  norms <- ||w||",
           &orthogonalize);
    define(module, "row_dots", "q w sums num_threads",
           "Inner products of vectors, and squared norms of the second ones.\n\n"
           "    s_0i <- q_i . w_i,  s_1i <- w_i . w_i",
           &row_dots);
    define(module, "lanczos_step", "u q w factors sums num_threads",
           "Take one step of many Lanczos recurrences.\n\n"
           "    u_i <- f_0i w_i + f_1i q_i + f_2i u_i,  s_0i <- u_i . u_i,  s_1i <- u_i . q_i",
           &lanczos_step);
    define(module, "gram", "vectors out num_threads",
           "Gram matrix of a few vectors.\n\n    G_ij <- v_i . v_j", &gram);
    define(module, "mix_rows", "vectors factors num_threads",
           "Multiply a few vectors by a lower triangular matrix in place.\n\n"
           "    v_i <- sum_{j <= i} F_ij v_j",
           &mix_rows);
}

}  // namespace eigenfilter
