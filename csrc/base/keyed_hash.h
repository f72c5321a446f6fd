// A keyed hash of bytes that an attacker may choose: SipHash-1-3 (Aumasson and Bernstein). Without the key nobody can
// construct colliding inputs, so nobody can degrade a hash table to a single bucket.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace kvmem {

class KeyedHash {
 public:
  KeyedHash(std::uint64_t first, std::uint64_t second) : first_(first), second_(second) {}

  std::uint64_t operator()(const std::string& bytes) const {
    State s{first_ ^ 0x736f6d6570736575u, second_ ^ 0x646f72616e646f6du, first_ ^ 0x6c7967656e657261u,
            second_ ^ 0x7465646279746573u};
    const char* at = bytes.data();
    std::size_t left = bytes.size();
    for (; left >= 8; at += 8, left -= 8) {
      std::uint64_t word;
      std::memcpy(&word, at, 8);
      s.take(word);
    }
    std::uint64_t last = 0;
    std::memcpy(&last, at, left);
    s.take(last | std::uint64_t{bytes.size()} << 56);
    s.c ^= 0xff;
    for (int i = 0; i < 3; ++i) s.round();
    return s.a ^ s.b ^ s.c ^ s.d;
  }

 private:
  struct State {
    std::uint64_t a, b, c, d;
    static std::uint64_t rotate(std::uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
    void round() {
      a += b, b = rotate(b, 13) ^ a, a = rotate(a, 32);
      c += d, d = rotate(d, 16) ^ c;
      a += d, d = rotate(d, 21) ^ a;
      c += b, b = rotate(b, 17) ^ c, c = rotate(c, 32);
    }
    void take(std::uint64_t word) {
      d ^= word;
      round();
      a ^= word;
    }
  };
  std::uint64_t first_, second_;
};

}  // namespace kvmem
