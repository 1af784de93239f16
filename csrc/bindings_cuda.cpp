// rlfast._cuda: the CUDA kernels for Python. Pointers come as integers; the caller has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_divergence.h"
#include "bindings_preference.h"
#include "cuda/affine_scan.h"
#include "cuda/divergence.h"
#include "cuda/pair_loss.h"
#include "cuda/token_logps.h"
#include "cuda/token_loss.h"
#include "cuda/unpaired_loss.h"

namespace py = pybind11;
using namespace rlfast;

namespace {

void forward(RLFAST_FORWARD_ARGS, Address scratch, int device, Address stream) {
  py::gil_scoped_release release;
  cuda::token_logps_forward(RLFAST_FORWARD_RECORDS, at<float>(scratch), device, at<void>(stream));
}

void backward(RLFAST_BACKWARD_ARGS, int device, Address stream) {
  py::gil_scoped_release release;
  cuda::token_logps_backward(RLFAST_BACKWARD_RECORDS, device, at<void>(stream));
}

void divergence_forward(RLFAST_PAIR_ARGS, RLFAST_PAIR_OUT_ARGS, Address scratch, int device, Address stream) {
  py::gil_scoped_release release;
  cuda::divergence_forward(RLFAST_PAIR_RECORDS, RLFAST_PAIR_OUT_RECORD(outer * inner), at<float>(scratch), device,
                           at<void>(stream));
}

void divergence_backward(RLFAST_PAIR_ARGS, RLFAST_PAIR_IN_ARGS, Address out, int64_t out_outer, int64_t out_inner,
                         int device, Address stream) {
  py::gil_scoped_release release;
  cuda::divergence_backward(RLFAST_PAIR_RECORDS, RLFAST_PAIR_IN_RECORD(outer * inner),
                            Logits{at<void>(out), static_cast<DType>(dtype), outer, inner, vocab, out_outer, out_inner},
                            device, at<void>(stream));
}

int64_t loss_scratch(py::handle fields, py::handle sizes, const char* surrogate, const char* estimator, py::handle plan,
                     py::handle settings, py::handle hyper, py::handle kl_hyper, py::handle outputs) {
  const LossArguments a(fields, sizes, surrogate, estimator, plan, settings, hyper, kl_hyper, outputs);
  return cuda::token_loss_scratch(a.objective, a.fields);
}

void loss(py::handle fields, py::handle sizes, const char* surrogate, const char* estimator, py::handle plan,
          py::handle settings, py::handle hyper, py::handle kl_hyper, py::handle outputs, Address scratch,
          Address finished, int device, Address stream) {
  const LossArguments a(fields, sizes, surrogate, estimator, plan, settings, hyper, kl_hyper, outputs);
  py::gil_scoped_release release;
  cuda::token_loss(a.objective, a.fields, a.out, at<double>(scratch), at<unsigned>(finished), device, at<void>(stream));
}

void pair_loss(py::handle sides, RLFAST_PREFERENCE_ARGS, Address scratch, Address finished, int device,
               Address stream) {
  const PreferenceArguments a(RLFAST_PREFERENCE_RECORDS(sides));
  py::gil_scoped_release release;
  cuda::pair_loss(a.call, a.sides[0], a.sides[1], a.rest, rows, a.out, at<double>(scratch), at<unsigned>(finished),
                  device, at<void>(stream));
}

void unpaired_loss(py::handle sides, py::handle desirable, RLFAST_PREFERENCE_ARGS, Address scratch, Address finished,
                   int device, Address stream) {
  const PreferenceArguments a(RLFAST_PREFERENCE_RECORDS(sides));
  const LossFlags flags = loss_flags(desirable);
  py::gil_scoped_release release;
  cuda::unpaired_loss(a.call, a.sides[0], flags, a.rest, rows, a.out, at<double>(scratch), at<unsigned>(finished),
                      device, at<void>(stream));
}

void affine_scan(RLFAST_SCAN_ARGS, int64_t longest, Address scratch, int device, Address stream) {
  py::gil_scoped_release release;
  const auto records = [&](const ScanIn& in, const ScanOut& out, const Whiten& how) {
    cuda::affine_scan(in, out, how, longest, at<double>(scratch), device, at<void>(stream));
  };
  records(RLFAST_SCAN_RECORDS);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA C++ kernels of rlfast.";
  m.def("token_logps_scratch", &cuda::token_logps_scratch, py::arg("rows"), py::arg("vocab"), py::arg("top_k"),
        py::arg("device"),
        "Floats of scratch that a forward needs: leaf statistics, where a row is split over several blocks.");
  m.def("affine_scan_scratch", &cuda::affine_scan_scratch, py::arg("rows"), py::arg("longest"), py::arg("packed"),
        py::arg("whiten"), py::arg("device"),
        "Doubles of scratch that affine_scan needs: the maps of the segments of few long rows, the moments of all.");
  m.def("affine_scan", &affine_scan);
  m.def("token_logps_forward", &forward);
  m.def("token_logps_backward", &backward);
  m.def(
      "divergence_scratch", &cuda::divergence_scratch, py::arg("rows"), py::arg("vocab"), py::arg("device"),
      "Floats of scratch that a forward of divergence needs: leaf statistics, where they do not fit in shared memory.");
  m.def("divergence_forward", &divergence_forward);
  m.def("divergence_backward", &divergence_backward);
  m.def("token_loss_surrogates", &cuda::token_loss_surrogates);
  m.def("token_loss_scratch", &loss_scratch, "Doubles of scratch that a call needs.");
  m.def("token_loss", &loss);
  m.def("preference_formulas", &preference_formulas);
  m.def("pair_loss_scratch", &cuda::pair_loss_scratch, py::arg("pairs"), py::arg("tokens"),
        "Doubles of scratch that a call needs.");
  m.def("pair_loss", &pair_loss);
  m.def("unpaired_loss_scratch", &cuda::unpaired_loss_scratch, py::arg("rows"), py::arg("tokens"),
        "Doubles of scratch that a call needs.");
  m.def("unpaired_loss", &unpaired_loss);
}
