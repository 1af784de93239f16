// rlfast._cuda: the CUDA kernels for Python. Pointers come as integers; the caller has checked shapes and dtypes.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cuda/token_logps.h"

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA C++ kernels of rlfast.";
  m.def("token_logps_scratch", &cuda::token_logps_scratch, py::arg("rows"), py::arg("vocab"), py::arg("top_k"),
        py::arg("device"),
        "Floats of scratch that a forward needs: leaf statistics, where a row is split over several blocks.");
  m.def("token_logps_forward", &forward);
  m.def("token_logps_backward", &backward);
}
