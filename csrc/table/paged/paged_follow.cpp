// The rules of follow.h for blocks of the paged backend.

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "table/follow.h"
#include "table/paged/paged_table.h"

namespace kvmem {

namespace {

class PagedRules final : public FollowRules {
 public:
  PagedRules(PagedBlocks& blocks, const FollowedLengths& lengths) : FollowRules(blocks, lengths), blocks_(blocks) {}

  void finish() override {
    for (const Op& op : unmapped_) {
      const SlotClass& c = blocks_.class_of(local_arena(op.at));
      for (i64 slot = op.a; slot < op.a + op.c; ++slot) {
        if (c.slots[slot].users > 0 && c.slots[slot].mapped == 0)
          refuse("unmap: slot " + std::to_string(slot) + " is in use");
      }
    }
    for (const Replaced& r : replaced_) check_replaced(r);
    for (const auto& [entry, pieces] : moved_) check_moved(entry, pieces);
    for (const Grown& g : grown_) note_grown(g);
  }

  void commit() override {
    for (const auto& [at, ordinal] : stored_) blocks_.followed_stored[at] = ordinal;
    for (const auto& [key, ordinal] : whole_) {
      if (ordinal < 0) {
        blocks_.followed_whole.erase(key);
      } else {
        blocks_.followed_whole[key] = ordinal;
      }
    }
  }

 private:
  struct Entry {
    i64 handle, group, ordinal;
    bool operator<(const Entry& o) const {
      return std::tie(handle, group, ordinal) < std::tie(o.handle, o.group, o.ordinal);
    }
  };
  struct Replaced : Entry {
    i64 from, to;
    bool equal, committed;  // `to` was committed whole at this index; the tokens are committed
  };
  struct Grown {
    i64 handle, group, from, end;
  };
  struct Piece {
    i64 at, bytes;
  };

  i64 tokens(i64 g) const { return blocks_[g].tokens; }
  i32 refs(i64 g, i64 block) const { return blocks_[g].info[block].refs; }
  static i64 key(i64 g, i64 block) { return PagedBlocks::whole_key(g, block); }

  // Returns where bytes [from, to) of a block lie now, in one arena.
  std::vector<Piece> pieces(i64 a, i64 block, i64 from, i64 to) const {
    const i64 start = block * blocks_.class_of(a).block_bytes;
    std::vector<Piece> found;
    each_slot(start + from, to - from, [&](i64 slot, i64 within, i64 n) {
      found.push_back({blocks_.page(a, slot) * page_bytes() + within, n});
    });
    return found;
  }

  // Returns the index at which a block was last committed whole, if nothing has been written to it since; else -1.
  i64 whole(i64 g, i64 block) const {
    if (const auto now = whole_.find(key(g, block)); now != whole_.end()) return now->second;
    const auto before = blocks_.followed_whole.find(key(g, block));
    return before == blocks_.followed_whole.end() ? -1 : before->second;
  }

  void note_written(i64 g, i64 block) {
    if (whole(g, block) >= 0) whole_[key(g, block)] = -1;
  }

  void mapped(const Op& op) override {
    for (i64 i = 0; i < op.c; ++i) fresh_.insert(op.b + i);
  }

  void unmapped(const Op& op) override {
    unmapped_.push_back(op);
    for (i64 i = 0; i < op.c; ++i) fresh_.erase(op.b + i);
    const i64 a = local_arena(op.at), g = group_of(a), bytes = blocks_.class_of(a).block_bytes;
    const i64 end = std::min(blocks_[g].max_blocks, ceil_div((op.a + op.c) * page_bytes(), bytes));
    for (i64 block = op.a * page_bytes() / bytes; block < end; ++block) note_written(g, block);
  }

  void changed(const Op& op) override {
    if (op.kind == OpKind::block) {
      entered(op);
    } else if (op.kind == OpKind::commit) {
      committed(op);
    } else if (op.kind == OpKind::length && op.b > op.c) {
      grown_.push_back({op.a, op.at, op.c, op.b});
    }
  }

  void committed(const Op& op) {
    const i64 g = op.at, index = sequences_.index(op.a);
    std::set<i64> others;  // ordinals of blocks that another sequence committed
    for (Replaced& r : replaced_) {
      if (r.handle != op.a || r.group != g || op.b < (r.ordinal + 1) * tokens(g)) continue;
      r.committed = true;
      if (!is_copied(r)) others.insert(r.ordinal);
    }
    for (i64 o = std::max(op.c, sequences_.front(index, g)) / tokens(g); o < op.b / tokens(g); ++o) {
      const i32 block = others.count(o) > 0 ? 0 : blocks_.entry(index, g, o);
      if (block != 0) whole_[key(g, block)] = o;
    }
    for (Replaced& r : replaced_) {  // a step's commits come after its blocks
      r.equal = r.equal || (r.group == g && whole(g, r.to) == r.ordinal);
    }
  }

