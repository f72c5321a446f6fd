#include "soak_side.h"

#include <algorithm>

namespace kvmem_soak {

using namespace kvmem;

Side::Side(const Params& world, const Promises& held_to, i64 side, bool is_paged, std::shared_ptr<PagePool> shared)
    : params(world),
      promises(held_to),
      number(side),
      paged(is_paged),
      geometry(world.geometry(is_paged)),
      pool(std::move(shared)),
      router(geometry) {
  geometry = with_unit(geometry, world.shares ? shared_unit(geometry) : 0);  // as the cache has it
  limit_pages = world.allocators == 1 ? world.pages : std::max<i64>(4, world.pages * 3 / 4);
  cache = std::make_unique<Allocator>(geometry, pool, paged, limit_pages, world.allocators == 1, world.prefix());
  for (std::size_t g = geometry.groups.size(); g-- > 0;) {
    if (geometry.groups[g].growth == Growth::token) token_group_ = static_cast<i64>(g);
    if (geometry.groups[g].growth == Growth::fixed) state_group_ = static_cast<i64>(g);
    has_window_ = has_window_ || geometry.groups[g].window_tokens > 0;
  }
  if (!world.recording) return;
  cache->record();
  PrefixOptions none;
  none.on = false;
  replica_pool = std::make_shared<PagePool>(world.page_bytes, world.most_pages, make_host_driver(), world.create_ahead);
  replica = std::make_unique<Allocator>(geometry, replica_pool, paged, world.most_pages, true, none);
}

std::string Side::name(const Live& live) const {
  return "allocator " + std::to_string(number) + ", sequence " + std::to_string(live.handle);
}

// ---- the model -----------------------------------------------------------------------------------

Live& Side::add(i32 handle, i64 key) {
  live.emplace_back();
  live.back().handle = handle;
  live.back().key = key;
  live.back().fronts.assign(geometry.groups.size(), 0);
  return live.back();
}

void Side::remove(std::size_t which) {
  std::swap(live[which], live.back());
  live.pop_back();
}

void Side::take_cached(Live& l, const std::vector<i32>& prompt, i64 cached) {
  u64 writer = first_writer(number, l.key);
  for (i64 i = 0; i < cached; ++i) l.writers.push_back(writer = writer_after(writer, prompt[i]));
  l.ids.assign(prompt.begin(), prompt.begin() + cached);
  l.committed = l.known = cached;
  l.script = prompt;
  l.script_at = static_cast<std::size_t>(cached);
  for (i64 g = 0; g < groups(); ++g) {
    if (geometry.groups[g].growth == Growth::token) l.fronts[g] = window_front(g, cached);
  }
  if (cached > 0 && has_state()) l.has_state = true, l.state = l.writers.back();
  lookups += std::max<i64>(0, static_cast<i64>(prompt.size()) - 1);
  hits += cached;
}

void Side::write_next(Live& l, i64 count, Random& random) {
  const i64 before = l.tokens();
  const bool told = !random.one_in(24);
  for (i64 i = 0; i < count; ++i) {
    const bool scripted = l.script_at < l.script.size();
    const i32 drawn = static_cast<i32>(random.below(params.alphabet));
    const i32 next = scripted ? l.script[l.script_at++] : drawn;
    const u64 last = l.writers.empty() ? first_writer(number, l.key) : l.writers.back();
    l.ids.push_back(told ? next : kUntold);
    l.writers.push_back(told ? writer_after(last, next) : mix(mix(last, ++untold), 0xDEAD));
  }
  if (cache->lengths(l.handle, has_state() ? state_group_ : token_group_).tokens > 0 && has_state() && !l.has_state) {
    l.has_state = true;
    write_state(l, l.committed);
  }
  verify_finite(l, before);
  if (l.tokens() > 0) l.cut = 0;  // of none, nothing is loaded
  const auto write = [](u64* at, u64 word) { *at = word; };
  for (Allocator* in : {cache.get(), replica.get()}) {
    if (in) each_word(*in, l, write, before, false);
  }
  if (params.eager_states && count > 0) write_state(l, l.tokens());
}

void Side::answer_for_state(Live& l, i64 tokens) {
  if (!params.eager_states) {
    write_state(l, tokens);
  } else if (l.state_ahead && tokens > l.committed) {
    write_state(l, l.tokens());
  }
}

void Side::write_state(Live& l, i64 tokens) {
  if (!l.has_state) return;
  l.state = tokens == 0 ? first_writer(number, l.key) : l.writers[tokens - 1];
  const auto write = [](u64* at, u64 word) { *at = word; };
  for (Allocator* in : {cache.get(), replica.get()}) {
    if (in) each_word(*in, l, write, l.tokens(), true);
  }
}

void Side::note_committed(Live& l, i64 count, bool told) {
  if (told && cache->shares() && l.known == l.committed) l.known += count;
  l.committed += count;
  if (told && count > 0) l.state_ahead = false;
  for (i64 g = 0; g < groups(); ++g) {
    if (geometry.groups[g].growth == Growth::token) l.fronts[g] = std::max(l.fronts[g], window_front(g, l.committed));
  }
}

void Side::remember(const Live& l) {
  if (l.known == 0) return;
  const Prefix prefix{l.key, {l.ids.begin(), l.ids.begin() + l.known}};
  if (committed.size() < 48) {
    committed.push_back(prefix);
  } else {
    committed[mix(l.writers.back()) % committed.size()] = prefix;
  }
}

bool Side::can_tell(const Live& l, i64 count) const {
  const auto first = l.ids.begin() + l.committed;
  return std::find(first, first + count, kUntold) == first + count;
}

std::vector<i32> Side::changed_ids(const Live& l, i64 count) const {
  return {l.ids.begin() + l.committed, l.ids.begin() + l.committed + count};
}

i64 Side::found(const std::vector<i32>& ids, i64 key) {
  std::vector<i32> more = ids;
  more.push_back(kSentinel);
  return cache->match(more.data(), static_cast<i64>(more.size()), key_of(key)).tokens;
}

// ---- content -------------------------------------------------------------------------------------

// The first and last word of each token from `from` on, or of the states, in each arena.
template <class Touch>
void Side::each_word(Allocator& in, const Live& l, Touch touch, i64 from, bool states) {
  for (i64 g = 0; g < groups(); ++g) {
    const GroupGeometry& group = geometry.groups[g];
    if ((group.growth == Growth::fixed) != states) continue;
    const i64 first = states ? 0 : std::max(from, l.fronts[g]), end = states ? 1 : l.tokens();
    if (first >= end) continue;
    const Placement at = in.place(l.handle, g);
    for (std::size_t a = 0; a < group.token_bytes.size(); ++a) {
      const i64 bytes = group.token_bytes[a];
      const Address base = in.pool().space()->arena_base(static_cast<i32>(in.first_arena(g) + static_cast<i64>(a)));
      for (i64 token = first; token < end; ++token) {
        const i64 ordinal = quotient(token, group.block_tokens);
        const i64 block = at.blocks ? at.blocks[ordinal] : at.first_block + ordinal;
        const i64 slot = block * group.block_tokens + remainder(token, group.block_tokens);
        auto* words = reinterpret_cast<u64*>(base + static_cast<Address>(slot * bytes));
        const u64 word = word_of(states ? l.state : l.writers[token], g, static_cast<i64>(a));
        touch(words, word);
        if (bytes >= 16) touch(words + bytes / 8 - 1, ~word);
      }
    }
  }
}

void Side::compare_content(Allocator& in, const Live& l, const char* where) {
  i64 wrong = 0;
  const auto compare = [&wrong](const u64* at, u64 word) { wrong += *at != word; };
  each_word(in, l, compare, 0, false);
  if (wrong > 0) {
    throw Failure(std::string("bytes") + where + ": " + std::to_string(wrong) + " words of " + name(l) + " (" +
                  std::to_string(l.tokens()) + " tokens, " + std::to_string(l.committed) +
                  " committed) are not what was written");
  }
  if (l.has_state) each_word(in, l, compare, 0, true);
  if (wrong > 0) {
    throw Failure(std::string("bytes") + where + ": the state of " + name(l) + " is not what was written");
  }
}

void Side::verify_lengths(const Live& l) {
  for (i64 g = 0; g < groups(); ++g) {
    i64 tokens = 0, done = 0;
    cache->lengths(&l.handle, 1, g, &tokens, &done);
    const bool state = geometry.groups[g].growth == Growth::fixed;
    const i64 want = state ? l.has_state : l.tokens(), want_done = state ? l.has_state : l.committed;
    if (tokens != want || done != want_done || cache->lengths(l.handle, g).front != l.fronts[g]) {
      throw Failure("lengths: " + name(l) + ", group " + std::to_string(g) + " has " + std::to_string(tokens) +
                    " tokens, " + std::to_string(done) + " committed, from " +
                    std::to_string(cache->lengths(l.handle, g).front) + " on; should be " + std::to_string(want) +
                    ", " + std::to_string(want_done) + ", " + std::to_string(l.fronts[g]));
    }
  }
}

void Side::verify(const Live& l) {
  verify_lengths(l);
  compare_content(*cache, l, "");
  if (replica) compare_content(*replica, l, " in the replica");
  verify_finite(l, l.tokens());
}

void Side::verify_all() {
  std::vector<i64> is = cache->handles(), ought;
  for (const Live& l : live) ought.push_back(l.handle);
  std::sort(is.begin(), is.end());
  std::sort(ought.begin(), ought.end());
  if (is != ought) {
    throw Failure("sequences: allocator " + std::to_string(number) + " has " + std::to_string(is.size()) +
                  " live sequences, of which somebody knows " + std::to_string(ought.size()));
  }
  for (const Live& l : live) verify(l);
}

void Side::follow() {
  if (!replica) return;
  AllocatorStats here;
  std::vector<Op> ops = cache->take_ops();
  do {  // the mapper may fail between two calls, which the first to look takes back: again until nothing came between
    try {
      replica->apply(ops);
    } catch (const Error& e) {
      throw Failure(std::string("replica: it refuses what was done: ") + e.what());
    }
    here = cache->stats();
    ops = cache->take_ops();
  } while (!ops.empty());
  for (const Live& l : live) {
    for (i64 g = 0; g < groups(); ++g) {
      i64 a[2], b[2];
      cache->lengths(&l.handle, 1, g, a, a + 1);
      replica->lengths(&l.handle, 1, g, b, b + 1);
      if (a[0] != b[0] || a[1] != b[1]) throw Failure("replica: " + name(l) + " has other lengths there");
    }
  }
  const AllocatorStats there = replica->stats();
  const auto compare = [](const char* what, i64 a, i64 b) {
    if (a != b) throw Failure("replica: " + std::to_string(b) + " " + what + ", not " + std::to_string(a));
  };
  compare("bytes mapped", here.mapped_bytes, there.mapped_bytes);
  compare("bytes in use", here.used_bytes, there.used_bytes);
  compare("bytes shared", here.shared_bytes, there.shared_bytes);
}

u64 Side::tables_digest() {
  u64 digest = 0;
  for (const Live& l : live) {
    for (i64 g = 0; g < groups(); ++g) {
      const GroupGeometry& group = geometry.groups[g];
      const Placement at = cache->place(l.handle, g);
      digest = mix(digest, static_cast<u64>(at.first_block));
      const i64 end = group.growth == Growth::fixed ? l.has_state : ceil_div(l.tokens(), group.block_tokens);
      for (i64 b = l.fronts[g] / group.block_tokens; at.blocks && b < end; ++b) {
        digest = mix(digest, static_cast<u64>(at.blocks[b]));
      }
    }
  }
  return digest;
}

// ---- promises ------------------------------------------------------------------------------------

void Side::verify_books() {
  for (const std::string& what : cache->check()) throw Failure("check: " + what);
  const AllocatorStats s = cache->stats();
  const auto must = [](bool holds, const char* what) {
    if (!holds) throw Failure(std::string("stats: ") + what);
  };
  must(s.num_sequences == static_cast<i64>(live.size()), "another number of sequences than there are");
  must(s.used_bytes <= s.mapped_bytes, "more is used than is mapped");
  must(s.shared_bytes <= s.mapped_bytes, "more is shared than is mapped");
  must(s.parked_bytes <= s.mapped_bytes, "more is parked than is mapped");
  must(s.mapped_bytes <= s.created_bytes && s.created_bytes <= s.budget_bytes, "more pages than there may be");
  must(s.hit_tokens <= s.lookup_tokens, "more tokens found than looked for");
  if (!promises.stats) return;
  must(s.cached_bytes <= s.mapped_bytes, "more is cached than is mapped");
  must(!cache->shares() || s.hit_tokens == hits, "hits are not those of the admissions");
  must(!cache->shares() || s.lookup_tokens == lookups, "look-ups are not those of the admissions");
}

void Side::verify_pins() {
  if (!promises.pins) return;
  for (const Pinned& pin : pins) {
    const i64 is = found(pin.ids, pin.key);
    if (is != static_cast<i64>(pin.ids.size())) {
      throw Failure("pins: " + std::to_string(is) + " tokens are found of " + std::to_string(pin.ids.size()) +
                    " that are pinned");
    }
  }
}

// All blocks of a live sequence that its windows have not passed are there.
void Side::verify_found(const Live& l) {
  if (!cache->shares() || has_state() || l.known == 0) return;
  const i64 whole = l.known / unit() * unit();
  for (i64 g = 0; g < groups(); ++g) {
    if (window_front(g, whole) < l.fronts[g]) return;
  }
  if (whole == 0 || (has_window() && !promises.states)) return;
  const i64 is = found({l.ids.begin(), l.ids.begin() + whole}, l.key);
  if (is != whole) {
    throw Failure("found: of the " + std::to_string(whole) + " tokens that a live sequence shows, " +
                  std::to_string(is) + " are found");
  }
}

void Side::verify_events(Random& random) {
  if (params.event_capacity == 0 || !cache->shares()) return;
  const i64 most = random.one_in(3) ? random.below(20) : -1;
  const std::shared_ptr<EventBatch> batch = cache->drain_events(taken_events, most, random.one_in(20));
  taken_events = batch->number;
  router.follow(batch->records, batch->roots);
  if (!promises.events || params.partial || most >= 0) return;
  for (const Prefix& prefix : committed) {
    const i64 told = router.predict(prefix.ids, key_of(prefix.key), unit());
    const i64 is = found(prefix.ids, prefix.key);
    if (told == is || router.needs_nothing(std::max(told, is))) continue;
    throw Failure("events: they say that " + std::to_string(told) + " of " + std::to_string(prefix.ids.size()) +
                  " tokens are cached, and match() finds " + std::to_string(is));
  }
}

}  // namespace kvmem_soak
