// The rules of follow.h for rows of the virtual backend.

#include <algorithm>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "table/follow.h"
#include "table/virtual/virtual_table.h"

namespace kvmem {

namespace {

class VirtualRules final : public FollowRules {
 public:
  VirtualRules(const VirtualRows& rows, const FollowedLengths& lengths) : FollowRules(rows, lengths), rows_(rows) {}

  void finish() override {
    for (i64 handle : unbound_) {
      for (i64 g = 0; g < groups_; ++g) {
        const FollowedLengths::Range live = lengths_.unchanged(handle, g);
        if (live.first < live.end) refuse("sequence handle " + std::to_string(handle) + " would lose its row");
      }
    }
    for (const auto& [key, page] : moved_) check_moved(std::get<0>(key), std::get<1>(key), std::get<2>(key), page);
  }

 private:
  struct Place {
    i64 a, row, slot;  // row -1: the scratch slot
  };
  using MovedKey = std::tuple<i64, i64, i64>;  // handle, arena, slot of its row

  Place place(i32 number, i64 slot) const {
    const i64 a = local_arena(number), slots = rows_.row_slots(group_of(a), a);
    if (slot == rows_.scratch_slot(a)) return {a, -1, 0};
    return {a, slot / slots, slot % slots};
  }

  i64 page_at(const Place& at) const {
    return at.row < 0 ? rows_.scratch_page(at.a) : rows_.extent(at.row, at.a).pages[at.slot];
  }

  i64 sequence_at(const Place& at) const { return at.row < 0 ? -1 : rows_[at.row].index; }

  void mapped(const Op& op) override {
    for (i64 i = 0; i < op.c; ++i) on_shown(place(op.at, op.a + i), op.b + i);
  }

  void unmapped(const Op& op) override {
    for (i64 i = 0; i < op.c; ++i) on_hidden(place(op.at, op.a + i), op.b + i);
  }

  void changed(const Op& op) override {
    if (op.kind == OpKind::bind) {
      bound_.insert(op.b);
    } else if (op.kind == OpKind::unbind) {
      bound_.erase(op.b);
      unbound_.push_back(op.a);
      allow_rewrite(op.b);
    }
  }

  // What the list has copied to a row that is parked again may be overwritten.
  void allow_rewrite(i64 row) {
    if (fresh_.empty() && copied_.empty()) return;
    for (i64 a = 0; a < arenas_; ++a) {
      for (i64 page : rows_.extent(row, a).pages) {
        if (page < 0 || pool_.refs(page) != 1) continue;
        if (const auto fresh = fresh_.find(page); fresh != fresh_.end()) fresh->second = 0;
        copied_.erase(page);
      }
    }
  }

  void on_shown(const Place& at, i64 page) {
    if (pool_.refs(page) == 1) {
      fresh_[page] = 0;
      return;
    }
    const i64 index = sequence_at(at);
    const bool from_scratch = rows_.scratch_page(at.a) == page && at.row > 0;
    for (i64 reserved : rows_.extent(0, at.a).pages) {
      if (reserved == page) refuse("map: page " + std::to_string(page) + " shows the null and padding blocks");
    }
    const bool begins = at.row > 0 && (index < 0 || lengths_.opened(sequences_.handle_of(index)));
    if (!from_scratch && !begins) {
      refuse("map: page " + std::to_string(page) + " belongs to another row than " + std::to_string(at.row));
    }
  }

  void on_hidden(const Place& at, i64 page) {
    if (at.row == 0) refuse("unmap: the null and padding blocks stay mapped");
    if (pool_.refs(page) == 0) fresh_.erase(page), copied_.erase(page);
    if (const i64 index = sequence_at(at); index >= 0) {
      moved_.try_emplace({sequences_.handle_of(index), at.a, at.slot}, page);
    }
  }

  // Calls f(place, offset in its page, bytes) for each page of a range of an arena.
  template <class F>
  void each_page(i32 number, i64 offset, i64 bytes, F f) const {
    each_slot(offset, bytes, [&](i64 slot, i64 within, i64 n) { f(place(number, slot), within, n); });
  }