  // Blocks into which a sequence has grown will be written, unless they are committed already. That one was written and
  // released within the list goes unnoticed.
  void note_grown(const Grown& grown) {
    const i64 index = sequences_.place_of(grown.handle), t = tokens(grown.group);
    if (!sequences_.live(index) || sequences_.handle_of(index) != grown.handle) return;
    const i64 end = std::min(grown.end, sequences_.tokens(index, grown.group));
    for (i64 o = std::max(grown.from, sequences_.committed(index, grown.group)) / t; o * t < end; ++o) {
      if (const i32 block = blocks_.entry(index, grown.group, o); block != 0) note_written(grown.group, block);
    }
  }

  void entered(const Op& op) {
    const i64 g = op.at;
    const Entry entry{op.a, g, op.b};
    if (op.d != 0) {
      if (moved_.find(entry) == moved_.end()) {
        std::vector<std::vector<Piece>>& where = moved_[entry];
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
          where.push_back(pieces(a, op.d, 0, blocks_.class_of(a).block_bytes));
        }
      }
      if (refs(g, op.d) == 0) {
        given_.erase(key(g, op.d));
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) written_.erase({a, op.d});
      }
    }
    if (op.c == 0) return;
    const bool shared = refs(g, op.c) > 1;
    if (op.d != 0) replaced_.push_back({entry, op.d, op.c, whole(g, op.c) == op.b, false});
    if (!shared) {
      given_.insert(key(g, op.c));
    } else if (op.d == 0 && (!lengths_.opened(op.a) || (op.b + 1) * tokens(g) > lengths_.began(op.a, g))) {
      refuse("block: sequence handle " + std::to_string(op.a) + " would write to block " + std::to_string(op.c) +
             ", which another one has");
    }
  }

