// A world's operations on what is cached, on memory, and those that ought to be refused.

#include <algorithm>
#include <cmath>

#include "soak_world.h"

namespace kvmem_soak {

using namespace kvmem;

namespace {

std::string text(i64 value) { return std::to_string(value); }

}  // namespace

void World::kept(Random&, i64 pin, i64 pinned, i64 key, const std::vector<i32>& ids) {
  if (pinned < 0 || pinned > static_cast<i64>(ids.size())) throw Failure("pins: more than there is was pinned");
  note("pin " + text(pin) + " of " + text(pinned));
  side_->pins.push_back({pin, key, {ids.begin(), ids.begin() + pinned}});
  side_->verify_pins();
}

void World::pin(Random& random) {
  if (side_->pins.size() >= 6) return unpin(random);
  kvmem::Pins::Pinned made{};
  if (random.one_in(2)) {
    Live* l = any(random);
    if (!l) return;
    const i64 tokens = random.one_in(2) ? -1 : random.below(l->known + 1);
    note(text(l->handle) + " to " + text(tokens));
    const Outcome outcome = call(random, true, [&] { made = side_->cache->pin(l->handle, tokens); });
    if (outcome == Outcome::done) kept(random, made.pin, made.tokens, l->key, l->ids);
  } else {
    const std::vector<i32> ids = prompt(random);
    const i64 key = any_key(random), n = static_cast<i64>(ids.size());
    note(text(n) + " tokens");
    const Outcome outcome = call(random, true, [&] { made = side_->cache->pin(ids.data(), n, key_of(key)); });
    if (outcome == Outcome::done) kept(random, made.pin, made.tokens, key, ids);
  }
}

void World::unpin(Random& random) {
  if (side_->pins.empty()) return;
  const auto at = side_->pins.begin() + random.below(static_cast<i64>(side_->pins.size()));
  const i64 pin = at->pin;
  note(text(pin));
  if (call(random, false, [&] { side_->cache->unpin(pin); }) != Outcome::done) return;
  side_->pins.erase(at);
  if (random.one_in(4)) call(random, true, [&] { side_->cache->unpin(pin); });
}

void World::retain(Random& random) {
  Live* l = any(random);
  if (!l) return;
  const i64 start = random.below(l->tokens() + 1), end = start + 1 + random.below(params_.max_tokens);
  const int priority = static_cast<int>(random.below(101));
  const double seconds = params_.timed ? random.pick({1e-9, 1e6, 1e300}) : HUGE_VAL;
  note(text(l->handle) + " [" + text(start) + ", " + text(end) + ") at " + text(priority));
  call(random, false, [&] { side_->cache->retain(l->handle, start, end, priority, seconds); });
}

void World::snapshot(Random& random) {
  Live* l = any(random);
  if (!l || !side_->has_state()) return;
  if (random.one_in(2)) {  // make it one that can be kept
    const i64 block = side_->unit(), rest = (block - l->tokens() % block) % block;
    const i32 count = static_cast<i32>(std::min(rest, params_.max_tokens - l->tokens()));
    if (call(random, false, [&] { side_->cache->extend(&l->handle, &count, 1, -1); }) != Outcome::done) return;
    side_->follow();
    side_->write_next(*l, count, random);
    const i32 due = static_cast<i32>(l->due());
    const bool told = side_->can_tell(*l, due);
    const std::vector<i32> ids = side_->changed_ids(*l, due);
    side_->write_state(*l, l->tokens());
    const auto commits = [&] { side_->cache->commit(&l->handle, &due, 1, -1, told ? ids.data() : nullptr); };
    if (call(random, false, commits) != Outcome::done) return;
    committed(*l, due, told);
  }
  note(text(l->handle));
  const bool right = !l->writers.empty() && l->has_state && l->state == l->writers.back();
  const Outcome outcome = call(random, true, [&] { side_->cache->snapshot(l->handle); });
  if (outcome != Outcome::done) return;
  if (!right || l->known != l->tokens()) throw Failure("states: a snapshot was taken of a state of other tokens");
  side_->follow();
  // After a truncation a window may begin later than that of a sequence which begins there.
  for (i64 g = 0; g < side_->groups(); ++g) {
    if (side_->window_front(g, l->tokens()) < l->fronts[g]) return;
  }
  if (promises_.states && side_->found(l->ids, l->key) != l->tokens()) {
    throw Failure("states: a snapshot that was just taken of " + text(l->tokens()) + " tokens is not found, but " +
                  text(side_->found(l->ids, l->key)));
  }
}

void World::match(Random& random) {
  const std::vector<i32> ids = prompt(random);
  const i64 key = any_key(random), n = static_cast<i64>(ids.size());
  const i64 is = side_->cache->match(ids.data(), n, key_of(key)).tokens;
  note(text(n) + " tokens, key " + text(key) + ": " + text(is));
  if (is < 0 || is > std::max<i64>(0, n - 1)) throw Failure("match: more than there is");
}

void World::look_at_all() {
  side_->follow();
  side_->verify_all();
  side_->verify_pins();
}

void World::clear_cache(Random& random) {
  call(random, false, [&] { side_->cache->clear_cache(); });
  look_at_all();
}

void World::trim(Random& random) {
  const i64 bytes = random.one_in(2) ? -1 : random.below(params_.pages + 1) * params_.page_bytes;
  note(text(bytes));
  call(random, false, [&] { side_->cache->trim(bytes); });
  look_at_all();
}

void World::set_memory(Random& random) {
  const i64 most = params_.allocators == 1 ? params_.most_pages : params_.pages;
  const i64 pages = random.one_in(2) ? params_.pages : 1 + random.below(most);
  note(text(pages));
  if (call(random, false, [&] { side_->cache->set_memory(pages); }) == Outcome::done) side_->limit_pages = pages;
  look_at_all();
}

void World::compact(Random& random) {
  const i64 bytes = random.one_in(2) ? -1 : random.below(params_.pages + 1) * params_.page_bytes;
  note(text(bytes));
  call(random, false, [&] { side_->cache->compact(bytes); });
  look_at_all();
}

void World::drain(Random& random) { side_->verify_events(random); }

void World::verify(Random& random) {
  if (random.one_in(6)) {
    side_->verify_all();
    side_->verify_books();
  } else if (Live* l = any(random)) {
    side_->verify(*l);
    side_->verify_found(*l);
  }
  side_->verify_pins();
}

// What must be refused, whatever there is.
void World::illegal(Random& random) {
  Allocator& cache = *side_->cache;
  const Live* l = any(random);
  const i32 handle = l ? l->handle : 0, one = 1;
  const i32 stale = handle ^ 0x40000000;
  Outcome outcome = Outcome::refused;
  const i64 kind = random.below(8);
  note(text(kind));
  if (kind == 0) outcome = call(random, true, [&] { cache.extend(&stale, &one, 1, -1); });
  if (kind == 1) outcome = call(random, true, [&] { cache.free(&stale, 1); });
  if (kind == 2) outcome = call(random, true, [&] { cache.fork(stale); });
  if (kind == 3 && l) {
    const i32 much = static_cast<i32>(l->due() + 1);
    outcome = call(random, true, [&] { cache.commit(&handle, &much, 1, -1, nullptr); });
  }
  if (kind == 4 && l) outcome = call(random, true, [&] { cache.truncate(handle, l->tokens() + 1); });
  if (kind == 5) outcome = call(random, true, [&] { cache.unpin(-1); });
  if (kind == 6 && l) {
    const i32 twice[] = {handle, handle}, none[] = {0, 0};
    outcome = call(random, true, [&] { cache.commit(twice, none, 2, -1, nullptr); });
  }
  if (kind == 7 && l) {
    const i32 ids[] = {1, 2};
    outcome = call(random, true, [&] { cache.step(handle, 0, ids, l->due() + 1); });
  }
  if (outcome == Outcome::done) throw Failure("refusal: what is wrong was taken");
}

void World::fault(Random& random) {
  if (!driver_) return;
  const char* const verb =
      random.pick<const char*>({"", "", "create", "map", "unmap", "zero", "copy", "record", "set_access"});
  const i64 nth = random.between(1, 6), code = random.one_in(3) ? 2 : 700;
  note(std::string(verb) + " " + text(nth) + " code " + text(code));
  driver_->fail(verb, nth, code, random.one_in(10));
  if (!random.one_in(40)) return;
  for (i64 next = nth + 1; next < nth + 4; ++next) driver_->fail("", next, code, true);  // undoing too: it is poisoned
}

void World::finish_poisoned() {
  const auto refused = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const DeviceError& e) {
      if (std::string(e.what()).find("cannot be trusted") != std::string::npos) return;
    }
    throw Failure("poisoned: a call was not refused");
  };
  for (const auto& side : sides_) {
    const i32 handle = side->live.empty() ? 1 : side->live[0].handle, one = 1;
    refused([&] { side->cache->extend(&handle, &one, 1, -1); });
    refused([&] { side->cache->free(&handle, 1); });
    refused([&] { side->cache->trim(-1); });
    refused([&] { side->cache->check(); });
    if (side->cache->close()) throw Failure("poisoned: close() says that all is well");
  }
  sides_.clear();
  pool_.reset();
  const CheckedDriver::Live left = driver_->live();
  if (left.mappings != 0 || left.pages != 0 || left.reservations != 0 || left.events != 0) {
    throw Failure("poisoned: the end leaves " + text(left.mappings) + " mappings, " + text(left.pages) + " pages, " +
                  text(left.reservations) + " reservations, " + text(left.events) + " events");
  }
  ++progress_.poisoned;
}

