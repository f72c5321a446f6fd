// The rules of follow.h for rows.

#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "table/follow.h"
#include "table/virtual/virtual_rows.h"

namespace kvmem {

class VirtualRows::Rules final : public FollowRules {
 public:
  Rules(const VirtualRows& rows, const FollowedLengths& lengths)
      : FollowRules(lengths, rows.page_bytes()), rows_(rows), pool_(rows.pool_) {}

  void finish() override {
    for (i64 handle : unbound_) {
      for (i64 g = 0; g < rows_.groups_; ++g) {
        const FollowedLengths::Range kept = lengths_.unchanged_if_live(handle, g);
        if (kept.first < kept.end) refuse("sequence handle " + std::to_string(handle) + " would lose its row");
      }
    }
    for (const auto& [key, page] : moved_) check_moved(std::get<0>(key), std::get<1>(key), std::get<2>(key), page);
  }

 private:
  struct Place {
    i64 a, row, slot;  // row -1: the scratch slot
  };
  using MovedKey = std::tuple<i64, i64, i64>;  // handle, arena, slot of its row

  Place place(i32 arena, i64 slot) const {
    const i64 a = arena - rows_.base_arena_, g = rows_.group_of(a);
    if (slot == rows_.geometry_.groups[g].arena_slots[a - rows_.first_[g]] - 1) return {a, -1, 0};
    return {a, slot / rows_.row_slots(g, a), slot % rows_.row_slots(g, a)};
  }

  i64 page_at(const Place& at) const {
    return at.row < 0 ? rows_.scratch_pages_[at.a] : rows_.extent(at.row, at.a).pages[at.slot];
  }

  i64 sequence_at(const Place& at) const { return at.row < 0 ? -1 : rows_.rows_[at.row].index; }

  void mapped(const Op& op) override {
    for (i64 i = 0; i < op.c; ++i) shown(place(op.at, op.a + i), op.b + i);
  }

  void unmapped(const Op& op) override {
    for (i64 i = 0; i < op.c; ++i) hidden(place(op.at, op.a + i), op.b + i);
  }

  void told(const Op& op) override {
    if (op.kind == OpKind::bind) {
      bound_.insert(op.b);
    } else if (op.kind == OpKind::unbind) {
      bound_.erase(op.b);
      unbound_.push_back(op.a);
      forget_copies(op.b);
    }
  }

  // What the list has copied to a row that is nobody's now may be written again.
  void forget_copies(i64 row) {
    if (fresh_.empty() && copied_.empty()) return;
    for (i64 a = 0; a < rows_.arenas_; ++a) {
      for (i64 page : rows_.extent(row, a).pages) {
        if (page < 0 || pool_.refs(page) != 1) continue;
        if (const auto fresh = fresh_.find(page); fresh != fresh_.end()) fresh->second = 0;
        copied_.erase(page);
      }
    }
  }

  void shown(const Place& at, i64 page) {
    if (pool_.refs(page) == 1) {
      fresh_[page] = 0;
      return;
    }
    const i64 index = sequence_at(at);
    const bool from_scratch = rows_.scratch_pages_[at.a] == page && at.row > 0;
    for (i64 trash : rows_.extent(0, at.a).pages) {
      if (trash == page) refuse("map: page " + std::to_string(page) + " shows the trash blocks");
    }
    const bool begins = at.row > 0 && (index < 0 || lengths_.opened(rows_.sequences_.handle_of(index)));
    if (!from_scratch && !begins) {
      refuse("map: page " + std::to_string(page) + " belongs to another row than " + std::to_string(at.row));
    }
  }

  void hidden(const Place& at, i64 page) {
    if (at.row == 0) refuse("unmap: the trash blocks stay");
    if (pool_.refs(page) == 0) fresh_.erase(page), copied_.erase(page);
    if (const i64 index = sequence_at(at); index >= 0) {
      moved_.try_emplace({rows_.sequences_.handle_of(index), at.a, at.slot}, page);
    }
  }

  // f(place, bytes from the start of its page, how many) for each page of a range of an arena.
  template <class F>
  void each_page(i32 arena, i64 offset, i64 bytes, F f) const {
    for (const i64 end = offset + bytes; offset < end;) {
      const i64 within = offset % page_bytes(), n = std::min(end - offset, page_bytes() - within);
      f(place(arena, offset / page_bytes()), within, n);
      offset += n;
    }
  }

