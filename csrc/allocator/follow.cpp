#include "allocator/follow.h"

#include <algorithm>
#include <string>

namespace kvmem {
namespace {

// Concatenated lists have a version in front of each.
void check_versions(const std::vector<Op>& ops) {
  if (!ops.empty() && ops[0].kind != OpKind::version) {
    throw SpecError("the ops begin with '" + std::string(row_of(ops[0].kind).name) +
                    "', not with their version: hand over whole lists, as take_ops() returns them");
  }
  for (const Op& op : ops) {
    if (op.kind == OpKind::version) check_version(op);
  }
}

}  // namespace

void Follower::apply(const std::vector<Op>& ops) {
  check_versions(ops);
  if (!index_.empty()) {
    throw SpecError(
        "an allocator that follows the ops of another must not know what its own sequences hold: commit "
        "counts instead of token ids, or make it with prefix_cache=False");
  }
  FollowedLengths lengths(sequences_);
  const std::unique_ptr<FollowRules> rules = table_.rules(lengths);
  Transaction tx(pool_, tables_);
  try {
    follow(ops, lengths, *rules, tx);
  } catch (const StaleHandle& e) {
    throw SpecError(std::string("the ops do not follow from here: ") + e.what());
  }
  tx.commit();
  rules->commit();
  followed_to_ = sequences_.opened();
}

void Follower::follow(const std::vector<Op>& ops, FollowedLengths& lengths, FollowRules& rules, Transaction& tx) {
  std::vector<Grown> grown;
  std::vector<i64> touched;  // sequences
  std::vector<Op> followed;  // the expanded records
  for (const Op& record : ops) {
    for (const Op& op : expand(record)) {
      apply_one(op, &grown, tx);
      lengths.note(op);
      rules.after(op);
      followed.push_back(op);
      if (op.kind == OpKind::map || op.kind == OpKind::unmap) {
        if (const i64 index = table_.sequence_at(op); index >= 0) touched.push_back(index);
      } else if (!is_physical(op.kind) && op.kind != OpKind::close) {
        touched.push_back(sequences_.index(op.a));
      }
    }
  }
  rules.finish();
  bool shares = false;
  for (const Op& op : followed) shares = note_effects(op) || shares;
  if (shares) table_.note_shared();
  for (const Grown& g : grown) check_grown(g);
  std::vector<bool> checked(static_cast<std::size_t>(sequences_.capacity()));
  for (i64 index : touched) {
    if (checked[index] || !sequences_.live(index)) continue;
    checked[index] = true;
    check_lengths(index);
  }
}

// Returns the records that `op` stands for, each of one length, table entry or run of pages, as the rules expect them.
std::vector<Op> Follower::expand(const Op& op) const {
  if (is_private(op.kind)) throw SpecError(std::string(row_of(op.kind).name) + ": not for another allocator");
  std::vector<Op> found;
  switch (op.kind) {
    case OpKind::version:
      break;
    case OpKind::close:
      if (op.c != 0) found.push_back({OpKind::commit, 0, op.a, 0, op.c});
      if (op.b != 0) found.push_back({OpKind::length, 0, op.a, 0, op.b});
      found.push_back({OpKind::close, 0, op.a, 0, 0, op.d});
      break;
    case OpKind::acquire:
      check_run(op);
      for (i64 i = 0; i < op.c; ++i) found.push_back({OpKind::block, op.at, op.a, op.b + i, op.d + i});
      break;
    case OpKind::drop:
      check_run(op);
      for (i64 at = op.b + op.c; at-- > op.b;) {  // the last one first
        const i64 block = table_.block_key(sequences_.index(op.a), op.at, at);
        if (block == 0) throw SpecError("drop: entry " + std::to_string(at) + " is none");
        found.push_back({OpKind::block, op.at, op.a, at, 0, block});
      }
      break;
    default:
      found.push_back(op);
  }
  return found;
}

// Checks the range of a run. The blocks themselves are checked entry by entry, when the expanded records are applied.
void Follower::check_run(const Op& op) const {
  const std::string name = row_of(op.kind).name;
  groups_.check(op.at);
  if (table_.view(op.at).table == nullptr) throw SpecError(name + ": the virtual backend has no block table");
  const GroupGeometry& group = groups_[op.at];
  const i64 entries = ceil_div(group.max_tokens, group.block_tokens);
  if (op.b < 0 || op.c <= 0 || op.c > entries || op.b > entries - op.c) {
    throw SpecError(name + ": no entries from " + std::to_string(op.b) + ", " + std::to_string(op.c) +
                    " of them; a sequence has " + std::to_string(entries));
  }
  if (op.kind == OpKind::acquire && (op.d < kReservedBlocks || op.d > group.max_blocks - op.c)) {
    throw SpecError("acquire: no blocks from " + std::to_string(op.d) + ", " + std::to_string(op.c) +
                    " of them; there are " + std::to_string(group.max_blocks) +
                    ": max_sequences, max_tokens and memory must be those of the allocator whose ops are followed");
  }
}

void Follower::check_record(const Op& op) const {
  if ((op.kind == OpKind::open || op.kind == OpKind::close) && (op.b != 0 || op.c != 0 || op.d != 0)) {
    throw SpecError("open of a list names a sequence handle and carries no other number, close two lengths");
  }
  if (has_arena(op.kind) && !table_.owns(op.at)) {
    throw SpecError("no such slots: arena " + std::to_string(op.at) +
                    " is none of this allocator's; it must be made with the spec, backend and interleave of the one "
                    "whose ops it follows");
  }
}

// Applies a record, and notes what grows.
void Follower::apply_one(const Op& op, std::vector<Grown>* grown, Transaction& tx) {
  check_record(op);
  if (op.kind == OpKind::length && op.b > op.c) {
    groups_.check(op.at);
    const i64 index = sequences_.index(op.a), end = std::min(op.b, groups_[op.at].max_tokens);
    if (op.c == sequences_.tokens(index, op.at)) {  // push() below refuses any other record
      grown->push_back({op.a, op.at, op.c, end, table_.shared_pieces(index, op.at, op.c, end)});
    }
  }
  if (op.kind == OpKind::close) check_empty(sequences_.index(op.a));
  if (op.kind != OpKind::create || op.a < 0 || op.b <= 0 || op.b > pool_.known_pages() ||
      op.a > pool_.known_pages() - op.b) {
    return tx.push(op);  // refuses a create of pages that cannot exist
  }
  for (i64 page = op.a; page < op.a + op.b; ++page) {  // this pool may have created its pages ahead
    if (!pool_.present(page)) tx.push({OpKind::create, 0, page, 1});
  }
}

// Throws SpecError unless the sequence, which is about to close, has neither length nor memory.
void Follower::check_empty(i64 index) const {
  for (i64 g = 0; g < groups_.count(); ++g) {
    const bool empty = sequences_.tokens(index, g) == 0 && sequences_.committed(index, g) == 0 &&
                       sequences_.front(index, g) == 0 && table_.holds(index, g);
    if (!empty || table_.has_memory(index)) refuse(sequences_.handle_of(index));
  }
}

void Follower::refuse(i64 handle) const {
  throw SpecError("the ops lack a record: sequence handle " + std::to_string(handle) +
                  " would be left with a length that its memory does not match");
}

void Follower::check_tails_again(i64 g) {
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    if (sequences_.live(index)) table_.check_tail_again(index, g);
  }
}