void World::finish() {
  for (const auto& side : sides_) {
    side_ = side.get();
    Random random(params_.seed);
    side_->verify_all();
    side_->verify_pins();
    std::vector<i32> handles;
    for (const Live& l : side_->live) handles.push_back(l.handle);
    side_->cache->free(handles.data(), static_cast<i64>(handles.size()));
    side_->live.clear();
    side_->follow();
    side_->verify_books();
    side_->verify_pins();
    for (const Pinned& pin : side_->pins) side_->cache->unpin(pin.pin);
    side_->pins.clear();
    progress_.evicted += side_->cache->stats().evicted_blocks;
    side_->cache->clear_cache();
    side_->verify_events(random);
    const AllocatorStats s = side_->cache->stats();
    if (s.used_bytes != 0 || s.cached_blocks != 0 || s.pinned_blocks != 0 || s.shared_bytes != 0) {
      throw Failure("end: with nothing live or cached, " + text(s.used_bytes) + " bytes are used, " +
                    text(s.shared_bytes) + " shared, " + text(s.cached_blocks) + " blocks cached, " +
                    text(s.pinned_blocks) + " pinned");
    }
    side_->verify_books();
  }
  for (const auto& side : sides_) side->replica.reset(), side->cache.reset();
  if (pool_->mapped_pages() != 0) throw Failure("end: pages are mapped after all allocators are gone");
}

}  // namespace kvmem_soak
