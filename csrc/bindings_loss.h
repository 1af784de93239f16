// The arguments of token_loss as both extensions take them from Python; rlfast/native/token_loss.py passes them.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "rlfast/token_loss.h"

namespace rlfast {

// The numbers of a tuple or list, read without a copy.
class Numbers {
public:
  explicit Numbers(pybind11::handle x)
      : list_(pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(x.ptr(), "expected a tuple or a list"))) {
    if (!list_) throw pybind11::error_already_set();
  }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(list_.ptr()); }
  pybind11::handle operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(list_.ptr(), i); }
  int64_t integer(Py_ssize_t i) const { return PyLong_AsLongLong((*this)[i].ptr()); }
  Address address(Py_ssize_t i) const { return static_cast<Address>(integer(i)); }

  template <class T>
  void into(T* to, Py_ssize_t most) const {
    if (size() > most) throw pybind11::value_error("token_loss: more numbers than the record has");
    for (Py_ssize_t i = 0; i < size(); ++i) to[i] = static_cast<T>(PyFloat_AsDouble((*this)[i].ptr()));
    if (PyErr_Occurred()) throw pybind11::error_already_set();
  }

private:
  pybind11::object list_;
};

// None, or (address, dtype, stride of a row, stride of a token).
inline LossField loss_field(pybind11::handle x) {
  if (x.is_none()) return {};
  const Numbers n(x);
  return {at<const void>(n.address(0)), static_cast<DType>(n.integer(1)), n.integer(2), n.integer(3)};
}

// None, or (address, stride of a row).
inline LossFlags loss_flags(pybind11::handle x) {
  if (x.is_none()) return {};
  const Numbers n(x);
  return {at<const uint8_t>(n.address(0)), n.integer(1)};
}

struct LossArguments {
  static constexpr int kMostHyper = 16;
  float hyper[kMostHyper] = {}, kl_hyper[kMostHyper] = {};
  LossObjective objective{};
  LossFields fields{};
  LossOut out{};

  // fields: the ten in the order of the record; sizes: (cu_seqlens, num_items, coefs, rows, length); plan, settings, hyper,
  // kl_hyper: numbers; outputs: addresses of loss, metrics, dlogp, dentropy
  LossArguments(pybind11::handle fields_, pybind11::handle sizes, const char* surrogate, const char* estimator,
                pybind11::handle plan, pybind11::handle settings, pybind11::handle hyper_, pybind11::handle kl_hyper_,
                pybind11::handle outputs) {
    const Numbers f(fields_), s(sizes), o(outputs);
    fields = {loss_field(f[0]),
              loss_field(f[1]),
              loss_field(f[2]),
              loss_field(f[3]),
              loss_field(f[4]),
              loss_field(f[5]),
              loss_field(f[6]),
              loss_field(f[7]),
              loss_flags(f[8]),
              loss_flags(f[9]),
              at<const int64_t>(s.address(0)),
              at<const float>(s.address(1)),
              at<const float>(s.address(2)),
              s.integer(3),
              s.integer(4)};
    out = {at<float>(o.address(0)), at<LossMetrics>(o.address(1)), at<float>(o.address(2)), at<float>(o.address(3))};
    static_assert(sizeof(LossPlan) == 13 * sizeof(int) && sizeof(LossSettings) == 14 * sizeof(float), "");
    Numbers(plan).into(&objective.plan.unit, 13);
    Numbers(settings).into(&objective.settings.beta, 14);
    Numbers(hyper_).into(hyper, kMostHyper);
    Numbers(kl_hyper_).into(kl_hyper, kMostHyper);
    objective.surrogate = surrogate, objective.estimator = estimator;
    objective.hyper = hyper, objective.kl_hyper = kl_hyper;
  }
};

}  // namespace rlfast
