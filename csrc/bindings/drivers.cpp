// kvmem._core.Driver, and the functions that make one. The verbs are bound one to one; driver.h and checked_driver.h
// describe them.

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "bindings/bindings.h"
#include "driver/checked_driver.h"
#include "driver/driver.h"
#include "driver/host/prefetch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

// read_bytes() and write_bytes() copy through the kernel, which answers EFAULT where a load or store would be a fatal
// signal.
[[noreturn]] void cannot_touch(const char* call, Address at, i64 bytes) {
  const int code = errno;
  throw DeviceError(std::string(call) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(at) + ": " +
                        (code ? std::strerror(code) : "only part of the range is accessible"),
                    call, code);
}

nb::bytes read_bytes(Address at, i64 bytes) {
  std::string data(static_cast<size_t>(bytes), '\0');
  iovec ours{data.data(), data.size()}, theirs{reinterpret_cast<void*>(at), data.size()};
  errno = 0;
  if (process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0) != bytes) cannot_touch("read_bytes", at, bytes);
  return nb::bytes(data.data(), data.size());
}

void write_bytes(Address at, nb::bytes data) {
  iovec ours{const_cast<char*>(data.c_str()), data.size()}, theirs{reinterpret_cast<void*>(at), data.size()};
  errno = 0;
  const i64 bytes = static_cast<i64>(data.size());
  if (process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0) != bytes) cannot_touch("write_bytes", at, bytes);
}

void bind_info(nb::module_& m) {
  nb::class_<DriverInfo>(m, "DriverInfo")
      .def(
          "__init__",
          [](DriverInfo* self, const std::string& name, i64 granularity_bytes, i64 recommended_bytes) {
            new (self) DriverInfo{name};
            self->granularity_bytes = granularity_bytes, self->recommended_bytes = recommended_bytes;
          },
          nb::kw_only(), "name"_a, "granularity_bytes"_a, "recommended_bytes"_a)
      .def_ro("name", &DriverInfo::name)
      .def_ro("dlpack_device_type", &DriverInfo::dlpack_device_type)
      .def_ro("device_index", &DriverInfo::device_index)
      .def_ro("granularity_bytes", &DriverInfo::granularity_bytes)
      .def_ro("recommended_bytes", &DriverInfo::recommended_bytes)
      .def_ro("total_bytes", &DriverInfo::total_bytes)
      .def_ro("fresh_pages_are_zero", &DriverInfo::fresh_pages_are_zero)
      .def_ro("shareable", &DriverInfo::shareable)
      .def_ro("rdma", &DriverInfo::rdma)
      .def_ro("creates_ahead", &DriverInfo::creates_ahead)
      .def_ro("maps_cheaply", &DriverInfo::maps_cheaply)
      .def_ro("tells_free_bytes", &DriverInfo::tells_free_bytes)
      .def_ro("has_streams", &DriverInfo::has_streams)
      .def_ro("captured_code", &DriverInfo::captured_code)
      .def_ro("most_pages", &DriverInfo::most_pages)
      .def_ro("default_guard_tokens", &DriverInfo::default_guard_tokens)
      .def_ro("default_ahead_tokens", &DriverInfo::default_ahead_tokens);
  nb::class_<DriverCounters>(m, "DriverCounters")
      .def_ro("reserve", &DriverCounters::reserve)
      .def_ro("release", &DriverCounters::release)
      .def_ro("create", &DriverCounters::create)
      .def_ro("destroy", &DriverCounters::destroy)
      .def_ro("map", &DriverCounters::map)
      .def_ro("set_access", &DriverCounters::set_access)
      .def_ro("unmap", &DriverCounters::unmap)
      .def_ro("zero", &DriverCounters::zero)
      .def_ro("copy", &DriverCounters::copy)
      .def_ro("load", &DriverCounters::load)
      .def_ro("store", &DriverCounters::store)
      .def_ro("record", &DriverCounters::record)
      .def_ro("wait", &DriverCounters::wait)
      .def_prop_ro("total", &DriverCounters::total);
}

template <auto kMap>
auto map_pages(Driver& driver, Address at, i64 page_bytes, const std::vector<PageHandle>& pages) {
  return (driver.*kMap)(at, page_bytes, pages.data(), static_cast<i64>(pages.size()));
}