  // Returns the page to which an op writes. Refuses a page that is in use. `is_copy`: what the op writes must stay. A
  // fresh page may be filled by several copies, one behind the other.
  i64 written(const char* kind, const Place& at, i64 within, i64 bytes, bool is_copy) {
    const i64 page = page_at(at);
    bool unused = pool_.refs(page) == 1;
    if (const auto fresh = fresh_.find(page); fresh != fresh_.end()) {
      unused = unused && within >= fresh->second && (!is_copy || at.row != 0);
      if (is_copy) fresh->second = within + bytes;
    } else {
      unused = unused && at.row > 0 && (sequence_at(at) < 0 || bound_.count(at.row) > 0) && copied_.count(page) == 0;
      if (is_copy) copied_.insert(page);
    }
    if (!unused) {
      refuse(std::string(kind) + ": row " + std::to_string(at.row) + ", slot " + std::to_string(at.slot) +
             " of arena " + std::to_string(arena(at.a)) + " is not free to be written");
    }
    return page;
  }

  // Whether only one sequence has the page, and the bytes from `within` on lie behind all lengths that it has had.
  bool is_behind(const Place& at, i64 within) const {
    const i64 index = sequence_at(at), g = group_of(at.a);
    if (index < 0 || pool_.refs(page_at(at)) != 1) return false;
    const i64 least = lengths_.least(sequences_.handle_of(index), g);
    return at.slot * page_bytes() + within >= least * token_bytes(g, at.a);
  }

  void zeroed(const Op& op) override {
    each_page(op.at, op.a, op.b, [&](const Place& at, i64 within, i64 bytes) {
      if (is_behind(at, within)) return ledger_.erase(page_at(at) * page_bytes() + within, bytes);
      const i64 page = written("zero", at, within, bytes, false);
      if (fresh_.count(page) == 0 && sequence_at(at) >= 0) {  // the list did not map the page
        const i64 g = group_of(at.a), index = sequence_at(at), from = at.slot * page_bytes() + within;
        const i64 first = sequences_.front(index, g) * token_bytes(g, at.a);
        const i64 end = sequences_.committed(index, g) * token_bytes(g, at.a);
        if (from < end && first < from + bytes) refuse("zero: committed tokens of row " + std::to_string(at.row));
      }
      ledger_.erase(page * page_bytes() + within, bytes);
    });
  }

  void copied(const Op& op) override {
    if (op.a % page_bytes() != op.b % page_bytes()) refuse("copy: from and to lie differently in their pages");
    i64 from = op.b;
    each_page(op.at, op.a, op.c, [&](const Place& at, i64 within, i64 bytes) {
      const i64 source = page_at(place(op.at, from / page_bytes()));
      const i64 page = written("copy", at, within, bytes, true);
      ledger_.copy(page * page_bytes() + within, source * page_bytes() + within, bytes);
      from += bytes;
    });
  }

  // Checks the tokens that lay on a page which was unmapped.
  void check_moved(i64 handle, i64 a, i64 slot, i64 page) const {
    const i64 g = group_of(a);
    const FollowedLengths::Range live = lengths_.unchanged(handle, g);
    const i64 first = std::max(live.first * token_bytes(g, a), slot * page_bytes());
    const i64 end = std::min(moved_bytes(g, a, live.end), (slot + 1) * page_bytes());
    if (end <= first) return;
    const i64 row = rows_.row_of(sequences_.index(handle));
    const i64 now = row > 0 ? rows_.extent(row, a).page(slot) : -1, within = first % page_bytes();
    if (now < 0 || !ledger_.holds(now * page_bytes() + within, page * page_bytes() + within, end - first)) {
      refuse("sequence handle " + std::to_string(handle) + " would lose tokens in slot " + std::to_string(slot) +
             " of its row");
    }
  }

  const VirtualRows& rows_;
  std::unordered_map<i64, i64> fresh_;  // by page that the list has taken from the free ones: bytes copied to it so far
  std::unordered_set<i64> copied_;      // other pages to which the list has copied
  std::unordered_set<i64> bound_;       // rows that the list has bound
  std::vector<i64> unbound_;            // handles of the sequences that have lost their rows
  std::map<MovedKey, i64> moved_;       // the page that a slot of a sequence's row showed before the list
};

}  // namespace

std::unique_ptr<FollowRules> VirtualTable::rules(const FollowedLengths& lengths) {
  return std::make_unique<VirtualRules>(rows_, lengths);
}

}  // namespace kvmem