  // Whether the bytes lie in a block of one sequence alone, behind all lengths that it has had.
  bool is_behind(const Op& op) const {
    const i64 a = local_arena(op.at), g = group_of(a), bytes = blocks_.class_of(a).block_bytes;
    const i64 block = op.a / bytes, within = op.a % bytes;
    if (block < kReservedBlocks || within + op.b > bytes || refs(g, block) != 1) return false;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      if (!sequences_.live(index)) continue;
      const i64 least = lengths_.least(sequences_.handle_of(index), g), ordinal = least / tokens(g);
      if (least % tokens(g) == 0 || blocks_.entry(index, g, ordinal) != block) continue;
      return within >= least % tokens(g) * (bytes / tokens(g));
    }
    return false;
  }

  void zeroed(const Op& op) override {
    const i64 a = local_arena(op.at), g = group_of(a), bytes = blocks_.class_of(a).block_bytes;
    const bool behind = is_behind(op), is_block = behind || (op.a % bytes == 0 && op.b % bytes == 0);
    each_slot(op.a, op.b, [&](i64 slot, i64 within, i64 n) {
      const i64 page = blocks_.page(a, slot);
      if (!is_block && (op.a % page_bytes() != 0 || op.b % page_bytes() != 0 || fresh_.count(page) == 0)) {
        refuse("zero: neither blocks, nor what lies behind a sequence, nor pages that the list has mapped");
      }
      ledger_.erase(page * page_bytes() + within, n);
    });
    const i64 end = std::min(blocks_[g].max_blocks, ceil_div(op.a + op.b, bytes));
    for (i64 block = op.a / bytes; block < end; ++block) {
      if (behind) break;
      if (block >= kReservedBlocks && refs(g, block) > 0) refuse("zero: block " + std::to_string(block) + " is in use");
      note_written(g, block);
    }
  }

  // A block keeps what is known of it on its way through a host slot.
  void stored(const Op& op) override {
    const i64 a = local_arena(op.at), bytes = blocks_.class_of(a).block_bytes;
    stored_[op.b] = op.a % bytes == 0 && op.c == bytes ? whole(group_of(a), op.a / bytes) : -1;
  }

  void loaded(const Op& op) override {
    FollowRules::loaded(op);
    const i64 a = local_arena(op.at), bytes = blocks_.class_of(a).block_bytes;
    const auto now = stored_.find(op.b);
    const auto before = blocks_.followed_stored.find(op.b);
    const i64 ordinal = now != stored_.end()                      ? now->second
                        : before != blocks_.followed_stored.end() ? before->second
                                                                  : -1;
    if (op.a % bytes == 0 && op.c == bytes) whole_[key(group_of(a), op.a / bytes)] = ordinal;
  }

  void copied(const Op& op) override {
    const i64 a = local_arena(op.at), g = group_of(a), bytes = blocks_.class_of(a).block_bytes;
    const i64 to = op.a / bytes, from = op.b / bytes;
    if (op.a % bytes != 0 || op.b % bytes != 0 || op.c > bytes || op.c % (bytes / tokens(g)) != 0 ||
        std::min(to, from) < kReservedBlocks || std::max(to, from) >= blocks_[g].max_blocks) {
      refuse("copy: not the first tokens of a block to another");
    }
    const bool given = given_.count(key(g, to)) > 0;
    if (refs(g, to) > 1 || (refs(g, to) == 1 && (!given || written_.count({a, to}) > 0))) {
      refuse("copy: block " + std::to_string(to) + " is in use");
    }
    each_pair(pieces(a, to, 0, op.c), pieces(a, from, 0, op.c), 0,
              [this](i64 target, i64 source, i64 n) { ledger_.copy(target, source, n); });
    copies_.insert({a, to, from});
    if (refs(g, to) == 1) written_.insert({a, to});
    whole_[key(g, to)] = op.c == bytes ? whole(g, from) : -1;
  }

  bool is_copied(const Replaced& r) const {
    bool all = true;
    for (i64 a = first_[r.group]; a < first_[r.group + 1]; ++a) {
      all = all && copies_.count({a, r.to, r.from}) > 0;
    }
    return all;
  }

  void check_replaced(const Replaced& r) const {
    if (is_copied(r) || (r.equal && r.committed)) return;
    refuse("block " + std::to_string(r.to) + " takes the place of block " + std::to_string(r.from) +
           " of sequence handle " + std::to_string(r.handle) + ", and nothing says that it holds the same");
  }

  // Checks the tokens of a replaced entry, unless check_replaced() does.
  void check_moved(const Entry& entry, const std::vector<std::vector<Piece>>& before) const {
    const FollowedLengths::Range kept = lengths_.unchanged(entry.handle, entry.group);
    const i64 start = entry.ordinal * tokens(entry.group);
    const i64 first = std::max(kept.first - start, i64{0}), end = std::min(kept.end - start, tokens(entry.group));
    const bool equal = std::any_of(replaced_.begin(), replaced_.end(),
                                   [&](const Replaced& r) { return !(r < entry) && !(entry < r) && !is_copied(r); });
    if (first >= end || equal) return;
    const i32 block = blocks_.entry(sequences_.index(entry.handle), entry.group, entry.ordinal);
    for (i64 a = first_[entry.group]; a < first_[entry.group + 1]; ++a) {
      const i64 bytes = blocks_.class_of(a).block_bytes / tokens(entry.group);
      bool same = block != 0;
      const std::vector<Piece> now = same ? pieces(a, block, first * bytes, end * bytes) : std::vector<Piece>();
      each_pair(now, before[a - first_[entry.group]], first * bytes,
                [&](i64 at, i64 origin, i64 n) { same = same && ledger_.holds(at, origin, n); });
      if (!same) {
        refuse("sequence handle " + std::to_string(entry.handle) + " would lose tokens of its block " +
               std::to_string(entry.ordinal));
      }
    }
  }

  // Calls f(byte of `now`, byte of `before`, bytes) for each stretch that is contiguous in both. `before` starts `skip`
  // bytes after its first byte.
  template <class F>
  static void each_pair(const std::vector<Piece>& now, const std::vector<Piece>& before, i64 skip, F f) {
    std::size_t b = 0;
    for (; b < before.size() && skip >= before[b].bytes; ++b) skip -= before[b].bytes;
    for (const Piece& piece : now) {
      for (i64 at = 0; at < piece.bytes;) {
        const i64 n = std::min(piece.bytes - at, before[b].bytes - skip);
        f(piece.at + at, before[b].at + skip, n);
        at += n, skip += n;
        if (skip == before[b].bytes) ++b, skip = 0;
      }
    }
  }

  PagedBlocks& blocks_;
  std::unordered_set<i64> fresh_;               // pages that the list has mapped
  std::unordered_set<i64> given_;               // unused blocks that the list has put into one table
  std::set<std::tuple<i64, i64, i64>> copies_;  // (arena, block copied to, block copied from)
  std::set<std::pair<i64, i64>> written_;       // (arena, block) of those to which it has copied since
  std::vector<Op> unmapped_;
  std::vector<Replaced> replaced_;
  std::map<Entry, std::vector<std::vector<Piece>>> moved_;  // where an entry's block was before the list, by arena
  std::vector<Grown> grown_;
  std::unordered_map<i64, i64> whole_;   // what the list changes of PagedBlocks::followed_whole
  std::unordered_map<i64, i64> stored_;  // by offset in the host slots: whole() of the block that lies there
};

}  // namespace

std::unique_ptr<FollowRules> PagedTable::rules(const FollowedLengths& lengths) {
  return std::make_unique<PagedRules>(blocks_, lengths);
}

}  // namespace kvmem