void bind_driver(nb::module_& m) {
  nb::class_<Driver>(m, "Driver")
      .def_prop_ro("info", &Driver::info, nb::rv_policy::reference_internal)
      .def("counters", &Driver::counters)
      .def("physical_bytes", &Driver::physical_bytes, Free())
      .def("available_bytes", &Driver::available_bytes, Free())
      .def("reserve", &Driver::reserve, "bytes"_a, "alignment"_a = 0, Free())
      .def("release", &Driver::release, "base"_a, "bytes"_a, Free())
      .def("create", &Driver::create, "bytes"_a, Free())
      .def("destroy", &Driver::destroy, "page"_a, Free())
      .def("map", &Driver::map, "at"_a, "bytes"_a, "offset"_a, "page"_a, Free())
      .def("set_access", &Driver::set_access, "at"_a, "bytes"_a, Free())
      .def("unmap", &Driver::unmap, "at"_a, "bytes"_a, Free())
      .def("map_run", &map_pages<&Driver::map_run>, "at"_a, "page_bytes"_a, "pages"_a, Free())
      .def("map_run_open", &map_pages<&Driver::map_run_open>, "at"_a, "page_bytes"_a, "pages"_a, Free())
      .def("unmap_run", &Driver::unmap_run, "at"_a, "page_bytes"_a, "count"_a, Free())
      .def("zero", &Driver::zero, "at"_a, "bytes"_a, "stream"_a = 0, Free())
      .def("copy", &Driver::copy, "to"_a, "source"_a, "bytes"_a, "stream"_a = 0, Free())
      // For tests of devices that are done when the call returns.
      .def(
          "load",
          [](Driver& d, Address to, const nb::bytes& data, Stream stream) {
            d.load(to, data.c_str(), static_cast<i64>(data.size()), stream);
          },
          "to"_a, "data"_a, "stream"_a = 0)
      .def(
          "store",
          [](Driver& d, Address source, i64 bytes, Stream stream) {
            std::string data(static_cast<std::size_t>(bytes), '\0');
            d.store(data.data(), source, bytes, stream);
            return nb::bytes(data.data(), data.size());
          },
          "source"_a, "bytes"_a, "stream"_a = 0)
      .def("record", &Driver::record, "stream"_a = 0, Free())
      .def("done", &Driver::done, "event"_a, Free())
      .def("wait", &Driver::wait, "event"_a, Free())
      .def("forget", &Driver::forget, "event"_a, Free())
      .def("check_stream", &Driver::check_stream, "stream"_a, Free())
      .def("side_stream", &Driver::side_stream)
      .def("order", &Driver::order, "event"_a, "later"_a, Free())
      .def("undoing", &Driver::undoing, "begin"_a, Free());
}

void bind_checked(nb::module_& m) {
  nb::class_<CheckedDriver::Call>(m, "DriverCall")
      .def_ro("verb", &CheckedDriver::Call::verb)
      .def_ro("at", &CheckedDriver::Call::at)
      .def_ro("bytes", &CheckedDriver::Call::bytes)
      .def_ro("id", &CheckedDriver::Call::id)
      .def("__repr__", [](const CheckedDriver::Call& call) {
        return call.verb + "(at=" + std::to_string(call.at) + ", bytes=" + std::to_string(call.bytes) +
               ", id=" + std::to_string(call.id) + ")";
      });
  nb::class_<CheckedDriver::Live>(m, "DriverLive")
      .def_ro("reservations", &CheckedDriver::Live::reservations)
      .def_ro("pages", &CheckedDriver::Live::pages)
      .def_ro("mappings", &CheckedDriver::Live::mappings)
      .def_ro("events", &CheckedDriver::Live::events)
      .def_ro("page_bytes", &CheckedDriver::Live::page_bytes);
  nb::class_<CheckedDriver, Driver>(m, "CheckedDriver")
      .def(nb::init<std::shared_ptr<Driver>>(), "inner"_a)
      .def("fail", &CheckedDriver::fail, "verb"_a, "nth"_a = 1, "code"_a = 2, "undo_too"_a = false)
      .def("clear_failures", &CheckedDriver::clear_failures)
      .def("pending_failures", &CheckedDriver::pending_failures)
      .def("hold_events", &CheckedDriver::hold_events, "hold"_a)
      .def("complete_events", &CheckedDriver::complete_events)
      .def("held_waits", &CheckedDriver::held_waits)
      .def("log", &CheckedDriver::log)
      .def("clear_log", &CheckedDriver::clear_log)
      .def("live", &CheckedDriver::live)
      .def("touch", &CheckedDriver::touch, "at"_a, "bytes"_a);
}

}  // namespace

void bind_drivers(nb::module_& m) {
  bind_info(m);
  bind_driver(m);
  bind_checked(m);
  m.def("host_driver", &make_host_driver, "holes_fault"_a = false);
  m.def(
      "cuda_driver",
      [](int index, const std::string& library, bool shareable, bool rdma) {
        return make_cuda_driver(index, library, {shareable, rdma});
      },
      "index"_a = 0, "library"_a = "", "shareable"_a = false, "rdma"_a = false, Free());
  m.def("read_bytes", &read_bytes, "at"_a, "bytes"_a);
  m.def("write_bytes", &write_bytes, "at"_a, "data"_a);
  // ranges: int64 [n, 4]: address, bytes, count and stride of each; any address is allowed. state: int64 [2]: what was
  // asked for so far, and the most.
  m.def(
      "prefetch_lines",
      [](const nb::ndarray<const i64, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>& ranges,
         const nb::ndarray<i64, nb::shape<2>, nb::c_contig, nb::device::cpu>& state) {
        const auto* first = reinterpret_cast<const StridedRange*>(ranges.data());
        prefetch_lines(first, static_cast<i64>(ranges.shape(0)), state.data(), state.data() + 1);
      },
      "ranges"_a, "state"_a, Free());
}

}  // namespace kvmem
