// Eviction policies without an allocator, for tests and simulations; csrc/eviction/policy.h says what each call means.

#include "eviction/policy.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "eviction/retention.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvmem {
namespace {

// A policy trusts its caller; this wrapper throws SpecError for a call that breaks the rules. It stores keys and
// parents, as the content index of an allocator does.
class CheckedPolicy {
 public:
  explicit CheckedPolicy(const std::string& name) : policy_(make_eviction_policy(name)) {}
  CheckedPolicy() = default;

  void reserve(i64 ids) {
    if (ids > static_cast<i64>(blocks_.size())) blocks_.resize(static_cast<std::size_t>(ids));
    policy_->reserve(ids);
  }
  void insert(i32 id, std::uint64_t key, i32 parent) {
    expect(id, kGone, kGone);
    if (parent != -1) at(parent);  // in any state, because it may be out of window
    Block& block = at(id);
    if (block.children > 0 && (key != block.key || parent != block.parent)) {
      throw SpecError("block " + std::to_string(id) + " is the parent of cached ones, so it can be no other content");
    }
    block.state = kUsed;
    block.latest = Call::insert;
    block.key = key;
    block.parent = parent;
    count_child(block, 1);
    policy_->insert(id, key, parent);
  }
  void undo_insert(i32 id) {
    expect_latest(id, Call::insert, "insert()");
    change(id, kUsed, kGone);
    const Block& block = at(id);
    count_child(block, -1);
    policy_->undo_insert(id, block.key, block.parent);
  }
  void hit(i32 id) {
    expect(id, kUsed, kReleased);
    forget_call(id);
    policy_->hit(id);
  }
  void use(i32 id) {
    change(id, kReleased, kUsed);
    at(id).latest = Call::use;
    policy_->use(id);
  }
  void undo_use(i32 id) {
    expect_latest(id, Call::use, "use()");
    change(id, kUsed, kReleased);
    policy_->undo_use(id);
  }
  void release(i32 id) {
    const Call before = at(id).latest;
    change(id, kUsed, kReleased);
    at(id).before = before;
    at(id).latest = Call::release;
    policy_->release(id);
  }
  void undo_release(i32 id) {
    expect_latest(id, Call::release, "release()");
    change(id, kReleased, kUsed);
    at(id).latest = at(id).before;
    policy_->undo_release(id);
  }
  i32 victim() { return policy_->victim(); }
  void evict(i32 id) {
    change(id, kReleased, kGone);
    const Block& block = at(id);
    count_child(block, -1);
    policy_->evict(id, block.key, block.parent);
  }
  void restore(i32 id) {
    change(id, kGone, kReleased);
    const Block& block = at(id);
    count_child(block, 1);
    policy_->restore(id, block.key, block.parent);
  }
  std::uint64_t digest() const {
    Hasher hash;
    policy_->digest(hash);
    return hash.value();
  }

 protected:
  void adopt(std::unique_ptr<EvictionPolicy> policy) { policy_ = std::move(policy); }

  void forget_call(i32 id) { at(id).latest = Call::other; }

  enum State : char { kGone, kUsed, kReleased };
  enum class Call : char { other, insert, use, release };  // only the latest call of a block can be undone

  void expect(i32 id, State one, State other) {
    static constexpr const char* kNames[] = {"not cached", "in use", "released"};
    const State state = at(id).state;
    if (state != one && state != other) {
      throw SpecError("block " + std::to_string(id) + " is " + kNames[state] + ", which this call does not allow");
    }
  }

 private:
  struct Block {
    std::uint64_t key = 0;
    i32 parent = -1;
    i32 children = 0;  // cached ones
    State state = kGone;
    Call latest = Call::other, before = Call::other;  // `before`: the one before a release()
  };

  Block& at(i32 id) {
    if (id < 0 || id >= static_cast<i64>(blocks_.size())) {
      throw SpecError("block id " + std::to_string(id) + "; " + std::to_string(blocks_.size()) + " are reserved");
    }
    return blocks_[static_cast<std::size_t>(id)];
  }
  void change(i32 id, State from, State to) {
    expect(id, from, from);
    at(id).state = to;
    forget_call(id);
  }
  void expect_latest(i32 id, Call call, const char* name) {
    if (at(id).latest != call) throw SpecError("block " + std::to_string(id) + ": its latest call was no " + name);
  }
  void count_child(const Block& block, i32 change) {
    if (block.parent >= 0) at(block.parent).children += change;
  }

  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<Block> blocks_;
};

class CheckedRetention : public CheckedPolicy {
 public:
  CheckedRetention(const std::string& name, std::function<double()> clock)
      : CheckedRetention(std::make_unique<RetentionPolicy>(make_eviction_policy(name), std::move(clock))) {}
  void retain(i32 id, int priority, double ttl_seconds) {
    expect(id, kUsed, kReleased);
    forget_call(id);
    retention_->retain(id, priority, ttl_seconds);
  }

 private:
  explicit CheckedRetention(std::unique_ptr<RetentionPolicy> policy) : retention_(policy.get()) {
    adopt(std::move(policy));
  }
  RetentionPolicy* retention_;
};

}  // namespace

void bind_eviction(nb::module_& m) {
  m.def("eviction_policy_names", &eviction_policy_names);
  nb::class_<CheckedPolicy>(m, "EvictionPolicy")
      .def(nb::init<const std::string&>(), "name"_a)
      .def("reserve", &CheckedPolicy::reserve, "ids"_a)
      .def("insert", &CheckedPolicy::insert, "id"_a, "key"_a, "parent"_a)
      .def("undo_insert", &CheckedPolicy::undo_insert, "id"_a)
      .def("hit", &CheckedPolicy::hit, "id"_a)
      .def("use", &CheckedPolicy::use, "id"_a)
      .def("undo_use", &CheckedPolicy::undo_use, "id"_a)
      .def("release", &CheckedPolicy::release, "id"_a)
      .def("undo_release", &CheckedPolicy::undo_release, "id"_a)
      .def("victim", &CheckedPolicy::victim)
      .def("evict", &CheckedPolicy::evict, "id"_a)
      .def("restore", &CheckedPolicy::restore, "id"_a)
      .def("digest", &CheckedPolicy::digest);
  nb::class_<CheckedRetention, CheckedPolicy>(m, "RetentionPolicy")
      .def(nb::init<const std::string&, std::function<double()>>(), "name"_a, "clock"_a)
      .def("retain", &CheckedRetention::retain, "id"_a, "priority"_a, "ttl_seconds"_a);
}

}  // namespace kvmem
