// rlfast._cpu: the CPU kernels for Python. Pointers come as integers; the caller has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings_divergence.h"
#include "bindings_preference.h"
#include "cpu/kernels.h"
#include "rlfast/formulas.gen.h"

namespace py = pybind11;
using namespace rlfast;

namespace {

const Kernels& kernels_of(const char* name) {
  Isa isa;
  if (!isa_from_name(name, &isa)) throw py::value_error(std::string("isa: not available here: ") + name);
  return kernels(isa);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < isa_count(); ++i) {
    if (isa_usable(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

void forward(RLFAST_FORWARD_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.token_logps_forward(RLFAST_FORWARD_RECORDS, threads);
}

void backward(RLFAST_BACKWARD_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.token_logps_backward(RLFAST_BACKWARD_RECORDS, threads);
}

void linear_forward(RLFAST_HEAD_ARGS, RLFAST_FORWARD_OUT_ARGS, Address kept, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.linear_token_logps_forward(
      RLFAST_HEAD_RECORDS,
      forward_out(logp, lse, entropy, is_top1, topk_logp, topk_ids, top_k, aux, bits, candidates, rows),
      at<float>(kept), threads);
}

void linear_backward(RLFAST_HEAD_ARGS, Address aux, Address g_logp, Address g_lse, Address g_entropy, Address kept,
                     Address g_hidden, Address g_weight, Address g_bias, bool wide, bool add, const char* isa,
                     int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.linear_token_logps_backward(
      RLFAST_HEAD_RECORDS, backward_in(aux, g_logp, g_lse, g_entropy, candidates, rows), at<const float>(kept),
      HeadGradients{at<void>(g_hidden), at<void>(g_weight), at<void>(g_bias), wide, add}, threads);
}

void divergence_forward(RLFAST_PAIR_ARGS, RLFAST_PAIR_OUT_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.divergence_forward(RLFAST_PAIR_RECORDS, RLFAST_PAIR_OUT_RECORD(outer * inner), threads);
}

void divergence_backward(RLFAST_PAIR_ARGS, RLFAST_PAIR_IN_ARGS, Address out, int64_t out_outer, int64_t out_inner,
                         const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.divergence_backward(RLFAST_PAIR_RECORDS, RLFAST_PAIR_IN_RECORD(outer * inner),
                        Logits{at<void>(out), static_cast<DType>(dtype), outer, inner, vocab, out_outer, out_inner},
                        threads);
}

void linear_divergence_forward(RLFAST_HEADS_ARGS, RLFAST_PAIR_OUT_ARGS, Address kept, Address ref_kept, const char* isa,
                               int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.linear_divergence_forward(RLFAST_HEADS_RECORDS, RLFAST_PAIR_OUT_RECORD(rows), at<float>(kept), at<float>(ref_kept),
                              threads);
}

void linear_divergence_backward(RLFAST_HEADS_ARGS, RLFAST_PAIR_IN_ARGS, Address kept, Address other_kept,
                                Address g_hidden, Address g_weight, Address g_bias, bool wide, bool add,
                                const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.linear_divergence_backward(
      RLFAST_HEADS_RECORDS, RLFAST_PAIR_IN_RECORD(rows), at<const float>(kept), at<const float>(other_kept),
      HeadGradients{at<void>(g_hidden), at<void>(g_weight), at<void>(g_bias), wide, add}, threads);
}

void loss(py::handle fields, py::handle sizes, const char* surrogate, const char* estimator, py::handle plan,
          py::handle settings, py::handle hyper, py::handle kl_hyper, py::handle outputs, const char* isa,
          int threads) {
  const Kernels& k = kernels_of(isa);
  const LossArguments a(fields, sizes, surrogate, estimator, plan, settings, hyper, kl_hyper, outputs);
  py::gil_scoped_release release;
  k.token_loss(a.objective, a.fields, a.out, threads);
}

void pair_loss(py::handle sides, RLFAST_PREFERENCE_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  const PreferenceArguments a(RLFAST_PREFERENCE_RECORDS(sides));
  py::gil_scoped_release release;
  k.pair_loss(a.call, a.sides[0], a.sides[1], a.rest, rows, a.out, threads);
}

void unpaired_loss(py::handle sides, py::handle desirable, RLFAST_PREFERENCE_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  const PreferenceArguments a(RLFAST_PREFERENCE_RECORDS(sides));
  const LossFlags flags = loss_flags(desirable);
  py::gil_scoped_release release;
  k.unpaired_loss(a.call, a.sides[0], flags, a.rest, rows, a.out, threads);
}

// fields: the seven of the record, the address of num_items, rows and size; settings: the call's floats in their order;
// outputs: addresses of loss, metrics, gradient and losses
void ranked_loss(py::handle fields, const char* form, py::handle settings, int sum, py::handle outputs, const char* isa,
                 int threads) {
  const Kernels& k = kernels_of(isa);
  const Numbers f(fields), o(outputs);
  const RankedGroups groups = {loss_field(f[0]), loss_field(f[1]),
                               loss_field(f[2]), loss_field(f[3]),
                               loss_flags(f[4]), at<const int64_t>(f.address(5)),
                               loss_field(f[6]), at<const float>(f.address(7)),
                               f.integer(8),     f.integer(9)};
  float x[6] = {};
  Numbers(settings).into(x, 6);
  const RankedCall call = {form, sum, x[0], x[1], x[2], x[3], x[4], x[5]};
  const RankedOut out = {at<float>(o.address(0)), at<RankedMetrics>(o.address(1)), at<float>(o.address(2)),
                         at<float>(o.address(3))};
  py::gil_scoped_release release;
  k.ranked_loss(call, groups, out, threads);
}

// The surrogates that have a C++ formula.
std::vector<std::string> surrogates() {
  return {
#define RLFAST_SURROGATE_NAME(formula, Hyper) #formula,
      RLFAST_SURROGATE_FORMULAS(RLFAST_SURROGATE_NAME)
#undef RLFAST_SURROGATE_NAME
  };
}

void affine_scan(RLFAST_SCAN_ARGS, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.affine_scan(RLFAST_SCAN_RECORDS, threads);
}

// GAE of dense float32 rows: the call of every training step, with the few arguments that it needs.
void gae(Address rewards, Address values, Address mask, int64_t rows, int64_t steps, double gamma, double lam,
         Address advantages, Address returns, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  ScanIn in{};
  in.rows = rows, in.steps = steps, in.reverse = true;
  in.rewards = {at<const void>(rewards), DType::f32, steps}, in.values = {at<const void>(values), DType::f32, steps};
  in.mask = {at<const uint8_t>(mask), steps};
  in.gamma.one = gamma, in.lam.one = lam;
  k.affine_scan(in, {at<float>(advantages), at<float>(returns)}, {}, threads);
}

void group_advantage(int64_t samples, Address rewards, int dtype, Address ids, int64_t size, Address mask,
                     Address weights, int baseline, int scale, bool bessel, bool lone_raw, bool skip_zero, double eps,
                     double tau, Address advantages, Address statistics, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.group_advantage({samples, at<const void>(rewards), static_cast<DType>(dtype), at<const int64_t>(ids), size,
                     at<const uint8_t>(mask), at<const double>(weights)},
                    {static_cast<Baseline>(baseline), static_cast<Scale>(scale), bessel, lone_raw, skip_zero, eps, tau},
                    {at<float>(advantages), at<double>(statistics)}, threads);
}

void linear(Address x, Address weight, Address bias, int dtype, int64_t rows, int64_t depth, int64_t columns,
            int64_t stride_x, int64_t stride_weight, Address out, bool wide, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.linear({at<const void>(x), at<const void>(weight), at<const void>(bias), static_cast<DType>(dtype), rows, depth,
            columns, stride_x, stride_weight},
           {at<void>(out), wide}, threads);
}

// A cache is an address, the strides of its pages, slots and heads, and its width.
void paged_attention(Address q, int dtype, int64_t q_token, int64_t q_head, Address k, int64_t k_page, int64_t k_slot,
                     int64_t k_head, int64_t k_width, Address v, int64_t v_page, int64_t v_slot, int64_t v_head,
                     int64_t v_width, int64_t page_size, Address table, int64_t table_row, Address cu, Address kv_lens,
                     Address sinks, int64_t sequences, int64_t heads, int64_t kv_heads, float scale, float softcap,
                     int64_t window, Address out, const char* isa, int threads) {
  const Kernels& kernels = kernels_of(isa);
  py::gil_scoped_release release;
  kernels.paged_attention({static_cast<DType>(dtype),
                           at<const void>(q),
                           q_token,
                           q_head,
                           {at<const void>(k), k_page, k_slot, k_head, k_width},
                           {at<const void>(v), v_page, v_slot, v_head, v_width},
                           page_size,
                           at<const int32_t>(table),
                           table_row,
                           at<const int32_t>(cu),
                           at<const int32_t>(kv_lens),
                           at<const float>(sinks),
                           sequences,
                           heads,
                           kv_heads,
                           scale,
                           softcap,
                           window},
                          at<void>(out), threads);
}

void sample(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, Address temperature, Address top_k,
            Address top_p, Address min_p, Address seeds, Address positions, Address edit_ends, Address edit_ids,
            Address edit_values, int64_t edits, Address allowed, Address tokens, Address logp_raw, Address logp,
            Address kept, Address entropy, const char* isa, int threads) {
  const Kernels& k = kernels_of(isa);
  py::gil_scoped_release release;
  k.sample({at<void>(logits), static_cast<DType>(dtype), 1, rows, vocab, 0, stride},
           {at<const float>(temperature), at<const int32_t>(top_k), at<const float>(top_p), at<const float>(min_p),
            at<const int64_t>(seeds), at<const int64_t>(positions)},
           {at<const int32_t>(edit_ends), at<const int32_t>(edit_ids), at<const float>(edit_values), edits,
            at<const int32_t>(allowed)},
           {at<int64_t>(tokens), at<float>(logp_raw), at<float>(logp), at<float>(kept), at<float>(entropy)}, threads);
}

double read_bandwidth(Address data, size_t bytes, int threads) {
  const Kernels& k = kernels_of(isas().back().c_str());
  py::gil_scoped_release release;
  return k.read_sum(reinterpret_cast<const void*>(data), bytes, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The C++ CPU kernels of rlfast.";
  m.def("isas", &isas, "Instruction sets that were compiled and that this processor has, slowest first.");
  m.def("token_logps_forward", &forward);
  m.def("token_logps_backward", &backward);
  m.def("linear_token_logps_forward", &linear_forward);
  m.def("linear_token_logps_backward", &linear_backward);
  m.def("divergence_forward", &divergence_forward);
  m.def("divergence_backward", &divergence_backward);
  m.def("linear_divergence_forward", &linear_divergence_forward);
  m.def("linear_divergence_backward", &linear_divergence_backward);
  m.def("token_loss", &loss);
  m.def("token_loss_surrogates", &surrogates);
  m.def("pair_loss", &pair_loss);
  m.def("unpaired_loss", &unpaired_loss);
  m.def("ranked_loss", &ranked_loss);
  m.def("preference_formulas", &preference_formulas);
  m.def("affine_scan", &affine_scan);
  m.def("gae", &gae);
  m.def("group_advantage", &group_advantage);
  m.def("linear", &linear);
  m.def("paged_attention", &paged_attention);
  m.def("sample", &sample);
  m.def("read_bandwidth", &read_bandwidth, py::arg("data"), py::arg("bytes"), py::arg("threads"),
        "Reads every byte once and returns the sum of them as float32: the ceiling of a kernel that reads once.");
}
