// Copies in tiers below the device: random changes of one content index, against a map that says which blocks have
// which copies. Each transaction is committed, or undone newest first; after an undo the digest must be what it was.
//
//   tiers --seed N --transactions T      ends with 0 when nothing was wrong

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "index/prefix_index.h"
#include "soak_random.h"

namespace {

using namespace kvmem;
using kvmem_soak::Random;
using Path = std::vector<i32>;  // a block for each number, all of whose tokens are that number

constexpr i64 kBlockTokens = 4;
constexpr int kTiers = 4;

// Which tiers have a copy of the node and of its window's part; index 0 is the device.
struct Copies {
  bool node[kTiers] = {}, part[kTiers] = {};
  bool any() const { return node[0] || node[1] || node[2] || node[3]; }
};

class World {
 public:
  explicit World(std::uint64_t seed)
      : random_(seed), index_(kBlockTokens, {GroupKind::full, GroupKind::window}, "lru", 64, 0, 64) {
    bool made;
    root_ = index_.open_root({}, &made);
  }

  void transaction() {
    const std::map<Path, Copies> before = model_;
    const std::uint64_t digest = value();
    const i64 evicted = index_.evicted();
    undo_.clear();
    for (i64 i = random_.between(1, 12); i-- > 0;) change();
    const bool commit = !random_.one_in(3);
    if (!commit) {
      while (!undo_.empty()) undo_.back()(), undo_.pop_back();
      model_ = before;
    }
    index_.finish(commit);
    i64 lost = 0;
    for (const auto& [path, copies] : before) lost += copies.any() && commit && !model_[path].any();
    for (const Path& path : added_) lost += commit && !model_[path].any();
    added_.clear(), dropped_.clear();
    for (auto at = model_.begin(); at != model_.end();) at = at->second.any() ? std::next(at) : model_.erase(at);
    require(index_.evicted() == evicted + lost, "an eviction is the loss of a block's last copy, in whatever tier");
    if (!commit) require(value() == digest, "an undone transaction left a trace");
    compare();
  }

 private:
  void require(bool condition, const char* what) {
    if (condition) return;
    std::printf("wrong: %s\n", what);
    std::exit(1);
  }

  std::uint64_t value() {
    Hasher hash;
    index_.digest(hash);
    return hash.value();
  }

  i32 node_of(const Path& path) const {
    i32 node = root_;
    for (const i32 block : path) {
      if (node == kNoNode) break;
      const i32 tokens[kBlockTokens] = {block, block, block, block};
      node = index_.find(node, tokens);
    }
    return node;
  }

  bool has_longer(const Path& path, int tier) const {
    for (const auto& [other, copies] : model_) {
      const bool longer = other.size() > path.size() && std::equal(path.begin(), path.end(), other.begin());
      if (longer && (tier < 0 ? copies.any() : copies.node[tier])) return true;
    }
    return false;
  }

  void change() {
    const i64 kind = random_.below(8);
    if (kind < 3 || model_.empty()) return insert();
    auto at = model_.begin();
    std::advance(at, random_.below(static_cast<i64>(model_.size())));
    const i32 node = node_of(at->first);
    if (node == kNoNode || !at->second.any()) return;  // this transaction has dropped its last copy
    if (kind == 7) {                                   // all copies, the device's first
      for (int tier = 0; tier < kTiers; ++tier) {
        if (at->second.part[tier]) set(at->first, at->second, node, tier, 0);
        if (at->second.node[tier]) set(at->first, at->second, node, tier, -1);
      }
      return;
    }
    const int tier = static_cast<int>(random_.below(kTiers));
    set(at->first, at->second, node, tier, random_.one_in(2) ? 0 : -1);
  }

  // Adds the copy if there is none, else drops it. The device's copy goes from the last block of a chain first.
  void set(const Path& path, Copies& copies, i32 node, int tier, i32 window) {
    bool& has = window < 0 ? copies.node[tier] : copies.part[tier];
    if (window >= 0 && !copies.node[tier]) return;
    if (window < 0 && has && copies.part[tier]) return;
    if (window < 0 && tier == 0 && has && has_longer(path, 0)) return;
    const bool was_parent_there = path.size() == 1 || model_[Path(path.begin(), path.end() - 1)].node[0];
    if (window < 0 && tier == 0 && !has && !was_parent_there) return;
    const bool add = !has;
    has = add;
    // A block is lost once at most, and of a chain the last block first.
    const bool too_early = !copies.any() && (is_added(path) || has_longer(path, -1));
    has = !add;
    if (too_early) return;
    has = add;
    apply(node, tier, window, add, false);
    if (!copies.any()) {
      dropped_.insert(path);
      require(has_longer(path, -1) || node_of(path) == kNoNode, "a block without a copy is found before the commit");
    }
    undo_.push_back([=] { apply(node, tier, window, !add, true); });
  }