  // The page under a write of some bytes of it; `is_copy`: what it puts there is to stay. A fresh page may be put
  // together from copies, one behind the other.
  i64 written(const char* kind, const Place& at, i64 within, i64 bytes, bool is_copy) {
    const i64 page = page_at(at);
    bool nobody = pool_.refs(page) == 1;
    if (const auto fresh = fresh_.find(page); fresh != fresh_.end()) {
      nobody = nobody && within >= fresh->second && (!is_copy || at.row != 0);
      if (is_copy) fresh->second = within + bytes;
    } else {
      nobody = nobody && at.row > 0 && (sequence_at(at) < 0 || bound_.count(at.row) > 0) && copied_.count(page) == 0;
      if (is_copy) copied_.insert(page);
    }
    if (!nobody) {
      refuse(std::string(kind) + ": row " + std::to_string(at.row) + ", slot " + std::to_string(at.slot) +
             " of arena " + std::to_string(at.a + rows_.base_arena_) + " is not free to be written");
    }
    return page;
  }

  // True if the page is one sequence's alone, and the bytes from `within` on lie behind all that it has had.
  bool is_behind(const Place& at, i64 within) const {
    const i64 index = sequence_at(at), g = rows_.group_of(at.a);
    if (index < 0 || pool_.refs(page_at(at)) != 1) return false;
    const i64 least = lengths_.least(rows_.sequences_.handle_of(index), g);
    return at.slot * page_bytes() + within >= least * rows_.token_bytes(g, at.a);
  }

  void zeroed(const Op& op) override {
    each_page(op.at, op.a, op.b, [&](const Place& at, i64 within, i64 bytes) {
      if (is_behind(at, within)) return ledger_.erase(page_at(at) * page_bytes() + within, bytes);
      const i64 page = written("zero", at, within, bytes, false);
      if (fresh_.count(page) == 0 && sequence_at(at) >= 0) {  // what the row came with is the sequence's own already
        const i64 g = rows_.group_of(at.a), index = sequence_at(at), from = at.slot * page_bytes() + within;
        const i64 first = rows_.sequences_.front(index, g) * rows_.token_bytes(g, at.a);
        const i64 end = rows_.sequences_.committed(index, g) * rows_.token_bytes(g, at.a);
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

  // Of tokens that lay in a page that was unmapped.
  void check_moved(i64 handle, i64 a, i64 slot, i64 page) const {
    const i64 g = rows_.group_of(a);
    const FollowedLengths::Range kept = lengths_.unchanged_if_live(handle, g);
    const i64 first = std::max(kept.first * rows_.token_bytes(g, a), slot * page_bytes());
    const i64 end = std::min(kept.end * rows_.token_bytes(g, a), (slot + 1) * page_bytes());
    if (end <= first) return;
    const i64 row = rows_.row_of_[rows_.sequences_.index(handle)];
    const auto& pages = rows_.extent(std::max(row, i64{0}), a).pages;
    const i64 now = row > 0 && slot < static_cast<i64>(pages.size()) ? pages[slot] : -1, within = first % page_bytes();
    if (now < 0 || !ledger_.holds(now * page_bytes() + within, page * page_bytes() + within, end - first)) {
      refuse("sequence handle " + std::to_string(handle) + " would lose tokens in slot " + std::to_string(slot) +
             " of its row");
    }
  }

  const VirtualRows& rows_;
  const PagePool& pool_;
  std::unordered_map<i64, i64> fresh_;  // pages that the list has taken from the free ones: copied to as far as here
  std::unordered_set<i64> copied_;      // other pages that the list has copied to
  std::unordered_set<i64> bound_;       // rows that the list has bound
  std::vector<i64> unbound_;            // sequences that it has taken them from
  std::map<MovedKey, i64> moved_;       // the page that a slot of a sequence's row showed before the list
};

std::unique_ptr<FollowRules> VirtualRows::rules(const FollowedLengths& lengths) {
  return std::make_unique<Rules>(*this, lengths);
}

}  // namespace kvmem
