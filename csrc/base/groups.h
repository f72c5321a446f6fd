// The groups of an allocator: which there are, and what a call's `group` argument selects: the group of that index or,
// with -1, all groups that grow with the tokens.
//
// State: the geometry, which never changes. Thread safety: any thread may call.
#pragma once

#include "base/geometry.h"
#include "base/types.h"

namespace kvmem {

class Groups {
 public:
  explicit Groups(Geometry geometry);

  const Geometry& geometry() const { return geometry_; }
  i64 count() const { return count_; }
  const GroupGeometry& operator[](i64 g) const { return geometry_.groups[static_cast<std::size_t>(g)]; }
  i64 token_group() const { return token_group_; }  // the first group that grows with the tokens, or 0
  i64 max_tokens() const { return (*this)[token_group_].max_tokens; }
  bool has_state() const { return has_state_; }    // a group has a state of fixed size
  bool has_window() const { return has_window_; }  // a group has a sliding window
  bool only_grows() const { return only_grows_; }  // there is one group, without a window, which grows with the tokens
  // Returns whether a sequence that has room can grow with nothing to decide and nothing to zero.
  bool is_simple() const { return only_grows_ && geometry_.zero != Zero::always; }

  // The group whose lengths a call reads, the range of groups that it visits, and whether group g of the range grows by
  // the call's count.
  i64 one(i64 group) const { return group < 0 ? token_group_ : group; }
  i64 begin(i64 group) const { return group < 0 ? 0 : group; }
  i64 end(i64 group) const { return group < 0 ? count_ : group + 1; }
  bool grows(i64 g, i64 group) const { return group >= 0 || (*this)[g].growth == Growth::token; }
  // Returns the first token that the group's window needs once `committed` tokens are valid.
  i64 first_needed(i64 g, i64 committed) const {
    return window_first((*this)[g], geometry_.tail_guard_tokens, committed);
  }

  // Throws SpecError unless the group exists or is -1.
  void check(i64 group) const {
    if (group < -1 || group >= count_) refuse(group);
  }
  // Throws SpecError if a call of `verb` cannot give the group a count of its own: groups that grow with the tokens are
  // equally long at all times, and a state has no length.
  void check_own_count(i64 group, const char* verb) const {
    check(group);
    if (group >= 0 && (*this)[group].growth != Growth::prefill) refuse_own_count(group, verb);
  }

 private:
  [[noreturn]] void refuse(i64 group) const;
  [[noreturn]] void refuse_own_count(i64 group, const char* verb) const;

  const Geometry geometry_;
  const i64 count_, token_group_;
  const bool has_state_, has_window_, only_grows_;
};

}  // namespace kvmem
