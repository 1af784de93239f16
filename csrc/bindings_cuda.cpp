// rlfast._cuda: the CUDA kernels for Python. Pointers come as integers; the caller has checked shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda/token_logps.h"
#include "cuda/token_loss.h"

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

int64_t loss_scratch(const std::vector<int64_t>& fields, const std::vector<int>& plan,
                     const std::vector<float>& settings) {
  return cuda::token_loss_scratch(loss_call(fields, plan, settings, 0, {}, 0, {}, 0, 0, 0, 0));
}

void loss(RLFAST_LOSS_ARGS, Address scratch, Address finished, int device, Address stream) {
  LossCall call = RLFAST_LOSS_RECORD;
  py::gil_scoped_release release;
  cuda::token_loss(call, at<double>(scratch), at<unsigned>(finished), device, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA C++ kernels of rlfast.";
  m.def("token_logps_scratch", &cuda::token_logps_scratch, py::arg("rows"), py::arg("vocab"), py::arg("top_k"),
        py::arg("device"),
        "Floats of scratch that a forward needs: leaf statistics, where a row is split over several blocks.");
  m.def("token_logps_forward", &forward);
  m.def("token_logps_backward", &backward);
  m.def("token_loss_surrogates", &cuda::token_loss_surrogates);
  m.def("token_loss_estimators", &cuda::token_loss_estimators);
  m.def("token_loss_scratch", &loss_scratch, "Doubles of scratch that a call needs.");
  m.def("token_loss", &loss);
}