  bool is_added(const Path& path) const { return std::find(added_.begin(), added_.end(), path) != added_.end(); }

  void apply(i32 node, int tier, i32 window, bool add, bool undo) {
    if (!undo) index_.expect_change();
    const Tier where = static_cast<Tier>(tier);
    if (tier > 0)
      return add ? index_.add_copy({node, window}, where, undo) : index_.drop_copy({node, window}, where, undo);
    if (window >= 0)
      return add ? index_.add_window_copy(node, window, undo) : index_.drop_window_copy(node, window, undo);
    add ? index_.add_copy(node, 0, undo) : index_.drop_copy(node, 0, undo);
  }

  // A block behind a chain that is on the device, or a copy on the device of one that only lower tiers have.
  void insert() {
    Path path;
    i32 node = root_;
    for (i64 depth = random_.between(1, 4); depth-- > 0;) {
      path.push_back(static_cast<i32>(random_.below(3)));
      const i32 tokens[kBlockTokens] = {path.back(), path.back(), path.back(), path.back()};
      const i32 next = index_.find(node, tokens);
      if (next != kNoNode && model_[path].node[0]) {
        node = next;
        continue;
      }
      if (next != kNoNode && !model_[path].any()) return;
      const i32 parent = node;
      if (dropped_.count(path) > 0) return;
      if (next == kNoNode) {
        added_.push_back(path);
        node = index_.add(parent, tokens);
        index_.acquire(node);
        undo_.push_back([this, node] { index_.undo_acquire(node); });
        apply(node, 0, -1, true, false);
        undo_.push_back([this, node] { apply(node, 0, -1, false, true); });
        index_.drop(node);
        undo_.push_back([this, node] { index_.acquire(node); });
      } else {
        node = next;
        apply(node, 0, -1, true, false);
        undo_.push_back([this, node] { apply(node, 0, -1, false, true); });
      }
      model_[path].node[0] = true;
      return;
    }
  }

  void compare() {
    std::vector<std::string> wrong;
    std::vector<i32> users(static_cast<std::size_t>(index_.capacity()), 0);
    users[root_] = 1;
    index_.check(users, &wrong);
    for (const std::string& what : wrong) require(false, what.c_str());
    for (const auto& [path, copies] : model_) {
      const i32 node = node_of(path);
      require(node != kNoNode, "a block with a copy in some tier is not found");
      std::vector<i32> chain;
      for (std::size_t n = 1; n <= path.size(); ++n) chain.push_back(node_of(Path(path.begin(), path.begin() + n)));
      for (int tier = 0; tier < kTiers; ++tier) {
        const Tier where = static_cast<Tier>(tier);
        require(index_.has_copy({node, -1}, where) == copies.node[tier], "has_copy() of a node");
        require(index_.has_copy({node, 0}, where) == copies.part[tier], "has_copy() of a part");
        std::size_t run = 0;
        while (run < path.size() && model_[Path(path.begin(), path.begin() + run + 1)].node[tier]) ++run;
        require(index_.blocks_in(chain, where) == static_cast<i64>(run), "blocks_in()");
      }
    }
    for (auto at = model_.begin(); at != model_.end();) at = at->second.any() ? std::next(at) : model_.erase(at);
    for (i32 a = 0; a < 3; ++a) {
      if (node_of({a}) != kNoNode) require(has_longer({a}, -1) || model_[{a}].any(), "a block without a copy is found");
    }
  }

  Random random_;
  PrefixIndex index_;
  i32 root_;
  std::map<Path, Copies> model_;
  std::vector<Path> added_;  // by the transaction in progress
  std::set<Path> dropped_;   // by the transaction in progress: those whose last copy is gone
  std::vector<std::function<void()>> undo_;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t seed = 1;
  long transactions = 100000;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::string(argv[i]) == "--transactions") transactions = std::atol(argv[i + 1]);
  }
  std::printf("tiers: --seed %llu --transactions %ld\n", static_cast<unsigned long long>(seed), transactions);
  World world(seed);
  while (transactions-- > 0) world.transaction();
  std::puts("tiers: 0 failed");
  return 0;
}