// Notes what an applied record means for this table: which tails must be checked again before the next write, because
// they may be shared now, and which memory was released. Returns whether the record may have mapped a page a second
// time. Throws SpecError if the record leaves an arena mapped in part.
bool Follower::note_effects(const Op& op) {
  const bool shorter = (op.kind == OpKind::length && op.b < op.c) || op.kind == OpKind::front;
  if (op.kind == OpKind::unbind || op.kind == OpKind::block || shorter) table_.note_released(op);
  if (op.kind == OpKind::block && op.c != 0) {  // the block may be the tail of any sequence
    const i64 inside = op.b * groups_[op.at].block_tokens + 1;
    const std::vector<i64> shared = table_.shared_pieces(sequences_.place_of(op.a), op.at, inside, inside);
    if (std::any_of(shared.begin(), shared.end(), [](i64 piece) { return piece >= 0; })) check_tails_again(op.at);
  }
  for (i64 g = 0; op.kind == OpKind::bind && g < groups_.count(); ++g) {
    table_.check_tail_again(sequences_.place_of(op.a), g);  // the row may share pages
  }
  if (shorter) {
    table_.check_tail_again(sequences_.place_of(op.a), op.at);
    if (op.kind == OpKind::length) table_.note_truncated(sequences_.place_of(op.a), op.at, op.c);
  }
  if ((op.kind == OpKind::map || op.kind == OpKind::unmap) && !table_.is_whole(op)) {
    throw SpecError("the ops lack a record: arena " + std::to_string(op.at) + " would be left mapped in part");
  }
  bool shares = false;
  for (i64 i = 0; op.kind == OpKind::map && !shares && i < op.c; ++i) shares = pool_.refs(op.b + i) > 1;
  return shares;
}

// Throws SpecError if the sequence still shares a page or block that it is about to write.
void Follower::check_grown(const Grown& g) const {
  const i64 index = sequences_.place_of(g.handle);
  if (!sequences_.live(index) || sequences_.handle_of(index) != g.handle) return;
  const std::vector<i64> now = table_.shared_pieces(index, g.group, g.from, g.end);
  for (std::size_t i = 0; i < std::min(now.size(), g.shared.size()); ++i) {
    if (now[i] < 0 || now[i] != g.shared[i]) continue;
    throw SpecError("the ops lack a record: sequence handle " + std::to_string(g.handle) +
                    " would grow in memory that another one reads");
  }
}

// Throws SpecError unless the lengths of a live sequence are possible and its memory exists.
void Follower::check_lengths(i64 index) const {
  for (i64 g = 0; g < groups_.count(); ++g) {
    const GroupGeometry& group = groups_[g];
    const i64 first = sequences_.front(index, g), done = sequences_.committed(index, g);
    const bool window = first == 0 || (group.window_tokens > 0 && first % group.block_tokens == 0 &&
                                       first <= done - group.window_tokens + 1);
    if (!window || first > done || done > sequences_.tokens(index, g) || !table_.holds(index, g)) {
      refuse(sequences_.handle_of(index));
    }
  }
}

}  // namespace kvmem
