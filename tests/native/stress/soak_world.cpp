#include "soak_world.h"

#include <algorithm>
#include <cstdio>

namespace kvmem_soak {

using namespace kvmem;

const std::array<World::Entry, kOperations>& World::entries() {
  static const std::array<Entry, kOperations> all{{
      {"admit", &World::admit, 40},
      {"open", &World::open, 4},
      {"admit_batch", &World::admit_batch, 8},
      {"extend", &World::extend, 40},
      {"extend_one", &World::extend_one, 12},
      {"extend_batch", &World::extend_batch, 20},
      {"step", &World::step_batch, 24},
      {"advance", &World::advance, 20},
      {"commit", &World::commit, 60},
      {"commit_batch", &World::commit_batch, 16},
      {"truncate", &World::truncate, 20},
      {"fork", &World::fork, 20},
      {"free", &World::free_one, 36},
      {"free_batch", &World::free_batch, 6},
      {"pin", &World::pin, 6},
      {"unpin", &World::unpin, 5},
      {"retain", &World::retain, 3},
      {"snapshot", &World::snapshot, 16},
      {"match", &World::match, 12},
      {"clear_cache", &World::clear_cache, 1},
      {"trim", &World::trim, 4},
      {"set_memory", &World::set_memory, 4},
      {"compact", &World::compact, 4},
      {"drain_events", &World::drain, 8},
      {"verify", &World::verify, 12},
      {"illegal", &World::illegal, 6},
      {"fault", &World::fault, 8},  // the last one: soak_params.cpp weighs it by itself
  }};
  return all;
}

i64 usual_weight(int operation) { return World::entries()[operation].weight; }

World::World(const Params& params, const Promises& promises, Progress& progress, bool trace)
    : params_(params), promises_(promises), progress_(progress), trace_(trace) {
  std::shared_ptr<Driver> driver = make_host_driver();
  if (params.faults) driver = driver_ = std::make_shared<CheckedDriver>(driver);
  pool_ = std::make_shared<PagePool>(params.page_bytes, params.pages, driver, params.create_ahead);
  for (i64 i = 0; i < params.allocators; ++i) {
    const bool paged = i == 0 ? params.paged : params.second_paged;
    sides_.push_back(std::make_unique<Side>(params, promises_, i, paged, pool_));
  }
  for (i64 weight : params.weights) total_weight_ += weight;
  const i64 block = sides_[0]->block_tokens(), rows = params.max_sequences;
  out_.max_sequences = rows, out_.max_blocks = ceil_div(params.max_tokens, block);
  out_.max_indices = rows * out_.max_blocks, out_.max_new_tokens = rows * params.max_tokens;
  table_.resize(out_.max_indices), lengths_.resize(rows), slots_.resize(out_.max_new_tokens);
  out_.block_table = table_.data(), out_.seq_lens = lengths_.data(), out_.slot_mapping = slots_.data();
  marks_ = std::make_unique<BatchMarks>(out_);
}

void World::step(i64 operation, bool check) {
  Random random(mix(params_.seed, static_cast<u64>(operation) + 1));
  side_ = sides_[random.below(params_.allocators)].get();
  i64 at = random.below(total_weight_);
  int chosen = 0;
  while (at >= params_.weights[chosen]) at -= params_.weights[chosen++];
  progress_.operation = operation, ++progress_.operations;
  if (trace_) std::printf("%6lld %s", static_cast<long long>(operation), entries()[chosen].name);
  if (trace_ && params_.allocators > 1) std::printf(" (allocator %lld)", static_cast<long long>(side_->number));
  try {
    (this->*entries()[chosen].run)(random);
    if (trace_) std::printf("\n");
    if (driver_ && operation % 8 == 0) driver_->clear_failures();
    side_->follow();
    if (operation % 128 == 0) side_->verify_books();
    if (check) verify_everything();
  } catch (const Error&) {
    if (!poisoned()) throw;
    note("poisoned\n");
  }
}

void World::settle() {
  if (driver_) driver_->clear_failures();
  pool_->mapper().wait_idle();
}

void World::verify_everything() {
  for (const auto& side : sides_) {
    side->verify_all();
    side->verify_books();
    side->verify_pins();
  }
}

void World::note(const std::string& what) {
  if (trace_) std::printf(" %s", what.c_str());
}

// ---- refusals ------------------------------------------------------------------------------------

World::Outcome World::call(Random& random, bool may_refuse, const std::function<void()>& what) {
  std::vector<u64> before;
  for (const auto& side : sides_) before.push_back(params_.careful ? side->tables_digest() : 0);
  // In worlds with `debug` the allocator itself compares a digest of its whole state.
  std::string why;
  Outcome outcome = Outcome::done;
  const bool fault = driver_ && driver_->pending_failures() > 0;
  try {
    what();
    return Outcome::done;
  } catch (const OutOfMemory& e) {
    why = e.what(), outcome = Outcome::short_of_memory;
  } catch (const SpecError& e) {
    if (!may_refuse) throw Failure(std::string("refusal: of what should work: ") + e.what());
    why = e.what(), outcome = Outcome::refused;
  } catch (const StaleHandle& e) {
    if (!may_refuse) throw Failure(std::string("refusal: of what should work: ") + e.what());
    why = e.what(), outcome = Outcome::refused;
  } catch (const DeviceError& e) {
    if (poisoned()) throw;
    if (!fault) throw Failure(std::string("device: ") + e.what());
    why = e.what(), outcome = Outcome::failed;
    ++progress_.faults;
  } catch (const Failure&) {
    throw;
  } catch (const std::exception& e) {
    throw Failure(std::string("exception: ") + e.what());
  }
  ++progress_.refused;
  note("refused");
  if (driver_) driver_->clear_failures();
  for (std::size_t i = 0; i < sides_.size(); ++i) {
    if (params_.careful && sides_[i]->tables_digest() != before[i])
      throw Failure("tables: a refused call changed them");
  }
  unchanged(random, why);
  return outcome;
}

void World::unchanged(Random& random, const std::string&) {
  const bool books = params_.careful || random.one_in(4);
  for (const auto& side : sides_) {
    side->follow();
    side->verify_all();
    if (books) side->verify_books();
    if (books) side->verify_pins();
  }
}

// Mostly somebody makes room.
void World::after_refusal(Random& random, Outcome outcome) {
  if (outcome != Outcome::short_of_memory || random.one_in(4)) return;
  if (Live* l = any(random)) release(random, *l);
}

// ---- choices -------------------------------------------------------------------------------------

Live* World::any(Random& random) { return side_->live.empty() ? nullptr : &random.pick(side_->live); }

std::vector<Live*> World::some(Random& random) {
  std::vector<Live*> chosen;
  for (Live& l : side_->live) {
    if (random.one_in(2)) chosen.push_back(&l);
  }
  for (std::size_t i = chosen.size(); i > 1; --i) std::swap(chosen[i - 1], chosen[random.below(static_cast<i64>(i))]);
  return chosen;
}

// Mostly the beginning of one that there was, cut anywhere or at a block, and something of its own.
std::vector<i32> World::prompt(Random& random) {
  std::vector<i32> ids;
  const i64 block = side_->unit(), most = params_.max_tokens;
  if (!prompts_.empty() && !random.one_in(12)) {
    const std::vector<i32>& old = random.pick(prompts_);
    i64 keep = random.one_in(3) ? static_cast<i64>(old.size()) : random.below(static_cast<i64>(old.size()) + 1);
    if (random.one_in(2)) keep = keep / block * block + random.below(2);
    ids.assign(old.begin(), old.begin() + std::min<i64>(keep, static_cast<i64>(old.size())));
  }
  const i64 own = random.one_in(3) ? random.below(3) : random.below(random.pick<i64>({8, 60, most}) + 1);
  for (i64 i = 0; i < own; ++i) ids.push_back(static_cast<i32>(random.below(params_.alphabet)));
  if (static_cast<i64>(ids.size()) > most) ids.resize(most);
  if (prompts_.size() < 12) {
    prompts_.push_back(ids);
  } else if (random.one_in(6)) {
    prompts_[random.below(12)] = ids;
  }
  return ids;
}

i64 World::draw_count(Random& random, const Live& l) const {
  const i64 left = params_.max_tokens - l.tokens(), block = side_->unit();
  const i64 script = static_cast<i64>(l.script.size() - std::min(l.script_at, l.script.size()));
  const i64 count =
      random.pick<i64>({0, 1, 1, 1, 2, block, script, script, random.below(3 * block + 1), random.below(left + 1)});
  return std::min(count, left);
}

bool World::has_memory_to_spare() const {
  if (driver_ && driver_->pending_failures() > 0) return false;
  i64 needed = 8, rows = 2;
  for (const GroupGeometry& group : side_->geometry.groups) {
    if (group.window_tokens > 0) rows += ceil_div(group.window_tokens, group.block_tokens) + 1;
    for (i64 bytes : group.token_bytes) {
      const i64 tokens = 2 * group.block_tokens + params_.guard_tokens;
      needed += 2 + tokens * bytes / params_.page_bytes;
    }
  }
  // Rows that are shared from are not given up for the one that shares (virtual), one for each block of a window if it
  // comes to that, nor is what is pinned.
  const i64 parked = params_.max_sequences + params_.cached_rows - static_cast<i64>(side_->live.size());
  if (!side_->paged && (parked < rows || !side_->pins.empty())) return false;
  const AllocatorStats s = side_->cache->stats();
  const i64 room = pool_->room_pages(), mapped = s.mapped_bytes / params_.page_bytes;
  return room >= needed && side_->limit_pages - mapped >= needed;
}

}  // namespace kvmem_soak
